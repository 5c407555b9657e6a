//! Lengths in memory and on disk: the crate needs a 64-bit target, so both are lossless.

use std::cell::RefCell;
use std::ops::Range;

/// Most bytes read, hashed and written at once by one thread.
pub(super) const PIECE_BYTES: u64 = 2 << 20;
/// Bytes of disk planned at once; a multiple of [`PIECE_BYTES`].
pub(super) const WINDOW_BYTES: u64 = 512 << 20;

pub(super) fn to_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

pub(super) fn to_usize(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// Runs `work` on a buffer of `len` bytes of any content, which the thread keeps for the next time:
/// fresh memory costs more than what is done with it. `work` does not come here again.
pub(super) fn with_buffer<R>(len: u64, work: impl FnOnce(&mut [u8]) -> R) -> R {
    thread_local!(static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    BUFFER.with_borrow_mut(|buffer| {
        let len = to_usize(len);
        if buffer.len() < len {
            buffer.resize(len.max(to_usize(PIECE_BYTES)), 0);
        }
        work(&mut buffer[..len])
    })
}

/// The common part of two ranges, if there is one.
pub(super) fn overlap(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let common = a.start.max(b.start)..a.end.min(b.end);
    (!common.is_empty()).then_some(common)
}

/// `range` grown to whole blocks, cut at the disk's end.
pub(super) fn outward(range: &Range<u64>, block: u64, end: u64) -> Range<u64> {
    let start = range.start / block * block;
    start..range.end.next_multiple_of(block).min(end)
}

/// `range` cut into steps that end at multiples of `step`.
pub(super) fn steps(range: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let start = at;
        at = (start / step * step).saturating_add(step).min(range.end);
        Some(start..at)
    })
}

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Chunks without an early exit inside are compared with vector instructions.
    bytes
        .chunks(256)
        .all(|chunk| chunk.iter().fold(0, |any, byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_end_at_multiples() {
        let cut: Vec<_> = steps(3..21, 8).collect();
        assert_eq!(cut, [3..8, 8..16, 16..21]);
        assert_eq!(steps(8..8, 8).count(), 0);
    }

    #[test]
    fn a_range_grows_to_whole_blocks_within_the_disk() {
        assert_eq!(outward(&(5..6), 4, 100), 4..8);
        assert_eq!(outward(&(5..9), 4, 10), 4..10);
    }

    #[test]
    fn one_byte_makes_a_block_data() {
        let mut bytes = vec![0; 1000];
        assert!(is_zero(&bytes));
        bytes[999] = 1;
        assert!(!is_zero(&bytes));
    }
}
