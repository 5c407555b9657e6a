//! The L2 tables below which data is written: ours alone, and looked at before the first write.
//!
//! - A table that a snapshot shares is copied before it is changed.
//! - Nothing is written below a table that lies outside the file, or whose data lies there or on
//!   metadata.

use std::sync::Arc;

use crate::alloc::{Allocator, single};
use crate::cache::L2Table;
use crate::convert::{to_u64, to_usize};
use crate::error::{Damage, Result};
use crate::format::table::{L1Entry, L2Entry};
use crate::image::{Image, lock};
use crate::sync::atomic::Ordering;
use crate::units::{GuestCluster, HostCluster, HostOffset};

impl Image {
    pub(in crate::image) fn own_table(&self, number: usize) -> Result<Option<Arc<L2Table>>> {
        match self.l1_entry(number)? {
            L1Entry::Table { copied: true, .. } => {
                let Some(table) = self.table(number)? else {
                    return Ok(None);
                };
                self.guard_table(number, &table)?;
                Ok(Some(table))
            }
            _ => Ok(None),
        }
    }

    /// L2 table `number` as one that may be changed: created, or copied from a shared one.
    pub(in crate::image) fn table_for_change(&self, number: usize) -> Result<Arc<L2Table>> {
        if let Some(table) = self.own_table(number)? {
            return Ok(table);
        }
        let _creating = lock(&self.table_creation);
        let shared = match self.l1_entry(number)? {
            L1Entry::Table { copied: true, .. } => {
                return self.own_table(number)?.ok_or_else(|| {
                    let structure = "L2 table";
                    self.file.damage(Damage::Truncated { structure })
                });
            }
            L1Entry::Table { offset, .. } => Some(offset),
            L1Entry::Unallocated => None,
        };
        let raw = match (shared, self.table(number)?) {
            (Some(_), Some(table)) => table.words(),
            _ => vec![0; to_usize(self.geometry.table_entries(1))],
        };
        let offset = self.with_allocator(|allocator, _| {
            let offset = allocator.allocate_exact(&self.file, 1)?;
            if let Some(old) = shared {
                allocator.release(single(old));
                allocator.free_later(single(old));
            }
            Ok(offset)
        })?;
        let table = self.tables.create(number, offset, raw);
        self.l1()[number].store(L1Entry::encode(offset), Ordering::Release);
        self.guard_table(number, &table)?;
        Ok(table)
    }

    /// Before data is first written below an L2 table: the table and its data clusters lie inside
    /// the file, no data cluster lies on metadata, and who shares one is known.
    fn guard_table(&self, number: usize, table: &L2Table) -> Result<()> {
        if table.is_guarded() {
            return Ok(());
        }
        let base = to_u64(number) * self.geometry.l2_entries();
        self.with_allocator(|allocator, _| {
            if allocator.is_guarded(number) {
                return Ok(());
            }
            self.guard_place(allocator, "L2 table", table.offset())?;
            if self.has_external_data() {
                return Ok(());
            }
            let entry = |slot: u64| {
                let raw = table.steady_entry(to_usize(slot));
                self.decode(raw, GuestCluster(base + slot))
            };
            let entries: Vec<L2Entry> = (0..self.geometry.l2_entries())
                .map(entry)
                .collect::<Result<_>>()?;
            for &entry in &entries {
                self.guard_data(allocator, entry)?;
            }
            self.claim(allocator, number, &entries)
        })?;
        table.set_guarded();
        Ok(())
    }

    /// Data in place, and compressed data, whose clusters are freed when it is replaced.
    fn guard_data(&self, allocator: &Allocator, entry: L2Entry) -> Result<()> {
        let structure = match entry {
            L2Entry::Normal { .. } | L2Entry::Partial { .. } => "data cluster",
            L2Entry::Compressed { .. } => "compressed cluster",
            L2Entry::Unallocated | L2Entry::Zero { .. } => return Ok(()),
        };
        let (first, clusters) = entry
            .host_run(&self.geometry)
            .unwrap_or((HostCluster(0), 0));
        for cluster in first.0..first.0 + clusters {
            let cluster = HostCluster(cluster);
            let offset = self.geometry.host_offset(cluster);
            self.guard_place(allocator, structure, offset)?;
            if allocator.is_protected(cluster) {
                let structure = "metadata of the image";
                return Err(self.file.damage(Damage::Overlap { offset, structure }));
            }
        }
        Ok(())
    }

    fn guard_place(
        &self,
        allocator: &Allocator,
        structure: &'static str,
        offset: HostOffset,
    ) -> Result<()> {
        if offset < allocator.high_water() {
            return Ok(());
        }
        let problem = "lies past the end of the file";
        Err(self.file.damage(Damage::Place {
            structure,
            offset,
            problem,
        }))
    }
}
