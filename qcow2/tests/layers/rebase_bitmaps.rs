//! Bitmaps and chain record of an overlay that is moved.
//!
//! A safe move changes no byte and marks nothing. A new name alone may change what the overlay does
//! not hold; it is marked unless the caller vouches for it.

use std::sync::Arc;

use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::chain::{
    ChainRecord, CheckpointEntry, Health, Identity, ImageUuid, Proof, Reading, Scheme,
};
use tidemark_qcow2::transfer::{RebaseOptions, rebase};
use tidemark_qcow2::{
    BackingReference, Below, Bitmap, CreateOptions, Gate, Image, OpenOptions, proof,
};

use crate::common::{add_bitmap, alone, assert_covers, granularity, read_all};
use crate::rebase::quietly;
use crate::stack::{Folder, Named, copy};

const SIZE: u64 = 2 << 20;

/// An overlay of some shape over `base`, with a recording and a frozen bitmap and a record.
pub(crate) struct Case {
    pub(crate) bytes: Vec<u8>,
    pub(crate) gate: Arc<dyn Gate>,
    pub(crate) content: Vec<u8>,
}

pub(crate) fn raw(name: &str) -> BackingReference {
    BackingReference {
        name: name.as_bytes().to_vec(),
        format: "raw".to_owned(),
    }
}

pub(crate) fn open(storage: &CrashStorage, gate: &Arc<dyn Gate>) -> Image {
    let options = OpenOptions::writing(Arc::clone(gate));
    Image::open(Box::new(storage.clone()), options).unwrap()
}

/// Bases that share some bytes, differ in others, and have zeros where the other has none.
pub(crate) fn bases() -> Arc<dyn Gate> {
    let bytes = |from: u64, len: u64, step: u8| -> Vec<u8> {
        (from..from + len)
            .map(|at| u8::try_from(at / 65_536 % 7).unwrap() * step)
            .collect()
    };
    let base = bytes(0, SIZE - 100_352, 3);
    let mut other = bytes(0, SIZE / 2 + 51_200, 3);
    other[..100_000].fill(9);
    other[300_000..400_000].fill(0);
    Arc::new(Named::default().with("base", base).with("other", other))
}

impl Case {
    pub(crate) fn new(cluster_bits: u32, extended_l2: bool) -> Self {
        let gate = bases();
        let storage = CrashStorage::new(Vec::new());
        let options = CreateOptions {
            cluster_bits,
            extended_l2,
            backing: Some(raw("base")),
            ..CreateOptions::new(SIZE)
        };
        let open_options = OpenOptions::writing(Arc::clone(&gate));
        let image = Image::create(Box::new(storage.clone()), &options, open_options).unwrap();
        image.write(&vec![0x77; 70_000], 330_000).unwrap();
        image.write_zeroes(600_000, 150_000).unwrap();
        image.flush().unwrap();
        add_bitmap(&image, "frozen", 65_536);
        image.write(&[0x78; 3000], 1_500_000).unwrap();
        image
            .update(|update| {
                update.set_recording("frozen", false)?;
                let frozen = update.load("frozen")?;
                let mut bits = update.blank(granularity(4096))?;
                let recording = proof::plant(update.image(), &mut bits)?;
                update.put("recording", bits, true)?;
                let mut record = ChainRecord::new(ImageUuid([5; 16]), Scheme::Intervals);
                let entry = |number: u8, name: &str, proof| CheckpointEntry {
                    identity: Identity([number; 16]),
                    name: name.to_owned(),
                    parent: None,
                    created: None,
                    disk_bytes: Some(SIZE),
                    granularity: granularity(4096),
                    health: Health::Ok,
                    proof,
                    anchor: None,
                };
                record.checkpoints = vec![
                    entry(1, "frozen", Proof::Frozen(proof::frozen(&frozen))),
                    entry(2, "recording", Proof::Recording(recording)),
                ];
                record.current = Some(Identity([2; 16]));
                update.set_record(Some(record));
                Ok::<(), tidemark_qcow2::Error>(())
            })
            .unwrap();
        image.write(&[0x79; 3000], 900_000).unwrap();
        let content = read_all(&image);
        image.close().unwrap();
        Self {
            bytes: storage.to_bytes(),
            gate,
            content,
        }
    }
}

/// Names, flags and bits, and the record.
pub(crate) fn said(image: &Image) -> (Vec<(String, bool, Bitmap)>, Reading) {
    let bits = |info: tidemark_qcow2::BitmapInfo| {
        let bits = image.load_bitmap(&info.name).unwrap();
        (info.name, info.auto, bits)
    };
    let bitmaps = image.bitmaps().unwrap().into_iter().map(bits).collect();
    (bitmaps, image.chain())
}

const SHAPES: [(u32, bool); 5] = [
    (11, false),
    (12, false),
    (16, false),
    (16, true),
    (21, false),
];

#[test]
fn a_safe_move_leaves_bitmaps_and_record_as_they_are() {
    let _alone = alone();
    let mut moves = 0;
    for (cluster_bits, extended_l2) in SHAPES {
        let case = Case::new(cluster_bits, extended_l2);
        let storage = CrashStorage::new(case.bytes.clone());
        let before = said(&open(&storage, &case.gate));
        let options = RebaseOptions {
            gate: Arc::clone(&case.gate),
            threads: 3,
        };
        for name in [Some("other"), Some("base"), None] {
            let reference = name.map(raw);
            let overlay = open(&storage, &case.gate);
            let rebased = rebase(overlay, reference.as_ref(), &options, &quietly).unwrap();
            let image = open(&storage, &case.gate);
            assert!(said(&image) == before, "2^{cluster_bits}, {name:?}");
            assert!(read_all(&image) == case.content);
            assert_eq!(image.check().unwrap().exit_code(), 0);
            moves += 1;
            println!("2^{cluster_bits} onto {name:?}: {rebased:?}");
        }
        // And it goes on recording.
        let image = open(&storage, &case.gate);
        image.write(&[1; 512], 200_704).unwrap();
        image.close().unwrap();
        let image = open(&storage, &case.gate);
        assert!(image.load_bitmap("recording").unwrap().test(200_704));
        assert!(!image.load_bitmap("recording").unwrap().test(1 << 20));
    }
    println!("{moves} moves");
    assert_eq!(moves, 15);
}

#[test]
fn what_was_marked_in_the_same_session_stays_marked() {
    let _alone = alone();
    let case = Case::new(16, false);
    let storage = CrashStorage::new(case.bytes.clone());
    let overlay = open(&storage, &case.gate);
    overlay.write(&[0x55; 9000], 1_200_000).unwrap();
    let expected = read_all(&overlay);
    let options = RebaseOptions {
        gate: Arc::clone(&case.gate),
        threads: 2,
    };
    rebase(overlay, Some(&raw("other")), &options, &quietly).unwrap();
    let image = open(&storage, &case.gate);
    assert!(read_all(&image) == expected);
    let bits = image.load_bitmap("recording").unwrap();
    assert_covers(&bits, &case.content, &expected, "the write before");
}

#[test]
fn a_new_name_marks_what_may_read_differently_unless_somebody_vouches() {
    let _alone = alone();
    let mut cases = 0;
    for (cluster_bits, extended_l2) in SHAPES {
        let case = Case::new(cluster_bits, extended_l2);
        for name in [Some("other"), None] {
            for below in [Below::Unknown, Below::Same] {
                let storage = CrashStorage::new(case.bytes.clone());
                let before = said(&open(&storage, &case.gate));
                let reference = name.map(raw);
                // The files themselves are not needed.
                let image = Image::open_unbacked(Box::new(storage.clone()), true).unwrap();
                image.set_backing(reference.as_ref(), below).unwrap();
                let image = open(&storage, &case.gate);
                let after = said(&image);
                assert_eq!(image.check().unwrap().exit_code(), 0);
                assert_eq!(image.backing(), reference);
                if below == Below::Same {
                    assert!(after == before);
                    continue;
                }
                let content = read_all(&image);
                let changed = content != case.content;
                assert!(changed || cluster_bits == 21, "the test needs a difference");
                let recording = image.load_bitmap("recording").unwrap();
                assert_covers(&recording, &case.content, &content, "a new name");
                // Witnesses lie anywhere.
                let marked_before = &before
                    .0
                    .iter()
                    .find(|bits| bits.0 == "recording")
                    .unwrap()
                    .2;
                let marked = |at| recording.test(at) && !marked_before.test(at);
                let held = marked(350_000) || marked(650_000);
                assert!(!held || cluster_bits > 16, "what it holds cannot change");
                let frozen = |said: &[(String, bool, Bitmap)]| {
                    said.iter().find(|bits| bits.0 == "frozen").cloned()
                };
                assert!(frozen(&after.0) == frozen(&before.0));
                let Reading::Current(record) = &after.1 else {
                    panic!("the record is gone")
                };
                let recording = record.checkpoint_named("recording").unwrap();
                assert!(image.judge(recording).unwrap().is_usable());
                cases += 1;
            }
        }
    }
    println!("{cases} names");
    assert_eq!(cases, 10);
}

/// Bitmaps that QEMU made, and QEMU reading ours afterwards.
#[test]
fn bitmaps_of_qemu_stay_through_a_move() {
    require_qemu!();
    let _alone = alone();
    for seed in 0..6 {
        let mut folder = Folder::new(2000 + seed);
        let old = folder.chain("old", 1);
        let overlay = loop {
            let overlay = folder.layer("overlay", old.last());
            if qemu_img::info(&folder.path("overlay"))["format-specific"]["data"]["compat"] == "1.1"
            {
                break overlay.name;
            }
        };
        let new = folder.chain("new", 1);
        let path = copy(&folder, &overlay, "ours");
        qemu_img::bitmap_add(&path, "b", Some(65_536));
        folder.fill("ours", "qcow2", 1 << 19);
        let before = qemu_img::convert_to_raw(&path);
        let image = crate::common::open_file(&path, crate::common::writing());
        let bits = image.load_bitmap("b").unwrap();
        let options = crate::rebase::options(2);
        let reference = new.last().map(crate::stack::Layer::reference);
        rebase(image, reference.as_ref(), &options, &quietly).unwrap();
        assert!(qemu_img::convert_to_raw(&path) == before);
        qemu_img::check(&path).assert_clean();
        let image = crate::common::open_file(&path, crate::common::reading());
        assert!(image.load_bitmap("b").unwrap() == bits, "stack {seed}");
        let info = qemu_img::info(&path);
        let listed = &info["format-specific"]["data"]["bitmaps"];
        assert_eq!(listed[0]["flags"], serde_json::json!(["auto"]));
    }
}
