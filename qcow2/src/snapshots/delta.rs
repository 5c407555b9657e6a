//! What differs between two moments of the disk, from their mapping tables alone.
//!
//! After a snapshot every write to a cluster that it shares must move the cluster. So the clusters
//! whose mapping differs are a superset of those whose content does, whoever wrote in between and
//! however often he crashed. No data is read, and below one L2 table of both moments nothing at
//! all.
//!
//! A cluster that neither moment maps shows the backing file, which somebody may have changed (a
//! commit does): the mapping proves nothing about it. Such clusters are told apart, for the caller
//! who knows what changed below.

use std::ops::Range;

use rayon::prelude::*;
use tidemark_bitmap::{Bitmap, Granularity, Shape};

use super::{disk_bytes, position, read_l1, table};
use crate::convert::{index, to_u64, to_usize};
use crate::error::{Mistake, Result};
use crate::format::limits;
use crate::format::table::{COPIED, L1Entry, L2Entry, RawL2};
use crate::geometry::Geometry;
use crate::image::Image;
use crate::units::HostOffset;

/// L2 tables that are compared before their result is noted: bounds the memory of the answer on
/// its way.
const BATCH: usize = 256;

/// A moment of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment<'a> {
    /// Now, what was written and not yet flushed included.
    Present,
    /// As of the snapshot with this identifier or name.
    Snapshot(&'a str),
}

/// What [`Image::delta`] found.
#[derive(Clone, Debug)]
pub struct Delta {
    /// A superset of what differs: a bit for each cluster of the later disk, or for a power of two
    /// of them where the disk has too many. What the earlier disk does not have is set.
    pub changed: Bitmap,
    /// Clusters, all or in part, that neither moment maps while the image has a backing file: they
    /// differ where the backing file was changed in between. Clean without a backing file.
    pub below: Bitmap,
}

/// One side of the comparison.
struct Side {
    size: u64,
    /// Raw L1 entries; none for the present, whose tables are in memory.
    l1: Option<Vec<u64>>,
}

#[derive(Default)]
struct Found {
    changed: Vec<Range<u64>>,
    below: Vec<Range<u64>>,
}

impl Image {
    /// The clusters whose mapping differs between two moments, over the disk as of `to`.
    ///
    /// Takes the time of reading the mapping tables that differ, on all cores. Guest writes go on;
    /// what they change meanwhile may or may not be in the answer. Snapshots are neither taken nor
    /// deleted meanwhile.
    ///
    /// # Errors
    /// [`Mistake::NoSuchSnapshot`], damaged tables, or I/O.
    pub fn delta(&self, from: Moment<'_>, to: Moment<'_>) -> Result<Delta> {
        let _tables_stay = self.enter();
        let sides = [self.side(from)?, self.side(to)?];
        self.compare(&sides)
    }

    fn side(&self, moment: Moment<'_>) -> Result<Side> {
        let Moment::Snapshot(selector) = moment else {
            return Ok(Side {
                size: self.size(),
                l1: None,
            });
        };
        let file = self.file();
        let header = self.header();
        let entries = table::read(file.storage(), file.name(), &header)?;
        let snapshot = &entries[position(file, &entries, selector)?].snapshot;
        Ok(Side {
            size: disk_bytes(file, &header, snapshot)?,
            l1: Some(read_l1(file, &header.geometry, snapshot)?),
        })
    }

    /// As [`delta`](Self::delta), from the present to a disk of `size` bytes with this L1 table,
    /// for a caller who keeps structural changes out.
    pub(super) fn delta_to_l1(&self, size: u64, l1: Vec<u64>) -> Result<Delta> {
        let present = Side {
            size: self.size(),
            l1: None,
        };
        let l1 = Some(l1);
        self.compare(&[present, Side { size, l1 }])
    }

    fn compare(&self, sides: &[Side; 2]) -> Result<Delta> {
        let size = sides[1].size;
        let common = sides[0].size.min(size);
        let geometry = self.geometry();
        let shape = self.delta_shape(size)?;
        let mut delta = Delta {
            changed: Bitmap::new(shape),
            below: Bitmap::new(shape),
        };
        let refused = |error| self.file().invalid(Mistake::Bitmap(error));
        let tables: Vec<usize> = (0..to_usize(geometry.l1_entries_for(common))).collect();
        for batch in tables.chunks(BATCH) {
            let compare = |&number: &usize| self.compare_tables(sides, number, common);
            let found: Result<Vec<Found>> = match batch {
                // One is not worth other threads.
                [number] => compare(number).map(|found| vec![found]),
                _ => batch.par_iter().map(compare).collect(),
            };
            for found in found? {
                for range in found.changed {
                    delta.changed.mark(range).map_err(refused)?;
                }
                for range in found.below {
                    delta.below.mark(range).map_err(refused)?;
                }
            }
        }
        delta.changed.mark(common..size).map_err(refused)?;
        Ok(delta)
    }

    /// Clusters as granules, or more of them where their bits would be too many.
    fn delta_shape(&self, size: u64) -> Result<Shape> {
        let geometry = self.geometry();
        let page = crate::convert::to_u32(geometry.cluster_bytes());
        let mut granule = geometry.cluster_bytes();
        while size.div_ceil(granule) > limits::MAX_BITMAP_BYTES * 8 {
            granule *= 2;
        }
        Granularity::from_bytes(granule)
            .ok_or(tidemark_bitmap::Error::BadPageSize(page))
            .and_then(|granularity| Shape::new(size, granularity, page))
            .map_err(|error| self.file().invalid(Mistake::Bitmap(error)))
    }

    fn compare_tables(&self, sides: &[Side; 2], number: usize, end: u64) -> Result<Found> {
        let geometry = self.geometry();
        let span = geometry.l2_entries() << geometry.cluster_bits;
        let start = to_u64(number) * span;
        let whole = start..start.saturating_add(span).min(end);
        let places = [
            self.place(&sides[0], number)?,
            self.place(&sides[1], number)?,
        ];
        let mut found = Found::default();
        let backed = self.names_backing();
        if places[0] == places[1] && !(backed && places[0].is_some()) {
            if backed {
                found.below.push(whole);
            }
            return Ok(found);
        }
        let old = self.entries_of(&sides[0], number, places[0])?;
        let new = if places[0] == places[1] {
            old.clone()
        } else {
            self.entries_of(&sides[1], number, places[1])?
        };
        let mut at = start;
        for (old, new) in old.into_iter().zip(new) {
            if at >= whole.end {
                break;
            }
            let cluster = at..(at + geometry.cluster_bytes()).min(whole.end);
            at += geometry.cluster_bytes();
            if old.entry & !COPIED != new.entry & !COPIED || old.subclusters != new.subclusters {
                extend(&mut found.changed, cluster);
            } else if backed && shows_below(new, geometry.guest_cluster(cluster.start).0, &geometry)
            {
                extend(&mut found.below, cluster);
            }
        }
        Ok(found)
    }

    /// Where one moment's L2 table lies.
    fn place(&self, side: &Side, number: usize) -> Result<Option<HostOffset>> {
        let entry = match &side.l1 {
            None => self.l1_entry(number)?,
            Some(l1) => {
                let raw = l1.get(number).copied().unwrap_or(0);
                L1Entry::decode(raw, to_u64(number), &self.geometry())
                    .map_err(|damage| self.file().damage(damage))?
            }
        };
        Ok(match entry {
            L1Entry::Unallocated => None,
            L1Entry::Table { offset, .. } => Some(offset),
        })
    }

    fn entries_of(
        &self,
        side: &Side,
        number: usize,
        place: Option<HostOffset>,
    ) -> Result<Vec<RawL2>> {
        let Some(offset) = place else {
            return Ok(vec![
                RawL2::default();
                to_usize(self.geometry().l2_entries())
            ]);
        };
        match &side.l1 {
            None => self.present_l2(number, offset),
            Some(_) => self.read_l2(offset),
        }
    }
}

/// Whether some of a cluster's content comes from the backing file.
fn shows_below(raw: RawL2, cluster: u64, geometry: &Geometry) -> bool {
    if geometry.extended_l2 {
        let compressed = raw.entry & (1 << 62) != 0;
        let [zeros, allocated] = [raw.subclusters >> 32, raw.subclusters & u64::from(u32::MAX)];
        return !compressed && index(u32::MAX) != to_usize(zeros | allocated);
    }
    // A damaged entry proves nothing.
    matches!(
        L2Entry::decode(raw, cluster, geometry),
        Ok(L2Entry::Unallocated) | Err(_)
    )
}

/// Adds a range behind those that are there.
fn extend(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}
