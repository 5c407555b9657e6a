//! The chain record under QEMU's commands, one test each: at every cluster size, with and without a
//! backing name, the chain is still known, every answer is right, and the next checkpoint works.

use std::path::Path;

use tidemark_checkpoint::{CreateFlags, DeleteFlags, Evidence};
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_qcow2::chain::{Health, Scheme};
use tidemark_qcow2::{BackingReference, CreateOptions};

use super::common::{spec, write};
use super::desk::{Desk, SIZE, covers, since};

/// Cluster sizes with two slots of a record in the first cluster, each with a scheme.
const KINDS: [(u32, Scheme); 3] = [
    (12, Scheme::Intervals),
    (16, Scheme::Cumulative),
    (21, Scheme::Intervals),
];

/// An image with a chain `a`, `b`, over a backing file or not.
fn chained(cluster_bits: u32, backed: bool, scheme: Scheme) -> (Desk, Vec<u8>) {
    let mut desk = Desk::empty();
    let backing = backed.then(|| {
        std::fs::write(desk.path("base.raw"), vec![0x42; 1 << 20]).unwrap();
        BackingReference {
            name: b"base.raw".to_vec(),
            format: "raw".to_owned(),
        }
    });
    let options = CreateOptions {
        cluster_bits,
        backing,
        ..CreateOptions::new(SIZE)
    };
    desk.add("vda", &options);
    desk.write("vda", 0, 70_000, 1);
    let before = desk.content("vda");
    desk.session(|domain| {
        let first = tidemark_checkpoint::CreateSpec {
            scheme: Some(scheme),
            ..spec("a")
        };
        domain.create(&first, CreateFlags::NONE).unwrap();
        write(domain, "vda", 1 << 20, 70_000, 2);
        domain.create(&spec("b"), CreateFlags::NONE).unwrap();
        write(domain, "vda", 2 << 20, 70_000, 3);
    });
    (desk, before)
}

/// Does `command` to every kind of chain and looks whether it is still one.
fn survives(what: &str, backed: &[bool], command: impl Fn(&Desk, &Path)) {
    let mut chains = 0;
    for (cluster_bits, scheme) in KINDS {
        for &backed in backed {
            let what = format!("{what}, clusters of 2^{cluster_bits}, {scheme:?}");
            let (desk, before) = chained(cluster_bits, backed, scheme);
            command(&desk, &desk.image("vda"));
            judge(&desk, &before, &what);
            chains += 1;
        }
    }
    println!("{what}: {chains} chains");
}

fn judge(desk: &Desk, before: &[u8], what: &str) {
    desk.covers("a", "vda", before, what);
    desk.session(|domain| {
        let rebuilt = domain.rebuild(false).unwrap();
        let names: Vec<_> = rebuilt
            .checkpoints
            .iter()
            .map(|info| info.name.as_str())
            .collect();
        assert_eq!(names, ["a", "b"], "{what}");
        for info in &rebuilt.checkpoints {
            let state = &info.disks[0];
            let whole = matches!(state.health, Health::Ok | Health::SizeDiffers);
            assert!(whole, "{what}: {} is {:?}", info.name, state.health);
            let known = matches!(
                state.evidence,
                Evidence::Record | Evidence::ChangedDirectory
            );
            assert!(known, "{what}: {:?}", state.evidence);
        }
        assert_eq!(domain.current().unwrap().unwrap().name(), "b", "{what}");
        // The next changes of ours re-lay what QEMU wrote in its own order.
        domain.create(&spec("c"), CreateFlags::NONE).unwrap();
        write(domain, "vda", 100_000, 9000, 4);
    });
    desk.covers("a", "vda", before, &format!("{what}, then a checkpoint"));
    desk.session(|domain| {
        domain.delete("b", DeleteFlags::NONE).unwrap();
        let bits = since(domain, "a", "vda").unwrap();
        covers(&bits, before, &super::common::content(domain, "vda"), what);
    });
    desk.assert_clean();
}

#[test]
fn the_record_survives_an_open_for_writing() {
    tidemark_fixtures::require_qemu!();
    survives("open", &[false, true], |_, path| {
        let mut daemon = QemuStorageDaemon::spawn();
        let node = daemon.open_image(path);
        daemon.close(&node);
        daemon.quit();
    });
}

#[test]
fn the_record_survives_guest_writes() {
    tidemark_fixtures::require_qemu!();
    survives("write", &[false, true], |desk, _| {
        desk.qemu_writes(
            "vda",
            &[
                "write -P 0x51 3M 200k",
                "write -z 64k 64k",
                "discard 128k 64k",
            ],
        );
    });
}

#[test]
fn the_record_survives_bitmaps_that_come_and_go() {
    tidemark_fixtures::require_qemu!();
    survives("bitmap", &[false, true], |desk, path| {
        qemu_img::bitmap_add(path, "theirs", Some(65536));
        desk.qemu_writes("vda", &["write -P 0x52 3M 64k"]);
        qemu_img::bitmap_merge(path, "b", "theirs");
        qemu_img::bitmap_remove(path, "theirs");
    });
}

#[test]
fn the_record_survives_resizes() {
    tidemark_fixtures::require_qemu!();
    survives("resize", &[false], |desk, path| {
        qemu_img::resize(path, SIZE + (1 << 20));
        desk.qemu_writes("vda", &["write -P 0x53 4200k 64k"]);
        // Back to where it was: no bit of a frozen bitmap is cut.
        qemu_img::resize(path, SIZE);
    });
}

#[test]
fn the_record_survives_amendments() {
    tidemark_fixtures::require_qemu!();
    survives("amend", &[false, true], |_, path| {
        // New refcounts for large clusters take QEMU minutes.
        let large = qemu_img::info(path)["cluster-size"].as_u64().unwrap() > 16_384;
        let path = path.to_str().unwrap();
        for options in [
            "lazy_refcounts=on",
            "lazy_refcounts=off",
            "refcount_bits=64",
            "refcount_bits=16",
        ] {
            if !(large && options.starts_with("refcount")) {
                qemu_img::ok(&["amend", "-f", "qcow2", "-o", options, path]);
            }
        }
    });
}

#[test]
fn the_record_survives_internal_snapshots() {
    tidemark_fixtures::require_qemu!();
    survives("snapshot", &[false, true], |desk, path| {
        let path = path.to_str().unwrap();
        qemu_img::ok(&["snapshot", "-c", "s", path]);
        desk.qemu_writes("vda", &["write -P 0x54 1M 64k"]);
        qemu_img::ok(&["snapshot", "-d", "s", path]);
    });
}

/// A commit writes the overlay's data into the base and empties the overlay.
#[test]
fn the_record_survives_commits() {
    tidemark_fixtures::require_qemu!();
    survives("commit of it", &[true], |_, path| qemu_img::commit(path));
    survives("commit into it", &[false], |desk, _| {
        let overlay = desk.image("overlay");
        qemu_img::create_overlay(&overlay, "vda.qcow2", "qcow2");
        desk.qemu_writes("overlay", &["write -P 0x55 512k 128k"]);
        qemu_img::commit(&overlay);
        std::fs::remove_file(overlay).unwrap();
    });
}

#[test]
fn the_record_survives_rebases() {
    tidemark_fixtures::require_qemu!();
    survives("rebase", &[true], |desk, path| {
        // The same content under another, longer name.
        let longer = format!("{}.raw", "b".repeat(100));
        std::fs::copy(desk.path("base.raw"), desk.path(&longer)).unwrap();
        qemu_img::rebase_unsafe(path, &longer, "raw");
        let path = path.to_str().unwrap();
        qemu_img::ok(&["rebase", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path]);
    });
}

/// What a conversion leaves behind is rebuilt by inference, never taken for a record.
#[test]
fn what_a_conversion_loses_is_inferred_and_labelled() {
    tidemark_fixtures::require_qemu!();
    for scheme in [Scheme::Intervals, Scheme::Cumulative] {
        let (mut desk, before) = chained(16, false, scheme);
        qemu_img::convert(
            &desk.image("vda"),
            "qcow2",
            &desk.image("vdb"),
            "qcow2",
            &["--bitmaps"],
        );
        desk.detach("vda");
        desk.own("vdb");
        desk.session(|domain| {
            assert!(
                domain.current().unwrap().is_none(),
                "a copy is another image"
            );
            let rebuilt = domain.rebuild(false).unwrap();
            assert_eq!(rebuilt.checkpoints.len(), 2);
            assert!(
                rebuilt
                    .checkpoints
                    .iter()
                    .all(|info| info.disks[0].inferred)
            );
            domain.adopt(false).unwrap();
            match scheme {
                Scheme::Cumulative => {
                    let bits = since(domain, "a", "vdb").unwrap();
                    covers(
                        &bits,
                        &before,
                        &super::common::content(domain, "vdb"),
                        "adopted",
                    );
                }
                // It cannot be known to be complete.
                Scheme::Intervals => assert!(since(domain, "a", "vdb").is_err()),
            }
        });
    }
}

/// However full the first cluster is, QEMU has room for its own rewrite of it: or the machine would
/// not start.
#[test]
fn a_full_record_leaves_qemu_its_room_at_every_cluster_size() {
    tidemark_fixtures::require_qemu!();
    let mut held = Vec::new();
    for cluster_bits in [9, 10, 11, 12, 13, 14] {
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(SIZE)
        };
        let desk = Desk::with(&["vda"], &options);
        let before = desk.content("vda");
        let mut count = 0;
        let refused = loop {
            let taken = desk.session(|domain| {
                let name = format!("checkpoint-{count}");
                domain.create(&spec(&name), CreateFlags::NONE).map(drop)
            });
            match taken {
                Ok(()) => count += 1,
                Err(error) => break error,
            }
            if count == 150 {
                break tidemark_checkpoint::Error::NoStore;
            }
        };
        if count < 150 {
            let said = refused.to_string();
            assert!(
                said.contains("room") || said.contains("cluster"),
                "2^{cluster_bits}: {said}"
            );
        }
        held.push((1_u32 << cluster_bits, count));
        let path = desk.image("vda");
        desk.qemu_writes("vda", &["write -P 0x61 1M 64k"]);
        qemu_img::bitmap_add(&path, "theirs", None);
        if cluster_bits > 12 {
            let long = format!("{}.raw", "n".repeat(1019));
            qemu_img::rebase_unsafe(&path, &long, "raw");
            qemu_img::ok(&[
                "rebase",
                "-u",
                "-f",
                "qcow2",
                "-b",
                "",
                path.to_str().unwrap(),
            ]);
        }
        desk.qemu_writes("vda", &["write -P 0x62 2M 64k"]);
        desk.assert_clean();
        if count > 0 {
            desk.covers("checkpoint-0", "vda", &before, &format!("2^{cluster_bits}"));
            assert_eq!(
                desk.session(|d| d.rebuild(false).unwrap().checkpoints.len()),
                count
            );
        }
    }
    println!("checkpoints held by cluster size: {held:?}");
}
