//! Anchored checkpoints: what changed since is known from the mapping tables, whatever becomes of
//! the bitmaps; and snapshots of others as checkpoints of their own kind.

use tidemark_checkpoint::{
    CreateFlags, CreateSpec, DeleteFlags, DiskDelta, Domain, ErrorCode, Evidence, FullReason, Kind,
    Outcome,
};
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::random::Random;
use tidemark_qcow2::chain::{Health, Scheme};
use tidemark_qcow2::{BackingReference, CreateOptions};

use super::common::{content, spec, write};
use super::desk::{Desk, SIZE, covers, since};

fn anchored(name: &str) -> CreateSpec {
    CreateSpec {
        anchor: true,
        ..spec(name)
    }
}

fn create(domain: &Domain, name: &str) {
    drop(domain.create(&anchored(name), CreateFlags::NONE).unwrap());
}

/// Names of the anchors on a disk, as QEMU lists them.
fn anchors(desk: &Desk, disk: &str) -> Vec<String> {
    let info = qemu_img::info(&desk.image(disk));
    let snapshots = info["snapshots"].as_array().cloned().unwrap_or_default();
    let names = snapshots
        .iter()
        .map(|snapshot| snapshot["name"].as_str().unwrap().to_owned());
    names
        .filter(|name| name.starts_with("tidemark-anchor-"))
        .collect()
}

/// QEMU runs a guest and is killed after a few writes, flushed or not.
fn killed_qemu(desk: &Desk, disk: &str, random: &mut Random) {
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&desk.image(disk));
    for _ in 0..random.within(1..5) {
        let start = random.within(0..60) * 64;
        let value = random.within(1..255);
        let write = format!("write -P {value} {start}k {}k", random.within(1..64));
        let zero = format!("write -z {start}k 64k");
        let discard = format!("discard {start}k 64k");
        let choice =
            [&write, &write, &zero, &discard][usize::try_from(random.within(0..4)).unwrap()];
        daemon.guest(&node, &[choice]);
        if random.one_in(2) {
            daemon.guest(&node, &["flush"]);
        }
    }
    daemon.kill_dash_nine();
}

#[test]
fn a_qemu_killed_at_any_moment_leaves_a_right_increment_since_an_anchored_checkpoint() {
    tidemark_fixtures::require_qemu!();
    let mut kills = 0;
    for seed in 0..super::common::cases(3) {
        let mut random = Random::new(seed);
        let cluster_bits = [16, 12, 9 + 4][usize::try_from(seed % 3).unwrap()];
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(SIZE)
        };
        let desk = Desk::with(&["vda"], &options);
        desk.write("vda", 0, 1 << 20, 1);
        let at_a = desk.content("vda");
        desk.checkpoint("a");
        desk.write("vda", 2 << 20, 70_000, 2);
        let at_b = desk.content("vda");
        desk.session(|domain| create(domain, "b"));
        for round in 0..3 {
            killed_qemu(&desk, "vda", &mut random);
            kills += 1;
            let what = format!("seed {seed}, round {round}");
            let bits = desk.covers("b", "vda", &at_b, &what);
            assert!(bits.dirty_bytes() < SIZE, "{what}: as good as full");
            if round == 1 {
                desk.session(|domain| {
                    let recovered = domain.recover().unwrap();
                    let outcomes: Vec<_> = recovered.iter().map(|r| r.outcome).collect();
                    assert_eq!(outcomes, [Outcome::Rewritten, Outcome::Anchored], "{what}");
                    assert_eq!(domain.verify().unwrap(), []);
                });
                desk.covers("a", "vda", &at_a, &what);
            }
        }
        desk.session(|domain| create(domain, "c"));
        desk.covers("a", "vda", &at_a, "after the next checkpoint");
        desk.covers("b", "vda", &at_b, "after the next checkpoint");
        assert_eq!(anchors(&desk, "vda").len(), 1, "the older anchor is gone");
        desk.assert_clean();
    }
    println!("{kills} kills");
}

/// The next checkpoint, anchored or not, puts what the anchor knew into the bitmap and lets it go.
#[test]
fn an_anchor_goes_with_the_next_checkpoint_and_leaves_what_it_knew() {
    tidemark_fixtures::require_qemu!();
    for scheme in [Scheme::Intervals, Scheme::Cumulative] {
        let desk = Desk::new(&["vda", "vdb"]);
        let before = desk.content("vda");
        desk.session(|domain| {
            let first = CreateSpec {
                scheme: Some(scheme),
                ..anchored("a")
            };
            domain.create(&first, CreateFlags::NONE).unwrap();
        });
        assert_eq!(
            (anchors(&desk, "vda").len(), anchors(&desk, "vdb").len()),
            (1, 1)
        );
        killed_qemu(&desk, "vda", &mut Random::new(7));
        desk.checkpoint("b");
        assert_eq!(
            (anchors(&desk, "vda").len(), anchors(&desk, "vdb").len()),
            (0, 0)
        );
        desk.covers("a", "vda", &before, "the bitmap has it now");
        desk.assert_clean();
    }
}

#[test]
fn deleting_and_abandoning_take_their_anchors_along() {
    tidemark_fixtures::require_qemu!();
    let desk = Desk::new(&["vda", "vdb"]);
    desk.checkpoint("a");
    desk.session(|domain| create(domain, "b"));
    desk.session(|domain| drop(domain.delete("b", DeleteFlags::NONE).unwrap()));
    assert_eq!(anchors(&desk, "vda"), Vec::<String>::new());
    desk.session(|domain| {
        let tentative = domain.prepare(&anchored("c"), CreateFlags::NONE).unwrap();
        tentative.abandon().unwrap();
    });
    assert_eq!(anchors(&desk, "vda"), Vec::<String>::new());
    desk.session(|domain| {
        let tentative = domain.prepare(&anchored("d"), CreateFlags::NONE).unwrap();
        tentative.commit().unwrap();
    });
    assert_eq!(anchors(&desk, "vdb").len(), 1);
    assert_eq!(desk.session(|domain| domain.verify().unwrap()), []);
    desk.assert_clean();
}

/// Names are used again, by whoever; the date and the table tell.
#[test]
fn an_anchor_that_was_taken_again_is_not_believed() {
    tidemark_fixtures::require_qemu!();
    let desk = Desk::new(&["vda"]);
    desk.session(|domain| create(domain, "a"));
    desk.write("vda", 1 << 20, 70_000, 3);
    let name = anchors(&desk, "vda").remove(0);
    let path = desk.image("vda");
    let path = path.to_str().unwrap();
    qemu_img::ok(&["snapshot", "-d", &name, path]);
    qemu_img::ok(&["snapshot", "-c", &name, path]);
    qemu_img::bitmap_remove(&desk.image("vda"), "a");
    let full = desk.since("a", "vda").unwrap_err();
    assert!(
        matches!(
            full,
            FullReason::BadBitmap {
                health: Health::Missing,
                ..
            }
        ),
        "{full}"
    );
}

/// What cannot have snapshots is refused by name, before anything is written.
#[test]
fn images_without_snapshots_refuse_an_anchor_before_the_first_write() {
    tidemark_fixtures::require_qemu!();
    let mut desk = Desk::empty();
    qemu_img::create(&desk.image("vda"), SIZE, &[("refcount_bits", "1")]);
    desk.own("vda");
    let before = desk.bytes();
    desk.session(|domain| {
        let refused = domain
            .create(&anchored("a"), CreateFlags::NONE)
            .unwrap_err();
        assert_eq!(refused.code(), ErrorCode::ConfigUnsupported, "{refused}");
    });
    assert_eq!(desk.bytes(), before);
    desk.checkpoint("a");
}

/// Below the image lies what the tables cannot prove: it counts as changed, and a commit that
/// empties the overlay and changes the base is not missed.
#[test]
fn an_anchor_over_a_backing_file_counts_what_shows_through_as_changed() {
    tidemark_fixtures::require_qemu!();
    let mut desk = Desk::empty();
    desk.add("base", &CreateOptions::new(SIZE));
    desk.write("base", 0, 300_000, 5);
    let options = CreateOptions {
        backing: Some(BackingReference {
            name: b"base.qcow2".to_vec(),
            format: "qcow2".to_owned(),
        }),
        ..CreateOptions::new(SIZE)
    };
    desk.detach("base");
    desk.add("vda", &options);
    desk.write("vda", 1 << 20, 200_000, 6);
    let before = desk.content("vda");
    desk.session(|domain| create(domain, "a"));
    killed_qemu(&desk, "vda", &mut Random::new(3));
    desk.covers("a", "vda", &before, "over a backing file");
    desk.detach("vda");
    desk.own("base");
    desk.session(|domain| write(domain, "base", 700_000, 70_000, 9));
    desk.detach("base");
    desk.own("vda");
    desk.covers("a", "vda", &before, "after a change of the base");
}

#[test]
fn snapshots_of_others_are_checkpoints_of_their_own_kind() {
    tidemark_fixtures::require_qemu!();
    let desk = Desk::new(&["vda", "vdb"]);
    desk.write("vda", 0, 300_000, 4);
    let before = desk.content("vda");
    let path = desk.image("vda");
    let path = path.to_str().unwrap();
    qemu_img::ok(&["snapshot", "-c", "theirs", path]);
    desk.session(|domain| create(domain, "a"));
    killed_qemu(&desk, "vda", &mut Random::new(11));
    desk.session(|domain| {
        let rebuilt = domain.rebuild(false).unwrap();
        let found = rebuilt
            .checkpoints
            .iter()
            .filter(|info| info.kind == Kind::Snapshot);
        let found: Vec<_> = found.collect();
        assert_eq!(found.len(), 1, "an anchor is not one of them: {found:?}");
        assert_eq!(found[0].name, "theirs");
        assert!(!found[0].metadata && found[0].identity.is_none());
        assert_eq!(found[0].disks[0].evidence, Evidence::Mapping);
        let changes = domain.changed_since_snapshot("theirs").unwrap();
        let DiskDelta::Incremental(bits) = &changes[0].delta else {
            panic!("{changes:?}")
        };
        covers(bits, &before, &content(domain, "vda"), "since theirs");
        assert_eq!(found[0].disks[0].dirty_bytes, Some(bits.dirty_bytes()));
        assert!(matches!(changes[1].delta, DiskDelta::Full { .. }));
        let nobody = domain.changed_since_snapshot("nobody").unwrap_err();
        assert_eq!(nobody.code(), ErrorCode::NoDomainCheckpoint);
        assert!(since(domain, "a", "vda").is_ok());
    });
}
