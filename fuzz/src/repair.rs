//! Bytes choose a damaged image, as in `damage`; it is repaired.
//!
//! Checked: nothing panics; a repair that was refused, and the repair of a clean image, change no
//! byte; after a repair the check finds no more than before, unless metadata
//! shares its cluster, which no repair can part; a second repair finds nothing to
//! do; what a guest could read before it reads the same afterwards. Not checked: that all that
//! could be saved was saved, what QEMU makes of it, and crashes in between; `qcow2/tests/repair`
//! is about those.

use tidemark_qcow2::check::{self, Repair};
use tidemark_qcow2::{CheckReport, Error, Finding, Image, OpenOptions};

use crate::bounded::Bounded;
use crate::damage::damage_of;

/// Bytes of the disk that are compared, from its start.
const MAX_GUEST_BYTES: u64 = 1 << 20;
/// Bytes that are read at once: some of them may be unreadable.
const STEP: u64 = 512;

/// Repairs a damaged image twice; panics when something of the above fails.
pub fn repair(data: &[u8]) {
    let (image, _) = damage_of(data);
    let what = match data.last() {
        Some(byte) if byte & 1 == 1 => Repair::Leaks,
        _ => Repair::All,
    };
    repair_image(&image, what);
}

/// The same with any file.
pub fn repair_image(image: &[u8], what: Repair) {
    let storage = Bounded::new(image);
    let before = check::check(Box::new(storage.clone()));
    let content = guest_content(&storage);
    let repaired = check::repair(Box::new(storage.clone()), what);
    let after = storage.to_bytes();
    let report = match repaired {
        Ok(report) => report,
        Err(error) => {
            let torn = matches!(error, Error::Io { .. });
            assert!(torn || after == image, "refused after a write: {error}");
            return;
        }
    };
    if let Ok(before) = before {
        let clean = before.is_clean() && before.warnings == 0;
        assert!(!clean || after == image, "a clean image was changed");
        let (old, new) = (harm(&before), harm(&report.check));
        // Metadata that shares its cluster stays as it is, and once the counts are right its
        // overlap and its flags are told one by one.
        let shared = |finding: &Finding| matches!(finding, Finding::Overlap { .. });
        let told = report.check.findings.iter().any(shared);
        assert!(new <= old || told, "a repair made {new} of {old}");
    }
    for (number, (old, new)) in content.iter().zip(guest_content(&storage)).enumerate() {
        let lost = old.is_some() && *old != new;
        assert!(!lost, "the guest reads other bytes in block {number}");
    }
    let again = check::repair(Box::new(storage.clone()), what);
    let again = again.expect("what was repaired can be repaired again");
    assert_eq!(harm(&again.check), harm(&report.check));
    assert!(storage.to_bytes() == after, "a second repair found work");
}

/// What a check found that must not grow.
fn harm(report: &CheckReport) -> u64 {
    report.corruptions + report.check_errors
}

/// Blocks of the disk; none where reading fails, nothing when it does not open.
fn guest_content(storage: &Bounded) -> Vec<Option<Vec<u8>>> {
    let Ok(image) = Image::open(Box::new(storage.clone()), OpenOptions::default()) else {
        return Vec::new();
    };
    let blocks = image.size().min(MAX_GUEST_BYTES) / STEP;
    let read = |number| {
        let mut block = vec![0; 512];
        let result = image.read(&mut block, number * STEP);
        result.ok().map(|()| block)
    };
    (0..blocks).map(read).collect()
}
