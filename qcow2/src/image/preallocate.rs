//! Places for guest clusters before anybody writes to them.
//!
//! - A place is all zeros, and its space is taken as far as asked, before anything refers to it.
//! - Nothing shows: the disk reads as it did. Where a backing file has to go on showing through, the
//!   place is one whose subclusters are all unallocated.
//! - In an external data file every cluster has its place already: it is taken and mapped there.

use super::Image;
use super::file::ImageFile;
use crate::alloc::HostRun;
use crate::error::Result;
use crate::format::subclusters::Subclusters;
use crate::format::table::RawL2;
use crate::storage;
use crate::units::{GuestCluster, HostOffset};

/// How much of a disk is put in place before it is written; names and meaning as in qemu-img.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Mapping tables and refcounts; the data itself is a hole.
    Metadata,
    /// The space of the data too, as far as the file system can take it without writing.
    Falloc,
    /// All of it, written.
    Full,
}

impl Preallocation {
    /// Fills a place that nothing refers to.
    pub(super) fn fill(self, file: &ImageFile, start: HostOffset, len: u64) -> Result<()> {
        let below = file.storage();
        match self {
            Self::Off => Ok(()),
            Self::Metadata => below.write_zeroes(start.0, len),
            Self::Falloc => below.allocate_zeroes(start.0, len),
            Self::Full => storage::write_zero_buffers(below, start.0, len),
        }
        .map_err(|error| file.io(error, "preallocate", start.0))
    }
}

impl Image {
    /// The entry of a cluster that has a place and reads as it does without it. In a raw data file it
    /// is all data: there a subcluster would have to be mapped, durably, before it is written.
    pub(super) fn vacant_entry(&self, host: HostOffset) -> RawL2 {
        if self.geometry.extended_l2 && !self.keeps_raw() {
            return RawL2::partial(Some(host), true, Subclusters::UNALLOCATED);
        }
        RawL2::normal(host, &self.geometry)
    }

    /// Gives every cluster of a new disk its place.
    pub(super) fn preallocate_disk(&self, preallocation: Preallocation) -> Result<()> {
        if self.has_external_data() {
            preallocation.fill(self.guest_file()?, HostOffset::ZERO, self.size())?;
        }
        if preallocation == Preallocation::Off && !self.keeps_raw() {
            return Ok(());
        }
        let end = self.geometry.clusters_for(self.size());
        let per_table = self.geometry.l2_entries();
        let mut cluster = 0;
        while cluster < end {
            let stop = (cluster + per_table).min(end);
            self.preallocate_table(cluster..stop, preallocation)?;
            if self.tables.dirty_tables() > super::write::MAX_DIRTY_TABLES {
                self.sync()?;
            }
            cluster = stop;
        }
        self.sync()
    }

    /// Gives clusters below one L2 table, where nothing is yet, their places.
    fn preallocate_table(
        &self,
        clusters: std::ops::Range<u64>,
        preallocation: Preallocation,
    ) -> Result<()> {
        let (number, _) = self.geometry.table_indexes(GuestCluster(clusters.start));
        let table = self.table_for_change(number)?;
        let mut at = clusters.start;
        while at < clusters.end {
            let run = self.place_clusters(GuestCluster(at), clusters.end - at)?;
            if !self.has_external_data() {
                self.fill_new(run, preallocation)?;
            }
            let raw: Vec<RawL2> = (0..run.clusters)
                .map(|step| run.start.plus(step << self.geometry.cluster_bits))
                .map(|host| self.vacant_entry(host))
                .collect();
            let (_, slot) = self.geometry.table_indexes(GuestCluster(at));
            self.tables.set(number, &table, slot, &raw);
            at += run.clusters;
        }
        Ok(())
    }

    /// Fills new clusters of the image, which nothing refers to.
    pub(super) fn fill_new(&self, run: HostRun, preallocation: Preallocation) -> Result<()> {
        let len = run.clusters << self.geometry.cluster_bits;
        preallocation.fill(&self.file, run.start, len)
    }
}
