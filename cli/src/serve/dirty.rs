//! Bitmaps as metadata contexts.
//!
//! # Invariant
//! A context that is alive holds every change that was answered: it is marked between the change and
//! the answer, also when the change failed half way.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use tidemark_nbd::{BlockStatus, Fault};
use tidemark_qcow2::Bitmap;

/// Bit of `qemu:dirty-bitmap:` contexts.
const DIRTY: u64 = 1;

/// The bits of one context.
pub(crate) struct DirtyContext {
    name: String,
    bits: RwLock<Bitmap>,
    /// Whether changes of the disk belong into it.
    alive: AtomicBool,
}

impl DirtyContext {
    /// Bits under QEMU's name for them. They are alive when they come from what records now.
    pub(crate) fn new(name: &str, bits: Bitmap, alive: bool) -> Self {
        Self {
            name: Self::name_of(name),
            bits: RwLock::new(bits),
            alive: AtomicBool::new(alive),
        }
    }

    /// QEMU's name for the context of a bitmap.
    pub(super) fn name_of(bitmap: &str) -> String {
        format!("qemu:dirty-bitmap:{bitmap}")
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its bitmap does not record any more.
    pub(super) fn freeze(&self) {
        self.alive.store(false, Ordering::Release);
    }

    /// The disk has changed there.
    pub(super) fn mark(&self, range: &Range<u64>) {
        if self.alive.load(Ordering::Acquire) && !range.is_empty() {
            let mut bits = self.bits.write().unwrap_or_else(PoisonError::into_inner);
            // A range outside the disk was refused before it came here.
            let _ = bits.mark(range.clone());
        }
    }

    /// Dirty and clean runs of a range.
    pub(super) fn runs(
        &self,
        range: Range<u64>,
    ) -> impl Iterator<Item = Result<BlockStatus, Fault>> + '_ {
        let mut rest = range;
        // What is known already of the dirty run that comes next.
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let bits = self.bits.read().unwrap_or_else(PoisonError::into_inner);
            let (end, flags) = match bits.next_dirty(rest.start, rest.end) {
                Some(run) if run.start == rest.start => (run.end, DIRTY),
                Some(run) => (run.start, 0),
                None => (rest.end, 0),
            };
            let length = end - rest.start;
            rest.start = end;
            Some(Ok(BlockStatus { length, flags }))
        })
    }
}
