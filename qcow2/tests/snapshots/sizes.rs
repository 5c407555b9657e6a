//! A snapshot of a disk of another size is applied: bitmaps follow the size and say what moved.

use std::path::Path;

use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::{CrashOptions, CrashStorage};
use tidemark_qcow2::{Bitmap, CreateOptions, Image, Moment, Shrink};

use crate::common::{self, add_bitmap, alone, assert_covers, built, open_bytes, read_all, writing};
use crate::life::{Disk, MIB, Place, text};
use crate::turns::{assert_both_read, our_writes};

/// A whole number of no cluster, of 4 KiB, of 64 KiB.
const SIZES: [u64; 3] = [MIB - 1536, 2 * MIB + 4096, 3 * MIB];
const GRANULARITY: u64 = 4096;

fn grow(image: &Image, disk: &mut Disk, size: u64) {
    image.resize(size, Shrink::Refused).unwrap();
    disk.content.resize(usize::try_from(size).unwrap(), 0);
}

/// A disk that was written and taken at every size, with a recording and a frozen bitmap.
fn prepare(image: &Image, random: &mut Random) -> Disk {
    let mut disk = Disk::new(SIZES[0]);
    for (number, size) in SIZES.into_iter().enumerate() {
        if number > 0 {
            grow(image, &mut disk, size);
        }
        our_writes(image, &mut disk, random, 4);
        let name = format!("s{number}");
        image.create_snapshot(&name).unwrap();
        disk.take(&name);
    }
    our_writes(image, &mut disk, random, 2);
    for name in ["b", "frozen"] {
        add_bitmap(image, name, GRANULARITY);
    }
    let stop = |update: &mut tidemark_qcow2::Update<'_>| {
        let mut bits = update.load("frozen")?;
        bits.mark(5000..10_000).unwrap();
        bits.mark(disk_end(&disk) - 5000..disk_end(&disk)).unwrap();
        update.put("frozen", bits, false)
    };
    image.update(stop).unwrap();
    disk
}

fn disk_end(disk: &Disk) -> u64 {
    u64::try_from(disk.content.len()).unwrap()
}

/// What `b` should be after the snapshot was applied: what it was, as far as the disk goes, what
/// the disk gains, and the granules of clusters whose mapping differs.
fn expected(image: &Image, name: &str) -> Bitmap {
    let changed = image.delta(Moment::Present, Moment::Snapshot(name));
    let changed = changed.unwrap().changed;
    let size = changed.shape().disk_bytes();
    let mut bits = image.load_bitmap("b").unwrap().resize(size, true).unwrap();
    for range in changed.dirty_ranges() {
        bits.mark(range).unwrap();
    }
    bits
}

/// QEMU's hash of both bitmaps is that of the bits which are stored.
fn assert_qemu_agrees(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_read_only(path);
    for name in ["b", "frozen"] {
        let stored = image_bits::bitmap(&bytes, name).unwrap().unwrap();
        assert_eq!(daemon.bitmap_sha256(&node, name), stored.sha256(), "{name}");
    }
    daemon.close(&node);
    daemon.quit();
}

#[test]
fn bitmaps_follow_a_snapshot_of_another_size_and_mark_what_moved() {
    let _alone = alone();
    require_qemu!();
    let mut applied = 0;
    for (seed, cluster_bits, extended_l2) in
        [(1, 9, false), (2, 12, false), (3, 16, false), (4, 16, true)]
    {
        let place = Place::new();
        let mut random = Random::new(seed);
        let options = CreateOptions {
            cluster_bits,
            extended_l2,
            ..CreateOptions::new(SIZES[0])
        };
        let image = common::create_file(&place.path, &options);
        let mut disk = prepare(&image, &mut random);
        let start = disk.content.clone();
        let mut present = disk.content.len();
        for number in [0, 2, 1, 0, 1, 2] {
            let name = format!("s{number}");
            our_writes(&image, &mut disk, &mut random, 1);
            image.flush().unwrap();
            let wanted = expected(&image, &name);
            image.apply_snapshot(&name).unwrap();
            disk.content = disk.snapshot(&name).to_vec();
            let what = format!("seed {seed}, {name}");
            assert!(read_all(&image) == disk.content, "{what}");
            let bits = image.load_bitmap("b").unwrap();
            assert!(bits == wanted, "{what}: other bits");
            assert_covers(&bits, &start, &disk.content, &what);
            assert!(present >= disk.content.len() || bits.test(disk_end(&disk) - 1));
            let frozen = image.load_bitmap("frozen").unwrap();
            assert!(frozen.test(5000) && !frozen.test(20_000), "{what}");
            present = disk.content.len();
            applied += 1;
        }
        image.close().unwrap();
        assert_both_read(&place, &disk, &format!("seed {seed}"));
        if !extended_l2 {
            assert_qemu_agrees(&place.path);
        }
        // And without bitmaps QEMU applies them as we do.
        for name in ["b", "frozen"] {
            qemu_img::bitmap_remove(&place.path, name);
        }
        qemu_img::ok(&["snapshot", "-q", "-a", "s0", text(&place.path)]);
        disk.content = disk.snapshot("s0").to_vec();
        assert_both_read(&place, &disk, &format!("seed {seed}, by QEMU"));
    }
    println!("{applied} snapshots of another size applied");
    assert_eq!(applied, 24);
}

#[test]
fn a_crash_while_another_size_is_applied_leaves_the_old_disk_or_the_new_one() {
    let _alone = alone();
    let (mut points, mut images) = (0, 0);
    for cluster_bits in [9, 12, 16] {
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(SIZES[0])
        };
        let mut disk = Disk::new(0);
        let bytes = built(&options, |image| {
            disk = prepare(image, &mut Random::new(77));
        });
        let storage = CrashStorage::new(bytes);
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        let mut states = vec![disk.content.clone()];
        for name in ["s0", "s1", "s2"] {
            image.apply_snapshot(name).unwrap();
            states.push(disk.snapshot(name).to_vec());
            storage.note(u64::try_from(states.len() - 1).unwrap());
        }
        image.close().unwrap();
        let log = storage.log();
        let place = Place::new();
        for crash in log.images(CrashOptions::default()) {
            let what = format!("clusters 2^{cluster_bits}: {}", crash.description);
            let image = open_bytes(crash.bytes.clone(), writing())
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            let report = image.check().unwrap();
            let harm = (report.check_errors, report.corruptions);
            assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
            let sure = log.notes_before(crash.position).into_iter().max();
            let sure = usize::try_from(sure.unwrap_or(0)).unwrap();
            let content = read_all(&image);
            assert!(states[sure..].contains(&content), "{what}: another disk");
            let bits = image.load_bitmap("b").unwrap();
            assert_covers(&bits, &states[0], &content, &what);
            image.load_bitmap("frozen").unwrap();
            if oracle::available() && images % 40 == 0 {
                std::fs::write(&place.path, &crash.bytes).unwrap();
                qemu_img::check(&place.path).assert_at_worst_leaks();
            }
            images += 1;
        }
        points += log.points();
    }
    println!("{points} points, {images} images");
    assert!(points >= 60 && images >= 100, "{points} {images}");
}
