//! Both ways with QEMU: images that QEMU made and resized, and ours, by contents and bits.

use std::path::Path;

use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{CreateOptions, Shrink};

use crate::common::{add_bitmap, alone, create_file, open_file, read_all, reading, writing};

const SIZES: [u64; 6] = [512, 300_032, 1 << 20, 5 << 20, (5 << 20) + 512, 40 << 20];

/// QEMU's hash of every bitmap is that of the bits which are stored, read by nobody's encoder.
fn assert_bitmaps_agree(path: &Path, names: &[&str]) {
    let bytes = std::fs::read(path).unwrap();
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_read_only(path);
    for name in names {
        let stored = image_bits::bitmap(&bytes, name).unwrap().unwrap();
        assert_eq!(daemon.bitmap_sha256(&node, name), stored.sha256(), "{name}");
    }
    daemon.close(&node);
    daemon.quit();
}

#[test]
fn qemu_reads_what_we_resized_and_we_read_what_qemu_resized() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for (cluster, compat) in [
        ("512", "1.1"),
        ("4096", "1.1"),
        ("65536", "1.1"),
        ("65536", "0.10"),
    ] {
        for (from, to) in SIZES.iter().flat_map(|&a| SIZES.map(|b| (a, b))) {
            if from == to || (cluster == "512" && from.max(to) > 8 << 20) {
                continue;
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            qemu_img::create(
                &path,
                from,
                &[("cluster_size", cluster), ("compat", compat)],
            );
            let bitmaps = compat == "1.1";
            let names: &[&str] = if bitmaps { &["a", "z"] } else { &[] };
            let len = from.min(700_000).to_string();
            for name in names {
                qemu_img::bitmap_add(&path, name, Some(65_536));
            }
            qemu_io::commands(
                &path,
                &[&format!("write -P 5 {} {len}", from - from.min(700_000))],
            );
            if bitmaps {
                qemu_img::bitmap_disable(&path, "z");
            }
            let mut expected = qemu_img::convert_to_raw(&path);
            let image = open_file(&path, writing());
            image.resize(to, Shrink::Allowed).unwrap();
            expected.resize(usize::try_from(to).unwrap(), 0);
            assert!(read_all(&image) == expected, "{cluster} {from} {to}");
            image.close().unwrap();
            qemu_img::check(&path).assert_clean();
            assert!(
                qemu_img::convert_to_raw(&path) == expected,
                "QEMU: {cluster} {from} {to}"
            );
            if bitmaps && cases % 7 == 0 {
                assert_bitmaps_agree(&path, names);
            }
            // Back by QEMU, read by us.
            qemu_img::resize(&path, from);
            let theirs = qemu_img::convert_to_raw(&path);
            let image = open_file(&path, reading());
            assert!(read_all(&image) == theirs, "{cluster} {from} {to} and back");
            for name in names {
                image.load_bitmap(name).unwrap();
            }
            cases += 1;
        }
    }
    println!("{cases} cases");
    assert!(cases >= 100, "the matrix shrank: {cases}");
}

#[test]
fn recording_bitmaps_gain_the_grown_range_and_frozen_ones_do_not() {
    require_qemu!();
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    qemu_img::create(&path, 1 << 20, &[]);
    let image = open_file(&path, writing());
    add_bitmap(&image, "recording", 65_536);
    add_bitmap(&image, "frozen", 4096);
    image
        .update(|update| update.set_recording("frozen", false))
        .unwrap();
    image.write(&[1; 100], 0).unwrap();
    image.resize(3 << 20, Shrink::Refused).unwrap();
    image.close().unwrap();
    let extents = tidemark_fixtures::oracle::nbd::dirty_extents(&path, "recording");
    assert_eq!(
        extents,
        [
            (0, 65_536, true),
            (65_536, 983_040, false),
            (1 << 20, 2 << 20, true)
        ]
    );
    let extents = tidemark_fixtures::oracle::nbd::dirty_extents(&path, "frozen");
    assert_eq!(extents, [(0, 3 << 20, false)]);
    assert_bitmaps_agree(&path, &["recording", "frozen"]);
}

/// A disk of no bytes has no L1 table: its offset is zero, where the header lies.
#[test]
fn a_disk_of_no_bytes_grows_and_keeps_its_header() {
    require_qemu!();
    let _alone = alone();
    for ours in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        if ours {
            let image = create_file(&path, &CreateOptions::new(0));
            image.close().unwrap();
        } else {
            qemu_img::create(&path, 0, &[]);
        }
        qemu_img::check(&path).assert_clean();
        let image = open_file(&path, writing());
        image.resize(300_032, Shrink::Refused).unwrap();
        image.write(&[7; 70_000], 100_000).unwrap();
        let content = read_all(&image);
        image.close().unwrap();
        qemu_img::check(&path).assert_clean();
        assert!(qemu_img::convert_to_raw(&path) == content, "ours: {ours}");
    }
}
