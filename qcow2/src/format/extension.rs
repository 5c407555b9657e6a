//! Header extensions: the typed blocks between the header and the backing name
//! (format, section "Header extensions").

use byteorder::{BigEndian, ByteOrder};

use super::header::Header;
use crate::convert::{index, low_byte, to_u64};
use crate::error::{Damage, FormatError};

/// Ends the list.
pub const END: u32 = 0;
/// Format of the backing file, a string.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the LUKS header lies.
pub const ENCRYPTION: u32 = 0x0537_be77;
/// Where the bitmap directory lies.
pub const BITMAPS: u32 = 0x2385_2875;
/// Name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;
/// The chain record of Tidemark, see [`super::chain`]: "TIDE".
pub const CHAIN: u32 = 0x5449_4445;

/// Bytes of type and length before an extension's data.
pub const HEAD_BYTES: usize = 8;
/// Longest backing format that QEMU accepts.
const MAX_BACKING_FORMAT_BYTES: usize = 15;

/// One extension as it stands in the first cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Offset of its data in the first cluster.
    pub data_offset: usize,
    /// Its data without padding.
    pub data: Vec<u8>,
}

impl Extension {
    /// Bytes that head, data and padding take.
    pub fn span(&self) -> usize {
        span(self.data.len())
    }

    /// Appends head, data and padding to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        write_head(self.kind, self.data.len(), out);
        out.extend_from_slice(&self.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// Bytes that an extension with `data_len` bytes of data takes.
pub const fn span(data_len: usize) -> usize {
    HEAD_BYTES + data_len.next_multiple_of(8)
}

/// Appends type and length of an extension.
pub fn write_head(kind: u32, data_len: usize, out: &mut Vec<u8>) {
    let mut head = [0; HEAD_BYTES];
    BigEndian::write_u32(&mut head[..4], kind);
    BigEndian::write_u32(&mut head[4..], u32::try_from(data_len).unwrap_or(u32::MAX));
    out.extend_from_slice(&head);
}

/// Reads the extensions of the first cluster, in order, without the end marker.
///
/// The list ends at the end marker, at the backing name, or at the end of the cluster, as QEMU
/// reads it.
///
/// # Errors
/// An extension that runs past the bound, or a known one of impossible length.
pub fn parse(header: &Header, cluster: &[u8]) -> Result<(Vec<Extension>, usize), FormatError> {
    let bound = match usize::try_from(header.backing_name_offset) {
        Ok(0) | Err(_) => header.geometry.cluster_len().min(cluster.len()),
        Ok(name) => name.min(cluster.len()),
    };
    let mut list = Vec::new();
    let mut at = header.length;
    while let Some(head) = cluster
        .get(at..bound)
        .and_then(|rest| rest.first_chunk::<HEAD_BYTES>())
    {
        let kind = BigEndian::read_u32(&head[..4]);
        if kind == END {
            return Ok((list, at + HEAD_BYTES));
        }
        let length = BigEndian::read_u32(&head[4..]);
        let damage = |problem| Damage::Extension {
            kind,
            length: length.into(),
            offset: to_u64(at),
            problem,
        };
        let start = at + HEAD_BYTES;
        let data = start
            .checked_add(index(length))
            .and_then(|end| cluster.get(start..end.min(bound)))
            .filter(|data| data.len() == index(length))
            .ok_or_else(|| damage("it runs past the header area"))?;
        if kind == BACKING_FORMAT && data.len() > MAX_BACKING_FORMAT_BYTES {
            return Err(damage("a backing format has at most 15 bytes").into());
        }
        list.push(Extension {
            kind,
            data_offset: start,
            data: data.to_vec(),
        });
        at = start + data.len().next_multiple_of(8);
    }
    Ok((list, at.min(bound)))
}

/// Name that the image's feature name table gives to an incompatible bit, control characters
/// escaped.
pub fn incompatible_name(extensions: &[Extension], bit: u8) -> Option<String> {
    let table = extensions
        .iter()
        .find(|extension| extension.kind == FEATURE_NAMES)?;
    table.data.chunks_exact(48).find_map(|entry| {
        let (&kind, rest) = entry.split_first()?;
        let (&number, name) = rest.split_first()?;
        (kind == 0 && number == bit).then(|| {
            let end = name
                .iter()
                .position(|&byte| byte == 0)
                .unwrap_or(name.len());
            String::from_utf8_lossy(name.get(..end).unwrap_or_default())
                .escape_debug()
                .to_string()
        })
    })
}

/// The feature name table that QEMU 10 writes: eight names, 384 bytes.
pub fn feature_names() -> Extension {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut data = vec![0; NAMES.len() * 48];
    for (entry, (kind, bit, name)) in data.chunks_exact_mut(48).zip(NAMES) {
        entry[0] = low_byte(kind.into());
        entry[1] = bit;
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
    }
    Extension {
        kind: FEATURE_NAMES,
        data_offset: 0,
        data,
    }
}
