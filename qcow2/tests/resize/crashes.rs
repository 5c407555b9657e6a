//! Every image that a crash during a change of the size could leave: the old disk or the new one,
//! its bitmaps loadable and complete, at worst leaks.

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{CrashOptions, CrashStorage};
use tidemark_qcow2::{CreateOptions, Image, Shrink};

use crate::common::{add_bitmap, alone, assert_covers, built, open_bytes, read_all, writing};

fn base(cluster_bits: u32, size: u64) -> Vec<u8> {
    let options = CreateOptions {
        cluster_bits,
        ..CreateOptions::new(size)
    };
    built(&options, |image| {
        image.write(&vec![0xaa; 150_000], 10_000).unwrap();
        image.write(&vec![0xbb; 60_000], size - 60_000).unwrap();
        add_bitmap(image, "recording", 4096);
        add_bitmap(image, "frozen", 65_536);
        image
            .update(|update| update.set_recording("frozen", false))
            .unwrap();
    })
}

/// Resizes from one to the next, with a write before each and behind each.
fn sweep(cluster_bits: u32, sizes: &[u64], sample: usize) -> (usize, usize) {
    let start = base(cluster_bits, sizes[0]);
    let first = read_all(&open_bytes(start.clone(), writing()).unwrap());
    let storage = CrashStorage::new(start);
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    let mut states = vec![first.clone()];
    for &size in &sizes[1..] {
        image.write(&[3; 2000], 1000).unwrap();
        image.flush().unwrap();
        states.push(read_all(&image));
        image.resize(size, Shrink::Allowed).unwrap();
        states.push(read_all(&image));
        image.write(&[4; 5000], size - 5000).unwrap();
        image.flush().unwrap();
        states.push(read_all(&image));
        storage.note(u64::try_from(states.len() - 1).unwrap());
    }
    image.close().unwrap();
    let log = storage.log();
    let mut images = 0;
    for crash in log.images(CrashOptions::default()) {
        let what = format!("crash image {images}: {}", crash.description);
        let image = open_bytes(crash.bytes.clone(), writing())
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let report = image.check().unwrap();
        let harm = (report.check_errors, report.corruptions);
        assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
        let content = read_all(&image);
        let sure = log
            .notes_before(crash.position)
            .into_iter()
            .max()
            .unwrap_or(0);
        let possible = states.iter().skip(usize::try_from(sure).unwrap());
        // A write that was not flushed may be there in part; the size tells the neighbours.
        let fits = possible.clone().any(|state| {
            state.len() == content.len()
                && state
                    .iter()
                    .zip(&content)
                    .enumerate()
                    .all(|(at, (known, found))| {
                        known == found || possible.clone().any(|other| other.get(at) == Some(found))
                    })
        });
        assert!(fits, "{what}: neither the old disk nor the new one");
        let bits = image
            .load_bitmap("recording")
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_covers(&bits, &first, &content, &what);
        image
            .load_bitmap("frozen")
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        if oracle::available() && images % sample == 0 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("crash.qcow2");
            std::fs::write(&path, &crash.bytes).unwrap();
            qemu_img::check(&path).assert_at_worst_leaks();
            assert!(
                qemu_img::convert_to_raw(&path) == content,
                "{what}: QEMU reads other bytes"
            );
        }
        images += 1;
    }
    (log.points(), images)
}

#[test]
fn a_crash_leaves_the_old_disk_or_the_new_one() {
    let _alone = alone();
    let (mut points, mut images) = (0, 0);
    for (cluster_bits, sizes, sample) in [
        (16, &[1 << 20, 3 << 20, 700_416][..], 29),
        (9, &[400_384, 1 << 20, 200_192, 600_064], 61),
        (12, &[1 << 20, 1 << 19, 1 << 22], 37),
    ] {
        let (more_points, more_images) = sweep(cluster_bits, sizes, sample);
        points += more_points;
        images += more_images;
    }
    println!("{points} points, {images} images");
    assert!(
        points >= 100 && images >= 500,
        "the sweep shrank: {points}, {images}"
    );
}
