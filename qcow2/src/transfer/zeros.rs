//! Which bytes are zero.

use std::ops::Range;

/// Bytes that are looked at before deciding whether to go on.
const STRIDE: usize = 256;

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let any = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all | byte) != 0;
    let mut strides = bytes.chunks_exact(STRIDE);
    strides.all(|stride| !any(stride)) && !any(strides.remainder())
}

/// Maximal runs of blocks of `unit` bytes that are all zero, or not; the last block may be cut.
pub(super) fn runs(bytes: &[u8], unit: usize) -> impl Iterator<Item = (Range<usize>, bool)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= bytes.len() {
            return None;
        }
        let start = at;
        let block = |at: usize| &bytes[at..(at + unit).min(bytes.len())];
        let zero = is_zero(block(at));
        at += unit;
        while at < bytes.len() && is_zero(block(at)) == zero {
            at += unit;
        }
        at = at.min(bytes.len());
        Some((start..at, zero))
    })
}

#[cfg(test)]
mod tests {
    use super::{is_zero, runs};

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [0, 1, 255, 256, 257, 4096, 5000] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len}");
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn runs_cover_everything_and_change_at_blocks() {
        let mut bytes = vec![0; 1000];
        bytes[250] = 1;
        bytes[999] = 1;
        let found: Vec<_> = runs(&bytes, 100).collect();
        assert_eq!(
            found,
            [
                (0..200, true),
                (200..300, false),
                (300..900, true),
                (900..1000, false)
            ]
        );
        assert_eq!(runs(&[], 100).count(), 0);
    }
}
