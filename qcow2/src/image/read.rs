//! Reading guest data.

use std::sync::Arc;

use super::Image;
use super::locks::ClusterLocks;
use super::open::decode_l1;
use crate::cache::L2Table;
use crate::convert::{to_u64, to_usize};
use crate::error::{Feature, Result};
use crate::format::part::Part;
use crate::format::table::{L1Entry, L2Entry, RawL2};
use crate::sync::atomic::Ordering;
use crate::units::{GuestCluster, HostOffset};

impl Image {
    /// Fills `buf` with the disk's content from byte `offset` on.
    ///
    /// # Errors
    /// A range outside the disk, a damaged cluster, an encrypted image, a data file that was not
    /// opened, or I/O.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(offset, to_u64(buf.len()))?;
        self.guest_file()?;
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let cluster = self.geometry.guest_cluster(at);
            let group = ClusterLocks::group_rest(cluster) << self.geometry.cluster_bits;
            let step = group - self.geometry.offset_in_cluster(at);
            let (piece, after) = rest.split_at_mut(rest.len().min(to_usize(step)));
            let _shared = self.clusters.share(cluster);
            self.read_group(piece, at)?;
            at += to_u64(piece.len());
            rest = after;
        }
        Ok(())
    }

    /// Reads a range inside one lock group, whose lock is held.
    pub(super) fn read_group(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (number, _) = self
            .geometry
            .table_indexes(self.geometry.guest_cluster(offset));
        let Some(table) = self.table(number)? else {
            return self.read_below(buf, offset);
        };
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let (part, len) = self.run_at(&table, at, to_u64(rest.len()))?;
            let (piece, after) = rest.split_at_mut(to_usize(len));
            match part {
                Part::Data(host) => self.guest_file()?.read(piece, host, "read data")?,
                Part::Zeros(_) => piece.fill(0),
                Part::Below(_) => self.read_below(piece, at)?,
                Part::Compressed(data) => self.read_compressed(piece, at, data)?,
            }
            at += len;
            rest = after;
        }
        Ok(())
    }

    /// The longest run from `at` on, up to `limit` bytes, that comes from one place in one piece.
    fn run_at(&self, table: &L2Table, at: u64, limit: u64) -> Result<(Part, u64)> {
        let (first, mut len) = self.part_at(table, at)?;
        while len < limit {
            let (next, more) = self.part_at(table, at + len)?;
            // Two clusters of the same compressed data are read one by one.
            if next != first.after(len) || matches!(first, Part::Compressed(_)) {
                break;
            }
            len += more;
        }
        Ok((first, len.min(limit)))
    }

    /// Where byte `at` of the disk comes from, and for how many bytes inside its cluster.
    fn part_at(&self, table: &L2Table, at: u64) -> Result<(Part, u64)> {
        let entry = self.entry_at(table, self.geometry.guest_cluster(at))?;
        Ok(entry.part(self.geometry.offset_in_cluster(at), &self.geometry))
    }

    /// The checked entry of `cluster`, whose lock the caller holds.
    pub(super) fn entry_at(&self, table: &L2Table, cluster: GuestCluster) -> Result<L2Entry> {
        let (_, slot) = self.geometry.table_indexes(cluster);
        self.decode(table.entry(slot), cluster)
    }

    /// Reads what shows through from below.
    pub(super) fn read_below(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match (&self.backing, self.names_backing()) {
            (Some(layer), _) => layer.read(buf, offset),
            (None, false) => {
                buf.fill(0);
                Ok(())
            }
            (None, true) => {
                let name = self
                    .backing()
                    .map(|reference| reference.name)
                    .unwrap_or_default();
                Err(self.file.unsupported(Feature::Backing {
                    name: String::from_utf8_lossy(&name).into_owned(),
                    reason: "the image was opened without it".to_owned(),
                }))
            }
        }
    }

    /// Whether unallocated clusters show a backing file, opened or not.
    pub(crate) fn names_backing(&self) -> bool {
        self.backing.is_some() || self.has_backing_name
    }

    pub(crate) fn decode(&self, raw: RawL2, cluster: GuestCluster) -> Result<L2Entry> {
        L2Entry::decode(raw, cluster.0, &self.geometry).map_err(|damage| self.file.damage(damage))
    }

    pub(crate) fn l1_entry(&self, number: usize) -> Result<L1Entry> {
        let raw = self
            .l1()
            .get(number)
            .map_or(0, |entry| entry.load(Ordering::Acquire));
        decode_l1(&self.file, &self.geometry, raw, number)
    }

    /// All entries of the L2 table at `offset`, read from the file.
    pub(crate) fn read_l2(&self, offset: HostOffset) -> Result<Vec<RawL2>> {
        let words = to_usize(self.geometry.table_entries(1));
        let words = self.file.read_table(offset, words, "read L2 table")?;
        Ok(self.to_entries(&words))
    }

    /// All entries of L2 table `number`, which the active L1 table has at `offset`: as they are in
    /// memory where they are.
    pub(crate) fn present_l2(&self, number: usize, offset: HostOffset) -> Result<Vec<RawL2>> {
        match self.tables.peek(number) {
            Some(table) => Ok(self.to_entries(&table.words())),
            None => self.read_l2(offset),
        }
    }

    fn to_entries(&self, words: &[u64]) -> Vec<RawL2> {
        words
            .chunks(self.geometry.words_per_l2_entry())
            .map(|entry| RawL2 {
                entry: entry[0],
                subclusters: entry.get(1).copied().unwrap_or(0),
            })
            .collect()
    }

    /// L2 table `number`, if there is one. The caller holds the lock of some cluster, or keeps
    /// changes of the whole mapping out in another way.
    pub(super) fn table(&self, number: usize) -> Result<Option<Arc<L2Table>>> {
        if let Some(table) = self.tables.peek(number) {
            return Ok(Some(table));
        }
        let place = || {
            Ok(match self.l1_entry(number)? {
                L1Entry::Unallocated => None,
                L1Entry::Table { offset, .. } => Some(offset),
            })
        };
        match place()? {
            Some(_) => self.tables.load(&self.file, number, place),
            None => Ok(None),
        }
    }
}
