//! Every call to the storage fails once while snapshots are taken, applied and deleted.

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{CallKind, CrashStorage, Errno, Fault, FaultyStorage};
use tidemark_qcow2::{CreateOptions, Image, Shrink};

use crate::common::{
    add_bitmap, alone, assert_covers, built, open_bytes, read_all, reading, writing,
};
use crate::life::{Disk, Place, open_snapshot};

const SIZE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug)]
enum Step {
    Take,
    Apply,
    Delete,
}

/// Grown after the snapshot was taken where refcounts are wide: then applying it gives the disk
/// another size.
fn base(refcount_bits: u32) -> (Vec<u8>, Disk) {
    let options = CreateOptions {
        cluster_bits: 12,
        refcount_bits,
        ..CreateOptions::new(SIZE)
    };
    let mut disk = Disk::new(SIZE);
    let bytes = built(&options, |image| {
        image.write(&[0xaa; 90_000], 10_000).unwrap();
        disk.fill(10_000, 90_000, 0xaa);
        image.create_snapshot("old").unwrap();
        disk.take("old");
        image.write(&[0xbb; 30_000], 50_000).unwrap();
        disk.fill(50_000, 30_000, 0xbb);
        add_bitmap(image, "b", 65536);
        if refcount_bits == 16 {
            image.resize(SIZE + 100_352, Shrink::Refused).unwrap();
            disk.content.resize(image.size().try_into().unwrap(), 0);
        }
    });
    (bytes, disk)
}

/// The disk before and after `step`.
fn states(disk: &Disk, step: Step) -> [Disk; 2] {
    let mut after = disk.clone();
    match step {
        Step::Take => after.take("new"),
        Step::Apply => after.content = disk.snapshot("old").to_vec(),
        Step::Delete => after.snapshots.clear(),
    }
    [disk.clone(), after]
}

/// Runs `step` and closes; returns whether the step worked, and whether anything failed.
fn session(storage: FaultyStorage, step: Step) -> (bool, bool) {
    let Ok(image) = Image::open(Box::new(storage), writing()) else {
        return (false, true);
    };
    let done = match step {
        Step::Take => image.create_snapshot("new"),
        Step::Apply => image.apply_snapshot("old"),
        Step::Delete => image.delete_snapshot("old"),
    }
    .is_ok();
    (done, image.close().is_err() || !done)
}

fn check(bytes: &[u8], possible: &[Disk], start: &Disk, what: &str, place: Option<&Place>) {
    let open = |options| open_bytes(bytes.to_vec(), options);
    let image = open(reading()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let report = image.check().unwrap();
    let harm = (report.check_errors, report.corruptions);
    assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
    let content = read_all(&image);
    let names = image.snapshots().unwrap().into_iter().map(|info| info.name);
    let names: Vec<String> = names.collect();
    let found = possible.iter().find(|disk| {
        disk.content == content && disk.snapshots.iter().map(|(name, _)| name).eq(&names)
    });
    let found = found.unwrap_or_else(|| panic!("{what}: neither before nor after: {names:?}"));
    for (name, expected) in &found.snapshots {
        let snapshot = open_snapshot(bytes.to_vec(), reading(), name);
        assert!(&read_all(&snapshot) == expected, "{what}: {name}");
    }
    let bits = image.load_bitmap("b");
    if let Ok(bits) = bits {
        assert_covers(&bits, &start.content, &content, what);
    }
    if let Some(place) = place {
        std::fs::write(&place.path, bytes).unwrap();
        qemu_img::check(&place.path).assert_at_worst_leaks();
    }
}

/// Fails every call of `kinds` once; returns the number of runs.
fn sweep(bits: u32, step: Step, kinds: &'static [CallKind], shape: fn(Fault) -> Fault) -> u64 {
    let (base, disk) = base(bits);
    let both = states(&disk, step);
    let clean = FaultyStorage::new(CrashStorage::new(base.clone()));
    assert_eq!(session(clean.clone(), step), (true, false));
    let calls = clean.calls_of(kinds);
    let place = Place::new();
    for at in 0..calls {
        let below = CrashStorage::new(base.clone());
        let storage = FaultyStorage::new(below.clone());
        storage.arm(shape(Fault::once(kinds, at)));
        let (done, failed) = session(storage.clone(), step);
        let what = format!("{step:?}, call {at} of {kinds:?}");
        let advice = kinds.contains(&CallKind::Discard);
        assert!(
            failed || advice || storage.fired() == 0,
            "{what}: swallowed"
        );
        let possible = if done { &both[1..] } else { &both[..] };
        let qemu = oracle::available() && at % 5 == 0;
        check(
            &below.to_bytes(),
            possible,
            &disk,
            &what,
            qemu.then_some(&place),
        );
    }
    calls
}

#[test]
fn every_failed_call_around_snapshots_surfaces_and_leaves_before_or_after() {
    let _alone = alone();
    let mut runs = 0;
    for bits in [2, 16] {
        for step in [Step::Take, Step::Apply, Step::Delete] {
            for kinds in [
                &[CallKind::Read][..],
                &[CallKind::Write],
                &[CallKind::Flush],
                &[CallKind::Discard],
                &[CallKind::Len, CallKind::SetLen],
            ] {
                runs += sweep(bits, step, kinds, |fault| fault);
            }
            runs += sweep(bits, step, &[CallKind::Write], |fault| {
                fault.with_short(512)
            });
            runs += sweep(bits, step, &[CallKind::Write], |fault| {
                fault.with_errno(Errno::NoSpace)
            });
        }
    }
    println!("{runs} faults");
    assert!(runs >= 200, "the sweep shrank: {runs}");
}
