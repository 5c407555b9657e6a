//! Refcounts to come: staged in memory, true by the header write that names their table.
//!
//! A snapshot changes the count of every cluster of the disk, and with it the COPIED flags of the
//! mapping. Counts in place can change neither before nor after the mapping without a moment at
//! which they contradict it. So the blocks that differ are copied: blocks and table to come stand
//! in fresh clusters, and the header write that names the new mapping names them too.
//!
//! Invariants:
//! - Nothing that the present header names is changed.
//! - A cluster that only the counts to come free is not given out before they are true.
//! - Clusters taken and given back meanwhile are counted on both sides.

use std::collections::BTreeMap;

use byteorder::{BigEndian, ByteOrder};

use super::block::RefcountBlock;
use super::{Allocator, HostRun, single};
use crate::convert::{to_u32, to_u64, to_usize};
use crate::error::{Damage, Feature, Result};
use crate::format::refcount;
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::image::first_cluster::FirstCluster;
use crate::units::{HostCluster, HostOffset};

/// Where the refcount table to come lies, and how many clusters it has.
pub(crate) type TablePlace = (HostOffset, u32);

/// Blocks that will differ, by their index in the table.
#[derive(Debug, Default)]
pub(super) struct NextCounts {
    blocks: BTreeMap<usize, Vec<u8>>,
    /// Where they go.
    places: BTreeMap<usize, HostOffset>,
    table: Option<HostRun>,
    /// Taken for a table that then was too short.
    spare: Vec<HostRun>,
}

impl Allocator {
    /// Begins to stage counts; what was staged before is forgotten.
    pub(crate) fn begin_next(&mut self) {
        self.next = Some(NextCounts::default());
    }

    /// Stages one more reference to a cluster that has some now.
    ///
    /// # Errors
    /// A cluster that nothing counts now, a refcount of this width that is full, or I/O.
    pub(crate) fn next_add(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<()> {
        if self.count(file, cluster)? == 0 {
            return Err(self.uncounted(file, cluster));
        }
        let limit = self.geometry.refcount_max();
        let count = self.next_count(file, cluster)?;
        if count >= limit {
            let what = "references to one host cluster";
            let value = count;
            return Err(file.unsupported(Feature::Limit { what, value, limit }));
        }
        self.next_set(file, cluster, count + 1)
    }

    /// Stages one reference less.
    ///
    /// # Errors
    /// A cluster with no reference left, or I/O.
    pub(crate) fn next_drop(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<()> {
        match self.next_count(file, cluster)? {
            0 => Err(self.uncounted(file, cluster)),
            count => self.next_set(file, cluster, count - 1),
        }
    }

    fn uncounted(&self, file: &ImageFile, cluster: HostCluster) -> crate::Error {
        file.damage(Damage::Place {
            structure: "cluster of the mapping",
            offset: self.geometry.host_offset(cluster),
            problem: "has fewer references counted than there are: repair the image first",
        })
    }

    /// The count to come.
    pub(crate) fn next_count(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<u64> {
        let (number, slot) = self.geometry.refcount_indexes(cluster);
        let staged = self.next.as_ref().and_then(|next| next.blocks.get(&number));
        match staged {
            Some(bytes) => Ok(refcount::count(bytes, self.geometry.refcount_order, slot)),
            None => self.count(file, cluster),
        }
    }

    /// The count to come of a cluster that something will refer to.
    ///
    /// # Errors
    /// A count of zero, or I/O.
    pub(crate) fn next_kept(&mut self, file: &ImageFile, cluster: HostCluster) -> Result<u64> {
        match self.next_count(file, cluster)? {
            0 => Err(self.uncounted(file, cluster)),
            count => Ok(count),
        }
    }

    fn next_set(&mut self, file: &ImageFile, cluster: HostCluster, value: u64) -> Result<()> {
        let (number, slot) = self.geometry.refcount_indexes(cluster);
        let order = self.geometry.refcount_order;
        let staged = |next: &NextCounts| next.blocks.contains_key(&number);
        if !self.next.as_ref().is_some_and(staged) {
            let Some(bytes) = self
                .block(file, number)?
                .map(|block| block.bytes().to_vec())
            else {
                return Err(self.uncounted(file, cluster));
            };
            let next = self.next.get_or_insert_default();
            next.blocks.insert(number, bytes);
        }
        if let Some(bytes) = self
            .next
            .as_mut()
            .and_then(|next| next.blocks.get_mut(&number))
        {
            refcount::set_count(bytes, order, slot, value);
        }
        Ok(())
    }

    /// A count changed on this side: what is staged follows.
    pub(super) fn mirror(&mut self, number: usize, slot: usize, old: u64, new: u64) {
        let order = self.geometry.refcount_order;
        if let Some(bytes) = self
            .next
            .as_mut()
            .and_then(|next| next.blocks.get_mut(&number))
        {
            let staged = refcount::count(bytes, order, slot);
            let value = (staged + new)
                .saturating_sub(old)
                .min(self.geometry.refcount_max());
            refcount::set_count(bytes, order, slot, value);
        }
    }

    /// Clusters that the counts to come free.
    fn next_freed(&mut self, file: &ImageFile) -> Result<Vec<HostRun>> {
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcounts_per_block();
        let numbers: Vec<usize> = self
            .next
            .iter()
            .flat_map(|next| next.blocks.keys().copied())
            .collect();
        let mut freed: Vec<HostRun> = Vec::new();
        for number in numbers {
            let Some(old) = self
                .block(file, number)?
                .map(|block| block.bytes().to_vec())
            else {
                continue;
            };
            let Some(new) = self.next.as_ref().and_then(|next| next.blocks.get(&number)) else {
                continue;
            };
            let first = to_u64(number) * per_block;
            for slot in 0..to_usize(per_block) {
                let gone = refcount::count(&old, order, slot) != 0
                    && refcount::count(new, order, slot) == 0;
                if !gone {
                    continue;
                }
                let start = self.geometry.host_offset(HostCluster(first + to_u64(slot)));
                match freed.last_mut() {
                    Some(last) if last.end(&self.geometry) == start => last.clusters += 1,
                    _ => freed.push(single(start)),
                }
            }
        }
        Ok(freed)
    }

    /// Writes blocks and table to come into fresh clusters that the present counts hold, durably.
    /// The header write that follows makes them true.
    ///
    /// # Errors
    /// I/O, no space; [`abandon_next`](Self::abandon_next) gives back what was taken.
    pub(crate) fn place_next(
        &mut self,
        file: &ImageFile,
        first: &mut FirstCluster,
    ) -> Result<TablePlace> {
        let numbers: Vec<usize> = self
            .next
            .iter()
            .flat_map(|next| next.blocks.keys().copied())
            .collect();
        for number in numbers {
            let place = self.allocate_exact(file, 1)?;
            if let Some(next) = &mut self.next {
                next.places.insert(number, place);
            }
        }
        let run = loop {
            // May move the present table, and then it has another length.
            self.settle(file, first)?;
            let clusters = self.geometry.clusters_for(self.table_bytes());
            let start = self.allocate_exact(file, clusters)?;
            let run = HostRun {
                start,
                clusters,
                untouched: false,
            };
            if !self.table_outgrown {
                break run;
            }
            if let Some(next) = &mut self.next {
                next.spare.push(run);
            }
        };
        let Some(next) = &mut self.next else {
            return Ok((self.table_offset, to_u32(run.clusters)));
        };
        next.table = Some(run);
        self.settle(file, first)?;
        self.write_next(file, run)?;
        Ok((run.start, to_u32(run.clusters)))
    }

    fn write_next(&self, file: &ImageFile, run: HostRun) -> Result<()> {
        let mut table = self.table.clone();
        if let Some(next) = &self.next {
            for (&number, &place) in &next.places {
                table[number] = place.0;
                if let Some(bytes) = next.blocks.get(&number) {
                    file.write(bytes, place, "write refcount block")?;
                }
            }
        }
        let mut bytes = vec![0; to_usize(run.clusters << self.geometry.cluster_bits)];
        let end = to_usize(Geometry::entries_bytes(table.len()));
        BigEndian::write_u64_into(&table, &mut bytes[..end]);
        file.write(&bytes, run.start, "write refcount table")?;
        file.barrier()
    }

    /// The header names what [`place_next`](Self::place_next) wrote: from now on it counts. What
    /// it freed goes back to the storage, and the old blocks and table are freed.
    ///
    /// # Errors
    /// I/O while old structures are freed; they leak then.
    pub(crate) fn adopt_next(&mut self, file: &ImageFile) -> Result<()> {
        let freed = self.next_freed(file)?;
        let Some(next) = self.next.take() else {
            return Ok(());
        };
        let Some(table) = next.table else {
            return Ok(());
        };
        let mut old = next.spare;
        for (number, bytes) in next.blocks {
            let Some(&place) = next.places.get(&number) else {
                continue;
            };
            old.push(single(HostOffset(self.table[number])));
            self.table[number] = place.0;
            self.blocks
                .insert(number, RefcountBlock::durable(self.geometry, place, bytes));
            self.fix_run(place, 1);
        }
        old.push(HostRun {
            start: self.table_offset,
            clusters: table.clusters,
            untouched: false,
        });
        self.table_offset = table.start;
        self.fix_run(table.start, table.clusters);
        self.tail = None;
        for run in &freed {
            let cluster = self.geometry.host_cluster(run.start).0;
            self.first_free = self.first_free.min(cluster);
            let bytes = run.clusters << self.geometry.cluster_bits;
            // Space that cannot be given back is only space.
            let _ = file.storage().discard(run.start.0, bytes);
        }
        old.iter().for_each(|&run| self.release(run));
        self.free_now(file, &old)
    }

    /// Forgets what was staged and gives back what was taken for it.
    ///
    /// # Errors
    /// I/O; the clusters leak then.
    pub(crate) fn abandon_next(&mut self, file: &ImageFile) -> Result<()> {
        let Some(next) = self.next.take() else {
            return Ok(());
        };
        let mut taken = next.spare;
        taken.extend(next.table);
        taken.extend(next.places.into_values().map(single));
        self.free_now(file, &taken)
    }
}
