//! Writing clusters that have no place of their own: data goes into fresh ones, filled up with what
//! the disk had around it, and the mapping follows in memory.

use super::Image;
use crate::alloc::HostRun;
use crate::bitmaps::tracker::Tracker;
use crate::cache::L2Table;
use crate::convert::{to_u64, to_usize};
use crate::error::Result;
use crate::format::table::{L2Entry, RawL2};
use crate::units::GuestCluster;

impl Image {
    /// Writes the clusters from `offset` on that need a new place; returns the bytes written.
    pub(super) fn write_allocating(
        &self,
        tracker: &Tracker,
        data: &[u8],
        offset: u64,
    ) -> Result<usize> {
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
    pub(super) fn clusters_in(&self, offset: u64, len: usize) -> (u64, u64) {
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
            match self.changeable(table.entry(slot), cluster)? {
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
    pub(in crate::image) fn free_replaced(&self, old: impl Iterator<Item = L2Entry>) -> Result<()> {
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
}
