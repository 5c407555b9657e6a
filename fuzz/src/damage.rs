//! Bytes choose an image, and entries of its structures that become something else.
//!
//! Checked: nothing panics; opening, reading and checking change no byte; a write is refused or
//! read back at once; no write of the guest ever lands in the header, an L1, L2 or refcount
//! structure that the image had or has afterwards. Not checked: that other guest clusters keep
//! their content (two that share a host cluster cannot), bitmaps under a guest write, and what
//! QEMU says of the same damage; `qcow2/tests/hostile` and `qcow2/tests/check` are about those.

use std::sync::OnceLock;

use tidemark_fixtures::builder::{Bitmap, Chunk, Cluster, ImageBuilder};
use tidemark_fixtures::corrupt::{get_u32, get_u64, set_u64};
use tidemark_fixtures::golden;
use tidemark_fixtures::ops::fill;
use tidemark_qcow2::{Image, OpenOptions};

use crate::bounded::Bounded;
use crate::input::Input;

/// What guest writes consist of; no structure of any image has this in a row.
const GUEST: [u8; 512] = [0xE7; 512];
/// Bytes of the disk that are read.
const MAX_GUEST_BYTES: u64 = 4 << 20;
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
const MAX_DAMAGES: usize = 4;

/// A part of the file that holds 8-byte words of metadata.
#[derive(Debug, Clone, Copy)]
struct Structure {
    offset: u64,
    len: u64,
}

/// Images that QEMU made, small ones with every kind of structure.
const GOLDEN: [&str; 8] = [
    "v2",
    "v3",
    "bitmaps",
    "snapshot",
    "compressed",
    "zstd",
    "extended-l2",
    "refcount-1",
];

fn images() -> &'static [Vec<u8>] {
    static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let shapes = [(9, 4), (9, 0), (12, 4), (12, 6), (16, 1)];
        let built = shapes.map(|(bits, order)| built(bits, order));
        let golden = GOLDEN.into_iter().map(golden::load);
        built.into_iter().chain(golden).collect()
    })
}

fn built(cluster_bits: u32, order: u32) -> Vec<u8> {
    let cluster = 1 << cluster_bits;
    let data = |seed| Cluster::Data(fill(seed, cluster));
    let bits = Chunk::Bits(vec![0x33; 64]);
    ImageBuilder::new(96 * cluster)
        .cluster_bits(cluster_bits)
        .refcount_order(order)
        .cluster(0, data(1))
        .cluster(1, data(2))
        .cluster(3, Cluster::Zero)
        .cluster(4, Cluster::ZeroAllocated(fill(3, cluster)))
        .cluster(5, Cluster::Compressed(vec![0xEE; 1 << cluster_bits]))
        .cluster(70, data(4))
        .bitmap(Bitmap::new("a", 9).table(vec![bits]))
        .bitmap(Bitmap::new("b", 16).flags(0).table(vec![Chunk::Ones]))
        .build()
        .bytes
}

/// Every L1, L2 and refcount structure that `image` refers to and that lies in the file, and its
/// header; with `more`, the snapshot table and everything within the header's cluster as well.
fn structures(image: &[u8], more: bool) -> Vec<Structure> {
    let end = u64::try_from(image.len()).expect("a small file");
    let cluster_bits = match image.len() < 112 {
        true => 9,
        false => get_u32(image, 20).clamp(9, 21),
    };
    let cluster = 1_u64 << cluster_bits;
    let header = if more { cluster } else { 72 };
    let mut found = vec![Structure {
        offset: 0,
        len: header.min(end),
    }];
    if image.len() < 112 {
        return found;
    }
    let mut add = |offset: u64, len: u64| {
        let inside = offset != 0 && offset.checked_add(len).is_some_and(|last| last <= end);
        inside.then(|| found.push(Structure { offset, len }))
    };
    let tables = [
        (get_u64(image, 40), u64::from(get_u32(image, 36)) * 8),
        (get_u64(image, 48), u64::from(get_u32(image, 56)) * cluster),
    ];
    for (offset, len) in tables {
        if add(offset, len).is_none() {
            continue;
        }
        for entry in (0..len / 8).map(|number| get_u64(image, offset + number * 8)) {
            add(entry & OFFSET, cluster);
        }
    }
    if more && get_u32(image, 60) != 0 {
        add(get_u64(image, 64), 64);
    }
    found
}

/// Puts something else into one word of one structure.
fn damage(input: &mut Input<'_>, image: &mut [u8], places: &[Structure]) {
    let place = places[input.below(places.len())];
    let words = usize::try_from(place.len / 8).expect("a small structure");
    if words == 0 {
        return;
    }
    // The first words of a table are those in use.
    let word = match input.byte() % 4 {
        0 => input.below(words),
        _ => input.below(words.min(16)),
    };
    let at = place.offset + u64::try_from(word).expect("a small structure") * 8;
    let old = get_u64(image, at);
    let target = places[input.below(places.len())].offset;
    let new = match input.byte() % 8 {
        0 => 0,
        1 => u64::MAX,
        2 | 3 => old ^ 1 << (input.byte() % 64),
        4 => target | 1 << 63,
        5 => target,
        6 => old.wrapping_add(input.number(3) << 9),
        _ => input.number(8),
    };
    set_u64(image, at, new);
}

/// Damages an image and does everything with it; panics when something of the above fails.
pub fn damaged(data: &[u8]) {
    let (image, _) = damage_of(data);
    read(&image);
    let after = write(&image);
    let metadata = |bytes: &[u8]| structures(bytes, false);
    let both = metadata(&image).into_iter().filter(|place| {
        let still = metadata(&after);
        still.iter().any(|other| other.offset == place.offset)
    });
    assert_clean_of_guest_data(&after, both);
}

/// The damaged image of an input, and the sound one.
pub fn damage_of(data: &[u8]) -> (Vec<u8>, &'static [u8]) {
    let mut input = Input::new(data);
    let images = images();
    let sound = images[input.below(images.len())].as_slice();
    let places = structures(sound, true);
    let mut image = sound.to_vec();
    for _ in 0..MAX_DAMAGES {
        if !input.is_empty() {
            damage(&mut input, &mut image, &places);
        }
    }
    (image, sound)
}

/// Panics when guest data lies on metadata; in a test also with guest data put there on purpose.
fn assert_clean_of_guest_data(image: &[u8], places: impl Iterator<Item = Structure>) {
    for place in places {
        let start = usize::try_from(place.offset).expect("a small file");
        let end = start + usize::try_from(place.len).expect("a small file");
        let sectors = image[start..end].chunks(512);
        let hit = sectors.into_iter().any(|sector| sector == GUEST);
        assert!(!hit, "guest data lies on metadata at {start:#x}");
    }
}

/// The last check alone, on an image as it is.
pub fn no_guest_data_on_metadata(image: &[u8]) {
    assert_clean_of_guest_data(image, structures(image, false).into_iter());
}

/// Overwrites one L2 table with what guests write, for a canary.
pub fn with_guest_data_on_a_table(image: &[u8]) -> Vec<u8> {
    let mut image = image.to_vec();
    let place = structures(&image, false);
    let table = place.iter().rev().find(|place| place.len >= 512);
    let start = usize::try_from(table.expect("it has tables").offset).expect("a small file");
    image[start..start + 512].copy_from_slice(&GUEST);
    image
}

fn read(bytes: &[u8]) {
    let storage = Bounded::new(bytes);
    let shared = || Box::new(storage.clone());
    if let Ok(image) = Image::open(shared(), OpenOptions::default()) {
        let len = image.size().min(MAX_GUEST_BYTES);
        let mut guest = vec![0; usize::try_from(len).expect("at most 4 MiB")];
        let _ = image.read(&mut guest, 0);
        let _ = image.map(0, len);
        for info in image.bitmaps().unwrap_or_default() {
            let _ = image.load_bitmap(&info.name);
        }
        let _ = image.snapshots();
    }
    let _ = tidemark_qcow2::check::check(shared());
    assert!(storage.to_bytes() == bytes, "reading changed the file");
}

/// Writes here and there; returns the file afterwards.
fn write(bytes: &[u8]) -> Vec<u8> {
    let storage = Bounded::new(bytes);
    let options = OpenOptions {
        writable: true,
        ..OpenOptions::default()
    };
    let Ok(image) = Image::open(Box::new(storage.clone()), options) else {
        assert!(storage.to_bytes() == bytes, "a refusal changed the file");
        return bytes.to_vec();
    };
    let cluster = image.geometry().cluster_bytes();
    let data = GUEST.repeat(usize::try_from(cluster / 512).expect("a small cluster"));
    for number in [0, 1, 2, 4, 5, 70, 71] {
        for (at, part) in [(0, 512), (0, data.len())] {
            let offset = number * cluster + at;
            if offset + cluster > image.size() || image.write(&data[..part], offset).is_err() {
                continue;
            }
            let mut back = vec![0; part];
            if image.read(&mut back, offset).is_ok() {
                assert!(back == data[..part], "a write was not read back");
            }
        }
        let _ = image.flush();
    }
    let _ = image.discard(0, cluster.min(image.size()));
    let _ = image.close();
    storage.to_bytes()
}
