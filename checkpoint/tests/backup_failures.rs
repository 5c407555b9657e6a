//! Backups that are refused, stopped, killed or moved, and what can be done with what is left.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod backup_world;

use std::ops::ControlFlow;
use std::sync::Arc;

use backup_world::{CLUSTER, DISK_BYTES, World, assert_incremental, assert_same, only};
use tidemark_checkpoint::backup::{self, BackupOptions, Error, Format, RestoreOptions};
use tidemark_checkpoint::{CreateFlags, CreateSpec};
use tidemark_qcow2::{CreateOptions, Image};

#[test]
fn an_existing_file_is_not_restored_over() {
    let mut world = World::new();
    world.write("vda", 0, CLUSTER, 1);
    world.backup(None, None);
    let to = world.path("precious");
    std::fs::write(&to, "precious").unwrap();
    let options = RestoreOptions {
        from: world.directory(),
        disk: "vda".to_owned(),
        to: to.clone(),
        ..RestoreOptions::default()
    };
    let error = backup::restore(&options).unwrap_err();
    assert!(matches!(error, Error::TargetExists(path) if path == to));
    assert_eq!(std::fs::read(&to).unwrap(), b"precious");
}

#[test]
fn what_is_not_there_is_named() {
    let world = World::new();
    let at = |disk: &str, at: Option<&str>| {
        let options = RestoreOptions {
            from: world.directory(),
            disk: disk.to_owned(),
            at: at.map(ToOwned::to_owned),
            to: world.path("restored"),
            ..RestoreOptions::default()
        };
        backup::restore(&options).unwrap_err()
    };
    assert!(matches!(at("vda", None), Error::NoSuchDisk(_)));
    world.backup(Some("a"), None);
    assert!(matches!(at("vda", Some("b")), Error::NoSuchPoint(_)));
    assert!(matches!(at("vdb", Some("a")), Error::NoSuchDisk(_)));
    assert!(!world.path("restored").exists());
}

#[test]
fn a_refused_checkpoint_leaves_no_trace() {
    let world = World::new();
    world.backup(Some("a"), None);
    let before = names(&world);
    let taken = world.options(Some("a"), None);
    let unknown = world.options(Some("b"), Some("nobody"));
    for options in [taken, unknown] {
        let refused = world.with(|domain| backup::backup(domain, &options));
        assert!(matches!(refused, Err(Error::Checkpoint(_))), "{refused:?}");
    }
    assert_eq!(names(&world), before);
    world.with(|domain| {
        assert!(domain.tentative().unwrap().is_none());
        assert!(domain.lookup("b").is_err());
    });
}

#[test]
fn a_stopped_backup_leaves_neither_files_nor_a_checkpoint_and_no_change_is_missed() {
    let mut world = World::new();
    world.write("vda", 0, 30 * CLUSTER, 1);
    world.backup(Some("a"), None);
    let before = names(&world);
    world.write("vda", 7 * CLUSTER, 1, 2);
    let stopping = BackupOptions {
        watch: Some(Arc::new(|_| ControlFlow::Break(()))),
        ..world.options(Some("b"), Some("a"))
    };
    let stopped = world.with(|domain| backup::backup(domain, &stopping));
    assert!(matches!(stopped, Err(Error::Stopped)), "{stopped:?}");
    assert_eq!(names(&world), before);
    world.write("vda", 9 * CLUSTER, 1, 3);
    let report = world.backup(Some("b"), Some("a"));
    assert_incremental(only(&report));
    world.assert_backed_up(only(&report));
    world.assert_sound();
}

#[test]
fn a_killed_backup_can_be_cancelled() {
    let mut world = World::new();
    world.backup(Some("a"), None);
    world.write("vda", CLUSTER, 1, 1);
    world.with(|domain| {
        let spec = CreateSpec {
            name: Some("b".to_owned()),
            ..CreateSpec::default()
        };
        drop(domain.prepare(&spec, CreateFlags::NONE).unwrap());
    });
    world.write("vda", 2 * CLUSTER, 1, 2);
    let refused = world.with(|domain| backup::backup(domain, &world.options(Some("c"), None)));
    assert!(refused.is_err(), "{refused:?}");
    assert!(world.with(backup::cancel).unwrap());
    assert!(!world.with(backup::cancel).unwrap());
    let report = world.backup(Some("b"), Some("a"));
    assert_incremental(only(&report));
    world.assert_backed_up(only(&report));
}

#[test]
fn a_backup_killed_after_its_manifest_needs_only_its_checkpoint() {
    let mut world = World::new();
    world.write("vda", 0, CLUSTER, 1);
    world.backup(Some("a"), None);
    world.write("vda", CLUSTER, 1, 2);
    // The image as it is while the data is copied, put back after the manifest is there.
    let (image, copy) = (world.image("vda"), world.path("copy"));
    let (from, to) = (image.clone(), copy.clone());
    let options = BackupOptions {
        watch: Some(Arc::new(move |_| {
            std::fs::copy(&from, &to).unwrap();
            ControlFlow::Continue(())
        })),
        ..world.options(Some("b"), Some("a"))
    };
    let report = world
        .with(|domain| backup::backup(domain, &options))
        .unwrap();
    std::fs::rename(&copy, &image).unwrap();
    let elsewhere = world.with(|domain| backup::resume(domain, &world.path("elsewhere")));
    assert!(matches!(elsewhere, Err(Error::NotResumable(name)) if name == "b"));
    let directory = world.directory();
    let resumed = world.with(|domain| backup::resume(domain, &directory));
    assert_eq!(resumed.unwrap(), Some(report));
    assert_eq!(
        world
            .with(|domain| backup::resume(domain, &directory))
            .unwrap(),
        None
    );
    world.write("vda", 2 * CLUSTER, 1, 3);
    let report = world.backup(None, Some("b"));
    assert_incremental(only(&report));
    world.assert_backed_up(only(&report));
    world.assert_sound();
}

#[test]
fn a_directory_of_backups_can_be_moved() {
    let mut world = World::new();
    world.write("vda", 0, CLUSTER, 1);
    world.backup(Some("a"), None);
    world.write("vda", CLUSTER, 1, 2);
    let report = world.backup(Some("b"), Some("a"));
    let elsewhere = world.path("elsewhere");
    std::fs::rename(world.directory(), &elsewhere).unwrap();
    assert!(backup::verify(&elsewhere).unwrap().is_sound());
    let found = backup_world::content(&elsewhere.join(&only(&report).path));
    assert_same(&found, world.models["vda"].content(), "the moved chain");
}

#[test]
fn a_disk_of_any_name_has_files_of_its_own() {
    let mut world = World::empty();
    for (seed, name) in (1..).zip(["a:b", "a_b", "a b"]) {
        world.add(name, &CreateOptions::new(DISK_BYTES));
        world.write(name, 0, 10, seed);
    }
    for (checkpoint, since) in [("a", None), ("b", Some("a"))] {
        let report = world.backup(Some(checkpoint), since);
        report
            .disks
            .iter()
            .for_each(|disk| world.assert_backed_up(disk));
    }
    world.assert_sound();
}

#[test]
fn a_restored_image_is_a_disk_of_its_own() {
    let mut world = World::new();
    world.write("vda", 0, CLUSTER, 1);
    world.backup(Some("a"), None);
    let to = world.path("restored.qcow2");
    let options = RestoreOptions {
        from: world.directory(),
        disk: "vda".to_owned(),
        at: Some("a".to_owned()),
        to: to.clone(),
        format: Format::Qcow2,
    };
    let restored = backup::restore(&options).unwrap();
    assert_eq!(restored.checkpoint.as_deref(), Some("a"));
    let storage = tidemark_qcow2::FileStorage::open(&to, false, tidemark_qcow2::Sharing::Exclusive);
    let image = Image::open(Box::new(storage.unwrap()), Default::default()).unwrap();
    assert_eq!(image.backing(), None);
    assert_eq!(image.bitmaps().unwrap(), []);
    assert!(matches!(
        image.chain(),
        tidemark_qcow2::chain::Reading::Absent
    ));
}

/// All names in the directory of backups.
fn names(world: &World) -> Vec<String> {
    let entries = std::fs::read_dir(world.directory()).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
