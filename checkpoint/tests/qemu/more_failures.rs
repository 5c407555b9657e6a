//! What goes wrong in the field, continued: moments that were put back, work that stopped half way,
//! space that ran out, several tools on one machine, formats that cannot take part.

use std::sync::Arc;

use tidemark_checkpoint::backup::{self, BackupOptions, Format, Mode, RestoreOptions};
use tidemark_checkpoint::{
    CreateFlags, DeleteFlags, Domain, DomainOptions, ErrorCode, FullReason, ListFlags, ListOptions,
    Problem,
};
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::chain::Health;
use tidemark_qcow2::{CreateOptions, Error as ImageError};

use super::common::{self, Fuse, Medium, content, names, spec, write};
use super::desk::{Desk, SIZE, copy, covers, since};
use super::failures::chain;

fn backup_options(desk: &Desk, checkpoint: &str, since: Option<&str>) -> BackupOptions {
    BackupOptions {
        to: desk.path("backups"),
        checkpoint: Some(checkpoint.to_owned()),
        since: since.map(ToOwned::to_owned),
        ..BackupOptions::default()
    }
}

/// Row: the image was restored; the descriptors still tell of the old one.
#[test]
fn a_restored_image_does_not_answer_for_the_old_ones_checkpoints() {
    tidemark_fixtures::require_qemu!();
    let desk = Desk::new(&["vda"]);
    desk.write("vda", 0, 200_000, 3);
    desk.session(|domain| backup::backup(domain, &backup_options(&desk, "a", None)).unwrap());
    desk.write("vda", 1 << 20, 200_000, 4);
    let options = RestoreOptions {
        from: desk.path("backups"),
        disk: "vda".to_owned(),
        at: Some("a".to_owned()),
        to: desk.path("restored.qcow2"),
        format: Format::Qcow2,
    };
    backup::restore(&options).unwrap();
    copy(&desk.path("restored.qcow2"), &desk.image("vda"));
    desk.session(|domain| {
        let a = domain.lookup("a").unwrap();
        assert!(a.has_metadata().unwrap(), "its descriptor is still there");
        // The image does not know it: nothing is since it, until a full backup begins a new chain.
        let refused = backup::backup(domain, &backup_options(&desk, "b", Some("a"))).unwrap_err();
        assert!(refused.to_string().contains("not an ancestor"), "{refused}");
        let report = backup::backup(domain, &backup_options(&desk, "b", None)).unwrap();
        assert_eq!(report.disks[0].mode, Mode::Full);
        domain.delete("a", DeleteFlags::NONE).unwrap();
        assert_eq!(names(&domain.checkpoints(ListFlags::NONE).unwrap()), ["b"]);
    });
    desk.write("vda", 0, 10, 9);
    desk.session(|domain| {
        let report = backup::backup(domain, &backup_options(&desk, "c", Some("b"))).unwrap();
        assert_eq!(report.disks[0].mode, Mode::Incremental, "{report:?}");
    });
}

/// Row: the storage put an older image back.
#[test]
fn an_image_that_the_storage_put_back_never_answers_for_the_time_it_lost() {
    tidemark_fixtures::require_qemu!();
    for disks in [&["vda"][..], &["vda", "vdb"]] {
        let (desk, moments) = chain(disks);
        copy(&desk.image("vda"), &desk.path("old"));
        desk.checkpoint("d");
        let at_d = desk.content("vda");
        desk.write("vda", 3 << 20, 70_000, 9);
        copy(&desk.path("old"), &desk.image("vda"));
        // It is at its own moment again, and right for what it knows.
        let answer = desk.session(|domain| {
            for (name, before) in &moments {
                let bits = since(domain, name, "vda").unwrap();
                covers(&bits, before, &content(domain, "vda"), "back in time");
            }
            match domain.lookup("d") {
                Err(error) => {
                    assert_eq!(error.code(), ErrorCode::NoDomainCheckpoint);
                    None
                }
                Ok(_) => Some(domain.changed_since("d", Default::default())),
            }
        });
        // The descriptor, and the other disk, still tell of d: the disk put back is full since it.
        if let Some(Ok(changes)) = answer {
            let vda = &changes[0];
            assert!(matches!(
                vda.delta,
                tidemark_checkpoint::DiskDelta::Full {
                    reason: FullReason::NotWitnessed | FullReason::NotOnDisk
                }
            ));
        }
        assert_ne!(desk.content("vda"), Vec::<u8>::new());
        drop(at_d);
    }
}

/// Row: the guest shuts down during a backup, or the backup is killed: the job does not depend on
/// who else has the image open.
#[test]
fn a_backup_whose_disk_was_closed_meanwhile_is_finished_later() {
    tidemark_fixtures::require_qemu!();
    let (desk, _) = chain(&["vda"]);
    let tentative_moment = desk.content("vda");
    desk.session(|domain| drop(domain.prepare(&spec("d"), CreateFlags::NONE).unwrap()));
    // QEMU runs the guest for a while; both bitmaps record.
    desk.qemu_writes("vda", &["write -P 0x17 3M 64k"]);
    desk.session(|domain| {
        let blocked = domain.create(&spec("e"), CreateFlags::NONE).unwrap_err();
        assert_eq!(blocked.code(), ErrorCode::OperationInvalid, "{blocked}");
        domain.tentative().unwrap().unwrap().commit().unwrap();
        assert_eq!(domain.current().unwrap().unwrap().name(), "d");
    });
    desk.covers("d", "vda", &tentative_moment, "since the backup");
}

/// Row: a deletion stopped half way.
#[test]
fn a_deletion_that_reached_one_disk_is_shown_and_finished() {
    tidemark_fixtures::require_qemu!();
    let (desk, moments) = chain(&["vda", "vdb"]);
    let before = std::fs::read(desk.image("vdb")).unwrap();
    desk.session(|domain| drop(domain.delete("b", DeleteFlags::NONE).unwrap()));
    std::fs::write(desk.image("vdb"), before).unwrap();
    desk.session(|domain| {
        assert_eq!(
            names(&domain.checkpoints(ListFlags::NONE).unwrap()),
            ["a", "b", "c"]
        );
        let problems = domain.verify().unwrap();
        let skipped = |p: &Problem| matches!(p, Problem::ParentSkipped { .. });
        assert!(problems.iter().any(skipped), "{problems:?}");
        domain.delete("b", DeleteFlags::NONE).unwrap();
        assert_eq!(domain.verify().unwrap(), []);
    });
    desk.covers("a", "vda", &moments[0].1, "finished");
    assert!(desk.since("a", "vdb").is_ok());
    desk.assert_clean();
}

/// Row: no space left while bitmaps are written.
#[test]
fn a_full_disk_at_any_write_of_a_checkpoint_leaves_a_chain_that_qemu_loads() {
    tidemark_fixtures::require_qemu!();
    let fuse = Fuse::new();
    let medium = Medium::new(&fuse);
    let domain = common::domain(std::slice::from_ref(&medium));
    common::create(&domain, "a");
    let before = content(&domain, "vda");
    write(&domain, "vda", 100_000, 9000, 1);
    common::close(domain);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let (mut points, mut opened) = (0, 0);
    loop {
        let fuse = Fuse::new();
        let copy = medium.copy(&fuse);
        let domain = common::domain(std::slice::from_ref(&copy));
        fuse.burn_after(points);
        let outcome = domain.create(&spec("b"), CreateFlags::NONE);
        drop(domain);
        // Space is there again; QEMU is the first to open the image.
        std::fs::write(&path, copy.to_bytes()).unwrap();
        if points % 3 == 0 {
            qemu_img::check(&path).assert_at_worst_leaks();
            qemu_io::commands(&path, &["write -P 0x33 700k 10k"]);
            opened += 1;
        }
        let bytes = std::fs::read(&path).unwrap();
        let storage = tidemark_qcow2::MemoryStorage::from_bytes(bytes);
        let options = tidemark_qcow2::OpenOptions {
            writable: true,
            ..Default::default()
        };
        let image = tidemark_qcow2::Image::open(Box::new(storage), options).unwrap();
        let disk = tidemark_checkpoint::Disk {
            name: "vda".to_owned(),
            image: Arc::new(image),
        };
        let domain = Domain::new(vec![disk], DomainOptions::default()).unwrap();
        let bits = common::since(&domain, "a", "vda").unwrap();
        common::assert_superset(
            &bits,
            &before,
            &content(&domain, "vda"),
            &format!("{points}"),
        );
        common::create(&domain, "c");
        assert_eq!(domain.verify().unwrap(), [], "{points}");
        if outcome.is_ok() && !fuse.is_burnt() {
            break;
        }
        points += 1;
    }
    println!("{points} points, QEMU opened {opened}");
    assert!(points >= 6 && opened >= 2);
}

/// Row: two tools on one machine.
#[test]
fn bitmaps_of_another_tool_are_named_and_left_alone() {
    tidemark_fixtures::require_qemu!();
    let (desk, moments) = chain(&["vda"]);
    let path = desk.image("vda");
    qemu_img::bitmap_add(&path, "theirs", Some(65536));
    desk.qemu_writes("vda", &["write -P 0x41 3M 64k"]);
    let listed = |desk: &Desk| -> Vec<(String, u64)> {
        let info = qemu_img::info(&desk.image("vda"));
        let bitmaps = info["format-specific"]["data"]["bitmaps"]
            .as_array()
            .unwrap()
            .clone();
        let theirs = bitmaps.iter().filter(|b| b["name"] == "theirs");
        theirs
            .map(|b| (b["flags"].to_string(), b["granularity"].as_u64().unwrap()))
            .collect()
    };
    let before = listed(&desk);
    desk.session(|domain| {
        let foreign =
            |p: &Problem| matches!(p, Problem::Foreign { bitmap, .. } if bitmap == "theirs");
        assert!(domain.verify().unwrap().iter().any(foreign));
        let theirs = domain
            .disk("vda")
            .unwrap()
            .image
            .load_bitmap("theirs")
            .unwrap();
        domain.create(&spec("d"), CreateFlags::NONE).unwrap();
        domain.delete("b", DeleteFlags::NONE).unwrap();
        domain.prune(2).unwrap();
        let after = domain
            .disk("vda")
            .unwrap()
            .image
            .load_bitmap("theirs")
            .unwrap();
        assert!(after.contains(&theirs), "it goes on recording");
        let refused = domain
            .create(&spec("theirs"), CreateFlags::NONE)
            .unwrap_err();
        assert_eq!(refused.code(), ErrorCode::OperationFailed);
        assert!(
            domain.lookup("theirs").is_err(),
            "it is no checkpoint of this chain"
        );
    });
    assert_eq!(listed(&desk), before);
    desk.covers("c", "vda", &moments[2].1, "beside another tool");
    desk.assert_clean();
}

/// Row: qcow2 version 2.
#[test]
fn version_2_is_refused_with_the_advice_and_takes_part_after_it() {
    tidemark_fixtures::require_qemu!();
    let mut desk = Desk::empty();
    qemu_img::create(&desk.image("vda"), SIZE, &[("compat", "0.10")]);
    desk.own("vda");
    let before = desk.bytes();
    desk.session(|domain| {
        let refused = domain.create(&spec("a"), CreateFlags::NONE).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::ConfigUnsupported);
        assert!(refused.to_string().contains("compat=1.1"), "{refused}");
    });
    assert_eq!(desk.bytes(), before);
    let path = desk.image("vda");
    qemu_img::ok(&[
        "amend",
        "-f",
        "qcow2",
        "-o",
        "compat=1.1",
        path.to_str().unwrap(),
    ]);
    desk.checkpoint("a");
    assert!(desk.since("a", "vda").is_ok());
}

/// Row: may the machine be undefined? Whoever asks is told what descriptors there are.
#[test]
fn descriptors_that_would_be_orphaned_are_told() {
    tidemark_fixtures::require_qemu!();
    let (desk, _) = chain(&["vda"]);
    desk.session(|domain| {
        let with = |flags| domain.checkpoints(flags).unwrap().len();
        assert_eq!(
            (with(ListFlags::METADATA), with(ListFlags::NO_METADATA)),
            (3, 0)
        );
        let all = DeleteFlags::METADATA_ONLY | DeleteFlags::CHILDREN;
        domain.delete("a", all).unwrap();
        assert_eq!(
            (with(ListFlags::METADATA), with(ListFlags::NO_METADATA)),
            (0, 3)
        );
    });
    assert_eq!(std::fs::read_dir(desk.store()).unwrap().count(), 0);
    let options = ListOptions {
        judge: true,
        ..Default::default()
    };
    desk.session(|domain| {
        let listing = domain.list(options).unwrap();
        assert!(
            listing
                .checkpoints
                .iter()
                .all(|info| info.disks[0].health == Health::Ok)
        );
    });
}

/// The engine's refusals keep their place in the vocabulary.
#[test]
fn a_format_that_cannot_take_part_is_told_from_a_failure() {
    let unsupported = ImageError::Unsupported {
        image: "x".to_owned(),
        feature: tidemark_qcow2::Feature::BitmapsInVersion2,
    };
    let error = tidemark_checkpoint::Error::Image {
        disk: "vda".to_owned(),
        source: unsupported,
    };
    assert_eq!(error.code(), ErrorCode::ConfigUnsupported);
    let _ = CreateOptions::new(SIZE);
}
