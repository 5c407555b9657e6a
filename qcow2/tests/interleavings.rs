//! The engine's own locks under a model checker: the same few threads, in many orders.
//!
//! Built with `--cfg shuttle` (`make interleavings`) every lock, every atomic and every call of the
//! storage is a point where another thread may go on; without it this file is empty. What is
//! checked is the whole engine, not a sketch of it: data, marks, regions, freezes, frees and flushes
//! together. What it does not see: memory orders weaker than sequential consistency; the tests in
//! `races.rs` run on real threads.
#![cfg(shuttle)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use common::{add_bitmap, assert_covers, boxed, built, granularity, open_bytes, read_all, writing};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::{Runner, thread};
use tidemark_fixtures::storage::{CrashOptions, CrashStorage};
use tidemark_qcow2::{Bitmap, CreateOptions, Error, Image, Storage, proof};

const CLUSTER: u64 = 512;
const SIZE: u64 = 64 * CLUSTER;

/// A storage at whose calls another thread may go on.
#[derive(Debug)]
struct Switching {
    inner: CrashStorage,
    calls: AtomicU64,
}

impl Switching {
    /// Counts the call. A count and not a yield: who yields is no longer preferred, and would never
    /// be held up for long.
    fn call(&self) -> &CrashStorage {
        self.calls.fetch_add(1, Ordering::SeqCst);
        &self.inner
    }
}

impl Storage for Switching {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.call().read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> std::io::Result<()> {
        self.call().write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.call().write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.call().discard(offset, len)
    }

    fn flush(&self) -> std::io::Result<()> {
        self.call().flush()
    }

    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.inner.set_len(len)
    }

    fn writable(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        self.inner.name()
    }
}

/// Runs a scenario under random schedules, and under schedules with one switch at a random place:
/// most races need no more, and a long pause of one thread is rare among random ones.
fn explore(scenario: impl Fn() + Send + Sync + Clone + 'static) {
    let cases = std::env::var("TIDEMARK_CASES").ok();
    let rounds = cases.and_then(|cases| cases.parse().ok()).unwrap_or(1000);
    let seed = 20_180_609;
    let config = || {
        let mut config = shuttle::Config::new();
        config.stack_size = 1 << 20;
        config.failure_persistence = shuttle::FailurePersistence::Print;
        config
    };
    let random = RandomScheduler::new_from_seed(seed, rounds);
    let tried = Runner::new(random, config()).run(scenario.clone());
    let few = PctScheduler::new_from_seed(seed, 2, rounds);
    let tried = tried + Runner::new(few, config()).run(scenario);
    println!("{tried} schedules");
    assert_eq!(tried, 2 * rounds);
}

/// A small image that `fill` has prepared, open, and the storage below it.
fn image(fill: impl FnOnce(&Image)) -> (Arc<Image>, CrashStorage) {
    let options = CreateOptions {
        cluster_bits: 9,
        ..CreateOptions::new(SIZE)
    };
    let storage = CrashStorage::new(built(&options, fill));
    let switching = Switching {
        inner: storage.clone(),
        calls: AtomicU64::new(0),
    };
    let image = Image::open(boxed(switching), writing()).unwrap();
    (Arc::new(image), storage)
}

fn spawn(image: &Arc<Image>, work: impl FnOnce(&Image) + Send + 'static) -> thread::JoinHandle<()> {
    let image = Arc::clone(image);
    thread::spawn(move || work(&image))
}

fn finish(threads: Vec<thread::JoinHandle<()>>) {
    for thread in threads {
        thread.join().unwrap();
    }
}

fn sound(image: &Image) {
    let report = image.check().unwrap();
    let found = (report.check_errors, report.corruptions, report.leaks);
    assert_eq!(found, (0, 0, 0), "{:?}", report.findings);
}

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

/// The explorer finds what only some orders show.
#[test]
#[should_panic(expected = "an update was lost")]
fn a_lost_update_is_found() {
    explore(|| {
        let count = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let count = Arc::clone(&count);
                thread::spawn(move || {
                    let seen = count.load(Ordering::SeqCst);
                    count.store(seen + 1, Ordering::SeqCst);
                })
            })
            .collect();
        finish(threads);
        assert_eq!(count.load(Ordering::SeqCst), 2, "an update was lost");
    });
}

#[test]
fn writers_of_parts_of_one_new_cluster_lose_nothing() {
    explore(|| {
        let (image, _) = image(|_| ());
        let threads = (0..3)
            .map(|part: u8| {
                spawn(&image, move |image| {
                    let at = CLUSTER + u64::from(part) * 100;
                    image.write(&[part + 1; 100], at).unwrap();
                })
            })
            .collect();
        finish(threads);
        let content = read_all(&image);
        for part in 0..3_u8 {
            let at = 512 + usize::from(part) * 100;
            assert_eq!(content[at..at + 100], [part + 1; 100]);
        }
        sound(&image);
    });
}

#[test]
fn a_reader_never_sees_the_data_of_a_cluster_that_was_given_away() {
    explore(|| {
        let (image, _) = image(|image| image.write(&[1; 1024], 0).unwrap());
        let threads = vec![
            spawn(&image, |image| {
                image.discard(0, 1024).unwrap();
                image.flush().unwrap();
                image.write(&[2; 1024], 8 * CLUSTER).unwrap();
            }),
            spawn(&image, |image| {
                for _ in 0..2 {
                    let mut seen = [9; 1024];
                    image.read(&mut seen, 0).unwrap();
                    assert!(seen.iter().all(|byte| *byte < 2), "another cluster's data");
                }
            }),
        ];
        finish(threads);
        assert_eq!(read_all(&image)[..1024], [0; 1024]);
        sound(&image);
    });
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
