//! Entries of the mapping tables (format, section "Cluster mapping").

use crate::error::Damage;
use crate::geometry::Geometry;
use crate::units::HostOffset;

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
    /// The second word of an extended entry: a bit each for 32 allocated subclusters, then a bit
    /// each for those that read as zero. Zero where entries have one word.
    pub subclusters: u64,
}

impl From<u64> for RawL2 {
    fn from(entry: u64) -> Self {
        let subclusters = 0;
        Self { entry, subclusters }
    }
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
    /// A data cluster that is not aligned, or a zero flag in version 2.
    pub fn decode(raw: RawL2, cluster: u64, geometry: &Geometry) -> Result<Self, Damage> {
        let RawL2 { entry, .. } = raw;
        let damage = |problem| Damage::Entry {
            table: "L2",
            index: cluster,
            entry,
            problem,
        };
        if entry & COMPRESSED != 0 {
            let offset_bits = 62 - (geometry.cluster_bits - 8);
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
        if entry & ZERO != 0 {
            if geometry.version == 2 {
                return Err(damage("zero clusters do not exist in version 2"));
            }
            let allocated = (offset != HostOffset::ZERO).then_some(offset);
            return Ok(Self::Zero { allocated, copied });
        }
        if offset == HostOffset::ZERO {
            return Ok(Self::Unallocated);
        }
        Ok(Self::Normal { offset, copied })
    }

    /// The entry for a data cluster with a reference count of one.
    pub const fn encode_normal(offset: HostOffset) -> u64 {
        offset.0 | COPIED
    }

    /// The entry for "reads as zero", with nothing allocated.
    pub const fn encode_zero() -> u64 {
        ZERO
    }
}
