//! The qcow2 header: bytes to checked value and back (format, section "Header").

use byteorder::{BigEndian, ByteOrder};

use super::limits;
use crate::convert::{index, to_usize};
use crate::error::{Damage, Feature, FormatError};
use crate::geometry::Geometry;
use crate::units::HostOffset;

/// `QFI\xfb`.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header; its extensions start right behind.
pub const V2_LENGTH: usize = 72;
/// Bytes of the shortest version 3 header.
pub const V3_MIN_LENGTH: usize = 104;
/// Bytes of the header that we write.
pub const V3_LENGTH: usize = 112;

/// Incompatible feature bits (format, section "Header", bytes 72 to 79).
pub mod incompatible {
    /// Refcounts may be stale.
    pub const DIRTY: u64 = 1;
    /// Some structure is known to be wrong.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data lies in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Compressed clusters are not zlib.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have 16 bytes and subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
}

/// Compatible feature bits.
pub mod compatible {
    /// Refcount updates may be postponed while the dirty bit is set.
    pub const LAZY_REFCOUNTS: u64 = 1;
}

/// Autoclear feature bits.
pub mod autoclear {
    /// The bitmaps extension agrees with the disk's content.
    pub const BITMAPS: u64 = 1;
    /// The external data file is a raw image of the disk.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
}

/// A header whose fields have been checked against the format and the limits.
///
/// | bytes | field | | bytes | field |
/// |---|---|---|---|---|
/// | 0..4 | magic | | 60..64 | snapshot_count |
/// | 4..8 | version | | 64..72 | snapshots_offset |
/// | 8..16 | backing_name_offset | | 72..80 | incompatible |
/// | 16..20 | backing_name_length | | 80..88 | compatible |
/// | 20..24 | cluster_bits | | 88..96 | autoclear |
/// | 24..32 | disk_bytes | | 96..100 | refcount_order |
/// | 32..36 | encryption | | 100..104 | header_length |
/// | 36..40 | l1_entries | | 104 | compression_type |
/// | 40..48 | l1_offset | | 105..112 | zero |
/// | 48..56 | refcount_table_offset | | 112.. | unknown fields, kept |
/// | 56..60 | refcount_table_clusters | | | |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version, cluster size and refcount width.
    pub geometry: Geometry,
    /// Where the backing file's name lies in the first cluster; zero when there is none.
    pub backing_name_offset: u64,
    /// Bytes of the backing file's name.
    pub backing_name_length: u32,
    /// Virtual size of the disk, rounded down to 512 as QEMU does.
    pub disk_bytes: u64,
    /// Encryption method: 0 none, 1 AES, 2 LUKS.
    pub encryption: u32,
    /// Entries of the active L1 table; may be more than the disk needs.
    pub l1_entries: u32,
    /// Host offset of the active L1 table.
    pub l1_offset: HostOffset,
    /// Host offset of the refcount table.
    pub refcount_table_offset: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Host offset of the snapshot table.
    pub snapshots_offset: HostOffset,
    /// Incompatible feature bits; unknown ones are refused by the caller, who knows their names.
    pub incompatible: u64,
    /// Compatible feature bits, unknown ones kept.
    pub compatible: u64,
    /// Autoclear feature bits as read; unknown ones are cleared by the first write.
    pub autoclear: u64,
    /// 0 zlib, 1 zstd.
    pub compression_type: u8,
    /// Bytes of the header; extensions start there.
    pub length: usize,
    /// Fields behind byte 112 that we do not know, kept verbatim.
    pub unknown_tail: Vec<u8>,
}

impl Header {
    /// Parses and checks the header at the start of `bytes` (the first cluster, or as much of it
    /// as the file has).
    ///
    /// # Errors
    /// [`Feature::NotQcow2`], [`Feature::Version`] or the field that is out of its range.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FormatError> {
        let magic: [u8; 4] = bytes.first_chunk().copied().unwrap_or_default();
        if magic != MAGIC {
            return Err(Feature::NotQcow2 { magic }.into());
        }
        let fixed: &[u8; V2_LENGTH] = bytes.first_chunk().ok_or(Damage::Truncated {
            structure: "header",
        })?;
        let version = BigEndian::read_u32(&fixed[4..8]);
        if version != 2 && version != 3 {
            return Err(Feature::Version(version).into());
        }
        let tail = if version == 2 {
            Tail::VERSION_2
        } else {
            Tail::from_bytes(bytes)?
        };
        let header = Self {
            geometry: Geometry {
                cluster_bits: BigEndian::read_u32(&fixed[20..24]),
                refcount_order: tail.refcount_order,
                version,
                extended_l2: tail.incompatible & incompatible::EXTENDED_L2 != 0,
                external_data: tail.incompatible & incompatible::DATA_FILE != 0,
            },
            backing_name_offset: BigEndian::read_u64(&fixed[8..16]),
            backing_name_length: BigEndian::read_u32(&fixed[16..20]),
            disk_bytes: BigEndian::read_u64(&fixed[24..32]) & !511,
            encryption: BigEndian::read_u32(&fixed[32..36]),
            l1_entries: BigEndian::read_u32(&fixed[36..40]),
            l1_offset: HostOffset(BigEndian::read_u64(&fixed[40..48])),
            refcount_table_offset: HostOffset(BigEndian::read_u64(&fixed[48..56])),
            refcount_table_clusters: BigEndian::read_u32(&fixed[56..60]),
            snapshot_count: BigEndian::read_u32(&fixed[60..64]),
            snapshots_offset: HostOffset(BigEndian::read_u64(&fixed[64..72])),
            incompatible: tail.incompatible,
            compatible: tail.compatible,
            autoclear: tail.autoclear,
            compression_type: tail.compression_type,
            length: tail.length,
            unknown_tail: tail.unknown,
        };
        header.check()?;
        Ok(header)
    }

    /// The autoclear bits that stay true when we write: that of the bitmaps, when there is a
    /// directory, and that of a raw data file, which our writes keep equal to the disk.
    pub fn upheld_autoclear(&self, has_bitmaps: bool) -> u64 {
        let mut upheld = 0;
        if has_bitmaps {
            upheld |= autoclear::BITMAPS;
        }
        if self.geometry.external_data {
            upheld |= self.autoclear & autoclear::RAW_DATA_FILE;
        }
        upheld
    }

    /// Whether the external data file is a raw image of the disk.
    pub fn has_raw_data_file(&self) -> bool {
        self.geometry.external_data && self.autoclear & autoclear::RAW_DATA_FILE != 0
    }

    /// Writes the header into the start of `sector`, which must hold at least its length.
    pub fn write(&self, sector: &mut [u8]) {
        sector[..4].copy_from_slice(&MAGIC);
        BigEndian::write_u32(&mut sector[4..8], self.geometry.version);
        BigEndian::write_u64(&mut sector[8..16], self.backing_name_offset);
        BigEndian::write_u32(&mut sector[16..20], self.backing_name_length);
        BigEndian::write_u32(&mut sector[20..24], self.geometry.cluster_bits);
        BigEndian::write_u64(&mut sector[24..32], self.disk_bytes);
        BigEndian::write_u32(&mut sector[32..36], self.encryption);
        BigEndian::write_u32(&mut sector[36..40], self.l1_entries);
        BigEndian::write_u64(&mut sector[40..48], self.l1_offset.0);
        BigEndian::write_u64(&mut sector[48..56], self.refcount_table_offset.0);
        BigEndian::write_u32(&mut sector[56..60], self.refcount_table_clusters);
        BigEndian::write_u32(&mut sector[60..64], self.snapshot_count);
        BigEndian::write_u64(&mut sector[64..72], self.snapshots_offset.0);
        if self.geometry.version == 2 {
            return;
        }
        BigEndian::write_u64(&mut sector[72..80], self.incompatible);
        BigEndian::write_u64(&mut sector[80..88], self.compatible);
        BigEndian::write_u64(&mut sector[88..96], self.autoclear);
        BigEndian::write_u32(&mut sector[96..100], self.geometry.refcount_order);
        let length = u32::try_from(self.length).unwrap_or(u32::MAX);
        BigEndian::write_u32(&mut sector[100..104], length);
        if self.length >= V3_LENGTH {
            sector[104] = self.compression_type;
            sector[105..V3_LENGTH].fill(0);
            sector[V3_LENGTH..self.length].copy_from_slice(&self.unknown_tail);
        }
    }

    fn check(&self) -> Result<(), FormatError> {
        let field = |field, value| Err(Damage::HeaderField { field, value }.into());
        let geometry = &self.geometry;
        if !(limits::MIN_CLUSTER_BITS..=limits::MAX_CLUSTER_BITS).contains(&geometry.cluster_bits) {
            return field("cluster_bits", geometry.cluster_bits.into());
        }
        if geometry.extended_l2 && geometry.cluster_bits < limits::MIN_EXTENDED_CLUSTER_BITS {
            return field("cluster_bits", geometry.cluster_bits.into());
        }
        if geometry.refcount_order > limits::MAX_REFCOUNT_ORDER {
            return field("refcount_order", geometry.refcount_order.into());
        }
        if self.length > geometry.cluster_len() {
            return field("header_length", crate::convert::to_u64(self.length));
        }
        if self.disk_bytes > limits::MAX_DISK_BYTES {
            return field("size", self.disk_bytes);
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > limits::MAX_L1_BYTES
            || u64::from(self.l1_entries) < geometry.l1_entries_for(self.disk_bytes)
        {
            return field("l1_size", self.l1_entries.into());
        }
        let table_bytes = u64::from(self.refcount_table_clusters) << geometry.cluster_bits;
        if table_bytes > limits::MAX_REFCOUNT_TABLE_BYTES || table_bytes == 0 {
            return field(
                "refcount_table_clusters",
                self.refcount_table_clusters.into(),
            );
        }
        if self.snapshot_count > limits::MAX_SNAPSHOTS {
            return field("nb_snapshots", self.snapshot_count.into());
        }
        self.check_offsets()?;
        self.check_backing_name()
    }

    fn check_offsets(&self) -> Result<(), FormatError> {
        let places = [
            ("l1_table_offset", self.l1_offset),
            ("refcount_table_offset", self.refcount_table_offset),
            ("snapshots_offset", self.snapshots_offset),
        ];
        for (field, offset) in places {
            if !self.geometry.is_aligned(offset) || offset.0 >= limits::MAX_HOST_OFFSET {
                return Err(Damage::HeaderField {
                    field,
                    value: offset.0,
                }
                .into());
            }
        }
        Ok(())
    }

    fn check_backing_name(&self) -> Result<(), FormatError> {
        if self.backing_name_offset == 0 {
            return Ok(());
        }
        let end = self
            .backing_name_offset
            .checked_add(self.backing_name_length.into());
        if self.backing_name_length > limits::MAX_BACKING_NAME_BYTES {
            let value = self.backing_name_length.into();
            return Err(Damage::HeaderField {
                field: "backing_file_size",
                value,
            }
            .into());
        }
        if end.is_none_or(|end| end > self.geometry.cluster_bytes())
            || to_usize(self.backing_name_offset) < self.length
        {
            let value = self.backing_name_offset;
            return Err(Damage::HeaderField {
                field: "backing_file_offset",
                value,
            }
            .into());
        }
        Ok(())
    }
}

/// What version 3 adds behind byte 72.
struct Tail {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    length: usize,
    compression_type: u8,
    unknown: Vec<u8>,
}

impl Tail {
    const VERSION_2: Self = Self {
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: 4,
        length: V2_LENGTH,
        compression_type: 0,
        unknown: Vec::new(),
    };

    fn from_bytes(bytes: &[u8]) -> Result<Self, FormatError> {
        let short = Damage::Truncated {
            structure: "header",
        };
        let fixed: &[u8; V3_MIN_LENGTH] = bytes.first_chunk().ok_or(short.clone())?;
        let raw_length = BigEndian::read_u32(&fixed[100..104]);
        let length = index(raw_length);
        // The format asks for a multiple of 8; without it the extensions cannot be found.
        if length < V3_MIN_LENGTH || !length.is_multiple_of(8) {
            let value = raw_length.into();
            return Err(Damage::HeaderField {
                field: "header_length",
                value,
            }
            .into());
        }
        let whole = bytes.get(..length).ok_or(short)?;
        let incompatible = BigEndian::read_u64(&fixed[72..80]);
        let compression_type = whole.get(V3_MIN_LENGTH).copied().unwrap_or(0);
        let compression_bit = incompatible & incompatible::COMPRESSION != 0;
        if compression_type > 1 || compression_bit != (compression_type != 0) {
            let value = compression_type.into();
            return Err(Damage::HeaderField {
                field: "compression_type",
                value,
            }
            .into());
        }
        Ok(Self {
            incompatible,
            compatible: BigEndian::read_u64(&fixed[80..88]),
            autoclear: BigEndian::read_u64(&fixed[88..96]),
            refcount_order: BigEndian::read_u32(&fixed[96..100]),
            length,
            compression_type,
            unknown: whole.get(V3_LENGTH..).unwrap_or_default().to_vec(),
        })
    }
}
