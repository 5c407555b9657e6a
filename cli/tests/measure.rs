//! `measure` beside qemu-img, and beside the size of real copies.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, assert_same, without};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

/// Asserts that both answer the same to one line.
fn assert_equal(place: &Place, line: &str) {
    let words: Vec<&str> = ["measure", "--output=json"]
        .into_iter()
        .chain(line.split_whitespace())
        .collect();
    let (code, theirs) = place.qemu_img(&words);
    assert_eq!(code, 0, "{line}");
    assert_same(line, &place.json(&format!("measure {line}")), &theirs);
}

#[test]
fn new_disks_of_every_shape_are_measured_as_qemu_img_does() {
    require_qemu!();
    let place = Place::new();
    let mut lines = 0;
    for size in ["0", "1", "512", "1000000", "64M", "1G", "3T", "16T"] {
        assert_equal(&place, &format!("--size {size}"));
        for options in [
            "compat=0.10",
            "compat=1.1",
            "cluster_size=4K,refcount_bits=1",
            "cluster_size=4K,refcount_bits=64",
            "cluster_size=2M,refcount_bits=8",
            "extended_l2=on",
            "extended_l2=on,cluster_size=16K",
            "lazy_refcounts=on,size=5G",
            "preallocation=metadata",
            "preallocation=falloc",
            "preallocation=full",
        ] {
            let line = format!("-O qcow2 -o {options} --size {size}");
            if size == "16T" && options.contains("4K") {
                place.run(&format!("measure {line}")).ends_with(1);
                let (code, _) =
                    place.qemu_img(&format!("measure {line}").split(' ').collect::<Vec<_>>());
                assert_eq!(code, 1, "{line}");
                continue;
            }
            assert_equal(&place, &line);
            lines += 1;
        }
    }
    assert_equal(&place, "-O qcow2 -o size=2M --size 3M");
    println!("{lines} shapes and sizes");
    assert!(lines >= 60, "{lines}");
}

#[test]
fn a_copy_never_takes_more_than_was_said() {
    require_qemu!();
    let place = Place::new();
    place.create("base", 40 << 20, &[]);
    place.write("base", &["write -P 1 0 3M", "write -P 2 5M 100k"]);
    qemu_img::create_overlay(&place.path("top"), "base", "qcow2");
    place.write(
        "top",
        &["write -P 3 70k 1k", "write -z 1M 1M", "write -P 4 39M 1M"],
    );
    qemu_img::bitmap_add(&place.path("top"), "fine", Some(512));
    qemu_img::bitmap_add(&place.path("top"), "coarse", None);
    place.write("top", &["write -P 5 20M 300k"]);
    std::fs::write(place.path("plain"), vec![9; 5_000_192]).unwrap();
    let mut copies = 0;
    for source in ["top", "base", "-f raw plain"] {
        for options in [
            "cluster_size=64K",
            "cluster_size=4K",
            "extended_l2=on",
            "preallocation=full",
        ] {
            let line = format!("-O qcow2 -o {options} {source}");
            assert_equal(&place, &line);
            let said = place.json(&format!("measure {line}"));
            place.ok(&format!("convert {line} copy"));
            let took = std::fs::metadata(place.path("copy")).unwrap().len();
            assert!(took <= said["required"].as_u64().unwrap(), "{line}: {took}");
            copies += 1;
        }
    }
    assert_equal(
        &place,
        "-O qcow2 -o backing_file=base,backing_fmt=qcow2 top",
    );
    println!("{copies} copies");
}

#[test]
fn a_snapshot_is_measured_without_the_bitmaps_of_the_present() {
    require_qemu!();
    let place = Place::new();
    place.create("disk", 10 << 20, &[]);
    place.write("disk", &["write 0 1M"]);
    assert_eq!(place.qemu_img(&["snapshot", "-c", "then", "disk"]).0, 0);
    let then = place.json("measure -O qcow2 disk");
    qemu_img::bitmap_add(&place.path("disk"), "now", None);
    place.write("disk", &["write 2M 1M"]);
    let line = "-O qcow2 -l snapshot.name=then disk";
    let (_, theirs) = place.qemu_img(
        &format!("measure --output=json {line}")
            .split(' ')
            .collect::<Vec<_>>(),
    );
    let ours = place.json(&format!("measure {line}"));
    assert_same("a snapshot", &ours, &then);
    assert_same(line, &without(ours, "bitmaps"), &without(theirs, "bitmaps"));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let place = Place::new();
    place.ok("create disk 1M");
    for (line, code) in [
        ("measure", 64),
        ("measure --size 1M disk", 64),
        ("measure -O raw -o compat=1.1 disk", 64),
        ("measure -f raw -l then disk", 64),
        ("measure -O qcow2 -o cluster_size=3 --size 1M", 64),
        ("measure -O vmdk disk", 63),
        ("measure nowhere", 1),
    ] {
        place.run(line).ends_with(code);
    }
}
