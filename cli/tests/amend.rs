//! `amend`: what can change, and what is refused by name, beside qemu-img.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, content};
use serde_json::json;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

#[test]
fn options_change_and_disk_and_bitmaps_stay() {
    require_qemu!();
    let place = Place::new();
    let path = place.create("disk", 10 << 20, &[("compat", "0.10")]);
    place.write("disk", &["write -P 1 1M 2M"]);
    let before = content(&path);
    let all = "compat=1.1,lazy_refcounts=on,refcount_bits=32,size=12M";
    let answer = place.json(&format!("amend -o {all} disk"));
    assert_eq!(answer, json!({ "image": "disk", "changed": true }));
    let answer = place.json(&format!("amend -q -o {all} disk"));
    assert_eq!(answer["changed"], false);
    let info = qemu_img::info(&path);
    let data = &info["format-specific"]["data"];
    assert_eq!(data["compat"], "1.1");
    assert_eq!(data["lazy-refcounts"], true);
    assert_eq!(data["refcount-bits"], 32);
    assert_eq!(info["virtual-size"], 12 << 20);
    assert_eq!(content(&path)[..10 << 20], before);
    qemu_img::check(&path).assert_clean();

    place.ok("checkpoint create monday disk");
    place.write("disk", &["write -P 2 5M 100k"]);
    assert_eq!(place.ok("amend -o refcount_bits=8 disk"), "disk: changed\n");
    assert_eq!(
        place.ok("amend -o lazy_refcounts=off disk"),
        "disk: changed\n"
    );
    assert_eq!(
        place.ok("amend -o refcount_bits=8 disk"),
        "disk: nothing to change\n"
    );
    qemu_img::check(&path).assert_clean();
    assert_eq!(place.json("checkpoint verify disk")["problems"], json!([]));
}

#[test]
fn every_option_of_qemu_img_changes_or_is_refused_by_name() {
    require_qemu!();
    let place = Place::new();
    place.create("disk", 10 << 20, &[]);
    let theirs = qemu_img::ok(&["amend", "-f", "qcow2", "-o", "help"]);
    let ours = place.ok("amend -o help");
    let names = |help: &str| -> Vec<String> {
        help.lines()
            .filter_map(|line| line.strip_prefix("  ")?.split_once('='))
            .map(|(name, _)| name.to_owned())
            .collect()
    };
    let (theirs, ours) = (names(&theirs), names(&ours));
    let before = std::fs::read(place.path("disk")).unwrap();
    let mut refused = 0;
    for name in theirs.iter().filter(|name| !ours.contains(name)) {
        let value = match name.as_str() {
            "cluster_size" => "4K",
            "compression_type" => "zstd",
            "extended_l2" => "on",
            "preallocation" => "full",
            _ => "x",
        };
        let answer = place
            .run(&format!("amend -o {name}={value} disk"))
            .ends_with(63);
        assert!(answer.stderr.contains(name.as_str()), "{answer:?}");
        refused += 1;
    }
    println!("{} change, {refused} are refused", ours.len());
    assert!(ours.len() == 5 && refused >= 3, "{theirs:?}");
    for (line, code) in [
        ("-o size=5M disk", 1),
        ("-o compat=0.10 disk", 1),
        ("-o refcount_bits=3 disk", 1),
        ("-o data_file_raw=on disk", 1),
        ("-o nothing=1 disk", 64),
        ("-o lazy_refcounts=maybe disk", 64),
        ("-o lazy_refcounts=on", 64),
        ("disk", 64),
        ("-f raw -o size=20M disk", 63),
    ] {
        place.run(&format!("amend {line}")).ends_with(code);
    }
    let now = std::fs::read(place.path("disk")).unwrap();
    assert!(now == before, "a refusal was written");
}
