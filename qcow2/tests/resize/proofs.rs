//! The chain record follows the disk: proofs of what was whole go over, losses stay losses.

use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::chain::{
    CheckpointEntry, Health, Identity, Proof, Reading, RecordingProof, Scheme,
};
use tidemark_qcow2::{CreateOptions, Image, Shrink, proof};

use crate::common::{built, granularity, writing};

const SIZE: u64 = 8 << 20;

fn entry(number: u8, name: &str, proof: Proof) -> CheckpointEntry {
    CheckpointEntry {
        identity: Identity([number; 16]),
        name: name.to_owned(),
        parent: None,
        created: None,
        disk_bytes: Some(SIZE),
        granularity: granularity(65_536),
        health: Health::Ok,
        proof,
        anchor: None,
    }
}

/// An image with a frozen checkpoint whose bits reach to the end, and a recording one.
fn chain(spoil: bool) -> Vec<u8> {
    built(&CreateOptions::new(SIZE), |image| {
        image
            .update(|update| {
                let mut frozen = update.blank(granularity(65_536))?;
                frozen.mark(0..200_000).unwrap();
                frozen.mark(SIZE - 200_000..SIZE).unwrap();
                let mut proved = proof::frozen(&frozen);
                if spoil {
                    proved.count += 1;
                }
                let mut recording = update.blank(granularity(65_536))?;
                let planted = proof::plant(update.image(), &mut recording)?;
                update.put("frozen", frozen, false)?;
                update.put("recording", recording, true)?;
                let mut record = proof::fresh_record(Scheme::Intervals).unwrap();
                record.checkpoints = vec![
                    entry(1, "frozen", Proof::Frozen(proved)),
                    entry(2, "recording", Proof::Recording(planted)),
                ];
                record.current = Some(Identity([2; 16]));
                update.set_record(Some(record));
                Ok::<_, tidemark_qcow2::Error>(())
            })
            .unwrap();
        image.write(&[1; 5000], 6 << 20).unwrap();
    })
}

fn healths(image: &Image) -> Vec<Health> {
    let Reading::Current(record) = image.chain() else {
        panic!("no record")
    };
    let judge = |entry| image.judge(entry).unwrap();
    record.checkpoints.iter().map(judge).collect()
}

fn recording_proof(image: &Image) -> RecordingProof {
    match image.chain() {
        Reading::Current(record) => match &record.checkpoints[1].proof {
            Proof::Recording(proof) => proof.clone(),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn proofs_hold_after_every_change_of_the_size() {
    let mut sizes = 0;
    for size in [512, 1 << 20, SIZE - 512, SIZE + 512, 64 << 20, 1 << 40] {
        let storage = CrashStorage::new(chain(false));
        let open = || Image::open(Box::new(storage.clone()), writing()).unwrap();
        let image = open();
        image.resize(size, Shrink::Allowed).unwrap();
        assert_eq!(healths(&image), [Health::SizeDiffers; 2], "{size}");
        let proof = recording_proof(&image);
        assert!(
            !proof.planted.is_empty() && proof.smallest_disk_bytes == size,
            "{proof:?}"
        );
        let bits = image.load_bitmap("recording").unwrap();
        assert!(size <= SIZE || (bits.test(SIZE) && bits.test(size - 1)));
        assert!(size <= SIZE || !image.load_bitmap("frozen").unwrap().test(size - 1));
        image.write(&[2; 512], size - 512).unwrap();
        image.close().unwrap();
        let image = open();
        assert_eq!(
            healths(&image),
            [Health::SizeDiffers; 2],
            "{size}, opened again"
        );
        // And back: the sizes agree, and what was cut in between is dirty.
        image.resize(SIZE, Shrink::Allowed).unwrap();
        assert_eq!(healths(&image), [Health::Ok; 2], "{size} and back");
        let bits = image.load_bitmap("recording").unwrap();
        assert!(
            size >= SIZE || (bits.test(size) && bits.test(SIZE - 1)),
            "{size} and back"
        );
        image.close().unwrap();
        assert_eq!(healths(&open()), [Health::Ok; 2]);
        sizes += 1;
    }
    println!("{sizes} sizes");
}

#[test]
fn a_frozen_bitmap_that_was_changed_gets_no_new_proof() {
    for size in [1 << 20, 16 << 20] {
        let storage = CrashStorage::new(chain(true));
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        image.resize(size, Shrink::Allowed).unwrap();
        assert_eq!(
            healths(&image),
            [Health::Changed, Health::SizeDiffers],
            "{size}"
        );
        image.resize(SIZE, Shrink::Allowed).unwrap();
        assert_eq!(healths(&image), [Health::Changed, Health::Ok], "{size}");
    }
}

#[test]
fn a_recording_bitmap_that_lost_bits_is_reset_also_after_a_change_of_the_size() {
    for size in [1 << 20, 16 << 20] {
        let storage = CrashStorage::new(chain(false));
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        image
            .update(|update| {
                let blank = update.blank(granularity(65_536))?;
                update.put("recording", blank, true)
            })
            .unwrap();
        image.resize(size, Shrink::Allowed).unwrap();
        assert_eq!(
            healths(&image),
            [Health::SizeDiffers, Health::Reset],
            "{size}"
        );
    }
}
