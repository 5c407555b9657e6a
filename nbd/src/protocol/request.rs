//! Requests: what a client asks of an export.

use super::Malformed;
use super::cursor::Cursor;
use super::numbers::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, command, flag};
use crate::convert::low_u32;

/// The header of a request.
///
/// | bytes | field | with extended headers |
/// |---|---|---|
/// | 0..4 | magic | another magic |
/// | 4..6 | flags | |
/// | 6..8 | command | |
/// | 8..16 | cookie | |
/// | 16..24 | offset | |
/// | 24..28 | length | 24..32 |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Bits of [`flag`], and any other.
    pub flags: u16,
    /// One of [`command`], or anything else.
    pub command: u16,
    /// What the answer repeats.
    pub cookie: u64,
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes of the disk, or of a payload that follows.
    pub length: u64,
}

impl Request {
    /// Length of a header with 32-bit lengths.
    pub const COMPACT: usize = 28;
    /// Length of an extended header.
    pub const EXTENDED: usize = 32;

    /// Reads a header of the length that was negotiated.
    ///
    /// # Errors
    /// It begins with another magic number, or is cut short.
    pub fn decode(bytes: &[u8], extended: bool) -> Result<Self, Malformed> {
        let mut cursor = Cursor(bytes);
        let magic = cursor.u32().ok_or(Malformed::Length)?;
        let expected = if extended {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        };
        if magic != expected {
            return Err(Malformed::Magic(magic.into()));
        }
        let mut fields = || {
            Some(Self {
                flags: cursor.u16()?,
                command: cursor.u16()?,
                cookie: cursor.u64()?,
                offset: cursor.u64()?,
                length: if extended {
                    cursor.u64()?
                } else {
                    cursor.u32()?.into()
                },
            })
        };
        fields().ok_or(Malformed::Length)
    }

    /// Its bytes. A length over 32 bits needs an extended header.
    pub fn encode(&self, extended: bool) -> Vec<u8> {
        let magic = if extended {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        if extended {
            bytes.extend(self.length.to_be_bytes());
        } else {
            bytes.extend(low_u32(self.length).to_be_bytes());
        }
        bytes
    }

    /// Bytes that follow the header, whatever is thought of the request.
    pub fn payload(&self, extended: bool) -> u64 {
        let announced = extended && self.has(flag::PAYLOAD_LEN);
        if self.command == command::WRITE || announced {
            self.length
        } else {
            0
        }
    }

    /// Whether a flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Payload of a BLOCK_STATUS that names the contexts it wants: the bytes of the disk that it is
/// about, and numbers of contexts.
///
/// # Errors
/// Parts that do not fit the length.
pub fn decode_wanted_contexts(payload: &[u8]) -> Result<(u64, Vec<u32>), Malformed> {
    let mut cursor = Cursor(payload);
    let length = cursor.u64().ok_or(Malformed::Length)?;
    if cursor.0.len() % 4 != 0 {
        return Err(Malformed::Length);
    }
    Ok((length, std::iter::from_fn(|| cursor.u32()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Request = Request {
        flags: flag::DF,
        command: command::READ,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1_0000_0000,
        length: 512,
    };

    #[test]
    fn a_request_is_these_bytes() {
        let compact = b"\x25\x60\x95\x13\0\x04\0\0\x01\x02\x03\x04\x05\x06\x07\x08\
                        \0\0\0\x01\0\0\0\0\0\0\x02\0";
        assert_eq!(READ.encode(false), compact);
        assert_eq!(Request::decode(compact, false), Ok(READ));
        let extended = b"\x21\xe4\x1c\x71\0\x04\0\0\x01\x02\x03\x04\x05\x06\x07\x08\
                         \0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x02\0";
        assert_eq!(READ.encode(true), extended);
        assert_eq!(Request::decode(extended, true), Ok(READ));
        // Each kind of header is refused where the other was negotiated.
        assert!(matches!(
            Request::decode(extended, false),
            Err(Malformed::Magic(_))
        ));
        assert!(matches!(
            Request::decode(compact, true),
            Err(Malformed::Magic(_))
        ));
        for cut in 0..compact.len() {
            assert_eq!(
                Request::decode(&compact[..cut], false),
                Err(Malformed::Length)
            );
        }
    }

    #[test]
    fn only_writes_and_announced_payloads_are_followed_by_bytes() {
        let write = Request {
            command: command::WRITE,
            ..READ
        };
        let status = Request {
            command: command::BLOCK_STATUS,
            flags: flag::PAYLOAD_LEN,
            ..READ
        };
        assert_eq!((READ.payload(false), READ.payload(true)), (0, 0));
        assert_eq!((write.payload(false), write.payload(true)), (512, 512));
        assert_eq!((status.payload(false), status.payload(true)), (0, 512));
    }

    #[test]
    fn wanted_contexts_are_these_bytes() {
        let payload = b"\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\x01";
        assert_eq!(decode_wanted_contexts(payload), Ok((1 << 32, vec![2, 1])));
        for cut in (0..payload.len()).filter(|cut| *cut < 8 || cut % 4 != 0) {
            assert_eq!(
                decode_wanted_contexts(&payload[..cut]),
                Err(Malformed::Length)
            );
        }
    }
}
