//! The law of the whole: whatever happened to the images, every backup point restores the disks as
//! they were at its moment, byte for byte, here and by `qemu-img convert`.
//!
//! What happens: writes, zeroes, discards, checkpoints, backups since any point, deletions of all
//! kinds, clean closes, crashes of ours, writes by QEMU, QEMU killed in the middle, recoveries, and
//! foreign bitmap commands. One case is one random life of one to three disks. `TIDEMARK_CASES`
//! sets the number of lives.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod backup_world;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use backup_world::{DISK_BYTES, World, apply, assert_same, content};
use proptest::prelude::*;
use tidemark_checkpoint::backup::Mode;
use tidemark_checkpoint::{CreateFlags, CreateSpec, DeleteFlags, Domain};
use tidemark_fixtures::model::DiskModel;
use tidemark_fixtures::ops::{Op, ops};
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{self, qemu_img, qemu_io};
use tidemark_qcow2::{CreateOptions, FileStorage, Image, Sharing};

/// What one step of a life does. Indexes are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    /// A session of ours that closes cleanly.
    Session(usize, Vec<Op>),
    /// A session of ours that is dropped without a close.
    Crash(usize, Vec<Op>),
    /// A checkpoint without a backup.
    Checkpoint,
    /// A backup with a new checkpoint, since an earlier point or in full.
    Backup(Option<usize>),
    /// Deletes a checkpoint.
    Delete(usize, u8),
    /// QEMU writes and closes.
    Qemu(usize, u64, u64, u8),
    /// QEMU writes and is killed.
    QemuKilled(usize, u64, u64, u8),
    /// Somebody runs a bitmap command on a bitmap of the chain.
    Foreign(usize, usize, u8),
    /// Recovers what can be proved.
    Recover,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..DISK_BYTES - 300_000, 1..300_000_u64, 1..=255_u8);
    prop_oneof![
        4 => (0..3_usize, ops(DISK_BYTES, 6)).prop_map(|(disk, list)| Step::Session(disk, list)),
        3 => (0..3_usize, ops(DISK_BYTES, 6)).prop_map(|(disk, list)| Step::Crash(disk, list)),
        2 => Just(Step::Checkpoint),
        5 => prop::option::weighted(0.85, 0..6_usize).prop_map(Step::Backup),
        2 => (0..8_usize, 0..4_u8).prop_map(|(which, flags)| Step::Delete(which, flags)),
        2 => (0..3_usize, range.clone()).prop_map(|(d, (at, len, byte))| Step::Qemu(d, at, len, byte)),
        1 => (0..3_usize, range).prop_map(|(d, (at, len, byte))| Step::QemuKilled(d, at, len, byte)),
        1 => (0..3_usize, 0..4_usize, 0..5_u8).prop_map(|(d, which, how)| Step::Foreign(d, which, how)),
        2 => Just(Step::Recover),
    ]
}

/// One life: the images, the checkpoints that were ever made, and what each point must restore.
struct Life {
    world: World,
    disks: Vec<String>,
    made: usize,
    points: Vec<(String, BTreeMap<String, Vec<u8>>)>,
    increments: usize,
}

impl Life {
    fn new(disks: usize, cluster_bits: &[u32]) -> Self {
        let mut world = World::empty();
        let names: Vec<String> = ["vda", "vdb", "vdc"].map(str::to_owned)[..disks].to_vec();
        for (name, &cluster_bits) in names.iter().zip(cluster_bits) {
            world.add(
                name,
                &CreateOptions {
                    cluster_bits,
                    ..CreateOptions::new(DISK_BYTES)
                },
            );
        }
        Self {
            world,
            disks: names,
            made: 0,
            points: Vec::new(),
            increments: 0,
        }
    }

    fn disk(&self, index: usize) -> String {
        self.disks[index % self.disks.len()].clone()
    }

    fn next_name(&mut self) -> String {
        self.made += 1;
        format!("c{}", self.made)
    }

    fn live(&step: &usize, names: &[String]) -> Option<String> {
        (!names.is_empty()).then(|| names[step % names.len()].clone())
    }

    fn checkpoints(&self) -> Vec<String> {
        self.world.with(|domain| {
            let list = domain
                .checkpoints(tidemark_checkpoint::ListFlags::NONE)
                .unwrap();
            list.iter()
                .map(|checkpoint| checkpoint.name().to_owned())
                .collect()
        })
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Session(disk, list) => {
                let disk = self.disk(*disk);
                self.world.run(&disk, list);
            }
            Step::Crash(disk, list) => self.crash(*disk, list),
            Step::Checkpoint => {
                let name = Some(self.next_name());
                let spec = CreateSpec {
                    name,
                    ..CreateSpec::default()
                };
                self.world
                    .with(|domain| domain.create(&spec, CreateFlags::NONE).map(drop))
                    .unwrap();
            }
            Step::Backup(since) => self.backup(*since),
            Step::Delete(which, flags) => self.delete(*which, *flags),
            Step::Qemu(disk, at, len, byte) if oracle::available() => {
                let disk = self.disk(*disk);
                let write = format!("write -P {byte} {at} {len}");
                qemu_io::commands(&self.world.image(&disk), &[&write]);
                self.look_again(&disk);
            }
            Step::QemuKilled(disk, at, len, byte) if oracle::available() => {
                let disk = self.disk(*disk);
                let mut daemon = QemuStorageDaemon::spawn();
                let node = daemon.open_image(&self.world.image(&disk));
                daemon.guest(&node, &[&format!("write -P {byte} {at} {len}"), "flush"]);
                daemon.kill_dash_nine();
                self.look_again(&disk);
            }
            Step::Foreign(disk, which, how) if oracle::available() => {
                self.foreign(*disk, *which, *how);
            }
            Step::Qemu(..) | Step::QemuKilled(..) | Step::Foreign(..) => {}
            Step::Recover => {
                self.world.with(Domain::recover).unwrap();
            }
        }
    }

    /// After somebody else had the disk, what it reads as is what it holds.
    fn look_again(&mut self, disk: &str) {
        let found = content(&self.world.image(disk));
        self.world
            .models
            .insert(disk.to_owned(), DiskModel::from_content(found));
    }

    fn crash(&mut self, disk: usize, list: &[Op]) {
        let disk = self.disk(disk);
        let storage =
            FileStorage::open(&self.world.image(&disk), true, Sharing::Exclusive).unwrap();
        let image = Image::open(Box::new(storage), backup_world::writing()).unwrap();
        let mut model = self.world.models[&disk].clone();
        for op in list {
            apply(&image, &mut model, op);
        }
        drop(image);
        self.look_again(&disk);
    }

    fn backup(&mut self, since: Option<usize>) {
        let name = self.next_name();
        let known = self.checkpoints();
        let since = since.and_then(|index| Self::live(&index, &known));
        let report = self.world.backup(Some(&name), since.as_deref());
        self.increments += report
            .disks
            .iter()
            .filter(|disk| disk.mode == Mode::Incremental)
            .count();
        let contents = self
            .world
            .models
            .iter()
            .map(|(disk, model)| (disk.clone(), model.content().to_vec()))
            .collect();
        self.points.push((name, contents));
    }

    fn delete(&mut self, which: usize, flags: u8) {
        let flags = match flags {
            0 | 1 => DeleteFlags::NONE,
            2 => DeleteFlags::CHILDREN,
            _ => DeleteFlags::CHILDREN | DeleteFlags::CHILDREN_ONLY,
        };
        if let Some(name) = Self::live(&which, &self.checkpoints()) {
            self.world
                .with(|domain| domain.delete(&name, flags).map(drop))
                .unwrap();
        }
    }

    fn foreign(&mut self, disk: usize, which: usize, how: u8) {
        let path = self.world.image(&self.disk(disk));
        let info = qemu_img::info(&path);
        let Some(list) = info["format-specific"]["data"]["bitmaps"].as_array() else {
            return;
        };
        let bitmap = &list[which % list.len()];
        let name = bitmap["name"].as_str().unwrap();
        let in_use = bitmap["flags"]
            .as_array()
            .unwrap()
            .iter()
            .any(|flag| flag == "in-use");
        match how {
            0 => qemu_img::bitmap_remove(&path, name),
            1 => {
                qemu_img::bitmap_remove(&path, name);
                qemu_img::bitmap_add(&path, name, bitmap["granularity"].as_u64());
            }
            _ if in_use => {}
            2 => qemu_img::bitmap_clear(&path, name),
            3 => qemu_img::bitmap_disable(&path, name),
            _ => qemu_img::bitmap_enable(&path, name),
        }
    }

    /// Everything that must hold at the end.
    fn check(&self) {
        for disk in &self.disks {
            let found = content(&self.world.image(disk));
            assert_same(&found, self.world.models[disk].content(), disk);
            if oracle::available() {
                qemu_img::check(&self.world.image(disk)).assert_at_worst_leaks();
            }
        }
        if self.points.is_empty() {
            return;
        }
        self.world.assert_sound();
        let catalogue = tidemark_checkpoint::backup::catalogue(&self.world.directory()).unwrap();
        for (point, contents) in &self.points {
            for (disk, expected) in contents {
                let what = format!("{disk} at {point}");
                assert_same(&self.world.restored(disk, Some(point)), expected, &what);
                if oracle::available() {
                    let entry = catalogue.find(disk, Some(point)).unwrap().entry;
                    let target = self.world.directory().join(&entry.path);
                    let what = format!("{what}, restored by QEMU");
                    assert_same(&qemu_img::convert_to_raw(&target), expected, &what);
                }
            }
        }
    }
}

static INCREMENTS: AtomicUsize = AtomicUsize::new(0);
static POINTS: AtomicUsize = AtomicUsize::new(0);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("TIDEMARK_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(24)
    ))]

    fn any_life(
        disks in 1..=3_usize,
        cluster_bits in prop::array::uniform3(prop::sample::select(vec![12_u32, 16, 16, 18])),
        steps in prop::collection::vec(step(), 4..16),
    ) {
        let mut life = Life::new(disks, &cluster_bits);
        steps.iter().for_each(|step| life.take(step));
        // The end is a point as well, since the oldest that is left.
        life.take(&Step::Backup(Some(0)));
        life.check();
        INCREMENTS.fetch_add(life.increments, Ordering::Relaxed);
        POINTS.fetch_add(life.points.len(), Ordering::Relaxed);
    }
}

#[test]
fn every_point_restores_the_disks_of_its_moment() {
    any_life();
    let (points, increments) = (
        POINTS.load(Ordering::Relaxed),
        INCREMENTS.load(Ordering::Relaxed),
    );
    println!("{points} points restored, {increments} disks of them incremental");
    assert!(
        increments > 0,
        "no life ever made an increment: the law was not tried"
    );
}

#[test]
fn a_life_with_crashes_on_both_sides_stays_incremental() {
    let write = |at, len, seed| Op::Write {
        offset: at,
        len,
        seed,
    };
    let lives = [vec![
        Step::Backup(None),
        Step::Crash(
            0,
            vec![
                write(100_000, 5_000, 1),
                Op::Flush,
                write(900_000, 70_000, 2),
            ],
        ),
        Step::Qemu(0, 1_000_000, 1_000, 7),
        Step::Backup(Some(0)),
        Step::QemuKilled(0, 200_000, 1_000, 8),
        Step::Recover,
        Step::Backup(Some(1)),
        Step::Session(0, vec![write(0, 10, 3)]),
        Step::Backup(Some(2)),
        Step::Delete(1, 0),
        Step::Backup(Some(0)),
    ]];
    for steps in lives {
        let mut life = Life::new(2, &[16, 12, 16]);
        steps.iter().for_each(|step| life.take(step));
        life.check();
        assert!(life.increments >= 4, "{} increments", life.increments);
    }
}
