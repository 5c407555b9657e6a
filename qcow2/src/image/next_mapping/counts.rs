//! What the mapping to come refers to, counted: once for each path that leads there.

use super::NextMapping;
use crate::alloc::{Allocator, HostRun};
use crate::convert::to_u64;
use crate::error::{Damage, Result};
use crate::format::table::{L2Entry, RawL2};
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::units::{GuestCluster, HostCluster, HostOffset};

/// What one path to a cluster does to its count.
pub(crate) type Count = fn(&mut Allocator, &ImageFile, HostCluster) -> Result<()>;

/// One more reference to a cluster, in the counts to come.
pub(crate) const ADD: Count = Allocator::next_add;
/// One less.
pub(crate) const DROP: Count = Allocator::next_drop;

impl NextMapping<'_> {
    /// Runs `work` with the allocator.
    pub(super) fn counts<R>(
        &self,
        work: impl FnOnce(&mut Allocator, &ImageFile) -> Result<R>,
    ) -> Result<R> {
        let file = &self.image.file;
        self.image
            .with_allocator(|allocator, _| work(allocator, file))
    }

    /// Stages the counts of everything below an L1 table.
    pub(crate) fn count_below(&self, l1: &[u64], count: Count) -> Result<()> {
        (0..l1.len()).try_for_each(|number| self.count_table(l1, number, count))
    }

    /// Stages the counts of L2 table `number` of an L1 table, and of what the table names.
    pub(crate) fn count_table(&self, l1: &[u64], number: usize, count: Count) -> Result<()> {
        let Some(table) = self.table(l1, number)? else {
            return Ok(());
        };
        let entries = self.image.read_l2(table)?;
        self.counts(|allocator, file| {
            for (slot, &raw) in entries.iter().enumerate() {
                self.count_named(self.decode(raw, number, slot)?, count, allocator, file)?;
            }
            let cluster = self.header.geometry.host_cluster(table);
            if !self.active.contains(&table) {
                self.refuse_metadata(allocator, cluster)?;
            }
            count(allocator, file, cluster)
        })
    }

    /// Stages the counts of what one L2 entry names.
    pub(crate) fn count_entry(&self, entry: L2Entry, count: Count) -> Result<()> {
        self.counts(|allocator, file| self.count_named(entry, count, allocator, file))
    }

    fn count_named(
        &self,
        entry: L2Entry,
        count: Count,
        allocator: &mut Allocator,
        file: &ImageFile,
    ) -> Result<()> {
        if self.header.geometry.external_data {
            // What lies outside is not counted.
            return Ok(());
        }
        clusters(entry, &self.header.geometry).try_for_each(|cluster| {
            self.refuse_metadata(allocator, cluster)?;
            count(allocator, file, cluster)
        })
    }

    pub(super) fn count_run(&self, run: HostRun, count: Count) -> Result<()> {
        let first = self.header.geometry.host_cluster(run.start).0;
        self.counts(|allocator, file| {
            (first..first + run.clusters)
                .try_for_each(|cluster| count(allocator, file, HostCluster(cluster)))
        })
    }

    /// The count to come of something that stays named.
    pub(super) fn kept(&self, offset: HostOffset) -> Result<u64> {
        let cluster = self.header.geometry.host_cluster(offset);
        self.counts(|allocator, file| allocator.next_kept(file, cluster))
    }

    /// Refuses a cluster of metadata where data or a snapshot's L2 table should be.
    fn refuse_metadata(&self, allocator: &Allocator, cluster: HostCluster) -> Result<()> {
        if !allocator.is_fixed(cluster) {
            return Ok(());
        }
        Err(self.image.file.damage(Damage::Overlap {
            offset: self.header.geometry.host_offset(cluster),
            structure: "metadata of the image",
        }))
    }

    pub(super) fn decode(&self, raw: RawL2, number: usize, slot: usize) -> Result<L2Entry> {
        let base = to_u64(number) * self.header.geometry.l2_entries();
        self.image.decode(raw, GuestCluster(base + to_u64(slot)))
    }
}

/// The host clusters that an entry refers to.
pub(super) fn clusters(
    entry: L2Entry,
    geometry: &Geometry,
) -> impl Iterator<Item = HostCluster> + use<> {
    let (first, count) = entry.host_run(geometry).unwrap_or((HostCluster(0), 0));
    (first.0..first.0 + count).map(HostCluster)
}
