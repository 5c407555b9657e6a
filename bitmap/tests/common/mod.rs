//! Bitmaps to test with, and the model to test against: one bit for each 512-byte sector.
//!
//! Every granularity is a multiple of a sector, so the model is exact. It reads a bitmap's
//! serialized bytes and nothing else, bit by bit.

use bitvec::order::Lsb0;
use bitvec::vec::BitVec;
use proptest::collection::vec;
use proptest::prelude::*;
use tidemark_bitmap::{Bitmap, Granularity, Page, Shape};

pub(crate) type Model = BitVec<u64, Lsb0>;

pub(crate) const SECTOR: u64 = 512;

/// How to fill a bitmap. Positions are 32-bit fractions of the disk.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Mark(u32, u64),
    ClearInward(u32, u64),
    /// A page of words made from a seed, bits past the disk's end included.
    Noise(u32, u64),
    /// A page by table entry.
    Uniform(u32, bool),
}

pub(crate) fn index(position: u64) -> usize {
    usize::try_from(position).unwrap()
}

pub(crate) fn disk_bytes() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => Just(0),
        2 => 1..70_000_u64,
        6 => 0..(6_u64 << 20),
        2 => (0..96_u64).prop_map(|chunks| chunks << 16),
        1 => 0..(24_u64 << 20),
    ]
}

pub(crate) fn granularity() -> impl Strategy<Value = Granularity> {
    prop_oneof![4 => 9..13_u8, 3 => 13..19_u8, 1 => 19..32_u8]
        .prop_map(|bits| Granularity::from_bits(bits).unwrap())
}

pub(crate) fn page_bytes() -> impl Strategy<Value = u32> {
    prop_oneof![3 => Just(512_u32), 1 => Just(1024), 2 => Just(4096), 1 => Just(65_536)]
}

pub(crate) fn shape_of(disk: u64) -> impl Strategy<Value = Shape> {
    (granularity(), page_bytes()).prop_map(move |(g, page)| Shape::new(disk, g, page).unwrap())
}

fn step() -> impl Strategy<Value = Step> {
    let length = || prop_oneof![1..2000_u64, 1..200_000_u64, 1..(4_u64 << 20)];
    prop_oneof![
        4 => (any::<u32>(), length()).prop_map(|(at, length)| Step::Mark(at, length)),
        2 => (any::<u32>(), length()).prop_map(|(at, length)| Step::ClearInward(at, length)),
        2 => any::<(u32, u64)>().prop_map(|(at, seed)| Step::Noise(at, seed)),
        2 => any::<(u32, bool)>().prop_map(|(at, ones)| Step::Uniform(at, ones)),
    ]
}

pub(crate) fn filled(shape: Shape) -> impl Strategy<Value = Bitmap> {
    (any::<bool>(), vec(step(), 0..8)).prop_map(move |(starts_dirty, steps)| {
        let mut bitmap = if starts_dirty {
            Bitmap::all_dirty(shape)
        } else {
            Bitmap::new(shape)
        };
        steps.iter().for_each(|step| apply(&mut bitmap, step));
        bitmap
    })
}

pub(crate) fn bitmap() -> impl Strategy<Value = Bitmap> {
    disk_bytes().prop_flat_map(shape_of).prop_flat_map(filled)
}

/// Two bitmaps of one disk, each with its own granularity and page size.
pub(crate) fn two_shapes() -> impl Strategy<Value = (Bitmap, Bitmap)> {
    disk_bytes()
        .prop_flat_map(|disk| (shape_of(disk), shape_of(disk)))
        .prop_flat_map(|(ours, theirs)| (filled(ours), filled(theirs)))
}

/// Three bitmaps of one shape.
pub(crate) fn one_shape() -> impl Strategy<Value = (Bitmap, Bitmap, Bitmap)> {
    disk_bytes()
        .prop_flat_map(shape_of)
        .prop_flat_map(|shape| (filled(shape), filled(shape), filled(shape)))
}

pub(crate) fn apply(bitmap: &mut Bitmap, step: &Step) {
    let shape = bitmap.shape();
    let disk = shape.disk_bytes();
    let range = |at: u32, length: u64| {
        let start = (disk * u64::from(at)) >> 32;
        start..(start + length).min(disk)
    };
    let page = |at: u32| (u64::try_from(shape.pages()).unwrap() * u64::from(at)) >> 32;
    match *step {
        Step::Mark(at, length) => bitmap.mark(range(at, length)).unwrap(),
        Step::ClearInward(at, length) => bitmap.clear_inward(range(at, length)).unwrap(),
        Step::Noise(..) | Step::Uniform(..) if disk == 0 => {}
        Step::Noise(at, seed) => {
            let words = noise(seed, shape.words_per_page());
            bitmap.set_page(index(page(at)), Page::Bits(words));
        }
        Step::Uniform(at, ones) => {
            bitmap.set_page(index(page(at)), if ones { Page::Ones } else { Page::Zeros });
        }
    }
}

/// Words with long runs, short runs, zero words and full words.
pub(crate) fn noise(seed: u64, words: usize) -> Box<[u64]> {
    let mut state = seed | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state ^ (state >> 29)
    };
    (0..words)
        .map(|_| match next() >> 61 {
            0 | 1 => 0,
            2 => u64::MAX,
            3 => 1 << (next() >> 58),
            4 => !(1 << (next() >> 58)),
            5 => next() & next() & next(),
            6 => next() | next() | next(),
            _ => next(),
        })
        .collect()
}

/// The serialized bits of a bitmap within the disk, tail included up to whole bytes.
pub(crate) fn serialized(bitmap: &Bitmap) -> Vec<u8> {
    let shape = bitmap.shape();
    let page_bytes = usize::try_from(shape.page_bytes()).unwrap();
    let mut bytes = vec![0xa5; page_bytes * shape.pages()];
    for (page, out) in bytes.chunks_mut(page_bytes).enumerate() {
        bitmap.write_page(page, out);
    }
    let past_end = bytes.split_off(index(shape.serialized_bytes()));
    assert!(
        past_end.iter().all(|byte| *byte == 0),
        "bits past the disk's end are zero"
    );
    bytes
}

/// The bitmap's bits, one for each granule.
pub(crate) fn bits(bitmap: &Bitmap) -> Model {
    let bytes = serialized(bitmap);
    let mut bits = Model::new();
    for bit in 0..bytes.len() * 8 {
        bits.push(bytes[bit / 8] >> (bit % 8) & 1 != 0);
    }
    let end = index(bitmap.shape().bits());
    assert!(bits[end..].not_any(), "bits past the disk's end are zero");
    bits.truncate(end);
    bits
}

/// The bitmap's bytes of the disk, one bit for each sector.
pub(crate) fn sectors(bitmap: &Bitmap) -> Model {
    let bits = bits(bitmap);
    let shape = bitmap.shape();
    let per_granule = shape.granularity().bytes() / SECTOR;
    (0..shape.disk_bytes().div_ceil(SECTOR))
        .map(|at| bits[index(at / per_granule)])
        .collect()
}

/// Sectors rounded to granules: a granule is set if any (`outward`) or all of its sectors are.
pub(crate) fn rounded(sectors: &Model, granularity: Granularity, outward: bool) -> Model {
    let per_granule = index(granularity.bytes() / SECTOR);
    let mut result = Model::new();
    for granule in sectors.chunks(per_granule) {
        let is_set = if outward {
            granule.any()
        } else {
            granule.all()
        };
        result.resize(result.len() + granule.len(), is_set);
    }
    result
}
