//! Every crash and every failed call while an overlay is moved: the disk reads the same.

use std::sync::Arc;

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{
    CallKind, CrashOptions, CrashStorage, Errno, Fault, FaultyStorage,
};
use tidemark_qcow2::transfer::{RebaseOptions, rebase};
use tidemark_qcow2::{Image, OpenOptions, Result};

use crate::common::{alone, read_all};
use crate::rebase::quietly;
use crate::rebase_bitmaps::{Case, open, raw, said};
use crate::stack::content_of;

const SHAPES: [(u32, bool); 3] = [(12, false), (16, false), (16, true)];
/// Not discards: whether the host gives space back is its own business.
const KINDS: [&[CallKind]; 3] = [
    &[CallKind::Read],
    &[
        CallKind::Write,
        CallKind::WriteZeroes,
        CallKind::Flush,
        CallKind::SetLen,
    ],
    &[CallKind::Len],
];
const TARGETS: [Option<&str>; 3] = [Some("other"), None, Some("base")];

#[test]
fn a_crash_of_a_rebase_leaves_the_disk_as_it_was() {
    let _alone = alone();
    let (mut points, mut images, mut judged) = (0, 0, 0);
    for (cluster_bits, extended_l2) in SHAPES {
        let case = Case::new(cluster_bits, extended_l2);
        for target in TARGETS {
            let storage = CrashStorage::new(case.bytes.clone());
            let before = said(&open(&storage, &case.gate));
            let options = RebaseOptions {
                gate: Arc::clone(&case.gate),
                threads: 1,
            };
            let reference = target.map(raw);
            let image = open(&storage, &case.gate);
            rebase(image, reference.as_ref(), &options, &quietly).unwrap();
            let log = storage.log();
            points += log.points();
            for crash in log.images(CrashOptions::default()) {
                let what = format!("2^{cluster_bits} onto {target:?}: {}", crash.description);
                let left = CrashStorage::new(crash.bytes.clone());
                let image = open(&left, &case.gate);
                assert!(read_all(&image) == case.content, "{what}: another disk");
                assert!(said(&image) == before, "{what}: other bitmaps");
                let named = image.backing();
                assert!(named == reference || named == Some(raw("base")), "{what}");
                let report = image.check().unwrap();
                let harm = (report.check_errors, report.corruptions);
                assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
                if oracle::available() && images % 97 == 0 {
                    let folder = tempfile::tempdir().unwrap();
                    let path = folder.path().join("image");
                    std::fs::write(&path, &crash.bytes).unwrap();
                    for name in ["base", "other"] {
                        let file = case.gate.open(&raw(name), "").unwrap();
                        std::fs::write(folder.path().join(name), content_of(&*file)).unwrap();
                    }
                    assert!(qemu_img::convert_to_raw(&path) == case.content, "{what}");
                    qemu_img::check(&path).assert_at_worst_leaks();
                    judged += 1;
                }
                images += 1;
            }
        }
    }
    println!("{points} points, {images} images, {judged} judged by QEMU");
    assert!(points >= 200 && images >= 700, "{points}, {images}");
}

#[test]
fn a_failed_call_of_a_rebase_surfaces_and_leaves_the_disk_as_it_was() {
    let mut runs = 0;
    for (cluster_bits, extended_l2) in SHAPES {
        let case = Case::new(cluster_bits, extended_l2);
        let before = said(&open(&CrashStorage::new(case.bytes.clone()), &case.gate));
        let session = |storage: FaultyStorage, target: Option<&str>| -> Result<()> {
            let options = RebaseOptions {
                gate: Arc::clone(&case.gate),
                threads: 1,
            };
            let open = OpenOptions::writing(Arc::clone(&case.gate));
            let image = Image::open(Box::new(storage), open)?;
            rebase(image, target.map(raw).as_ref(), &options, &quietly)?;
            Ok(())
        };
        for target in [Some("other"), None] {
            for kinds in KINDS {
                let clean = FaultyStorage::new(CrashStorage::new(case.bytes.clone()));
                session(clean.clone(), target).unwrap();
                let calls = clean.calls_of(kinds);
                // Every call where there are few, some of the others.
                let step = usize::try_from(calls / 40 + 1).unwrap();
                for at in (0..calls).step_by(step) {
                    for errno in [Errno::Io, Errno::NoSpace] {
                        let below = CrashStorage::new(case.bytes.clone());
                        let storage = FaultyStorage::new(below.clone());
                        storage.arm(Fault::once(kinds, at).with_errno(errno));
                        let answer = session(storage.clone(), target);
                        let what = format!("2^{cluster_bits} {target:?}: {at} of {kinds:?}");
                        let fine = answer.is_err() || errno == Errno::NoSpace;
                        assert!(fine || storage.fired() == 0, "{what}: swallowed");
                        let image = open(&below, &case.gate);
                        assert!(read_all(&image) == case.content, "{what}: another disk");
                        assert!(said(&image) == before, "{what}: other bitmaps");
                        let report = image.check().unwrap();
                        let harm = (report.check_errors, report.corruptions);
                        assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
                        runs += 1;
                    }
                }
            }
        }
    }
    println!("{runs} faults");
    assert!(runs >= 400, "the sweep shrank: {runs}");
}
