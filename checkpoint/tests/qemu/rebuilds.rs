//! Rebuilding from images alone: chains that QEMU's own sessions left, disks that lost their record
//! or a part of it, disks that contradict each other.

use tidemark_checkpoint::{Evidence, ListFlags, Problem};
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::chain::Health;

use super::common::{content, names};
use super::desk::{Desk, SIZE, covers, since};

/// An image whose bitmaps QEMU made in three sessions, two of them with several at once, under names
/// that suggest another order; and the contents at each.
fn by_qemu(desk: &mut Desk, disk: &str) -> Vec<(&'static str, Vec<u8>)> {
    let path = desk.image(disk);
    qemu_img::create(&path, SIZE, &[]);
    desk.own(disk);
    let mut moments = Vec::new();
    let mut number = 0_u64;
    for session in [&["z9", "m1"][..], &["k5"], &["b7", "a3"]] {
        let mut daemon = QemuStorageDaemon::spawn();
        let node = daemon.open_image(&path);
        for name in session {
            moments.push((*name, number));
            daemon.bitmap_add(&node, name, Some(65_536));
            daemon.guest(
                &node,
                &[&format!("write -P {} {}k 100k", number + 1, number * 512)],
            );
            number += 1;
        }
        daemon.close(&node);
        daemon.quit();
    }
    // What the disk held when the n-th was added: the first n writes.
    let held = |count: u64| {
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        for write in 0..count {
            let start = usize::try_from(write * 512 * 1024).unwrap();
            bytes[start..start + 100 * 1024].fill(u8::try_from(write + 1).unwrap());
        }
        bytes
    };
    moments
        .into_iter()
        .map(|(name, count)| (name, held(count)))
        .collect()
}

#[test]
fn chains_of_several_qemu_sessions_are_ordered_by_inclusion() {
    tidemark_fixtures::require_qemu!();
    let mut desk = Desk::empty();
    let moments = by_qemu(&mut desk, "vda");
    let expected = [
        ("z9", None),
        ("m1", Some("z9")),
        ("k5", Some("m1")),
        ("b7", Some("k5")),
        ("a3", Some("b7")),
    ];
    let before = desk.bytes();
    desk.session(|domain| {
        let directory: Vec<String> = domain.disks()[0]
            .image
            .bitmaps()
            .unwrap()
            .into_iter()
            .map(|info| info.name)
            .collect();
        assert_ne!(
            directory,
            expected.map(|(name, _)| name),
            "the directory misleads"
        );
        let rebuilt = domain.rebuild(false).unwrap();
        let found: Vec<_> = rebuilt
            .checkpoints
            .iter()
            .map(|info| (info.name.as_str(), info.parent.as_deref()))
            .collect();
        assert_eq!(found, expected);
        for info in &rebuilt.checkpoints {
            assert_eq!(info.disks[0].evidence, Evidence::Inclusion);
            assert!(info.disks[0].inferred && info.disks[0].dirty_bytes.is_some());
            assert_eq!(info.current, info.name == "a3");
        }
    });
    assert_eq!(desk.bytes(), before, "looking wrote nothing");
    desk.session(|domain| drop(domain.adopt(false).unwrap()));
    let adopted = desk.bytes();
    desk.session(|domain| drop(domain.adopt(false).unwrap()));
    assert_eq!(desk.bytes(), adopted, "adopting again changes nothing");
    for (name, before) in &moments {
        let bits = desk.covers(name, "vda", before, "adopted");
        assert!(bits.dirty_bytes() < SIZE);
    }
    // QEMU goes on with what was adopted.
    desk.qemu_writes("vda", &["write -P 0x77 3500k 64k"]);
    for (name, before) in &moments {
        desk.covers(name, "vda", before, "adopted, then QEMU wrote");
    }
    desk.assert_clean();
    println!("{} checkpoints by three sessions", moments.len());
}

#[test]
fn disks_that_contradict_each_other_get_no_parents_and_keep_their_answers() {
    tidemark_fixtures::require_qemu!();
    let mut desk = Desk::empty();
    let mut moments = Vec::new();
    for (disk, order) in [("vda", ["x", "y"]), ("vdb", ["y", "x"])] {
        let path = desk.image(disk);
        qemu_img::create(&path, SIZE, &[]);
        desk.own(disk);
        for (number, name) in order.into_iter().enumerate() {
            moments.push((disk, name, qemu_img::convert_to_raw(&path)));
            qemu_img::bitmap_add(&path, name, Some(65_536));
            qemu_io::commands(&path, &[&format!("write -P 9 {number}M 100k")]);
        }
    }
    desk.session(|domain| {
        let rebuilt = domain.rebuild(false).unwrap();
        assert!(
            rebuilt.problems.contains(&Problem::OrdersDiffer),
            "{:?}",
            rebuilt.problems
        );
        assert!(
            rebuilt
                .checkpoints
                .iter()
                .all(|info| info.parent.is_none() && !info.current)
        );
        domain.adopt(false).unwrap();
        // Nobody is current until somebody says so.
        domain.set_current("x").unwrap();
        let bits = since(domain, "x", "vda").unwrap();
        covers(&bits, &moments[0].2, &content(domain, "vda"), "x on vda");
        let bits = since(domain, "x", "vdb").unwrap();
        covers(&bits, &moments[3].2, &content(domain, "vdb"), "x on vdb");
    });
}

#[test]
fn what_is_left_of_a_chain_serves_and_what_is_lost_is_named() {
    tidemark_fixtures::require_qemu!();
    let mut desk = Desk::empty();
    let moments = by_qemu(&mut desk, "vda");
    let on_b = by_qemu(&mut desk, "vdb");
    qemu_img::bitmap_remove(&desk.image("vdb"), "k5");
    desk.session(|domain| {
        let rebuilt = domain.rebuild(false).unwrap();
        let disks = |name: &str| {
            let info = rebuilt
                .checkpoints
                .iter()
                .find(|info| info.name == name)
                .unwrap();
            info.disks
                .iter()
                .map(|state| state.disk.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(disks("k5"), ["vda"]);
        assert_eq!(disks("m1"), ["vda", "vdb"]);
        let b7 = rebuilt
            .checkpoints
            .iter()
            .find(|info| info.name == "b7")
            .unwrap();
        assert_eq!(b7.parent.as_deref(), Some("k5"), "one disk still knows");
        domain.adopt(false).unwrap();
        let all = domain.checkpoints(ListFlags::NONE).unwrap();
        assert_eq!(names(&all), ["a3", "b7", "k5", "m1", "z9"]);
    });
    for ((name, before), (_, on_b)) in moments.iter().zip(&on_b) {
        desk.covers(name, "vda", before, "the whole disk");
        if *name != "k5" {
            desk.covers(name, "vdb", on_b, "the other");
        }
    }
    // A QEMU that died takes the rest of one disk.
    let mut daemon = QemuStorageDaemon::spawn();
    daemon.open_image(&desk.image("vdb"));
    daemon.kill_dash_nine();
    desk.session(|domain| {
        let rebuilt = domain.rebuild(false).unwrap();
        for info in &rebuilt.checkpoints {
            for state in &info.disks {
                let expected = if state.disk == "vda" {
                    Health::Ok
                } else {
                    Health::Inconsistent
                };
                assert_eq!(state.health, expected, "{} on {}", info.name, state.disk);
            }
        }
        assert!(since(domain, "z9", "vda").is_ok() && since(domain, "z9", "vdb").is_err());
    });
}

/// One disk lost its record, by a conversion; the other still knows who the checkpoints are.
#[test]
fn a_disk_without_its_record_takes_the_identities_of_the_other() {
    tidemark_fixtures::require_qemu!();
    let desk = Desk::new(&["vda", "vdb"]);
    let before = desk.content("vdb");
    desk.session(|domain| {
        let first = tidemark_checkpoint::CreateSpec {
            scheme: Some(tidemark_qcow2::chain::Scheme::Cumulative),
            ..super::common::spec("a")
        };
        domain.create(&first, Default::default()).unwrap();
        super::common::write(domain, "vdb", 1 << 20, 70_000, 1);
        domain
            .create(&super::common::spec("b"), Default::default())
            .unwrap();
    });
    let (image, copy) = (desk.image("vdb"), desk.path("copy"));
    qemu_img::convert(&image, "qcow2", &copy, "qcow2", &["--bitmaps"]);
    std::fs::rename(copy, &image).unwrap();
    desk.session(|domain| {
        let identity = domain.lookup("a").unwrap().identity();
        let full = since(domain, "a", "vdb").unwrap_err();
        assert_eq!(full, tidemark_checkpoint::FullReason::NoRecord);
        domain.adopt(false).unwrap();
        assert_eq!(domain.lookup("a").unwrap().identity(), identity);
        // The descriptor was written for another image: that disk is full, alone, until a redefinition.
        let answer = since(domain, "a", "vdb");
        let known = matches!(answer, Err(tidemark_checkpoint::FullReason::OtherImage));
        assert!(known, "{answer:?}");
        domain
            .delete("a", tidemark_checkpoint::DeleteFlags::METADATA_ONLY)
            .unwrap();
        let bits = since(domain, "a", "vdb").unwrap();
        covers(&bits, &before, &content(domain, "vdb"), "adopted");
        assert!(since(domain, "a", "vda").is_ok());
    });
}
