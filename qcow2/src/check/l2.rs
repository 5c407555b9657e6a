//! L2 tables: the data clusters that they name.

use super::mapping::Named;
use super::{Census, Finding, place};
use crate::format::subclusters::Subclusters;
use crate::format::table::{COPIED, L2Entry, OFFSET_MASK, RawL2};
use crate::geometry::Geometry;
use crate::units::HostOffset;

/// Bits of a standard entry that must be zero: 1 to 8, 56 to 61.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// An entry that names a standard host cluster: its offset, which need not be aligned.
fn target(entry: u64) -> Option<HostOffset> {
    let offset = HostOffset(entry & OFFSET_MASK);
    (entry & COMPRESSED == 0 && offset != HostOffset::ZERO).then_some(offset)
}

/// Entries, of one or two words each, of the table at `offset` that are not zero, with the place of
/// each.
pub(super) fn entries(
    bytes: &[u8],
    offset: HostOffset,
    words: usize,
) -> impl Iterator<Item = (HostOffset, RawL2)> {
    let entries = bytes.as_chunks::<8>().0.chunks_exact(words).enumerate();
    entries.filter_map(move |(slot, raw)| {
        let word = |at: usize| raw.get(at).map_or(0, |raw| u64::from_be_bytes(*raw));
        let raw = RawL2 {
            entry: word(0),
            subclusters: word(1),
        };
        (raw != RawL2::UNALLOCATED).then(|| (place(offset, slot * words), raw))
    })
}

impl Census<'_> {
    pub(super) fn read_l2(&mut self, offset: HostOffset) -> Option<Vec<u8>> {
        let bytes = self.geometry.cluster_bytes();
        if self.file.storage().hole_at(offset.0).unwrap_or(0) >= bytes {
            return None;
        }
        self.read("L2 table", offset, bytes)
    }

    /// Counts what one table names.
    pub(super) fn count_l2(&mut self, offset: HostOffset, named: Named) {
        let Some(bytes) = self.read_l2(offset) else {
            return;
        };
        let words = self.geometry.words_per_l2_entry();
        let mut follows = None;
        for (at, raw) in entries(&bytes, offset, words) {
            let entry = raw.entry;
            if entry & COMPRESSED != 0 {
                self.count_compressed(at, raw, named);
                continue;
            }
            if entry & RESERVED != 0 {
                self.l2_problem(at, entry, "reserved bits are set", named);
            }
            if entry & ZERO != 0 && self.geometry.version == 2 {
                let problem = "zero clusters do not exist in version 2";
                self.l2_problem(at, entry, problem, named);
            }
            self.check_subclusters(at, raw, named);
            if let Some(data) = self.target(entry) {
                if !self.geometry.is_aligned(data) {
                    let problem = "the data cluster is not cluster aligned";
                    self.l2_problem(at, entry, problem, named);
                }
                self.report.allocated_clusters += named.active;
                if follows.is_some_and(|expected| expected != data) {
                    self.report.fragmented_clusters += named.active;
                }
                follows = Some(data.plus(self.geometry.cluster_bytes()));
                if !self.geometry.external_data {
                    self.count_data(data, named.all);
                }
            }
        }
    }

    /// The host cluster that a standard entry names. In an external data file the first one is told
    /// by the flag.
    pub(super) fn target(&self, entry: u64) -> Option<HostOffset> {
        if self.geometry.external_data && entry & (COPIED | COMPRESSED) == COPIED {
            return Some(HostOffset(entry & OFFSET_MASK));
        }
        target(entry)
    }

    /// What the second word of an extended entry says against itself or the first.
    fn check_subclusters(&mut self, at: HostOffset, raw: RawL2, named: Named) {
        let problem = match (self.target(raw.entry), Subclusters::decode(raw.subclusters)) {
            (Some(_), None) => "a subcluster is allocated and reads as zero at once",
            (None, subclusters) if subclusters.is_none_or(Subclusters::any_allocated) => {
                "subclusters are allocated without a host cluster"
            }
            _ => return,
        };
        self.l2_problem(at, raw.entry, problem, named);
    }

    fn count_data(&mut self, data: HostOffset, times: u64) {
        let cluster = self.geometry.host_cluster(data).0;
        let bytes = self.geometry.cluster_bytes();
        let usual = times == 1 && self.geometry.is_aligned(data) && cluster < self.clusters;
        if !usual || !self.counts.bump(cluster) {
            self.count("data cluster", data, bytes, times);
        }
    }

    fn count_compressed(&mut self, at: HostOffset, raw: RawL2, named: Named) {
        let entry = raw.entry;
        if entry & COPIED != 0 {
            self.l2_problem(at, entry, "a compressed cluster is never COPIED", named);
        }
        if self.geometry.external_data {
            let problem = "an external data file has no compressed clusters";
            return self.l2_problem(at, entry, problem, named);
        }
        if raw.subclusters != 0 {
            let problem = "a compressed cluster has no subclusters";
            return self.l2_problem(at, entry, problem, named);
        }
        let (start, bytes) = compressed_range(entry, &self.geometry);
        self.count("compressed cluster", start, bytes, named.all);
        self.report.allocated_clusters += named.active;
        self.report.compressed_clusters += named.active;
        // Neighbours share sectors, which are read again for each.
        self.report.fragmented_clusters += named.active;
    }

    fn l2_problem(&mut self, place: HostOffset, entry: u64, problem: &'static str, named: Named) {
        let finding = Finding::Entry {
            table: "L2",
            place,
            entry,
            problem,
        };
        self.found(finding, named.all);
    }

    /// Compares the COPIED flags of one table.
    pub(super) fn check_copied_l2(&mut self, offset: HostOffset, times: u64) {
        let Some(bytes) = self.read_l2(offset) else {
            return;
        };
        let words = self.geometry.words_per_l2_entry();
        for (at, raw) in entries(&bytes, offset, words) {
            if let Some(data) = self.target(raw.entry) {
                self.copied("L2", at, raw.entry, data, times);
            } else if raw.entry & COMPRESSED != 0
                && raw.entry & COPIED != 0
                && let Some(flags) = &mut self.flags
            {
                flags.note_compressed(at, raw.entry);
            }
        }
    }
}

/// First byte and bytes of compressed data, in the sectors that hold it.
fn compressed_range(entry: u64, geometry: &Geometry) -> (HostOffset, u64) {
    L2Entry::decode(entry.into(), 0, geometry)
        .ok()
        .and_then(|entry| entry.compressed())
        .map_or((HostOffset::ZERO, 0), |data| (data.offset, data.bytes))
}
