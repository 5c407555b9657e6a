//! Random operations, compressed writes among them, against a vector of bytes.

use proptest::prelude::*;
use tidemark_fixtures::ops::{Op, ops};
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{CompressionType, CreateOptions, Image};

use crate::common::{add_bitmap, assert_covers, open_bytes, reading, writing};
use crate::ours::assert_sound;
use crate::{noise, text, to_usize};

const SIZE: u64 = (3 << 20) + 512;

/// What a write of `len` bytes writes: some of it shrinks, some does not.
fn data(seed: u64, len: usize) -> Vec<u8> {
    match seed % 5 {
        0 => noise(seed, len),
        1 => vec![0; len],
        _ => text(seed, len),
    }
}

/// The whole clusters that hold a range.
fn outward(offset: u64, len: u64, cluster: u64) -> std::ops::Range<u64> {
    offset / cluster * cluster..(offset + len).next_multiple_of(cluster).min(SIZE)
}

fn apply(image: &Image, model: &mut [u8], op: &Op) {
    let cluster = image.geometry().cluster_bytes();
    match *op {
        Op::Write { offset, len, seed } => {
            // Half of the writes are compressed.
            let compressed = seed >> 63 == 1;
            let range = if compressed {
                outward(offset, len, cluster)
            } else {
                offset..offset + len
            };
            let bytes = data(seed, to_usize(range.end - range.start));
            model[to_usize(range.start)..to_usize(range.end)].copy_from_slice(&bytes);
            if compressed {
                image.write_compressed(&bytes, range.start).unwrap();
            } else {
                image.write(&bytes, range.start).unwrap();
            }
        }
        Op::WriteZeroes { offset, len } => {
            image.write_zeroes(offset, len).unwrap();
            model[to_usize(offset)..to_usize(offset + len)].fill(0);
        }
        Op::Discard { offset, len } => {
            image.discard(offset, len).unwrap();
            let range = to_usize(offset)..to_usize(offset + len);
            let old = model[range.clone()].to_vec();
            image.read(&mut model[range.clone()], offset).unwrap();
            let pairs = old.iter().zip(&model[range]);
            assert!(pairs.into_iter().all(|(old, new)| new == old || *new == 0));
        }
        Op::Flush => image.flush().unwrap(),
        Op::Checkpoint | Op::Reopen => {}
    }
}

/// Returns the compressed clusters that there were in the end.
fn run(options: &CreateOptions, list: &[Op]) -> u64 {
    let mut storage = CrashStorage::new(Vec::new());
    let mut image = Image::create(Box::new(storage.clone()), options, writing()).unwrap();
    let mut model = vec![0; to_usize(SIZE)];
    if options.version == 3 {
        add_bitmap(&image, "b", 4096);
    }
    for op in list {
        apply(&image, &mut model, op);
        if matches!(op, Op::Reopen | Op::Checkpoint) {
            image.close().unwrap();
            storage = CrashStorage::new(storage.to_bytes());
            image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        }
        // Small reads in a row use the clusters that were kept.
        for at in (0..SIZE - 512).step_by(100_003) {
            let mut piece = [0; 300];
            image.read(&mut piece, at).unwrap();
            assert!(piece == model[to_usize(at)..to_usize(at) + 300]);
        }
    }
    image.close().unwrap();
    let bytes = storage.to_bytes();
    if options.version == 3 {
        let image = open_bytes(bytes.clone(), reading()).unwrap();
        let bits = image.load_bitmap("b").unwrap();
        assert_covers(&bits, &vec![0; model.len()], &model, "the only interval");
    }
    assert_sound(bytes, &model, &format!("{options:?}"))
}

fn options() -> impl Strategy<Value = CreateOptions> {
    let flags = (any::<bool>(), any::<bool>());
    (2u32..=3, 9u32..=19, 0u32..=6, flags).prop_map(
        |(version, cluster_bits, order, (zstd, extended))| CreateOptions {
            version,
            cluster_bits,
            extended_l2: extended && version == 3 && cluster_bits >= 14,
            refcount_bits: if version == 2 { 16 } else { 1 << order },
            compression_type: if zstd && version == 3 {
                CompressionType::Zstd
            } else {
                CompressionType::Zlib
            },
            ..CreateOptions::new(SIZE)
        },
    )
}

#[test]
fn random_operations_with_compressed_writes_agree_with_the_model() {
    let cases = std::env::var("TIDEMARK_CASES")
        .ok()
        .and_then(|number| number.parse().ok())
        .unwrap_or(40);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(cases));
    let counts = std::cell::Cell::new((0, 0));
    runner
        .run(&(options(), ops(SIZE, 16)), |(options, list)| {
            let found = run(&options, &list);
            let (runs, compressed) = counts.get();
            counts.set((runs + 1, compressed + found));
            Ok(())
        })
        .unwrap();
    let (runs, compressed) = counts.get();
    println!("{runs} lists of operations left {compressed} compressed clusters");
    assert!(runs >= cases && compressed > 1000);
}
