//! Where the encryption header lies (format, section "Full disk encryption header pointer").
//!
//! Nothing here decrypts. Method 1 (AES) has no header; method 2 (LUKS) has one, in clusters of its
//! own that are counted like other metadata. Metadata is never encrypted.

use super::extension::{self, Extension};
use super::header::Header;
use super::limits;
use crate::convert::to_u64;
use crate::error::{Damage, Feature, FormatError};
use crate::units::HostOffset;

/// The old method: AES in CBC mode, the key straight from a password.
pub const AES: u32 = 1;
/// LUKS, version 1.
pub const LUKS: u32 = 2;

/// Bytes of the extension.
const POINTER_BYTES: usize = 16;

/// Clusters that hold the LUKS header: keys, in a form that only a password opens. Without them
/// the data is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncryptionHeader {
    /// First byte, cluster aligned.
    pub offset: HostOffset,
    /// Bytes.
    pub bytes: u64,
}

impl EncryptionHeader {
    /// Finds the header of an image that has one.
    ///
    /// # Errors
    /// [`Feature::Encryption`] for a method that does not exist; LUKS without its header, or the
    /// reverse; a malformed pointer.
    pub fn find(header: &Header, extensions: &[Extension]) -> Result<Option<Self>, FormatError> {
        if header.encryption > LUKS {
            return Err(Feature::Encryption(header.encryption).into());
        }
        let mut found = extensions.iter().rev();
        let found = found.find(|entry| entry.kind == extension::ENCRYPTION);
        let Some(entry) = found else {
            if header.encryption != LUKS {
                return Ok(None);
            }
            let value = header.encryption.into();
            return Err(Damage::HeaderField {
                field: "crypt_method",
                value,
            }
            .into());
        };
        let damage = |problem| Damage::Extension {
            kind: entry.kind,
            length: to_u64(entry.data.len()),
            offset: to_u64(entry.data_offset - extension::HEAD_BYTES),
            problem,
        };
        if header.encryption != LUKS {
            return Err(damage("only images encrypted with LUKS have an encryption header").into());
        }
        let pointer: &[u8; POINTER_BYTES] = entry
            .data
            .as_slice()
            .try_into()
            .map_err(|_| damage("a pointer to the encryption header has 16 bytes"))?;
        let (words, _) = pointer.as_chunks::<8>();
        let place = Self {
            offset: HostOffset(u64::from_be_bytes(words[0])),
            bytes: u64::from_be_bytes(words[1]),
        };
        let aligned = header.geometry.is_aligned(place.offset);
        if !aligned || place.offset.0 >= limits::MAX_HOST_OFFSET {
            return Err(damage("the encryption header is not cluster aligned").into());
        }
        if place.bytes > limits::MAX_ENCRYPTION_HEADER_BYTES {
            return Err(damage("the encryption header is longer than 64 MiB").into());
        }
        Ok(Some(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(method: u32) -> Header {
        let mut bytes = vec![0; 72];
        for (at, value) in [
            (0, 0x5146_49fb_u32),
            (4, 2),
            (20, 16),
            (32, method),
            (52, 65_536),
            (56, 1),
        ] {
            let end: usize = at + 4;
            bytes[at..end].copy_from_slice(&value.to_be_bytes());
        }
        Header::from_bytes(&bytes).unwrap()
    }

    fn pointer(offset: u64, bytes: u64) -> Extension {
        let mut data = offset.to_be_bytes().to_vec();
        data.extend(bytes.to_be_bytes());
        Extension {
            kind: extension::ENCRYPTION,
            data_offset: 112,
            data,
        }
    }

    #[test]
    fn luks_has_a_header_and_nothing_else_has() {
        let place = EncryptionHeader::find(&header(LUKS), &[pointer(0x4_0000, 592)]);
        let expected = EncryptionHeader {
            offset: HostOffset(0x4_0000),
            bytes: 592,
        };
        assert_eq!(place, Ok(Some(expected)));
        assert_eq!(EncryptionHeader::find(&header(0), &[]), Ok(None));
        assert_eq!(EncryptionHeader::find(&header(AES), &[]), Ok(None));
        for (method, extensions) in [
            (LUKS, vec![]),
            (AES, vec![pointer(0x4_0000, 592)]),
            (0, vec![pointer(0x4_0000, 592)]),
            (LUKS, vec![pointer(0x4_0001, 592)]),
            (LUKS, vec![pointer(1 << 60, 592)]),
            (LUKS, vec![pointer(0x4_0000, u64::MAX)]),
        ] {
            let found = EncryptionHeader::find(&header(method), &extensions);
            assert!(matches!(found, Err(FormatError::Damage(_))), "{found:?}");
        }
        let mut short = pointer(0x4_0000, 592);
        short.data.truncate(15);
        assert!(EncryptionHeader::find(&header(LUKS), &[short]).is_err());
        let unknown = EncryptionHeader::find(&header(3), &[]);
        assert_eq!(unknown, Err(Feature::Encryption(3).into()));
    }
}
