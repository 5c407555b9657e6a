//! Entries of the mapping tables (format, section "Cluster mapping").

use super::subclusters::Subclusters;
use crate::error::Damage;
use crate::geometry::Geometry;
use crate::units::{HostCluster, HostOffset};

/// Refcount of the referenced cluster is exactly one: it may be written in place.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// A checked L1 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Entry {
    /// No L2 table: everything below is unallocated.
    Unallocated,
    /// An L2 table.
    Table {
        /// Its host offset.
        offset: HostOffset,
        /// Whether it belongs to the active L1 alone and may be changed in place.
        copied: bool,
    },
}

impl L1Entry {
    /// Decodes entry `index`.
    ///
    /// # Errors
    /// An L2 table that is not cluster aligned. Reserved bits are tolerated, as QEMU does.
    pub fn decode(entry: u64, index: u64, geometry: &Geometry) -> Result<Self, Damage> {
        let offset = HostOffset(entry & OFFSET_MASK);
        if offset == HostOffset::ZERO {
            return Ok(Self::Unallocated);
        }
        if !geometry.is_aligned(offset) {
            let problem = "the L2 table is not cluster aligned";
            return Err(Damage::Entry {
                table: "L1",
                index,
                entry,
                problem,
            });
        }
        Ok(Self::Table {
            offset,
            copied: entry & COPIED != 0,
        })
    }

    /// The entry for an L2 table that only the active L1 refers to.
    pub const fn encode(offset: HostOffset) -> u64 {
        offset.0 | COPIED
    }
}

/// An L2 entry as it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawL2 {
    /// The first word: host offset and flags.
    pub entry: u64,
    /// The second word of an extended entry, see [`Subclusters`]. Zero where entries have one word.
    pub subclusters: u64,
}

impl RawL2 {
    /// Nothing here.
    pub const UNALLOCATED: Self = Self {
        entry: 0,
        subclusters: 0,
    };

    /// A whole cluster of data with a reference count of one.
    pub fn normal(offset: HostOffset, geometry: &Geometry) -> Self {
        Self {
            entry: offset.0 | COPIED,
            subclusters: match geometry.extended_l2 {
                true => Subclusters::ALLOCATED.encode(),
                false => 0,
            },
        }
    }

    /// A whole cluster that reads as zero, with nothing allocated.
    pub fn zero(geometry: &Geometry) -> Self {
        match geometry.extended_l2 {
            true => Self::partial(None, false, Subclusters::ZERO),
            false => Self::from(ZERO),
        }
    }

    /// An extended entry whose subclusters differ.
    pub fn partial(host: Option<HostOffset>, copied: bool, subclusters: Subclusters) -> Self {
        let flag = if copied { COPIED } else { 0 };
        Self {
            entry: host.map_or(0, |host| host.0 | flag),
            subclusters: subclusters.encode(),
        }
    }
}

impl From<u64> for RawL2 {
    fn from(entry: u64) -> Self {
        let subclusters = 0;
        Self { entry, subclusters }
    }
}

/// Bytes of the unit that lengths of compressed data are counted in.
const SECTOR: u64 = 512;

/// Where the data of one compressed cluster lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompressedData {
    /// Its first byte, any alignment.
    pub offset: HostOffset,
    /// Bytes up to the end of its last sector, under two clusters and a sector; the stream may end
    /// before, and data of another cluster may follow.
    pub bytes: u64,
}

impl CompressedData {
    /// Host offsets that a descriptor can hold end here.
    pub const fn offset_limit(geometry: &Geometry) -> HostOffset {
        HostOffset(1 << compressed_offset_bits(geometry))
    }

    /// First host cluster that holds a byte of it, and how many do.
    pub const fn clusters(&self, geometry: &Geometry) -> (HostCluster, u64) {
        let first = geometry.host_cluster(self.offset);
        let last = geometry.host_cluster(HostOffset(self.offset.0 + self.bytes - 1));
        (first, last.0 - first.0 + 1)
    }

    /// End of its last sector.
    pub const fn end(&self) -> HostOffset {
        HostOffset(self.offset.0 + self.bytes)
    }
}

/// Bits of a compressed descriptor that hold the offset; the rest counts sectors.
const fn compressed_offset_bits(geometry: &Geometry) -> u32 {
    62 - (geometry.cluster_bits - 8)
}

/// What one guest cluster maps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Nothing here: the backing file shows through, or zeros.
    Unallocated,
    /// Reads as zero; a host cluster may be reserved for it.
    Zero {
        /// Host cluster that is kept allocated.
        allocated: Option<HostOffset>,
        /// Whether that cluster belongs to this entry alone.
        copied: bool,
    },
    /// Data.
    Normal {
        /// First byte of the host cluster.
        offset: HostOffset,
        /// Whether it belongs to this entry alone and may be written in place.
        copied: bool,
    },
    /// An extended entry whose subclusters are not all data, nor all zero.
    Partial {
        /// Host cluster with a place for each subcluster, whether or not it is allocated.
        host: Option<HostOffset>,
        /// Whether that cluster belongs to this entry alone and may be written in place.
        copied: bool,
        /// What each subcluster is; some of them are allocated only with a host cluster.
        subclusters: Subclusters,
    },
    /// Compressed data.
    Compressed {
        /// First byte of the compressed data, any alignment.
        offset: u64,
        /// Whole 512-byte sectors behind the one that holds the first byte.
        additional_sectors: u64,
    },
}

impl L2Entry {
    /// Decodes the entry of guest cluster `cluster`.
    ///
    /// # Errors
    /// A data cluster that is not aligned, a zero flag in version 2, or subclusters that
    /// contradict one another or the rest of the entry; with an external data file a compressed
    /// cluster, or one that is not where it is on the disk.
    pub fn decode(raw: RawL2, cluster: u64, geometry: &Geometry) -> Result<Self, Damage> {
        let RawL2 { entry, subclusters } = raw;
        let damage = |problem| Damage::Entry {
            table: "L2",
            index: cluster,
            entry,
            problem,
        };
        if entry & COMPRESSED != 0 {
            if geometry.external_data {
                return Err(damage("an external data file has no compressed clusters"));
            }
            if subclusters != 0 {
                return Err(damage("a compressed cluster has no subclusters"));
            }
            let offset_bits = compressed_offset_bits(geometry);
            return Ok(Self::Compressed {
                offset: entry & ((1 << offset_bits) - 1),
                additional_sectors: (entry & (COMPRESSED - 1)) >> offset_bits,
            });
        }
        let offset = HostOffset(entry & OFFSET_MASK);
        let copied = entry & COPIED != 0;
        if !geometry.is_aligned(offset) {
            return Err(damage("the data cluster is not cluster aligned"));
        }
        // In an external data file cluster 0 is a place like others, told by the flag.
        let named = offset != HostOffset::ZERO || geometry.external_data && copied;
        if geometry.external_data && named && offset.0 >> geometry.cluster_bits != cluster {
            let problem = "the external data file has this cluster at another place";
            return Err(damage(problem));
        }
        if geometry.extended_l2 {
            // Bit 0 of the first word means nothing here.
            return Self::decode_extended(named.then_some(offset), copied, subclusters)
                .map_err(damage);
        }
        if entry & ZERO != 0 {
            if geometry.version == 2 {
                return Err(damage("zero clusters do not exist in version 2"));
            }
            let allocated = named.then_some(offset);
            return Ok(Self::Zero { allocated, copied });
        }
        if !named {
            return Ok(Self::Unallocated);
        }
        Ok(Self::Normal { offset, copied })
    }

    fn decode_extended(
        host: Option<HostOffset>,
        copied: bool,
        subclusters: u64,
    ) -> Result<Self, &'static str> {
        let subclusters = Subclusters::decode(subclusters)
            .ok_or("a subcluster is allocated and reads as zero at once")?;
        if host.is_none() && subclusters.any_allocated() {
            return Err("subclusters are allocated without a host cluster");
        }
        Ok(match host {
            Some(offset) if subclusters == Subclusters::ALLOCATED => {
                Self::Normal { offset, copied }
            }
            None if subclusters == Subclusters::UNALLOCATED => Self::Unallocated,
            allocated if subclusters == Subclusters::ZERO => Self::Zero { allocated, copied },
            host => Self::Partial {
                host,
                copied,
                subclusters,
            },
        })
    }

    /// The entry for `bytes` bytes of compressed data at `offset`, which is below
    /// [`CompressedData::offset_limit`]; under a cluster of them.
    pub const fn encode_compressed(offset: HostOffset, bytes: u64, geometry: &Geometry) -> u64 {
        let additional_sectors = (offset.0 + bytes - 1) / SECTOR - offset.0 / SECTOR;
        COMPRESSED | additional_sectors << compressed_offset_bits(geometry) | offset.0
    }

    /// Host clusters that it refers to: the first, and how many.
    pub const fn host_run(&self, geometry: &Geometry) -> Option<(HostCluster, u64)> {
        match (self.compressed(), self.host_cluster()) {
            (Some(data), _) => Some(data.clusters(geometry)),
            (None, Some(offset)) => Some((geometry.host_cluster(offset), 1)),
            (None, None) => None,
        }
    }

    /// Where the data of a compressed cluster lies.
    pub const fn compressed(&self) -> Option<CompressedData> {
        match *self {
            Self::Compressed {
                offset,
                additional_sectors,
            } => Some(CompressedData {
                offset: HostOffset(offset),
                bytes: (additional_sectors + 1) * SECTOR - offset % SECTOR,
            }),
            _ => None,
        }
    }

    /// The host cluster, if it holds data and may be written in place.
    pub const fn own_host(&self) -> Option<HostOffset> {
        match *self {
            Self::Normal {
                offset,
                copied: true,
            } => Some(offset),
            Self::Partial {
                host, copied: true, ..
            } => host,
            _ => None,
        }
    }

    /// The same, as of a cluster that is not ours alone.
    pub const fn shared(self) -> Self {
        match self {
            Self::Normal { offset, .. } => Self::Normal {
                offset,
                copied: false,
            },
            Self::Partial {
                host, subclusters, ..
            } => Self::Partial {
                host,
                copied: false,
                subclusters,
            },
            other => other,
        }
    }

    /// The uncompressed host cluster that the entry refers to, if any.
    pub const fn host_cluster(&self) -> Option<HostOffset> {
        match *self {
            Self::Normal { offset, .. } => Some(offset),
            Self::Zero { allocated, .. } => allocated,
            Self::Partial { host, .. } => host,
            Self::Unallocated | Self::Compressed { .. } => None,
        }
    }

    /// What each subcluster is, as if the entry was an extended one. Of a compressed cluster all
    /// count as allocated.
    pub const fn subclusters(&self) -> Subclusters {
        match *self {
            Self::Unallocated => Subclusters::UNALLOCATED,
            Self::Zero { .. } => Subclusters::ZERO,
            Self::Partial { subclusters, .. } => subclusters,
            Self::Normal { .. } | Self::Compressed { .. } => Subclusters::ALLOCATED,
        }
    }
}
