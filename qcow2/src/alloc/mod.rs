//! Who owns a host cluster: refcounts, free space, deferred frees.
//!
//! Invariants:
//! - In memory a refcount changes before the reference that it counts is made, and after the last
//!   reference is durably gone ([`Allocator::free_later`] parks it until then).
//! - On disk a refcount is durable before a reference to its cluster is written
//!   ([`Allocator::settle`] ends with a barrier).
//! - A refcount block is durable before the table entry that names it; a new refcount table is
//!   durable before the header that names it.
//!
//! What is lost in a crash is at worst a count that is too high: a leaked cluster.

mod block;
mod bytes;
mod next;
mod set;
mod trust;
mod vet;

use std::collections::{BTreeMap, BTreeSet, HashSet};

use byteorder::{BigEndian, ByteOrder};

use self::block::RefcountBlock;
use self::next::NextCounts;
pub(crate) use self::next::TablePlace;
pub(crate) use self::set::ClusterSet;
use self::trust::Trust;
pub(crate) use self::vet::Structure;
use crate::convert::{to_u32, to_u64, to_usize};
use crate::error::{Error, Feature, Result};
use crate::format::{limits, refcount};
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::image::first_cluster::FirstCluster;
use crate::units::{HostCluster, HostOffset};

/// Refcount blocks kept in memory when nothing in them is dirty.
const MAX_CLEAN_BLOCKS: usize = 256;

/// A run of host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostRun {
    pub(crate) start: HostOffset,
    pub(crate) clusters: u64,
    /// It lies behind everything that was ever written: what is not written reads as zero.
    pub(crate) untouched: bool,
}

impl HostRun {
    /// The first byte behind it.
    pub(crate) const fn end(&self, geometry: &Geometry) -> HostOffset {
        self.start.plus(self.clusters << geometry.cluster_bits)
    }
}

/// The refcount structures of one image.
#[derive(Debug)]
pub(crate) struct Allocator {
    geometry: Geometry,
    table: Vec<u64>,
    table_offset: HostOffset,
    /// Table entries that differ from the disk.
    dirty_entries: BTreeSet<usize>,
    /// The table in memory is longer than the one on disk and needs a new place.
    table_outgrown: bool,
    blocks: BTreeMap<usize, RefcountBlock>,
    /// No cluster below this one is free.
    first_free: u64,
    pending: Vec<HostRun>,
    /// Counts that the next header write makes true.
    next: Option<NextCounts>,
    /// Behind the newest compressed data, inside a cluster that still has room.
    tail: Option<HostOffset>,
    /// End of everything that was ever written.
    high_water: HostOffset,
    /// Clusters of metadata: never given out whatever their refcounts say, never guest data.
    fixed: HashSet<u64>,
    /// Pages of recording bitmaps, which are written in place.
    pages: HashSet<u64>,
    trust: Trust,
}

impl Allocator {
    /// Reads the refcount table that the header names.
    pub(crate) fn open(file: &ImageFile, first: &FirstCluster) -> Result<Self> {
        let header = first.header();
        let geometry = header.geometry;
        let clusters = u64::from(header.refcount_table_clusters);
        // What lies beyond the end of the file reads as zero and needs no memory.
        let present = geometry
            .clusters_for(file.len()?.saturating_sub(header.refcount_table_offset.0))
            .min(clusters);
        let mut table = file.read_table(
            header.refcount_table_offset,
            to_usize(geometry.table_entries(present)),
            "read refcount table",
        )?;
        table.resize(to_usize(geometry.table_entries(clusters)), 0);
        let end = HostOffset(file.len()?.next_multiple_of(geometry.cluster_bytes()));
        let mut allocator = Self {
            geometry,
            table,
            table_offset: header.refcount_table_offset,
            dirty_entries: BTreeSet::new(),
            table_outgrown: false,
            blocks: BTreeMap::new(),
            first_free: 0,
            pending: Vec::new(),
            next: None,
            tail: None,
            high_water: end,
            fixed: HashSet::new(),
            pages: HashSet::new(),
            trust: Trust::nothing_below(geometry.host_cluster(end).0),
        };
        allocator.fixed.insert(0);
        allocator.fix_run(header.refcount_table_offset, clusters);
        for (number, &entry) in allocator.table.iter().enumerate() {
            let offset = refcount::block_offset(entry, to_u64(number), &geometry)
                .map_err(|damage| file.damage(damage))?;
            if let Some(offset) = offset {
                allocator.fixed.insert(geometry.host_cluster(offset).0);
            }
        }
        Ok(allocator)
    }

    /// Protects clusters that hold metadata.
    pub(crate) fn fix_run(&mut self, offset: HostOffset, clusters: u64) {
        let first = self.geometry.host_cluster(offset).0;
        self.fixed.extend(first..first + clusters);
    }

    /// Ends the protection of metadata that is about to be freed; the header's never ends.
    pub(crate) fn release(&mut self, run: HostRun) {
        let first = self.geometry.host_cluster(run.start).0;
        for cluster in first.max(1)..first + run.clusters {
            self.fixed.remove(&cluster);
        }
    }

    /// End of everything that was ever written or given out.
    pub(crate) fn high_water(&self) -> HostOffset {
        self.high_water
    }

    /// Whether `cluster` holds metadata.
    pub(crate) fn is_fixed(&self, cluster: HostCluster) -> bool {
        self.fixed.contains(&cluster.0)
    }

    /// Takes up to `wanted` clusters in a row, at least one, with a refcount of one each.
    pub(crate) fn allocate(&mut self, file: &ImageFile, wanted: u64) -> Result<HostRun> {
        self.allocate_run(file, wanted, 1)
    }

    /// Takes exactly `wanted` clusters in a row.
    pub(crate) fn allocate_exact(&mut self, file: &ImageFile, wanted: u64) -> Result<HostOffset> {
        self.allocate_run(file, wanted, wanted).map(|run| run.start)
    }

    fn allocate_run(&mut self, file: &ImageFile, wanted: u64, least: u64) -> Result<HostRun> {
        loop {
            let run = self.find_free(file, wanted, least)?;
            self.check_reach(file, run)?;
            // Every cluster of the run must be counted by a block before it is taken. A missing
            // block goes to the run's first cluster, and the search goes on behind it.
            if let Some(number) = self.missing_block(file, run)? {
                self.place_block(file, number, run.start)?;
                continue;
            }
            let first = self.geometry.host_cluster(run.start).0;
            for cluster in first..first + run.clusters {
                self.set(file, HostCluster(cluster), 1)?;
            }
            if self.first_free == first {
                self.first_free = first + run.clusters;
            }
            let end = run.start.plus(run.clusters << self.geometry.cluster_bits);
            self.high_water = self.high_water.max(end);
            return Ok(run);
        }
    }

    /// First free run of at least `least` clusters, cut at `wanted`.
    fn find_free(&mut self, file: &ImageFile, wanted: u64, least: u64) -> Result<HostRun> {
        let mut start = self.first_free.max(self.trust.floor());
        let mut length = 0;
        let mut skipped_free = false;
        while length < wanted {
            let at = start + length;
            if self.is_free(file, HostCluster(at))? {
                length += 1;
            } else if length >= least {
                break;
            } else {
                skipped_free |= length > 0;
                start = at + 1;
                length = 0;
            }
        }
        if !skipped_free && self.trust.floor() == 0 {
            self.first_free = start;
        }
        let start = self.geometry.host_offset(HostCluster(start));
        Ok(HostRun {
            start,
            clusters: length,
            untouched: start >= self.high_water,
        })
    }

    fn is_free(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<bool> {
        let kept = self.fixed.contains(&cluster.0) || self.trust.holds(cluster);
        Ok(!kept && self.count(file, cluster)? == 0)
    }

    fn missing_block(&mut self, file: &ImageFile, run: HostRun) -> Result<Option<usize>> {
        let first = self.geometry.host_cluster(run.start).0;
        let (begin, _) = self.geometry.refcount_indexes(HostCluster(first));
        let (end, _) = self
            .geometry
            .refcount_indexes(HostCluster(first + run.clusters - 1));
        for number in begin..=end {
            if self.block_offset(file, number)?.is_none() {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    fn check_reach(&self, file: &ImageFile, run: HostRun) -> Result<()> {
        let end = self.geometry.host_cluster(run.start).0 + run.clusters;
        let entries = to_u64(self.geometry.refcount_indexes(HostCluster(end)).0) + 1;
        let limit = limits::MAX_REFCOUNT_TABLE_BYTES;
        if end << self.geometry.cluster_bits > limits::MAX_HOST_OFFSET || entries * 8 > limit {
            let what = "refcount table bytes";
            return Err(file.unsupported(Feature::Limit {
                what,
                value: entries * 8,
                limit,
            }));
        }
        Ok(())
    }

    /// Puts refcount block `number` at the free cluster `offset`. That cluster is counted by an
    /// earlier block, or by the new one itself.
    fn place_block(&mut self, file: &ImageFile, number: usize, offset: HostOffset) -> Result<()> {
        if number >= self.table.len() {
            let entries = to_usize(self.geometry.table_entries(1));
            let grown = (number + 1).max(self.table.len() + self.table.len() / 2);
            self.table.resize(grown.next_multiple_of(entries), 0);
            self.table_outgrown = true;
        }
        self.blocks
            .insert(number, RefcountBlock::zeroed(self.geometry, offset));
        self.table[number] = offset.0;
        self.dirty_entries.insert(number);
        let cluster = self.geometry.host_cluster(offset);
        self.fixed.insert(cluster.0);
        self.high_water = self
            .high_water
            .max(offset.plus(self.geometry.cluster_bytes()));
        self.set(file, cluster, 1)
    }

    fn block_offset(&self, file: &ImageFile, number: usize) -> Result<Option<HostOffset>> {
        let entry = self.table.get(number).copied().unwrap_or(0);
        refcount::block_offset(entry, to_u64(number), &self.geometry)
            .map_err(|damage| file.damage(damage))
    }

    fn block(&mut self, file: &ImageFile, number: usize) -> Result<Option<&mut RefcountBlock>> {
        if !self.blocks.contains_key(&number) {
            let Some(offset) = self.block_offset(file, number)? else {
                return Ok(None);
            };
            if self.blocks.len() >= MAX_CLEAN_BLOCKS {
                self.blocks.retain(|_, block| block.is_dirty());
            }
            self.blocks
                .insert(number, RefcountBlock::read(self.geometry, offset, file)?);
        }
        Ok(self.blocks.get_mut(&number))
    }

    /// Refcount of a cluster.
    pub(crate) fn count(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<u64> {
        let (number, slot) = self.geometry.refcount_indexes(cluster);
        Ok(self
            .block(file, number)?
            .map_or(0, |block| block.count(slot)))
    }

    fn set(&mut self, file: &ImageFile, cluster: HostCluster, value: u64) -> Result<()> {
        if value == 0 {
            self.leave_tail(cluster);
        }
        let (number, slot) = self.geometry.refcount_indexes(cluster);
        if let Some(block) = self.block(file, number)? {
            let old = block.count(slot);
            block.set(slot, value);
            self.mirror(number, slot, old, value);
        }
        Ok(())
    }

    /// Adds a reference to a cluster that has some; counted before it is made.
    ///
    /// # Errors
    /// A refcount of this width that is full.
    pub(crate) fn add_reference(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<()> {
        let count = self.count(file, cluster)?;
        let limit = self.geometry.refcount_max();
        if count >= limit {
            let what = "references to one host cluster";
            return Err(file.unsupported(Feature::Limit {
                what,
                value: count,
                limit,
            }));
        }
        self.set(file, cluster, count + 1)
    }

    /// Drops one reference to each cluster of a run once the references are durably gone.
    pub(crate) fn free_later(&mut self, run: HostRun) {
        self.pending.push(run);
    }

    /// The frees whose references had been dropped in memory before this call.
    pub(crate) fn take_pending(&mut self) -> Vec<HostRun> {
        std::mem::take(&mut self.pending)
    }

    /// Puts frees back that could not be carried out.
    pub(crate) fn restore_pending(&mut self, runs: Vec<HostRun>) {
        self.pending.extend(runs);
    }

    /// Drops one reference to each cluster of `runs`, whose references are durably gone, and gives
    /// the space of those without any other back to the storage. After an error the clusters that
    /// are left wait with the pending ones: none is ever freed twice.
    pub(crate) fn free_now(&mut self, file: &ImageFile, runs: &[HostRun]) -> Result<()> {
        let clusters: Vec<HostCluster> = runs
            .iter()
            .flat_map(|run| {
                let first = self.geometry.host_cluster(run.start).0;
                first..first + run.clusters
            })
            .map(HostCluster)
            .collect();
        for (done, &cluster) in clusters.iter().enumerate() {
            if let Err(error) = self.drop_reference(file, cluster) {
                let left = clusters[done..].iter();
                let geometry = self.geometry;
                self.pending
                    .extend(left.map(|&cluster| single(geometry.host_offset(cluster))));
                return Err(error);
            }
        }
        Ok(())
    }

    fn drop_reference(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<()> {
        let count = self.count(file, cluster)?;
        if count == 0 || self.fixed.contains(&cluster.0) || self.trust.holds(cluster) {
            // Somebody else's damage, for a check to name: the cluster stays as it is.
            return Ok(());
        }
        self.set(file, cluster, count - 1)?;
        if count == 1 {
            self.first_free = self.first_free.min(cluster.0);
            self.give_back(file, cluster);
        }
        Ok(())
    }

    /// Gives the space of a free cluster back to the storage, if nobody can refer to it.
    fn give_back(&mut self, file: &ImageFile, cluster: HostCluster) {
        if self.trust.gone(cluster) {
            let offset = self.geometry.host_offset(cluster).0;
            // Space that cannot be given back is only space.
            let _ = file
                .storage()
                .discard(offset, self.geometry.cluster_bytes());
        }
    }

    /// Whether [`settle`](Self::settle) has anything to write.
    pub(crate) fn is_dirty(&self) -> bool {
        self.table_outgrown
            || !self.dirty_entries.is_empty()
            || self.blocks.values().any(RefcountBlock::is_dirty)
    }

    /// Makes every refcount durable, in the order that the module's invariants ask for. Ends with
    /// a barrier, also when nothing was dirty: the caller's own writes share it.
    pub(crate) fn settle(&mut self, file: &ImageFile, first: &mut FirstCluster) -> Result<()> {
        if self.table_outgrown {
            self.place_table(file)?;
        }
        for block in self.blocks.values_mut() {
            block.write_back(file)?;
        }
        file.barrier().inspect_err(|_| self.forget_writes())?;
        if self.table_outgrown {
            return self.write_moved_table(file, first);
        }
        if self.dirty_entries.is_empty() {
            return Ok(());
        }
        for &number in &self.dirty_entries {
            let at = self.table_offset.plus(Geometry::entries_bytes(number));
            file.write(
                &self.table[number].to_be_bytes(),
                at,
                "write refcount table entry",
            )?;
        }
        file.barrier()?;
        self.dirty_entries.clear();
        Ok(())
    }

    /// After a failed barrier nothing written since the last one may be assumed durable.
    fn forget_writes(&mut self) {
        for block in self.blocks.values_mut() {
            block.mark_all_dirty();
        }
    }

    /// Finds a place for the longer table.
    fn place_table(&mut self, file: &ImageFile) -> Result<()> {
        loop {
            let entries = self.table.len();
            let clusters = self.geometry.clusters_for(Geometry::entries_bytes(entries));
            let start = self.allocate_exact(file, clusters)?;
            if self.table.len() == entries {
                self.table_offset = start;
                return Ok(());
            }
            let first = self.geometry.host_cluster(start).0;
            for cluster in first..first + clusters {
                self.set(file, HostCluster(cluster), 0)?;
            }
            self.first_free = self.first_free.min(first);
        }
    }

    fn write_moved_table(&mut self, file: &ImageFile, first: &mut FirstCluster) -> Result<()> {
        let mut bytes = vec![0; to_usize(Geometry::entries_bytes(self.table.len()))];
        BigEndian::write_u64_into(&self.table, &mut bytes);
        file.write(&bytes, self.table_offset, "write refcount table")?;
        file.barrier()?;
        let clusters = self.geometry.clusters_for(to_u64(bytes.len()));
        let mut next = first.content().clone();
        let old = HostRun {
            start: next.header.refcount_table_offset,
            clusters: next.header.refcount_table_clusters.into(),
            untouched: false,
        };
        next.header.refcount_table_offset = self.table_offset;
        next.header.refcount_table_clusters = to_u32(clusters);
        first.commit(file, next)?;
        self.fix_run(self.table_offset, clusters);
        self.table_outgrown = false;
        self.dirty_entries.clear();
        self.release(old);
        self.free_now(file, &[old])
    }
}

/// Run of one cluster.
pub(crate) fn single(start: HostOffset) -> HostRun {
    HostRun {
        start,
        clusters: 1,
        untouched: false,
    }
}

/// Whether an error is worth a fallback that needs no space.
pub(crate) fn is_space(error: &Error) -> bool {
    error.is_no_space() || matches!(error.feature(), Some(Feature::Limit { .. }))
}
