//! Snapshots that QEMU made, listed and read by us.

use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{Error, Image, MemoryStorage, Mistake, SnapshotInfo, snapshots};

use crate::common::{self, alone, read_all};
use crate::life::{MIB, Place, SHAPES, open_snapshot, qemu_life, text};

#[test]
fn snapshots_made_by_qemu_are_read_byte_for_byte() {
    let _alone = alone();
    require_qemu!();
    let mut compared = 0;
    for (seed, opts) in (1..).zip(SHAPES) {
        let place = Place::new();
        let disk = qemu_life(&place.path, 3 * MIB + 512, opts, 3, seed);
        assert!(read_all(&place.open()) == disk.content, "{opts:?}: present");
        for (name, content) in &disk.snapshots {
            let image = open_snapshot(place.bytes(), common::reading(), name);
            assert!(&read_all(&image) == content, "{opts:?}: {name}");
            assert!(image.bitmaps().unwrap().is_empty());
            compared += 1;
        }
    }
    println!("{compared} snapshots of {} images", SHAPES.len());
    assert!(compared >= 20);
}

#[test]
fn a_listing_has_what_qemu_img_info_has() {
    let _alone = alone();
    require_qemu!();
    let place = Place::new();
    qemu_life(&place.path, MIB, &[], 3, 9);
    qemu_img::ok(&["snapshot", "-q", "-c", "s1", text(&place.path)]);
    let image = place.open();
    let ours: Vec<SnapshotInfo> = image.snapshots().unwrap();
    let theirs = qemu_img::info(&place.path)["snapshots"].clone();
    assert_eq!(ours.len(), 4);
    for (ours, theirs) in ours.iter().zip(theirs.as_array().unwrap()) {
        assert_eq!(theirs["id"], ours.id.as_str());
        assert_eq!(theirs["name"], ours.name.as_str());
        assert_eq!(theirs["date-sec"], ours.seconds);
        assert_eq!(theirs["date-nsec"], ours.nanoseconds);
        assert_eq!(theirs["vm-state-size"], ours.vm_state_bytes);
        assert_eq!(theirs["icount"].as_u64(), ours.instruction_count);
        assert_eq!(ours.disk_bytes, MIB);
    }
    let storage = MemoryStorage::from_bytes(place.bytes());
    assert_eq!(snapshots::list(&storage, &image.header()).unwrap(), ours);
    // Names may repeat: the first counts. An identifier goes before a name.
    assert_eq!(image.find_snapshot("s1").unwrap().id, "2");
    assert_eq!(image.find_snapshot("3").unwrap().name, "s2");
}

#[test]
fn a_snapshot_that_is_not_there_or_would_be_written_is_refused() {
    let _alone = alone();
    let bytes = common::built(&tidemark_qcow2::CreateOptions::new(MIB), |_| ());
    let open = |options| {
        let storage = Box::new(MemoryStorage::from_bytes(bytes.clone()));
        Image::open_snapshot(storage, options, "x").unwrap_err()
    };
    let missing = Mistake::NoSuchSnapshot("x".into());
    assert_eq!(open(common::reading()).mistake(), Some(&missing));
    assert!(matches!(open(common::writing()), Error::Invalid { .. }));
}
