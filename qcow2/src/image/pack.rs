//! Writing compressed clusters: packed without a lock, stored side by side.
//!
//! Packing ([`Packer`]) knows no image and runs on any thread. Storing ([`Image::write_packed`])
//! marks, takes room for everything, writes it, and only then changes the mapping, group by group:
//! no lock is held while data is written. What nothing refers to in the end is given back.
//!
//! Clusters that do not shrink are written as any other data.

use rayon::prelude::*;

use super::Image;
use crate::alloc::HostRun;
use crate::bitmaps::tracker::Tracker;
use crate::codec::{self, CompressionType};
use crate::convert::{to_u64, to_usize};
use crate::error::{Mistake, Result};
use crate::format::table::L2Entry;
use crate::units::HostOffset;

/// Compresses clusters for one image; a small value to be copied to other threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packer {
    kind: CompressionType,
    level: Option<u32>,
    cluster_bytes: usize,
}

/// Clusters in a row, compressed where that makes them shorter.
#[derive(Clone, Debug)]
pub struct Packed {
    packer: Packer,
    clusters: Vec<Cluster>,
    bytes: u64,
}

#[derive(Clone, Debug)]
enum Cluster {
    Compressed(Vec<u8>),
    /// As it was given.
    Plain(Vec<u8>),
}

/// Room that was taken for one compressed cluster, until the mapping refers to it.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: HostOffset,
    bytes: u64,
}

impl Packer {
    /// Compresses `data` cluster by cluster on rayon's threads. A last cluster that is not whole
    /// stands for the end of a disk, with zeros behind it.
    pub fn pack(&self, data: &[u8]) -> Packed {
        let clusters = if data.len() <= self.cluster_bytes {
            data.chunks(self.cluster_bytes)
                .map(|cluster| self.cluster(cluster))
                .collect()
        } else {
            data.par_chunks(self.cluster_bytes)
                .map(|cluster| self.cluster(cluster))
                .collect()
        };
        Packed {
            packer: *self,
            clusters,
            bytes: to_u64(data.len()),
        }
    }

    fn cluster(&self, data: &[u8]) -> Cluster {
        let compressed = if data.len() < self.cluster_bytes {
            let mut whole = data.to_vec();
            whole.resize(self.cluster_bytes, 0);
            codec::compress(&whole, self.kind, self.level)
        } else {
            codec::compress(data, self.kind, self.level)
        };
        compressed.map_or_else(|| Cluster::Plain(data.to_vec()), Cluster::Compressed)
    }
}

impl Packed {
    /// Bytes of the disk.
    pub fn guest_bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that are going to be stored.
    pub fn stored_bytes(&self) -> u64 {
        let len = |cluster: &Cluster| match cluster {
            Cluster::Compressed(bytes) => to_u64(bytes.len()),
            Cluster::Plain(_) => to_u64(self.packer.cluster_bytes),
        };
        self.clusters.iter().map(len).sum()
    }
}

impl Image {
    /// Compresses for this image. `level` is 1 to 9 for zlib and 1 to 22 for zstd; without it the
    /// default of each, 7 and 3.
    pub fn packer(&self, level: Option<u32>) -> Packer {
        Packer {
            kind: self.compression,
            level,
            cluster_bytes: self.geometry.cluster_len(),
        }
    }

    /// Writes whole clusters of the disk, compressed; a last one that the disk's end cuts is whole.
    /// It is durable after the next [`flush`](Self::flush). Clusters are compressed on rayon's
    /// threads, and any number of threads may call this at once.
    ///
    /// # Errors
    /// A range that is not whole clusters; otherwise as [`write`](Self::write).
    pub fn write_compressed(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, to_u64(data.len()))?;
        self.check_whole_clusters(offset, to_u64(data.len()))?;
        self.require_compressible()?;
        self.write_packed(&self.packer(None).pack(data), offset)
    }

    /// Writes what [`Packer::pack`] made of whole clusters from byte `offset` of the disk on. Calls
    /// in the order of the disk make files that are read in one go.
    ///
    /// # Errors
    /// Clusters packed for an image with another compression type or cluster size; otherwise as
    /// [`write_compressed`](Self::write_compressed).
    pub fn write_packed(&self, packed: &Packed, offset: u64) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, packed.bytes)?;
        self.check_whole_clusters(offset, packed.bytes)?;
        self.require_compressible()?;
        let level = packed.packer.level;
        if packed.packer != self.packer(level) {
            return Err(self.file.invalid(Mistake::Option {
                option: "compression_type",
                problem: "these clusters were packed for another image",
            }));
        }
        self.guest_change(offset, packed.bytes, |tracker| {
            let range = offset..offset + packed.bytes;
            tracker.stage(self, range.clone())?;
            tracker.mark(self, range)?;
            let mut places = self.take_room(&packed.clusters)?;
            let done = self
                .write_places(&packed.clusters, &places)
                .and_then(|()| self.refer_to(tracker, packed, &mut places, offset));
            let left: Vec<Place> = places.into_iter().flatten().collect();
            self.give_back(&left)?;
            done
        })
    }

    fn check_whole_clusters(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        let starts = self.geometry.offset_in_cluster(offset) == 0;
        if starts && (self.geometry.offset_in_cluster(end) == 0 || end == self.size()) {
            return Ok(());
        }
        Err(self.file.invalid(Mistake::NotWholeClusters {
            offset,
            end,
            cluster: self.geometry.cluster_bytes(),
        }))
    }

    /// Room for every compressed cluster, or for none.
    fn take_room(&self, clusters: &[Cluster]) -> Result<Vec<Option<Place>>> {
        let mut places = Vec::with_capacity(clusters.len());
        let taken = self.with_allocator(|allocator, _| {
            for cluster in clusters {
                let Cluster::Compressed(stored) = cluster else {
                    places.push(None);
                    continue;
                };
                let bytes = to_u64(stored.len());
                let offset = allocator.allocate_bytes(&self.file, bytes)?;
                places.push(Some(Place { offset, bytes }));
            }
            Ok(())
        });
        if let Err(error) = taken {
            let left: Vec<Place> = places.into_iter().flatten().collect();
            self.give_back(&left)?;
            return Err(error);
        }
        for place in places.iter().flatten() {
            self.expanded.forget(place.offset);
        }
        Ok(places)
    }

    /// Writes neighbours with one call.
    fn write_places(&self, clusters: &[Cluster], places: &[Option<Place>]) -> Result<()> {
        let mut run: Vec<u8> = Vec::new();
        let mut start = HostOffset::ZERO;
        let write = |run: &[u8], start| self.file.write(run, start, "write compressed data");
        for (cluster, place) in clusters.iter().zip(places) {
            let (Cluster::Compressed(stored), Some(place)) = (cluster, place) else {
                continue;
            };
            if place.offset != start.plus(to_u64(run.len())) {
                if !run.is_empty() {
                    write(&run, start)?;
                }
                run.clear();
                start = place.offset;
            }
            run.extend_from_slice(stored);
        }
        if run.is_empty() {
            return Ok(());
        }
        write(&run, start)
    }

    /// Maps the clusters to their places, and writes the plain ones.
    fn refer_to(
        &self,
        tracker: &Tracker,
        packed: &Packed,
        places: &mut [Option<Place>],
        offset: u64,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        self.by_groups(offset, packed.bytes, |at, len| {
            let first = to_usize((at - offset) >> bits);
            let count = to_usize(self.geometry.clusters_for(len));
            self.map_group(&mut places[first..first + count], at)?;
            let mut at = at;
            for cluster in &packed.clusters[first..first + count] {
                if let Cluster::Plain(data) = cluster {
                    self.write_group(tracker, data, at)?;
                }
                at += self.geometry.cluster_bytes();
            }
            Ok(())
        })
    }

    /// Makes the entries of one lock group refer to compressed data.
    fn map_group(&self, places: &mut [Option<Place>], offset: u64) -> Result<()> {
        if places.iter().all(Option::is_none) {
            return Ok(());
        }
        let cluster = self.geometry.guest_cluster(offset);
        let _owned = self.clusters.own(cluster);
        let (number, first_slot) = self.geometry.table_indexes(cluster);
        let table = self.table_for_change(number)?;
        let mut old = Vec::new();
        for (slot, place) in (first_slot..).zip(&*places) {
            let guest = to_u64(number) * self.geometry.l2_entries() + to_u64(slot);
            if place.is_some() {
                old.push(self.decode(table.entry(slot), crate::units::GuestCluster(guest))?);
            }
        }
        for (slot, place) in (first_slot..).zip(places) {
            if let Some(Place { offset, bytes }) = place.take() {
                let entry = L2Entry::encode_compressed(offset, bytes, &self.geometry);
                self.tables.set(number, &table, slot, &[entry.into()]);
            }
        }
        self.free_replaced(old.into_iter())
    }

    /// Drops the references of room that the mapping does not use.
    fn give_back(&self, places: &[Place]) -> Result<()> {
        if places.is_empty() {
            return Ok(());
        }
        self.with_allocator(|allocator, _| {
            let runs: Vec<HostRun> = places
                .iter()
                .map(|place| allocator.clusters_of_bytes(place.offset, place.bytes))
                .collect();
            allocator.free_now(&self.file, &runs)
        })
    }
}
