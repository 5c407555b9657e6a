//! A disk that gets longer: what it gains reads as zero, and has its place where that is asked.

use super::preallocate::Preallocation;
use super::{DROP, Image, NextMapping};
use crate::alloc::HostRun;
use crate::cache::L2Table;
use crate::convert::{to_u64, to_usize};
use crate::error::Result;
use crate::format::table::{L2Entry, RawL2};
use crate::units::{GuestCluster, HostOffset};

/// A disk that gets longer.
pub(super) struct Growth {
    pub(super) old: u64,
    pub(super) size: u64,
    /// Bytes of the layer below.
    pub(super) shown: u64,
    pub(super) preallocation: Preallocation,
}

impl Growth {
    pub(super) fn plan(&self, next: &mut NextMapping<'_>) -> Result<()> {
        let geometry = next.image().geometry();
        next.lengthen_l1(geometry.l1_entries_for(self.size));
        if next.image().has_external_data() {
            let (start, len) = (HostOffset(self.old), self.size - self.old);
            self.fill().fill(next.image().guest_file()?, start, len)?;
        }
        let first = geometry.guest_cluster(self.old).0;
        let end = geometry.clusters_for(self.size);
        let per_table = geometry.l2_entries();
        for number in first / per_table..=(end - 1) / per_table {
            let base = number * per_table;
            let shows = base.max(first) << geometry.cluster_bits < self.shown;
            let absent = !next.has_table(to_usize(number))?;
            if absent && !shows && !self.places(next.image()) {
                continue;
            }
            let clusters = base.max(first)..(base + per_table).min(end);
            next.edit(to_usize(number), |next, entries| {
                let mut vacant = Vec::new();
                for cluster in clusters {
                    let entry = &mut entries[to_usize(cluster - base)];
                    match self.grown(next, *entry, GuestCluster(cluster))? {
                        Some(grown) => *entry = grown,
                        None => vacant.push(GuestCluster(cluster)),
                    }
                }
                self.place(next, &vacant, |cluster, raw| {
                    entries[to_usize(cluster.0 - base)] = raw;
                })
            })?;
        }
        // A data file has a barrier of its own, and the header comes behind it.
        next.image().flush_data_file()
    }

    /// Whether all that the disk gains gets a place. A raw data file is mapped as a whole.
    fn places(&self, image: &Image) -> bool {
        self.preallocation != Preallocation::Off || image.keeps_raw()
    }

    /// How places are filled.
    fn fill(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off => Preallocation::Metadata,
            other => other,
        }
    }

    /// The entry of a cluster that lies wholly or partly behind the old end; none when it is to get
    /// a place full of zeros.
    fn grown(
        &self,
        next: &mut NextMapping<'_>,
        raw: RawL2,
        cluster: GuestCluster,
    ) -> Result<Option<RawL2>> {
        let image = next.image();
        let start = cluster.0 << image.geometry.cluster_bits;
        if start < self.old {
            return self.tail(next, raw, cluster);
        }
        let (shows, places) = (start < self.shown, self.places(image));
        match image.decode(raw, cluster)? {
            L2Entry::Unallocated if !shows && !places => return Ok(Some(raw)),
            L2Entry::Unallocated => {}
            L2Entry::Zero { .. } if !places => return Ok(Some(raw)),
            // Left behind the end by somebody: not content of this disk.
            entry => next.count_entry(entry, DROP)?,
        }
        Ok(match (places, shows) {
            (true, _) => None,
            (false, false) => Some(RawL2::default()),
            (false, true) if image.geometry.version > 2 => Some(RawL2::zero(&image.geometry)),
            (false, true) => None,
        })
    }

    /// The entry of the cluster that the old end cuts: what stands behind the end becomes zero.
    fn tail(
        &self,
        next: &mut NextMapping<'_>,
        raw: RawL2,
        cluster: GuestCluster,
    ) -> Result<Option<RawL2>> {
        let image = next.image();
        let start = cluster.0 << image.geometry.cluster_bits;
        let entry = image.decode(raw, cluster)?;
        let placeless = self.places(image) && entry.host_run(&image.geometry).is_none();
        if placeless && !image.names_backing() {
            if image.has_external_data() {
                image.zero_data(start, self.old - start)?;
            }
            return Ok(None);
        }
        let mut whole = vec![0; image.geometry.cluster_len()];
        image.read_group(&mut whole, start)?;
        let (_, behind) = whole.split_at_mut(to_usize(self.old - start));
        if behind.iter().all(|&byte| byte == 0) && !placeless {
            return Ok(Some(raw));
        }
        behind.fill(0);
        let (number, _) = image.geometry.table_indexes(cluster);
        let in_place = match image.own_table(number)? {
            Some(table) => image.whole_host(&table, cluster)?,
            None => None,
        };
        if let Some(host) = in_place {
            // Nobody sees bytes behind the end, before the commit or without it.
            let at = host.plus(self.old - start);
            image
                .guest_file()?
                .write(behind, at, "write zeros behind the end")?;
            return Ok(Some(raw));
        }
        next.count_entry(entry, DROP)?;
        let run = next.place_for(cluster, 1)?;
        let room = to_usize((self.size - start).min(to_u64(whole.len())));
        let written = if image.has_external_data() {
            &whole[..room]
        } else {
            &whole[..]
        };
        image
            .guest_file()?
            .write(written, run.start, "write data")?;
        Ok(Some(RawL2::normal(run.start, &image.geometry)))
    }

    /// Gives clusters their places, full of zeros, and hands out their entries.
    fn place(
        &self,
        next: &mut NextMapping<'_>,
        mut vacant: &[GuestCluster],
        mut set: impl FnMut(GuestCluster, RawL2),
    ) -> Result<()> {
        let image = next.image();
        let geometry = image.geometry();
        while let Some(&first) = vacant.first() {
            let ahead = vacant.iter().zip(first.0..);
            let in_a_row = ahead.take_while(|(cluster, wanted)| cluster.0 == *wanted);
            let run = next.place_for(first, to_u64(in_a_row.count()))?;
            if !image.has_external_data() {
                image.fill_new(run, self.fill())?;
            }
            let (placed, rest) = vacant.split_at(to_usize(run.clusters));
            for (&cluster, step) in placed.iter().zip(0..) {
                let host = run.start.plus(step << geometry.cluster_bits);
                // What shows below would show through a place without data.
                let raw = if image.names_backing() {
                    RawL2::normal(host, &geometry)
                } else {
                    image.vacant_entry(host)
                };
                set(cluster, raw);
            }
            vacant = rest;
        }
        Ok(())
    }
}

impl NextMapping<'_> {
    /// A place for up to `wanted` clusters of the disk: in an external data file its own.
    fn place_for(&mut self, cluster: GuestCluster, wanted: u64) -> Result<HostRun> {
        if self.image().has_external_data() {
            return self.image().place_clusters(cluster, wanted);
        }
        self.take_data(wanted)
    }
}

impl Image {
    /// Where a cluster lies that is all data, ours alone.
    pub(super) fn whole_host(
        &self,
        table: &L2Table,
        cluster: GuestCluster,
    ) -> Result<Option<HostOffset>> {
        let (_, slot) = self.geometry.table_indexes(cluster);
        Ok(match self.changeable(table.entry(slot), cluster)? {
            L2Entry::Normal {
                offset,
                copied: true,
            } => Some(offset),
            _ => None,
        })
    }
}
