//! Random operations against the plain model of a disk, over versions, cluster sizes, refcount
//! widths and backing files.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{add_bitmap, assert_covers, granularity, open_bytes, read_all, reading, writing};
use proptest::prelude::*;
use tidemark_fixtures::image_bits;
use tidemark_fixtures::model::DiskModel;
use tidemark_fixtures::ops::{Op, ops};
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{CreateOptions, Image, proof};

const SIZE: u64 = (5 << 20) + 512;

fn read_range(image: &Image, range: &std::ops::Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
    image.read(&mut bytes, range.start).unwrap();
    bytes
}

/// Freezes the recording bitmap and begins another, as a checkpoint does.
fn freeze(image: &Image, number: usize) {
    image
        .update(|update| {
            let old = format!("c{number}");
            let bits = update.load(&old)?;
            update.put(&old, bits, false)?;
            let mut new = update.blank(granularity(4096))?;
            proof::plant(update.image(), &mut new)?;
            update.put(&format!("c{}", number + 1), new, true)
        })
        .unwrap();
}

fn apply(image: &Image, model: &mut DiskModel, op: &Op) {
    match *op {
        Op::Write { offset, len, seed } => {
            image
                .write(&tidemark_fixtures::ops::fill(seed, len), offset)
                .unwrap();
        }
        Op::WriteZeroes { offset, len } => image.write_zeroes(offset, len).unwrap(),
        Op::Discard { offset, len } => image.discard(offset, len).unwrap(),
        Op::Flush => image.flush().unwrap(),
        Op::Checkpoint | Op::Reopen => {}
    }
    if let Some(range) = model.apply(op) {
        let read_back = read_range(image, &range);
        model.settle(range, &read_back);
    }
}

fn run(options: &CreateOptions, list: &[Op], check_with_qemu: bool) {
    let mut storage = CrashStorage::new(Vec::new());
    let mut image = Image::create(Box::new(storage.clone()), options, writing()).unwrap();
    let mut model = DiskModel::new(SIZE);
    let tracked = options.version == 3;
    let mut moments = vec![model.content().to_vec()];
    if tracked {
        add_bitmap(&image, "c0", 4096);
    }
    for op in list {
        apply(&image, &mut model, op);
        match op {
            Op::Reopen => {
                image.close().unwrap();
                storage = CrashStorage::new(storage.to_bytes());
                image = Image::open(Box::new(storage.clone()), writing()).unwrap();
            }
            Op::Checkpoint if tracked => {
                freeze(&image, moments.len() - 1);
                moments.push(model.content().to_vec());
            }
            _ => {}
        }
    }
    assert!(read_all(&image) == model.content());
    image.close().unwrap();
    let bytes = storage.to_bytes();
    let image = open_bytes(bytes.clone(), reading()).unwrap();
    assert!(read_all(&image) == model.content());
    assert!(image_bits::guest_content(&bytes).unwrap() == model.content());
    if tracked {
        for (number, moment) in moments.iter().enumerate() {
            let until = moments
                .get(number + 1)
                .map_or(model.content(), Vec::as_slice);
            let bits = image.load_bitmap(&format!("c{number}")).unwrap();
            assert_covers(&bits, moment, until, &format!("interval {number}"));
        }
    }
    if check_with_qemu {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.qcow2");
        std::fs::write(&path, bytes).unwrap();
        qemu_img::check(&path).assert_clean();
        assert!(qemu_img::convert_to_raw(&path) == model.content());
    }
}

fn options() -> impl Strategy<Value = CreateOptions> {
    (2u32..=3, 9u32..=21, 0u32..=6).prop_map(|(version, cluster_bits, order)| CreateOptions {
        version,
        cluster_bits,
        refcount_bits: if version == 2 { 16 } else { 1 << order },
        ..CreateOptions::new(SIZE)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("TIDEMARK_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(60)
    ))]

    #[test]
    fn random_operations_agree_with_the_model(options in options(), list in ops(SIZE, 24)) {
        run(&options, &list, oracle::available());
    }
}
