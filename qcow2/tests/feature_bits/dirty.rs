//! Images that were not closed cleanly: refcounts follow from the mapping when somebody opens for
//! writing, what would need a guess is refused, and reading writes nothing.

use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::{CallKind, CrashOptions, CrashStorage, Fault, FaultyStorage};
use tidemark_qcow2::{
    CreateOptions, Feature, Image, MemoryStorage, Mistake, OpenOptions, Result, Storage,
};

use crate::common::{add_bitmap, alone, built, open_bytes, open_file, read_all};
use crate::common::{reading, try_open_file, writing};
use crate::corpus::{DAMAGES, WIDE_DAMAGES, damaged, healthy};

const DIRTY: u64 = 1;

fn is_dirty(image: &Image) -> bool {
    image.header().incompatible & DIRTY != 0
}

/// Content of the disk, cluster by cluster, where it can be read.
fn content(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    let Ok(image) = open_bytes(bytes.to_vec(), reading()) else {
        return Vec::new();
    };
    let cluster = image.geometry().cluster_bytes();
    (0..image.size() / cluster)
        .map(|number| {
            let mut buffer = vec![0; usize::try_from(cluster).unwrap()];
            let read = image.read(&mut buffer, number * cluster);
            read.is_ok().then_some(buffer)
        })
        .collect()
}

/// Damaged images that say that they are dirty.
fn dirty_images() -> Vec<(String, Vec<u8>)> {
    let mut images = Vec::new();
    for (cluster_bits, order) in [(9, 4), (12, 2), (16, 4)] {
        for damages in [DAMAGES, WIDE_DAMAGES] {
            let name = format!("2^{cluster_bits}");
            images.extend(damaged(&healthy(cluster_bits, order), &name, damages));
        }
    }
    // The last byte of incompatible_features.
    images.iter_mut().for_each(|(_, bytes)| bytes[79] |= 1);
    images
}

#[test]
fn what_qemu_left_dirty_is_opened_with_everything_that_it_had_written() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for (cluster, bits) in [
        ("512", "16"),
        ("4096", "1"),
        ("65536", "16"),
        ("65536", "64"),
    ] {
        for bitmap in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            let opts = [
                ("cluster_size", cluster),
                ("refcount_bits", bits),
                ("lazy_refcounts", "on"),
            ];
            qemu_img::create(&path, 4 << 20, &opts);
            if bitmap {
                qemu_img::bitmap_add(&path, "b", Some(65_536));
            }
            let mut daemon = QemuStorageDaemon::spawn();
            let node = daemon.open_image(&path);
            let commands = [
                "write -P 6 1M 300k",
                "write -z 1100k 64k",
                "discard 1M 64k",
                "write -P 7 0 5000",
            ];
            daemon.guest(&node, &commands);
            daemon.kill_dash_nine();
            let before = std::fs::read(&path).unwrap();
            let expected = qemu_img::convert_to_raw(&path);
            let what = format!("{cluster}, refcounts of {bits} bits, bitmap {bitmap}");
            let image = open_file(&path, reading());
            assert!(is_dirty(&image), "{what}: not dirty");
            assert!(read_all(&image) == expected, "{what}");
            drop(image);
            assert!(std::fs::read(&path).unwrap() == before, "{what}: reading");
            let refusing = OpenOptions {
                repair_dirty: false,
                ..writing()
            };
            let error = try_open_file(&path, refusing).unwrap_err();
            assert!(matches!(error.feature(), Some(Feature::Dirty)), "{error}");
            assert!(std::fs::read(&path).unwrap() == before, "{what}: refused");

            let image = open_file(&path, writing());
            let done = image.repaired_on_open().expect("it was dirty");
            assert!(done.losses.is_empty() && done.check.is_clean(), "{what}");
            assert!(!is_dirty(&image) && read_all(&image) == expected, "{what}");
            image.write(&[9; 70_000], 2 << 20).unwrap();
            image.close().unwrap();
            qemu_img::check(&path).assert_clean();
            qemu_io::commands(&path, &["read -P 9 2M 70000", "read -P 7 0 5000"]);
            let image = open_file(&path, writing());
            assert!(image.repaired_on_open().is_none(), "{what}: twice");
            if bitmap {
                // QEMU never came to store it: nobody may believe it.
                let error = image.load_bitmap("b").unwrap_err();
                let mistake = error.mistake();
                assert!(matches!(mistake, Some(Mistake::BitmapInconsistent(_))));
            }
            cases += 1;
        }
    }
    println!("{cases} images");
    assert!(cases >= 8);
}

#[test]
fn a_dirty_image_opens_or_is_refused_and_then_every_byte_stays() {
    let (mut opened, mut refused) = (0, 0);
    for (name, bytes) in dirty_images() {
        let old = content(&bytes);
        let storage = CrashStorage::new(bytes.clone());
        match Image::open(Box::new(storage.clone()), writing()) {
            Ok(image) => {
                let done = image.repaired_on_open().expect("it was dirty");
                assert!(done.losses.is_empty(), "{name}: {:?}", done.losses);
                assert_eq!(done.check.corruptions, 0, "{name}");
                drop(image);
                assert!(content(&storage.to_bytes()) == old, "{name}: content");
                opened += 1;
            }
            Err(error) => {
                assert_eq!(
                    storage.to_bytes(),
                    bytes,
                    "{name}: refused, changed: {error}"
                );
                refused += 1;
            }
        }
    }
    println!("{opened} opened, {refused} refused");
    assert!(opened >= 40 && refused >= 10, "{opened}, {refused}");
}

#[test]
fn a_crash_while_a_dirty_image_is_opened_leaves_it_as_it_was() {
    let (mut points, mut images) = (0, 0);
    for (name, bytes) in dirty_images() {
        let old = content(&bytes);
        let storage = CrashStorage::new(bytes);
        if Image::open(Box::new(storage.clone()), writing()).is_err() {
            continue;
        }
        let log = storage.log();
        points += log.points();
        for crash in log.images(CrashOptions::default()) {
            let what = format!("{name}: {}", crash.description);
            assert!(content(&crash.bytes) == old, "{what}: content");
            let image = open_bytes(crash.bytes, writing())
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            let report = image.check().unwrap();
            let harm = (report.check_errors, report.corruptions, report.leaks);
            assert_eq!(harm, (0, 0, 0), "{what}: {:?}", report.findings);
            images += 1;
        }
    }
    println!("{points} points, {images} images");
    assert!(points >= 150 && images >= 400, "{points}, {images}");
}

#[test]
fn every_failed_call_while_a_dirty_image_is_opened_surfaces() {
    let mut runs = 0;
    for (name, bytes) in dirty_images() {
        let old = content(&bytes);
        let open = |storage: &FaultyStorage| -> Result<()> {
            Image::open(Box::new(storage.clone()), writing()).map(|_| ())
        };
        for kinds in [
            &[CallKind::Read][..],
            &[CallKind::Write, CallKind::WriteZeroes],
            &[CallKind::Flush],
            &[CallKind::Len, CallKind::SetLen],
        ] {
            let clean = FaultyStorage::new(CrashStorage::new(bytes.clone()));
            if open(&clean).is_err() {
                continue;
            }
            let calls = clean.calls_of(kinds);
            let step = usize::try_from((calls / 6).max(1)).unwrap();
            for at in (0..calls).step_by(step) {
                let below = CrashStorage::new(bytes.clone());
                let storage = FaultyStorage::new(below.clone());
                storage.arm(Fault::once(kinds, at));
                let answer = open(&storage);
                let what = format!("{name}: call {at} of {kinds:?}");
                // A check that could not read is made again before the bit goes.
                let again = kinds == [CallKind::Read];
                let fine = answer.is_err() || storage.fired() == 0 || again;
                assert!(fine, "{what}: swallowed");
                assert!(content(&below.to_bytes()) == old, "{what}: content");
                let image = open_bytes(below.to_bytes(), writing())
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                let report = image.check().unwrap();
                let harm = (report.check_errors, report.corruptions);
                assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
                runs += 1;
            }
        }
    }
    println!("{runs} faults");
    assert!(runs >= 500, "the sweep shrank: {runs}");
}

#[test]
fn stale_bitmaps_are_not_given_up_by_opening() {
    let mut image = healthy(16, 4).build();
    image.set("header.autoclear_features", 0);
    image.set_bits("header.incompatible_features", DIRTY);
    let storage = CrashStorage::new(image.bytes.clone());
    for unbacked in [false, true] {
        let boxed: Box<dyn Storage> = Box::new(storage.clone());
        let opened = match unbacked {
            true => Image::open_unbacked(boxed, true),
            false => Image::open(boxed, writing()),
        };
        let error = opened.unwrap_err();
        assert!(matches!(error.feature(), Some(Feature::Dirty)), "{error}");
        assert!(storage.to_bytes() == image.bytes);
    }
}

/// We never postpone refcounts: an image that asks for it is as sound at any moment as others.
#[test]
fn images_with_lazy_refcounts_that_we_were_killed_on_open_everywhere() {
    let _alone = alone();
    let (mut points, mut images) = (0, 0);
    for (cluster_bits, sample) in [(9, 71), (12, 31), (16, 31)] {
        let options = CreateOptions {
            cluster_bits,
            lazy_refcounts: true,
            ..CreateOptions::new(1 << 20)
        };
        let base = built(&options, |image| add_bitmap(image, "b", 4096));
        let storage = CrashStorage::new(base);
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        image.write(&vec![1; 100_000], 3000).unwrap();
        image.flush().unwrap();
        image.write(&vec![2; 60_000], 500_000).unwrap();
        image.discard(0, 65_536).unwrap();
        image.flush().unwrap();
        image.write(&vec![3; 40_000], 20_000).unwrap();
        image.close().unwrap();
        let log = storage.log();
        points += log.points();
        for crash in log.images(CrashOptions::default()) {
            let what = format!("2^{cluster_bits}, image {images}: {}", crash.description);
            let bytes = MemoryStorage::from_bytes(crash.bytes.clone());
            let image = Image::open(Box::new(bytes), writing()).unwrap();
            assert!(
                !is_dirty(&image) && image.repaired_on_open().is_none(),
                "{what}"
            );
            let report = image.check().unwrap();
            let harm = (report.check_errors, report.corruptions);
            assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
            if tidemark_fixtures::oracle::available() && images % sample == 0 {
                let content = read_all(&image);
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("crash.qcow2");
                std::fs::write(&path, &crash.bytes).unwrap();
                qemu_img::check(&path).assert_at_worst_leaks();
                qemu_io::commands(&path, &["read 0 1M", "write -P 5 900k 1k"]);
                qemu_img::check(&path).assert_at_worst_leaks();
                let theirs = qemu_img::convert_to_raw(&path);
                assert!(theirs[..900 << 10] == content[..900 << 10], "{what}: QEMU");
            }
            images += 1;
        }
    }
    println!("{points} points, {images} images");
    assert!(points >= 60 && images >= 200, "{points}, {images}");
}
