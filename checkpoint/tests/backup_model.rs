//! The law of the whole: every point gives back the disk as it was at its moment.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod backup_world;

use backup_world::{World, assert_same};
use proptest::prelude::*;
use tidemark_checkpoint::DeleteFlags;
use tidemark_checkpoint::backup::{self, Mode, Report};
use tidemark_fixtures::ops::{Op, ops};
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_qcow2::CreateOptions;

/// What happens between two backups.
#[derive(Clone, Debug)]
struct Step {
    ops: Vec<Op>,
    /// Which of the points so far to count from; none for a full one.
    since: Option<prop::sample::Index>,
    /// Which checkpoint to delete before; its backup stays.
    delete: Option<prop::sample::Index>,
}

/// Not a multiple of any cluster size.
const SIZE: u64 = (37 << 16) + 512;

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>();
    (
        ops(SIZE, 8),
        prop::option::weighted(0.9, index.clone()),
        prop::option::weighted(0.2, index),
    )
        .prop_map(|(ops, since, delete)| Step { ops, since, delete })
}

/// A point and what the disk held.
struct Point {
    name: String,
    report: Report,
    content: Vec<u8>,
    is_deleted: bool,
}

fn take(world: &mut World, points: &mut Vec<Point>, step: &Step) {
    world.run("vda", &step.ops);
    if let Some(doomed) = step.delete.filter(|_| !points.is_empty()) {
        let point = doomed.get(points).name.clone();
        let point = points.iter_mut().find(|found| found.name == point).unwrap();
        if !point.is_deleted {
            point.is_deleted = true;
            world.with(|domain| {
                let checkpoint = domain.lookup(&point.name).unwrap();
                checkpoint.delete(DeleteFlags::NONE).unwrap();
            });
        }
    }
    let living: Vec<&Point> = points.iter().filter(|point| !point.is_deleted).collect();
    let since = step.since.filter(|_| !living.is_empty());
    let since = since.map(|index| index.get(&living).name.clone());
    let name = format!("c{}", points.len());
    let report = world.backup(Some(&name), since.as_deref());
    assert_eq!(report.disks[0].reason, None);
    let wanted = if since.is_some() {
        Mode::Incremental
    } else {
        Mode::Full
    };
    assert_eq!(report.disks[0].mode, wanted);
    points.push(Point {
        name,
        report,
        content: world.models["vda"].content().to_vec(),
        is_deleted: false,
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_point_restores_to_its_moment(
        cluster_bits in prop::sample::select(vec![13_u32, 16, 18]),
        steps in prop::collection::vec(step(), 1..6),
    ) {
        let mut world = World::empty();
        world.add("vda", &CreateOptions { cluster_bits, ..CreateOptions::new(SIZE) });
        let mut points = Vec::new();
        for step in &steps {
            take(&mut world, &mut points, step);
        }
        for point in &points {
            let restored = world.restored("vda", Some(&point.name));
            assert_same(&restored, &point.content, &point.name);
            if oracle::available() {
                let target = world.directory().join(&point.report.disks[0].path);
                let converted = qemu_img::convert_to_raw(&target);
                assert_same(&converted, &point.content, "qemu-img convert");
                qemu_img::check(&target).assert_clean();
            }
        }
        prop_assert!(backup::verify(&world.directory()).unwrap().is_sound());
    }
}
