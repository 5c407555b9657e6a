//! The power fails at every single write of an operation over several disks: afterwards the
//! checkpoint is on all disks or on none, and no changed byte is missed.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{Fuse, Medium, content, create, domain, on_disks, since, spec, write};
use tidemark_checkpoint::{
    CreateFlags, DeleteFlags, Domain, Error, ListFlags, ListOptions, Problem,
};

/// Three disks with two checkpoints and known changes, and their contents at the second.
fn prepared() -> (Vec<Medium>, Vec<Vec<u8>>) {
    let fuse = Fuse::new();
    let media: Vec<Medium> = (0..3).map(|_| Medium::new(&fuse)).collect();
    let domain = domain(&media);
    create(&domain, "a");
    for (disk, value) in [("vda", 1), ("vdb", 2), ("vdc", 3)] {
        write(&domain, disk, 40_000, 5000, value);
    }
    create(&domain, "b");
    let at_b = domain
        .disks()
        .iter()
        .map(|disk| content(&domain, &disk.name))
        .collect();
    for (disk, value) in [("vda", 4), ("vdb", 5), ("vdc", 6)] {
        write(&domain, disk, 400_000, 5000, value);
    }
    (media, at_b)
}

/// Runs an operation on copies with the power failing after 0, 1, 2, ... writes, until it
/// succeeds; after each failure `examine` sees the disks as they were left.
fn at_every_write(
    media: &[Medium],
    operation: impl Fn(&Domain) -> Result<(), Error>,
    examine: impl Fn(&[Medium], &str),
) {
    for writes in 0..10_000 {
        let fuse = Fuse::new();
        let copies: Vec<Medium> = media.iter().map(|medium| medium.copy(&fuse)).collect();
        let domain = domain(&copies);
        fuse.burn_after(writes);
        let outcome = operation(&domain);
        drop(domain);
        let survived = Fuse::new();
        let left: Vec<Medium> = copies.iter().map(|medium| medium.copy(&survived)).collect();
        examine(&left, &format!("after {writes} writes"));
        if outcome.is_ok() && !fuse.is_burnt() {
            assert!(writes > 3, "the harness can fail an operation");
            return;
        }
    }
    panic!("the operation never succeeded");
}

fn on_all_or_none(domain: &Domain, name: &str, when: &str) {
    let have: Vec<bool> = domain
        .disks()
        .iter()
        .map(|disk| {
            disk.image
                .bitmaps()
                .unwrap()
                .iter()
                .any(|info| info.name == name)
        })
        .collect();
    assert!(have.iter().all(|has| *has == have[0]), "{when}: {have:?}");
    let listed = domain.lookup(name).is_ok();
    assert_eq!(listed, have[0], "{when}");
}

#[test]
fn a_creation_that_lost_power_is_on_all_disks_or_on_none() {
    let (media, at_b) = prepared();
    at_every_write(
        &media,
        |domain| domain.create(&spec("c"), CreateFlags::NONE).map(drop),
        |left, when| {
            let domain = domain(left);
            // Readers resolve in memory: the answer is right before anything is mended.
            let shown = domain.lookup("c").is_ok();
            let current = domain.current().unwrap().unwrap();
            assert_eq!(current.name(), if shown { "c" } else { "b" }, "{when}");
            for (disk, before) in domain.disks().iter().zip(&at_b) {
                let bits =
                    since(&domain, "b", &disk.name).unwrap_or_else(|r| panic!("{when}: {r}"));
                common::assert_superset(&bits, before, &content(&domain, &disk.name), when);
                assert!(since(&domain, "a", &disk.name).is_ok(), "{when}");
            }
            // The next operation settles it for good.
            create(&domain, "d");
            on_all_or_none(&domain, "c", when);
            assert_eq!(
                domain.lookup("c").is_ok(),
                shown,
                "{when}: what was shown stays"
            );
            for (disk, before) in domain.disks().iter().zip(&at_b) {
                write(&domain, &disk.name, 800_000, 10, 9);
                let bits = since(&domain, "b", &disk.name).unwrap();
                common::assert_superset(&bits, before, &content(&domain, &disk.name), when);
            }
            assert_eq!(domain.verify().unwrap(), [], "{when}");
        },
    );
}

#[test]
fn a_creation_on_one_disk_lost_power_and_is_there_or_not() {
    let (media, _) = prepared();
    at_every_write(
        &media,
        |domain| {
            domain
                .create(&on_disks("c", &["vdb"]), CreateFlags::NONE)
                .map(drop)
        },
        |left, when| {
            let domain = domain(left);
            let expected = if domain.lookup("c").is_ok() { "c" } else { "b" };
            assert_eq!(
                domain.current().unwrap().unwrap().name(),
                expected,
                "{when}"
            );
            let problems = domain.verify().unwrap();
            assert_eq!(problems, [], "{when}: one header write needs no repair");
        },
    );
}

#[test]
fn a_deletion_that_lost_power_is_finished_by_repeating_it() {
    let (media, at_b) = prepared();
    {
        let domain = domain(&media);
        create(&domain, "c");
        write(&domain, "vda", 900_000, 10, 7);
    }
    for name in ["a", "b", "c"] {
        at_every_write(
            &media,
            |domain| domain.delete(name, DeleteFlags::NONE).map(drop),
            |left, when| {
                let domain = domain(left);
                if name != "b" {
                    for (disk, before) in domain.disks().iter().zip(&at_b) {
                        let bits = since(&domain, "b", &disk.name).unwrap();
                        common::assert_superset(&bits, before, &content(&domain, &disk.name), when);
                    }
                }
                if domain.lookup(name).is_ok() {
                    domain.delete(name, DeleteFlags::NONE).unwrap();
                }
                assert!(domain.lookup(name).is_err(), "{when}");
                assert_eq!(domain.verify().unwrap(), [], "{name} {when}");
                assert_eq!(
                    domain.checkpoints(ListFlags::NONE).unwrap().len(),
                    2,
                    "{when}"
                );
            },
        );
    }
}

#[test]
fn adopting_that_lost_power_is_finished_by_repeating_it() {
    let (media, _) = prepared();
    {
        let domain = domain(&media);
        domain
            .set_scheme(tidemark_qcow2::chain::Scheme::Cumulative)
            .unwrap();
        for disk in domain.disks() {
            disk.image
                .update(|update| -> Result<(), tidemark_qcow2::Error> {
                    update.set_record(None);
                    Ok(())
                })
                .unwrap();
        }
        assert!(domain.checkpoints(ListFlags::NONE).unwrap().is_empty());
    }
    at_every_write(
        &media,
        |domain| domain.adopt(false).map(drop),
        |left, when| {
            let domain = domain(left);
            let rebuilt = domain.adopt(false).unwrap();
            assert_eq!(rebuilt.checkpoints.len(), 2, "{when}");
            assert_eq!(
                domain
                    .lookup("b")
                    .unwrap()
                    .parent()
                    .unwrap()
                    .unwrap()
                    .name(),
                "a"
            );
            assert_eq!(domain.verify().unwrap(), [], "{when}");
            let bytes: Vec<_> = left.iter().map(Medium::to_bytes).collect();
            domain.adopt(false).unwrap();
            assert_eq!(
                left.iter().map(Medium::to_bytes).collect::<Vec<_>>(),
                bytes,
                "{when}"
            );
        },
    );
}

/// Disks whose creation of `c` was interrupted after the first was prepared and before the
/// decision.
fn undecided() -> Vec<Medium> {
    let (media, _) = prepared();
    let found = std::cell::RefCell::new(None);
    at_every_write(
        &media,
        |domain| domain.create(&spec("c"), CreateFlags::NONE).map(drop),
        |left, _| {
            let domain = domain(left);
            let problems = domain.list(ListOptions::default()).unwrap().problems;
            let undone =
                |problem: &Problem| matches!(problem, Problem::Interrupted { decided: false, .. });
            if problems.iter().filter(|problem| undone(problem)).count() == 3 {
                found.borrow_mut().get_or_insert_with(|| left.to_vec());
            }
        },
    );
    found.into_inner().unwrap()
}

#[test]
fn without_the_deciding_disk_readers_say_undecided_and_writers_are_refused() {
    let media = undecided();
    let before: Vec<_> = media.iter().map(Medium::to_bytes).collect();
    let domain = domain(&media[1..]);
    // The disks are named by their place here; the decider's name is vda in both.
    drop(domain);
    let disks = [("vdb", 1), ("vdc", 2)].map(|(name, number)| tidemark_checkpoint::Disk {
        name: name.to_owned(),
        image: media[number].open(),
    });
    let domain = Domain::new(
        disks.to_vec(),
        tidemark_checkpoint::DomainOptions::default(),
    )
    .unwrap();
    let problems = domain.list(ListOptions::default()).unwrap().problems;
    let undecided = |problem: &Problem| matches!(problem, Problem::Undecided { .. });
    assert_eq!(
        problems.iter().filter(|problem| undecided(problem)).count(),
        2
    );
    assert!(since(&domain, "b", "vdb").unwrap().test(400_000));
    for refused in [
        domain.create(&spec("d"), CreateFlags::NONE).map(drop),
        domain.delete("a", DeleteFlags::NONE).map(drop),
    ] {
        assert!(matches!(refused, Err(Error::Undecided { .. })));
    }
    assert_eq!(
        media.iter().map(Medium::to_bytes).collect::<Vec<_>>(),
        before
    );
    domain.undo_undecided().unwrap();
    create(&domain, "d");
    assert_eq!(domain.verify().unwrap(), []);
}

#[test]
fn a_tentative_checkpoint_blocks_the_chain_until_committed_or_abandoned() {
    let (media, at_b) = prepared();
    for commit in [true, false] {
        let fuse = Fuse::new();
        let media: Vec<Medium> = media.iter().map(|medium| medium.copy(&fuse)).collect();
        {
            let domain = domain(&media);
            let tentative = domain.prepare(&spec("c"), CreateFlags::NONE).unwrap();
            assert_eq!(tentative.disks().collect::<Vec<_>>(), ["vda", "vdb", "vdc"]);
            write(&domain, "vda", 950_000, 10, 8);
            // The backup is killed here.
        }
        let domain = domain(&media);
        assert!(domain.lookup("c").is_err());
        let refused = domain.create(&spec("d"), CreateFlags::NONE).unwrap_err();
        assert!(refused.to_string().contains("'c'"), "{refused}");
        assert!(since(&domain, "b", "vda").unwrap().test(950_000));
        let tentative = domain.tentative().unwrap().unwrap();
        assert_eq!(tentative.name(), "c");
        match commit {
            true => {
                tentative.commit().unwrap();
                assert!(since(&domain, "c", "vda").unwrap().test(950_000));
            }
            false => {
                tentative.abandon().unwrap();
                assert!(domain.lookup("c").is_err());
            }
        }
        assert!(domain.tentative().unwrap().is_none());
        let bits = since(&domain, "b", "vda").unwrap();
        common::assert_superset(&bits, &at_b[0], &content(&domain, "vda"), "since b");
        create(&domain, "d");
        assert_eq!(domain.verify().unwrap(), []);
    }
}

#[test]
fn a_failed_creation_is_taken_back_on_the_disks_that_were_prepared() {
    let (media, _) = prepared();
    // The third disk fails alone: its medium has a fuse of its own.
    let good = Fuse::new();
    let bad = Fuse::new();
    let copies = [
        media[0].copy(&good),
        media[1].copy(&good),
        media[2].copy(&bad),
    ];
    let domain = domain(&copies);
    bad.burn_after(0);
    assert!(domain.create(&spec("c"), CreateFlags::NONE).is_err());
    assert!(domain.lookup("c").is_err());
    for disk in &domain.disks()[..2] {
        assert!(
            disk.image
                .bitmaps()
                .unwrap()
                .iter()
                .all(|info| info.name != "c")
        );
    }
}
