//! `rebase`, beside `qemu-img rebase`.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, content};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

/// `old` below `disk`, and `new` beside it.
fn stack() -> Place {
    let place = Place::new();
    place.create("old", 3 << 20, &[]);
    place.write("old", &["write -P 1 0 2M"]);
    place.create("new", 2 << 20, &[("cluster_size", "4096")]);
    place.write("new", &["write -P 1 0 1M", "write -P 2 1M 1M"]);
    let over = [("backing_file", "old"), ("backing_fmt", "qcow2")];
    place.create("disk", 3 << 20, &over);
    place.write("disk", &["write -P 3 1500k 200k"]);
    place
}

#[test]
fn the_disk_stays_whatever_it_is_moved_onto() {
    require_qemu!();
    let place = stack();
    let before = content(&place.path("disk"));
    for (options, backing, data) in [
        ("-b new -F qcow2", Some("new"), 1_u64 << 20),
        ("-p -m 1 -b new -F qcow2", Some("new"), 0),
        ("-b old -F qcow2 -q", Some("old"), 0),
        ("-b ", None, 1 << 20),
    ] {
        let mut line: Vec<&str> = ["rebase", "-f", "qcow2"].to_vec();
        line.extend(options.split(' '));
        line.extend(["disk", "--output", "json"]);
        let answer = place.run_args(&line).ends_with(0).json();
        assert_eq!(answer["backing-filename"].as_str(), backing, "{answer}");
        let copied = answer["data-bytes"].as_u64().unwrap();
        assert!(copied <= data, "{options}: {answer}");
        assert!(content(&place.path("disk")) == before, "{options}");
        qemu_img::check(&place.path("disk")).assert_clean();
        let info = qemu_img::info(&place.path("disk"));
        assert_eq!(info["backing-filename"].as_str(), backing);
    }
    std::fs::remove_file(place.path("old")).unwrap();
    assert!(content(&place.path("disk")) == before);
}

#[test]
fn the_name_alone_needs_no_file_and_marks_what_may_differ() {
    require_qemu!();
    let place = stack();
    place.ok("bitmap add -g 64K disk b");
    std::fs::rename(place.path("old"), place.path("moved")).unwrap();
    place.ok("rebase -u --same-content -b moved -F qcow2 disk");
    let dirty = |place: &Place| {
        let listed = place.json("bitmap list --count disk");
        listed[0]["dirty-bytes"].as_u64().unwrap()
    };
    assert_eq!(dirty(&place), 0);
    let before = content(&place.path("disk"));
    place.ok("rebase -u -b nowhere -F raw disk");
    assert_eq!(qemu_img_name(&place), "nowhere");
    // All but the clusters of the 200 KiB that it holds itself.
    let marked = dirty(&place);
    assert!((5 << 19..3 << 20).contains(&marked), "{marked}");
    place.ok("rebase -u -b moved -F qcow2 disk");
    assert!(content(&place.path("disk")) == before);
    let (mine, theirs) = (place.path("disk"), place.path("theirs"));
    std::fs::copy(&mine, &theirs).unwrap();
    place.ok("rebase -u -b new -F qcow2 disk");
    qemu_img::rebase_unsafe(&theirs, "new", "qcow2");
    assert!(content(&mine) == content(&theirs));
    qemu_img::check(&mine).assert_clean();
}

fn qemu_img_name(place: &Place) -> String {
    let answer = place.json("info disk");
    answer["backing-filename"].as_str().unwrap().to_owned()
}

#[test]
fn an_increment_after_a_rebase_restores_the_disk() {
    require_qemu!();
    let place = stack();
    place.ok("backup --to backups --checkpoint a disk");
    place.ok("rebase -b new -F qcow2 disk");
    place.write("disk", &["write -P 7 100k 5k"]);
    let answer = place.json("backup --to backups --checkpoint b --since a disk");
    assert_eq!(answer["disks"][0]["mode"], "incremental", "{answer}");
    let safe = content(&place.path("disk"));
    // Another disk below, and nobody vouches: the increment holds it.
    place.ok("rebase -u -b old -F qcow2 disk");
    place.ok("backup --to backups --checkpoint c --since b disk");
    let other = content(&place.path("disk"));
    place.ok("restore --from backups --disk vda --at b --to b.qcow2");
    place.ok("restore --from backups --disk vda --at c --to c.qcow2");
    assert!(content(&place.path("b.qcow2")) == safe);
    assert!(content(&place.path("c.qcow2")) == other);
    place.ok("verify backups");
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_written() {
    require_qemu!();
    let place = stack();
    let before = std::fs::read(place.path("disk")).unwrap();
    for (line, code) in [
        ("rebase -b new disk", 64),
        ("rebase -b new -F vmdk disk", 63),
        ("rebase -b missing -F qcow2 disk", 1),
        ("rebase -b disk -F qcow2 disk", 64),
        ("rebase -u -b disk -F qcow2 disk", 64),
        ("rebase -u -b ./disk -F raw disk", 64),
        ("rebase --same-content -b new -F qcow2 disk", 64),
        ("rebase -b new -F qcow2", 64),
        ("rebase disk", 64),
        ("rebase -f raw -b new -F qcow2 disk", 63),
        ("rebase --no-backing -b new -F qcow2 disk", 1),
        ("rebase --allow-backing /etc -b new -F qcow2 disk", 1),
    ] {
        place.run(line).ends_with(code);
    }
    assert_eq!(std::fs::read(place.path("disk")).unwrap(), before);
    place.ok("snapshot -c s disk");
    place.run("rebase -b new -F qcow2 disk").ends_with(1);
}
