//! Bitmaps of layers that are committed: what goes over covers all that changed since its moment,
//! and what does not is named.

use std::sync::Arc;

use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::transfer::{CommitOptions, Committed, LeftBehind, LeftReason, commit};
use tidemark_qcow2::{
    BackingReference, Bitmap, CreateOptions, Gate, Image, MemoryStorage, OpenOptions,
};

use crate::common::{add_bitmap, alone, assert_covers, read_all};
use crate::rebase::quietly;
use crate::stack::Live;

/// Three layers in memory, and what the guest saw when each bitmap was made.
struct Stack {
    gate: Live,
    top: CrashStorage,
    base: CrashStorage,
    middle: CrashStorage,
    /// Content at the moments when base, middle and top were the disk, as their bitmaps began.
    moments: [Vec<u8>; 3],
}

fn qcow2(name: &str) -> BackingReference {
    BackingReference {
        name: name.as_bytes().to_vec(),
        format: "qcow2".to_owned(),
    }
}

fn create(size: u64, cluster_bits: u32, below: Option<&str>, gate: &Live) -> (CrashStorage, Image) {
    let storage = CrashStorage::new(Vec::new());
    let options = CreateOptions {
        cluster_bits,
        backing: below.map(qcow2),
        ..CreateOptions::new(size)
    };
    let open = OpenOptions::writing(Arc::new(gate.clone()));
    let image = Image::create(Box::new(storage.clone()), &options, open).unwrap();
    (storage, image)
}

fn open(storage: &CrashStorage, gate: &Live) -> Image {
    let options = OpenOptions::reading(Arc::new(gate.clone()));
    Image::open(Box::new(storage.clone()), options).unwrap()
}

fn freeze(image: &Image, name: &str) {
    image
        .update(|update| update.set_recording(name, false))
        .unwrap();
}

impl Stack {
    /// Layers of these sizes, base first.
    fn new(sizes: [u64; 3]) -> Self {
        let gate = Live::default();
        let (base, image) = create(sizes[0], 16, None, &gate);
        image.write(&vec![1; 700_000], 0).unwrap();
        // A shorter layer above hides it.
        image.write(&[6; 4000], sizes[0] - 4000).unwrap();
        for (name, granularity) in [
            ("both", 65_536),
            ("own", 4096),
            ("cold", 4096),
            ("gap", 4096),
        ] {
            add_bitmap(&image, name, granularity);
        }
        freeze(&image, "cold");
        let first = read_all(&image);
        image.write(&[2; 5000], 100_000).unwrap();
        image.close().unwrap();
        let gate = gate.with("base", base.clone());
        let (middle, image) = create(sizes[1], 12, Some("base"), &gate);
        for name in ["both", "cold", "two", "middle"] {
            add_bitmap(&image, name, 4096);
        }
        let second = read_all(&image);
        image.write(&[3; 9000], 200_000).unwrap();
        image.write_zeroes(400_000, 50_000).unwrap();
        image.close().unwrap();
        let gate = gate.with("middle", middle.clone());
        let (top, image) = create(sizes[2], 16, Some("middle"), &gate);
        for name in ["both", "cold", "two", "gap", "one", "frozen"] {
            add_bitmap(&image, name, 4096);
        }
        let third = read_all(&image);
        image.write(&[4; 70_000], 300_000).unwrap();
        image.write_zeroes(650_000, 40_000).unwrap();
        image.write(&[5; 512], sizes[2] - 512).unwrap();
        freeze(&image, "frozen");
        image.close().unwrap();
        Self {
            gate,
            top,
            base,
            middle,
            moments: [first, second, third],
        }
    }

    fn commit(&self, base: usize, empty: bool) -> Committed {
        let options = CommitOptions {
            gate: Arc::new(self.gate.clone()),
            base,
            empty,
            threads: 2,
        };
        commit(Box::new(self.top.clone()), &options, &quietly).unwrap()
    }
}

fn bits(image: &Image, name: &str) -> Bitmap {
    image.load_bitmap(name).unwrap()
}

const SIZES: [[u64; 3]; 5] = [
    [1_500_160, 1 << 20, 2 << 20],
    [1 << 20, 1_500_160, 2 << 20],
    [2 << 20, 2 << 20, 1_300_480],
    [1 << 20, 1 << 20, 1 << 20],
    [2 << 20, 900_096, 1_800_192],
];

fn left(committed: &Committed) -> Vec<(&str, LeftReason)> {
    let mut left: Vec<_> = committed
        .left_behind
        .iter()
        .map(|LeftBehind { name, reason }| (name.as_str(), *reason))
        .collect();
    left.sort_by_key(|(name, _)| *name);
    left
}

#[test]
fn carried_bitmaps_cover_all_that_changed_since_their_moments() {
    let _alone = alone();
    for sizes in SIZES {
        let stack = Stack::new(sizes);
        let disk = read_all(&open(&stack.top, &stack.gate));
        let before = read_all(&open(&stack.base, &stack.gate));
        let mut committed = stack.commit(2, false);
        println!("{sizes:?}: {committed:?}");
        committed.carried.sort();
        assert_eq!(committed.carried, ["both", "one", "two"]);
        assert_eq!(
            left(&committed),
            [
                ("cold", LeftReason::NotRecording),
                ("frozen", LeftReason::NotRecording),
                ("gap", LeftReason::Gap),
                ("middle", LeftReason::Gap),
            ]
        );
        assert!(read_all(&open(&stack.top, &stack.gate)) == disk);
        let base = open(&stack.base, &stack.gate);
        let after = read_all(&base);
        assert!(after[..disk.len()] == disk);
        let shown = disk.len().min(after.len());
        for (name, moment) in [("both", 0), ("two", 1), ("one", 2)] {
            assert!(
                base.bitmaps()
                    .unwrap()
                    .iter()
                    .any(|b| b.name == name && b.auto)
            );
            let old = &stack.moments[moment];
            // What lies behind the overlay's end is no part of its disk.
            assert_covers(&bits(&base, name), old, &after[..shown], name);
        }
        for name in ["own", "gap"] {
            assert_covers(&bits(&base, name), &before, &after, name);
            assert_covers(&bits(&base, name), &stack.moments[0], &after, name);
        }
        assert_eq!(base.check().unwrap().exit_code(), 0);
        // A new bitmap is as exact as in the overlay: not all that was written is marked.
        assert!(!bits(&base, "one").test(200_000) || sizes[1] < 300_000);
    }
}

#[test]
fn a_commit_into_the_layer_right_below_joins_what_that_has() {
    let _alone = alone();
    for sizes in SIZES {
        let stack = Stack::new(sizes);
        let disk = read_all(&open(&stack.top, &stack.gate));
        let own: Vec<Bitmap> = ["one", "two", "both"]
            .map(|name| bits(&open(&stack.top, &stack.gate), name))
            .into();
        let mut committed = stack.commit(1, true);
        committed.carried.sort();
        assert_eq!(committed.carried, ["both", "cold", "gap", "one", "two"]);
        assert_eq!(left(&committed), [("frozen", LeftReason::NotRecording)]);
        let top = open(&stack.top, &stack.gate);
        assert!(read_all(&top) == disk);
        // The overlay keeps its own: nothing changed on its disk.
        for (name, bits) in ["one", "two", "both"].iter().zip(own) {
            assert!(top.load_bitmap(name).unwrap() == bits, "{name}");
        }
        let middle = open(&stack.middle, &stack.gate);
        let after = read_all(&middle);
        for (name, moment) in [("two", 1), ("one", 2), ("both", 1)] {
            let old = &stack.moments[moment];
            assert_covers(&bits(&middle, name), old, &after[..disk.len()], name);
        }
        assert_eq!(middle.check().unwrap().exit_code(), 0);
        assert_eq!(top.check().unwrap().exit_code(), 0);
    }
}

/// A base that holds no bitmaps names them all; one without room, too; the data go over.
#[test]
fn a_base_that_cannot_hold_bitmaps_gets_the_data_all_the_same() {
    let _alone = alone();
    let raw = CrashStorage::new(vec![7; 1 << 20]);
    let gate = Live::default().with("base", raw.clone());
    let old = CreateOptions {
        version: 2,
        ..CreateOptions::new(1 << 20)
    };
    let version_2 = CrashStorage::new(crate::common::built(&old, |_| {}));
    let second = Live::default().with("base", version_2.clone());
    for (gate, format) in [(gate, "raw"), (second, "qcow2")] {
        let storage = CrashStorage::new(Vec::new());
        let options = CreateOptions {
            backing: Some(BackingReference {
                name: b"base".to_vec(),
                format: format.to_owned(),
            }),
            ..CreateOptions::new(1 << 20)
        };
        let open = OpenOptions::writing(Arc::new(gate.clone()));
        let image = Image::create(Box::new(storage.clone()), &options, open.clone()).unwrap();
        add_bitmap(&image, "b", 65_536);
        image.write(&[9; 10_000], 30_000).unwrap();
        let disk = read_all(&image);
        image.close().unwrap();
        let options = CommitOptions {
            gate: Arc::new(gate.clone()),
            ..CommitOptions::default()
        };
        let committed = commit(Box::new(storage.clone()), &options, &quietly).unwrap();
        assert_eq!(left(&committed), [("b", LeftReason::BaseHoldsNone)]);
        let image = Image::open(Box::new(storage), open).unwrap();
        assert!(read_all(&image) == disk);
        assert!(image.load_bitmap("b").unwrap().test(30_000));
    }
    assert!(raw.to_bytes()[30_000..40_000] == [9; 10_000]);
    // A first cluster that is full.
    let full = CreateOptions {
        cluster_bits: 9,
        backing: Some(BackingReference {
            name: vec![b'x'; 360],
            format: "raw".to_owned(),
        }),
        ..CreateOptions::new(1 << 20)
    };
    let below = Live::default().with(&"x".repeat(360), CrashStorage::new(Vec::new()));
    let (tight, _) = {
        let storage = CrashStorage::new(Vec::new());
        let open = OpenOptions::writing(Arc::new(below.clone()));
        let image = Image::create(Box::new(storage.clone()), &full, open).unwrap();
        image.close().unwrap();
        (storage, ())
    };
    let gate = below.with("base", tight);
    let (top, image) = create(1 << 20, 16, Some("base"), &gate);
    add_bitmap(&image, "b", 65_536);
    image.write(&[9; 10_000], 30_000).unwrap();
    let disk = read_all(&image);
    image.close().unwrap();
    let options = CommitOptions {
        gate: Arc::new(gate.clone()),
        ..CommitOptions::default()
    };
    let committed = commit(Box::new(top.clone()), &options, &quietly).unwrap();
    assert_eq!(left(&committed), [("b", LeftReason::NoRoom)]);
    assert!(read_all(&open(&top, &gate)) == disk);
}

#[test]
fn every_reason_says_something_else() {
    let reasons = [
        LeftReason::Inconsistent,
        LeftReason::NotRecording,
        LeftReason::Gap,
        LeftReason::BaseHoldsNone,
        LeftReason::NoRoom,
    ];
    let said: std::collections::HashSet<String> = reasons.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), reasons.len());
    // Storage in memory is no file: nothing there can be the same file twice.
    assert!(tidemark_qcow2::Storage::identity(&MemoryStorage::from_bytes(Vec::new())).is_none());
    let closed: &dyn Gate = &tidemark_qcow2::NoFiles;
    assert!(closed.open_for_writing(&qcow2("base"), "").is_err());
}
