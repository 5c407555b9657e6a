//! Bitmaps beside guests: marks, freezes, idle regions, proofs, crashes.

use std::sync::Arc;

use tidemark_fixtures::storage::CrashOptions;
use tidemark_qcow2::{Bitmap, Error, Image, proof};

use crate::common::{add_bitmap, assert_covers, granularity, open_bytes, read_all, writing};
use crate::{CLUSTER, SIZE, explore, finish, image, sound, spawn};

/// Freezes bitmap `old`, starts `new`, and returns the disk's content at the instant.
fn freeze(image: &Image, old: &str, new: &str) -> Vec<u8> {
    image
        .update(|update| {
            let bits = update.load(old)?;
            update.put(old, bits, false)?;
            let blank = update.blank(granularity(CLUSTER))?;
            update.put(new, blank, true)?;
            Ok::<_, Error>(read_all(update.image()))
        })
        .unwrap()
}

#[test]
fn every_write_is_in_the_interval_whose_content_it_changed() {
    explore(|| {
        let (image, storage) = image(|image| {
            image.write(&[1; 2048], 0).unwrap();
            add_bitmap(image, "before", CLUSTER);
        });
        let start = read_all(&image);
        let threads = vec![
            spawn(&image, |image| {
                image.write(&[2; 700], 100).unwrap();
                image.write(&[3; 100], 20 * CLUSTER).unwrap();
                image.flush().unwrap();
            }),
            spawn(&image, |image| {
                image.discard(2 * CLUSTER, CLUSTER).unwrap();
                image.write(&[4; 512], 3 * CLUSTER).unwrap();
            }),
        ];
        let instant = freeze(&image, "before", "after");
        finish(threads);
        let end = read_all(&image);
        let covered = |bits: &Bitmap, old: &[u8], new: &[u8]| assert_covers(bits, old, new, "bits");
        covered(&image.load_bitmap("before").unwrap(), &start, &instant);
        covered(&image.load_bitmap("after").unwrap(), &instant, &end);
        Arc::into_inner(image).unwrap().close().unwrap();
        let image = open_bytes(storage.to_bytes(), writing()).unwrap();
        covered(&image.load_bitmap("before").unwrap(), &start, &instant);
        covered(&image.load_bitmap("after").unwrap(), &instant, &end);
        assert!(read_all(&image) == end);
        sound(&image);
    });
}

#[test]
fn a_crash_between_any_two_steps_of_any_order_misses_no_change() {
    explore(|| {
        let (image, storage) = image(|image| {
            image.write(&[1; 2048], 0).unwrap();
            add_bitmap(image, "b", CLUSTER);
        });
        let start = read_all(&image);
        let threads = vec![
            spawn(&image, |image| {
                image.write(&[2; 600], 0).unwrap();
                image.narrow_idle_regions().unwrap();
            }),
            spawn(&image, |image| {
                image.write(&[3; 512], 10 * CLUSTER).unwrap();
                image.flush().unwrap();
            }),
            spawn(&image, |image| {
                image.discard(2 * CLUSTER, 2 * CLUSTER).unwrap();
                image.write(&[4; 512], 20 * CLUSTER).unwrap();
                image.flush().unwrap();
            }),
        ];
        finish(threads);
        let options = CrashOptions {
            subsets_per_point: 1,
            tears_per_point: 0,
            ..CrashOptions::default()
        };
        // A few of the many crashes of each order: there are many orders.
        for crash in storage.log().images(options).step_by(7) {
            let image = open_bytes(crash.bytes, writing()).unwrap();
            let bits = image.load_bitmap("b").unwrap();
            assert_covers(&bits, &start, &read_all(&image), &crash.description);
            let report = image.check().unwrap();
            let harm = (report.check_errors, report.corruptions);
            assert_eq!(harm, (0, 0), "{}: {:?}", crash.description, report.findings);
        }
    });
}

#[test]
fn an_idle_region_is_not_narrowed_below_a_write_in_flight() {
    explore(|| {
        let (image, storage) = image(|image| {
            image.write(&[1; 2048], 0).unwrap();
            add_bitmap(image, "b", CLUSTER);
        });
        let start = read_all(&image);
        image.write(&[2; 512], 0).unwrap();
        image.narrow_idle_regions().unwrap();
        let threads = vec![
            spawn(&image, |image| image.write(&[3; 512], 1024).unwrap()),
            spawn(&image, |image| image.narrow_idle_regions().unwrap()),
        ];
        finish(threads);
        // The power goes, and everything that was written happens to be durable.
        let image = open_bytes(storage.to_bytes(), writing()).unwrap();
        let bits = image.load_bitmap("b").unwrap();
        assert_covers(&bits, &start, &read_all(&image), "after the crash");
    });
}

#[test]
fn planted_bits_and_witnesses_hold_under_every_order() {
    explore(|| {
        let (image, storage) = image(|image| {
            image
                .update(|update| {
                    let mut bits = update.blank(granularity(CLUSTER))?;
                    proof::plant(update.image(), &mut bits)?;
                    update.put("b", bits, true)
                })
                .unwrap();
        });
        let planted = image.load_bitmap("b").unwrap();
        let threads = vec![
            spawn(&image, |image| image.write(&[1; 512], 0).unwrap()),
            spawn(&image, |image| image.narrow_idle_regions().unwrap()),
            spawn(&image, |image| image.flush().unwrap()),
        ];
        finish(threads);
        Arc::into_inner(image).unwrap().close().unwrap();
        let image = open_bytes(storage.to_bytes(), writing()).unwrap();
        let bits = image.load_bitmap("b").unwrap();
        let lost = (0..SIZE).step_by(512);
        assert!(lost.clone().all(|at| !planted.test(at) || bits.test(at)));
        assert!(bits.test(0));
    });
}
