//! Who claims a cluster: what refcounts and COPIED flags alone do not tell of a damaged image.
//!
//! Invariants:
//! - Before the first change of guest data, or of the mapping, everything that the image refers to
//!   is counted ([`Image::vet_claims`]). Metadata that shares a cluster ends all changes; data with
//!   more references than are counted is never given out, freed or written in place: a write goes
//!   to a new cluster, as for a snapshot.
//! - The census reads every L2 table. Where that would be more than [`MOST_FOR_DATA`] it waits until
//!   it gives back more clusters than it reads; until then new clusters come behind the end of the
//!   file, and what is freed keeps its content. A change of bitmaps alone waits from
//!   [`MOST_FOR_BITMAPS`] on.
//! - Without a census, data below an L2 table is only written in place where it is counted once and
//!   no other table that was written below has it too.

use std::sync::PoisonError;

use super::Image;
use crate::alloc::{Allocator, ClusterSet, HostRun};
use crate::check::References;
use crate::error::{Damage, Result};
use crate::format::table::{L2Entry, RawL2};
use crate::geometry::Geometry;
use crate::sync::RwLock;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::units::GuestCluster;

/// Bytes of tables that a census may read before a change of guest data: 2 TiB of data in clusters
/// of 64 KiB.
const MOST_FOR_DATA: u64 = 256 << 20;
/// Bytes of tables that a census may read before a change of bitmaps alone.
const MOST_FOR_BITMAPS: u64 = 2 << 20;

/// What is about to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Guest data or the mapping.
    Data,
    /// Bitmaps and the chain record.
    Bitmaps,
    /// Nothing: it is done if it is worth it.
    Upkeep,
}

/// Clusters that are never written in place, and whether everything was counted.
#[derive(Debug)]
pub(super) struct Claims {
    counted: AtomicBool,
    any: AtomicBool,
    crossed: RwLock<ClusterSet>,
}

impl Claims {
    pub(super) fn new() -> Self {
        Self {
            counted: AtomicBool::new(false),
            any: AtomicBool::new(false),
            crossed: RwLock::new(ClusterSet::default()),
        }
    }

    fn add(&self, found: &ClusterSet) {
        if found.is_empty() {
            return;
        }
        let mut crossed = self.crossed.write().unwrap_or_else(PoisonError::into_inner);
        crossed.extend(found);
        self.any.store(true, Ordering::Release);
    }
}

impl Image {
    /// Counts what everything refers to, once, unless that costs too much for its purpose. No
    /// change of guest data is under way, and what was changed before is on disk.
    ///
    /// # Errors
    /// Metadata that shares a cluster with anything else; I/O.
    pub(crate) fn vet_claims(&self, purpose: Purpose) -> Result<()> {
        if self.claims.counted.load(Ordering::Acquire) {
            return Ok(());
        }
        // What it refuses by itself comes first.
        self.with_allocator(|_, _| Ok(()))?;
        let most = match purpose {
            Purpose::Data => MOST_FOR_DATA,
            Purpose::Bitmaps => MOST_FOR_BITMAPS,
            Purpose::Upkeep => 0,
        };
        let tables = self.tables_to_count()?;
        let cheap = tables << self.geometry.cluster_bits <= most;
        if !(cheap || !self.file.storage().can_grow() || self.is_census_due(tables)?) {
            return Ok(());
        }
        let references = References::count_all(self)?;
        if let Some((structure, offset)) = references.overlap {
            return Err(self.file.damage(Damage::Overlap { offset, structure }));
        }
        let found = self.with_allocator(|allocator, _| allocator.learn(&self.file, &references))?;
        self.claims.add(&found);
        self.claims
            .counted
            .store(references.complete, Ordering::Release);
        Ok(())
    }

    fn is_census_due(&self, tables: u64) -> Result<bool> {
        self.with_allocator(|allocator, _| allocator.is_census_due(&self.file, tables))
    }

    /// Whether a census that had to wait is worth it by now.
    pub(super) fn wants_census(&self) -> Result<bool> {
        let settled = self.claims.counted.load(Ordering::Acquire) || self.is_distrusted();
        if settled || self.tracker().is_none() {
            return Ok(false);
        }
        let tables = self.tables_to_count()?;
        self.is_census_due(tables)
    }

    /// Clusters of tables that a census reads, about.
    fn tables_to_count(&self) -> Result<u64> {
        let header = self.header();
        let active = self
            .l1_words()
            .iter()
            .map(|&entry| u64::from(entry != 0))
            .sum::<u64>();
        let directory = self.directory();
        let bitmaps = directory.entries(&self.file)?.iter().map(|entry| {
            let entries = crate::convert::index(entry.table_entries);
            self.geometry.clusters_for(Geometry::entries_bytes(entries))
        });
        let bitmaps: u64 = bitmaps.sum();
        Ok(active.saturating_mul(1 + u64::from(header.snapshot_count)) + bitmaps)
    }

    /// An entry for whoever is going to change what it refers to: one whose cluster may be somebody
    /// else's too does not say that it is ours alone.
    pub(super) fn changeable(&self, raw: RawL2, cluster: GuestCluster) -> Result<L2Entry> {
        let entry = self.decode(raw, cluster)?;
        let Some(host) = entry.own_host() else {
            return Ok(entry);
        };
        if self.has_external_data() || !self.claims.any.load(Ordering::Acquire) {
            return Ok(entry);
        }
        let crossed = self
            .claims
            .crossed
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        match crossed.contains(self.geometry.host_cluster(host)) {
            true => Ok(entry.shared()),
            false => Ok(entry),
        }
    }

    /// Takes note of the data below L2 table `number`, before data is first written below it. What
    /// else refers to it is found as far as it was counted or looked at before.
    pub(super) fn claim(
        &self,
        allocator: &mut Allocator,
        number: usize,
        entries: &[L2Entry],
    ) -> Result<()> {
        let data: Vec<(HostRun, bool)> = entries
            .iter()
            .filter_map(|entry| {
                let (first, clusters) = entry.host_run(&self.geometry)?;
                let start = self.geometry.host_offset(first);
                let untouched = false;
                let run = HostRun {
                    start,
                    clusters,
                    untouched,
                };
                Some((run, entry.own_host().is_some()))
            })
            .collect();
        let mut crossed = ClusterSet::default();
        allocator.claim(&self.file, number, &data, &mut crossed)?;
        self.claims.add(&crossed);
        Ok(())
    }
}
