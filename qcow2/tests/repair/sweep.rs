//! Repair that is cut short, by a crash or by a failing call, leaves nothing worse; done again it
//! ends as it should have.

use tidemark_fixtures::builder::{Cluster, ImageBuilder};
use tidemark_fixtures::hostile::hostile_images;
use tidemark_fixtures::storage::{CallKind, CrashOptions, CrashStorage, Fault, FaultyStorage};
use tidemark_qcow2::Result;
use tidemark_qcow2::check::{CheckReport, Finding, Repair, repair};

use crate::corpus::{DAMAGES, Damage, WIDE_DAMAGES, aim_plain, healthy, zero};
use crate::{badness, checked, content, repaired, typed};

/// Several damages at once, so that every step of a repair has work.
const MANY: &[Damage] = &[
    ("counts and flags", |i| {
        i.put("l2[0][9]", &[0; 8]);
        zero(i, "data[0]");
        aim_plain(i, "l2[0][10]", "data[1]");
    }),
    ("refcount structures", |i| {
        i.put("l2[0][9]", &[0; 8]);
        i.set_bits("refcount_table[0]", 1);
        aim_plain(i, "l2[0][10]", "data[1]");
    }),
    ("directory, counts and flags", |i| {
        i.set("bitmaps.nb_bitmaps", 7);
        i.set_bits("bitmap[0].table[0]", 2);
        zero(i, "data[0]");
        aim_plain(i, "l2[0][10]", "data[1]");
    }),
    ("marks", |i| {
        i.set("header.incompatible_features", 3);
        zero(i, "l1");
    }),
    ("stale bitmaps", |i| i.set("header.autoclear_features", 0)),
];

fn damaged_images() -> Vec<(String, Vec<u8>)> {
    let mut images = Vec::new();
    for (cluster_bits, order) in [(9, 4), (12, 2)] {
        for (name, patch) in MANY.iter().chain(DAMAGES).chain(WIDE_DAMAGES) {
            let mut image = healthy(cluster_bits, order).build();
            patch(&mut image);
            images.push((format!("2^{cluster_bits}: {name}"), image.bytes));
        }
    }
    images
}

/// Whether the only corruptions are COPIED flags that are not set yet, after the count was lowered:
/// the next write copies a cluster that it need not copy.
fn only_flags_missing(report: &Result<CheckReport>) -> bool {
    let Ok(report) = report else { return false };
    let missing = report
        .findings
        .iter()
        .filter(|finding| matches!(finding, Finding::Copied { single: true, .. }));
    report.check_errors == 0 && u64::try_from(missing.count()).unwrap() == report.corruptions
}

#[test]
fn a_crash_at_any_point_of_a_repair_leaves_nothing_worse() {
    let (mut points, mut count) = (0, 0);
    for (name, bytes) in damaged_images() {
        let before = badness(&checked(&bytes));
        let old = content(&bytes);
        for what in [Repair::Leaks, Repair::All] {
            let storage = CrashStorage::new(bytes.clone());
            let Ok(report) = repair(Box::new(storage.clone()), what) else {
                assert_eq!(
                    storage.to_bytes(),
                    bytes,
                    "{name}: a refusal changed the image"
                );
                continue;
            };
            let goal = report.check.exit_code();
            let log = storage.log();
            points += log.points();
            for crash in log.images(CrashOptions::default()) {
                count += 1;
                let place = format!("{name}, {what:?}: {}", crash.description);
                let now = checked(&crash.bytes);
                assert!(badness(&now) <= before.max(2), "{place}: {now:?}");
                // A repair that is not done yet does not break what was whole.
                let fine = before > 1 || badness(&now) <= before || only_flags_missing(&now);
                assert!(fine, "{place}: {now:?}");
                assert!(
                    content(&crash.bytes) == old || old.is_empty(),
                    "{place}: content"
                );
                let (again, after) = repaired(&crash.bytes, what);
                let exit = again.map(|again| again.check.exit_code());
                assert_eq!(exit.ok(), Some(goal), "{place}: repaired again");
                assert!(content(&after) == old || old.is_empty(), "{place}: content");
            }
        }
    }
    println!("{points} crash points, {count} images");
    assert!(
        points >= 300 && count >= 600,
        "the sweep shrank: {points} {count}"
    );
}

#[test]
fn a_call_that_fails_surfaces_and_leaves_nothing_worse() {
    let mut runs = 0;
    for (name, patch) in MANY {
        let mut image = healthy(12, 4).build();
        patch(&mut image);
        let before = badness(&checked(&image.bytes));
        let old = content(&image.bytes);
        let clean = FaultyStorage::new(CrashStorage::new(image.bytes.clone()));
        let goal = repair(Box::new(clean.clone()), Repair::All).unwrap();
        for kinds in [CallKind::CHANGES, &[CallKind::Read], &[CallKind::Len]] {
            for at in 0..clean.calls_of(kinds) {
                let bytes = CrashStorage::new(image.bytes.clone());
                let storage = FaultyStorage::new(bytes.clone());
                storage.arm(Fault::once(kinds, at));
                let result = repair(Box::new(storage.clone()), Repair::All);
                runs += 1;
                let place = format!("{name}: call {at} of {kinds:?}");
                // A read that fails may make part of the image unreadable for that one check.
                let changes = kinds == CallKind::CHANGES;
                assert!(!changes || result.is_err(), "{place}: the failure is lost");
                let after = bytes.to_bytes();
                assert!(badness(&checked(&after)) <= before.max(2), "{place}");
                assert_eq!(content(&after), old, "{place}: content");
                let (again, _) = repaired(&after, Repair::All);
                let exit = again.unwrap().check.exit_code();
                assert_eq!(exit, goal.check.exit_code(), "{place}: repaired again");
            }
        }
    }
    println!("{runs} faults");
    assert!(runs >= 100, "the sweep shrank: {runs}");
}

#[test]
fn every_hostile_image_can_be_repaired_or_is_refused_and_is_never_worse() {
    let (mut count, mut mended, mut complaints) = (0, 0, Vec::new());
    for image in hostile_images() {
        for what in [Repair::Leaks, Repair::All] {
            count += 1;
            let begin = std::time::Instant::now();
            let before = checked(&image.bytes);
            let (report, after) = repaired(&image.bytes, what);
            let place = format!("{} {what:?}", image.name);
            let old = content(&image.bytes);
            match &report {
                Err(error) if !typed(error) => complaints.push(format!("{place}: {error:?}")),
                Err(_) if after != image.bytes => {
                    complaints.push(format!("{place}: a refusal changed the image"));
                }
                Err(_) => {}
                Ok(report) => {
                    mended += usize::from(badness(&before) > 0 && report.check.is_clean());
                    let now = checked(&after);
                    if badness(&now) > badness(&before).max(1) && badness(&before) < 4 {
                        complaints.push(format!("{place}: worse: {now:?}"));
                    }
                    if !old.is_empty() && old != content(&after) {
                        complaints.push(format!("{place}: the guest's content changed"));
                    }
                }
            }
            if begin.elapsed().as_secs() >= 4 {
                complaints.push(format!("{place}: took {:?}", begin.elapsed()));
            }
        }
    }
    println!("{count} repairs of hostile images, {mended} made clean");
    assert!(
        complaints.is_empty(),
        "{}:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
    assert!(count >= 300 && mended >= 60, "{count} {mended}");
}

#[test]
fn new_structures_go_around_what_a_damaged_entry_names_behind_the_end() {
    let mut image = healthy(12, 4).build();
    image.set_bits("refcount_table[0]", 1);
    image.set("l2[0][0]", image.len() | 1 << 63);
    let (report, after) = repaired(&image.bytes, Repair::All);
    let report = report.unwrap();
    assert_eq!(report.check.exit_code(), 0, "{:?}", report.check.findings);
    assert_eq!(content(&after), content(&image.bytes));
    let builder = ImageBuilder::new(1 << 20).cluster(0, Cluster::Entry(1 << 55 | 1 << 63));
    let mut far = builder.build();
    far.set_bits("refcount_table[0]", 1);
    let (report, after) = repaired(&far.bytes, Repair::All);
    assert_eq!(report.unwrap().check.exit_code(), 2);
    assert!(after.len() < far.bytes.len() + (4 << 16));
}
