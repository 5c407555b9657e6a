//! Where the disk's bytes are: runs of equal kind through the backing chain.

use super::Image;
use super::backing::Layer;
use super::file::ImageFile;
use crate::error::Result;
use crate::format::part::Part;
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

/// How far down a walk looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// Through the layers below; seen from so many layers above.
    Chain(u64),
    /// Not below the image itself.
    Alone,
}

impl Scope {
    fn depth(self) -> u64 {
        match self {
            Self::Chain(depth) => depth,
            Self::Alone => 0,
        }
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
        let span = self.geometry.l2_entries() << self.geometry.cluster_bits;
        let mut at = offset;
        while at < offset + len {
            let end = (at / span).saturating_add(1).saturating_mul(span);
            let end = end.min(offset + len);
            // Any cluster's lock keeps the mapping as a whole from being replaced meanwhile.
            let _shared = self.clusters.share(self.geometry.guest_cluster(at));
            self.map_into(at, end, Scope::Chain(0), &mut extents)?;
            at = end;
        }
        Ok(extents)
    }

    /// Files that the disk's bytes can come from: this image and what is open below it. The lowest
    /// has depth `layers() - 1`.
    pub fn layers(&self) -> u64 {
        match &self.backing {
            None => 1,
            Some(Layer::Raw { .. }) => 2,
            Some(Layer::Image(image)) => 1 + image.layers(),
        }
    }

    /// The runs of `start..end` as this image alone has them: what a layer below would show is not
    /// present.
    pub(super) fn map_own(&self, start: u64, end: u64) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        self.map_into(start, end, Scope::Alone, &mut extents)?;
        Ok(extents)
    }

    /// Appends the runs of `start..end`.
    fn map_into(&self, start: u64, end: u64, scope: Scope, out: &mut Vec<Extent>) -> Result<()> {
        let mut at = start;
        while at < end {
            let cluster = self.geometry.guest_cluster(at);
            let (number, _) = self.geometry.table_indexes(cluster);
            let Some(table) = self.table(number)? else {
                let next_table = (crate::convert::to_u64(number) + 1) * self.geometry.l2_entries();
                let stop = next_table
                    .saturating_mul(self.geometry.cluster_bytes())
                    .min(end);
                self.map_below(at, stop, None, scope, out)?;
                at = stop;
                continue;
            };
            let (_, slot) = self.geometry.table_indexes(cluster);
            let entry = self.decode(table.steady_entry(slot), cluster)?;
            let stop = ((cluster.0 + 1) << self.geometry.cluster_bits).min(end);
            while at < stop {
                let inside = self.geometry.offset_in_cluster(at);
                let (part, len) = entry.part(inside, &self.geometry);
                let next = (at + len).min(stop);
                self.map_part(part, at, next, scope, out)?;
                at = next;
            }
        }
        Ok(())
    }

    fn map_part(
        &self,
        part: Part,
        start: u64,
        end: u64,
        scope: Scope,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        let base = Extent {
            start,
            length: end - start,
            depth: scope.depth(),
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: None,
        };
        let shown = |place: HostOffset| self.shown_offset(place).map(|place| place.0);
        let extent = match part {
            Part::Below(reserved) => return self.map_below(start, end, reserved, scope, out),
            Part::Zeros(reserved) => Extent {
                zero: true,
                data: false,
                offset: reserved.and_then(shown),
                ..base
            },
            Part::Data(place) => Extent {
                offset: shown(place),
                ..base
            },
            Part::Compressed(_) => Extent {
                compressed: true,
                ..base
            },
        };
        push(out, extent);
        Ok(())
    }

    /// Appends what shows through; `reserved` is the place that this layer keeps for the start.
    fn map_below(
        &self,
        start: u64,
        end: u64,
        reserved: Option<HostOffset>,
        scope: Scope,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        let nothing = |from: u64| Extent {
            start: from,
            length: end - from,
            depth: scope.depth(),
            present: false,
            zero: true,
            data: false,
            compressed: false,
            offset: reserved
                .and_then(|place| self.shown_offset(place))
                .map(|place| place.0 + (from - start)),
        };
        let (Some(layer), Scope::Chain(depth)) = (&self.backing, scope) else {
            push(out, nothing(start));
            return Ok(());
        };
        let stop = layer.size().clamp(start, end);
        match layer {
            Layer::Image(image) => image.map_into(start, stop, Scope::Chain(depth + 1), out)?,
            Layer::Raw { file, .. } => map_raw(file, start, stop, depth + 1, out)?,
        }
        // Beyond the end of the layer below it is this layer that reads as zero.
        if stop < end {
            push(out, nothing(stop));
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
        self.range_reads_as_zero(start, start + self.geometry.cluster_bytes())
    }

    /// The same for a range of bytes, as far as it lies inside the disk.
    pub(super) fn range_reads_as_zero(&self, start: u64, end: u64) -> Result<bool> {
        let mut extents = Vec::new();
        self.map_into(start, end.min(self.size()), Scope::Chain(0), &mut extents)?;
        Ok(extents.iter().all(|extent| extent.zero))
    }
}

/// Appends the runs of `start..end` of a raw file: its holes read as zero.
pub(crate) fn map_raw(
    file: &ImageFile,
    start: u64,
    end: u64,
    depth: u64,
    out: &mut Vec<Extent>,
) -> Result<()> {
    let mut at = start;
    while at < end {
        let (length, zero) = file.run_at(HostOffset(at), end)?;
        push(
            out,
            Extent {
                start: at,
                length,
                depth,
                present: true,
                zero,
                data: !zero,
                compressed: false,
                offset: Some(at),
            },
        );
        at += length;
    }
    Ok(())
}

fn push(out: &mut Vec<Extent>, extent: Extent) {
    match out.last_mut() {
        Some(last) if last.continues(&extent) => last.length += extent.length,
        _ => out.push(extent),
    }
}
