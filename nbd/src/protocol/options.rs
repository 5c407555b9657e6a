//! Options: what a client asks before it has chosen an export, and how it is answered.

use super::Malformed;
use super::cursor::Cursor;
use super::numbers::{IHAVEOPT, MAX_STRING, OPTION_REPLY_MAGIC, info, reply};
use crate::convert::{index, to_u32};

/// What begins every option.
///
/// | bytes | field |
/// |---|---|
/// | 0..8 | IHAVEOPT |
/// | 8..12 | option |
/// | 12..16 | bytes of data that follow |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of [`super::numbers::option`], or anything else.
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Its length.
    pub const BYTES: usize = 16;

    /// Reads a header.
    ///
    /// # Errors
    /// It does not begin with IHAVEOPT.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        let mut cursor = Cursor(bytes);
        let fields = (cursor.u64(), cursor.u32(), cursor.u32());
        let (Some(magic), Some(option), Some(length)) = fields else {
            return Err(Malformed::Length);
        };
        if magic == IHAVEOPT {
            Ok(Self { option, length })
        } else {
            Err(Malformed::Magic(magic))
        }
    }

    /// Its bytes.
    pub fn encode(self) -> Vec<u8> {
        let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
        bytes.extend(self.option.to_be_bytes());
        bytes.extend(self.length.to_be_bytes());
        bytes
    }
}

/// Data of INFO and GO: a name, and the facts that are wanted beyond size and flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Name of the export.
    pub name: &'a [u8],
    /// Each one of [`info`], or anything else.
    pub wanted: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// Reads the data of an option.
    ///
    /// # Errors
    /// Parts that do not fit the length.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut cursor = Cursor(data);
        let name = string(&mut cursor)?;
        let count = cursor.u16().ok_or(Malformed::Length)?;
        if cursor.0.len() != usize::from(count) * 2 {
            return Err(Malformed::Length);
        }
        let wanted = std::iter::from_fn(|| cursor.u16()).collect();
        Ok(Self { name, wanted })
    }
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT: the name of an export, and queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// Name of the export.
    pub name: &'a [u8],
    /// What is asked for, each `namespace:leaf`.
    pub queries: Vec<&'a [u8]>,
}

impl<'a> ContextRequest<'a> {
    /// Reads the data of an option.
    ///
    /// # Errors
    /// Parts that do not fit the length.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut cursor = Cursor(data);
        let name = string(&mut cursor)?;
        let count = cursor.u32().ok_or(Malformed::Length)?;
        // Each query has at least its length: memory is bounded by what was sent.
        if cursor.0.len() / 4 < index(count) {
            return Err(Malformed::Length);
        }
        let queries = (0..count).map(|_| string(&mut cursor));
        let queries = queries.collect::<Result<_, _>>()?;
        if !cursor.is_empty() {
            return Err(Malformed::Length);
        }
        Ok(Self { name, queries })
    }
}

/// A length of 32 bits, and as many bytes.
fn string<'a>(cursor: &mut Cursor<'a>) -> Result<&'a [u8], Malformed> {
    let length = index(cursor.u32().ok_or(Malformed::Length)?);
    if length > MAX_STRING {
        return Err(Malformed::LongString);
    }
    cursor.take(length).ok_or(Malformed::Length)
}

/// An answer to an option.
pub fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(to_u32(data.len()).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// An answer to LIST: the name of an export.
pub fn server(option: u32, name: &str) -> Vec<u8> {
    let mut data = to_u32(name.len()).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    answer(option, reply::SERVER, &data)
}

/// An answer that names a context; its number is 0 in a list.
pub fn meta_context(option: u32, number: u32, name: &str) -> Vec<u8> {
    let mut data = number.to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    answer(option, reply::META_CONTEXT, &data)
}

/// The fact that every export has: its size and flags.
pub fn info_export(option: u32, size: u64, flags: u16) -> Vec<u8> {
    let mut data = info::EXPORT.to_be_bytes().to_vec();
    data.extend(size.to_be_bytes());
    data.extend(flags.to_be_bytes());
    answer(option, reply::INFO, &data)
}

/// A fact that is a text.
pub fn info_text(option: u32, kind: u16, text: &str) -> Vec<u8> {
    let mut data = kind.to_be_bytes().to_vec();
    data.extend(text.as_bytes());
    answer(option, reply::INFO, &data)
}

/// The smallest, the preferred and the largest request.
pub fn info_block_size(option: u32, sizes: [u32; 3]) -> Vec<u8> {
    let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
    sizes
        .iter()
        .for_each(|size| data.extend(size.to_be_bytes()));
    answer(option, reply::INFO, &data)
}

/// The answer to EXPORT_NAME.
pub fn export_chosen(size: u64, flags: u16, no_zeroes: bool) -> Vec<u8> {
    let mut bytes = size.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    if !no_zeroes {
        bytes.extend([0; 124]);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::numbers::option;
    use super::*;

    #[test]
    fn an_option_header_is_these_bytes() {
        let header = OptionHeader {
            option: option::GO,
            length: 258,
        };
        let bytes = *b"IHAVEOPT\0\0\0\x07\0\0\x01\x02";
        assert_eq!(header.encode(), bytes);
        assert_eq!(OptionHeader::decode(&bytes), Ok(header));
        let bad = *b"IHAVEOPU\0\0\0\x07\0\0\x01\x02";
        assert!(matches!(
            OptionHeader::decode(&bad),
            Err(Malformed::Magic(_))
        ));
    }

    #[test]
    fn answers_are_these_bytes() {
        let magic = b"\0\x03\xe8\x89\x04\x55\x65\xa9";
        let mut ack = magic.to_vec();
        ack.extend(b"\0\0\0\x08\0\0\0\x01\0\0\0\0");
        assert_eq!(answer(option::STRUCTURED_REPLY, reply::ACK, &[]), ack);
        let mut unsupported = magic.to_vec();
        unsupported.extend(b"\0\0\0\x63\x80\0\0\x01\0\0\0\0");
        assert_eq!(answer(99, reply::ERR_UNSUP, &[]), unsupported);
        let mut fact = magic.to_vec();
        fact.extend(b"\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0");
        fact.extend(b"\0\0\0\0\0\x10\0\0\x0d\x6d");
        assert_eq!(info_export(option::GO, 1 << 20, 0x0d6d), fact);
        let mut sizes = magic.to_vec();
        sizes.extend(b"\0\0\0\x06\0\0\0\x03\0\0\0\x0e\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
        assert_eq!(info_block_size(option::INFO, [1, 4096, 32 << 20]), sizes);
        let mut context = magic.to_vec();
        context.extend(b"\0\0\0\x0a\0\0\0\x04\0\0\0\x13\0\0\0\x02base:allocation");
        assert_eq!(
            meta_context(option::SET_META_CONTEXT, 2, "base:allocation"),
            context
        );
        let mut name = magic.to_vec();
        name.extend(b"\0\0\0\x03\0\0\0\x02\0\0\0\x07\0\0\0\x03vda");
        assert_eq!(server(option::LIST, "vda"), name);
        assert_eq!(
            export_chosen(1 << 20, 0x0d6d, true),
            b"\0\0\0\0\0\x10\0\0\x0d\x6d"
        );
        assert_eq!(export_chosen(1, 1, false).len(), 134);
    }

    #[test]
    fn data_that_does_not_fit_its_length_is_malformed() {
        let good = b"\0\0\0\x03vda\0\x02\0\x01\0\x03";
        let request = InfoRequest::decode(good).expect("it is whole");
        assert_eq!(
            (request.name, request.wanted),
            (&b"vda"[..], vec![info::NAME, info::BLOCK_SIZE])
        );
        let contexts = b"\0\0\0\x03vda\0\0\0\x02\0\0\0\x05base:\0\0\0\0";
        let request = ContextRequest::decode(contexts).expect("it is whole");
        assert_eq!(request.queries, [&b"base:"[..], b""]);
        let mut cases = 0;
        for cut in 0..good.len() {
            assert_eq!(
                InfoRequest::decode(&good[..cut]),
                Err(Malformed::Length),
                "{cut}"
            );
            cases += 1;
        }
        for cut in 0..contexts.len() {
            let cut_short = ContextRequest::decode(&contexts[..cut]);
            assert_eq!(cut_short, Err(Malformed::Length), "{cut}");
            cases += 1;
        }
        let longer = [&good[..], b"\0"].concat();
        assert_eq!(InfoRequest::decode(&longer), Err(Malformed::Length));
        let longer = [&contexts[..], b"\0"].concat();
        assert_eq!(ContextRequest::decode(&longer), Err(Malformed::Length));
        let many = b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0";
        assert_eq!(ContextRequest::decode(many), Err(Malformed::Length));
        let long = [&4097_u32.to_be_bytes()[..], &[b'x'; 4097], b"\0\0"].concat();
        assert_eq!(InfoRequest::decode(&long), Err(Malformed::LongString));
        println!("{} malformed options", cases + 4);
        assert!(cases >= 35);
    }
}
