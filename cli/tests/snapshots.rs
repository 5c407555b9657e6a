//! Internal snapshots on the command line, in turns with qemu-img.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, content, has_keys};
use serde_json::json;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

#[test]
fn snapshots_are_taken_listed_applied_and_deleted_in_turns_with_qemu_img() {
    require_qemu!();
    let place = Place::new();
    let disk = place.create("disk", 4 << 20, &[]);
    assert_eq!(place.json("snapshot disk"), json!([]));
    place.write("disk", &["write -P 1 0 256k"]);
    let first = qemu_img::convert_to_raw(&disk);
    let taken = place.json("snapshot -c first disk");
    has_keys(&taken, &["image", "id", "name", "done"]);
    assert_eq!(
        (&taken["id"], &taken["done"]),
        (&json!("1"), &json!("taken"))
    );
    place.write("disk", &["write -P 2 64k 1M"]);
    let second = qemu_img::convert_to_raw(&disk);
    assert_eq!(place.qemu_img(&["snapshot", "-c", "second", "disk"]).0, 0);
    let (_, info) = place.qemu_img(&["info", "--output=json", "disk"]);
    assert_eq!(place.json("snapshot -l disk"), info["snapshots"]);
    assert_eq!(place.json("snapshot -U disk"), info["snapshots"]);
    assert!(place.ok("snapshot --list disk").contains("second"));

    assert_eq!(place.json("snapshot -a 1 disk")["name"], "first");
    assert!(qemu_img::convert_to_raw(&disk) == first);
    assert_eq!(place.qemu_img(&["snapshot", "-a", "second", "disk"]).0, 0);
    assert!(qemu_img::convert_to_raw(&disk) == second);
    place.ok("snapshot -d first disk");
    qemu_img::check(&disk).assert_clean();
    assert_eq!(place.json("snapshot disk").as_array().unwrap().len(), 1);
    place.ok("snapshot --delete second disk");
    qemu_img::check(&disk).assert_clean();
    assert_eq!(place.json("snapshot disk"), json!([]));
    assert!(qemu_img::convert_to_raw(&disk) == second);
}

#[test]
fn refusals_change_nothing() {
    require_qemu!();
    let place = Place::new();
    let disk = place.create("disk", 1 << 20, &[]);
    let narrow = place.create("narrow", 1 << 20, &[("refcount_bits", "1")]);
    let data = place.path("data").display().to_string();
    let outside = place.create("outside", 1 << 20, &[("data_file", &data)]);
    place.ok("snapshot -c one disk");
    let images = [&disk, &narrow, &outside];
    let before = images.map(|path| content(path));
    // qemu-img deletes by name alone, too.
    for (line, code) in [
        ("snapshot -a nothing disk", 1),
        ("snapshot -d 1 disk", 1),
        ("snapshot -l -c two disk", 64),
        ("snapshot -U -c two disk", 64),
        ("snapshot -f raw disk", 63),
        ("snapshot -c one outside", 63),
    ] {
        place.run(line).ends_with(code);
    }
    assert_ne!(place.run("snapshot -c one narrow").code, 0);
    for (path, bytes) in images.iter().zip(before) {
        assert!(content(path) == bytes, "{} changed", path.display());
    }
}

#[test]
fn an_applied_snapshot_marks_what_a_bitmap_must_know() {
    require_qemu!();
    let place = Place::new();
    let disk = place.create("disk", 4 << 20, &[]);
    place.write("disk", &["write -P 1 0 1M"]);
    place.ok("snapshot -c before disk");
    place.write("disk", &["write -P 2 128k 64k"]);
    place.ok("bitmap add disk record");
    // QEMU refuses this beside any bitmap.
    assert_ne!(place.qemu_img(&["snapshot", "-a", "before", "disk"]).0, 0);
    place.ok("snapshot -a before disk");
    let dirty: Vec<_> = place
        .json("bitmap dump disk record")
        .as_array()
        .unwrap()
        .iter()
        .filter(|run| run["dirty"] == true)
        .map(|run| {
            (
                run["start"].as_u64().unwrap(),
                run["length"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(dirty, [(128 << 10, 64 << 10)]);
    qemu_img::check(&disk).assert_clean();
}
