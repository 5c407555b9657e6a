//! `checkpoint`: the life of a chain as the command line sees it.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, has_keys};
use serde_json::{Value, json};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

fn names(list: &Value) -> Vec<&str> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|info| info["name"].as_str().unwrap())
        .collect()
}

/// A disk with checkpoints a, b, c.
fn chain() -> Place {
    let place = Place::new();
    place.ok("create disk 16M");
    for name in ["a", "b", "c"] {
        assert_eq!(
            place.ok(&format!("checkpoint create {name} disk")),
            format!("{name}\n")
        );
    }
    place
}

#[test]
fn a_list_has_every_key_of_every_checkpoint() {
    let place = chain();
    let list = place.json("checkpoint list disk");
    assert_eq!(names(&list), ["a", "b", "c"]);
    for info in list.as_array().unwrap() {
        has_keys(
            info,
            &[
                "name",
                "parent",
                "current",
                "metadata",
                "creation-time",
                "disks",
            ],
        );
        has_keys(
            &info["disks"][0],
            &["name", "state", "inferred", "dirty-bytes"],
        );
        assert_eq!(info["disks"][0]["name"], "vda");
        assert_eq!(info["disks"][0]["state"], "ok");
        assert_eq!(info["metadata"], false);
        assert!(info["disks"][0]["dirty-bytes"].is_u64());
    }
    assert_eq!(list[0]["parent"], Value::Null);
    assert_eq!(list[1]["parent"], "a");
    assert_eq!(list[2]["current"], true);
    let quick = place.json("checkpoint list --quick disk");
    assert_eq!(quick[0]["disks"][0]["dirty-bytes"], Value::Null);
}

#[test]
fn filters_name_what_they_say() {
    let place = chain();
    let list = |flags: &str| {
        let list = place.json(&format!("checkpoint list disk {flags}"));
        names(&list).join(" ")
    };
    assert_eq!(list("--roots"), "a");
    assert_eq!(list("--leaves"), "c");
    assert_eq!(list("--no-leaves"), "a b");
    assert_eq!(list("--leaves --no-leaves"), "a b c");
    assert_eq!(list("--from a"), "b");
    assert_eq!(list("--from a --descendants"), "b c");
    assert_eq!(list("--with-metadata"), "");
    assert_eq!(list("--without-metadata --topological"), "a b c");
    assert!(place.ok("checkpoint list --tree disk").contains("    c"));
    place
        .run("checkpoint list disk --descendants")
        .ends_with(64);
    place.run("checkpoint list disk --from nobody").ends_with(1);
}

#[test]
fn one_checkpoint_is_shown_with_parent_and_current() {
    let place = chain();
    has_keys(
        &place.json("checkpoint show b disk"),
        &["name", "parent", "current", "disks"],
    );
    assert_eq!(
        place.json("checkpoint current disk"),
        json!({ "name": "c" })
    );
    assert_eq!(place.ok("checkpoint current disk"), "c\n");
    assert_eq!(place.ok("checkpoint parent b disk"), "a\n");
    let root = place.json("checkpoint parent a disk");
    assert_eq!(root, json!({ "name": "a", "parent": null }));
    assert!(
        place
            .ok("checkpoint show b --xml disk")
            .contains("<name>b</name>")
    );
    place.run("checkpoint show b disk --secure").ends_with(64);
    place.run("checkpoint show nobody disk").ends_with(1);
    place.ok("create fresh 1M");
    assert_eq!(
        place.json("checkpoint current fresh"),
        json!({ "name": null })
    );
}

#[test]
fn the_eight_deletions_do_what_their_flags_say() {
    for (flags, left) in [
        ("", "a c"),
        ("--children", "a"),
        ("--children --children-only", "a b"),
        ("--metadata-only", "a b c"),
        ("--children --metadata-only", "a b c"),
        ("--children --metadata-only --children-only", "a b c"),
        ("--children-only --libvirt-flags", "a b"),
    ] {
        let place = chain();
        let answer = place.json(&format!("checkpoint delete b disk {flags}"));
        has_keys(&answer, &["deleted", "descriptors", "warnings"]);
        assert_eq!(
            names(&place.json("checkpoint list disk")).join(" "),
            left,
            "{flags}"
        );
        place.run("checkpoint verify disk").ends_with(0);
    }
    let place = chain();
    let before = std::fs::read(place.path("disk")).unwrap();
    place
        .run("checkpoint delete b disk --children-only")
        .ends_with(64);
    place
        .run("checkpoint delete b disk --children-only --metadata-only")
        .ends_with(64);
    place.run("checkpoint delete nobody disk").ends_with(1);
    assert_eq!(std::fs::read(place.path("disk")).unwrap(), before);
}

#[test]
fn descriptors_are_kept_exported_lost_and_reinstated() {
    let place = Place::new();
    place.ok("create disk 16M");
    place.ok("checkpoint create a disk --metadata meta --description first");
    place.ok("checkpoint create b disk --metadata meta");
    place.ok("checkpoint create hidden disk --metadata meta --no-metadata");
    let list = place.json("checkpoint list disk --metadata meta");
    let metadata: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|info| info["metadata"].clone())
        .collect();
    assert_eq!(metadata, [json!(true), json!(true), json!(false)]);
    assert_eq!(list[0]["description"], "first");
    let exported = place.json("checkpoint export --to out disk --metadata meta");
    let paths: Vec<_> = exported["checkpoints"].as_array().unwrap().iter().collect();
    assert_eq!(paths[0], &json!({ "name": "a", "path": "a.xml" }));
    std::fs::remove_dir_all(place.path("meta")).unwrap();
    assert_eq!(
        place.json("checkpoint list disk --metadata meta")[0]["metadata"],
        false
    );
    for name in ["a", "b"] {
        let line = format!("checkpoint create --redefine out/{name}.xml --metadata meta disk");
        assert_eq!(place.ok(&line), format!("{name}\n"));
    }
    let list = place.json("checkpoint list disk --metadata meta");
    assert_eq!(list[0]["metadata"], true);
    assert_eq!(list[0]["description"], "first");
    place
        .run("checkpoint create other --redefine out/a.xml --metadata meta disk")
        .ends_with(64);
    place
        .run("checkpoint create x disk --current")
        .ends_with(64);
}

#[test]
fn the_chain_is_rebuilt_from_the_image_alone() {
    let place = chain();
    let rebuilt = place.json("checkpoint rebuild disk --metadata nowhere");
    assert_eq!(rebuilt["problems"], json!([]));
    assert_eq!(names(&rebuilt["checkpoints"]), ["a", "b", "c"]);
    has_keys(
        &rebuilt["checkpoints"][0],
        &["evidence", "parent", "current", "disks"],
    );
    assert_eq!(rebuilt["checkpoints"][0]["evidence"], "record");
    let before = std::fs::read(place.path("disk")).unwrap();
    place.ok("checkpoint rebuild --adopt disk");
    assert_eq!(
        std::fs::read(place.path("disk")).unwrap(),
        before,
        "nothing was to be done"
    );
}

#[test]
fn bitmaps_of_others_are_inferred_labelled_and_adopted() {
    require_qemu!();
    let place = Place::new();
    let disk = place.create("disk", 16 << 20, &[]);
    qemu_img::bitmap_add(&disk, "old", None);
    place.write("disk", &["write 0 1M"]);
    qemu_img::bitmap_add(&disk, "new", None);
    place.write("disk", &["write 4M 64k"]);
    let rebuilt = place.json("checkpoint rebuild disk");
    assert_eq!(names(&rebuilt["checkpoints"]), ["old", "new"]);
    assert_eq!(rebuilt["checkpoints"][0]["disks"][0]["inferred"], true);
    place.ok("checkpoint rebuild --adopt disk");
    assert_eq!(
        place.json("info disk")["tidemark"]["chain"]["scheme"],
        "cumulative"
    );
    assert_eq!(place.ok("checkpoint current disk"), "new\n");
    place.ok("checkpoint scheme intervals disk");
    assert_eq!(
        place.json("info disk")["tidemark"]["chain"]["scheme"],
        "intervals"
    );
    qemu_img::check(&disk).assert_clean();
}

#[test]
fn a_foreign_clear_is_noticed_and_named() {
    require_qemu!();
    let place = chain();
    qemu_img::bitmap_clear(&place.path("disk"), "c");
    let list = place.json("checkpoint list disk");
    assert_eq!(list[2]["disks"][0]["state"], "reset");
    assert_eq!(list[2]["disks"][0]["dirty-bytes"], Value::Null);
    let verified = place
        .run("checkpoint verify disk --output json")
        .ends_with(2)
        .json();
    assert!(verified["problems"][0].as_str().unwrap().contains("reset"));
}

#[test]
fn old_checkpoints_are_pruned() {
    let place = chain();
    let answer = place.json("checkpoint prune --keep 2 disk");
    assert_eq!(answer["deleted"], json!(["a"]));
    assert_eq!(names(&place.json("checkpoint list disk")), ["b", "c"]);
}

#[test]
fn a_name_is_chosen_when_none_is_given() {
    let place = Place::new();
    place.ok("create disk 8M");
    let name = place.ok("checkpoint create disk");
    assert!(name.trim().parse::<u64>().is_ok(), "{name}");
    place.run("checkpoint create .bad disk").ends_with(64);
    place.run("checkpoint create missing-image").ends_with(1);
}
