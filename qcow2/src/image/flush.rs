//! Flush and close: the two barriers that make mapping changes durable.
//!
//! A flush has two phases with a barrier after each:
//! - A: marks of staged regions, refcounts, L2 tables that nothing on disk names yet. Guest data
//!   was issued before; in an external data file it is made durable first. Nothing written here
//!   is referred to.
//! - B: L2 entries of tables in place, then L1 entries.
//!
//! Only then are replaced clusters freed: their references are durably gone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Image, Purpose, lock};
use crate::cache::DirtyPart;
use crate::error::Result;
use crate::geometry::Geometry;
use crate::sync::atomic::Ordering;
use crate::units::HostOffset;

/// Time after which a flush lets idle regions of the bitmaps go.
const NARROWING_INTERVAL: Duration = Duration::from_secs(30);

impl Image {
    /// Makes every completed write durable.
    ///
    /// # Errors
    /// I/O. After a failed barrier the image refuses further writes: what is durable is no longer
    /// known, and only opening it again can tell.
    pub fn flush(&self) -> Result<()> {
        self.check_flushable()?;
        let due = lock(&self.last_narrowing).elapsed() >= NARROWING_INTERVAL;
        if due {
            self.narrow_idle_regions()?;
        }
        if self.wants_census()? {
            let _alone = self.entrance.close();
            self.sync()?;
            let vetted = self.distrust_overlap(self.vet_claims(Purpose::Upkeep));
            if !self.is_distrusted() {
                vetted?;
            }
        }
        let _guest = self.entrance.enter();
        self.sync()
    }

    /// Writes the exact bits of regions that no write has touched since the last call, so that a
    /// crash costs only the regions that are busy. A flush does it from time to time.
    ///
    /// Writers wait while regions are chosen, in memory; not while bits are written.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn narrow_idle_regions(&self) -> Result<()> {
        self.check_flushable()?;
        *lock(&self.last_narrowing) = Instant::now();
        let Some(tracker) = self.tracker().filter(|_| !self.is_distrusted()) else {
            return Ok(());
        };
        let idle = tracker.age(&self.entrance.close());
        // Shared: a structural change would end the tracker below our feet.
        let _guest = self.entrance.enter();
        let still_there = self
            .tracker()
            .is_some_and(|now| Arc::ptr_eq(&now, &tracker));
        if idle.is_empty() || !still_there {
            return Ok(());
        }
        tracker.write_exact(self, &idle)
    }

    /// The two phases; the caller shares or owns the entrance.
    pub(crate) fn sync(&self) -> Result<()> {
        let _flushing = lock(&self.flushing);
        // In this order: a free is recorded after its entry changed, so the entries taken next
        // hold the change; marks are staged before entries change, so the marks written after
        // that cover them.
        let frees = match lock(&self.allocator).as_mut() {
            Some(allocator) => allocator.take_pending(),
            None => Vec::new(),
        };
        let parts = self.tables.take_dirty();
        if let Err(error) = self.sync_taken(&parts) {
            self.tables.restore_dirty(parts);
            if let Some(allocator) = lock(&self.allocator).as_mut() {
                allocator.restore_pending(frees);
            }
            return Err(error);
        }
        if frees.is_empty() {
            return Ok(());
        }
        self.with_allocator(|allocator, _| allocator.free_now(&self.file, &frees))
    }

    fn sync_taken(&self, parts: &[DirtyPart]) -> Result<()> {
        self.flush_data_file()?;
        let tracker = self.tracker();
        let fresh: Vec<&DirtyPart> = parts.iter().filter(|part| part.fresh).collect();
        for part in &fresh {
            part.write(&self.file)?;
        }
        match &tracker {
            Some(tracker) => tracker.make_durable(self)?,
            None => self.settle()?,
        }
        if parts.is_empty() {
            return Ok(());
        }
        for part in parts.iter().filter(|part| !part.fresh) {
            part.write(&self.file)?;
        }
        for part in &fresh {
            let entry = self.l1()[part.index].load(Ordering::Acquire);
            let at = self.l1_offset().plus(Geometry::entries_bytes(part.index));
            self.file
                .write(&entry.to_be_bytes(), at, "write L1 entry")?;
        }
        self.barrier()?;
        fresh.iter().for_each(|part| part.published());
        Ok(())
    }

    fn l1_offset(&self) -> HostOffset {
        lock(&self.first).header().l1_offset
    }

    /// A barrier whose failure ends all writing.
    pub(crate) fn barrier(&self) -> Result<()> {
        self.file.barrier().inspect_err(|_| self.poison())
    }

    /// Makes refcounts durable; always ends with a barrier.
    pub(crate) fn settle(&self) -> Result<()> {
        if lock(&self.allocator).is_none() {
            return self.barrier();
        }
        self.with_allocator(|allocator, first| allocator.settle(&self.file, first))
            .inspect_err(|error| {
                if !error.is_no_space() {
                    self.poison();
                }
            })
    }

    /// Flushes, narrows what the recording bitmaps say on disk to their exact bits, refreshes
    /// their proofs in the chain record, and lets go of the file.
    ///
    /// # Errors
    /// As [`flush`](Self::flush); a bitmap that could not be stored is an error too. The image on
    /// disk is then as after a crash: sound, and its bitmaps wider than needed.
    pub fn close(self) -> Result<()> {
        if self.writable {
            self.check_flushable()?;
            self.finish()?;
        }
        Ok(())
    }

    /// What [`close`](Self::close) does while the file stays open.
    pub(crate) fn finish(&self) -> Result<()> {
        let _alone = self.entrance.close();
        self.sync()?;
        if self.is_distrusted() {
            return Ok(());
        }
        if let Some(tracker) = self.tracker() {
            if tracker.was_marked() {
                tracker.narrow(self)?;
                self.set_tracker(None);
                self.refresh_proofs()?;
            }
            self.set_tracker(None);
        }
        let dirty = lock(&self.allocator)
            .as_ref()
            .is_some_and(crate::alloc::Allocator::is_dirty);
        if dirty { self.settle() } else { Ok(()) }
    }
}
