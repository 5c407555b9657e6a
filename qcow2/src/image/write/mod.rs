//! Writing guest data: in place where a cluster is ours alone, into a new cluster elsewhere.
//!
//! For every change of the disk, in this order: the regions it touches are staged or already wide
//! in the bitmaps on disk; the bits are set in memory; data is issued; the mapping changes in
//! memory. An overwrite in place also waits until its regions are durable, because nothing else
//! stands between the data and the disk.

mod allocate;
mod in_place;
mod subclusters;
mod table;
mod zero;

use super::Image;
use super::locks::ClusterLocks;
use crate::bitmaps::tracker::Tracker;
use crate::convert::{to_u64, to_usize};
use crate::error::Result;

/// Dirty L2 tables that are too many to keep back until the caller flushes.
pub(super) const MAX_DIRTY_TABLES: usize = 1024;

impl Image {
    /// Writes `data` at byte `offset` of the disk. It is durable after the next
    /// [`flush`](Self::flush).
    ///
    /// # Errors
    /// A range outside the disk, a read-only or encrypted image, a data file that was not opened,
    /// damage, or I/O; then none, some or all of the range has changed, and all of it is marked.
    pub fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.change(offset, to_u64(data.len()), |tracker, at, len| {
            let from = to_usize(at - offset);
            self.write_group(tracker, &data[from..from + to_usize(len)], at)
        })
    }

    /// Checks a change and runs it group of clusters by group of clusters.
    fn change(
        &self,
        offset: u64,
        len: u64,
        mut step: impl FnMut(&Tracker, u64, u64) -> Result<()>,
    ) -> Result<()> {
        self.guest_change(offset, len, |tracker| {
            self.by_groups(offset, len, |at, len| step(tracker, at, len))
        })
    }

    /// Checks a change and lets it in beside others.
    pub(super) fn guest_change(
        &self,
        offset: u64,
        len: u64,
        work: impl FnOnce(&Tracker) -> Result<()>,
    ) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        self.guest_file()?;
        if len == 0 {
            return Ok(());
        }
        if self.tables.dirty_tables() > MAX_DIRTY_TABLES {
            self.flush()?;
        }
        let _guest = self.entrance.enter();
        // Outside, the disk may have got shorter since we looked.
        self.check_range(offset, len)?;
        let tracker = self.distrust_overlap(self.tracking())?;
        if self.has_external_data() {
            // The mapping on disk may name the place already: only the mark stands before it.
            tracker.cover_durably(self, offset..offset + len)?;
        }
        self.distrust_after(work(&tracker))
    }

    /// Cuts a range where the lock of its clusters changes.
    pub(super) fn by_groups(
        &self,
        offset: u64,
        len: u64,
        mut step: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut at = offset;
        while at < offset + len {
            let cluster = self.geometry.guest_cluster(at);
            let group = ClusterLocks::group_rest(cluster) << self.geometry.cluster_bits;
            let rest = group - self.geometry.offset_in_cluster(at);
            let len = rest.min(offset + len - at);
            step(at, len)?;
            at += len;
        }
        Ok(())
    }

    /// Writes inside one lock group.
    pub(super) fn write_group(&self, tracker: &Tracker, data: &[u8], offset: u64) -> Result<()> {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let done = match self.write_in_place(tracker, rest, at)? {
                0 => self.write_allocating(tracker, rest, at)?,
                done => done,
            };
            rest = &rest[done..];
            at += to_u64(done);
        }
        Ok(())
    }
}
