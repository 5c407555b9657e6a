//! Making parts of the disk read as zero: by mapping whole clusters and subclusters to nothing, as
//! data elsewhere.

use super::Image;
use crate::bitmaps::tracker::Tracker;
use crate::convert::to_usize;
use crate::error::Result;
use crate::units::GuestCluster;

/// Zeros written at once where the format has no better way.
const ZERO_PIECE: u64 = 1 << 20;

impl Image {
    /// Makes `len` bytes from `offset` read as zero, giving up whole clusters. Whole subclusters are
    /// only marked as zero.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.change(offset, len, |tracker, at, len| {
            self.per_clusters(at, len, |start, len, whole| {
                let showing = self.geometry.version == 2 && self.shows_backing();
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
        if self.geometry.version == 2 && self.shows_backing() {
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
        let showing = self.shows_backing();
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
            let entry = self.changeable(present, cluster)?;
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
}
