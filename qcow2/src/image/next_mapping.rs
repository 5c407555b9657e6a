//! A mapping to come: L1 table and L2 tables in fresh clusters, true by one header commit.
//!
//! - Nothing that the present header names is changed: every table that differs gets a new place.
//!   A crash before the commit leaks clusters, and so does one before the old ones are freed.
//! - What the present mapping holds and the next one does not is only freed after the commit.
//! - Each L2 table is edited at most once.

use std::cell::{Cell, RefCell};

use super::{Image, Update};
use crate::alloc::{HostRun, single};
use crate::convert::{to_u32, to_u64, to_usize};
use crate::error::Result;
use crate::format::table::{L1Entry, L2Entry, RawL2};
use crate::geometry::Geometry;
use crate::sync::atomic::Ordering;
use crate::units::{GuestCluster, HostOffset};

/// L1 and L2 tables as they will be.
#[derive(Debug)]
pub(super) struct NextMapping<'a> {
    pub(super) image: &'a Image,
    l1: Vec<u64>,
    changed: bool,
    /// Clusters that nothing names before the commit.
    taken: Vec<HostRun>,
    /// New L2 tables.
    tables: Vec<HostOffset>,
    /// Old L2 tables that got a new place.
    replaced: Vec<HostOffset>,
    /// Entries of replaced tables that are no longer held.
    gone: Vec<L2Entry>,
    /// L2 tables that go with everything below them, by L1 index.
    cut: Vec<(usize, HostOffset)>,
    old_l1: HostOffset,
}

impl Image {
    /// Runs `work` on the mapping to come, and makes it true together with what `work` stages in
    /// the update.
    ///
    /// # Errors
    /// Those of `work` and of the commit, and then the mapping is as before.
    pub(super) fn remap(
        &self,
        work: impl FnOnce(&mut Update<'_>, &mut NextMapping<'_>) -> Result<()>,
    ) -> Result<()> {
        let next = RefCell::new(NextMapping::new(self));
        let committed = Cell::new(false);
        let answer = self.restructure(
            |update| {
                let next = &mut next.borrow_mut();
                next.begin();
                work(update, next)?;
                next.place_l1(update)
            },
            |image, ()| {
                committed.set(true);
                next.borrow_mut().adopt(image.header().disk_bytes)
            },
        );
        if answer.is_err() && !committed.get() && self.check_writable().is_ok() {
            next.into_inner().give_back()?;
        }
        answer
    }
}

impl<'a> NextMapping<'a> {
    fn new(image: &'a Image) -> Self {
        Self {
            image,
            l1: Vec::new(),
            changed: false,
            taken: Vec::new(),
            tables: Vec::new(),
            replaced: Vec::new(),
            gone: Vec::new(),
            cut: Vec::new(),
            old_l1: HostOffset::ZERO,
        }
    }

    fn begin(&mut self) {
        self.old_l1 = self.image.header().l1_offset;
        self.l1 = self.image.l1_words();
    }

    /// Entries of the L1 table to come.
    pub(super) fn l1_entries(&self) -> usize {
        self.l1.len()
    }

    /// Gives the L1 table at least `entries` entries.
    pub(super) fn lengthen_l1(&mut self, entries: u64) {
        let entries = to_usize(entries);
        if entries > self.l1.len() {
            self.l1.resize(entries, 0);
            self.changed = true;
        }
    }

    /// Takes clusters in a row that nothing names before the commit, at most `wanted`.
    pub(super) fn take(&mut self, wanted: u64) -> Result<HostRun> {
        let file = &self.image.file;
        let run = self
            .image
            .with_allocator(|allocator, _| allocator.allocate(file, wanted))?;
        self.taken.push(run);
        Ok(run)
    }

    fn take_exact(&mut self, clusters: u64) -> Result<HostOffset> {
        let file = &self.image.file;
        let start = self
            .image
            .with_allocator(|allocator, _| allocator.allocate_exact(file, clusters))?;
        self.taken.push(HostRun {
            start,
            clusters,
            untouched: false,
        });
        Ok(start)
    }

    /// What is no longer held once the commit is durable.
    pub(super) fn drop_entry(&mut self, entry: L2Entry) {
        self.gone.push(entry);
    }

    /// Where L2 table `number` is now.
    pub(super) fn present_table(&self, number: usize) -> Result<Option<HostOffset>> {
        Ok(match self.image.l1_entry(number)? {
            L1Entry::Unallocated => None,
            L1Entry::Table { offset, .. } => Some(offset),
        })
    }

    /// Lets `edit` change the entries of L2 table `number`; when it did, they get a new place.
    pub(super) fn edit(
        &mut self,
        number: usize,
        edit: impl FnOnce(&mut Self, &mut [RawL2]) -> Result<()>,
    ) -> Result<()> {
        let present = self.present_table(number)?;
        let old = match present {
            Some(offset) => self.image.read_l2(offset)?,
            None => vec![RawL2::default(); to_usize(self.image.geometry.l2_entries())],
        };
        let mut new = old.clone();
        edit(self, &mut new)?;
        if new == old {
            return Ok(());
        }
        let offset = self.take_exact(1)?;
        let bytes = encode_l2(&self.image.geometry, &new);
        self.image.file.write(&bytes, offset, "write L2 table")?;
        self.tables.push(offset);
        self.replaced.extend(present);
        if let Some(entry) = self.l1.get_mut(number) {
            *entry = L1Entry::encode(offset);
        }
        self.changed = true;
        Ok(())
    }

    /// Gives up L2 table `number` and everything below it, after a look at all of it.
    pub(super) fn cut_table(&mut self, number: usize) -> Result<()> {
        let Some(offset) = self.present_table(number)? else {
            return Ok(());
        };
        self.image.decoded_entries(number, offset)?;
        self.cut.push((number, offset));
        if let Some(entry) = self.l1.get_mut(number) {
            *entry = 0;
        }
        self.changed = true;
        Ok(())
    }

    /// Shortens the L1 table, which has nothing behind `entries`, if it gets a new place anyhow.
    pub(super) fn shorten_l1(&mut self, entries: u64) {
        if self.changed {
            self.l1.truncate(to_usize(entries));
        }
    }

    /// Writes the L1 table into fresh clusters, if it differs, and names it in the header to come.
    fn place_l1(&mut self, update: &mut Update<'_>) -> Result<()> {
        if !self.changed {
            return Ok(());
        }
        let geometry = self.image.geometry;
        let clusters = geometry
            .clusters_for(Geometry::entries_bytes(self.l1.len()))
            .max(1);
        let offset = self.take_exact(clusters)?;
        let mut bytes = encode_words(self.l1.iter().copied());
        bytes.resize(to_usize(clusters << geometry.cluster_bits), 0);
        self.image.file.write(&bytes, offset, "write L1 table")?;
        let header = update.header_mut();
        header.l1_offset = offset;
        header.l1_entries = to_u32(to_u64(self.l1.len()));
        Ok(())
    }

    /// The header is durable: memory follows, and what nothing names any more is freed.
    fn adopt(&mut self, disk_bytes: u64) -> Result<()> {
        let image = self.image;
        if !self.changed {
            image.size.store(disk_bytes, Ordering::Release);
            return Ok(());
        }
        let old_entries = image.l1().len();
        image.replace_mapping(disk_bytes, self.l1.clone());
        let place = image.header().l1_offset;
        let clusters = |entries: usize| {
            let bytes = Geometry::entries_bytes(entries);
            image.geometry.clusters_for(bytes).max(1)
        };
        image.with_allocator(|allocator, _| {
            allocator.fix_run(place, clusters(self.l1.len()));
            self.tables
                .iter()
                .for_each(|&table| allocator.fix_run(table, 1));
            Ok(())
        })?;
        let old_tables = self.replaced.iter().copied().map(single);
        let old = HostRun {
            start: self.old_l1,
            clusters: clusters(old_entries),
            untouched: false,
        };
        self.free(old_tables.chain([old]).collect())?;
        image.free_replaced(self.gone.drain(..))?;
        for &(number, offset) in &self.cut {
            image.free_replaced(image.decoded_entries(number, offset)?.into_iter())?;
            self.free(vec![single(offset)])?;
        }
        self.free(Vec::new())
    }

    /// Frees metadata, and whatever else waits: no reference to it is left on the disk.
    fn free(&self, metadata: Vec<HostRun>) -> Result<()> {
        let file = &self.image.file;
        self.image.with_allocator(|allocator, _| {
            metadata.iter().for_each(|&run| allocator.release(run));
            let mut runs = allocator.take_pending();
            runs.extend(metadata);
            allocator.free_now(file, &runs)
        })
    }

    /// The commit did not happen: the new clusters are nobody's.
    fn give_back(self) -> Result<()> {
        let file = &self.image.file;
        self.image
            .with_allocator(|allocator, _| allocator.free_now(file, &self.taken))
    }
}

impl Image {
    /// Decoded entries of L2 table `number`, which lies at `offset`.
    fn decoded_entries(&self, number: usize, offset: HostOffset) -> Result<Vec<L2Entry>> {
        let base = to_u64(number) * self.geometry.l2_entries();
        self.read_l2(offset)?
            .into_iter()
            .zip(base..)
            .map(|(raw, cluster)| self.decode(raw, GuestCluster(cluster)))
            .collect()
    }
}

/// An L2 table as it is stored.
pub(super) fn encode_l2(geometry: &Geometry, entries: &[RawL2]) -> Vec<u8> {
    let words = entries.iter().flat_map(|raw| {
        [raw.entry, raw.subclusters]
            .into_iter()
            .take(geometry.words_per_l2_entry())
    });
    encode_words(words)
}

fn encode_words(words: impl Iterator<Item = u64>) -> Vec<u8> {
    words.flat_map(u64::to_be_bytes).collect()
}
