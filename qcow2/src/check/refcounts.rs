//! Refcount table and blocks, and the comparison of every count with the references found.

use std::collections::HashSet;
use std::ops::Range;

use super::repair::Counts;
use super::{Census, Finding, UNREACHABLE, place};
use crate::convert::{to_u64, to_usize};
use crate::error::Result;
use crate::format::header::Header;
use crate::format::refcount;
use crate::units::{HostCluster, HostOffset};

/// Bits of a refcount table entry that must be zero.
const RESERVED: u64 = 0x1ff;
const TABLE: &str = "refcount table";
/// Blocks are written in whole sectors.
const SECTOR: usize = 512;

impl Census<'_> {
    /// Counts the clusters of the refcount table.
    pub(super) fn count_refcount_table(&mut self, header: &Header) {
        let bytes = u64::from(header.refcount_table_clusters) << self.geometry.cluster_bits;
        self.refcounts_broken |= header.refcount_table_offset.0.saturating_add(bytes) > self.end;
        self.count_exclusive(TABLE, header.refcount_table_offset, bytes);
    }

    /// Counts once what the present refcounts say is in use and nothing refers to: it may belong to
    /// something that could not be followed.
    pub(super) fn keep_unexplained(&mut self, table: &[u64]) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let mut block = vec![0; self.geometry.cluster_len()];
        for (start, &entry) in (0..self.clusters).step_by(to_usize(per_block)).zip(table) {
            let at = HostOffset(entry & !RESERVED);
            let inside = at != HostOffset::ZERO && at.0 < self.end;
            if !inside || !self.geometry.is_aligned(at) {
                continue;
            }
            self.file.read(&mut block, at, "read refcount block")?;
            let clusters = start..(start + per_block).min(self.clusters);
            for (slot, cluster) in clusters.enumerate() {
                let used = refcount::count(&block, self.geometry.refcount_order, slot) > 0;
                if used && self.counts.get(cluster) == 0 {
                    self.counts.add(cluster, 1);
                }
            }
        }
        Ok(())
    }

    /// Counts the refcount blocks; returns the table that names them.
    pub(super) fn count_blocks(&mut self, header: &Header) -> Vec<u64> {
        let table = self.read_refcount_table(header);
        for (number, &entry) in table.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            self.count_block(header.refcount_table_offset, number, entry);
        }
        self.find_shared();
        table
    }

    /// Compares all counts, and puts the refcounts on disk into the place of the references.
    pub(super) fn compare(&mut self, table: &[u64]) {
        let per_block = self.geometry.refcounts_per_block();
        let mut seen = HashSet::new();
        let mut highest = 0;
        let mut start = 0;
        for &entry in table {
            if start >= self.clusters {
                break;
            }
            let range = start..(start + per_block).min(self.clusters);
            start = range.end;
            highest = highest.max(self.compare_block(entry, range, &mut seen));
        }
        if start < self.clusters {
            highest = highest.max(self.compare_uncounted(start..self.clusters));
        }
        self.report.image_end_offset = (highest + 1) << self.geometry.cluster_bits;
        for (cluster, (structure, references)) in std::mem::take(&mut self.shared) {
            let offset = self.geometry.host_offset(HostCluster(cluster));
            let finding = Finding::Overlap {
                structure,
                offset,
                references,
            };
            self.found(finding, 1);
        }
    }

    /// The entries that the file has; further ones are zero.
    pub(super) fn read_refcount_table(&mut self, header: &Header) -> Vec<u64> {
        let start = header.refcount_table_offset;
        let claimed = u64::from(header.refcount_table_clusters) << self.geometry.cluster_bits;
        let bytes = claimed.min(self.end.saturating_sub(start.0));
        let mut table = Vec::new();
        self.entries(
            "refcount table",
            start.0..start.0 + bytes,
            |_, at, entry| {
                table.resize(to_usize((at.0 - start.0) / 8), 0);
                table.push(entry);
            },
        );
        table
    }

    /// Counts the block that a table entry names. Blocks come last: any other reference to their
    /// cluster shows here.
    fn count_block(&mut self, table: HostOffset, number: usize, entry: u64) {
        let offset = HostOffset(entry & !RESERVED);
        let problem = if entry & RESERVED != 0 {
            "reserved bits are set"
        } else if !self.geometry.is_aligned(offset) {
            "the refcount block is not cluster aligned"
        } else if self.geometry.host_cluster(offset).0 >= self.clusters {
            let finding = Finding::BeyondEnd {
                structure: "refcount block",
                offset,
                bytes: self.geometry.cluster_bytes(),
            };
            self.refcounts_broken = true;
            return self.found(finding, 1);
        } else {
            self.count("refcount block", offset, self.geometry.cluster_bytes(), 1);
            let references = self.counts.get(self.geometry.host_cluster(offset).0);
            if references != 1 {
                let number = to_u64(number);
                let finding = Finding::RefcountBlock {
                    number,
                    offset,
                    references,
                };
                self.refcounts_broken = true;
                self.shared_block.get_or_insert(offset);
                self.found(finding, 1);
            }
            return;
        };
        self.refcounts_broken = true;
        let finding = Finding::Entry {
            table: "refcount table",
            place: place(table, number),
            entry,
            problem,
        };
        self.found(finding, 1);
    }

    /// Notes clusters of exclusive structures that have more than one reference.
    pub(super) fn find_shared(&mut self) {
        let mut ranges = std::mem::take(&mut self.exclusive);
        ranges.sort_unstable_by_key(|(_, clusters)| clusters.start);
        let mut done = 0;
        for (structure, clusters) in ranges {
            for cluster in clusters.start.max(done)..clusters.end {
                let references = self.counts.get(cluster);
                if references > 1 {
                    self.refcounts_broken |= structure == TABLE;
                    self.shared.insert(cluster, (structure, references));
                }
            }
            done = done.max(clusters.end);
        }
    }

    /// Compares the clusters that one table entry is for; returns the highest one in use.
    fn compare_block(
        &mut self,
        entry: u64,
        clusters: Range<u64>,
        seen: &mut HashSet<HostOffset>,
    ) -> u64 {
        let offset = HostOffset(entry & !RESERVED);
        let bytes = self.geometry.cluster_bytes();
        if !self.geometry.is_aligned(offset) || offset.0 >= UNREACHABLE {
            self.single = false;
            self.found(Finding::unreachable("refcount block", offset), 1);
            return 0;
        }
        let hole = self.file.storage().hole_at(offset.0).unwrap_or(0);
        if offset == HostOffset::ZERO || offset.0 >= self.end || hole >= bytes {
            return self.compare_uncounted(clusters);
        }
        if !seen.insert(offset) {
            self.single = false;
            // Reported as shared; reading it for every entry would cost what the table claims.
            return 0;
        }
        let Some(block) = self.read("refcount block", offset, bytes) else {
            self.single = false;
            return 0;
        };
        if let Some(highest) = self.block_agrees(&block, &clusters) {
            return highest;
        }
        let order = self.geometry.refcount_order;
        let mut highest = 0;
        for (slot, cluster) in clusters.enumerate() {
            let refcount = refcount::count(&block, order, slot);
            let references = self.counts.get(cluster);
            if refcount != 0 || references != 0 {
                highest = cluster;
                self.compare_cluster(cluster, refcount, references);
            }
        }
        highest
    }

    /// Writes the references that were counted into the blocks, where they stand. Returns whether
    /// anything was written.
    pub(super) fn mend_counts(&mut self, table: &[u64], how: Counts) -> Result<bool> {
        let per_block = self.geometry.refcounts_per_block();
        let mut wrote = false;
        for (start, &entry) in (0..self.clusters).step_by(to_usize(per_block)).zip(table) {
            let offset = HostOffset(entry & !RESERVED);
            let sound = entry & RESERVED == 0
                && self.geometry.is_aligned(offset)
                && self.counts.get(self.geometry.host_cluster(offset).0) == 1;
            if offset != HostOffset::ZERO && sound {
                let range = start..(start + per_block).min(self.clusters);
                wrote |= self.mend_block(offset, range, how)?;
            }
        }
        Ok(wrote)
    }

    fn mend_block(&mut self, at: HostOffset, clusters: Range<u64>, how: Counts) -> Result<bool> {
        let order = self.geometry.refcount_order;
        let mut block = vec![0; self.geometry.cluster_len()];
        self.file.read(&mut block, at, "read refcount block")?;
        let mut dirty: Option<Range<usize>> = None;
        for (slot, cluster) in clusters.enumerate() {
            let refcount = refcount::count(&block, order, slot);
            let references = self.counts.get(cluster);
            let mend = (how.raise && refcount < references) || (how.lower && refcount > references);
            if mend {
                refcount::set_count(&mut block, order, slot, references);
                let sector = (slot << order) / 8 / SECTOR * SECTOR;
                let start = dirty.as_ref().map_or(sector, |range| range.start);
                dirty = Some(start..(sector + SECTOR).min(block.len()));
            }
        }
        let Some(range) = dirty else {
            return Ok(false);
        };
        let place = at.plus(to_u64(range.start));
        self.file.write(&block[range], place, "correct refcounts")?;
        Ok(true)
    }

    /// Compares clusters that no block counts: their refcount is zero.
    fn compare_uncounted(&mut self, clusters: Range<u64>) -> u64 {
        let (mut highest, mut from) = (0, clusters.start);
        self.single = false;
        while let Some(cluster) = self.counts.next_referenced(from, clusters.end) {
            let references = self.counts.get(cluster);
            self.compare_cluster(cluster, 0, references);
            (highest, from) = (cluster, cluster + 1);
        }
        highest
    }

    fn compare_cluster(&mut self, cluster: u64, refcount: u64, references: u64) {
        if refcount != references {
            self.shared.remove(&cluster);
            let offset = self.geometry.host_offset(HostCluster(cluster));
            let finding = Finding::Refcount {
                offset,
                refcount,
                references,
            };
            self.found(finding, 1);
            self.counts.settle(cluster, refcount);
        }
    }
}
