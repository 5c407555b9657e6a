//! Names of bitmaps: any 1 to 1,023 bytes on disk, text for people.
//!
//! - A name that is UTF-8 is its own text.
//! - In any other, each byte that is not text stands as `\xNN`, and each backslash as `\\`, so that
//!   two names never have one text among them.
//! - Who asks for a name means those bytes; only where no bitmap has them, the one whose text it is.

use std::fmt::Write;

/// The name as text.
pub(crate) fn text(name: &[u8]) -> String {
    if let Ok(text) = std::str::from_utf8(name) {
        return text.to_owned();
    }
    let mut out = String::new();
    for chunk in name.utf8_chunks() {
        out += &chunk.valid().replace('\\', "\\\\");
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Which of the names on disk is meant.
pub(crate) fn position<'a>(
    names: impl Iterator<Item = &'a [u8]> + Clone,
    wanted: &str,
) -> Option<usize> {
    let is_text_of = |name: &[u8]| std::str::from_utf8(name).is_err() && text(name) == wanted;
    names
        .clone()
        .position(|name| name == wanted.as_bytes())
        .or_else(|| names.into_iter().position(is_text_of))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_text_are_told_apart() {
        let names: [&[u8]; 6] = [
            b"\xff",
            b"\\xff",
            b"\\xff\xfe",
            b"\xff\xfe",
            b"a\xc3",
            b"a\xc3\xa9",
        ];
        let texts = [
            "\\xff",
            "\\xff",
            "\\\\xff\\xfe",
            "\\xff\\xfe",
            "a\\xc3",
            "a\u{e9}",
        ];
        for (number, (name, expected)) in names.iter().zip(texts).enumerate() {
            assert_eq!(text(name), expected);
            // The second has the very bytes of the first one's text.
            let found = position(names.iter().copied(), expected);
            assert_eq!(found, Some(if number == 0 { 1 } else { number }));
        }
        assert_eq!(position(names[..1].iter().copied(), "\\xff"), Some(0));
        assert_eq!(position(names.iter().copied(), "\u{fffd}"), None);
    }
}
