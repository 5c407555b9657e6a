//! Random operations against the plain model of a disk, with a data file beside the image.

use proptest::prelude::*;
use tidemark_fixtures::model::DiskModel;
use tidemark_fixtures::ops::{Op, fill, ops};
use tidemark_fixtures::oracle;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::Image;

use crate::common::{add_bitmap, assert_covers, read_all};
use crate::{Shape, assert_qemu_reads, beside, open, shape};

const SIZE: u64 = (3 << 20) + 512;

fn apply(image: &Image, model: &mut DiskModel, op: &Op) {
    match *op {
        Op::Write { offset, len, seed } => image.write(&fill(seed, len), offset).unwrap(),
        Op::WriteZeroes { offset, len } => image.write_zeroes(offset, len).unwrap(),
        Op::Discard { offset, len } => image.discard(offset, len).unwrap(),
        Op::Flush => image.flush().unwrap(),
        Op::Checkpoint | Op::Reopen => {}
    }
    if let Some(range) = model.apply(op) {
        let mut read_back = vec![0; usize::try_from(range.end - range.start).unwrap()];
        image.read(&mut read_back, range.start).unwrap();
        model.settle(range, &read_back);
    }
}

fn run(shape: Shape, list: &[Op], with_qemu: bool) {
    let (options, raw) = (shape.options(SIZE), shape.raw);
    let mut storage = CrashStorage::new(Vec::new());
    // Old content of the file must never show.
    let mut data = CrashStorage::new(vec![0xee; 1 << 20]);
    let image = Image::create(Box::new(storage.clone()), &options, beside(data.clone()));
    let mut image = image.unwrap();
    let mut model = DiskModel::new(SIZE);
    add_bitmap(&image, "b", 4096);
    let base = model.content().to_vec();
    for op in list {
        apply(&image, &mut model, op);
        if *op == Op::Reopen {
            image.close().unwrap();
            storage = CrashStorage::new(storage.to_bytes());
            data = CrashStorage::new(data.to_bytes());
            image = open(storage.clone(), data.clone()).unwrap();
        }
        if raw {
            assert!(data.to_bytes() == model.content(), "after {op:?}");
        }
    }
    assert!(read_all(&image) == model.content());
    image.close().unwrap();
    let (bytes, outside) = (storage.to_bytes(), data.to_bytes());
    let image = open(storage, data).unwrap();
    assert!(read_all(&image) == model.content());
    let bits = image.load_bitmap("b").unwrap();
    assert_covers(&bits, &base, model.content(), "bitmap");
    let report = image.check().unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    assert_eq!(image.header().has_raw_data_file(), raw);
    if with_qemu {
        assert_qemu_reads(&bytes, &outside, model.content(), "model");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("TIDEMARK_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(40)
    ))]

    #[test]
    fn random_operations_beside_a_data_file_agree_with_the_model(
        cluster_bits in 9_u32..=18, raw: bool, extended: bool, list in ops(SIZE, 20)
    ) {
        let shape = shape(cluster_bits, raw, extended && cluster_bits >= 14);
        run(shape, &list, oracle::available() && list.len() % 3 == 0);
    }
}
