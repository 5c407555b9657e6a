//! The engine's own locks under a model checker: the same few threads, in many orders.
//!
//! Built with `--cfg shuttle` (`make interleavings`) every lock, every atomic and every call of the
//! storage is a point where another thread may go on; without it this file is empty. What is
//! checked is the whole engine, not a sketch of it: data, marks, regions, freezes, frees and flushes
//! together. What it does not see: memory orders weaker than sequential consistency; the tests in
//! `races.rs` run on real threads.
#![cfg(shuttle)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod bitmaps;
mod compressed;
mod structure;
mod writes;

use std::sync::Arc;

use common::{boxed, built, writing};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::{Runner, thread};
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{CreateOptions, Image, Storage};

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
