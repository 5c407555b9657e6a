//! Refcounts to come: staged in memory, true by the header write that names their table.
//!
//! A snapshot changes the count of every cluster of the disk, and with it the COPIED flags of the
//! mapping. Counts in place can change neither before nor after the mapping without a moment at
//! which they contradict it. So the blocks that differ are copied: blocks and table to come stand
//! in fresh clusters (`place`), and the header write that names the new mapping names them too.
//!
//! Invariants:
//! - Nothing that the present header names is changed.
//! - A cluster that only the counts to come free is not given out before they are true.
//! - Clusters taken and given back meanwhile are counted on both sides.

mod place;

use std::collections::BTreeMap;

pub(crate) use self::place::TablePlace;
use super::{Allocator, HostRun};
use crate::error::{Damage, Feature, Result};
use crate::format::refcount;
use crate::image::file::ImageFile;
use crate::units::{HostCluster, HostOffset};

/// Blocks that will differ, by their index in the table.
#[derive(Debug, Default)]
pub(super) struct NextCounts {
    blocks: BTreeMap<usize, Vec<u8>>,
    /// Where they go.
    places: BTreeMap<usize, HostOffset>,
    table: Option<HostRun>,
    /// Taken for a table that then was too short.
    spare: Vec<HostRun>,
}

impl Allocator {
    /// Begins to stage counts; what was staged before is forgotten.
    pub(crate) fn begin_next(&mut self) {
        self.next = Some(NextCounts::default());
    }

    /// Whether any count will differ.
    pub(crate) fn stages_counts(&self) -> bool {
        self.next
            .as_ref()
            .is_some_and(|next| !next.blocks.is_empty())
    }

    /// Stages one more reference to a cluster that has some now.
    ///
    /// # Errors
    /// A cluster that nothing counts now, a refcount of this width that is full, or I/O.
    pub(crate) fn next_add(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<()> {
        if self.count(file, cluster)? == 0 {
            return Err(self.uncounted(file, cluster));
        }
        let limit = self.geometry.refcount_max();
        let count = self.next_count(file, cluster)?;
        if count >= limit {
            let what = "references to one host cluster";
            let value = count;
            return Err(file.unsupported(Feature::Limit { what, value, limit }));
        }
        self.next_set(file, cluster, count + 1)
    }

    /// Stages one reference less.
    ///
    /// # Errors
    /// A cluster with no reference left, or I/O.
    pub(crate) fn next_drop(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<()> {
        if self.trust.holds(cluster) {
            return Ok(());
        }
        match self.next_count(file, cluster)? {
            0 => Err(self.uncounted(file, cluster)),
            count => self.next_set(file, cluster, count - 1),
        }
    }

    fn uncounted(&self, file: &ImageFile, cluster: HostCluster) -> crate::Error {
        file.damage(Damage::Place {
            structure: "cluster of the mapping",
            offset: self.geometry.host_offset(cluster),
            problem: "has fewer references counted than there are: repair the image first",
        })
    }

    /// The count to come.
    pub(crate) fn next_count(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<u64> {
        let (number, slot) = self.geometry.refcount_indexes(cluster);
        let staged = self.next.as_ref().and_then(|next| next.blocks.get(&number));
        match staged {
            Some(bytes) => Ok(refcount::count(bytes, self.geometry.refcount_order, slot)),
            None => self.count(file, cluster),
        }
    }

    /// The count to come of a cluster that something will refer to.
    ///
    /// # Errors
    /// A count of zero, or I/O.
    pub(crate) fn next_kept(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<u64> {
        match self.next_count(file, cluster)? {
            0 => Err(self.uncounted(file, cluster)),
            count => Ok(count),
        }
    }

    fn next_set(&mut self, file: &ImageFile, cluster: HostCluster, value: u64) -> Result<()> {
        let (number, slot) = self.geometry.refcount_indexes(cluster);
        let order = self.geometry.refcount_order;
        let staged = |next: &NextCounts| next.blocks.contains_key(&number);
        if !self.next.as_ref().is_some_and(staged) {
            let Some(bytes) = self
                .block(file, number)?
                .map(|block| block.bytes().to_vec())
            else {
                return Err(self.uncounted(file, cluster));
            };
            let next = self.next.get_or_insert_default();
            next.blocks.insert(number, bytes);
        }
        if let Some(bytes) = self
            .next
            .as_mut()
            .and_then(|next| next.blocks.get_mut(&number))
        {
            refcount::set_count(bytes, order, slot, value);
        }
        Ok(())
    }

    /// A count changed on this side: what is staged follows.
    pub(super) fn mirror(&mut self, number: usize, slot: usize, old: u64, new: u64) {
        let order = self.geometry.refcount_order;
        if let Some(bytes) = self
            .next
            .as_mut()
            .and_then(|next| next.blocks.get_mut(&number))
        {
            let staged = refcount::count(bytes, order, slot);
            let value = (staged + new)
                .saturating_sub(old)
                .min(self.geometry.refcount_max());
            refcount::set_count(bytes, order, slot, value);
        }
    }
}
