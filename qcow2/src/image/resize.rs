//! Another size for the disk: grow and shrink, with the bitmaps, by one header commit.
//!
//! Invariants:
//! - What the disk gains reads as zero, whatever a longer backing file has there and whatever lies
//!   behind the old end in the last cluster.
//! - What the disk loses is freed after the commit, never before.
//! - The new size, the new L1 table and the bitmaps of that size become true together.
//! - An external data file is never shorter than the disk that the header names: it grows before
//!   the commit and is cut behind it.

use super::grow::Growth;
use super::{DROP, Image, NextMapping, Preallocation};
use crate::convert::{to_u64, to_usize};
use crate::error::{Feature, Mistake, Result};
use crate::format::limits;
use crate::format::table::RawL2;
use crate::units::GuestCluster;

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
    /// snapshots; a bitmap that is in use, or too fine for that size; a data file or backing file
    /// that was not opened; damage, I/O. After an error the disk has its old size, except for one
    /// while clusters are freed or the data file is cut.
    pub fn resize(&self, size: u64, shrink: Shrink) -> Result<()> {
        self.give_size(size, shrink, Preallocation::Off)
    }

    /// As [`resize`](Self::resize), to a size that is not smaller; what the disk gains has its place
    /// at once.
    ///
    /// # Errors
    /// As [`resize`](Self::resize); too little space leaves the old size.
    pub fn grow(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.give_size(size, Shrink::Refused, preallocation)
    }

    fn give_size(&self, size: u64, shrink: Shrink, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        self.guest_file()?;
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
                let growth = Growth {
                    old,
                    size,
                    shown,
                    preallocation,
                };
                growth.plan(next)
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
        if self.has_external_data() {
            let _guest = self.entrance.enter();
            return self.cut_data_file();
        }
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
