//! What other programs do to the bitmaps of a chain: the state says it, and an increment is never
//! wrong for it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{close, content, create, domain, media, on_disks, since, spec, write};
use tidemark_bitmap::{Bitmap, Granularity};
use tidemark_checkpoint::{
    CreateFlags, DeleteFlags, DiskDelta, Domain, Evidence, FullReason, ListFlags, ListOptions,
    Outcome, Problem, SinceOptions,
};
use tidemark_qcow2::chain::{Health, Scheme};
use tidemark_qcow2::{Error, Update};

/// Changes the bitmaps of the first disk as another program would, without a word in the record.
fn tamper(domain: &Domain, change: impl FnOnce(&mut Update<'_>) -> Result<(), Error>) {
    domain.disks()[0].image.update(change).unwrap();
}

fn clean(update: &Update<'_>) -> Bitmap {
    update
        .blank(Granularity::from_bytes(4096).unwrap())
        .unwrap()
}

fn health(domain: &Domain, name: &str) -> Health {
    let options = ListOptions {
        judge: true,
        ..ListOptions::default()
    };
    domain.lookup(name).unwrap().info(options).unwrap().disks[0].health
}

/// Checkpoints a, b, c on one disk with a change after each.
fn chain() -> (Vec<common::Medium>, Domain) {
    let media = media(1);
    let domain = domain(&media);
    for (name, offset) in [("a", 0), ("b", 300_000), ("c", 600_000)] {
        create(&domain, name);
        write(&domain, "vda", offset, 10, 1);
    }
    (media, domain)
}

fn assert_full(domain: &Domain, name: &str, health: Health) {
    match since(domain, name, "vda") {
        Err(FullReason::BadBitmap { health: found, .. }) => assert_eq!(found, health, "{name}"),
        other => panic!("since {name}: {other:?}"),
    }
}

#[test]
fn a_removed_bitmap_is_missing_and_only_what_needs_it_is_full() {
    let (_media, domain) = chain();
    tamper(&domain, |update| update.remove("b"));
    assert_eq!(health(&domain, "b"), Health::Missing);
    assert_full(&domain, "a", Health::Missing);
    assert_full(&domain, "b", Health::Missing);
    assert!(since(&domain, "c", "vda").unwrap().test(600_000));
    let rebuilt = domain.rebuild(false).unwrap();
    assert_eq!(
        rebuilt.checkpoints.len(),
        3,
        "a record whose bitmap vanished is kept"
    );
    assert!(!rebuilt.problems.is_empty());
}

#[test]
fn a_recording_bitmap_that_was_removed_and_added_again_is_reset() {
    let (_media, domain) = chain();
    tamper(&domain, |update| {
        let bits = clean(update);
        update.remove("c")?;
        update.put("c", bits, true)
    });
    assert_eq!(health(&domain, "c"), Health::Reset);
    for name in ["a", "b", "c"] {
        assert_full(&domain, name, Health::Reset);
    }
    write(&domain, "vda", 600_000, 10, 2);
    for name in ["a", "b", "c"] {
        assert!(since(&domain, name, "vda").is_err(), "the loss sticks");
    }
    create(&domain, "d");
    assert!(
        since(&domain, "d", "vda").is_ok(),
        "the next checkpoint begins anew"
    );
    assert!(since(&domain, "c", "vda").is_err());
}

#[test]
fn a_frozen_bitmap_whose_bits_were_changed_is_changed() {
    let (_media, domain) = chain();
    tamper(&domain, |update| {
        let mut bits = update.load("b")?;
        bits.clear_all();
        update.put("b", bits, false)
    });
    assert_eq!(health(&domain, "b"), Health::Changed);
    assert_full(&domain, "a", Health::Changed);
    assert!(since(&domain, "c", "vda").is_ok());
}

#[test]
fn a_recording_bitmap_that_was_disabled_does_not_record() {
    let (_media, domain) = chain();
    tamper(&domain, |update| update.set_recording("c", false));
    assert_eq!(health(&domain, "c"), Health::NotRecording);
    assert_full(&domain, "c", Health::NotRecording);
}

#[test]
fn deleting_a_checkpoint_whose_bitmap_is_gone_succeeds_and_moves_the_loss() {
    let (_media, domain) = chain();
    tamper(&domain, |update| update.remove("b"));
    let deleted = domain.delete("b", DeleteFlags::NONE).unwrap();
    assert_eq!(deleted.warnings.len(), 1);
    assert_eq!(deleted.warnings[0].moved_to.as_deref(), Some("a"));
    assert_eq!(health(&domain, "a"), Health::Lost);
    assert_full(&domain, "a", Health::Lost);
    assert!(since(&domain, "c", "vda").is_ok());
    write(&domain, "vda", 700_000, 10, 1);
    create(&domain, "d");
    assert_full(&domain, "a", Health::Lost);
    assert!(since(&domain, "c", "vda").unwrap().test(700_000));
}

#[test]
fn a_fold_into_a_changed_bitmap_does_not_heal_it() {
    let (_media, domain) = chain();
    tamper(&domain, |update| {
        let bits = clean(update);
        update.put("a", bits, false)
    });
    domain.delete("b", DeleteFlags::NONE).unwrap();
    assert!(since(&domain, "a", "vda").is_err());
    assert_eq!(health(&domain, "a"), Health::Changed);
}

#[test]
fn deleting_a_lost_recording_bitmap_leaves_the_predecessor_recording_and_lost() {
    let (_media, domain) = chain();
    tamper(&domain, |update| update.remove("c"));
    domain.delete("c", DeleteFlags::NONE).unwrap();
    assert_full(&domain, "b", Health::Lost);
    create(&domain, "d");
    write(&domain, "vda", 10_000, 10, 2);
    assert!(since(&domain, "d", "vda").unwrap().test(10_000));
    assert_full(&domain, "a", Health::Lost);
}

#[test]
fn after_a_qemu_crash_the_frozen_come_back_and_the_recording_one_is_lost() {
    let (media, domain) = chain();
    close(domain);
    media[0].mark_bitmaps_in_use();
    let domain = common::domain(&media);
    for name in ["a", "b", "c"] {
        assert_full(&domain, name, Health::Inconsistent);
    }
    let outcomes: Vec<_> = domain
        .recover()
        .unwrap()
        .into_iter()
        .map(|r| (r.checkpoint, r.outcome))
        .collect();
    let expected = [
        ("a", Outcome::Rewritten),
        ("b", Outcome::Rewritten),
        ("c", Outcome::Restarted),
    ];
    assert_eq!(
        outcomes,
        expected.map(|(name, outcome)| (name.to_owned(), outcome))
    );
    assert_eq!(health(&domain, "a"), Health::Recovered);
    assert_eq!(health(&domain, "c"), Health::Lost);
    assert!(since(&domain, "b", "vda").is_err());
    let bytes = media[0].to_bytes();
    let again = domain.recover().unwrap();
    assert!(
        again
            .iter()
            .all(|r| matches!(r.outcome, Outcome::Intact | Outcome::Lost))
    );
    assert_eq!(media[0].to_bytes(), bytes, "a second call changes nothing");
    assert!(
        domain.disks()[0]
            .image
            .bitmaps()
            .unwrap()
            .iter()
            .all(|info| !info.in_use)
    );
    // A comparison with a backup fills the gap.
    let mut changed = domain.disks()[0].image.load_bitmap("c").unwrap();
    changed.mark(600_000..600_010).unwrap();
    domain.reinstate("c", "vda", &changed).unwrap();
    let bits = since(&domain, "a", "vda").unwrap();
    assert!(
        [0, 300_000, 600_000]
            .iter()
            .all(|offset| bits.test(*offset))
    );
    assert_eq!(domain.verify().unwrap(), []);
}

#[test]
fn a_frozen_bitmap_in_use_with_other_content_is_lost() {
    let (media, domain) = chain();
    tamper(&domain, |update| {
        let bits = clean(update);
        update.put("a", bits, false)
    });
    close(domain);
    media[0].mark_bitmaps_in_use();
    let domain = common::domain(&media);
    let recovered = domain.recover().unwrap();
    assert_eq!(recovered[0].outcome, Outcome::Lost);
    assert_eq!(recovered[1].outcome, Outcome::Rewritten);
}

#[test]
fn a_fold_of_frozen_bitmaps_that_a_dead_qemu_holds_keeps_them_whole() {
    let (media, domain) = chain();
    close(domain);
    media[0].mark_bitmaps_in_use();
    let domain = common::domain(&media);
    let deleted = domain.delete("b", DeleteFlags::NONE).unwrap();
    assert!(deleted.warnings.is_empty(), "{:?}", deleted.warnings);
    assert_eq!(health(&domain, "a"), Health::Recovered);
}

#[test]
fn a_changed_directory_is_told_and_every_name_judged_alone() {
    let (_media, domain) = chain();
    tamper(&domain, |update| {
        let bits = clean(update);
        update.put("theirs", bits, true)?;
        update.remove("a")
    });
    let rebuilt = domain.rebuild(false).unwrap();
    let states: Vec<_> = rebuilt
        .checkpoints
        .iter()
        .map(|info| info.disks[0].health)
        .collect();
    assert_eq!(states, [Health::Missing, Health::Ok, Health::Ok]);
    let evidence = rebuilt.checkpoints[1].disks[0].evidence;
    // The engine renews the digest with every commit of its own; this change was one.
    assert!(matches!(
        evidence,
        Evidence::Record | Evidence::ChangedDirectory
    ));
    let foreign = |problem: &Problem| matches!(problem, Problem::Foreign { bitmap, .. } if bitmap == "theirs");
    assert!(rebuilt.problems.iter().any(foreign));
    domain.adopt(false).unwrap();
    assert_eq!(health(&domain, "a"), Health::Missing);
}

/// Turns the chain into what libvirt leaves: recording bitmaps and no record.
fn as_libvirt_leaves_it(domain: &Domain) {
    domain.set_scheme(Scheme::Cumulative).unwrap();
    for disk in domain.disks() {
        disk.image
            .update(|update| -> Result<(), Error> {
                update.set_record(None);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn recording_bitmaps_without_a_record_are_ordered_by_inclusion_and_labelled() {
    let (_media, domain) = chain();
    let at_b = content(&domain, "vda");
    as_libvirt_leaves_it(&domain);
    assert!(domain.checkpoints(ListFlags::NONE).unwrap().is_empty());
    let rebuilt = domain.rebuild(false).unwrap();
    let parents: Vec<_> = rebuilt
        .checkpoints
        .iter()
        .map(|info| (info.name.as_str(), info.parent.as_deref()))
        .collect();
    assert_eq!(parents, [("a", None), ("b", Some("a")), ("c", Some("b"))]);
    for info in &rebuilt.checkpoints {
        assert!(info.disks[0].inferred);
        assert_eq!(info.disks[0].health, Health::Inferred);
        assert_eq!(info.disks[0].evidence, Evidence::Inclusion);
        assert_eq!(info.current, info.name == "c");
    }
    domain.adopt(false).unwrap();
    assert_eq!(domain.current().unwrap().unwrap().name(), "c");
    write(&domain, "vda", 900_000, 10, 4);
    let bits = since(&domain, "b", "vda").unwrap();
    common::assert_superset(&bits, &at_b, &content(&domain, "vda"), "since b");
    assert!(
        bits.test(300_000) && !bits.test(0),
        "b alone answers since b"
    );
}

#[test]
fn disabled_bitmaps_without_a_record_serve_only_if_trusted() {
    for trusted in [false, true] {
        let (_media, domain) = chain();
        tamper(&domain, |update| {
            update.set_record(None);
            Ok(())
        });
        let rebuilt = domain.rebuild(trusted).unwrap();
        assert_eq!(rebuilt.checkpoints.len(), 3);
        let sizes = rebuilt
            .checkpoints
            .iter()
            .map(|info| info.disks[0].dirty_bytes);
        assert!(sizes.clone().all(|size| size.is_some() == trusted));
        domain.adopt(trusted).unwrap();
        let current = domain.current().unwrap().unwrap();
        let changes = current.changed_since(SinceOptions::default()).unwrap();
        match &changes[0].delta {
            DiskDelta::Incremental(bits) => {
                assert!(trusted);
                assert!(
                    [0, 300_000, 600_000]
                        .iter()
                        .all(|offset| bits.test(*offset))
                );
            }
            DiskDelta::Full { .. } => assert!(!trusted),
        }
        let fresh = create(&domain, "fresh");
        assert_eq!(
            fresh.parent().unwrap().unwrap().identity(),
            current.identity()
        );
        assert!(since(&domain, "fresh", "vda").is_ok());
    }
}

#[test]
fn bitmaps_that_do_not_contain_each_other_have_no_order() {
    let media = media(1);
    let domain = domain(&media);
    tamper(&domain, |update| {
        for (name, offset) in [("one", 0), ("two", 100_000)] {
            let mut bits = clean(update);
            bits.mark(offset..offset + 1).unwrap();
            update.put(name, bits, true)?;
        }
        Ok(())
    });
    let rebuilt = domain.rebuild(false).unwrap();
    assert!(
        rebuilt
            .problems
            .iter()
            .any(|p| matches!(p, Problem::NoOrder { .. }))
    );
    assert!(
        rebuilt
            .checkpoints
            .iter()
            .all(|info| info.parent.is_none() && !info.current)
    );
}

#[test]
fn an_image_with_recording_bitmaps_of_others_starts_a_cumulative_chain() {
    let media = media(1);
    let domain = domain(&media);
    tamper(&domain, |update| {
        let bits = clean(update);
        update.put("theirs", bits, true)
    });
    create(&domain, "a");
    write(&domain, "vda", 0, 10, 1);
    create(&domain, "b");
    write(&domain, "vda", 500_000, 10, 1);
    assert!(
        domain.disks()[0]
            .image
            .bitmaps()
            .unwrap()
            .iter()
            .all(|info| info.auto)
    );
    let bits = since(&domain, "a", "vda").unwrap();
    assert!(bits.test(0) && bits.test(500_000));
    tamper(&domain, |update| update.remove("b"));
    assert!(
        since(&domain, "a", "vda").is_ok(),
        "one bitmap alone answers"
    );
    domain.delete("b", DeleteFlags::NONE).unwrap();
    assert!(
        since(&domain, "a", "vda").is_ok(),
        "no loss moves in this scheme"
    );
}

#[test]
fn changing_the_scheme_keeps_every_answer_right() {
    let media = media(2);
    let domain = domain(&media);
    let mut moments = Vec::new();
    for (name, offset) in [("a", 0), ("b", 300_000), ("c", 600_000)] {
        create(&domain, name);
        moments.push((name, content(&domain, "vda")));
        write(&domain, "vda", offset, 10, 1);
    }
    for scheme in [Scheme::Cumulative, Scheme::Cumulative, Scheme::Intervals] {
        domain.set_scheme(scheme).unwrap();
        write(&domain, "vda", 800_000, 10, 7);
        for (name, before) in &moments {
            let bits = since(&domain, name, "vda").unwrap();
            common::assert_superset(&bits, before, &content(&domain, "vda"), name);
        }
        assert_eq!(domain.verify().unwrap(), []);
    }
}

#[test]
fn the_same_name_on_disks_of_different_origin_is_ambiguous_not_merged() {
    let media = media(2);
    for medium in &media {
        let domain = domain(std::slice::from_ref(medium));
        create(&domain, "a");
        close(domain);
    }
    let domain = domain(&media);
    let listing = domain.list(ListOptions::default()).unwrap();
    assert_eq!(listing.checkpoints.len(), 2);
    assert!(
        listing
            .problems
            .iter()
            .any(|p| matches!(p, Problem::NameShared { .. }))
    );
    assert!(
        listing
            .problems
            .iter()
            .any(|p| matches!(p, Problem::CurrentDiffers))
    );
    assert!(domain.lookup("a").is_err());
    assert!(domain.create(&spec("b"), CreateFlags::NONE).is_err());
    assert!(
        domain
            .create(&on_disks("b", &["vda"]), CreateFlags::NONE)
            .is_err()
    );
}
