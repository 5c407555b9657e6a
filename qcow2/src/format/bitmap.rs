//! Addresses of persistent bitmaps: header extension, directory, table
//! (format, section "Bitmaps extension" and "Bitmap directory").

use byteorder::{BigEndian, ByteOrder};
use tidemark_bitmap::Granularity;

use super::limits;
use super::table::OFFSET_MASK;
use crate::convert::{index, to_u16, to_u64, to_usize};
use crate::error::Damage;
use crate::geometry::Geometry;
use crate::units::HostOffset;

/// Bytes of the extension's data; exactly this many.
pub const EXTENSION_BYTES: usize = 24;
/// Bytes of a directory entry before extra data and name.
pub(crate) const ENTRY_BYTES: usize = 24;
const IN_USE: u32 = 1;
const AUTO: u32 = 1 << 1;
const KNOWN_TYPE: u8 = 1;

/// The bitmaps extension: where the directory is.
///
/// | bytes | field |
/// |---|---|
/// | 0..4 | count |
/// | 4..8 | zero |
/// | 8..16 | directory_bytes |
/// | 16..24 | directory_offset |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps, at least one.
    pub count: u32,
    /// Bytes of the directory, exactly.
    pub directory_bytes: u64,
    /// Host offset of the directory.
    pub directory_offset: HostOffset,
}

impl BitmapsExtension {
    /// Decodes and checks the extension's data, found at `offset` of the file.
    ///
    /// # Errors
    /// Every violation that makes QEMU refuse the image.
    pub fn decode(data: &[u8], offset: usize, geometry: &Geometry) -> Result<Self, Damage> {
        let damage = |problem| Damage::Extension {
            kind: super::extension::BITMAPS,
            length: to_u64(data.len()),
            offset: to_u64(offset),
            problem,
        };
        let data: &[u8; EXTENSION_BYTES] = data
            .try_into()
            .map_err(|_| damage("it must have exactly 24 bytes"))?;
        let extension = Self {
            count: BigEndian::read_u32(&data[..4]),
            directory_bytes: BigEndian::read_u64(&data[8..16]),
            directory_offset: HostOffset(BigEndian::read_u64(&data[16..])),
        };
        if BigEndian::read_u32(&data[4..8]) != 0 {
            return Err(damage("its reserved field is not zero"));
        }
        if extension.count == 0 || extension.count > limits::MAX_BITMAPS {
            return Err(damage("it must name 1 to 65535 bitmaps"));
        }
        if extension.directory_bytes == 0
            || extension.directory_bytes > limits::MAX_BITMAP_DIRECTORY_BYTES
        {
            return Err(damage("the directory's size is out of range"));
        }
        let place = extension.directory_offset;
        if place == HostOffset::ZERO
            || !geometry.is_aligned(place)
            || place.0 >= limits::MAX_HOST_OFFSET
        {
            return Err(damage("the directory's offset is invalid"));
        }
        Ok(extension)
    }

    /// The fields as they stand, of data that [`decode`](Self::decode) refuses.
    pub(crate) fn decode_broken(data: &[u8]) -> Self {
        let mut whole = [0; EXTENSION_BYTES];
        let length = data.len().min(EXTENSION_BYTES);
        whole[..length].copy_from_slice(&data[..length]);
        Self {
            count: BigEndian::read_u32(&whole[..4]),
            directory_bytes: BigEndian::read_u64(&whole[8..16]),
            directory_offset: HostOffset(BigEndian::read_u64(&whole[16..])),
        }
    }

    /// The extension's data.
    pub fn encode(&self) -> [u8; EXTENSION_BYTES] {
        let mut data = [0; EXTENSION_BYTES];
        BigEndian::write_u32(&mut data[..4], self.count);
        BigEndian::write_u64(&mut data[8..16], self.directory_bytes);
        BigEndian::write_u64(&mut data[16..], self.directory_offset.0);
        data
    }
}

/// One entry of the bitmap directory.
///
/// | bytes | field |
/// |---|---|
/// | 0..8 | table_offset |
/// | 8..12 | table_entries |
/// | 12..16 | flags: bit 0 in use, bit 1 auto |
/// | 16 | type, 1 |
/// | 17 | granularity bits |
/// | 18..20 | bytes of the name |
/// | 20..24 | bytes of extra data |
/// | 24.. | extra data, name, padding to 8 |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Host offset of the bitmap table.
    pub table_offset: HostOffset,
    /// Entries of the bitmap table.
    pub table_entries: u32,
    /// A writer holds it or died holding it: its bits cannot be trusted.
    pub in_use: bool,
    /// It records every write.
    pub auto: bool,
    /// Bytes of disk per bit.
    pub granularity: Granularity,
    /// Its name, any bytes but none of them checked to be text.
    pub name: Vec<u8>,
}

impl DirectoryEntry {
    /// The name as text, as [`BitmapInfo`](crate::BitmapInfo) has it.
    pub fn text(&self) -> String {
        crate::bitmaps::name::text(&self.name)
    }

    /// Bytes the entry takes in the directory.
    pub fn span(&self) -> usize {
        (ENTRY_BYTES + self.name.len()).next_multiple_of(8)
    }

    fn write(&self, out: &mut Vec<u8>) {
        let mut fixed = [0; ENTRY_BYTES];
        BigEndian::write_u64(&mut fixed[..8], self.table_offset.0);
        BigEndian::write_u32(&mut fixed[8..12], self.table_entries);
        let flags = if self.in_use { IN_USE } else { 0 } | if self.auto { AUTO } else { 0 };
        BigEndian::write_u32(&mut fixed[12..16], flags);
        fixed[16] = KNOWN_TYPE;
        fixed[17] = self.granularity.bits();
        BigEndian::write_u16(&mut fixed[18..20], to_u16(self.name.len()));
        out.extend_from_slice(&fixed);
        out.extend_from_slice(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }

    /// Decodes the entry at the start of `bytes`.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub(crate) fn decode(bytes: &[u8], number: usize, geometry: &Geometry) -> Result<Self, Damage> {
        let damage = |problem| Damage::BitmapDirectory {
            index: number,
            problem,
        };
        let fixed: &[u8; ENTRY_BYTES] = bytes
            .first_chunk()
            .ok_or(damage("the directory ends inside the entry"))?;
        let table_offset = HostOffset(BigEndian::read_u64(&fixed[..8]));
        let table_entries = BigEndian::read_u32(&fixed[8..12]);
        let flags = BigEndian::read_u32(&fixed[12..16]);
        let name_len: usize = BigEndian::read_u16(&fixed[18..20]).into();
        if fixed[16] != KNOWN_TYPE {
            return Err(damage("unknown bitmap type"));
        }
        if flags & !(IN_USE | AUTO) != 0 {
            return Err(damage("unknown flags"));
        }
        if BigEndian::read_u32(&fixed[20..24]) != 0 {
            return Err(damage("extra data is not supported (QEMU refuses it too)"));
        }
        let granularity = Granularity::from_bits(fixed[17])
            .ok_or(damage("the granularity is not between 512 bytes and 2 GiB"))?;
        if table_offset == HostOffset::ZERO
            || !geometry.is_aligned(table_offset)
            || table_offset.0 >= limits::MAX_HOST_OFFSET
        {
            return Err(damage("the offset of the bitmap table is invalid"));
        }
        let data_bytes = u64::from(table_entries) << geometry.cluster_bits;
        if data_bytes == 0 || data_bytes > limits::MAX_BITMAP_BYTES.max(geometry.cluster_bytes()) {
            return Err(damage("the size of the bitmap table is out of range"));
        }
        if name_len == 0 {
            return Err(damage("the name is empty"));
        }
        let name = bytes
            .get(ENTRY_BYTES..ENTRY_BYTES + name_len)
            .ok_or(damage("the directory ends inside the name"))?;
        if name_len > limits::MAX_BITMAP_NAME_BYTES {
            return Err(damage("the name is longer than 1023 bytes"));
        }
        Ok(Self {
            table_offset,
            table_entries,
            in_use: flags & IN_USE != 0,
            auto: flags & AUTO != 0,
            granularity,
            name: name.to_vec(),
        })
    }
}

/// Decodes a whole directory, which must hold exactly the entries that the extension counts.
///
/// # Errors
/// The first entry that breaks a rule. Two entries of one name are refused.
pub fn decode_directory(
    bytes: &[u8],
    count: u32,
    geometry: &Geometry,
) -> Result<Vec<DirectoryEntry>, Damage> {
    let mut entries: Vec<DirectoryEntry> = Vec::new();
    let mut names = std::collections::HashSet::new();
    let mut rest = bytes;
    for number in 0..index(count) {
        let damage = |problem| Damage::BitmapDirectory {
            index: number,
            problem,
        };
        let entry = DirectoryEntry::decode(rest, number, geometry)?;
        rest = rest
            .get(entry.span()..)
            .ok_or(damage("the directory ends inside the entry"))?;
        if !names.insert(entry.name.clone()) {
            return Err(damage("a bitmap of that name stands before it"));
        }
        entries.push(entry);
    }
    if !rest.is_empty() {
        let problem = "the directory goes on behind the last entry";
        return Err(Damage::BitmapDirectory {
            index: entries.len(),
            problem,
        });
    }
    Ok(entries)
}

/// The directory's bytes.
pub fn encode_directory(entries: &[DirectoryEntry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        entry.write(&mut out);
    }
    out
}

/// One entry of a bitmap table: where one page of bits is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableEntry {
    /// All bits of the page are zero.
    Zeros,
    /// All bits of the page are one.
    Ones,
    /// The page is in a cluster.
    Cluster(HostOffset),
}

impl TableEntry {
    /// Decodes entry `number`.
    ///
    /// # Errors
    /// Reserved bits, an unaligned cluster, or all-ones together with a cluster.
    pub fn decode(entry: u64, number: u64, geometry: &Geometry) -> Result<Self, Damage> {
        let offset = HostOffset(entry & OFFSET_MASK);
        let problem = if entry & !(OFFSET_MASK | 1) != 0 {
            "reserved bits are set"
        } else if !geometry.is_aligned(offset) {
            "the cluster is not aligned"
        } else if offset != HostOffset::ZERO && entry & 1 != 0 {
            "all ones together with a cluster"
        } else {
            return Ok(match (offset, entry & 1) {
                (HostOffset::ZERO, 0) => Self::Zeros,
                (HostOffset::ZERO, _) => Self::Ones,
                (cluster, _) => Self::Cluster(cluster),
            });
        };
        Err(Damage::Entry {
            table: "bitmap table",
            index: number,
            entry,
            problem,
        })
    }

    /// The raw entry.
    pub const fn encode(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Ones => 1,
            Self::Cluster(offset) => offset.0,
        }
    }
}

/// Decodes a bitmap table from its bytes.
///
/// # Errors
/// The first entry that breaks a rule.
pub fn decode_table(bytes: &[u8], geometry: &Geometry) -> Result<Vec<TableEntry>, Damage> {
    bytes
        .chunks_exact(8)
        .enumerate()
        .map(|(number, entry)| {
            TableEntry::decode(BigEndian::read_u64(entry), to_u64(number), geometry)
        })
        .collect()
}

/// Bytes of a table.
pub fn encode_table(entries: &[TableEntry]) -> Vec<u8> {
    let raw: Vec<u64> = entries.iter().map(|entry| entry.encode()).collect();
    let mut bytes = vec![0; to_usize(Geometry::entries_bytes(raw.len()))];
    BigEndian::write_u64_into(&raw, &mut bytes);
    bytes
}
