//! Writes that touch some subclusters of a cluster: only these are filled, the others stay what
//! they are.
//!
//! Invariant: in one host cluster a subcluster that was allocated becomes zero, and never
//! unallocated again. One that is unallocated in memory is therefore no data on disk either, and
//! may be filled before its marks are durable; one that reads as zero may still be data on disk.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::Image;
use crate::alloc::HostRun;
use crate::bitmaps::tracker::Tracker;
use crate::cache::L2Table;
use crate::convert::{to_u64, to_usize};
use crate::error::Result;
use crate::format::part::Part;
use crate::format::subclusters::{self, Subcluster, Subclusters, touched};
use crate::format::table::{L2Entry, RawL2};
use crate::units::HostOffset;

impl Image {
    /// Writes from `offset` on into subclusters that have a place in a host cluster of ours and are
    /// not allocated; returns the bytes written, zero when the first subcluster is another kind.
    /// The caller owns the lock of the cluster.
    pub(super) fn write_subclusters(
        &self,
        tracker: &Tracker,
        (number, table): (usize, &Arc<L2Table>),
        data: &[u8],
        offset: u64,
    ) -> Result<usize> {
        let cluster = self.geometry.guest_cluster(offset);
        let (_, slot) = self.geometry.table_indexes(cluster);
        let L2Entry::Partial {
            host: Some(host),
            copied: true,
            subclusters,
        } = self.changeable(table.entry(slot), cluster)?
        else {
            return Ok(0);
        };
        if self.keeps_raw() {
            let entry = self.changeable(table.entry(slot), cluster)?;
            return self.map_raw(number, table, cluster, &[entry]).map(|()| 0);
        }
        let bytes = self.geometry.subcluster_bytes();
        let inside = self.geometry.offset_in_cluster(offset);
        let stop = (inside + to_u64(data.len())).min(self.geometry.cluster_bytes());
        let (vacant, any_zero) = vacant(subclusters, touched(inside..stop, bytes));
        if vacant.is_empty() {
            return Ok(0);
        }
        let stop = stop.min(to_u64(vacant.end) * bytes);
        let len = to_usize(stop - inside);
        let range = offset..offset + to_u64(len);
        if any_zero {
            tracker.cover_durably(self, range.clone())?;
        } else {
            tracker.stage(self, range.clone())?;
        }
        tracker.mark(self, range)?;
        let start = to_u64(vacant.start) * bytes;
        let span = offset - (inside - start)..offset - inside + to_u64(vacant.end) * bytes;
        let filled = self.padded(&data[..len], offset, span)?;
        self.guest_file()?
            .write(&filled, host.plus(start), "write data")?;
        let raw = RawL2::partial(Some(host), true, subclusters.with_allocated(vacant));
        self.tables.set(number, table, slot, &[raw]);
        Ok(len)
    }

    /// Bytes of `span`: `data` at `offset`, what the disk has before and behind it.
    pub(super) fn padded<'a>(
        &self,
        data: &'a [u8],
        offset: u64,
        span: Range<u64>,
    ) -> Result<Cow<'a, [u8]>> {
        let end = offset + to_u64(data.len());
        if span == (offset..end) {
            return Ok(Cow::Borrowed(data));
        }
        let mut whole = vec![0; to_usize(span.end - span.start)];
        let (before, rest) = whole.split_at_mut(to_usize(offset - span.start));
        self.read_group(before, span.start)?;
        let (middle, behind) = rest.split_at_mut(data.len());
        middle.copy_from_slice(data);
        let readable = to_usize(self.size().saturating_sub(end)).min(behind.len());
        self.read_group(&mut behind[..readable], end)?;
        Ok(Cow::Owned(whole))
    }

    /// Copies what stays of replaced clusters, outside `span`, to its place in the new ones.
    pub(super) fn keep_subclusters(
        &self,
        run: HostRun,
        old: &[L2Entry],
        span: &Range<u64>,
    ) -> Result<()> {
        let cluster = self.geometry.cluster_bytes();
        let base = span.start / cluster * cluster;
        let end = base + (run.clusters << self.geometry.cluster_bits);
        for kept in [base..span.start, span.end..end] {
            let mut at = kept.start;
            while at < kept.end {
                let entry = &old[to_usize((at - base) >> self.geometry.cluster_bits)];
                let (part, len) = entry.part(self.geometry.offset_in_cluster(at), &self.geometry);
                let len = len.min(kept.end - at);
                if matches!(part, Part::Data(_) | Part::Compressed(_)) {
                    let mut bytes = vec![0; to_usize(len)];
                    self.read_group(&mut bytes, at)?;
                    let place = run.start.plus(at - base);
                    self.guest_file()?.write(&bytes, place, "write data")?;
                }
                at += len;
            }
        }
        Ok(())
    }

    /// The entry of a cluster that was written in `range` of the disk, now at `host`; `start` is its
    /// first byte.
    pub(super) fn written(
        &self,
        old: &L2Entry,
        host: HostOffset,
        start: u64,
        range: &Range<u64>,
    ) -> RawL2 {
        if !self.geometry.extended_l2 {
            return RawL2::normal(host, &self.geometry);
        }
        let subclusters = old.subclusters();
        RawL2::partial(
            Some(host),
            true,
            subclusters.with_allocated(self.touched_of(start, range)),
        )
    }

    /// The entry of the cluster at `start` after `range` of it became zero, and whether its host
    /// cluster is given up. `None` for a part of a compressed cluster, which has no subclusters.
    pub(super) fn zeroed(
        &self,
        old: &L2Entry,
        start: u64,
        range: &Range<u64>,
    ) -> Option<(RawL2, bool)> {
        let zero = |subclusters| match self.shows_backing() {
            true if self.geometry.extended_l2 => RawL2::partial(None, false, subclusters),
            true => RawL2::zero(&self.geometry),
            false => RawL2::UNALLOCATED,
        };
        if !self.geometry.extended_l2 {
            return Some((zero(Subclusters::ZERO), true));
        }
        // Behind the end of the disk there is nothing to keep.
        let end = match range.end == self.size() {
            true => start + self.geometry.cluster_bytes(),
            false => range.end,
        };
        let gone = self.touched_of(start, &(range.start..end));
        let subclusters = old.subclusters().with_zero(gone);
        if !subclusters.any_allocated() {
            return Some((zero(subclusters), true));
        }
        if old.compressed().is_some() {
            return None;
        }
        let copied = old.own_host().is_some();
        let raw = RawL2::partial(old.host_cluster(), copied, subclusters);
        Some((raw, false))
    }

    /// Subclusters of the cluster at `start` that `range` of the disk touches.
    fn touched_of(&self, start: u64, range: &Range<u64>) -> Range<usize> {
        let inside = range.start.saturating_sub(start)..range.end - start;
        touched(inside, self.geometry.subcluster_bytes())
    }
}

/// The first of `wanted` subclusters that are not allocated, and whether any of them reads as zero.
fn vacant(subclusters: Subclusters, wanted: Range<usize>) -> (Range<usize>, bool) {
    let (mut end, mut any_zero) = (wanted.start, false);
    while end < wanted.end {
        match subclusters.run(end) {
            (Subcluster::Allocated, _) => break,
            (kind, next) => {
                any_zero |= kind == Subcluster::Zero;
                end = next.min(subclusters::COUNT);
            }
        }
    }
    (wanted.start..end.min(wanted.end), any_zero)
}
