//! Every set of images that a crash could leave during a creation, a deletion, a redefinition, an
//! adoption, a conversion or a clean close on three disks: prefixes, subsets and torn writes.
//! Afterwards QEMU may write first, to one, some or all of them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::sync::Arc;

use common::{DISK_BYTES, content, create, since, spec, write};
use tidemark_checkpoint::{CreateFlags, CreateSpec, DeleteFlags, Disk, Domain, DomainOptions};
use tidemark_fixtures::oracle::{self, qemu_img, qemu_io};
use tidemark_fixtures::storage::{CrashOptions, CrashWorld, WorldImage};
use tidemark_qcow2::chain::Scheme;
use tidemark_qcow2::{CreateOptions, Image, MemoryStorage, OpenOptions, Storage};

const NAMES: [&str; 3] = ["vda", "vdb", "vdc"];

fn open(storages: Vec<Box<dyn Storage>>) -> Domain {
    let options = || OpenOptions {
        writable: true,
        ..OpenOptions::default()
    };
    let disks = NAMES.iter().zip(storages).map(|(name, storage)| Disk {
        name: (*name).to_owned(),
        image: Arc::new(Image::open(storage, options()).unwrap()),
    });
    Domain::new(disks.collect(), DomainOptions::default()).unwrap()
}

fn in_memory(disks: &[Vec<u8>]) -> Domain {
    let boxed = |bytes: &Vec<u8>| -> Box<dyn Storage> {
        Box::new(MemoryStorage::from_bytes(bytes.clone()))
    };
    open(disks.iter().map(boxed).collect())
}

/// A world of three disks with checkpoints `a`, `b`, `c` and writes between them, cleanly closed.
struct Start {
    bytes: Vec<Vec<u8>>,
    /// Contents of each disk when `a` was taken.
    at_a: Vec<Vec<u8>>,
    /// What must be repeated after a crash before the images can be asked.
    first: Option<fn(&Domain)>,
}

fn contents(domain: &Domain) -> Vec<Vec<u8>> {
    NAMES.iter().map(|name| content(domain, name)).collect()
}

fn start() -> Start {
    start_of(12)
}

/// Clusters of 4 KiB are quick, but have no room for four bitmaps that record.
fn start_of(cluster_bits: u32) -> Start {
    let world = CrashWorld::new(vec![Vec::new(); 3]);
    let boxed = |disk| -> Box<dyn Storage> { Box::new(world.disk(disk)) };
    for disk in 0..3 {
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(DISK_BYTES)
        };
        Image::create(boxed(disk), &options, OpenOptions::default())
            .unwrap()
            .close()
            .unwrap();
    }
    let domain = open((0..3).map(boxed).collect());
    NAMES
        .iter()
        .for_each(|disk| write(&domain, disk, 8192, 9000, 1));
    create(&domain, "a");
    let at_a = contents(&domain);
    NAMES
        .iter()
        .for_each(|disk| write(&domain, disk, 100_000, 5000, 2));
    create(&domain, "b");
    NAMES
        .iter()
        .for_each(|disk| write(&domain, disk, 300_000, 5000, 3));
    create(&domain, "c");
    NAMES
        .iter()
        .for_each(|disk| write(&domain, disk, 500_000, 5000, 4));
    common::close(domain);
    Start {
        bytes: (0..3).map(|disk| world.disk(disk).to_bytes()).collect(),
        at_a,
        first: None,
    }
}

/// The same world after a change that must not be cut.
fn changed(start: Start, change: impl FnOnce(&Domain)) -> Start {
    let world = CrashWorld::new(start.bytes.clone());
    let boxed = |disk| -> Box<dyn Storage> { Box::new(world.disk(disk)) };
    let domain = open((0..3).map(boxed).collect());
    change(&domain);
    common::close(domain);
    Start {
        bytes: (0..3).map(|disk| world.disk(disk).to_bytes()).collect(),
        ..start
    }
}

/// Runs `operation` on a recorded world and examines every set of crash images.
fn sweep(
    name: &str,
    start: &Start,
    operation: impl FnOnce(&Domain),
    after: impl FnOnce(Domain),
    examine: impl Fn(&Domain, &str),
) -> (usize, usize) {
    let world = CrashWorld::new(start.bytes.clone());
    let boxed = |disk| -> Box<dyn Storage> { Box::new(world.disk(disk)) };
    let domain = open((0..3).map(boxed).collect());
    operation(&domain);
    after(domain);
    let log = world.log();
    let (mut images, mut visits) = (0, 0);
    for crash in log.images(CrashOptions {
        subsets_per_point: 1,
        ..CrashOptions::default()
    }) {
        let what = format!("{name}, set {images}: {}", crash.description);
        let domain = in_memory(&crash.disks);
        if start.first.is_none() {
            covers(&domain, start, &what);
        }
        examine(&domain, &what);
        if images % 23 == 0 && oracle::available() {
            let disks = QEMU_FIRST[(images / 23) % QEMU_FIRST.len()];
            qemu_goes_first(&crash, start, disks, &what);
            visits += 1;
        }
        images += 1;
    }
    println!(
        "{name}: {} crash points, {images} sets of images, QEMU first in {visits}",
        log.points()
    );
    (log.points(), images)
}

/// Since `a` nothing is missed on any disk, and nothing had to become full.
fn covers(domain: &Domain, start: &Start, what: &str) {
    for (disk, before) in NAMES.iter().zip(&start.at_a) {
        let bits = since(domain, "a", disk).unwrap_or_else(|reason| panic!("{what}: {reason}"));
        common::assert_superset(&bits, before, &content(domain, disk), what);
    }
}

/// Disks that QEMU writes to between the crash and our next open, in turn.
const QEMU_FIRST: [&[usize]; 4] = [&[0], &[0, 1, 2], &[1, 2], &[2]];

/// QEMU writes to some disks between the crash and our next open.
fn qemu_goes_first(crash: &WorldImage, start: &Start, disks: &[usize], what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut left = crash.disks.clone();
    for (disk, bytes) in left.iter_mut().enumerate() {
        let path = folder.path().join(format!("{disk}.qcow2"));
        std::fs::write(&path, &*bytes).unwrap();
        if disks.contains(&disk) {
            qemu_img::check(&path).assert_at_worst_leaks();
            qemu_io::commands(&path, &["write -P 0x77 700k 10k"]);
            *bytes = std::fs::read(&path).unwrap();
        }
    }
    let domain = in_memory(&left);
    let what = format!("{what}, then QEMU wrote to {disks:?}");
    if let Some(first) = start.first {
        first(&domain);
    }
    covers(&domain, start, &what);
    create(&domain, "later");
    covers(&domain, start, &format!("{what}, then a checkpoint"));
}

#[test]
fn a_crash_anywhere_in_a_creation_leaves_it_on_all_disks_or_on_none() {
    let start = start();
    let (points, images) = sweep(
        "create",
        &start,
        |domain| drop(domain.create(&spec("d"), CreateFlags::NONE).unwrap()),
        drop,
        |domain, what| {
            let shown = domain.lookup("d").is_ok();
            create(domain, "e");
            let has = |disk: &Disk| {
                disk.image
                    .bitmaps()
                    .unwrap()
                    .iter()
                    .any(|info| info.name == "d")
            };
            let have: Vec<bool> = domain.disks().iter().map(has).collect();
            assert_eq!(have, vec![shown; 3], "{what}");
            assert_eq!(domain.verify().unwrap(), [], "{what}");
        },
    );
    assert!(
        points >= 60 && images >= 150,
        "the sweep shrank: {points} {images}"
    );
}

#[test]
fn a_crash_anywhere_in_an_anchored_creation_leaves_no_anchor_of_nobody() {
    let start = start();
    let (points, images) = sweep(
        "create with anchors",
        &start,
        |domain| {
            let anchored = CreateSpec {
                anchor: true,
                ..spec("d")
            };
            drop(domain.create(&anchored, CreateFlags::NONE).unwrap());
        },
        drop,
        |domain, what| {
            let shown = domain.lookup("d").is_ok();
            create(domain, "e");
            assert_eq!(domain.lookup("d").is_ok(), shown, "{what}");
            for disk in domain.disks() {
                assert_eq!(disk.image.snapshots().unwrap(), [], "{what}");
            }
            assert_eq!(domain.verify().unwrap(), [], "{what}");
        },
    );
    assert!(
        points >= 100 && images >= 250,
        "the sweep shrank: {points} {images}"
    );
}

#[test]
fn a_crash_anywhere_in_a_deletion_leaves_every_survivor_incremental() {
    let start = start();
    for name in ["b", "c"] {
        let (points, images) = sweep(
            &format!("delete {name}"),
            &start,
            |domain| drop(domain.delete(name, DeleteFlags::NONE).unwrap()),
            drop,
            |domain, what| {
                // Repeating it finishes it; on some disks it may be done already.
                if domain.lookup(name).is_ok() {
                    domain.delete(name, DeleteFlags::NONE).unwrap();
                }
                assert!(domain.lookup(name).is_err(), "{what}");
                covers(domain, &start, what);
                assert_eq!(domain.verify().unwrap(), [], "{what}");
            },
        );
        assert!(
            points >= 30 && images >= 70,
            "the sweep shrank: {points} {images}"
        );
    }
}

#[test]
fn a_crash_anywhere_in_a_session_and_its_clean_close_keeps_the_chain() {
    let start = start();
    let (points, images) = sweep(
        "close",
        &start,
        |domain| {
            for disk in NAMES {
                write(domain, disk, 12_000, 300, 7);
                write(domain, disk, 800_000, 5000, 8);
            }
            domain.disk("vda").unwrap().image.flush().unwrap();
        },
        common::close,
        |domain, what| {
            let names: Vec<String> = domain
                .checkpoints(tidemark_checkpoint::ListFlags::NONE)
                .unwrap()
                .iter()
                .map(|checkpoint| checkpoint.name().to_owned())
                .collect();
            assert_eq!(names.len(), 3, "{what}: {names:?}");
            assert_eq!(domain.verify().unwrap(), [], "{what}");
        },
    );
    assert!(
        points >= 30 && images >= 70,
        "the sweep shrank: {points} {images}"
    );
}

#[test]
fn a_crash_anywhere_in_a_redefinition_of_current_leaves_one_answer() {
    // Between the first disk and the last they name different ones, and nobody guesses.
    let start = Start {
        first: Some(|domain| domain.set_current("b").unwrap()),
        ..start()
    };
    let (points, images) = sweep(
        "set current",
        &start,
        |domain| domain.set_current("b").unwrap(),
        drop,
        |domain, what| {
            domain.set_current("b").unwrap();
            assert_eq!(domain.current().unwrap().unwrap().name(), "b", "{what}");
            create(domain, "side");
            let side = domain.lookup("side").unwrap();
            assert_eq!(side.parent().unwrap().unwrap().name(), "b", "{what}");
            covers(domain, &start, what);
            assert_eq!(domain.verify().unwrap(), [], "{what}");
        },
    );
    assert!(
        points >= 12 && images >= 30,
        "the sweep shrank: {points} {images}"
    );
}

#[test]
fn a_crash_anywhere_in_a_conversion_leaves_every_answer_right() {
    let intervals = start_of(16);
    let cumulative = changed(start_of(16), |domain| {
        domain.set_scheme(Scheme::Cumulative).unwrap()
    });
    for (start, scheme) in [
        (&intervals, Scheme::Cumulative),
        (&cumulative, Scheme::Intervals),
    ] {
        let (points, images) = sweep(
            &format!("convert to {scheme:?}"),
            start,
            |domain| domain.set_scheme(scheme).unwrap(),
            drop,
            |domain, what| {
                domain.set_scheme(scheme).unwrap();
                covers(domain, start, what);
                NAMES
                    .iter()
                    .for_each(|disk| write(domain, disk, 900_000, 500, 9));
                create(domain, "later");
                covers(domain, start, what);
                assert_eq!(domain.verify().unwrap(), [], "{what}");
            },
        );
        assert!(
            points >= 20 && images >= 50,
            "the sweep shrank: {points} {images}"
        );
    }
}

#[test]
fn a_crash_anywhere_in_an_adoption_is_finished_by_repeating_it() {
    let bare = changed(start_of(16), |domain| {
        domain.set_scheme(Scheme::Cumulative).unwrap();
        for disk in domain.disks() {
            let forget = |update: &mut tidemark_qcow2::Update<'_>| {
                update.set_record(None);
                Ok::<(), tidemark_qcow2::Error>(())
            };
            disk.image.update(forget).unwrap();
        }
    });
    let bare = Start {
        first: Some(|domain| drop(domain.adopt(false).unwrap())),
        ..bare
    };
    let (points, images) = sweep(
        "adopt",
        &bare,
        |domain| drop(domain.adopt(false).unwrap()),
        drop,
        |domain, what| {
            let rebuilt = domain.adopt(false).unwrap();
            assert_eq!(rebuilt.checkpoints.len(), 3, "{what}");
            covers(domain, &bare, what);
            let c = domain.lookup("c").unwrap();
            assert_eq!(c.parent().unwrap().unwrap().name(), "b", "{what}");
            create(domain, "later");
            covers(domain, &bare, what);
            assert_eq!(domain.verify().unwrap(), [], "{what}");
        },
    );
    assert!(
        points >= 20 && images >= 50,
        "the sweep shrank: {points} {images}"
    );
}
