//! From staged refcounts to true ones: blocks and table go into fresh clusters, and memory follows
//! the header write that names them.

use byteorder::{BigEndian, ByteOrder};

use crate::alloc::block::RefcountBlock;
use crate::alloc::{Allocator, HostRun, single};
use crate::convert::{to_u32, to_u64, to_usize};
use crate::error::Result;
use crate::format::refcount;
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::image::first_cluster::FirstCluster;
use crate::units::{HostCluster, HostOffset};

/// Where the refcount table to come lies, and how many clusters it has.
pub(crate) type TablePlace = (HostOffset, u32);

impl Allocator {
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
            let first = self.geometry.host_cluster(run.start).0;
            self.first_free = self.first_free.min(first);
            for cluster in first..first + run.clusters {
                self.give_back(file, HostCluster(cluster));
            }
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
