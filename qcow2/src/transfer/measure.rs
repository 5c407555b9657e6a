//! How large a file a disk would take, as `qemu-img measure` reckons: before a byte is written.

use super::Source;
use crate::convert::to_u64;
use crate::error::{Error, Result};
use crate::format::bitmap::{self, DirectoryEntry};
use crate::geometry::Geometry;
use crate::image::{CreateOptions, Preallocation};
use crate::units::HostOffset;

/// Bytes of disk that are mapped at once.
const WINDOW_BYTES: u64 = 1 << 30;
/// Bytes of an entry of a table.
const ENTRY_BYTES: u64 = 8;

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Bytes that the disk needs as it is now; an upper bound, for the metadata of a full disk is in
    /// it.
    pub required: u64,
    /// Bytes when every cluster of it was written.
    pub fully_allocated: u64,
    /// Bytes that its persistent bitmaps need beside, when all are copied; `None` where source or
    /// target cannot have any.
    pub bitmaps: Option<u64>,
}

/// What is measured.
#[derive(Debug)]
pub enum Measure<'a> {
    /// A new, empty disk of so many bytes.
    Size(u64),
    /// A disk that would be copied.
    Disk(&'a Source),
}

impl Measure<'_> {
    fn size(&self) -> u64 {
        match self {
            Self::Size(size) => size.next_multiple_of(512),
            Self::Disk(source) => source.size(),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Size(_) => "a new disk",
            Self::Disk(source) => source.name(),
        }
    }

    /// Bytes of a raw file.
    pub fn as_raw(&self) -> Measured {
        Measured {
            required: self.size(),
            fully_allocated: self.size(),
            bitmaps: None,
        }
    }

    /// Bytes of a qcow2 file made with these options; their size is not looked at.
    ///
    /// # Errors
    /// Options that no image can have at this size, damaged tables of the source, or I/O.
    pub fn as_qcow2(&self, options: &CreateOptions) -> Result<Measured> {
        let sized = CreateOptions {
            size: self.size(),
            ..options.clone()
        };
        let geometry = sized.geometry().map_err(|mistake| Error::Invalid {
            image: self.name().to_owned(),
            mistake,
        })?;
        let shape = Shape::new(&geometry);
        let whole = self.size().next_multiple_of(shape.cluster);
        let full = shape.full_size(whole);
        let taken = matches!(
            options.preallocation,
            Preallocation::Falloc | Preallocation::Full
        );
        let data = match self {
            _ if taken => whole,
            Self::Size(_) => 0,
            // Nobody knows how much of it the backing file will hold.
            Self::Disk(_) if options.backing.is_some() => whole,
            Self::Disk(source) => data_bytes(source, shape.cluster)?,
        };
        let bitmaps = match self {
            Self::Disk(source) if options.version > 2 => bitmap_bytes(source, shape.cluster)?,
            _ => None,
        };
        Ok(Measured {
            required: full - whole + data,
            fully_allocated: full,
            bitmaps,
        })
    }
}

/// What the sizes of the metadata follow from.
struct Shape {
    cluster: u64,
    l2_entry: u64,
    refcounts_per_block: u64,
}

impl Shape {
    fn new(geometry: &Geometry) -> Self {
        let cluster = geometry.cluster_bytes();
        Self {
            cluster,
            l2_entry: cluster / geometry.l2_entries(),
            refcounts_per_block: geometry.refcounts_per_block(),
        }
    }

    /// Bytes of a file whose disk of `whole` bytes is all data.
    fn full_size(&self, whole: u64) -> u64 {
        let entries = (whole / self.cluster).next_multiple_of(self.cluster / self.l2_entry);
        let l2 = entries * self.l2_entry;
        let tables = (l2 / self.cluster).next_multiple_of(self.cluster / ENTRY_BYTES);
        let counted = self.cluster + l2 + tables * ENTRY_BYTES + whole;
        counted + self.refcount_bytes(counted / self.cluster)
    }

    /// Bytes of the refcount table and of blocks that count `clusters` and themselves.
    fn refcount_bytes(&self, clusters: u64) -> u64 {
        let (mut table, mut blocks) = (0, 0);
        loop {
            let needed = (clusters + table + blocks).div_ceil(self.refcounts_per_block);
            let longer = needed.div_ceil(self.cluster / ENTRY_BYTES);
            if (longer, needed) == (table, blocks) {
                return (table + blocks) * self.cluster;
            }
            (table, blocks) = (longer, needed);
        }
    }
}

/// Bytes of the clusters of the target that would hold data.
fn data_bytes(source: &Source, cluster: u64) -> Result<u64> {
    let (mut at, mut counted, mut bytes) = (0, 0, 0);
    while at < source.size() {
        let len = WINDOW_BYTES.min(source.size() - at);
        for extent in source.map_tables(at, len)? {
            if extent.zero || !extent.data {
                continue;
            }
            // A cluster that holds the end of one run and the start of the next counts once.
            let start = (extent.start / cluster * cluster).max(counted);
            let end = (extent.start + extent.length).next_multiple_of(cluster);
            bytes += end.saturating_sub(start);
            counted = counted.max(end);
        }
        at += len;
    }
    Ok(bytes)
}

fn bitmap_bytes(source: &Source, cluster: u64) -> Result<Option<u64>> {
    let Some(image) = source.as_image() else {
        return Ok(None);
    };
    if image.geometry().version == 2 {
        return Ok(None);
    }
    let (mut bytes, mut directory) = (0, 0);
    for info in image.bitmaps()? {
        let bits = image.size().div_ceil(info.granularity.bytes());
        let pages = bits.div_ceil(8).div_ceil(cluster);
        bytes += pages * cluster + (pages * ENTRY_BYTES).next_multiple_of(cluster);
        let entry = DirectoryEntry {
            table_offset: HostOffset::ZERO,
            table_entries: 0,
            in_use: false,
            auto: false,
            granularity: info.granularity,
            name: info.name.into_bytes(),
        };
        directory += to_u64(bitmap::encode_directory(&[entry]).len());
    }
    Ok(Some(bytes + directory.next_multiple_of(cluster)))
}
