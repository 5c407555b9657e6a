//! Checkpoints of real images: create, list, delete, and who is whose parent.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{
    close, content, create, domain, domain_with, media, names, on_disks, since, spec, write,
};
use tidemark_checkpoint::{
    CreateFlags, CreateSpec, DeleteFlags, Disk, Domain, DomainOptions, Error, ErrorCode,
    FullReason, ListFlags, ListOptions, SinceOptions, Store, XmlFlags,
};
use tidemark_qcow2::chain::Health;

#[test]
fn each_new_checkpoint_is_the_child_of_the_current_one_and_becomes_current() {
    let media = media(2);
    let domain = domain(&media);
    assert!(!domain.has_current().unwrap());
    let first = create(&domain, "first");
    let second = create(&domain, "second");
    assert!(first.parent().unwrap().is_none());
    assert_eq!(
        second.parent().unwrap().unwrap().identity(),
        first.identity()
    );
    assert!(second.is_current().unwrap() && !first.is_current().unwrap());
    assert_eq!(domain.current().unwrap().unwrap().name(), "second");
    assert_eq!(
        names(&domain.checkpoints(ListFlags::ROOTS).unwrap()),
        ["first"]
    );
    assert_eq!(
        names(&domain.checkpoints(ListFlags::LEAVES).unwrap()),
        ["second"]
    );
    assert_eq!(names(&first.children(ListFlags::NONE).unwrap()), ["second"]);
}

#[test]
fn only_the_newest_bitmap_records_and_nothing_else_is_left_behind() {
    let media = media(2);
    let domain = domain(&media);
    for name in ["a", "b", "c"] {
        create(&domain, name);
    }
    for disk in domain.disks() {
        let mut bitmaps: Vec<_> = disk
            .image
            .bitmaps()
            .unwrap()
            .into_iter()
            .map(|info| (info.name, info.auto))
            .collect();
        bitmaps.sort();
        let expected = [("a", false), ("b", false), ("c", true)];
        assert_eq!(
            bitmaps,
            expected.map(|(name, auto)| (name.to_owned(), auto))
        );
    }
    assert_eq!(domain.verify().unwrap(), []);
}

#[test]
fn everything_is_found_again_when_the_images_are_opened_again() {
    let media = media(3);
    let before = {
        let domain = domain(&media);
        create(&domain, "a");
        write(&domain, "vdb", 5000, 10, 7);
        create(&domain, "b");
        let listing = domain
            .list(ListOptions {
                judge: true,
                ..ListOptions::default()
            })
            .unwrap();
        close(domain);
        listing
    };
    let domain = domain(&media);
    let after = domain
        .list(ListOptions {
            judge: true,
            ..ListOptions::default()
        })
        .unwrap();
    assert_eq!(after, before);
    assert!(after.problems.is_empty());
    assert!(since(&domain, "a", "vdb").unwrap().test(5000));
}

#[test]
fn a_deleted_middle_checkpoint_leaves_its_changes_to_its_predecessor() {
    let media = media(1);
    let domain = domain(&media);
    create(&domain, "a");
    let at_a = content(&domain, "vda");
    write(&domain, "vda", 0, 4096, 1);
    create(&domain, "b");
    write(&domain, "vda", 512 << 10, 4096, 2);
    create(&domain, "c");
    let deleted = domain.delete("b", DeleteFlags::NONE).unwrap();
    assert_eq!(deleted.checkpoints, ["b"]);
    assert!(deleted.warnings.is_empty());
    let bits = since(&domain, "a", "vda").unwrap();
    assert!(bits.test(0) && bits.test(512 << 10));
    common::assert_superset(&bits, &at_a, &content(&domain, "vda"), "since a");
    let c = domain.lookup("c").unwrap();
    assert_eq!(c.parent().unwrap().unwrap().name(), "a");
    assert!(c.is_current().unwrap());
    let names: Vec<_> = domain.disks()[0].image.bitmaps().unwrap();
    assert_eq!(names.len(), 2);
}

#[test]
fn deleting_the_current_checkpoint_makes_its_parent_record_again() {
    let media = media(2);
    let domain = domain(&media);
    create(&domain, "a");
    write(&domain, "vda", 0, 10, 1);
    create(&domain, "b");
    write(&domain, "vda", 100_000, 10, 1);
    domain.delete("b", DeleteFlags::NONE).unwrap();
    assert_eq!(domain.current().unwrap().unwrap().name(), "a");
    write(&domain, "vda", 200_000, 10, 1);
    let bits = since(&domain, "a", "vda").unwrap();
    for offset in [0, 100_000, 200_000] {
        assert!(bits.test(offset), "{offset}");
    }
    assert_eq!(domain.verify().unwrap(), []);
}

#[test]
fn deleting_the_last_checkpoint_leaves_no_bitmap_and_a_new_root_can_begin() {
    let media = media(2);
    let domain = domain(&media);
    create(&domain, "a");
    domain.delete("a", DeleteFlags::NONE).unwrap();
    assert!(domain.checkpoints(ListFlags::NONE).unwrap().is_empty());
    assert!(domain.disks()[0].image.bitmaps().unwrap().is_empty());
    assert!(!domain.has_current().unwrap());
    assert!(create(&domain, "a").parent().unwrap().is_none());
}

#[test]
fn children_only_makes_the_survivor_current_and_keeps_its_increment_right() {
    let media = media(1);
    let domain = domain(&media);
    for (name, offset) in [("a", 0), ("b", 100_000), ("c", 200_000), ("d", 300_000)] {
        create(&domain, name);
        write(&domain, "vda", offset, 10, 1);
    }
    let flags = DeleteFlags::CHILDREN | DeleteFlags::CHILDREN_ONLY;
    let mut gone = domain.delete("b", flags).unwrap().checkpoints;
    gone.sort();
    assert_eq!(gone, ["c", "d"]);
    assert_eq!(domain.current().unwrap().unwrap().name(), "b");
    let bits = since(&domain, "b", "vda").unwrap();
    assert!(
        [100_000, 200_000, 300_000]
            .iter()
            .all(|offset| bits.test(*offset))
    );
}

#[test]
fn invalid_delete_flags_change_nothing() {
    let media = media(1);
    let domain = domain(&media);
    create(&domain, "a");
    drop(domain);
    let before = media[0].to_bytes();
    let domain = common::domain(&media);
    for flags in [
        DeleteFlags::CHILDREN_ONLY,
        DeleteFlags::CHILDREN_ONLY | DeleteFlags::METADATA_ONLY,
    ] {
        let error = domain.delete("a", flags).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArg);
    }
    assert_eq!(
        domain.delete("zz", DeleteFlags::NONE).unwrap_err().code(),
        ErrorCode::NoDomainCheckpoint
    );
    assert_eq!(media[0].to_bytes(), before);
}

#[test]
fn unknown_flags_are_refused_and_libvirts_spelling_is_translated() {
    assert!(ListFlags::from_bits(1 << 6).is_err());
    assert!(CreateFlags::from_bits(1 << 31).is_err());
    assert!(DeleteFlags::from_bits(8).is_err());
    assert!(XmlFlags::from_bits(1 << 9).is_err());
    let all = DeleteFlags::CHILDREN | DeleteFlags::CHILDREN_ONLY;
    assert_eq!(DeleteFlags::from_libvirt(0b100).unwrap(), all);
    assert_eq!(
        DeleteFlags::from_libvirt(0b110).unwrap(),
        all | DeleteFlags::METADATA_ONLY
    );
    assert!(DeleteFlags::from_libvirt(0b101).is_err());
    assert_eq!(DeleteFlags::from_libvirt(0b011).unwrap().bits(), 0b011);
}

#[test]
fn a_name_that_is_taken_by_a_checkpoint_or_a_foreign_bitmap_is_refused() {
    let media = media(1);
    let domain = domain(&media);
    create(&domain, "a");
    let again = domain.create(&spec("a"), CreateFlags::NONE).unwrap_err();
    assert!(matches!(again, Error::NameTaken(_)));
    let image = &domain.disks()[0].image;
    image
        .update(|update| {
            let bits = update.blank(tidemark_bitmap::Granularity::DEFAULT)?;
            update.put("theirs", bits, false)
        })
        .unwrap();
    let foreign = domain
        .create(&spec("theirs"), CreateFlags::NONE)
        .unwrap_err();
    assert!(matches!(foreign, Error::BitmapExists { .. }));
    assert!(domain.create(&spec("../x"), CreateFlags::NONE).is_err());
    let unnamed = domain
        .create(&CreateSpec::default(), CreateFlags::NONE)
        .unwrap();
    let second = domain
        .create(&CreateSpec::default(), CreateFlags::NONE)
        .unwrap();
    assert!(unnamed.name().parse::<u64>().is_ok());
    assert_ne!(unnamed.name(), second.name());
}

#[test]
fn disks_are_chosen_by_name_and_wrong_choices_are_refused() {
    let media = media(2);
    let domain = domain(&media);
    let refused = |disks: &[&str]| domain.create(&on_disks("x", disks), CreateFlags::NONE);
    assert!(matches!(
        refused(&["vdz"]).unwrap_err(),
        Error::UnknownDisk(_)
    ));
    assert!(matches!(
        refused(&["vda", "vda"]).unwrap_err(),
        Error::DoubledDisk(_)
    ));
    assert!(matches!(refused(&[]).unwrap_err(), Error::NoDisks));
    let info = domain
        .create(&on_disks("x", &["vdb"]), CreateFlags::NONE)
        .unwrap()
        .info(ListOptions::default())
        .unwrap();
    assert_eq!(info.disks.len(), 1);
    assert_eq!(info.disks[0].disk, "vdb");
    assert!(domain.disks()[0].image.bitmaps().unwrap().is_empty());
}

#[test]
fn a_disk_that_skipped_a_checkpoint_answers_from_its_nearest_ancestor() {
    let media = media(2);
    let domain = domain(&media);
    create(&domain, "a");
    write(&domain, "vda", 0, 10, 1);
    domain
        .create(&on_disks("b", &["vdb"]), CreateFlags::NONE)
        .unwrap();
    write(&domain, "vda", 400_000, 10, 1);
    assert_eq!(domain.current().unwrap().unwrap().name(), "b");
    let changes = domain
        .lookup("b")
        .unwrap()
        .changed_since(SinceOptions::default())
        .unwrap();
    assert_eq!(changes[0].base.as_ref().unwrap().1, "a");
    assert_eq!(changes[1].base.as_ref().unwrap().1, "b");
    let bits = since(&domain, "b", "vda").unwrap();
    assert!(bits.test(0) && bits.test(400_000));
    assert_eq!(domain.verify().unwrap(), []);
    create(&domain, "c");
    assert_eq!(
        domain
            .lookup("c")
            .unwrap()
            .parent()
            .unwrap()
            .unwrap()
            .name(),
        "b"
    );
    domain.delete("b", DeleteFlags::NONE).unwrap();
    assert_eq!(
        domain
            .lookup("c")
            .unwrap()
            .parent()
            .unwrap()
            .unwrap()
            .name(),
        "a"
    );
    assert_eq!(domain.verify().unwrap(), []);
}

#[test]
fn a_disk_that_joined_later_is_full_alone() {
    let media = media(2);
    {
        let domain = domain(&media[..1]);
        create(&domain, "a");
    }
    let domain = domain(&media);
    assert_eq!(
        since(&domain, "a", "vdb").unwrap_err(),
        FullReason::NoRecord
    );
    assert!(since(&domain, "a", "vda").is_ok());
    create(&domain, "b");
    assert_eq!(
        since(&domain, "a", "vdb").unwrap_err(),
        FullReason::NotOnDisk
    );
    assert!(since(&domain, "b", "vdb").is_ok());
}

#[test]
fn a_checkpoint_that_is_no_ancestor_of_the_current_one_is_not_answered() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(1);
    let options = DomainOptions {
        store: Some(Store::new(directory.path().join("store"))),
        ..DomainOptions::default()
    };
    let domain = domain_with(&media, options);
    create(&domain, "a");
    let b = create(&domain, "b");
    let xml = domain.lookup("a").unwrap().xml(XmlFlags::NONE).unwrap();
    let flags = CreateFlags::REDEFINE | CreateFlags::CURRENT;
    domain.create_xml(&xml, flags).unwrap();
    assert_eq!(domain.current().unwrap().unwrap().name(), "a");
    let error = b.changed_since(SinceOptions::default()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::CheckpointInconsistent);
    write(&domain, "vda", 77_777, 1, 9);
    assert!(
        since(&domain, "a", "vda").unwrap().test(77_777),
        "b's bitmap still records for a"
    );
    let c = create(&domain, "c");
    assert_eq!(c.parent().unwrap().unwrap().name(), "a");
    domain.delete("b", DeleteFlags::NONE).unwrap();
    assert!(
        since(&domain, "a", "vda").unwrap().test(77_777),
        "folded into a"
    );
    assert_eq!(domain.verify().unwrap(), []);
}

#[test]
fn a_handle_keeps_its_domain_alive_and_knows_when_its_checkpoint_is_gone() {
    let media = media(1);
    let handle = {
        let domain: Domain = domain(&media);
        create(&domain, "a")
    };
    fn shareable<T: Clone + Send + Sync>(_: &T) {}
    shareable(&handle);
    assert!(handle.is_current().unwrap());
    let domain = handle.domain().clone();
    domain.delete("a", DeleteFlags::NONE).unwrap();
    create(&domain, "a");
    let error = handle.is_current().unwrap_err();
    assert_eq!(
        error.code(),
        ErrorCode::NoDomainCheckpoint,
        "the name is another's now"
    );
}

#[test]
fn a_read_only_domain_lists_and_compares_but_changes_nothing() {
    let media = media(1);
    {
        let domain = domain(&media);
        create(&domain, "a");
        write(&domain, "vda", 9000, 10, 3);
        close(domain);
    }
    let before = media[0].to_bytes();
    let disk = Disk {
        name: "vda".to_owned(),
        image: media[0].open_read_only(),
    };
    let domain = Domain::new(vec![disk], DomainOptions::default()).unwrap();
    assert!(since(&domain, "a", "vda").unwrap().test(9000));
    assert_eq!(domain.verify().unwrap(), []);
    assert_eq!(domain.rebuild(false).unwrap().checkpoints.len(), 1);
    assert!(domain.create(&spec("b"), CreateFlags::NONE).is_err());
    assert!(matches!(
        domain.delete("a", DeleteFlags::NONE),
        Err(Error::DiskReadOnly(_))
    ));
    assert_eq!(media[0].to_bytes(), before);
}

#[test]
fn pruning_keeps_the_newest_and_every_answer_right() {
    let media = media(1);
    let domain = domain(&media);
    let mut moments = Vec::new();
    for number in 0..6_u8 {
        create(&domain, &format!("c{number}"));
        moments.push(content(&domain, "vda"));
        write(&domain, "vda", u64::from(number) * 70_000, 10, number + 1);
    }
    let gone = domain.prune(2).unwrap().checkpoints;
    assert_eq!(gone, ["c0", "c1", "c2", "c3"]);
    let now = content(&domain, "vda");
    for number in [4, 5] {
        let bits = since(&domain, &format!("c{number}"), "vda").unwrap();
        common::assert_superset(&bits, &moments[number], &now, "after prune");
    }
    assert_eq!(
        names(&domain.checkpoints(ListFlags::ROOTS).unwrap()),
        ["c4"]
    );
    assert!(
        domain
            .prune(0)
            .unwrap()
            .checkpoints
            .iter()
            .all(|name| name != "c5")
    );
}

#[test]
fn sizes_in_a_listing_are_what_changed_since() {
    let media = media(1);
    let domain = domain(&media);
    for name in ["a", "b", "c"] {
        create(&domain, name);
        write(&domain, "vda", 123_456, 5000, 1);
    }
    let options = ListOptions {
        sizes: true,
        judge: true,
        ..ListOptions::default()
    };
    for info in domain.list(options).unwrap().checkpoints {
        let bits = since(&domain, &info.name, "vda").unwrap();
        assert_eq!(
            info.disks[0].dirty_bytes,
            Some(bits.dirty_bytes()),
            "{}",
            info.name
        );
        assert_eq!(info.disks[0].health, Health::Ok);
    }
}
