//! QEMU dies with the bitmaps of a chain in its hands, at every moment of its life: what is frozen
//! comes back by its checksum, what recorded is named as lost, and no answer misses a change.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod kills;
mod sweep;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;
use tidemark_bitmap::{Bitmap, Granularity};
use tidemark_checkpoint::{
    CreateFlags, CreateSpec, DiskDelta, Domain, DomainOptions, Outcome, SinceOptions,
};
use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{CreateOptions, Image, OpenOptions};

const DISK_BYTES: u64 = 1 << 20;
const FROZEN: [&str; 3] = ["a", "b", "c"];
const ALL: [&str; 4] = ["a", "b", "c", "d"];

/// A process that another test starts inherits, for a moment, the locks on files open here.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn writing() -> OpenOptions {
    OpenOptions {
        writable: true,
        ..OpenOptions::default()
    }
}

/// A chain of four checkpoints with a change after each, and what the disk held at each.
struct Chain {
    bytes: Vec<u8>,
    /// Content of the disk at each checkpoint.
    contents: Vec<Vec<u8>>,
    /// Bits of the frozen bitmaps.
    frozen: Vec<Bitmap>,
}

impl Chain {
    fn new(cluster_bits: u32) -> Self {
        let storage = CrashStorage::new(Vec::new());
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(DISK_BYTES)
        };
        let image = Image::create(Box::new(storage.clone()), &options, writing()).unwrap();
        image.write(&[9; 200_000], 100_000).unwrap();
        let domain = single(image);
        let image = Arc::clone(&domain.disks()[0].image);
        let mut contents = Vec::new();
        for (step, name) in (0_u8..).zip(ALL) {
            contents.push(read_all(&image));
            let spec = CreateSpec {
                name: Some(name.to_owned()),
                granularity: Granularity::from_bytes(4096),
                ..CreateSpec::default()
            };
            domain.create(&spec, CreateFlags::NONE).unwrap();
            let offset = u64::from(step) * 150_000;
            image.write(&[step + 1; 30_000], offset).unwrap();
        }
        let frozen = FROZEN
            .iter()
            .map(|name| image.load_bitmap(name).unwrap())
            .collect();
        drop(image);
        close(domain);
        Self {
            bytes: storage.to_bytes(),
            contents,
            frozen,
        }
    }

    /// What must hold of an image that QEMU left, before recovery and after it; returns what became
    /// of the frozen bitmaps. `path` is where the recovered image may be put for QEMU to judge.
    fn judge(&self, bytes: Vec<u8>, path: Option<&Path>, what: &str) -> Vec<Outcome> {
        let storage = CrashStorage::new(bytes);
        let domain = single(open(&storage));
        self.assert_law(&domain, what);
        let before = storage.to_bytes();
        self.assert_law(&domain, what);
        assert!(
            storage.to_bytes() == before,
            "{what}: a look changed a byte"
        );
        let recovered = domain
            .recover()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        self.assert_law(&domain, what);
        let image = &domain.disks()[0].image;
        let outcomes: Vec<Outcome> = FROZEN
            .iter()
            .map(|name| {
                let mut of_it = recovered.iter().filter(|row| row.checkpoint == *name);
                of_it.next().unwrap().outcome
            })
            .collect();
        for ((name, bits), outcome) in FROZEN.iter().zip(&self.frozen).zip(&outcomes) {
            if matches!(outcome, Outcome::Intact | Outcome::Rewritten) {
                let found = image.load_bitmap(name).unwrap();
                assert!(found == *bits, "{what}: {name} came back with other bits");
            }
        }
        assert!(
            image.bitmaps().unwrap().iter().all(|info| !info.in_use),
            "{what}"
        );
        // The chain goes on: what is written from here on is an increment again.
        let spec = CreateSpec {
            name: Some("next".to_owned()),
            granularity: Granularity::from_bytes(4096),
            ..CreateSpec::default()
        };
        domain.create(&spec, CreateFlags::NONE).unwrap();
        image.write(&[77; 5000], 900_000).unwrap();
        let bits = since(&domain, "next").unwrap_or_else(|| panic!("{what}: next is full"));
        assert!(bits.test(900_000), "{what}");
        self.assert_law(&domain, what);
        close(domain);
        if let Some(path) = path {
            std::fs::write(path, storage.to_bytes()).unwrap();
            self.judged_by_qemu(path, &outcomes, what);
        }
        outcomes
    }

    /// As [`judge`](Self::judge) for an image with a torn write: it may be unreadable, or lose
    /// bitmaps; what is answered must be right. `None` if it is not readable.
    fn judge_torn(&self, bytes: Vec<u8>, what: &str) -> Option<Vec<Outcome>> {
        let storage = CrashStorage::new(bytes);
        let image = Image::open(Box::new(storage.clone()), writing()).ok()?;
        let domain = single(image);
        self.assert_law(&domain, what);
        let recovered = domain.recover().ok()?;
        self.assert_law(&domain, what);
        let image = &domain.disks()[0].image;
        let mut outcomes = Vec::new();
        for (name, bits) in FROZEN.iter().zip(&self.frozen) {
            let outcome = recovered
                .iter()
                .find(|row| row.checkpoint == *name)?
                .outcome;
            if matches!(outcome, Outcome::Intact | Outcome::Rewritten) {
                let found = image.load_bitmap(name).unwrap();
                assert!(found == *bits, "{what}: {name} came back with other bits");
            }
            outcomes.push(outcome);
        }
        Some(outcomes)
    }

    /// Every increment that is offered holds every byte that differs.
    fn assert_law(&self, domain: &Domain, what: &str) {
        let now = read_all(&domain.disks()[0].image);
        for (name, then) in ALL.iter().zip(&self.contents) {
            let Some(bits) = since(domain, name) else {
                continue;
            };
            for (offset, (old, new)) in (0_u64..).zip(then.iter().zip(&now)) {
                assert!(
                    old == new || bits.test(offset),
                    "{what}: since {name}, byte {offset} changed unseen"
                );
            }
        }
    }

    fn judged_by_qemu(&self, path: &Path, outcomes: &[Outcome], what: &str) {
        let check = qemu_img::check(path);
        assert!(matches!(check.exit, 0 | 3), "{what}: {check:?}");
        let bytes = std::fs::read(path).unwrap();
        for ((name, bits), outcome) in FROZEN.iter().zip(&self.frozen).zip(outcomes) {
            if matches!(outcome, Outcome::Intact | Outcome::Rewritten) {
                let stored = image_bits::bitmap(&bytes, name).unwrap().unwrap();
                assert!(!stored.in_use && !stored.auto, "{what}: {name}");
                assert_eq!(stored.count(), bits.count(), "{what}: {name}");
            }
        }
        assert_eq!(qemu_img::info(path)["virtual-size"], DISK_BYTES, "{what}");
    }
}

fn single(image: Image) -> Domain {
    let disk = tidemark_checkpoint::Disk {
        name: "vda".to_owned(),
        image: Arc::new(image),
    };
    Domain::new(vec![disk], DomainOptions::default()).unwrap()
}

fn open(storage: &CrashStorage) -> Image {
    Image::open(Box::new(storage.clone()), writing()).unwrap()
}

fn close(domain: Domain) {
    let disks = domain.disks().to_vec();
    drop(domain);
    for disk in disks {
        Arc::try_unwrap(disk.image).unwrap().close().unwrap();
    }
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read(&mut bytes, 0).unwrap();
    bytes
}

fn since(domain: &Domain, name: &str) -> Option<Bitmap> {
    let changes = domain
        .lookup(name)
        .ok()?
        .changed_since(SinceOptions::default())
        .unwrap();
    match changes.into_iter().next().unwrap().delta {
        DiskDelta::Incremental(bits) => Some(bits),
        DiskDelta::Full { .. } => None,
    }
}

/// A folder with room for one image.
struct Desk {
    folder: TempDir,
    image: PathBuf,
}

impl Desk {
    fn new(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        let image = folder.path().join("image.qcow2");
        std::fs::write(&image, bytes).unwrap();
        Self { folder, image }
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.image).unwrap()
    }
}

fn daemon() -> QemuStorageDaemon {
    QemuStorageDaemon::spawn()
}
