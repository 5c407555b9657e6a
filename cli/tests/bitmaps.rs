//! `bitmap`: changes that QEMU sees, contents that QEMU agrees with, chains that are protected.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, has_keys};
use serde_json::{Value, json};
use tidemark_fixtures::oracle::{nbd, qemu_img};
use tidemark_fixtures::require_qemu;

const MIB: u64 = 1 << 20;

/// The bitmaps that qemu-img lists: name, granularity, whether they record.
fn as_qemu_sees(place: &Place, image: &str) -> Vec<(String, u64, bool)> {
    let info = qemu_img::info(&place.path(image));
    let Some(list) = info["format-specific"]["data"]["bitmaps"].as_array() else {
        return Vec::new();
    };
    let row = |entry: &Value| {
        let auto = entry["flags"].as_array().unwrap().contains(&json!("auto"));
        let name = entry["name"].as_str().unwrap().to_owned();
        (name, entry["granularity"].as_u64().unwrap(), auto)
    };
    list.iter().map(row).collect()
}

fn dump(place: &Place, image: &str, name: &str) -> Vec<(u64, u64, bool)> {
    let list = place.json(&format!("bitmap dump {image} {name}"));
    let row = |entry: &Value| {
        let number = |key: &str| entry[key].as_u64().unwrap();
        (
            number("start"),
            number("length"),
            entry["dirty"].as_bool().unwrap(),
        )
    };
    list.as_array().unwrap().iter().map(row).collect()
}

#[test]
fn qemu_sees_every_change_of_a_bitmap() {
    require_qemu!();
    let place = Place::new();
    place.ok("create disk 8M");
    place.ok("bitmap add disk one");
    place.ok("bitmap add -g 4K --disabled disk two");
    let expected = vec![
        ("one".to_owned(), 65_536, true),
        ("two".to_owned(), 4096, false),
    ];
    assert_eq!(as_qemu_sees(&place, "disk"), expected);
    place.ok("bitmap disable disk one");
    place.ok("bitmap enable disk two");
    let expected = vec![
        ("one".to_owned(), 65_536, false),
        ("two".to_owned(), 4096, true),
    ];
    assert_eq!(as_qemu_sees(&place, "disk"), expected);
    place.write("disk", &["write 1M 100k"]);
    assert!(dump(&place, "disk", "one").iter().all(|run| !run.2));
    assert_eq!(dump(&place, "disk", "two")[1], (MIB, 102_400, true));
    place.ok("bitmap clear disk two");
    assert_eq!(dump(&place, "disk", "two"), [(0, 8 * MIB, false)]);
    place.ok("bitmap remove disk one");
    assert_eq!(
        as_qemu_sees(&place, "disk"),
        [("two".to_owned(), 4096, true)]
    );
    qemu_img::check(&place.path("disk")).assert_clean();
}

#[test]
fn a_dump_is_what_qemu_exports_over_nbd() {
    require_qemu!();
    let place = Place::new();
    // A size that is no multiple of the granularity: the last run ends with the disk.
    for (size, granularity) in [(8 * MIB + 512, 65_536), (3 * MIB, 512), (5 * MIB, 2 * MIB)] {
        let disk = place.create("disk", size, &[]);
        qemu_img::bitmap_add(&disk, "b", Some(granularity));
        place.write(
            "disk",
            &["write 512 512", "write 1M 700k", "write -z 2500k 8k"],
        );
        if size > 8 * MIB {
            place.write("disk", &["write 8M 512"]);
        }
        assert_eq!(dump(&place, "disk", "b"), nbd::dirty_extents(&disk, "b"));
    }
}

#[test]
fn a_merge_is_the_union_also_across_images_and_granularities() {
    require_qemu!();
    let place = Place::new();
    for name in ["disk", "other"] {
        place.create(name, 4 * MIB, &[]);
    }
    place.ok("bitmap add -g 4K disk fine");
    place.ok("bitmap add -g 64K disk coarse");
    place.ok("bitmap add -g 512 other foreign");
    place.write("disk", &["write 1M 4k"]);
    place.ok("bitmap disable disk fine");
    place.ok("bitmap clear disk coarse");
    place.write("other", &["write 3M 512"]);
    place.ok("bitmap merge disk coarse fine");
    place.ok("bitmap merge -b other disk coarse foreign");
    let runs = dump(&place, "disk", "coarse");
    let dirty: Vec<_> = runs.iter().filter(|run| run.2).collect();
    assert_eq!(dirty, [&(MIB, 65_536, true), &(3 * MIB, 65_536, true)]);
    assert_eq!(runs, nbd::dirty_extents(&place.path("disk"), "coarse"));
    place.run("bitmap merge disk coarse nobody").ends_with(1);
    place.ok("create large 8M");
    place.ok("bitmap add large b");
    place
        .run("bitmap merge -b large disk coarse b")
        .ends_with(1);
}

#[test]
fn a_list_reads_no_bits_unless_asked_to_count() {
    let place = Place::new();
    place.ok("create disk 8M");
    place.ok("bitmap add disk b");
    let list = place.json("bitmap list disk");
    has_keys(
        &list[0],
        &["name", "granularity", "flags", "state", "dirty-bytes"],
    );
    assert_eq!(
        list,
        json!([{
            "name": "b", "granularity": 65_536, "flags": ["auto"], "state": "ok",
            "dirty-bytes": null,
        }])
    );
    assert_eq!(place.json("bitmap list --count disk")[0]["dirty-bytes"], 0);
}

#[test]
fn names_that_are_taken_or_missing_are_refused_in_one_line() {
    let place = Place::new();
    place.ok("create disk 8M");
    place.ok("bitmap add disk b");
    place.run("bitmap add disk b").ends_with(1);
    place.run("bitmap add disk c -g 1000").ends_with(64);
    place.run("bitmap remove disk c").ends_with(1);
    place.run("bitmap dump disk c").ends_with(1);
    place.ok("create old 8M -o compat=0.10");
    place.run("bitmap add old b").ends_with(63);
}

#[test]
fn a_bitmap_of_a_chain_is_refused_and_nothing_is_written() {
    let place = Place::new();
    place.ok("create disk 8M");
    place.ok("checkpoint create a disk");
    place.ok("bitmap add disk mine");
    let before = std::fs::read(place.path("disk")).unwrap();
    for line in [
        "bitmap remove disk a",
        "bitmap clear disk a",
        "bitmap enable disk a",
        "bitmap disable disk a",
        "bitmap merge disk a mine",
    ] {
        let answer = place.run(line).ends_with(1);
        assert!(answer.stderr.contains("--force"), "{}", answer.stderr);
    }
    assert_eq!(std::fs::read(place.path("disk")).unwrap(), before);
}

#[test]
fn a_forced_change_is_recorded_as_a_loss_that_sticks() {
    require_qemu!();
    let place = Place::new();
    let state =
        |disk: &str| place.json(&format!("checkpoint list {disk}"))[0]["disks"][0]["state"].clone();
    for (change, expected) in [
        ("clear", "reset"),
        ("remove", "lost"),
        ("disable", "not-recording"),
    ] {
        place.ok("create disk 8M");
        place.ok("checkpoint create a disk");
        place.ok(&format!("bitmap {change} --force disk a"));
        assert_eq!(state("disk"), expected);
        qemu_img::check(&place.path("disk")).assert_clean();
    }
    // Enabled again it records, but what came between is not known.
    place.ok("bitmap enable --force disk a");
    assert_eq!(state("disk"), "lost");
    let report = place.json("backup --to backups --since a disk");
    assert_eq!(report["disks"][0]["mode"], "full");
    assert!(report["disks"][0]["reason"].is_string());
}

#[test]
fn a_forced_merge_into_a_recording_bitmap_costs_nothing() {
    let place = Place::new();
    place.ok("create disk 8M");
    place.ok("checkpoint create a disk");
    place.ok("bitmap add disk mine");
    place.ok("bitmap merge --force disk a mine");
    let list = place.json("checkpoint list disk");
    assert_eq!(list[0]["disks"][0]["state"], "ok");
    place.ok("checkpoint create b disk");
    place.ok("bitmap merge --force disk a mine");
    let list = place.json("checkpoint list disk");
    assert_eq!(list[0]["disks"][0]["state"], "changed");
}
