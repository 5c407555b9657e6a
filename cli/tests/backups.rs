//! `backup`, `restore`, `verify`, `catalogue`, `checkpoint recover`.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::sync::Arc;

use common::{Place, content, has_keys};
use serde_json::json;
use tidemark_checkpoint::{CreateFlags, CreateSpec, Disk, Domain, DomainOptions};
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{FileStorage, Image, OpenOptions, Sharing};

const MIB: u64 = 1 << 20;

/// A disk with two backups: full 'a', increment 'b'. Returns what the disk held at each.
fn two_backups(place: &Place) -> [Vec<u8>; 2] {
    place.create("disk", 16 * MIB, &[]);
    place.write("disk", &["write -P 1 0 3M", "write -P 2 8M 1M"]);
    let first = content(&place.path("disk"));
    place.ok("backup --to backups --checkpoint a disk");
    place.write(
        "disk",
        &[
            "write -P 3 1M 300k",
            "write -z 8M 128k",
            "write -P 4 15M 1M",
        ],
    );
    let second = content(&place.path("disk"));
    let report = place.json("backup --to backups --since a --checkpoint b disk");
    has_keys(
        &report["disks"][0],
        &["disk", "mode", "reason", "bytes", "path"],
    );
    assert_eq!(report["disks"][0]["mode"], "incremental");
    assert_eq!(report["disks"][0]["reason"], json!(null));
    assert!(report["disks"][0]["bytes"].as_u64().unwrap() < 4 * MIB);
    [first, second]
}

#[test]
fn every_point_is_restored_by_us_and_by_qemu_img_alone() {
    require_qemu!();
    let place = Place::new();
    let held = two_backups(&place);
    let catalogue = place.json("catalogue backups");
    for (number, name) in ["a", "b"].into_iter().enumerate() {
        let point = &catalogue["points"][number];
        has_keys(
            point,
            &["checkpoint", "identity", "creation-time", "since", "disks"],
        );
        assert_eq!(point["checkpoint"], name);
        let path = format!("backups/{}", point["disks"][0]["path"].as_str().unwrap());
        assert_eq!(
            content(&place.path(&path)),
            held[number],
            "qemu-img restores '{name}'"
        );
        let raw = format!("{name}.raw");
        place.ok(&format!(
            "restore --from backups --at {name} --to {raw} --format raw"
        ));
        assert_eq!(std::fs::read(place.path(&raw)).unwrap(), held[number]);
        place.ok(&format!(
            "restore --from backups --disk vda --at {name} --to {name}.qcow2"
        ));
        assert_eq!(content(&place.path(&format!("{name}.qcow2"))), held[number]);
    }
    place.ok("restore --from backups --to newest");
    assert_eq!(content(&place.path("newest")), held[1]);
    qemu_img::check(&place.path("disk")).assert_clean();
}

#[test]
fn a_disk_without_a_usable_base_is_copied_in_full_with_the_reason() {
    require_qemu!();
    let place = Place::new();
    two_backups(&place);
    let report = place.json("backup --to elsewhere --since a disk");
    assert_eq!(report["disks"][0]["mode"], "full");
    assert!(report["disks"][0]["reason"].is_string());
    place
        .run("backup --to backups --since nobody disk")
        .ends_with(1);
}

#[test]
fn existing_targets_and_unknown_points_are_refused() {
    require_qemu!();
    let place = Place::new();
    two_backups(&place);
    std::fs::write(place.path("taken"), b"mine").unwrap();
    place.run("restore --from backups --to taken").ends_with(1);
    assert_eq!(std::fs::read(place.path("taken")).unwrap(), b"mine");
    place
        .run("restore --from backups --at nobody --to new")
        .ends_with(1);
    place
        .run("restore --from backups --disk vdz --to new")
        .ends_with(1);
    place.run("restore --from nowhere --to new").ends_with(1);
    assert!(!place.path("new").exists());
}

#[test]
fn damage_of_a_backup_is_found_and_never_restored() {
    require_qemu!();
    let place = Place::new();
    two_backups(&place);
    assert_eq!(place.json("verify backups")["sound"], true);
    let catalogue = place.json("catalogue backups");
    let path = catalogue["points"][0]["disks"][0]["path"].as_str().unwrap();
    let path = place.path("backups").join(path);
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1000;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let verified = place
        .run("verify backups --output json")
        .ends_with(2)
        .json();
    assert_eq!(verified["sound"], false);
    assert!(!verified["findings"].as_array().unwrap().is_empty());
    place
        .run("restore --from backups --at a --to new")
        .ends_with(2);
    assert!(!place.path("new").exists());
    place.run("verify nowhere").ends_with(1);
}

#[test]
fn cancelling_without_an_unfinished_backup_changes_nothing() {
    let place = Place::new();
    place.ok("create disk 8M");
    place.ok("backup --to backups --checkpoint a disk");
    let before = std::fs::read(place.path("disk")).unwrap();
    assert_eq!(
        place.json("backup --cancel --to backups disk"),
        json!({ "cancelled": false })
    );
    assert_eq!(std::fs::read(place.path("disk")).unwrap(), before);
}

#[test]
fn after_a_crash_of_qemu_frozen_bitmaps_come_back_and_a_backup_fills_the_gap() {
    require_qemu!();
    let place = Place::new();
    two_backups(&place);
    let disk = place.path("disk");
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&disk);
    daemon.guest(&node, &["write -P 9 5M 200k", "flush"]);
    daemon.kill_dash_nine();
    let held = content(&disk);
    let before = place.json("checkpoint list disk");
    assert_eq!(before[0]["disks"][0]["state"], "inconsistent");
    assert_eq!(before[1]["disks"][0]["state"], "inconsistent");

    let rows = place.json("checkpoint recover --against backups disk");
    has_keys(
        &rows[0],
        &["name", "disk", "before", "after", "outcome", "how", "lost"],
    );
    assert_eq!(rows[0]["outcome"], "rewritten");
    assert_eq!(rows[1]["outcome"], "compared");
    assert_eq!(rows[1]["lost"], false);
    let again = std::fs::read(&disk).unwrap();
    let rows = place.json("checkpoint recover --against backups disk");
    assert_eq!(rows[1]["outcome"], "intact");
    assert_eq!(
        std::fs::read(&disk).unwrap(),
        again,
        "a second call changes nothing"
    );

    let report = place.json("backup --to backups --since b --checkpoint c disk");
    assert_eq!(report["disks"][0]["mode"], "incremental", "{report}");
    place.ok("restore --from backups --at c --to c.raw --format raw");
    assert_eq!(std::fs::read(place.path("c.raw")).unwrap(), held);
    qemu_img::check(&disk).assert_at_worst_leaks();
}

#[test]
fn without_a_backup_to_compare_with_the_loss_is_named() {
    require_qemu!();
    let place = Place::new();
    two_backups(&place);
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&place.path("disk"));
    daemon.guest(&node, &["write -P 9 5M 200k"]);
    daemon.kill_dash_nine();
    let rows = place.json("checkpoint recover disk");
    assert_eq!(rows[1]["lost"], true);
    let report = place.json("backup --to backups --since b --checkpoint c disk");
    assert_eq!(report["disks"][0]["mode"], "full");
}

/// What a backup leaves that is killed while it copies: a checkpoint that is not yet real.
fn killed_backup(place: &Place, name: &str) {
    let storage = FileStorage::open(&place.path("disk"), true, Sharing::Exclusive).unwrap();
    let options = OpenOptions {
        writable: true,
        ..OpenOptions::default()
    };
    let image = Arc::new(Image::open(Box::new(storage), options).unwrap());
    let disk = Disk {
        name: "vda".to_owned(),
        image,
    };
    let domain = Domain::new(vec![disk], DomainOptions::default()).unwrap();
    let spec = CreateSpec {
        name: Some(name.to_owned()),
        ..CreateSpec::default()
    };
    drop(domain.prepare(&spec, CreateFlags::NONE).unwrap());
}

#[test]
fn a_killed_backup_is_named_and_ends_by_cancel_or_abandon() {
    let place = Place::new();
    place.ok("create disk 8M");
    place.ok("backup --to backups --checkpoint a disk");
    killed_backup(&place, "b");
    let refused = place.run("checkpoint create c disk").ends_with(1);
    assert!(refused.stderr.contains("'b'"), "{}", refused.stderr);
    assert!(refused.stderr.contains("--cancel"), "{}", refused.stderr);
    // Its manifest was never written: there is nothing to finish.
    let refused = place.run("backup --resume --to backups disk").ends_with(1);
    assert!(refused.stderr.contains("'b'"), "{}", refused.stderr);
    let answer = place.json("backup --cancel --to backups disk");
    assert_eq!(answer, json!({ "cancelled": true }));
    let answer = place.json("backup --resume --to backups disk");
    assert_eq!(answer, json!({ "disks": [] }));
    place.ok("checkpoint create c disk");

    killed_backup(&place, "d");
    place.run("checkpoint create e disk").ends_with(1);
    place.ok("checkpoint create e disk --abandon");
    place.run("checkpoint verify disk").ends_with(0);
    let report = place.json("backup --to backups --since a --checkpoint f disk");
    assert_eq!(report["disks"][0]["mode"], "incremental");
}

#[test]
fn a_domain_of_two_disks_is_one_point() {
    let place = Place::new();
    place.ok("create one 4M");
    place.ok("create two 6M");
    let disks = "--disk vda=one --disk vdb=two --metadata meta";
    place.ok(&format!("backup --to backups --checkpoint a {disks}"));
    // A disk that joins later is full, alone, with the reason.
    place.ok("create three 2M");
    let report = place.json(&format!(
        "backup --to backups --since a --checkpoint b {disks} --disk vdc=three"
    ));
    let row = |number: usize| {
        let disk = &report["disks"][number];
        (
            disk["disk"].clone(),
            disk["mode"].clone(),
            disk["reason"].is_string(),
        )
    };
    assert_eq!(row(0), (json!("vda"), json!("incremental"), false));
    assert_eq!(row(1), (json!("vdb"), json!("incremental"), false));
    assert_eq!(row(2), (json!("vdc"), json!("full"), true));
    place.ok("restore --from backups --disk vdb --at b --to restored");
    assert_eq!(place.json("info restored")["virtual-size"], 6 << 20);
}
