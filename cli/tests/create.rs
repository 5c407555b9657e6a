//! `create` beside qemu-img: the same image, and no harm when it is refused.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::Place;
use serde_json::json;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

#[test]
fn create_makes_images_that_qemu_img_describes_in_the_same_way() {
    require_qemu!();
    let place = Place::new();
    place.ok("create base 8M");
    for (ours, theirs) in [
        (
            "-o cluster_size=4K,refcount_bits=8 a 1G",
            "cluster_size=4096,refcount_bits=8",
        ),
        ("a 1.5M -o compat=0.10", "compat=0.10"),
        ("a 1M -o compression_type=zstd", "compression_type=zstd"),
        ("-b base -F qcow2 a", "backing_file=base,backing_fmt=qcow2"),
        (
            "-o backing_file=base,backing_fmt=qcow2,size=16M a",
            "backing_file=base,backing_fmt=qcow2",
        ),
    ] {
        let answer = place.json(&format!("create {ours}"));
        common::has_keys(
            &answer,
            &["filename", "virtual-size", "cluster-size", "compat"],
        );
        let size = answer["virtual-size"].to_string();
        let (code, _) = place.qemu_img(&["create", "-f", "qcow2", "-o", theirs, "b", &size]);
        assert_eq!(code, 0);
        let (_, ours) = place.qemu_img(&["info", "--output=json", "a"]);
        let (_, theirs) = place.qemu_img(&["info", "--output=json", "b"]);
        for key in [
            "virtual-size",
            "cluster-size",
            "format-specific",
            "backing-filename",
        ] {
            assert_eq!(ours.get(key), theirs.get(key), "{key}");
        }
        assert_eq!(place.qemu_img(&["check", "-q", "a"]).0, 0);
    }
}

#[test]
fn create_replaces_a_file_only_when_nothing_is_wrong() {
    let place = Place::new();
    place.ok("create disk 1M");
    place.ok("bitmap add disk b");
    let before = std::fs::read(place.path("disk")).unwrap();
    for wrong in [
        "create disk 2M -o cluster_size=3000",
        "create disk 2M -o compression_type=lzo",
        "create disk 2M -o cluster_size=4M",
        "create disk 2M -o refcount_bits=3",
        "create disk 2M -o nothing=1",
        "create disk",
        "create disk 2M -b missing",
        "create -o cluster_size=512 disk 1T",
    ] {
        place.run(wrong).ends_with(64);
    }
    place.run("create disk 2M -b missing -F qcow2").ends_with(1);
    place.run("create disk 2M -f vmdk").ends_with(63);
    place
        .run("create disk 2M -o extended_l2=on,cluster_size=8k")
        .ends_with(64);
    assert_eq!(std::fs::read(place.path("disk")).unwrap(), before);
    place.ok("create disk 2M");
    assert_eq!(place.json("bitmap list disk"), json!([]));
}

#[test]
fn create_lists_its_options_and_names_them_when_one_is_unknown() {
    let place = Place::new();
    let listed = place.ok("create -o help");
    let answer = place.run("create -o nothing=1 disk 1M").ends_with(64);
    for name in ["cluster_size", "preallocation", "refcount_bits", "size"] {
        assert!(listed.contains(&format!("  {name}=")), "{listed}");
        assert!(answer.stderr.contains(name), "{}", answer.stderr);
    }
    place.run("create").ends_with(64);
    place.run("create -o size=1M").ends_with(64);
    place.run("create disk -o size=1M,,").ends_with(64);
}

/// Names of options in what `-o help` prints.
fn options(help: &str) -> Vec<&str> {
    help.lines()
        .filter_map(|line| line.strip_prefix("  ")?.split_once('='))
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn every_option_of_qemu_img_is_known_documented_and_taken_or_refused_by_name() {
    require_qemu!();
    let theirs = qemu_img::ok(&["create", "-f", "qcow2", "-o", "help"]);
    let place = Place::new();
    let ours = place.ok("create -o help");
    assert_eq!(options(&ours), options(&theirs));
    let page = include_str!("../../docs/cli.md");
    let (mut taken, mut refused) = (0, 0);
    for name in options(&theirs) {
        assert!(
            page.contains(&format!("`{name}`")),
            "{name} is not documented"
        );
        let value = match name {
            "backing_file" | "backing_fmt" | "data_file" | "data_file_raw" => continue,
            "cluster_size" => "64K",
            "compat" => "1.1",
            "compression_type" => "zstd",
            "extended_l2" | "encryption" | "lazy_refcounts" => "on",
            "preallocation" => "metadata",
            "refcount_bits" => "8",
            "size" => "1M",
            _ => "1",
        };
        let answer = place.run(&format!("create -o {name}={value} disk 1M"));
        if name.starts_with("encrypt") {
            assert!(answer.ends_with(63).stderr.contains(name));
            refused += 1;
        } else {
            answer.ends_with(0);
            taken += 1;
        }
    }
    println!("{taken} options taken, {refused} refused");
    assert!(taken >= 8 && refused >= 9);
}
