//! Every crash and every failed call of a commit: the overlay's disk reads the same, and the base's
//! bitmaps cover what changed in the base.

use std::sync::Arc;

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{
    CallKind, CrashOptions, CrashStorage, CrashWorld, Errno, Fault, FaultyStorage,
};
use tidemark_qcow2::transfer::{CommitOptions, commit};
use tidemark_qcow2::{BackingReference, CreateOptions, Gate, Image, OpenOptions, Storage};

use crate::common::{add_bitmap, alone, assert_covers, read_all};
use crate::rebase::quietly;
use crate::rebase_bitmaps::said;
use crate::stack::Live;

const SIZE: u64 = 1 << 20;

/// An overlay and its base.
struct Case {
    base: Vec<u8>,
    top: Vec<u8>,
    /// What the overlay shows.
    disk: Vec<u8>,
    /// What the base showed.
    below: Vec<u8>,
}

fn reference() -> BackingReference {
    BackingReference {
        name: b"base".to_vec(),
        format: "qcow2".to_owned(),
    }
}

fn open(top: Vec<u8>, base: Vec<u8>) -> Image {
    let gate = Live::default().with("base", CrashStorage::new(base));
    let options = OpenOptions::reading(Arc::new(gate));
    Image::open(Box::new(CrashStorage::new(top)), options).unwrap()
}

fn alone_open(bytes: &[u8]) -> Image {
    Image::open_unbacked(Box::new(CrashStorage::new(bytes.to_vec())), false).unwrap()
}

impl Case {
    fn new(bits: [u32; 2], base_size: u64) -> Self {
        let options = |cluster_bits, size, backing| CreateOptions {
            cluster_bits,
            backing,
            ..CreateOptions::new(size)
        };
        let base = crate::common::built(&options(bits[0], base_size, None), |image| {
            image.write(&vec![1; 300_000], 50_000).unwrap();
            add_bitmap(image, "both", 4096);
            add_bitmap(image, "own", 65_536);
        });
        let storage = CrashStorage::new(Vec::new());
        let gate = Live::default().with("base", CrashStorage::new(base.clone()));
        let open_options = OpenOptions::writing(Arc::new(gate));
        let shape = options(bits[1], SIZE, Some(reference()));
        let image = Image::create(Box::new(storage.clone()), &shape, open_options).unwrap();
        add_bitmap(&image, "both", 4096);
        add_bitmap(&image, "new", 65_536);
        image.write(&vec![2; 90_000], 20_000).unwrap();
        image.write_zeroes(200_000, 100_000).unwrap();
        image.write(&[3; 700], SIZE - 700).unwrap();
        let disk = read_all(&image);
        image.close().unwrap();
        let top = storage.to_bytes();
        let below = read_all(&alone_open(&base));
        Self {
            base,
            top,
            disk,
            below,
        }
    }

    /// What must hold of the two files at any moment.
    fn judge(&self, base: &[u8], top: &[u8], what: &str) {
        let image = open(top.to_vec(), base.to_vec());
        assert!(read_all(&image) == self.disk, "{what}: another disk");
        assert!(said(&image) == said(&alone_open(&self.top)), "{what}");
        let lower = alone_open(base);
        let now = read_all(&lower);
        for name in ["own", "both"] {
            let bits = lower.load_bitmap(name).unwrap();
            assert_covers(&bits, &self.below, &now, what);
        }
        for image in [&image, &lower] {
            let report = image.check().unwrap();
            let harm = (report.check_errors, report.corruptions);
            assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
        }
        if lower
            .bitmaps()
            .unwrap()
            .iter()
            .any(|bits| bits.name == "new")
        {
            let carried = lower.load_bitmap("new").unwrap();
            assert!(carried.test(20_000) && carried.test(SIZE - 1), "{what}");
        }
        // Where the overlay holds nothing, the base shows the whole disk.
        let emptied = image.map(0, SIZE).unwrap().iter().all(|run| run.depth > 0);
        assert!(!emptied || now[..self.disk.len()] == self.disk, "{what}");
    }
}

const SHAPES: [([u32; 2], u64); 3] = [([16, 16], SIZE), ([12, 16], SIZE / 2), ([16, 12], 2 * SIZE)];

#[test]
fn a_crash_of_a_commit_leaves_the_disk_and_what_changed_below_is_marked() {
    let _alone = alone();
    let (mut points, mut images, mut judged) = (0, 0, 0);
    for (bits, base_size) in SHAPES {
        let case = Case::new(bits, base_size);
        let world = CrashWorld::new(vec![case.base.clone(), case.top.clone()]);
        let options = CommitOptions {
            gate: Arc::new(Live::default().with("base", world.disk(0))),
            threads: 1,
            ..CommitOptions::default()
        };
        commit(Box::new(world.disk(1)), &options, &quietly).unwrap();
        let log = world.log();
        points += log.points();
        for crash in log.images(CrashOptions::default()) {
            let what = format!("{bits:?}, {base_size}: {}", crash.description);
            let [base, top] = &crash.disks[..] else {
                panic!("two disks")
            };
            case.judge(base, top, &what);
            if oracle::available() && images % 101 == 0 {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("top");
                std::fs::write(&path, top).unwrap();
                std::fs::write(folder.path().join("base"), base).unwrap();
                assert!(qemu_img::convert_to_raw(&path) == case.disk, "{what}");
                qemu_img::check(&path).assert_at_worst_leaks();
                qemu_img::check(&folder.path().join("base")).assert_at_worst_leaks();
                judged += 1;
            }
            images += 1;
        }
    }
    println!("{points} points, {images} pairs, {judged} judged by QEMU");
    assert!(points >= 100 && images >= 300, "{points}, {images}");
}

/// The gate of a base whose calls fail.
#[derive(Clone, Debug)]
struct Failing(FaultyStorage);

impl Gate for Failing {
    fn open(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        Ok(Box::new(self.0.clone()))
    }

    fn open_for_writing(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        Ok(Box::new(self.0.clone()))
    }
}

/// Not discards: whether the host gives space back is its own business.
const KINDS: [&[CallKind]; 3] = [
    &[CallKind::Read],
    &[
        CallKind::Write,
        CallKind::WriteZeroes,
        CallKind::Flush,
        CallKind::SetLen,
    ],
    &[CallKind::Len],
];

#[test]
fn a_failed_call_of_a_commit_surfaces_and_leaves_the_disk() {
    let mut runs = 0;
    for (bits, base_size) in SHAPES {
        let case = Case::new(bits, base_size);
        let session = |base: &FaultyStorage, top: &FaultyStorage| {
            let options = CommitOptions {
                gate: Arc::new(Failing(base.clone())),
                threads: 1,
                ..CommitOptions::default()
            };
            commit(Box::new(top.clone()), &options, &quietly)
        };
        let disks = || [&case.base, &case.top].map(|bytes| CrashStorage::new(bytes.clone()));
        for number in 0..2 {
            for kinds in KINDS {
                let [base, top] = disks().map(FaultyStorage::new);
                session(&base, &top).unwrap();
                let calls = [&base, &top][number].calls_of(kinds);
                let step = usize::try_from(calls / 25 + 1).unwrap();
                for at in (0..calls).step_by(step) {
                    let errno = [Errno::Io, Errno::NoSpace][usize::from(at % 2 == 1)];
                    let below = disks();
                    let [base, top] = below.clone().map(FaultyStorage::new);
                    let broken = [&base, &top][number];
                    broken.arm(Fault::once(kinds, at).with_errno(errno));
                    let answer = session(&base, &top);
                    let what = format!("{bits:?}, disk {number}: {at} of {kinds:?}");
                    let fine = answer.is_err() || errno == Errno::NoSpace;
                    assert!(fine || broken.fired() == 0, "{what}: swallowed");
                    let [base, top] = below.map(|storage| storage.to_bytes());
                    case.judge(&base, &top, &what);
                    // Committing again finishes the work.
                    let again =
                        [base, top].map(|bytes| FaultyStorage::new(CrashStorage::new(bytes)));
                    session(&again[0], &again[1]).unwrap_or_else(|error| panic!("{what}: {error}"));
                    runs += 1;
                }
            }
        }
    }
    println!("{runs} faults");
    assert!(runs >= 200, "the sweep shrank: {runs}");
}
