//! Reading guest data.

use std::sync::Arc;

use super::Image;
use super::locks::ClusterLocks;
use super::open::decode_l1;
use crate::cache::L2Table;
use crate::convert::{to_u64, to_usize};
use crate::error::{Feature, Result};
use crate::format::table::{CompressedData, L1Entry, L2Entry, RawL2};
use crate::sync::atomic::Ordering;
use crate::units::{GuestCluster, HostOffset};

/// Where the bytes of a run of guest clusters come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Host(HostOffset),
    Zeros,
    Below,
    /// One cluster, to be expanded.
    Compressed(CompressedData),
}

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
            let (source, len) = self.run_at(&table, at, to_u64(rest.len()))?;
            let (piece, after) = rest.split_at_mut(to_usize(len));
            match source {
                Source::Host(host) => self.guest_file()?.read(piece, host, "read data")?,
                Source::Zeros => piece.fill(0),
                Source::Below => self.read_below(piece, at)?,
                Source::Compressed(data) => self.read_compressed(piece, at, data)?,
            }
            at += len;
            rest = after;
        }
        Ok(())
    }

    /// The longest run from `at` on, up to `limit` bytes, that comes from one place in one piece.
    fn run_at(&self, table: &Arc<L2Table>, at: u64, limit: u64) -> Result<(Source, u64)> {
        let inside = self.geometry.offset_in_cluster(at);
        let cluster_bytes = self.geometry.cluster_bytes();
        let mut cluster = self.geometry.guest_cluster(at);
        let first = self.source(table, cluster)?;
        let mut len = cluster_bytes - inside;
        while len < limit {
            cluster = GuestCluster(cluster.0 + 1);
            let next = self.source(table, cluster)?;
            let expected = match first {
                Source::Host(host) => Source::Host(host.plus(inside + len)),
                // Two clusters of the same data are read one by one.
                Source::Compressed(_) => break,
                other => other,
            };
            if next != expected {
                break;
            }
            len += cluster_bytes;
        }
        let source = match first {
            Source::Host(host) => Source::Host(host.plus(inside)),
            other => other,
        };
        Ok((source, len.min(limit)))
    }

    fn source(&self, table: &L2Table, cluster: GuestCluster) -> Result<Source> {
        let (_, slot) = self.geometry.table_indexes(cluster);
        let entry = self.decode(table.entry(slot), cluster)?;
        Ok(match entry {
            L2Entry::Unallocated => Source::Below,
            L2Entry::Zero { .. } => Source::Zeros,
            L2Entry::Normal { offset, .. } => Source::Host(offset),
            L2Entry::Compressed { .. } => {
                entry.compressed().map_or(Source::Below, Source::Compressed)
            }
        })
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

    /// L2 table `number`, if there is one.
    pub(super) fn table(&self, number: usize) -> Result<Option<Arc<L2Table>>> {
        if let Some(table) = self.tables.peek(number) {
            return Ok(Some(table));
        }
        match self.l1_entry(number)? {
            L1Entry::Unallocated => Ok(None),
            L1Entry::Table { offset, .. } => self.tables.load(&self.file, number, offset).map(Some),
        }
    }
}
