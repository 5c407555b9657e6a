//! Overwriting clusters that are allocated and ours alone.

use super::Image;
use crate::bitmaps::tracker::Tracker;
use crate::cache::L2Table;
use crate::convert::{to_u64, to_usize};
use crate::error::Result;
use crate::format::part::Part;
use crate::units::HostOffset;

impl Image {
    /// Overwrites the clusters from `offset` on that are allocated and ours alone; returns the
    /// bytes written, zero when the first cluster is not.
    pub(super) fn write_in_place(
        &self,
        tracker: &Tracker,
        data: &[u8],
        offset: u64,
    ) -> Result<usize> {
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

    /// Where byte `at` may be overwritten, and for how many bytes inside its cluster.
    fn in_place(&self, table: &L2Table, at: u64) -> Result<Option<(HostOffset, u64)>> {
        let cluster = self.geometry.guest_cluster(at);
        let (_, slot) = self.geometry.table_indexes(cluster);
        let entry = self.changeable(table.entry(slot), cluster)?;
        match entry.part(self.geometry.offset_in_cluster(at), &self.geometry) {
            (Part::Data(host), len) if entry.own_host().is_some() => Ok(Some((host, len))),
            _ => Ok(None),
        }
    }
}
