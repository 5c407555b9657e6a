//! `commit`, beside `qemu-img commit`.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, content};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

/// `base` below `middle` below `top`.
fn stack() -> Place {
    let place = Place::new();
    place.create("base", 2 << 20, &[]);
    place.write("base", &["write -P 1 0 1M"]);
    let over = [("backing_file", "base"), ("backing_fmt", "qcow2")];
    place.create("middle", 3 << 20, &over);
    place.write("middle", &["write -P 2 500k 1M"]);
    let over = [("backing_file", "middle"), ("backing_fmt", "qcow2")];
    place.create("top", 3 << 20, &over);
    place.write("top", &["write -P 3 1M 100k", "write -z 0 64k"]);
    place
}

#[test]
fn the_backing_file_shows_the_disk_and_the_overlay_is_empty() {
    require_qemu!();
    let place = stack();
    let disk = content(&place.path("top"));
    let answer = place.json("commit -p -m 2 top");
    assert_eq!(answer["emptied"], true);
    assert_eq!(answer["data-bytes"], 128 << 10, "{answer}");
    assert!(content(&place.path("top")) == disk);
    assert!(content(&place.path("middle")) == disk);
    assert_eq!(
        qemu_img::check(&place.path("top")).count("allocated-clusters"),
        0
    );
    // Nothing is left to do.
    let answer = place.json("commit top");
    assert_eq!(
        (&answer["data-bytes"], &answer["zero-bytes"]),
        (&0.into(), &0.into())
    );
    qemu_img::check(&place.path("top")).assert_clean();
    qemu_img::check(&place.path("middle")).assert_clean();
}

#[test]
fn a_base_further_down_grows_and_shows_the_disk() {
    require_qemu!();
    for base in ["base", "./base"] {
        let place = stack();
        let disk = content(&place.path("top"));
        let answer = place.json(&format!("commit -b {base} top"));
        assert_eq!(answer["emptied"], false);
        assert_eq!(answer["base-size"], 3 << 20);
        assert!(content(&place.path("top")) == disk);
        assert!(content(&place.path("base")) == disk);
        qemu_img::check(&place.path("base")).assert_clean();
    }
    let place = stack();
    let disk = content(&place.path("top"));
    let before = std::fs::read(place.path("top")).unwrap();
    let said = place.ok("commit -d top");
    assert!(said.contains("middle"), "{said}");
    assert!(std::fs::read(place.path("top")).unwrap() == before);
    assert!(content(&place.path("middle")) == disk);
}

#[test]
fn bitmaps_go_over_and_those_that_cannot_are_named() {
    require_qemu!();
    let place = stack();
    qemu_img::bitmap_add(&place.path("top"), "kept", Some(65_536));
    qemu_img::bitmap_add(&place.path("top"), "old", Some(65_536));
    qemu_img::bitmap_add(&place.path("middle"), "recording", Some(65_536));
    place.write("top", &["write -P 4 2M 64k"]);
    qemu_img::bitmap_disable(&place.path("top"), "old");
    let answer = place.run("commit top --output json").ends_with(0);
    assert!(answer.stderr.contains("'old'"), "{}", answer.stderr);
    let json = answer.json();
    assert_eq!(json["bitmaps"], serde_json::json!(["kept"]));
    let left: Vec<&str> = json["bitmaps-left-behind"]
        .as_array()
        .unwrap()
        .iter()
        .map(|bitmap| bitmap["name"].as_str().unwrap())
        .collect();
    assert_eq!(left, ["old"]);
    let dump = place.json("bitmap dump middle kept");
    let dirty: Vec<u64> = dump
        .as_array()
        .unwrap()
        .iter()
        .filter(|run| run["dirty"] == true)
        .map(|run| run["start"].as_u64().unwrap())
        .collect();
    assert_eq!(dirty, [2 << 20]);
    // The base's own bitmap recorded all that was written into it.
    let dump = place.json("bitmap dump middle recording").to_string();
    assert!(
        dump.contains("1048576") && dump.contains("2097152"),
        "{dump}"
    );
}

#[test]
fn an_increment_of_the_base_after_a_commit_restores_the_disk() {
    require_qemu!();
    let place = stack();
    place.ok("backup --to backups --checkpoint a middle");
    place.write("top", &["write -P 5 2M 300k"]);
    let disk = content(&place.path("top"));
    place.ok("commit top");
    let answer = place.json("backup --to backups --checkpoint b --since a middle");
    assert_eq!(answer["disks"][0]["mode"], "incremental", "{answer}");
    place.ok("restore --from backups --disk vda --at b --to b.qcow2");
    assert!(content(&place.path("b.qcow2")) == disk);
    place.ok("verify backups");
}

#[test]
fn what_cannot_be_committed_is_refused_and_nothing_is_written() {
    require_qemu!();
    let place = stack();
    let files = ["top", "middle", "base"];
    let read = || files.map(|name| std::fs::read(place.path(name)).unwrap());
    let before = read();
    for (line, code) in [
        ("commit base", 1),
        ("commit -b top top", 1),
        ("commit -b missing top", 1),
        ("commit -f raw top", 63),
        ("commit --no-backing top", 1),
        ("commit --allow-backing /etc top", 1),
        ("commit", 64),
        ("commit missing", 1),
    ] {
        place.run(line).ends_with(code);
    }
    assert!(read() == before);
    place.ok("snapshot -c s top");
    let answer = place.run("commit top");
    assert!(answer.stderr.contains("internal snapshots"), "{answer:?}");
    assert_ne!(answer.code, 0);
}
