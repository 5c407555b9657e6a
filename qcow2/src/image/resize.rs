//! Another size for the disk: grow and shrink, with the bitmaps, by one header commit.
//!
//! Invariants:
//! - What the disk gains reads as zero, whatever a longer backing file has there and whatever lies
//!   behind the old end in the last cluster.
//! - What the disk loses is freed after the commit, never before.
//! - The new size, the new L1 table and the bitmaps of that size become true together.

use super::{DROP, Image, NextMapping};
use crate::cache::L2Table;
use crate::convert::{to_u64, to_usize};
use crate::error::{Feature, Mistake, Result};
use crate::format::limits;
use crate::format::table::{L2Entry, RawL2};
use crate::units::{GuestCluster, HostOffset};

/// Whether a disk may lose its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrink {
    /// A smaller size is refused.
    Refused,
    /// What lies behind a smaller end is given up.
    Allowed,
}

impl Image {
    /// Gives the disk `size` bytes, a multiple of 512. The bitmaps follow: what the disk gains is
    /// dirty in those that record.
    ///
    /// # Errors
    /// A size that cannot be; a smaller one without permission, or while there are internal
    /// snapshots; an external data file; a bitmap that is in use, or too fine for that size; damage,
    /// I/O. After an error the disk has its old size, except for one while clusters are freed.
    pub fn resize(&self, size: u64, shrink: Shrink) -> Result<()> {
        self.check_writable()?;
        self.require_data_inside()?;
        self.check_size(size, shrink)?;
        let old = self.size();
        if size == old {
            return Ok(());
        }
        if size > old {
            self.shown_below()?;
        }
        self.remap(|update, next| {
            let old = update.disk_bytes();
            self.check_size(size, shrink)?;
            update.resize_bitmaps(size)?;
            if size > old {
                let shown = self.shown_below()?;
                Growth { old, size, shown }.plan(next)
            } else {
                plan_shrink(next, size)
            }
        })?;
        if size < old {
            self.clear_tail()?;
        }
        Ok(())
    }

    fn check_size(&self, size: u64, shrink: Shrink) -> Result<()> {
        let refuse = |problem| {
            let option = "size";
            Err(self.file.invalid(Mistake::Option { option, problem }))
        };
        if size == 0 || !size.is_multiple_of(512) {
            return refuse("must be a multiple of 512, and not zero");
        }
        let l1_bytes = self.geometry.l1_entries_for(size).saturating_mul(8);
        if size > limits::MAX_DISK_BYTES || l1_bytes > limits::MAX_L1_BYTES {
            return refuse("too large for this cluster size");
        }
        let snapshots = self.header().snapshot_count != 0;
        if snapshots && self.geometry.version == 2 && size != self.size() {
            return refuse("a version 2 image with internal snapshots cannot be resized");
        }
        if size < self.size() {
            if shrink == Shrink::Refused {
                return refuse("smaller than the disk: its end would be lost");
            }
            if snapshots {
                return refuse("an image with internal snapshots cannot be shrunk");
            }
        }
        Ok(())
    }

    /// The data file would have to get the new size together with the header.
    fn require_data_inside(&self) -> Result<()> {
        self.guest_file()?;
        match self.data_file() {
            None => Ok(()),
            Some(reference) => Err(self.file.unsupported(Feature::DataFile {
                name: String::from_utf8_lossy(&reference.name).into_owned(),
                reason: "a disk whose data lies in it cannot be resized".to_owned(),
            })),
        }
    }

    /// Bytes of the layer below, which would show where the disk grows.
    fn shown_below(&self) -> Result<u64> {
        match &self.backing {
            Some(layer) => Ok(layer.size()),
            None if !self.names_backing() => Ok(0),
            None => {
                let reference = self.backing().map(|found| found.name).unwrap_or_default();
                Err(self.file.unsupported(Feature::Backing {
                    name: String::from_utf8_lossy(&reference).into_owned(),
                    reason: "its size is not known, for it was not opened".to_owned(),
                }))
            }
        }
    }

    /// Zeros what the last cluster holds behind the end: whoever grows the disk again should not
    /// find it. Where that would need a new cluster it stays, and [`resize`](Self::resize) looks.
    fn clear_tail(&self) -> Result<()> {
        let end = self.size();
        let inside = self.geometry.offset_in_cluster(end);
        let cluster = self.geometry.guest_cluster(end);
        let (number, _) = self.geometry.table_indexes(cluster);
        let _guest = self.entrance.enter();
        let _owned = self.clusters.own(cluster);
        if inside == 0 || self.size() != end {
            return Ok(());
        }
        let Some(table) = self.own_table(number)? else {
            return Ok(());
        };
        let Some(host) = self.whole_host(&table, cluster)? else {
            return Ok(());
        };
        let len = self.geometry.cluster_bytes() - inside;
        let zeros = vec![0; to_usize(len)];
        self.guest_file()?
            .write(&zeros, host.plus(inside), "write zeros behind the end")
    }
}

impl Image {
    /// Where a cluster lies that is all data, ours alone.
    fn whole_host(&self, table: &L2Table, cluster: GuestCluster) -> Result<Option<HostOffset>> {
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

/// A disk that gets longer.
struct Growth {
    old: u64,
    size: u64,
    /// Bytes of the layer below.
    shown: u64,
}

impl Growth {
    fn plan(&self, next: &mut NextMapping<'_>) -> Result<()> {
        let geometry = next.image().geometry();
        next.lengthen_l1(geometry.l1_entries_for(self.size));
        let first = geometry.guest_cluster(self.old).0;
        let end = geometry.clusters_for(self.size);
        let per_table = geometry.l2_entries();
        for number in first / per_table..=(end - 1) / per_table {
            let base = number * per_table;
            let shows = base.max(first) << geometry.cluster_bits < self.shown;
            if !next.has_table(to_usize(number))? && !shows {
                continue;
            }
            let clusters = base.max(first)..(base + per_table).min(end);
            next.edit(to_usize(number), |next, entries| {
                for cluster in clusters {
                    let entry = &mut entries[to_usize(cluster - base)];
                    *entry = self.grown(next, *entry, GuestCluster(cluster))?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The entry of a cluster that lies wholly or partly behind the old end.
    fn grown(
        &self,
        next: &mut NextMapping<'_>,
        raw: RawL2,
        cluster: GuestCluster,
    ) -> Result<RawL2> {
        let image = next.image();
        let start = cluster.0 << image.geometry.cluster_bits;
        if start < self.old {
            return self.tail(next, raw, cluster);
        }
        let shows = start < self.shown;
        match image.decode(raw, cluster)? {
            L2Entry::Unallocated if !shows => return Ok(raw),
            L2Entry::Unallocated => {}
            L2Entry::Zero { .. } => return Ok(raw),
            // Left behind the end by somebody: not content of this disk.
            entry => next.count_entry(entry, DROP)?,
        }
        if !shows {
            return Ok(RawL2::default());
        }
        if image.geometry.version > 2 {
            return Ok(RawL2::zero(&image.geometry));
        }
        let zeros = vec![0; image.geometry.cluster_len()];
        let host = next.take_data()?;
        image.guest_file()?.write(&zeros, host, "write zeros")?;
        Ok(RawL2::normal(host, &image.geometry))
    }

    /// The entry of the cluster that the old end cuts: what stands behind the end becomes zero.
    fn tail(&self, next: &mut NextMapping<'_>, raw: RawL2, cluster: GuestCluster) -> Result<RawL2> {
        let image = next.image();
        let start = cluster.0 << image.geometry.cluster_bits;
        let mut whole = vec![0; image.geometry.cluster_len()];
        image.read_group(&mut whole, start)?;
        let (_, behind) = whole.split_at_mut(to_usize(self.old - start));
        if behind.iter().all(|&byte| byte == 0) {
            return Ok(raw);
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
            return Ok(raw);
        }
        next.count_entry(image.decode(raw, cluster)?, DROP)?;
        let host = next.take_data()?;
        image.guest_file()?.write(&whole, host, "write data")?;
        Ok(RawL2::normal(host, &image.geometry))
    }
}

fn plan_shrink(next: &mut NextMapping<'_>, size: u64) -> Result<()> {
    let image = next.image();
    let geometry = image.geometry();
    let end = geometry.clusters_for(size);
    let per_table = geometry.l2_entries();
    let (boundary, kept) = (to_usize(end / per_table), to_usize(end % per_table));
    let first_cut = boundary + usize::from(kept > 0);
    for number in first_cut..next.l1().len() {
        next.cut_table(number)?;
    }
    if kept > 0 && next.has_table(boundary)? {
        next.edit(boundary, |next, entries| {
            for (raw, slot) in entries.iter_mut().zip(0..).skip(kept) {
                let cluster = GuestCluster(to_u64(boundary) * per_table + slot);
                next.count_entry(image.decode(*raw, cluster)?, DROP)?;
                *raw = RawL2::default();
            }
            Ok(())
        })?;
    }
    next.shorten_l1(geometry.l1_entries_for(size));
    Ok(())
}
