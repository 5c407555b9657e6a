//! Every image that a crash could leave while snapshots are taken, applied and deleted, and while
//! guests write to clusters that snapshots share: at worst leaks, every moment whole.

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{CrashImage, CrashOptions, CrashStorage};
use tidemark_qcow2::{CreateOptions, Image};

use crate::common::{self, add_bitmap, alone, assert_covers, built, open_bytes, read_all, writing};
use crate::life::{Disk, Place, open_snapshot};

const SIZE: u64 = 2 << 20;

/// A session on a recording storage, and the disk after each operation.
struct Session {
    storage: CrashStorage,
    image: Option<Image>,
    states: Vec<Disk>,
}

/// Labels in the log: operation `n` begins at `2n`, its durability is acknowledged at `2n + 1`.
fn begins(operation: usize) -> u64 {
    u64::try_from(operation).unwrap() * 2
}

impl Session {
    fn open(bytes: Vec<u8>, disk: Disk) -> Self {
        let storage = CrashStorage::new(bytes);
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        Self {
            storage,
            image: Some(image),
            states: vec![disk],
        }
    }

    fn operate(&mut self, durable: bool, work: impl FnOnce(&Image, &mut Disk)) {
        let mut disk = self.states.last().unwrap().clone();
        self.storage.note(begins(self.states.len()));
        work(self.image.as_ref().unwrap(), &mut disk);
        if durable {
            self.storage.note(begins(self.states.len()) + 1);
        }
        self.states.push(disk);
    }

    fn write(&mut self, offset: u64, len: u64, byte: u8) {
        self.operate(false, |image, disk| {
            disk.fill(offset, len, byte);
            let data = vec![byte; usize::try_from(len).unwrap()];
            image.write(&data, offset).unwrap();
        });
    }

    fn flush(&mut self) {
        self.image.as_ref().unwrap().flush().unwrap();
        self.storage.note(begins(self.states.len() - 1) + 1);
    }

    fn take(&mut self, name: &str) {
        self.operate(true, |image, disk| {
            image.create_snapshot(name).unwrap();
            disk.take(name);
        });
    }

    fn apply(&mut self, name: &str) {
        self.operate(true, |image, disk| {
            image.apply_snapshot(name).unwrap();
            disk.content = disk.snapshot(name).to_vec();
        });
    }

    fn delete(&mut self, name: &str) {
        self.operate(true, |image, disk| {
            image.delete_snapshot(name).unwrap();
            disk.snapshots.retain(|(known, _)| known != name);
        });
    }

    fn close(&mut self) {
        self.image.take().unwrap().close().unwrap();
        self.storage.note(begins(self.states.len() - 1) + 1);
    }

    /// Checks every crash image; returns points and images.
    fn sweep(&self, sample: usize) -> (usize, usize) {
        let log = self.storage.log();
        let qemu = oracle::available();
        let place = Place::new();
        let mut images = 0;
        for crash in log.images(CrashOptions::default()) {
            let what = format!("crash image {images}: {}", crash.description);
            let notes = log.notes_before(crash.position);
            let acknowledged = notes.iter().filter(|note| **note % 2 == 1).max();
            let flushed = usize::try_from(acknowledged.copied().unwrap_or(1) / 2).unwrap();
            let begun = notes.iter().filter(|note| **note % 2 == 0).max();
            let begun = usize::try_from(begun.copied().unwrap_or(0) / 2).unwrap();
            let last = begun.max(flushed).min(self.states.len() - 1);
            self.check(&crash, &self.states[flushed..=last], &what);
            if qemu && images % sample == 0 {
                std::fs::write(&place.path, &crash.bytes).unwrap();
                qemu_img::check(&place.path).assert_at_worst_leaks();
            }
            images += 1;
        }
        (log.points(), images)
    }

    fn check(&self, crash: &CrashImage, possible: &[Disk], what: &str) {
        let image = open_bytes(crash.bytes.clone(), writing())
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let report = image.check().unwrap();
        let harm = (report.check_errors, report.corruptions);
        assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
        let names: Vec<String> = image
            .snapshots()
            .unwrap()
            .into_iter()
            .map(|info| info.name)
            .collect();
        let of = |disk: &Disk| -> Vec<String> {
            disk.snapshots
                .iter()
                .map(|(name, _)| name.clone())
                .collect()
        };
        let possible: Vec<&Disk> = possible.iter().filter(|disk| of(disk) == names).collect();
        assert!(!possible.is_empty(), "{what}: snapshots {names:?}");
        let content = read_all(&image);
        if !possible.iter().any(|disk| disk.content == content) {
            for (at, byte) in content.iter().enumerate() {
                assert!(
                    possible.iter().any(|disk| disk.content[at] == *byte),
                    "{what}: byte {at:#x} is {byte:#x}"
                );
            }
        }
        for (name, expected) in &possible[0].snapshots {
            let bytes = crash.bytes.clone();
            let snapshot = open_snapshot(bytes, common::reading(), name);
            assert!(&read_all(&snapshot) == expected, "{what}: {name}");
        }
        if let Ok(bits) = image.load_bitmap("b") {
            assert_covers(&bits, &self.states[0].content, &content, what);
        }
    }
}

fn base(cluster_bits: u32, refcount_bits: u32, bitmap: bool) -> (Vec<u8>, Disk) {
    let options = CreateOptions {
        cluster_bits,
        refcount_bits,
        ..CreateOptions::new(SIZE)
    };
    let mut disk = Disk::new(SIZE);
    let bytes = built(&options, |image| {
        image.write(&vec![0xaa; 200_000], 10_000).unwrap();
        disk.fill(10_000, 200_000, 0xaa);
        image.create_snapshot("first").unwrap();
        disk.take("first");
        image.write(&vec![0xbb; 30_000], 50_000).unwrap();
        disk.fill(50_000, 30_000, 0xbb);
        if bitmap {
            add_bitmap(image, "b", 65536);
        }
    });
    (bytes, disk)
}

fn life(cluster_bits: u32, refcount_bits: u32, bitmap: bool, sample: usize) -> (usize, usize) {
    let (bytes, disk) = base(cluster_bits, refcount_bits, bitmap);
    let mut session = Session::open(bytes, disk);
    session.write(20_000, 5_000, 1);
    session.flush();
    session.take("second");
    session.write(21_000, 300, 2);
    session.write(1 << 20, 70_000, 3);
    session.flush();
    session.write(60_000, 9_000, 4);
    session.apply("first");
    session.write(55_000, 1_000, 5);
    session.flush();
    session.delete("second");
    session.write(100_000, 10_000, 6);
    session.delete("first");
    session.write(100_100, 1_000, 7);
    session.take("third");
    session.write(100_200, 100, 8);
    session.close();
    session.sweep(sample)
}

#[test]
fn every_crash_around_snapshots_leaves_every_moment_whole() {
    let _alone = alone();
    let mut total = (0, 0);
    for (cluster_bits, refcount_bits, bitmap) in [
        (9, 16, false),
        (12, 2, true),
        (16, 16, true),
        (12, 64, false),
    ] {
        let (points, images) = life(cluster_bits, refcount_bits, bitmap, 20);
        println!("clusters 2^{cluster_bits}: {points} crash points, {images} images");
        total = (total.0 + points, total.1 + images);
    }
    println!("in all {} crash points, {} images", total.0, total.1);
    assert!(
        total.0 >= 200 && total.1 >= 400,
        "the sweep shrank: {total:?}"
    );
}
