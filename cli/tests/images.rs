//! `info`, `map` and `check` beside qemu-img, on images that qemu-img made.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, assert_same, comparable_map, without};
use serde_json::{Value, json};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

const MIB: u64 = 1 << 20;

/// Images of all kinds that this version reads; returns their names.
fn matrix(place: &Place) -> Vec<&'static str> {
    place.create("plain", 8 * MIB, &[]);
    place.write(
        "plain",
        &[
            "write 0 1M",
            "write -z 2M 128k",
            "write 5M 4k",
            "discard 512k 64k",
        ],
    );
    place.create("old", 8 * MIB, &[("compat", "0.10")]);
    place.write("old", &["write 1M 300k"]);
    place.create(
        "small",
        3 * MIB,
        &[("cluster_size", "512"), ("refcount_bits", "1")],
    );
    place.write(
        "small",
        &["write 700 9000", "write -z 1M 2k", "write 2M 100k"],
    );
    place.create(
        "wide",
        64 * MIB,
        &[("cluster_size", "2M"), ("refcount_bits", "64")],
    );
    place.write("wide", &["write 3M 1k", "write 40M 4M"]);
    place.create(
        "lazy",
        4 * MIB,
        &[("lazy_refcounts", "on"), ("compression_type", "zstd")],
    );
    place.create("empty", 0, &[]);
    place.create("bitmaps", 8 * MIB, &[]);
    qemu_img::bitmap_add(&place.path("bitmaps"), "one", None);
    qemu_img::bitmap_add(&place.path("bitmaps"), "two", Some(4096));
    qemu_img::bitmap_disable(&place.path("bitmaps"), "two");
    place.write("bitmaps", &["write 100k 70k", "write 7M 1M"]);
    place.create("snapshots", 8 * MIB, &[]);
    place.write("snapshots", &["write 0 256k"]);
    qemu_img::ok(&[
        "snapshot",
        "-c",
        "first",
        place.path("snapshots").to_str().unwrap(),
    ]);
    place.write("snapshots", &["write 128k 256k"]);
    qemu_img::ok(&[
        "snapshot",
        "-c",
        "second",
        place.path("snapshots").to_str().unwrap(),
    ]);
    chains(place);
    vec![
        "plain",
        "old",
        "small",
        "wide",
        "lazy",
        "empty",
        "bitmaps",
        "snapshots",
        "middle",
        "top",
        "longer",
        "overraw",
    ]
}

/// Backing chains: of three layers, over a shorter base, over a raw file.
fn chains(place: &Place) {
    qemu_img::create_overlay(&place.path("middle"), "plain", "qcow2");
    place.write(
        "middle",
        &["write 256k 64k", "write -z 640k 64k", "write 6M 128k"],
    );
    qemu_img::create_overlay(&place.path("top"), "middle", "qcow2");
    place.write("top", &["write 6M 64k", "write 3M 1k"]);
    qemu_img::create_overlay(&place.path("longer"), "plain", "qcow2");
    qemu_img::resize(&place.path("longer"), 12 * MIB);
    place.write("longer", &["write -z 7M 1M", "write 10M 64k"]);
    std::fs::write(place.path("raw"), vec![7; 2 << 20]).unwrap();
    qemu_img::create_overlay(&place.path("overraw"), "raw", "raw");
    place.write("overraw", &["write 64k 64k"]);
}

#[test]
fn info_says_what_qemu_img_says_key_by_key() {
    require_qemu!();
    let place = Place::new();
    for name in matrix(&place) {
        let (code, theirs) = place.qemu_img(&["info", "-f", "qcow2", "--output=json", name]);
        assert_eq!(code, 0, "{name}");
        let ours = place.json(&format!("info {name}"));
        assert!(ours["tidemark"]["chain"].is_null(), "{name}");
        assert_same(name, &without(ours, "tidemark"), &theirs);
    }
}

#[test]
fn info_describes_images_whose_data_it_does_not_read() {
    require_qemu!();
    let place = Place::new();
    let data_file = place.path("outside").display().to_string();
    place.create(
        "external",
        MIB,
        &[("data_file", &data_file), ("data_file_raw", "on")],
    );
    place.create("sub", MIB, &[("extended_l2", "on")]);
    let luks = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=abc",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        "secret",
        "1M",
    ];
    assert_eq!(place.qemu_img(&luks).0, 0);
    for name in ["external", "sub", "secret"] {
        let (_, theirs) = place.qemu_img(&["info", "-f", "qcow2", "--output=json", name]);
        let ours = place.json(&format!("info {name}"));
        assert_same(name, &without(ours, "tidemark"), &theirs);
    }
    place.ok("map secret");
    place.run("backup --to backup secret").ends_with(63);
    assert!(!place.path("backup").exists());
}

#[test]
fn info_for_people_has_the_lines_of_qemu_img() {
    require_qemu!();
    let place = Place::new();
    // A list of snapshots has local times.
    for name in matrix(&place)
        .into_iter()
        .filter(|name| *name != "snapshots")
    {
        let path = place.path(name).display().to_string();
        let theirs = qemu_img::ok(&["info", "-f", "qcow2", &path]);
        assert_eq!(place.ok(&format!("info {path}")), theirs, "{name}");
    }
}

#[test]
fn info_shows_the_chain_of_checkpoints_and_where_it_is() {
    let place = Place::new();
    place.ok("create disk 16M");
    place.ok("checkpoint create a disk");
    place.ok("checkpoint create b disk");
    let chain = place.json("info disk")["tidemark"]["chain"].clone();
    assert_eq!(chain["record"], "current");
    assert_eq!(chain["scheme"], "intervals");
    assert_eq!(chain["current"], "b");
    assert!(chain["extension-offset"].as_u64().unwrap() > 0);
    let names: Vec<&Value> = chain["checkpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| &entry["name"])
        .collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(chain["checkpoints"][1]["parent"], "a");
    assert_eq!(chain["checkpoints"][0]["proof"], "frozen");
    assert_eq!(chain["checkpoints"][1]["proof"], "recording");
}

#[test]
fn map_agrees_with_qemu_img_through_backing_chains() {
    require_qemu!();
    let place = Place::new();
    for name in matrix(&place) {
        let ranges: [&[&str]; 3] = [
            &[],
            &["--start-offset=100k", "--max-length=3M"],
            &["--start-offset=1M"],
        ];
        for range in ranges {
            let mut args = vec!["map", "-f", "qcow2", "--output=json", name];
            args.extend(range);
            let (code, theirs) = place.qemu_img(&args);
            // QEMU refuses to start behind the end.
            if code != 0 {
                continue;
            }
            let ours = place.json(&format!("map {name} {}", range.join(" ")));
            assert_eq!(comparable_map(&ours), ours, "{name}: runs are maximal");
            assert_same(name, &ours, &comparable_map(&theirs));
        }
    }
}

#[test]
fn map_splits_runs_where_a_bitmap_changes() {
    let place = Place::new();
    place.ok("create disk 1M");
    place.ok("bitmap add disk b -g 64K");
    assert_eq!(
        place.json("map disk --bitmap b"),
        json!([{
            "start": 0, "length": 1 << 20, "depth": 0, "present": false, "zero": true,
            "data": false, "compressed": false, "offset": null, "dirty": false,
        }])
    );
    place.run("map disk --bitmap c").ends_with(1);
}

#[test]
fn check_has_the_keys_and_codes_of_qemu_img() {
    require_qemu!();
    let place = Place::new();
    let mut names = matrix(&place);
    // A leaked cluster: one more at the end that has a count and no owner.
    place.create("leaky", MIB, &[]);
    edit(&place, "leaky", 2 * 65_536 + 8, &[0, 1]);
    // A lost count: the cluster of the first data.
    place.create("corrupt", MIB, &[]);
    place.write("corrupt", &["write 0 64k"]);
    edit(&place, "corrupt", 2 * 65_536 + 10, &[0, 0]);
    names.extend(["leaky", "corrupt"]);
    for name in names {
        let (code, theirs) = place.qemu_img(&["check", "-f", "qcow2", "--output=json", name]);
        let ours = place.run(&format!("check {name} --output json"));
        assert_eq!(ours.code, code, "{name}: {ours:?}");
        assert_same(name, &without(ours.json(), "tidemark"), &theirs);
    }
    place.run("check leaky").ends_with(3);
    place.run("check corrupt").ends_with(2);
}

#[test]
fn repair_ends_as_that_of_qemu_img() {
    require_qemu!();
    let place = Place::new();
    place.create("leaky", MIB, &[]);
    edit(&place, "leaky", 2 * 65_536 + 8, &[0, 1]);
    place.create("corrupt", MIB, &[]);
    place.write("corrupt", &["write 0 64k"]);
    edit(&place, "corrupt", 2 * 65_536 + 10, &[0, 0]);
    for (name, what) in [("leaky", "leaks"), ("leaky", "all"), ("corrupt", "all")] {
        let before = std::fs::read(place.path(name)).unwrap();
        let line = ["check", "-f", "qcow2", "-r", what, "--output=json", name];
        let (code, theirs) = place.qemu_img(&line);
        std::fs::write(place.path(name), &before).unwrap();
        let ours = place.run(&format!("check --repair {what} {name} --output json"));
        assert_eq!(ours.code, code, "{name} {what}: {ours:?}");
        let ours = ours.json();
        assert_eq!(ours["tidemark"]["losses"], json!([]));
        for key in ["leaks-fixed", "corruptions-fixed", "leaks", "corruptions"] {
            assert_eq!(ours[key], theirs[key], "{name} {what}: {key}");
        }
        qemu_img::check(&place.path(name)).assert_clean();
        std::fs::write(place.path(name), before).unwrap();
    }
    // What keeps every QEMU tool out is mended, and what is lost is named.
    place.create("shut", MIB, &[]);
    qemu_img::bitmap_add(&place.path("shut"), "one", None);
    let bytes = std::fs::read(place.path("shut")).unwrap();
    let kind = [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24];
    let at = bytes.windows(8).position(|bytes| bytes == kind).unwrap();
    edit(&place, "shut", at + 8, &[0, 0, 0, 7]);
    assert_eq!(place.qemu_img(&["info", "-f", "qcow2", "shut"]).0, 1);
    place.ok("check --repair all shut");
    qemu_img::check(&place.path("shut")).assert_clean();
    assert_eq!(place.json("bitmap list shut")[0]["name"], "one");
}

/// Changes bytes of a file, which grows if it must.
fn edit(place: &Place, name: &str, at: usize, bytes: &[u8]) {
    let path = place.path(name);
    let mut content = std::fs::read(&path).unwrap();
    if name == "leaky" {
        content.resize(5 * 65_536, 0);
    }
    content[at..at + bytes.len()].copy_from_slice(bytes);
    std::fs::write(path, content).unwrap();
}

#[test]
fn an_image_that_was_not_closed_cleanly_is_repaired_by_the_first_command_that_writes() {
    require_qemu!();
    let place = Place::new();
    let path = place.create("disk", 4 << 20, &[("lazy_refcounts", "on")]);
    let mut daemon = tidemark_fixtures::oracle::daemon::QemuStorageDaemon::spawn();
    let node = daemon.open_image(&path);
    daemon.guest(&node, &["write -P 6 1M 300k", "flush"]);
    daemon.kill_dash_nine();
    let before = std::fs::read(&path).unwrap();
    assert_eq!(place.json("info disk")["dirty-flag"], true);
    place.ok("map disk");
    assert!(std::fs::read(&path).unwrap() == before, "reading wrote");
    let answer = place.run("bitmap add disk b").ends_with(0);
    assert!(answer.stderr.contains("not closed cleanly"), "{answer:?}");
    let answer = place.run("bitmap add disk c").ends_with(0);
    assert!(answer.stderr.is_empty(), "{answer:?}");
    assert_eq!(place.json("info disk")["dirty-flag"], false);
    qemu_img::check(&path).assert_clean();
    assert!(common::content(&path)[1 << 20..][..300 << 10] == [6; 300 << 10]);
}
