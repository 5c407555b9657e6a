//! An overlay that grows over a longer backing file shows zeros there.

use std::path::Path;

use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{
    BackingReference, CreateOptions, Error, Feature, FileStorage, Image, Sharing, Shrink,
};

use crate::common::{alone, create_file, open_file, read_all, reading, writing};

const BASE: u64 = 3 << 20;

/// Cluster bits, version, extended L2 entries.
type Shape = (u32, u32, bool);

fn overlay(
    dir: &Path,
    (cluster_bits, version, extended_l2): Shape,
    size: u64,
) -> std::path::PathBuf {
    let base = create_file(&dir.join("base"), &CreateOptions::new(BASE));
    base.write(&vec![7; usize::try_from(BASE).unwrap()], 0)
        .unwrap();
    base.close().unwrap();
    let path = dir.join("overlay");
    let options = CreateOptions {
        cluster_bits,
        version,
        extended_l2,
        backing: Some(BackingReference {
            name: b"base".to_vec(),
            format: "qcow2".to_owned(),
        }),
        ..CreateOptions::new(size)
    };
    create_file(&path, &options).close().unwrap();
    path
}

#[test]
fn what_an_overlay_gains_reads_as_zero_whatever_is_below() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    let shapes: [Shape; 6] = [
        (9, 3, false),
        (12, 2, false),
        (14, 3, true),
        (16, 3, false),
        (16, 2, false),
        (21, 3, false),
    ];
    for shape in shapes {
        for (size, grown) in [
            (512, BASE + 512),
            (300_032, 600_064),
            (1 << 20, 2 << 20),
            (BASE - 512, BASE),
            (BASE + 512, 2 * BASE),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = overlay(dir.path(), shape, size);
            let image = open_file(&path, writing());
            image.resize(grown, Shrink::Refused).unwrap();
            let mut expected = vec![7; usize::try_from(size.min(BASE)).unwrap()];
            expected.resize(usize::try_from(grown).unwrap(), 0);
            assert!(read_all(&image) == expected, "{shape:?} {size}");
            image.close().unwrap();
            assert!(read_all(&open_file(&path, reading())) == expected);
            qemu_img::check(&path).assert_clean();
            assert!(
                qemu_img::convert_to_raw(&path) == expected,
                "QEMU reads other bytes"
            );
            cases += 1;
        }
    }
    println!("{cases} cases");
    assert_eq!(cases, 30);
}

#[test]
fn a_disk_whose_backing_file_was_not_opened_does_not_grow_over_it() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = overlay(dir.path(), (16, 3, false), 1 << 20);
    let before = std::fs::read(&path).unwrap();
    let storage = FileStorage::open(&path, true, Sharing::Exclusive).unwrap();
    let image = Image::open_unbacked(Box::new(storage), true).unwrap();
    let error = image.resize(2 << 20, Shrink::Refused).unwrap_err();
    assert!(matches!(
        error,
        Error::Unsupported {
            feature: Feature::Backing { .. },
            ..
        }
    ));
    image.close().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), before);
}
