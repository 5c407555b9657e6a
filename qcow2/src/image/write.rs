//! Writing guest data: in place where a cluster is ours alone, into a new cluster elsewhere.
//!
//! For every change of the disk, in this order: the regions it touches are staged or already wide
//! in the bitmaps on disk; the bits are set in memory; data is issued; the mapping changes in
//! memory. An overwrite in place also waits until its regions are durable, because nothing else
//! stands between the data and the disk.

use std::sync::Arc;

use super::locks::ClusterLocks;
use super::{Image, lock};
use crate::alloc::{Allocator, HostRun, single};
use crate::bitmaps::tracker::Tracker;
use crate::cache::L2Table;
use crate::convert::{to_u64, to_usize};
use crate::error::{Damage, Result};
use crate::format::part::Part;
use crate::format::table::{L1Entry, L2Entry, RawL2};
use crate::sync::atomic::Ordering;
use crate::units::{GuestCluster, HostCluster, HostOffset};

/// Dirty L2 tables that are too many to keep back until the caller flushes.
pub(super) const MAX_DIRTY_TABLES: usize = 1024;
/// Zeros written at once where the format has no better way.
const ZERO_PIECE: u64 = 1 << 20;

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

    /// Makes `len` bytes from `offset` read as zero, giving up whole clusters. Whole subclusters are
    /// only marked as zero.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.change(offset, len, |tracker, at, len| {
            self.per_clusters(at, len, |start, len, whole| {
                let showing = self.geometry.version == 2 && self.names_backing();
                if !whole || showing {
                    return self.write_zero_data(tracker, start, len);
                }
                let kept = self.unmap_group(tracker, start, len)?;
                kept.into_iter()
                    .try_for_each(|(start, len)| self.write_zero_data(tracker, start, len))
            })
        })
    }

    /// Gives up the content of `len` bytes from `offset`: whole clusters, or subclusters, read as zero
    /// afterwards, parts of them keep their content. In version 2 with a backing file nothing happens,
    /// because the backing file would show.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        if self.geometry.version == 2 && self.names_backing() {
            return self.check_writable().and(self.check_range(offset, len));
        }
        self.change(offset, len, |tracker, at, len| {
            self.per_clusters(at, len, |start, len, whole| {
                if whole {
                    self.unmap_group(tracker, start, len)?;
                }
                Ok(())
            })
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
        let tracker = self.tracking()?;
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

    /// Splits a range into its partial first cluster, its whole clusters and its partial last one;
    /// subclusters where there are any. The disk's own partial last one counts as whole.
    fn per_clusters(
        &self,
        offset: u64,
        len: u64,
        mut part: impl FnMut(u64, u64, bool) -> Result<()>,
    ) -> Result<()> {
        let unit = self.geometry.subcluster_bytes();
        let end = offset + len;
        let size = self.size();
        let whole_start = offset.next_multiple_of(unit).min(end);
        let whole_end = if end == size {
            end
        } else {
            (end / unit * unit).max(whole_start)
        };
        for (start, end, whole) in [
            (offset, whole_start, false),
            (whole_start, whole_end, true),
            (whole_end, end, false),
        ] {
            if start < end {
                part(start, end - start, whole)?;
            }
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

    /// Overwrites the clusters from `offset` on that are allocated and ours alone; returns the
    /// bytes written, zero when the first cluster is not.
    fn write_in_place(&self, tracker: &Tracker, data: &[u8], offset: u64) -> Result<usize> {
        let cluster = self.geometry.guest_cluster(offset);
        let _shared = self.clusters.share(cluster);
        let (number, _) = self.geometry.table_indexes(cluster);
        // A table that snapshots share is not ours to write below.
        let Some(table) = self.own_table(number)? else {
            return Ok(0);
        };
        let Some((host, mut len)) = self.in_place(&table, offset)? else {
            return Ok(0);
        };
        while len < to_u64(data.len()) {
            match self.in_place(&table, offset + len)? {
                Some((next, more)) if next == host.plus(len) => len += more,
                _ => break,
            }
        }
        let len = to_usize(len).min(data.len());
        tracker.cover_durably(self, offset..offset + to_u64(len))?;
        tracker.mark(self, offset..offset + to_u64(len))?;
        self.guest_file()?.write(&data[..len], host, "write data")?;
        Ok(len)
    }

    pub(super) fn own_table(&self, number: usize) -> Result<Option<Arc<L2Table>>> {
        match self.l1_entry(number)? {
            L1Entry::Table { copied: true, .. } => {
                let Some(table) = self.table(number)? else {
                    return Ok(None);
                };
                self.guard_table(number, &table)?;
                Ok(Some(table))
            }
            _ => Ok(None),
        }
    }

    /// Where byte `at` may be overwritten, and for how many bytes inside its cluster.
    fn in_place(&self, table: &L2Table, at: u64) -> Result<Option<(HostOffset, u64)>> {
        let entry = self.entry_at(table, self.geometry.guest_cluster(at))?;
        match entry.part(self.geometry.offset_in_cluster(at), &self.geometry) {
            (Part::Data(host), len) if entry.own_host().is_some() => Ok(Some((host, len))),
            _ => Ok(None),
        }
    }

    /// Before data is first written below an L2 table: the table and its data clusters lie inside
    /// the file, and no data cluster lies on metadata.
    fn guard_table(&self, number: usize, table: &L2Table) -> Result<()> {
        if table.is_guarded() {
            return Ok(());
        }
        let base = to_u64(number) * self.geometry.l2_entries();
        self.with_allocator(|allocator, _| {
            self.guard_place(allocator, "L2 table", table.offset())?;
            if self.has_external_data() {
                return Ok(());
            }
            for slot in 0..self.geometry.l2_entries() {
                let cluster = GuestCluster(base + slot);
                let entry = self.decode(table.steady_entry(to_usize(slot)), cluster)?;
                self.guard_data(allocator, entry)?;
            }
            Ok(())
        })?;
        table.set_guarded();
        Ok(())
    }

    /// Data in place, and compressed data, whose clusters are freed when it is replaced.
    fn guard_data(&self, allocator: &Allocator, entry: L2Entry) -> Result<()> {
        let structure = match entry {
            L2Entry::Normal { .. } | L2Entry::Partial { .. } => "data cluster",
            L2Entry::Compressed { .. } => "compressed cluster",
            L2Entry::Unallocated | L2Entry::Zero { .. } => return Ok(()),
        };
        let (first, clusters) = entry
            .host_run(&self.geometry)
            .unwrap_or((HostCluster(0), 0));
        for cluster in first.0..first.0 + clusters {
            let cluster = HostCluster(cluster);
            let offset = self.geometry.host_offset(cluster);
            self.guard_place(allocator, structure, offset)?;
            if allocator.is_protected(cluster) {
                let structure = "metadata of the image";
                return Err(self.file.damage(Damage::Overlap { offset, structure }));
            }
        }
        Ok(())
    }

    fn guard_place(
        &self,
        allocator: &Allocator,
        structure: &'static str,
        offset: HostOffset,
    ) -> Result<()> {
        if offset < allocator.high_water() {
            return Ok(());
        }
        let problem = "lies past the end of the file";
        Err(self.file.damage(Damage::Place {
            structure,
            offset,
            problem,
        }))
    }

    /// Writes the clusters from `offset` on that need a new place; returns the bytes written.
    fn write_allocating(&self, tracker: &Tracker, data: &[u8], offset: u64) -> Result<usize> {
        let cluster = self.geometry.guest_cluster(offset);
        let _owned = self.clusters.own(cluster);
        let (number, slot) = self.geometry.table_indexes(cluster);
        let table = self.table_for_change(number)?;
        let (wanted, _) = self.clusters_in(offset, data.len());
        let old = self.replaceable(&table, cluster, wanted)?;
        if old.is_empty() {
            // It has a place; or somebody allocated it since we looked.
            return self.write_subclusters(tracker, (number, &table), data, offset);
        }
        if self.keeps_raw() {
            // Then it can be written in place.
            return self.map_raw(number, &table, cluster, &old).map(|()| 0);
        }
        let inside = self.geometry.offset_in_cluster(offset);
        let run = self.place_clusters(cluster, to_u64(old.len()))?;
        let old = &old[..to_usize(run.clusters)];
        let room = to_usize(run.clusters << self.geometry.cluster_bits) - to_usize(inside);
        let len = room.min(data.len());
        let range = offset..offset + to_u64(len);
        let written = tracker
            .stage(self, range.clone())
            .and_then(|()| tracker.mark(self, range.clone()))
            .and_then(|()| self.fill_run(run, old, &data[..len], offset));
        if let Err(error) = written {
            // Nothing refers to the clusters yet.
            self.give_up(run)?;
            return Err(error);
        }
        let raw: Vec<RawL2> = (0..run.clusters)
            .zip(old)
            .map(|(step, old)| {
                let further = step << self.geometry.cluster_bits;
                let start = offset - inside + further;
                self.written(old, run.start.plus(further), start, &range)
            })
            .collect();
        self.tables.set(number, &table, slot, &raw);
        self.free_replaced(old.iter().copied())?;
        Ok(len)
    }

    /// Clusters that a range touches, and the bytes of the range's first one before it.
    fn clusters_in(&self, offset: u64, len: usize) -> (u64, u64) {
        let inside = self.geometry.offset_in_cluster(offset);
        (self.geometry.clusters_for(inside + to_u64(len)), inside)
    }

    /// Entries from `cluster` on, up to `wanted`, that cannot be written in place.
    fn replaceable(
        &self,
        table: &L2Table,
        cluster: GuestCluster,
        wanted: u64,
    ) -> Result<Vec<L2Entry>> {
        let mut old = Vec::new();
        for step in 0..wanted {
            let cluster = GuestCluster(cluster.0 + step);
            let (_, slot) = self.geometry.table_indexes(cluster);
            match self.decode(table.entry(slot), cluster)? {
                entry if entry.own_host().is_some() => break,
                entry => old.push(entry),
            }
        }
        Ok(old)
    }

    /// Puts `data` into new clusters, with what the disk had there in the rest of the clusters or
    /// subclusters that it touches, and what stays of the replaced ones.
    fn fill_run(&self, run: HostRun, old: &[L2Entry], data: &[u8], offset: u64) -> Result<()> {
        let unit = self.geometry.subcluster_bytes();
        let end = offset + to_u64(data.len());
        let base = offset - self.geometry.offset_in_cluster(offset);
        let room = base + self.room_for_data(run.start, run.clusters);
        let span = offset / unit * unit..end.next_multiple_of(unit).min(room);
        self.keep_subclusters(run, old, &span)?;
        let blank = run.untouched
            && self.range_reads_as_zero(span.start, offset)?
            && self.range_reads_as_zero(end, span.end)?;
        if blank {
            let place = run.start.plus(offset - base);
            return self.guest_file()?.write(data, place, "write data");
        }
        let place = run.start.plus(span.start - base);
        let filled = self.padded(data, offset, span)?;
        self.guest_file()?.write(&filled, place, "write data")
    }

    /// Drops the references that replaced entries held.
    pub(super) fn free_replaced(&self, old: impl Iterator<Item = L2Entry>) -> Result<()> {
        if self.has_external_data() {
            return Ok(());
        }
        let gone: Vec<HostRun> = old
            .filter_map(|entry| entry.host_run(&self.geometry))
            .map(|(first, clusters)| HostRun {
                start: self.geometry.host_offset(first),
                clusters,
                untouched: false,
            })
            .collect();
        if gone.is_empty() {
            return Ok(());
        }
        self.with_allocator(|allocator, _| {
            gone.iter().for_each(|&run| allocator.free_later(run));
            Ok(())
        })
    }

    /// Writes zeros as data inside one lock group.
    fn write_zero_data(&self, tracker: &Tracker, start: u64, len: u64) -> Result<()> {
        let zeros = vec![0; to_usize(len.min(ZERO_PIECE))];
        let mut done = 0;
        while done < len {
            let step = (len - done).min(ZERO_PIECE);
            self.write_group(tracker, &zeros[..to_usize(step)], start + done)?;
            done += step;
        }
        Ok(())
    }

    /// Makes whole clusters or subclusters inside one lock group read as zero. A compressed cluster
    /// has no subclusters: parts of one keep their content; start and bytes of each are returned.
    fn unmap_group(&self, tracker: &Tracker, offset: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        let cluster = self.geometry.guest_cluster(offset);
        let _owned = self.clusters.own(cluster);
        if self.keeps_raw() {
            tracker.mark(self, offset..offset + len)?;
            self.zero_data(offset, len)?;
            return Ok(Vec::new());
        }
        let (number, first_slot) = self.geometry.table_indexes(cluster);
        let showing = self.names_backing();
        if !showing && self.table(number)?.is_none() {
            return Ok(Vec::new());
        }
        tracker.stage(self, offset..offset + len)?;
        tracker.mark(self, offset..offset + len)?;
        let table = self.table_for_change(number)?;
        let (mut raw, mut old, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        let (count, inside) = self.clusters_in(offset, to_usize(len));
        for step in 0..count {
            let cluster = GuestCluster(cluster.0 + step);
            let (_, slot) = self.geometry.table_indexes(cluster);
            let present = table.entry(slot);
            let entry = self.decode(present, cluster)?;
            let start = offset - inside + (step << self.geometry.cluster_bits);
            let end = start + self.geometry.cluster_bytes();
            let range = offset.max(start)..(offset + len).min(end);
            match self.zeroed(&entry, start, &range) {
                Some((zeroed, gone)) => {
                    raw.push(zeroed);
                    old.extend(gone.then_some(entry));
                }
                None => {
                    raw.push(present);
                    kept.push((range.start, range.end - range.start));
                }
            }
        }
        self.tables.set(number, &table, first_slot, &raw);
        self.discard_outside(&old);
        self.free_replaced(old.into_iter())?;
        Ok(kept)
    }

    /// L2 table `number` as one that may be changed: created, or copied from a shared one.
    pub(super) fn table_for_change(&self, number: usize) -> Result<Arc<L2Table>> {
        if let Some(table) = self.own_table(number)? {
            return Ok(table);
        }
        let _creating = lock(&self.table_creation);
        let shared = match self.l1_entry(number)? {
            L1Entry::Table { copied: true, .. } => {
                return self.own_table(number)?.ok_or_else(|| {
                    let structure = "L2 table";
                    self.file.damage(Damage::Truncated { structure })
                });
            }
            L1Entry::Table { offset, .. } => Some(offset),
            L1Entry::Unallocated => None,
        };
        let raw = match (shared, self.table(number)?) {
            (Some(_), Some(table)) => table.words(),
            _ => vec![0; to_usize(self.geometry.table_entries(1))],
        };
        let offset = self.with_allocator(|allocator, _| {
            let offset = allocator.allocate_exact(&self.file, 1)?;
            if let Some(old) = shared {
                allocator.release(single(old));
                allocator.free_later(single(old));
            }
            Ok(offset)
        })?;
        let table = self.tables.create(number, offset, raw);
        self.l1()[number].store(L1Entry::encode(offset), Ordering::Release);
        self.guard_table(number, &table)?;
        Ok(table)
    }
}
