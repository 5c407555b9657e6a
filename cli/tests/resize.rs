//! `resize`, with bitmaps and checkpoints on the disk.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, content};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

#[test]
fn sizes_are_taken_as_qemu_img_takes_them() {
    require_qemu!();
    let place = Place::new();
    for size in ["3M", "+1M", "-512K", "1000448", "+512"] {
        place.create("ours", 2 << 20, &[]);
        place.create("theirs", 2 << 20, &[]);
        place.write("ours", &["write -P 5 0 2M"]);
        place.write("theirs", &["write -P 5 0 2M"]);
        place.ok(&format!("resize --shrink ours {size}"));
        let line = ["resize", "-q", "-f", "qcow2", "--shrink", "theirs", size];
        assert_eq!(place.qemu_img(&line).0, 0, "{size}");
        let bytes = content(&place.path("ours"));
        assert!(bytes == content(&place.path("theirs")), "{size}");
        qemu_img::check(&place.path("ours")).assert_clean();
    }
    let answer = place.json("resize ours 4M");
    assert_eq!(answer["virtual-size"], 4 << 20);
}

#[test]
fn what_would_lose_data_or_cannot_be_is_refused() {
    let place = Place::new();
    place.ok("create disk 2M");
    let before = std::fs::read(place.path("disk")).unwrap();
    place.run("resize disk 1M").ends_with(1);
    place.run("resize disk -4M --shrink").ends_with(64);
    place.run("resize disk much").ends_with(64);
    place.run("resize disk 4000000").ends_with(64);
    place.run("resize disk").ends_with(64);
    place.run("resize missing 4M").ends_with(1);
    assert_eq!(std::fs::read(place.path("disk")).unwrap(), before);
}

#[test]
fn an_increment_after_growing_and_shrinking_restores_the_disk() {
    require_qemu!();
    let place = Place::new();
    place.ok("create disk 4M");
    place.write("disk", &["write -P 1 0 3M"]);
    place.ok("backup --to backups --checkpoint a disk");
    place.ok("resize disk 6M");
    place.write("disk", &["write -P 2 5M 300k", "write -P 3 100k 5k"]);
    place.ok("backup --to backups --checkpoint b --since a disk");
    let grown = content(&place.path("disk"));
    place.ok("resize --shrink disk 2M");
    place.write("disk", &["write -P 4 1M 64k"]);
    place.ok("backup --to backups --checkpoint c --since b disk");
    let shrunk = content(&place.path("disk"));
    place.ok("restore --from backups --disk vda --at b --to b.qcow2");
    place.ok("restore --from backups --disk vda --at c --to c.qcow2");
    assert!(content(&place.path("b.qcow2")) == grown);
    assert!(content(&place.path("c.qcow2")) == shrunk);
    place.ok("verify backups");
}

#[test]
fn preallocation_is_that_of_qemu_img() {
    require_qemu!();
    let place = Place::new();
    for mode in ["metadata", "falloc", "full"] {
        place.ok(&format!("create -o preallocation={mode} ours 1M"));
        let options = format!("preallocation={mode}");
        let line = ["create", "-f", "qcow2", "-o", &options, "theirs", "1M"];
        assert_eq!(place.qemu_img(&line).0, 0);
        let option = format!("--preallocation={mode}");
        place.ok(&format!("resize {option} ours 3M"));
        let line = ["resize", "-q", "-f", "qcow2", &option, "theirs", "3M"];
        assert_eq!(place.qemu_img(&line).0, 0);
        let placed = |name| common::comparable_map(&qemu_img::map(&place.path(name)));
        assert_eq!(placed("ours").as_array().unwrap().len(), 1);
        let known = |name| {
            let answer = place.qemu_img(&["check", "--output=json", name]);
            (answer.0, answer.1["allocated-clusters"].clone())
        };
        assert_eq!(known("ours"), known("theirs"));
        place.ok(&format!(
            "convert -O qcow2 -o preallocation={mode} ours copy"
        ));
        assert!(content(&place.path("copy")) == vec![0; 3 << 20]);
    }
    place
        .run("create -o preallocation=some disk 1M")
        .ends_with(64);
    place
        .run("resize --preallocation=some ours 4M")
        .ends_with(64);
    let shrink = "resize --shrink --preallocation=full ours 2M";
    place.run(shrink).ends_with(64);
    let overlay = "create -b ours -F qcow2 -o preallocation=full over";
    place.run(overlay).ends_with(64);
    place
        .run("convert -c -O qcow2 -o preallocation=full ours copy")
        .ends_with(64);
}
