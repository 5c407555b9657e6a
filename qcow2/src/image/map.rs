//! Where the disk's bytes are: runs of equal kind through the backing chain.

use super::Image;
use super::backing::Layer;
use crate::error::Result;
use crate::format::table::L2Entry;
use crate::units::{GuestCluster, HostOffset};

/// A run of the disk whose bytes come from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte on the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Layer that the bytes come from: 0 this image, 1 its backing file, and so on.
    pub depth: u64,
    /// Some layer has an entry for it.
    pub present: bool,
    /// It reads as zero.
    pub zero: bool,
    /// There is data stored for it.
    pub data: bool,
    /// The data is compressed.
    pub compressed: bool,
    /// Byte in that layer's file, or external data file, where the data starts; none when it is
    /// compressed or encrypted.
    pub offset: Option<u64>,
}

impl Extent {
    fn continues(&self, next: &Self) -> bool {
        let offsets = match (self.offset, next.offset) {
            (Some(mine), Some(other)) => mine + self.length == other,
            (mine, other) => mine == other,
        };
        let key = |extent: &Self| {
            (
                extent.depth,
                extent.present,
                extent.zero,
                extent.data,
                extent.compressed,
            )
        };
        self.start + self.length == next.start && key(self) == key(next) && offsets
    }
}

impl Image {
    /// Maximal runs of `len` bytes from `offset` on.
    ///
    /// # Errors
    /// A range outside the disk, damaged tables, or I/O.
    pub fn map(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.check_range(offset, len)?;
        let mut extents = Vec::new();
        self.map_into(offset, offset + len, 0, &mut extents)?;
        Ok(extents)
    }

    /// Appends the runs of `start..end`, seen from `depth` layers above.
    fn map_into(&self, start: u64, end: u64, depth: u64, out: &mut Vec<Extent>) -> Result<()> {
        let mut at = start;
        while at < end {
            let cluster = self.geometry.guest_cluster(at);
            let (number, _) = self.geometry.table_indexes(cluster);
            let Some(table) = self.table(number)? else {
                let next_table = (crate::convert::to_u64(number) + 1) * self.geometry.l2_entries();
                let stop = next_table
                    .saturating_mul(self.geometry.cluster_bytes())
                    .min(end);
                self.map_below(at, stop, depth, out)?;
                at = stop;
                continue;
            };
            let stop = ((cluster.0 + 1) << self.geometry.cluster_bits).min(end);
            let (_, slot) = self.geometry.table_indexes(cluster);
            let entry = self.decode(table.entry(slot), cluster)?;
            self.map_cluster(entry, at, stop, depth, out)?;
            at = stop;
        }
        Ok(())
    }

    fn map_cluster(
        &self,
        entry: L2Entry,
        start: u64,
        end: u64,
        depth: u64,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        let inside = self.geometry.offset_in_cluster(start);
        let base = Extent {
            start,
            length: end - start,
            depth,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: None,
        };
        let extent = match entry {
            L2Entry::Unallocated => return self.map_below(start, end, depth, out),
            L2Entry::Zero { allocated, .. } => {
                let shown = allocated.and_then(|host| self.shown_offset(host));
                let offset = shown.map(|host| host.0 + inside);
                Extent {
                    zero: true,
                    data: false,
                    offset,
                    ..base
                }
            }
            L2Entry::Normal { offset, .. } => Extent {
                offset: self.shown_offset(offset).map(|host| host.0 + inside),
                ..base
            },
            L2Entry::Compressed { .. } => Extent {
                compressed: true,
                ..base
            },
        };
        push(out, extent);
        Ok(())
    }

    fn map_below(&self, start: u64, end: u64, depth: u64, out: &mut Vec<Extent>) -> Result<()> {
        let nothing = |start, depth| Extent {
            start,
            length: end - start,
            depth,
            present: false,
            zero: true,
            data: false,
            compressed: false,
            offset: None,
        };
        let Some(layer) = &self.backing else {
            push(out, nothing(start, depth));
            return Ok(());
        };
        let stop = layer.size().clamp(start, end);
        match layer {
            Layer::Image(image) => image.map_into(start, stop, depth + 1, out)?,
            Layer::Raw { .. } if start < stop => push(
                out,
                Extent {
                    start,
                    length: stop - start,
                    depth: depth + 1,
                    present: true,
                    zero: false,
                    data: true,
                    compressed: false,
                    offset: Some(start),
                },
            ),
            Layer::Raw { .. } => {}
        }
        // Beyond the end of the layer below it is this layer that reads as zero.
        if stop < end {
            push(out, nothing(stop, depth));
        }
        Ok(())
    }

    /// Bytes in a row from `host` on, in the data of the layer `depth` below, that are a hole of its
    /// file and so certainly read as zero; zero when that is unknown.
    pub(crate) fn hole_at(&self, depth: u64, host: HostOffset) -> Result<u64> {
        match (depth, &self.backing) {
            (0, _) => self.guest_file()?.hole_at(host),
            (_, Some(Layer::Image(image))) => image.hole_at(depth - 1, host),
            (1, Some(Layer::Raw { file, .. })) => file.hole_at(host),
            _ => Ok(0),
        }
    }

    /// Whether every byte of a guest cluster certainly reads as zero. False when that would need
    /// reading data.
    pub(crate) fn reads_as_zero(&self, cluster: GuestCluster) -> Result<bool> {
        let start = cluster.0 << self.geometry.cluster_bits;
        let end = (start + self.geometry.cluster_bytes()).min(self.size());
        let mut extents = Vec::new();
        self.map_into(start, end, 0, &mut extents)?;
        Ok(extents.iter().all(|extent| extent.zero))
    }
}

fn push(out: &mut Vec<Extent>, extent: Extent) {
    match out.last_mut() {
        Some(last) if last.continues(&extent) => last.length += extent.length,
        _ => out.push(extent),
    }
}
