//! The fast way through what is in order: L2 tables and refcount blocks of the common kind, many
//! tables at once.
//!
//! Invariants:
//! - Nothing is found here. Whatever is out of the ordinary is left to the careful way, entry by
//!   entry, which alone reports: the answers are those of the careful way alone.
//! - Memory is bounded by a batch, whatever the size of the image.

use std::ops::Range;

use rayon::prelude::*;

use super::Census;
use super::counts::ReferenceCounts;
use super::mapping::L2Tables;
use crate::convert::{to_u64, to_usize};
use crate::error::Result;
use crate::format::table::{COPIED, OFFSET_MASK};
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::units::HostOffset;

/// Bytes of tables in one batch.
const BATCH_BYTES: u64 = 4 << 20;
/// Tables from which on threads pay.
const MANY: usize = 32;
const ZERO: u64 = 1;
/// Width of refcounts that blocks are compared fast for, as a power of two: 16 bits.
pub(crate) const USUAL_ORDER: u32 = 4;

/// What an L2 table refers to, where every entry is plain data, allocated zeros, or nothing.
#[derive(Debug, Default)]
pub(super) struct Summary {
    /// First cluster and clusters of each run in the file, in the order of the disk.
    runs: Vec<(u64, u64)>,
    clusters: u64,
    /// Entries with the COPIED flag.
    copied: u64,
}

/// Reads tables for a census without touching it.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    file: &'a ImageFile,
    geometry: Geometry,
    /// Clusters of the file.
    clusters: u64,
}

impl Reader<'_> {
    /// What the table at `offset` refers to; none where it has to be looked at with care.
    fn summary(&self, buffer: &mut Vec<u8>, offset: HostOffset) -> Result<Option<Summary>> {
        let mut summary = Summary::default();
        self.read(buffer, offset)?;
        let (flags, bits) = (COPIED | self.zero_flag(), self.geometry.cluster_bits);
        for raw in buffer.as_chunks::<8>().0 {
            let entry = u64::from_be_bytes(*raw);
            let host = (entry & OFFSET_MASK) >> bits;
            if entry & !flags != host << bits || host >= self.clusters {
                return Ok(None);
            }
            if host == 0 {
                continue;
            }
            summary.clusters += 1;
            summary.copied += entry >> 63;
            match summary.runs.last_mut() {
                Some((first, count)) if *first + *count == host => *count += 1,
                _ => summary.runs.push((host, 1)),
            }
        }
        Ok(Some(summary))
    }

    /// Whether the COPIED flag of every entry says what the counts say.
    fn flags_agree(
        &self,
        buffer: &mut Vec<u8>,
        offset: HostOffset,
        counts: &ReferenceCounts,
    ) -> Result<bool> {
        let words = self.geometry.words_per_l2_entry();
        let agrees = |entry: u64| {
            let host = (entry & OFFSET_MASK) >> self.geometry.cluster_bits;
            let plain = entry & !(COPIED | OFFSET_MASK | ZERO) == 0;
            plain && (host == 0 || (counts.get(host) == 1) == (entry & COPIED != 0))
        };
        self.read(buffer, offset)?;
        let mut entries = buffer.as_chunks::<8>().0.iter().step_by(words);
        Ok(entries.all(|raw| agrees(u64::from_be_bytes(*raw))))
    }

    fn read(&self, buffer: &mut Vec<u8>, offset: HostOffset) -> Result<()> {
        let bytes = self.geometry.cluster_len();
        buffer.resize(bytes, 0);
        if self.file.storage().hole_at(offset.0).unwrap_or(0) >= to_u64(bytes) {
            buffer.fill(0);
            return Ok(());
        }
        self.file.read(buffer, offset, "check")
    }

    fn zero_flag(&self) -> u64 {
        match self.geometry.version {
            2 => 0,
            _ => ZERO,
        }
    }

    /// Runs `work` for each offset, on several threads where there are many.
    fn for_all<T: Send>(
        &self,
        offsets: &[HostOffset],
        work: impl Fn(&Self, &mut Vec<u8>, HostOffset) -> T + Sync,
    ) -> Vec<T> {
        // The model checker knows only its own threads.
        if cfg!(shuttle) || offsets.len() < MANY {
            let mut buffer = Vec::new();
            return offsets
                .iter()
                .map(|&offset| work(self, &mut buffer, offset))
                .collect();
        }
        offsets
            .par_iter()
            .map_init(Vec::new, |buffer, &offset| work(self, buffer, offset))
            .collect()
    }
}

impl<'a> Census<'a> {
    fn reader(&self) -> Reader<'a> {
        Reader {
            file: self.file,
            geometry: self.geometry,
            clusters: self.clusters,
        }
    }

    fn batch(&self) -> usize {
        to_usize((BATCH_BYTES >> self.geometry.cluster_bits).max(2))
    }

    /// Counts what the tables name.
    pub(super) fn count_l2_tables(&mut self, tables: &L2Tables) {
        // Entries of two words, and those that name places in another file, need care.
        let usual = !self.geometry.extended_l2 && !self.geometry.external_data;
        let all: Vec<_> = tables.iter().map(|(&at, &named)| (at, named)).collect();
        for batch in all.chunks(self.batch()) {
            let offsets: Vec<HostOffset> = batch.iter().map(|&(offset, _)| offset).collect();
            let summaries = match usual {
                true => self.reader().for_all(&offsets, Reader::summary),
                false => offsets.iter().map(|_| Ok(None)).collect(),
            };
            for (&(offset, named), summary) in batch.iter().zip(summaries) {
                match summary {
                    Ok(Some(summary)) if named.all == 1 => {
                        self.add_summary(&summary, named.active);
                    }
                    Err(error) => self.unreadable("L2 table", offset, &error),
                    Ok(_) => {
                        self.uniform = false;
                        self.count_l2(offset, named);
                    }
                }
            }
        }
    }

    fn add_summary(&mut self, summary: &Summary, active: u64) {
        for &(first, count) in &summary.runs {
            if !self.counts.bump_run(first..first + count) {
                (first..first + count).for_each(|cluster| self.add(cluster, 1));
            }
        }
        self.uniform &= active == 1 && summary.copied == summary.clusters;
        self.report.allocated_clusters += active * summary.clusters;
        let breaks = to_u64(summary.runs.len()).saturating_sub(1);
        self.report.fragmented_clusters += active * breaks;
    }

    /// The tables among `offsets` whose COPIED flags have to be compared one by one.
    pub(super) fn unsure_of_flags(&mut self, offsets: &[HostOffset]) -> Vec<HostOffset> {
        if self.uniform && self.single {
            // Every cluster is counted once, and every entry says so.
            return Vec::new();
        }
        if self.geometry.external_data {
            return offsets.to_vec();
        }
        let mut unsure = Vec::new();
        for batch in offsets.chunks(self.batch()) {
            let counts = &self.counts;
            let agreed = self.reader().for_all(batch, |reader, buffer, offset| {
                reader.flags_agree(buffer, offset, counts)
            });
            for (&offset, agreed) in batch.iter().zip(agreed) {
                match agreed {
                    Ok(true) => {}
                    Ok(false) => unsure.push(offset),
                    Err(error) => self.unreadable("L2 table", offset, &error),
                }
            }
        }
        unsure
    }

    /// Whether a refcount block says for all of `clusters` what was counted, and the highest of them
    /// in use. Looks only at blocks of the usual width.
    pub(super) fn block_agrees(&mut self, block: &[u8], clusters: &Range<u64>) -> Option<u64> {
        let single = std::mem::replace(&mut self.single, false);
        if self.geometry.refcount_order != USUAL_ORDER {
            return None;
        }
        let counted = self.counts.slice(clusters.clone())?;
        let (differ, any) = compare(block, counted);
        if differ {
            return None;
        }
        self.single = single && any <= 1;
        let last = counted.iter().rposition(|&count| count != 0);
        Some(last.map_or(0, |last| clusters.start + to_u64(last)))
    }
}

/// Whether 16-bit refcounts differ from the counts, and all bits of the counts. Without a branch, so
/// that many are compared at once.
fn compare(block: &[u8], counted: &[u8]) -> (bool, u8) {
    let (mut differ, mut any) = (0, 0);
    for (raw, &count) in block.as_chunks::<2>().0.iter().zip(counted) {
        let full = u16::from(count == u8::MAX);
        differ |= (u16::from_be_bytes(*raw) ^ u16::from(count)) | full;
        any |= count;
    }
    (differ != 0, any)
}

/// Whether a refcount block of the usual width counts at least `counted` everywhere.
pub(crate) fn counts_enough(block: &[u8], counted: &[u8]) -> bool {
    let mut less = false;
    for (raw, &count) in block.as_chunks::<2>().0.iter().zip(counted) {
        less |= u16::from_be_bytes(*raw) < u16::from(count) || count == u8::MAX;
    }
    !less
}
