//! Every image that a crash while a disk is made or grows with places could leave: the old disk or
//! the new one, whose new bytes are zeros, and never what lay in the file before.

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{CrashOptions, CrashStorage};
use tidemark_qcow2::{CreateOptions, Image, Preallocation};

use crate::common::{add_bitmap, alone, assert_covers, built, open_bytes, read_all, writing};
use crate::{MODES, at};

/// An image whose file has holes full of old data: clusters that were written and given up.
fn base(cluster_bits: u32, extended_l2: bool, size: u64) -> Vec<u8> {
    let options = CreateOptions {
        cluster_bits,
        extended_l2,
        ..CreateOptions::new(size)
    };
    built(&options, |image| {
        image.write(&vec![0xee; at(size)], 0).unwrap();
        image.flush().unwrap();
        image.discard(0, size / 2).unwrap();
        image.flush().unwrap();
        image.write(&vec![0xaa; 30_000], 10_000).unwrap();
        add_bitmap(image, "b", 4096);
    })
}

fn sweep(
    cluster_bits: u32,
    extended_l2: bool,
    mode: Preallocation,
    (from, to): (u64, u64),
    sample: usize,
) -> (usize, usize) {
    let start = base(cluster_bits, extended_l2, from);
    let old = read_all(&open_bytes(start.clone(), writing()).unwrap());
    let storage = CrashStorage::new(start);
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    image.grow(to, mode).unwrap();
    storage.note(1);
    image.write(&vec![7; 9000], to - 9000).unwrap();
    image.flush().unwrap();
    storage.note(2);
    image.close().unwrap();
    let log = storage.log();
    let mut images = 0;
    for crash in log.images(CrashOptions::default()) {
        let what = format!(
            "2^{cluster_bits} {mode:?}, image {images}: {}",
            crash.description
        );
        let image = open_bytes(crash.bytes.clone(), writing())
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let report = image.check().unwrap();
        let harm = (report.check_errors, report.corruptions);
        assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
        let sure = log.notes_before(crash.position).into_iter().max();
        let content = read_all(&image);
        assert!(
            sure.is_none() || image.size() == to,
            "{what}: the size is lost"
        );
        assert!(content[..old.len()] == old, "{what}: the old disk");
        for (step, &byte) in content[old.len()..].iter().enumerate() {
            let written = step + old.len() >= at(to) - 9000;
            let flushed = written && sure == Some(2);
            let fits = byte == if flushed { 7 } else { 0 } || written && byte == 7;
            assert!(fits, "{what}: {byte:#x} at {step:#x} behind the old end");
        }
        let bits = image.load_bitmap("b").unwrap();
        assert_covers(&bits, &old, &content, &what);
        if oracle::available() && images % sample == 0 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("crash.qcow2");
            std::fs::write(&path, &crash.bytes).unwrap();
            qemu_img::check(&path).assert_at_worst_leaks();
            assert!(qemu_img::convert_to_raw(&path) == content, "{what}: QEMU");
        }
        images += 1;
    }
    (log.points(), images)
}

#[test]
fn a_crash_while_a_disk_grows_leaves_the_old_disk_or_zeros_behind_it() {
    let _alone = alone();
    let (mut points, mut images) = (0, 0);
    for (mode, _) in MODES {
        for (cluster_bits, extended_l2, from, to) in [
            (9, false, 50_176, 150_016),
            (12, false, 300_032, 900_096),
            (14, true, 300_032, 900_096),
            (16, false, 300_032, 2 << 20),
        ] {
            let found = sweep(cluster_bits, extended_l2, mode, (from, to), 53);
            points += found.0;
            images += found.1;
        }
    }
    println!("{points} points, {images} images");
    assert!(
        points >= 100 && images >= 500,
        "the sweep shrank: {points}, {images}"
    );
}

#[test]
fn a_crash_while_an_image_is_made_leaves_no_image_or_a_disk_of_zeros() {
    let (mut opened, mut images) = (0, 0);
    for (mode, _) in MODES {
        for (cluster_bits, extended_l2) in [(9, false), (14, true), (16, false)] {
            let options = CreateOptions {
                cluster_bits,
                extended_l2,
                preallocation: mode,
                ..CreateOptions::new(200_192)
            };
            let storage = CrashStorage::new(vec![0xee; 400_000]);
            let image = Image::create(Box::new(storage.clone()), &options, writing()).unwrap();
            image.close().unwrap();
            for crash in storage.log().images(CrashOptions::default()) {
                images += 1;
                let Ok(image) = open_bytes(crash.bytes, writing()) else {
                    continue;
                };
                let report = image.check().unwrap();
                let harm = (report.check_errors, report.corruptions);
                assert_eq!(harm, (0, 0), "{}", crash.description);
                assert!(read_all(&image).iter().all(|&byte| byte == 0));
                opened += 1;
            }
        }
    }
    println!("{images} images, {opened} of them are disks");
    assert!(
        images >= 150 && opened >= 60,
        "the sweep shrank: {images}, {opened}"
    );
}
