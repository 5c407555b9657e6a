//! `convert` and `compare` beside qemu-img.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, has_keys};
use serde_json::json;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

#[test]
fn convert_copies_between_formats_as_qemu_img_does() {
    require_qemu!();
    let place = Place::new();
    place.create("base", 8 << 20, &[]);
    place.write("base", &["write -P 1 0 1M", "write -P 2 5M 100k"]);
    qemu_img::create_overlay(&place.path("top"), "base", "qcow2");
    place.write("top", &["write -P 3 100k 200k", "write -z 5M 64k"]);
    let same = |name: &str, format: &str| {
        let top = place.path("top");
        qemu_img::compare((&top, "qcow2"), (&place.path(name), format))
    };
    let answer = place.json("convert top plain.raw");
    has_keys(
        &answer,
        &[
            "source",
            "target",
            "virtual-size",
            "data-bytes",
            "zero-bytes",
        ],
    );
    assert!(same("plain.raw", "raw"));
    for (number, line) in [
        "-O qcow2 top",
        "-O qcow2 -o cluster_size=4K,compat=0.10 top",
        "-f raw -O qcow2 plain.raw",
        "-f raw -O raw -m 4 -W -p -q plain.raw",
        "-O qcow2 -B base -F qcow2 top",
        "-O qcow2 -S 0 top",
    ]
    .iter()
    .enumerate()
    {
        let format = if line.contains("-O raw") {
            "raw"
        } else {
            "qcow2"
        };
        let name = format!("copy{number}");
        place.ok(&format!("convert {line} {name}"));
        assert!(same(&name, format), "{line}");
        if format == "qcow2" {
            assert_eq!(place.qemu_img(&["check", "-q", &name]).0, 0, "{line}");
        }
    }
    // Into what is there already.
    place.create("there", 8 << 20, &[]);
    place.write("there", &["write -P 9 0 8M"]);
    place.ok("convert -n -O qcow2 top there");
    assert!(same("there", "qcow2"));
}

#[test]
fn convert_copies_a_snapshot_and_compresses_it() {
    require_qemu!();
    let place = Place::new();
    place.create("disk", 4 << 20, &[]);
    place.write("disk", &["write -P 1 100k 1M"]);
    assert_eq!(place.qemu_img(&["snapshot", "-c", "one", "disk"]).0, 0);
    place.write("disk", &["write -P 2 500k 1M"]);
    let disk = place.path("disk");
    qemu_img::convert(&disk, "qcow2", &place.path("theirs"), "raw", &["-l", "one"]);
    for snapshot in ["one", "1", "snapshot.id=1", "snapshot.name=one"] {
        place.ok(&format!("convert -c -O qcow2 -l {snapshot} disk ours"));
        let (ours, theirs) = (place.path("ours"), place.path("theirs"));
        assert!(qemu_img::compare((&ours, "qcow2"), (&theirs, "raw")));
        assert!(std::fs::metadata(&ours).unwrap().len() < 512 << 10);
    }
}

#[test]
fn convert_copies_bitmaps_and_fails_loudly_when_it_cannot() {
    require_qemu!();
    let place = Place::new();
    place.create("disk", 4 << 20, &[]);
    place.ok("bitmap add disk b");
    place.write("disk", &["write -P 1 1M 64k"]);
    let answer = place.json("convert --bitmaps -O qcow2 -o cluster_size=2M disk copy");
    assert_eq!(answer["bitmaps"], json!(["b"]));
    let list = "bitmap list --count";
    assert_eq!(
        place.json(&format!("{list} copy")),
        place.json(&format!("{list} disk"))
    );
    let broken = tidemark_fixtures::golden::load("in-use");
    std::fs::write(place.path("broken"), broken).unwrap();
    std::fs::write(place.path("kept"), b"old").unwrap();
    place
        .run("convert --bitmaps -O qcow2 broken kept")
        .ends_with(1);
    assert_eq!(std::fs::read(place.path("kept")).unwrap(), b"old");
    let line = "convert --bitmaps --skip-broken-bitmaps -O qcow2 broken kept";
    let answer = place.run(line).ends_with(0);
    assert!(answer.stderr.contains("left out"), "{}", answer.stderr);
}

#[test]
fn convert_refuses_before_it_replaces() {
    let place = Place::new();
    place.ok("create disk 1M");
    place.ok("create other 512K");
    std::fs::write(place.path("kept"), b"old").unwrap();
    for wrong in [
        "convert -O raw -o cluster_size=4K disk kept",
        "convert -O qcow2 -o cluster_size=3K disk kept",
        "convert -O qcow2 -o size=512K disk kept",
        "convert -O raw --bitmaps disk kept",
        "convert -S 1000 disk kept",
        "convert --target-is-zero disk kept",
        "convert --skip-broken-bitmaps disk kept",
        "convert -n -o cluster_size=4K -O qcow2 disk kept",
        "convert -O qcow2 -B base disk kept",
        "convert -O qcow2 disk disk",
        "convert -U -O qcow2 disk ./disk",
        "convert -c disk kept",
        "convert -c -O qcow2 -o data_file=data disk kept",
        "convert -U -O qcow2 -o data_file=disk disk kept",
        "convert -f raw -l one disk kept",
        "convert -l one --bitmaps -O qcow2 disk kept",
    ] {
        place.run(wrong).ends_with(64);
    }
    place.run("convert -O vmdk disk kept").ends_with(63);
    place.run("convert -f vmdk disk kept").ends_with(63);
    place.run("convert -l missing disk kept").ends_with(1);
    place.run("convert missing kept").ends_with(1);
    place
        .run("convert -O qcow2 -B missing -F qcow2 disk kept")
        .ends_with(1);
    place.run("convert -n -O qcow2 disk other").ends_with(1);
    assert_eq!(std::fs::read(place.path("kept")).unwrap(), b"old");
}

#[test]
fn compare_answers_and_ends_as_qemu_img_does() {
    require_qemu!();
    let place = Place::new();
    place.create("a", 4 << 20, &[]);
    place.write("a", &["write -P 1 1M 64k"]);
    place.ok("convert a a.raw");
    place.ok("convert -O qcow2 a b");
    place.write("b", &["write -P 2 1100000 4k"]);
    place.ok("convert -O qcow2 a longer");
    assert_eq!(place.qemu_img(&["resize", "-q", "longer", "8M"]).0, 0);
    std::fs::write(place.path("no-image"), [7; 4096]).unwrap();
    let mut cases = 0;
    for line in [
        "-F raw a a.raw",
        "a b",
        "a longer",
        "-s a longer",
        "-s a a",
        "a missing",
        "a no-image",
        "-q a b",
    ] {
        let args: Vec<&str> = ["compare"].into_iter().chain(line.split(' ')).collect();
        let ours = place.run_args(&args);
        // qemu-img guesses formats; these guesses are right.
        let theirs = qemu_img::run(
            &args
                .iter()
                .map(|arg| match *arg {
                    "compare" | "-s" | "-q" | "-F" | "raw" => (*arg).to_owned(),
                    name => place.path(name).to_str().unwrap().to_owned(),
                })
                .collect::<Vec<_>>()
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>(),
        );
        let code = match line {
            // Ours knows that it is no image; theirs takes it for a raw disk.
            "a no-image" => 63,
            _ => theirs.status.unwrap(),
        };
        assert_eq!(ours.code, code, "{line}: {ours:?} {}", theirs.stderr);
        if code < 2 {
            assert_eq!(ours.stdout, theirs.text(), "{line}");
        }
        cases += 1;
    }
    let answer = place.run("compare a b --output json");
    assert_eq!(answer.code, 1);
    let answer = answer.json();
    assert_eq!(
        answer,
        json!({"identical": false, "reason": "content", "offset": 1_099_776, "same-size": true})
    );
    println!("{cases} comparisons");
    assert!(cases >= 8);
}
