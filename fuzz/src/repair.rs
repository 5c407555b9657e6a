//! Bytes choose a damaged image, as in `damage`; it is repaired.
//!
//! Checked: nothing panics; a repair that was refused, and the repair of a clean image, change no
//! byte; when an image is clean after its repair, a second one changes no byte, and what a guest
//! could read before it reads the same.
//!
//! Not checked: images that stay damaged, or whose refcounts are too narrow. There a guest cluster
//! may be mapped onto a count that was corrected, a file that grew holds more of a table that ran
//! past its end, and a snapshot table of garbage is judged by its garbage. Nor that all that could
//! be saved was saved, what QEMU makes of it, and crashes in between; `qcow2/tests/repair` is about
//! those.

use tidemark_qcow2::check::{self, Repair};
use tidemark_qcow2::{Error, Image, OpenOptions};

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
    }
    if !report.check.is_clean() {
        return;
    }
    for (number, (old, new)) in content.iter().zip(guest_content(&storage)).enumerate() {
        let lost = old.is_some() && *old != new;
        assert!(!lost, "the guest reads other bytes in block {number}");
    }
    let again = check::repair(Box::new(storage.clone()), what);
    let again = again.expect("what was repaired can be repaired again");
    assert!(again.check.is_clean(), "clean no more");
    assert!(storage.to_bytes() == after, "a second repair found work");
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
