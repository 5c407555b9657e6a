//! Internal snapshots of encrypted images: a matter of metadata, ours to change; their data is not
//! ours to read.

use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{FileStorage, Image, Moment, Sharing};

use crate::common::{add_bitmap, alone, assert_covers, open_file, reading, writing};
use crate::encrypted::{Desk, KINDS, is_refusal};

/// What a guest with the key sees in a snapshot.
fn content_of(desk: &Desk, name: &str) -> Vec<u8> {
    let raw = desk.path.with_extension("snapshot");
    let raw_name = raw.display().to_string();
    desk.qemu_img(&["convert", "-O", "raw", "-l", name], &[&raw_name]);
    std::fs::read(raw).unwrap()
}

#[test]
fn snapshots_of_an_encrypted_disk_are_taken_applied_and_deleted_without_its_key() {
    require_qemu!();
    let _turn = alone();
    let mut moments = 0;
    for (format, cluster_size) in KINDS.iter().step_by(2) {
        let desk = Desk::new(format, cluster_size);
        let what = format!("{format}, {cluster_size}");
        let first = desk.content();
        // QEMU refuses to apply beside bitmaps, not to take one.
        desk.qemu_img(&["snapshot", "-c", "theirs"], &[]);
        desk.guest(&["write -P 9 100k 70k", "write -P 3 2M 64k"]);
        let second = desk.content();

        let image = open_file(&desk.path, writing());
        add_bitmap(&image, "new", 4096);
        let listed = image.create_snapshot("ours").unwrap();
        assert_eq!(
            (listed.id.as_str(), image.snapshots().unwrap().len()),
            ("2", 2)
        );
        let delta = image
            .delta(Moment::Snapshot("theirs"), Moment::Present)
            .unwrap();
        assert_covers(&delta.changed, &first, &second, &what);
        let moved = *cluster_size == "2M";
        assert_eq!(delta.changed.test(3 << 20), moved, "{what}: at 3 MiB");
        image.close().unwrap();
        desk.assert_checks();
        assert!(desk.content() == second, "{what}: present");
        assert!(content_of(&desk, "ours") == second, "{what}: ours");
        assert!(content_of(&desk, "theirs") == first, "{what}: theirs");

        let image = open_file(&desk.path, writing());
        image.apply_snapshot("theirs").unwrap();
        let bits = image.load_bitmap("new").unwrap();
        assert_covers(&bits, &second, &first, &what);
        image.close().unwrap();
        desk.assert_checks();
        assert!(desk.content() == first, "{what}: applied");
        desk.guest(&["write -P 5 0 10k"]);
        assert!(
            content_of(&desk, "theirs") == first,
            "{what}: theirs, shared"
        );

        let storage = FileStorage::open(&desk.path, false, Sharing::Exclusive).unwrap();
        let moment = Image::open_snapshot(Box::new(storage), reading(), "ours").unwrap();
        let error = moment.read(&mut [0; 512], 0).unwrap_err();
        assert!(is_refusal(&error, desk.method), "{error}");
        drop(moment);

        let third = desk.content();
        let image = open_file(&desk.path, writing());
        image.delete_snapshot("theirs").unwrap();
        image.delete_snapshot("ours").unwrap();
        image.close().unwrap();
        desk.assert_checks();
        assert!(desk.content() == third, "{what}: deleted");
        moments += 7;
    }
    println!("{moments} moments of encrypted disks");
    assert_eq!(moments, 21);
}
