//! What goes wrong in the field: each situation made for real, by QEMU where it is QEMU that makes
//! it, and what must happen then. Writers: a crash, a start that fails. Descriptors and bitmaps
//! that are not both there. Disks that come, go and are mixed up.

use std::sync::Arc;

use tidemark_checkpoint::{
    CreateFlags, DeleteFlags, Descriptor, Disk, Domain, DomainOptions, Error, ErrorCode,
    FullReason, ListFlags, ListOptions, Outcome, Problem,
};
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_qcow2::chain::Health;
use tidemark_qcow2::{CreateOptions, FileStorage, Image, Sharing};

use super::common::{content, names, spec, write};
use super::desk::{Desk, SIZE, close, covers, since};

/// Two disks with checkpoints a, b, c and a change after each; contents of vda at each.
pub(super) fn chain(disks: &[&str]) -> (Desk, Vec<(&'static str, Vec<u8>)>) {
    let desk = Desk::new(disks);
    let mut moments = Vec::new();
    for (name, offset) in [("a", 0_u64), ("b", 1 << 20), ("c", 2 << 20)] {
        desk.session(|domain| {
            moments.push((name, content(domain, "vda")));
            domain.create(&spec(name), CreateFlags::NONE).unwrap();
            for disk in disks {
                write(domain, disk, offset, 100_000, 7);
            }
        });
    }
    (desk, moments)
}

/// Row: crash or loss of power.
#[test]
fn after_a_crash_of_qemu_the_frozen_bitmaps_come_back_and_each_disk_is_reported() {
    tidemark_fixtures::require_qemu!();
    let (desk, moments) = chain(&["vda", "vdb"]);
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&desk.image("vda"));
    daemon.guest(&node, &["write -P 9 3M 64k", "flush"]);
    daemon.kill_dash_nine();
    desk.session(|domain| {
        let recovered = domain.recover().unwrap();
        let outcome = |disk: &str| -> Vec<Outcome> {
            recovered
                .iter()
                .filter(|r| r.disk == disk)
                .map(|r| r.outcome)
                .collect()
        };
        assert_eq!(
            outcome("vda"),
            [Outcome::Rewritten, Outcome::Rewritten, Outcome::Restarted]
        );
        assert_eq!(outcome("vdb"), [Outcome::Intact; 3]);
        for name in ["a", "b", "c"] {
            let lost = since(domain, name, "vda");
            assert!(
                matches!(
                    lost,
                    Err(FullReason::BadBitmap {
                        health: Health::Lost,
                        ..
                    })
                ),
                "{name}"
            );
            assert!(
                since(domain, name, "vdb").is_ok(),
                "the other disk stays incremental"
            );
        }
        // The next checkpoint begins anew; a comparison with a backup would fill the gap.
        domain.create(&spec("d"), CreateFlags::NONE).unwrap();
        assert!(since(domain, "d", "vda").is_ok());
        let image = &domain.disk("vda").unwrap().image;
        let mut gap = image.load_bitmap("c").unwrap();
        gap.mark(2 << 20..SIZE).unwrap();
        domain.reinstate("c", "vda", &gap).unwrap();
    });
    for (name, before) in &moments {
        desk.covers(name, "vda", before, "after the gap was filled");
    }
    desk.assert_clean();
}

/// The same row, for our own crash: nothing is lost at all.
#[test]
fn after_a_crash_of_ours_every_checkpoint_goes_on() {
    tidemark_fixtures::require_qemu!();
    let (desk, moments) = chain(&["vda"]);
    let domain = desk.open();
    write(&domain, "vda", 3 << 20, 70_000, 5);
    // Dropped, not closed.
    drop(domain);
    for (name, before) in &moments {
        desk.covers(name, "vda", before, "after our crash");
    }
    desk.qemu_writes("vda", &["write -P 0x21 3500k 64k"]);
    for (name, before) in &moments {
        desk.covers(name, "vda", before, "after our crash and QEMU");
    }
}

/// Row: a process opens for writing and fails before it writes.
#[test]
fn a_start_that_fails_costs_nothing_when_it_is_ours_and_nothing_frozen_when_it_is_qemus() {
    tidemark_fixtures::require_qemu!();
    let (desk, moments) = chain(&["vda"]);
    let before = desk.bytes();
    drop(desk.open());
    assert_eq!(desk.bytes(), before, "opened, not written, dropped");
    let mut daemon = QemuStorageDaemon::spawn();
    daemon.open_image(&desk.image("vda"));
    daemon.kill_dash_nine();
    desk.session(|domain| {
        let outcomes: Vec<_> = domain
            .recover()
            .unwrap()
            .iter()
            .map(|r| r.outcome)
            .collect();
        assert_eq!(outcomes[..2], [Outcome::Rewritten; 2]);
        // Whoever knows that nothing was written gives the recording one back.
        let image = &domain.disk("vda").unwrap().image;
        let mut known = image.load_bitmap("c").unwrap();
        known.mark(2 << 20..(2 << 20) + 100_000).unwrap();
        domain.reinstate("c", "vda", &known).unwrap();
    });
    for (name, before) in &moments {
        desk.covers(name, "vda", before, "after a failed start");
    }
}

/// Row: the bitmap is missing, the descriptor is there.
#[test]
fn a_checkpoint_whose_bitmap_is_gone_is_deleted_with_a_warning() {
    tidemark_fixtures::require_qemu!();
    let (desk, _) = chain(&["vda", "vdb"]);
    qemu_img::bitmap_remove(&desk.image("vda"), "b");
    desk.session(|domain| {
        let full = since(domain, "a", "vda").unwrap_err();
        assert_eq!(full.to_string(), "bitmap 'b' is missing");
        assert!(
            since(domain, "a", "vdb").is_ok(),
            "only the disk that lost it falls back"
        );
        let deleted = domain.delete("b", DeleteFlags::NONE).unwrap();
        assert_eq!(deleted.checkpoints, ["b"]);
        assert_eq!(deleted.warnings.len(), 1);
        assert_eq!(deleted.warnings[0].disk, "vda");
        assert_eq!(
            names(&domain.checkpoints(ListFlags::NONE).unwrap()),
            ["a", "c"]
        );
        assert!(
            since(domain, "a", "vda").is_err(),
            "nothing is joined over a hole"
        );
        assert!(since(domain, "c", "vda").is_ok());
    });
    desk.assert_clean();
}

/// Row: the bitmap is there, the descriptor is lost.
#[test]
fn a_checkpoint_without_its_descriptor_is_listed_reused_and_deleted() {
    tidemark_fixtures::require_qemu!();
    let (desk, moments) = chain(&["vda"]);
    std::fs::remove_dir_all(desk.store()).unwrap();
    for (name, before) in &moments {
        desk.covers(name, "vda", before, "without descriptors");
    }
    desk.session(|domain| {
        let rebuilt = domain.rebuild(false).unwrap();
        assert!(rebuilt.checkpoints.iter().all(|info| !info.metadata));
        let all = domain.checkpoints(ListFlags::NO_METADATA).unwrap();
        assert_eq!(names(&all), ["a", "b", "c"]);
        let taken = domain.create(&spec("b"), CreateFlags::NONE).unwrap_err();
        assert_eq!(taken.code(), ErrorCode::OperationFailed);
        domain.delete("b", DeleteFlags::NONE).unwrap();
        assert_eq!(domain.verify().unwrap(), []);
    });
    drop(desk);
    // Of an image that knows nothing of us, a bitmap of that name is told apart.
    let bare = Desk::new(&["vda"]);
    qemu_img::bitmap_add(&bare.image("vda"), "theirs", None);
    bare.session(|domain| {
        let refused = domain
            .create(&spec("theirs"), CreateFlags::NONE)
            .unwrap_err();
        assert!(matches!(refused, Error::BitmapExists { .. }), "{refused}");
        assert_eq!(domain.rebuild(false).unwrap().checkpoints[0].name, "theirs");
    });
}

/// Row: a descriptor is made again without a look at the bitmaps.
#[test]
fn a_redefinition_is_checked_unless_the_caller_says_otherwise() {
    tidemark_fixtures::require_qemu!();
    let (desk, _) = chain(&["vda"]);
    let xml = desk.session(|domain| domain.lookup("c").unwrap().xml(Default::default()).unwrap());
    desk.session(|domain| drop(domain.delete("c", DeleteFlags::METADATA_ONLY).unwrap()));
    qemu_img::bitmap_disable(&desk.image("vda"), "c");
    desk.session(|domain| {
        let broken = domain.create_xml(&xml, CreateFlags::REDEFINE).unwrap_err();
        assert_eq!(broken.code(), ErrorCode::CheckpointInconsistent, "{broken}");
        assert!(!domain.lookup("c").unwrap().has_metadata().unwrap());
        let flags = CreateFlags::REDEFINE | CreateFlags::NO_VALIDATE;
        domain.create_xml(&xml, flags).unwrap();
        assert!(domain.lookup("c").unwrap().has_metadata().unwrap());
        let full = since(domain, "c", "vda").unwrap_err();
        assert_eq!(
            full.to_string(),
            "bitmap 'c' is not-recording",
            "believed, not blindly"
        );
    });
}

/// Row: the parent is not among the descriptors.
#[test]
fn a_descriptor_without_its_parent_is_a_detached_root_and_current_stays() {
    tidemark_fixtures::require_qemu!();
    let (desk, _) = chain(&["vda"]);
    std::fs::remove_file(desk.store().join("b.xml")).unwrap();
    desk.session(|domain| {
        // The images still know who it was.
        let c = domain.lookup("c").unwrap();
        assert_eq!(c.parent().unwrap().unwrap().name(), "b");
        assert_eq!(domain.current().unwrap().unwrap().name(), "c");
    });
    drop(desk);
    // Descriptors alone, of a machine whose images are gone.
    let bare = Desk::new(&["vda"]);
    std::fs::create_dir(bare.store()).unwrap();
    for (name, parent) in [("y", "x"), ("z", "y")] {
        let descriptor = Descriptor {
            name: name.to_owned(),
            created: Some(1),
            parent: Some(parent.to_owned()),
            ..Descriptor::default()
        };
        std::fs::write(
            bare.store().join(format!("{name}.xml")),
            descriptor.to_xml(),
        )
        .unwrap();
    }
    bare.session(|domain| {
        let listing = domain.list(ListOptions::default()).unwrap();
        let unknown =
            |p: &Problem| matches!(p, Problem::ParentUnknown { checkpoint } if checkpoint == "y");
        assert!(
            listing.problems.iter().any(unknown),
            "{:?}",
            listing.problems
        );
        assert_eq!(names(&domain.checkpoints(ListFlags::ROOTS).unwrap()), ["y"]);
    });
}

/// Row: a disk was added.
#[test]
fn a_disk_that_was_added_is_full_alone() {
    tidemark_fixtures::require_qemu!();
    let (mut desk, _) = chain(&["vda"]);
    desk.add("vdb", &CreateOptions::new(SIZE));
    assert!(desk.since("a", "vda").is_ok());
    assert_eq!(desk.since("a", "vdb").unwrap_err(), FullReason::NoRecord);
    desk.checkpoint("d");
    assert!(desk.since("d", "vdb").is_ok());
    assert!(desk.since("a", "vda").is_ok());
    assert!(desk.since("a", "vdb").is_err());
}

/// Row: a disk was removed; it may belong to somebody else by now.
#[test]
fn a_detached_disk_is_left_alone_and_a_strange_one_is_never_touched() {
    tidemark_fixtures::require_qemu!();
    let (mut desk, _) = chain(&["vda", "vdb"]);
    let detached = std::fs::read(desk.image("vdb")).unwrap();
    desk.detach("vdb");
    desk.session(|domain| {
        let deleted = domain.delete("b", DeleteFlags::NONE).unwrap();
        assert_eq!(deleted.warnings, []);
        assert!(since(domain, "a", "vda").is_ok());
    });
    assert_eq!(std::fs::read(desk.image("vdb")).unwrap(), detached);
    // Another machine has a disk of that name, with a bitmap and a checkpoint of that name.
    drop(desk);
    let other = {
        let desk = Desk::new(&["vdb"]);
        desk.checkpoint("b");
        std::fs::read(desk.image("vdb")).unwrap()
    };
    let (desk, _) = chain(&["vda", "vdb"]);
    std::fs::write(desk.image("vdb"), &other).unwrap();
    desk.session(|domain| {
        let asked = domain.changed_since("a", Default::default()).unwrap_err();
        assert_eq!(asked.code(), ErrorCode::CheckpointInconsistent, "{asked}");
        let refused = domain.delete("b", DeleteFlags::NONE).unwrap_err();
        assert_eq!(
            refused.code(),
            ErrorCode::CheckpointInconsistent,
            "{refused}"
        );
    });
    assert_eq!(std::fs::read(desk.image("vdb")).unwrap(), other);
}

/// Row: a disk was moved to another machine, which runs.
#[test]
fn a_disk_that_another_machine_runs_on_is_not_changed() {
    tidemark_fixtures::require_qemu!();
    let (desk, _) = chain(&["vda"]);
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&desk.image("vda"));
    let busy = FileStorage::open(&desk.image("vda"), true, Sharing::Exclusive).unwrap_err();
    assert_eq!(busy.kind(), std::io::ErrorKind::WouldBlock);
    // Looking past the lock is possible, changing is not.
    let storage = FileStorage::open(&desk.image("vda"), false, Sharing::ForceShare).unwrap();
    let image = Arc::new(Image::open(Box::new(storage), Default::default()).unwrap());
    let disk = Disk {
        name: "vda".to_owned(),
        image,
    };
    let domain = Domain::new(vec![disk], DomainOptions::default()).unwrap();
    assert_eq!(domain.checkpoints(ListFlags::NONE).unwrap().len(), 3);
    let refused = domain.delete("b", DeleteFlags::NONE).unwrap_err();
    assert!(matches!(refused, Error::DiskReadOnly(_)), "{refused}");
    daemon.close(&node);
    daemon.quit();
    close(domain);
}

/// Row: the disk has grown, or shrunk. QEMU cuts the bits of a frozen bitmap with the disk: where
/// that was more than nothing, its checksum says so and the disk is full.
#[test]
fn a_disk_that_qemu_resized_is_incremental_with_its_new_part_dirty_or_says_why_not() {
    tidemark_fixtures::require_qemu!();
    let (mut increments, mut full) = (0, 0);
    for size in [SIZE + (1 << 20), SIZE - (1 << 20), SIZE + 512, SIZE - 512] {
        let (desk, moments) = chain(&["vda"]);
        qemu_img::resize(&desk.image("vda"), size);
        desk.qemu_writes("vda", &["write -P 0x31 512k 64k"]);
        let now = desk.content("vda");
        for (name, before) in &moments {
            match desk.since(name, "vda") {
                Ok(bits) => {
                    covers(&bits, before, &now, &format!("{size}"));
                    increments += 1;
                }
                Err(reason) => {
                    let cut = matches!(
                        reason,
                        FullReason::BadBitmap {
                            health: Health::Changed,
                            ..
                        }
                    );
                    assert!(cut && size < SIZE, "{size}, since {name}: {reason}");
                    full += 1;
                }
            }
        }
        desk.session(|domain| {
            domain.create(&spec("d"), CreateFlags::NONE).unwrap();
            assert!(since(domain, "d", "vda").is_ok());
            domain.delete("b", DeleteFlags::NONE).unwrap();
        });
        if size > SIZE {
            desk.covers("a", "vda", &moments[0].1, &format!("{size}, after a fold"));
        }
        desk.assert_clean();
    }
    println!("{increments} increments over resizes, {full} full");
    assert!(increments >= 8);
}
