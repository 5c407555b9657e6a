//! L1 and L2 tables to come: whatever differs gets a new place.

use super::counts::clusters;
use super::{ADD, DROP, NextMapping, run};
use crate::convert::{index, to_u32, to_u64, to_usize};
use crate::error::Result;
use crate::format::table::{COPIED, L1Entry, L2Entry, RawL2};
use crate::geometry::Geometry;
use crate::image::Update;
use crate::image::open::decode_l1;
use crate::units::HostOffset;

impl NextMapping<'_> {
    /// Where L2 table `number` of an L1 table lies.
    pub(super) fn table(&self, l1: &[u64], number: usize) -> Result<Option<HostOffset>> {
        let raw = l1.get(number).copied().unwrap_or(0);
        let entry = decode_l1(&self.image.file, &self.header.geometry, raw, number)?;
        Ok(match entry {
            L1Entry::Unallocated => None,
            L1Entry::Table { offset, .. } => Some(offset),
        })
    }

    /// Whether the mapping to come has L2 table `number`.
    pub(crate) fn has_table(&self, number: usize) -> Result<bool> {
        Ok(self.table(&self.l1, number)?.is_some())
    }

    /// Gives the L1 table at least `entries` entries.
    pub(crate) fn lengthen_l1(&mut self, entries: u64) {
        let entries = to_usize(entries).max(self.l1.len());
        self.l1.resize(entries, 0);
    }

    /// Shortens the L1 table, which has nothing behind `entries`, if it gets a new place anyhow.
    pub(crate) fn shorten_l1(&mut self, entries: u64) {
        if self.l1 != self.before {
            self.l1.truncate(to_usize(entries));
        }
    }

    /// Lets `edit` change the entries of L2 table `number`, once; what they name is counted by
    /// `edit`. When they differ they get a new place.
    pub(crate) fn edit(
        &mut self,
        number: usize,
        edit: impl FnOnce(&mut Self, &mut [RawL2]) -> Result<()>,
    ) -> Result<()> {
        let present = self.table(&self.l1, number)?;
        let old = match present {
            Some(offset) => self.image.read_l2(offset)?,
            None => vec![RawL2::default(); to_usize(self.header.geometry.l2_entries())],
        };
        let mut new = old.clone();
        edit(self, &mut new)?;
        if new == old {
            return Ok(());
        }
        if let Some(offset) = present {
            self.count_run(run(offset, 1), DROP)?;
        }
        self.l1[number] = L1Entry::encode(self.write_l2(new)?);
        Ok(())
    }

    /// Gives up L2 table `number` and everything below it.
    pub(crate) fn cut_table(&mut self, number: usize) -> Result<()> {
        self.count_table(&self.l1, number, DROP)?;
        self.l1[number] = 0;
        Ok(())
    }

    /// Gives L2 and L1 entries the COPIED flags that the counts to come ask for. L2 tables whose
    /// flags differ get a new place, which `references` L1 tables will name.
    ///
    /// # Errors
    /// Something that the L1 table to come refers to is not counted, before the first write.
    pub(crate) fn flag_tables(&mut self, references: u64) -> Result<()> {
        let renewed = self.tables_to_renew()?;
        for &(_, table) in &renewed {
            (0..references).try_for_each(|_| self.count_run(run(table, 1), DROP))?;
        }
        for &(number, table) in &renewed {
            let entries = self.image.read_l2(table)?;
            let fresh = self.write_l2(self.flagged(number, &entries)?)?;
            (1..references).try_for_each(|_| self.count_run(run(fresh, 1), ADD))?;
            self.l1[number] = fresh.0;
        }
        for number in 0..self.l1.len() {
            if let Some(table) = self.table(&self.l1, number)? {
                let copied = self.kept(table)? == 1;
                self.l1[number] = table.0 | if copied { COPIED } else { 0 };
            }
        }
        Ok(())
    }

    /// L2 tables whose flags will differ, after a look at everything that the L1 table to come
    /// refers to: the last one before the first write.
    fn tables_to_renew(&self) -> Result<Vec<(usize, HostOffset)>> {
        let mut renewed = Vec::new();
        for number in 0..self.l1.len() {
            if let Some(table) = self.table(&self.l1, number)? {
                let entries = self.image.read_l2(table)?;
                self.kept(table)?;
                if self.flagged(number, &entries)? != entries {
                    renewed.push((number, table));
                }
            }
        }
        Ok(renewed)
    }

    /// Entries with the COPIED flags that the counts to come ask for.
    fn flagged(&self, number: usize, entries: &[RawL2]) -> Result<Vec<RawL2>> {
        let geometry = &self.header.geometry;
        self.counts(|allocator, file| {
            let flag = |(slot, &raw): (usize, &RawL2)| {
                let entry = self.decode(raw, number, slot)?;
                let mut alone = !matches!(entry, L2Entry::Compressed { .. });
                let mut named = false;
                for cluster in clusters(entry, geometry) {
                    alone &= allocator.next_kept(file, cluster)? == 1;
                    named = true;
                }
                let flag = if alone && named { COPIED } else { 0 };
                Ok(RawL2 {
                    entry: raw.entry & !COPIED | flag,
                    subclusters: raw.subclusters,
                })
            };
            entries.iter().enumerate().map(flag).collect()
        })
    }

    fn write_l2(&mut self, entries: Vec<RawL2>) -> Result<HostOffset> {
        let words = self.header.geometry.words_per_l2_entry();
        let entries = entries.into_iter();
        let words = entries.flat_map(|raw| [raw.entry, raw.subclusters].into_iter().take(words));
        self.write_new(encode(words), "write L2 table")
    }

    /// Writes the L1 table to come into fresh clusters. One of no entries has none.
    pub(crate) fn write_l1(&mut self) -> Result<HostOffset> {
        if self.l1.is_empty() {
            return Ok(self.header.l1_offset);
        }
        self.write_new(encode(self.l1.iter().copied()), "write L1 table")
    }

    /// Names the L1 table to come in the header to come, and gives up the present one.
    pub(super) fn place_l1(&mut self, update: &mut Update<'_>) -> Result<()> {
        let bytes = Geometry::entries_bytes(index(self.header.l1_entries));
        self.drop_metadata(self.header.l1_offset, bytes)?;
        let offset = self.write_l1()?;
        let header = update.header_mut();
        header.l1_offset = offset;
        header.l1_entries = to_u32(to_u64(self.l1.len()));
        Ok(())
    }
}

/// Words as tables hold them.
fn encode(words: impl Iterator<Item = u64>) -> Vec<u8> {
    words.flat_map(u64::to_be_bytes).collect()
}
