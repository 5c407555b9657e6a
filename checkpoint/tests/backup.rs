//! Backups of closed images: what is full, what is incremental, and what comes back.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod backup_world;

use backup_world::{CLUSTER, DISK_BYTES, World, assert_full, assert_incremental, only};
use tidemark_checkpoint::backup::{self, BackupOptions, Format};
use tidemark_checkpoint::{CreateFlags, CreateSpec, DeleteFlags};
use tidemark_fixtures::ops::Op;
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_qcow2::CreateOptions;

#[test]
fn a_full_backup_holds_the_disk_and_nothing_else() {
    let mut world = World::new();
    world.write("vda", 3 * CLUSTER + 17, 2 * CLUSTER, 1);
    let report = world.backup(None, None);
    let disk = only(&report);
    assert_full(disk, None);
    assert_eq!(disk.bytes, 3 * CLUSTER);
    world.assert_backed_up(disk);
    world.assert_sound();
}

#[test]
fn zeros_that_are_stored_take_no_room_in_a_full_backup() {
    let mut world = World::new();
    let zeros = vec![0; usize::try_from(8 * CLUSTER).unwrap()];
    world.with(|domain| domain.disks()[0].image.write(&zeros, 0).unwrap());
    world.write("vda", 20 * CLUSTER, 1, 1);
    assert_eq!(only(&world.backup(None, None)).bytes, CLUSTER);
}

#[test]
fn a_raw_backup_is_the_disk_byte_for_byte() {
    let mut world = World::new();
    world.write("vda", DISK_BYTES - 5000, 5000, 1);
    world.write("vda", 0, 10, 2);
    let options = BackupOptions {
        format: Format::Raw,
        ..world.options(Some("a"), None)
    };
    let report = world
        .with(|domain| backup::backup(domain, &options))
        .unwrap();
    world.assert_backed_up(only(&report));
    world.write("vda", CLUSTER, 10, 3);
    let report = world.backup(Some("b"), Some("a"));
    assert_incremental(only(&report));
    world.assert_backed_up(only(&report));
    world.assert_sound();
}

#[test]
fn an_increment_holds_writes_zeros_and_discards_and_nothing_else() {
    let mut world = World::new();
    world.write("vda", 0, 30 * CLUSTER, 1);
    let first = world.backup(Some("a"), None);
    let before = world.models["vda"].content().to_vec();
    let (offset, len) = (9 * CLUSTER, 3 * CLUSTER);
    world.run(
        "vda",
        &[
            Op::Write {
                offset: 2 * CLUSTER + 5,
                len: 7,
                seed: 2,
            },
            Op::WriteZeroes {
                offset: 5 * CLUSTER - 9,
                len: 2 * CLUSTER,
            },
            Op::Discard { offset, len },
        ],
    );
    let second = world.backup(Some("b"), Some("a"));
    let disk = only(&second);
    assert_incremental(disk);
    // The written one, those that are zero in part, and where witnesses were planted.
    assert!(disk.bytes <= (3 + 16) * CLUSTER, "{disk:?}");
    world.assert_backed_up(disk);
    world.assert_restores(only(&first), Some("a"), &before);
    world.assert_sound();
    if oracle::available() {
        let map = qemu_img::map(&world.directory().join(&disk.path));
        let zero = map.as_array().unwrap().iter().any(|extent| {
            extent["start"] == offset && extent["depth"] == 0 && extent["zero"] == true
        });
        assert!(zero, "a discarded range is an explicit zero: {map}");
    }
}

#[test]
fn an_increment_without_changes_holds_next_to_nothing() {
    let mut world = World::new();
    world.write("vda", 0, 30 * CLUSTER, 1);
    world.backup(Some("a"), None);
    let report = world.backup(Some("b"), Some("a"));
    assert_incremental(only(&report));
    // At most the bits that were planted as witnesses.
    assert!(only(&report).bytes <= 16 * CLUSTER);
    world.assert_backed_up(only(&report));
}

#[test]
fn small_clusters_and_a_backing_chain_come_back_too() {
    let mut world = World::empty();
    let small = CreateOptions {
        cluster_bits: 9,
        ..CreateOptions::new(DISK_BYTES)
    };
    world.add("base", &small);
    world.write("base", 100_000, 300_000, 1);
    world.add_overlay("vda", "base");
    world.models.remove("base");
    world.write("vda", 200_000, 5000, 2);
    let report = world.backup(Some("a"), None);
    world.assert_backed_up(only(&report));
    world.run(
        "vda",
        &[Op::Discard {
            offset: 2 * CLUSTER,
            len: 2 * CLUSTER,
        }],
    );
    let report = world.backup(Some("b"), Some("a"));
    assert_incremental(only(&report));
    world.assert_backed_up(only(&report));
    world.assert_sound();
}

#[test]
fn a_differential_builds_on_the_older_backup() {
    let mut world = World::new();
    world.write("vda", 0, CLUSTER, 1);
    let first = world.backup(Some("a"), None);
    world.write("vda", 10 * CLUSTER, 1, 2);
    world.backup(Some("b"), Some("a"));
    world.write("vda", 20 * CLUSTER, 1, 3);
    let report = world.backup(None, Some("a"));
    assert_incremental(only(&report));
    let catalogue = backup::catalogue(&world.directory()).unwrap();
    let newest = catalogue.points().last().unwrap();
    let below = newest.disks[0].backing.as_ref().unwrap();
    assert_eq!(below.path, only(&first).path);
    world.assert_backed_up(only(&report));
}

#[test]
fn without_the_backup_of_the_checkpoint_the_disk_is_full_with_the_reason() {
    let mut world = World::new();
    world.write("vda", 0, CLUSTER, 1);
    world.with(|domain| {
        let spec = CreateSpec {
            name: Some("a".to_owned()),
            ..CreateSpec::default()
        };
        domain.create(&spec, CreateFlags::NONE).unwrap();
    });
    let report = world.backup(Some("b"), Some("a"));
    assert_full(only(&report), Some("no backup of checkpoint 'a'"));
    world.assert_backed_up(only(&report));
}

#[test]
fn a_name_that_was_taken_again_is_another_checkpoint() {
    let mut world = World::new();
    world.write("vda", 0, CLUSTER, 1);
    world.backup(Some("a"), None);
    world.with(|domain| {
        domain
            .lookup("a")
            .unwrap()
            .delete(DeleteFlags::NONE)
            .unwrap();
        let spec = CreateSpec {
            name: Some("a".to_owned()),
            ..CreateSpec::default()
        };
        domain.create(&spec, CreateFlags::NONE).unwrap();
    });
    let report = world.backup(None, Some("a"));
    assert_full(only(&report), Some("no backup of checkpoint 'a'"));
}

#[test]
fn a_backup_whose_chain_is_broken_is_not_built_on() {
    let mut world = World::new();
    world.write("vda", 0, CLUSTER, 1);
    let first = world.backup(Some("a"), None);
    world.write("vda", 0, 1, 2);
    world.backup(Some("b"), Some("a"));
    std::fs::remove_file(world.directory().join(&only(&first).path)).unwrap();
    let report = world.backup(None, Some("b"));
    assert_full(only(&report), Some("missing"));
    world.assert_backed_up(only(&report));
}

#[test]
fn a_new_disk_is_full_alone() {
    let mut world = World::new();
    world.write("vda", 0, CLUSTER, 1);
    world.backup(Some("a"), None);
    world.add("vdb", &CreateOptions::new(DISK_BYTES));
    world.write("vda", CLUSTER, 1, 2);
    world.write("vdb", CLUSTER, 1, 3);
    let report = world.backup(Some("b"), Some("a"));
    let [vda, vdb] = report.disks.as_slice() else {
        panic!("{report:?}")
    };
    assert_incremental(vda);
    assert_full(vdb, Some(""));
    assert!(vdb.reason.is_some());
    world.assert_backed_up(vda);
    world.assert_backed_up(vdb);
    world.write("vdb", 3 * CLUSTER, 1, 3);
    let report = world.backup(None, Some("b"));
    report.disks.iter().for_each(assert_incremental);
    report
        .disks
        .iter()
        .for_each(|disk| world.assert_backed_up(disk));
    world.assert_sound();
}

/// Gives the disk another size, with QEMU. What a disk reads where it was cut inside a cluster and
/// grown again is not for us to say.
fn resize(world: &mut World, size: u64) {
    qemu_img::resize(&world.image("vda"), size);
    let content = qemu_img::convert_to_raw(&world.image("vda"));
    let model = tidemark_fixtures::model::DiskModel::from_content(content);
    assert_eq!(model.size(), size);
    world.models.insert("vda".to_owned(), model);
}

#[test]
fn a_disk_that_grew_stays_incremental() {
    if !oracle::available() {
        return;
    }
    let mut world = World::new();
    world.write("vda", 0, 30 * CLUSTER, 1);
    world.backup(Some("a"), None);
    let grown = DISK_BYTES + 3 * CLUSTER + 512;
    resize(&mut world, grown);
    world.write("vda", grown - 700, 700, 2);
    let report = world.backup(Some("b"), Some("a"));
    assert_incremental(only(&report));
    world.assert_backed_up(only(&report));
    assert_eq!(
        world.restored("vda", Some("a")).len(),
        usize::try_from(DISK_BYTES).unwrap()
    );
    world.assert_sound();
}

#[test]
fn a_disk_that_shrank_and_grew_comes_back_at_each_size() {
    if !oracle::available() {
        return;
    }
    let mut world = World::new();
    world.write("vda", 0, DISK_BYTES, 1);
    let report = world.backup(Some("a"), None);
    let mut points = vec![("a", report, world.models["vda"].content().to_vec())];
    for (name, since, size) in [
        ("b", "a", 20 * CLUSTER - 1536),
        ("c", "b", 35 * CLUSTER),
        ("d", "c", 38 * CLUSTER),
    ] {
        resize(&mut world, size);
        world.write("vda", 7 * CLUSTER, 1, size);
        let report = world.backup(Some(name), Some(since));
        points.push((name, report, world.models["vda"].content().to_vec()));
    }
    for (name, report, content) in &points {
        world.assert_restores(only(report), Some(name), content);
    }
    world.assert_sound();
}
