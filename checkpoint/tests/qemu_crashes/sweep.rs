//! Every write and flush of a session of QEMU, from its open in three steps to its close, and every
//! image that a kill or a loss of power could leave between them.

use tidemark_checkpoint::Outcome;
use tidemark_fixtures::oracle::{qemu_img, write_log};
use tidemark_fixtures::storage::{CrashLog, CrashOptions};

use super::{Chain, Desk, alone, daemon};

/// A session of QEMU on a chain's image: bitmaps of its own beside, guest writes, a close.
fn session(chain: &Chain) -> CrashLog {
    let desk = Desk::new(&chain.bytes);
    let log = desk.folder.path().join("log");
    let mut daemon = daemon();
    let node = daemon.open_logged(&desk.image, &log);
    daemon.guest(&node, &["write -P 51 600000 70000", "flush"]);
    daemon.bitmap_add(&node, "foreign", Some(65536));
    daemon.guest(&node, &["write -P 52 40000 5000", "discard 256k 128k"]);
    daemon.close(&node);
    daemon.quit();
    let storage = write_log::replay(&chain.bytes, &log);
    let (ours, theirs) = (storage.to_bytes(), desk.bytes());
    let common = ours.len().min(theirs.len());
    assert!(
        ours[..common] == theirs[..common] && ours.len().abs_diff(theirs.len()) < 65536,
        "the log is not all that QEMU wrote"
    );
    storage.log()
}

/// All changes in order, as a kill leaves them.
fn kills() -> CrashOptions {
    CrashOptions {
        tears_per_point: 0,
        subsets_per_point: 0,
        ..CrashOptions::default()
    }
}

/// Whether QEMU had just cleared the bitmaps' autoclear bit, and not yet set it again.
fn is_half_open(bytes: &[u8]) -> bool {
    bytes[95] & 1 == 0
}

/// How the frozen bitmaps of a set of images came back.
#[derive(Debug, Default)]
struct Tally {
    images: usize,
    half_open: usize,
    intact: usize,
    rewritten: usize,
    lost: usize,
}

impl Tally {
    fn add(&mut self, outcomes: &[Outcome], half_open: bool) {
        self.images += 1;
        self.half_open += usize::from(half_open);
        for outcome in outcomes {
            match outcome {
                Outcome::Intact => self.intact += 1,
                Outcome::Rewritten => self.rewritten += 1,
                Outcome::Anchored | Outcome::Restarted | Outcome::Lost => self.lost += 1,
            }
        }
    }
}

#[test]
fn frozen_bitmaps_survive_a_crash_of_qemu_at_every_write() {
    tidemark_fixtures::require_qemu!();
    let _turn = alone();
    let (mut points, mut tally) = (0, Tally::default());
    for cluster_bits in [12, 16] {
        let chain = Chain::new(cluster_bits);
        let log = session(&chain);
        points += log.points();
        for (number, crash) in log.images(kills()).enumerate() {
            let what = format!("clusters 2^{cluster_bits}, {}", crash.description);
            let desk = (number % 3 == 0).then(|| Desk::new(&[]));
            let path = desk.as_ref().map(|desk| desk.image.as_path());
            let half_open = is_half_open(&crash.bytes);
            let outcomes = chain.judge(crash.bytes, path, &what);
            tally.add(&outcomes, half_open);
            assert_eq!(tally.lost, 0, "{what}: {outcomes:?}");
        }
    }
    println!("{points} points, {tally:?}");
    assert!(
        points >= 90 && tally.images >= 60 && tally.half_open >= 6,
        "{tally:?}"
    );
    assert!(tally.rewritten >= 90 && tally.intact >= 6, "{tally:?}");
}

/// QEMU writes whole header clusters, so that losing power can tear one: then bitmaps may be lost,
/// or the image with them, but no answer is wrong.
#[test]
fn a_torn_write_of_qemu_costs_bitmaps_and_never_a_change() {
    tidemark_fixtures::require_qemu!();
    let _turn = alone();
    let (mut points, mut tally, mut unreadable) = (0, Tally::default(), 0);
    for cluster_bits in [12, 16] {
        let chain = Chain::new(cluster_bits);
        let log = session(&chain);
        points += log.points();
        for crash in log.images(CrashOptions::default()).step_by(2) {
            let what = format!("clusters 2^{cluster_bits}, {}", crash.description);
            let half_open = is_half_open(&crash.bytes);
            match chain.judge_torn(crash.bytes, &what) {
                Some(outcomes) => tally.add(&outcomes, half_open),
                None => unreadable += 1,
            }
        }
    }
    println!("{points} points, {unreadable} unreadable, {tally:?}");
    assert!(points >= 90 && tally.images >= 120, "{tally:?}");
    assert!(tally.rewritten > 10 * tally.lost, "{tally:?}");
}

/// A repair by QEMU opens the image for writing: with the bit cleared, it drops the extension.
#[test]
fn frozen_bitmaps_survive_qemus_repair_of_leaks_after_the_crash() {
    tidemark_fixtures::require_qemu!();
    let _turn = alone();
    let mut tally = Tally::default();
    let mut dropped = 0;
    for cluster_bits in [12, 16] {
        let chain = Chain::new(cluster_bits);
        let log = session(&chain);
        for (number, crash) in log.images(kills()).enumerate() {
            let half_open = is_half_open(&crash.bytes);
            if number % 4 != 0 && !half_open {
                continue;
            }
            let what = format!("clusters 2^{cluster_bits}, {}, repaired", crash.description);
            let desk = Desk::new(&crash.bytes);
            let kind = if number % 2 == 0 { "leaks" } else { "all" };
            let repaired = qemu_img::repair(&desk.image, kind);
            assert!(matches!(repaired.exit, 0 | 3), "{what}: {repaired:?}");
            let outcomes = chain.judge(desk.bytes(), Some(&desk.image), &what);
            tally.add(&outcomes, half_open);
            let lost = outcomes
                .iter()
                .filter(|outcome| **outcome == Outcome::Lost)
                .count();
            // Said by name, for every one of them: nothing is left to prove.
            assert_eq!(lost, if half_open { 3 } else { 0 }, "{what}: {outcomes:?}");
            dropped += usize::from(half_open);
        }
    }
    println!("{dropped} where QEMU had dropped the bitmaps, {tally:?}");
    assert!(
        tally.images >= 20 && tally.rewritten >= 30 && dropped >= 6,
        "{tally:?}"
    );
}
