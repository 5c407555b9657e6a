//! What taking, applying and deleting a snapshot have in common: another mapping, other counts and
//! another snapshot table, true by one write of the header.
//!
//! 1. All counts to come are staged in memory; whatever is wrong with the image shows here, before
//!    the first write.
//! 2. L2 tables of the active disk whose COPIED flags differ under these counts, L1 tables and the
//!    snapshot table go into fresh clusters.
//! 3. Refcount blocks that differ and a refcount table go into fresh clusters.
//! 4. One header write names active L1, snapshot table and refcount table.
//!
//! A crash before 4 leaves the old state and leaked clusters, after it the new one.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;

use super::read_l1;
use super::table::{self, Entry};
use crate::alloc::{Allocator, HostRun, single};
use crate::convert::{to_u32, to_u64, to_usize};
use crate::error::{Damage, Feature, Result};
use crate::format::header::Header;
use crate::format::limits;
use crate::format::snapshot::Snapshot;
use crate::format::table::{COPIED, L1Entry, L2Entry, RawL2};
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::image::{Image, Update};
use crate::units::{GuestCluster, HostCluster, HostOffset};

type Count = fn(&mut Allocator, &ImageFile, HostCluster) -> Result<()>;

/// One more reference to a cluster, in the counts to come.
pub(super) const ADD: Count = Allocator::next_add;
/// One less.
pub(super) const DROP: Count = Allocator::next_drop;

/// The state to come.
pub(super) struct Change<'a> {
    image: &'a Image,
    /// The header as it is.
    header: Header,
    /// The snapshot table as it is.
    pub(super) entries: Vec<Entry>,
    /// L2 tables of the active disk as it is.
    active: HashSet<HostOffset>,
    /// Fresh clusters: nobody's before the header is written.
    taken: Vec<HostRun>,
    /// Metadata that the header will not name any more.
    released: Vec<HostRun>,
    /// The active L1 table to come, where it differs.
    l1: Option<Vec<u64>>,
}

impl Image {
    /// Runs `work` on the state to come and makes it true. Returns what `work` answered.
    pub(super) fn change_snapshots<R>(
        &self,
        work: impl FnOnce(&mut Update<'_>, &mut Change<'_>) -> Result<R>,
    ) -> Result<R> {
        let change = RefCell::new(None);
        let committed = Cell::new(false);
        let answer = Cell::new(None);
        let changed = self.restructure(
            |update| {
                let change = &mut *change.borrow_mut();
                answer.set(Some(work(update, change.insert(Change::begin(self)?))?));
                Ok(())
            },
            |_, ()| {
                committed.set(true);
                change.take().map_or(Ok(()), Change::adopt)
            },
        );
        if let Err(error) = changed {
            if !committed.get() && self.check_writable().is_ok() {
                change.take().map_or(Ok(()), Change::give_back)?;
            }
            return Err(error);
        }
        answer
            .take()
            .ok_or_else(|| self.file().invalid(crate::Mistake::Poisoned))
    }
}

impl<'a> Change<'a> {
    fn begin(image: &'a Image) -> Result<Self> {
        let header = image.header();
        let entries = table::read(image.file().storage(), image.name(), &header)?;
        image.with_allocator(|allocator, _| {
            allocator.begin_next();
            Ok(())
        })?;
        Ok(Self {
            image,
            header,
            entries,
            active: image.active_tables()?.into_iter().collect(),
            taken: Vec::new(),
            released: Vec::new(),
            l1: None,
        })
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// The L1 table of a snapshot.
    pub(super) fn read_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        read_l1(self.image.file(), &self.header.geometry, snapshot)
    }

    /// Runs `work` with the allocator.
    pub(super) fn counts<R>(
        &self,
        work: impl FnOnce(&mut Allocator, &ImageFile) -> Result<R>,
    ) -> Result<R> {
        let file = self.image.file();
        self.image
            .with_allocator(|allocator, _| work(allocator, file))
    }

    /// Stages the counts of everything below an L1 table: L2 tables and what they name, once for
    /// each path that leads there.
    pub(super) fn count_below(&self, l1: &[u64], count: Count) -> Result<()> {
        for (number, &raw) in l1.iter().enumerate() {
            let Some(table) = self.table(number, raw)? else {
                continue;
            };
            let entries = self.image.read_l2(table)?;
            self.counts(|allocator, file| {
                for (slot, &raw) in entries.iter().enumerate() {
                    let entry = self.decode(raw, number, slot)?;
                    for cluster in clusters(entry, &self.header.geometry) {
                        self.refuse_metadata(allocator, cluster)?;
                        count(allocator, file, cluster)?;
                    }
                }
                let cluster = self.header.geometry.host_cluster(table);
                if !self.active.contains(&table) {
                    self.refuse_metadata(allocator, cluster)?;
                }
                count(allocator, file, cluster)
            })?;
        }
        Ok(())
    }

    /// Refuses a cluster of metadata where data or a snapshot's L2 table should be.
    fn refuse_metadata(&self, allocator: &Allocator, cluster: HostCluster) -> Result<()> {
        if !allocator.is_fixed(cluster) {
            return Ok(());
        }
        Err(self.image.file().damage(Damage::Overlap {
            offset: self.header.geometry.host_offset(cluster),
            structure: "metadata of the image",
        }))
    }

    /// Stages that metadata is no longer named.
    pub(super) fn drop_metadata(&mut self, start: HostOffset, bytes: u64) -> Result<()> {
        let clusters = self.header.geometry.clusters_for(bytes);
        let first = self.header.geometry.host_cluster(start).0;
        self.counts(|allocator, file| {
            (first..first + clusters)
                .try_for_each(|cluster| allocator.next_drop(file, HostCluster(cluster)))
        })?;
        self.release(start, clusters);
        Ok(())
    }

    fn release(&mut self, start: HostOffset, clusters: u64) {
        self.released.push(HostRun {
            start,
            clusters,
            untouched: false,
        });
    }

    /// L2 tables whose COPIED flags are not those that the counts to come ask for, after a look at
    /// everything that the active L1 table to come refers to: the last one before the first write.
    pub(super) fn tables_to_renew(&mut self, l1: &[u64]) -> Result<Vec<usize>> {
        let mut renewed = Vec::new();
        for (number, &raw) in l1.iter().enumerate() {
            if let Some(table) = self.table(number, raw)? {
                let entries = self.image.read_l2(table)?;
                let cluster = self.header.geometry.host_cluster(table);
                self.counts(|allocator, file| allocator.next_kept(file, cluster))?;
                if self.flagged(number, &entries)? != entries {
                    renewed.push(number);
                }
            }
        }
        Ok(renewed)
    }

    /// Stages `times` references less to tables that will be renewed.
    pub(super) fn drop_tables(&self, l1: &[u64], renewed: &[usize], times: u64) -> Result<()> {
        for &number in renewed {
            if let Some(table) = self.table(number, l1[number])? {
                let cluster = self.header.geometry.host_cluster(table);
                self.counts(|allocator, file| {
                    (0..times).try_for_each(|_| allocator.next_drop(file, cluster))
                })?;
            }
        }
        Ok(())
    }

    /// Entries with the COPIED flags that the counts to come ask for.
    fn flagged(&self, number: usize, entries: &[RawL2]) -> Result<Vec<RawL2>> {
        let geometry = &self.header.geometry;
        self.counts(|allocator, file| {
            let flag = |(slot, &raw): (usize, &RawL2)| {
                let copied = match self.decode(raw, number, slot)? {
                    compressed @ L2Entry::Compressed { .. } => {
                        for cluster in clusters(compressed, geometry) {
                            allocator.next_kept(file, cluster)?;
                        }
                        false
                    }
                    entry => match entry.host_run(geometry) {
                        Some((cluster, _)) => allocator.next_kept(file, cluster)? == 1,
                        None => false,
                    },
                };
                let flag = if copied { COPIED } else { 0 };
                Ok(RawL2 {
                    entry: raw.entry & !COPIED | flag,
                    subclusters: raw.subclusters,
                })
            };
            entries.iter().enumerate().map(flag).collect()
        })
    }

    /// Writes the tables of `renewed` into fresh clusters and names them in `l1`.
    pub(super) fn renew_tables(
        &mut self,
        l1: &mut [u64],
        renewed: &[usize],
        references: u64,
    ) -> Result<()> {
        for &number in renewed {
            let Some(table) = self.table(number, l1[number])? else {
                continue;
            };
            let entries = self.image.read_l2(table)?;
            let words = self.header.geometry.words_per_l2_entry();
            let mut bytes = encode(
                self.flagged(number, &entries)?
                    .into_iter()
                    .flat_map(|raw| [raw.entry, raw.subclusters].into_iter().take(words)),
            );
            let fresh = self.write_new(&mut bytes, "write L2 table")?;
            l1[number] = fresh.0;
            let cluster = self.header.geometry.host_cluster(fresh);
            self.counts(|allocator, file| {
                (1..references).try_for_each(|_| allocator.next_add(file, cluster))
            })?;
        }
        Ok(())
    }

    /// Sets the COPIED flags of L1 entries as the counts to come ask.
    pub(super) fn flag_l1(&self, l1: &mut [u64]) -> Result<()> {
        for (number, raw) in l1.iter_mut().enumerate() {
            if let Some(table) = self.table(number, *raw)? {
                let cluster = self.header.geometry.host_cluster(table);
                let count = self.counts(|allocator, file| allocator.next_count(file, cluster))?;
                *raw = table.0 | if count == 1 { COPIED } else { 0 };
            }
        }
        Ok(())
    }

    /// Writes an L1 table into fresh clusters. One of no entries has none.
    pub(super) fn write_l1(&mut self, l1: &[u64]) -> Result<HostOffset> {
        if l1.is_empty() {
            return Ok(self.header.l1_offset);
        }
        self.write_new(&mut encode(l1.iter().copied()), "write L1 table")
    }

    /// Names `l1` as the active L1 table to come, and gives up the present one.
    pub(super) fn set_active(&mut self, update: &mut Update<'_>, l1: Vec<u64>) -> Result<()> {
        let bytes = Geometry::entries_bytes(crate::convert::index(self.header.l1_entries));
        self.drop_metadata(self.header.l1_offset, bytes)?;
        let header = update.header_mut();
        header.l1_offset = self.write_l1(&l1)?;
        header.l1_entries = to_u32(to_u64(l1.len()));
        self.l1 = Some(l1);
        Ok(())
    }

    /// Names a snapshot table of these entries, and gives up the present one.
    pub(super) fn set_table(&mut self, update: &mut Update<'_>, entries: &[Entry]) -> Result<()> {
        let bytes = |entries: &[Entry]| entries.iter().map(|entry| to_u64(entry.bytes.len())).sum();
        let present = bytes(&self.entries);
        self.drop_metadata(self.header.snapshots_offset, present)?;
        let place = if entries.is_empty() {
            HostOffset::ZERO
        } else {
            let mut bytes: Vec<u8> = entries
                .iter()
                .flat_map(|entry| entry.bytes.iter().copied())
                .collect();
            self.write_new(&mut bytes, "write snapshot table")?
        };
        let header = update.header_mut();
        header.snapshots_offset = place;
        header.snapshot_count = to_u32(to_u64(entries.len()));
        Ok(())
    }

    /// Refuses a table that is larger than QEMU reads.
    pub(super) fn check_table(&self, entries: &[Entry]) -> Result<()> {
        let bytes = entries.iter().map(|entry| to_u64(entry.bytes.len())).sum();
        let count = to_u64(entries.len());
        for (what, value, limit) in [
            ("internal snapshots", count, limits::MAX_SNAPSHOTS.into()),
            (
                "snapshot table bytes",
                bytes,
                limits::MAX_SNAPSHOT_TABLE_BYTES,
            ),
        ] {
            if value > limit {
                let feature = Feature::Limit { what, value, limit };
                return Err(self.image.file().unsupported(feature));
            }
        }
        Ok(())
    }

    /// Writes `bytes`, padded to whole clusters, into fresh clusters in a row.
    fn write_new(&mut self, bytes: &mut Vec<u8>, what: &'static str) -> Result<HostOffset> {
        let geometry = self.header.geometry;
        let clusters = geometry.clusters_for(to_u64(bytes.len()));
        bytes.resize(to_usize(clusters << geometry.cluster_bits), 0);
        let start = self.counts(|allocator, file| allocator.allocate_exact(file, clusters))?;
        self.taken.push(HostRun {
            start,
            clusters,
            untouched: false,
        });
        self.image.file().write(bytes, start, what)?;
        Ok(start)
    }

    /// The header is durable: memory follows.
    fn adopt(self) -> Result<()> {
        let image = self.image;
        let header = image.header();
        if let Some(l1) = self.l1 {
            image.replace_mapping(header.disk_bytes, l1);
        }
        let new_tables = image.active_tables()?;
        image.with_allocator(|allocator, _| {
            self.released.iter().for_each(|&run| allocator.release(run));
            let old = self.active.iter().copied().map(single);
            old.for_each(|run| allocator.release(run));
            new_tables
                .into_iter()
                .for_each(|table| allocator.fix_run(table, 1));
            for run in &self.taken {
                allocator.fix_run(run.start, run.clusters);
            }
            Ok(())
        })
    }

    /// The header was not written: the fresh clusters are nobody's.
    fn give_back(self) -> Result<()> {
        let file = self.image.file();
        self.image.with_allocator(|allocator, _| {
            allocator.abandon_next(file)?;
            allocator.free_now(file, &self.taken)
        })
    }

    fn table(&self, number: usize, raw: u64) -> Result<Option<HostOffset>> {
        let entry = L1Entry::decode(raw, to_u64(number), &self.header.geometry)
            .map_err(|damage| self.image.file().damage(damage))?;
        Ok(match entry {
            L1Entry::Unallocated => None,
            L1Entry::Table { offset, .. } => Some(offset),
        })
    }

    fn decode(&self, raw: RawL2, number: usize, slot: usize) -> Result<L2Entry> {
        let base = to_u64(number) * self.header.geometry.l2_entries();
        self.image.decode(raw, GuestCluster(base + to_u64(slot)))
    }
}

fn clusters(entry: L2Entry, geometry: &Geometry) -> impl Iterator<Item = HostCluster> + use<> {
    let (first, count) = entry.host_run(geometry).unwrap_or((HostCluster(0), 0));
    (first.0..first.0 + count).map(HostCluster)
}

fn encode(words: impl Iterator<Item = u64>) -> Vec<u8> {
    words.flat_map(u64::to_be_bytes).collect()
}
