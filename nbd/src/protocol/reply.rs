//! Replies: how a request is answered, in the three shapes that can be negotiated.

use super::numbers::{EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};
use crate::convert::{low_u32, to_u32, to_u64};
use crate::export::BlockStatus;

/// Shape of replies, in the order in which they can be negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Style {
    /// An error number; the bytes of a read follow.
    #[default]
    Simple,
    /// Chunks with 32-bit lengths.
    Structured,
    /// Chunks with 64-bit lengths, and requests with extended headers.
    Extended,
}

/// What an answer belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Addressee {
    /// The cookie of the request.
    pub cookie: u64,
    /// Its offset, which extended replies repeat.
    pub offset: u64,
}

/// Appends a simple reply.
///
/// | bytes | field |
/// |---|---|
/// | 0..4 | magic |
/// | 4..8 | error, or 0 |
/// | 8..16 | cookie |
pub fn simple(to: Addressee, error: u32, out: &mut Vec<u8>) {
    out.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend(error.to_be_bytes());
    out.extend(to.cookie.to_be_bytes());
}

/// Appends the header of a chunk that `length` bytes follow.
///
/// | bytes | structured | bytes | extended |
/// |---|---|---|---|
/// | 0..4 | magic | 0..4 | another magic |
/// | 4..6 | flags | 4..6 | flags |
/// | 6..8 | kind | 6..8 | kind |
/// | 8..16 | cookie | 8..16 | cookie |
/// | 16..20 | length | 16..24 | offset of the request |
/// | | | 24..32 | length |
pub fn chunk(style: Style, to: Addressee, done: bool, kind: u16, length: usize, out: &mut Vec<u8>) {
    let flags = if done { chunk::DONE } else { 0 };
    let extended = style == Style::Extended;
    let magic = if extended {
        EXTENDED_REPLY_MAGIC
    } else {
        STRUCTURED_REPLY_MAGIC
    };
    out.extend(magic.to_be_bytes());
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(to.cookie.to_be_bytes());
    if extended {
        out.extend(to.offset.to_be_bytes());
        out.extend(to_u64(length).to_be_bytes());
    } else {
        out.extend(to_u32(length).to_be_bytes());
    }
}

/// Appends the chunk of an error with a text.
pub fn error(style: Style, to: Addressee, number: u32, text: &str, out: &mut Vec<u8>) {
    let text = text.as_bytes();
    let text = text.get(..255).unwrap_or(text);
    chunk(style, to, true, chunk::ERROR, 6 + text.len(), out);
    out.extend(number.to_be_bytes());
    out.extend(u16::try_from(text.len()).unwrap_or_default().to_be_bytes());
    out.extend(text);
}

/// Appends a chunk that says what one context holds.
pub fn block_status(
    style: Style,
    to: Addressee,
    done: bool,
    context: u32,
    extents: &[BlockStatus],
    out: &mut Vec<u8>,
) {
    if style == Style::Extended {
        let length = 8 + 16 * extents.len();
        chunk(style, to, done, chunk::BLOCK_STATUS_EXT, length, out);
        out.extend(context.to_be_bytes());
        out.extend(to_u32(extents.len()).to_be_bytes());
        for extent in extents {
            out.extend(extent.length.to_be_bytes());
            out.extend(extent.flags.to_be_bytes());
        }
        return;
    }
    let length = 4 + 8 * extents.len();
    chunk(style, to, done, chunk::BLOCK_STATUS, length, out);
    out.extend(context.to_be_bytes());
    for extent in extents {
        // A request with a 32-bit length has no longer extents.
        out.extend(low_u32(extent.length).to_be_bytes());
        out.extend(low_u32(extent.flags).to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: Addressee = Addressee {
        cookie: 0x0102_0304_0506_0708,
        offset: 0x2_0000,
    };
    const EXTENTS: [BlockStatus; 2] = [
        BlockStatus {
            length: 0x1_0000,
            flags: 3,
        },
        BlockStatus {
            length: 512,
            flags: 0,
        },
    ];

    fn bytes(work: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        work(&mut out);
        out
    }

    #[test]
    fn a_simple_reply_is_these_bytes() {
        assert_eq!(
            bytes(|out| simple(TO, 5, out)),
            b"\x67\x44\x66\x98\0\0\0\x05\x01\x02\x03\x04\x05\x06\x07\x08"
        );
    }

    #[test]
    fn structured_chunks_are_these_bytes() {
        let none = bytes(|out| chunk(Style::Structured, TO, true, chunk::NONE, 0, out));
        assert_eq!(
            none,
            b"\x66\x8e\x33\xef\0\x01\0\0\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0"
        );
        let failed = bytes(|out| error(Style::Structured, TO, 22, "no", out));
        assert_eq!(
            failed,
            b"\x66\x8e\x33\xef\0\x01\x80\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x08\
              \0\0\0\x16\0\x02no"
        );
        let status = bytes(|out| block_status(Style::Structured, TO, false, 7, &EXTENTS, out));
        assert_eq!(
            status,
            b"\x66\x8e\x33\xef\0\0\0\x05\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x14\
              \0\0\0\x07\0\x01\0\0\0\0\0\x03\0\0\x02\0\0\0\0\0"
        );
    }

    #[test]
    fn extended_chunks_are_these_bytes() {
        let none = bytes(|out| chunk(Style::Extended, TO, true, chunk::NONE, 0, out));
        assert_eq!(
            none,
            b"\x6e\x8a\x27\x8c\0\x01\0\0\x01\x02\x03\x04\x05\x06\x07\x08\
              \0\0\0\0\0\x02\0\0\0\0\0\0\0\0\0\0"
        );
        let status = bytes(|out| block_status(Style::Extended, TO, true, 7, &EXTENTS[1..], out));
        assert_eq!(
            status,
            b"\x6e\x8a\x27\x8c\0\x01\0\x06\x01\x02\x03\x04\x05\x06\x07\x08\
              \0\0\0\0\0\x02\0\0\0\0\0\0\0\0\0\x18\0\0\0\x07\0\0\0\x01\
              \0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\0"
        );
    }

    #[test]
    fn a_long_text_of_an_error_is_cut() {
        let text = "x".repeat(5000);
        let failed = bytes(|out| error(Style::Structured, TO, 5, &text, out));
        assert_eq!(failed.len(), 20 + 6 + 255);
    }
}
