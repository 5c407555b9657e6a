//! Kernels on slices of 64-bit words: bit `i` is bit `i % 64` of word `i / 64`.
//!
//! Loops are written so that the compiler can use vector instructions; none looks at single bits.

use std::ops::Range;

use crate::convert::{to_u64, to_usize};

/// The words that `bits` touches, each with the mask of its bits in the range.
pub(crate) fn masks(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let first = to_usize(bits.start / 64);
    let end = if bits.is_empty() {
        first
    } else {
        to_usize(bits.end.div_ceil(64))
    };
    (first..end).map(move |word| {
        let mut mask = u64::MAX;
        if word == first {
            mask &= u64::MAX << (bits.start % 64);
        }
        if word + 1 == end && !bits.end.is_multiple_of(64) {
            mask &= low_bits(bits.end % 64);
        }
        (word, mask)
    })
}

/// The lowest `count` bits of a word, `count` below 64.
fn low_bits(count: u64) -> u64 {
    (1 << count) - 1
}

/// Sets the bits of a range.
pub(crate) fn set(words: &mut [u64], bits: Range<u64>) {
    edit(words, bits, u64::MAX);
}

/// Clears the bits of a range.
pub(crate) fn clear(words: &mut [u64], bits: Range<u64>) {
    edit(words, bits, 0);
}

fn edit(words: &mut [u64], bits: Range<u64>, value: u64) {
    if bits.is_empty() {
        return;
    }
    let (first, last) = (to_usize(bits.start / 64), to_usize((bits.end - 1) / 64));
    let head = u64::MAX << (bits.start % 64);
    let tail = u64::MAX >> (63 - (bits.end - 1) % 64);
    if first == last {
        blend(&mut words[first], head & tail, value);
        return;
    }
    blend(&mut words[first], head, value);
    words[first + 1..last].fill(value);
    blend(&mut words[last], tail, value);
}

fn blend(word: &mut u64, mask: u64, value: u64) {
    *word = (*word & !mask) | (value & mask);
}

/// Clears every bit from `valid` on.
pub(crate) fn mask_tail(words: &mut [u64], valid: u64) {
    clear(words, valid..to_u64(words.len()) * 64);
}

/// `into |= from`.
pub(crate) fn or(into: &mut [u64], from: &[u64]) {
    into.iter_mut()
        .zip(from)
        .for_each(|(into, from)| *into |= from);
}

/// `into &= from`.
pub(crate) fn and(into: &mut [u64], from: &[u64]) {
    into.iter_mut()
        .zip(from)
        .for_each(|(into, from)| *into &= from);
}

/// `into &= !from`.
pub(crate) fn and_not(into: &mut [u64], from: &[u64]) {
    into.iter_mut()
        .zip(from)
        .for_each(|(into, from)| *into &= !from);
}

/// Turns every bit over.
pub(crate) fn invert(words: &mut [u64]) {
    words.iter_mut().for_each(|word| *word = !*word);
}

/// Whether every word is `value`. Looks at eight words at a time and stops at the first block
/// that differs.
pub(crate) fn all(words: &[u64], value: u64) -> bool {
    let (blocks, rest) = words.as_chunks::<8>();
    let differs = |seen: u64, word: &u64| seen | (word ^ value);
    blocks
        .iter()
        .all(|block| block.iter().fold(0, differs) == 0)
        && rest.iter().fold(0, differs) == 0
}

/// Whether every bit below `valid` is set.
pub(crate) fn is_full(words: &[u64], valid: u64) -> bool {
    let whole = to_usize(valid / 64);
    let rest = low_bits(valid % 64);
    all(&words[..whole], u64::MAX) && (rest == 0 || words[whole] & rest == rest)
}

/// Whether `outer` has every bit that `inner` has.
pub(crate) fn covers(outer: &[u64], inner: &[u64]) -> bool {
    let missing = |(outer, inner): (&[u64], &[u64])| {
        outer
            .iter()
            .zip(inner)
            .fold(0, |seen, (outer, inner)| seen | (inner & !outer))
            != 0
    };
    !outer.chunks(32).zip(inner.chunks(32)).any(missing)
}

/// The first bit of a range that is set (`ones`) or clear (not `ones`).
pub(crate) fn find(words: &[u64], bits: Range<u64>, ones: bool) -> Option<u64> {
    if bits.is_empty() {
        return None;
    }
    let dull = if ones { 0 } else { u64::MAX };
    let first = to_usize(bits.start / 64);
    let end = to_usize(bits.end.div_ceil(64));
    let head = (words[first] ^ dull) & (u64::MAX << (bits.start % 64));
    let (word, found) = if head == 0 {
        let skipped = words[first + 1..end]
            .iter()
            .position(|word| *word != dull)?;
        let word = first + 1 + skipped;
        (word, words[word] ^ dull)
    } else {
        (first, head)
    };
    let bit = to_u64(word) * 64 + u64::from(found.trailing_zeros());
    (bit < bits.end).then_some(bit)
}

/// The position of the `n`-th set bit, counted from zero.
pub(crate) fn nth(words: &[u64], mut n: u64) -> Option<u64> {
    for (index, word) in words.iter().enumerate() {
        let ones = u64::from(word.count_ones());
        if n < ones {
            let rest = (0..n).fold(*word, |word, _| word & (word - 1));
            return Some(to_u64(index) * 64 + u64::from(rest.trailing_zeros()));
        }
        n -= ones;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_cut_the_first_and_the_last_word() {
        let masks = |bits| masks(bits).collect::<Vec<_>>();
        assert_eq!(masks(0..0), []);
        assert_eq!(masks(64..64), []);
        assert_eq!(masks(3..5), [(0, 0b11000)]);
        assert_eq!(masks(0..64), [(0, u64::MAX)]);
        assert_eq!(masks(63..129), [(0, 1 << 63), (1, u64::MAX), (2, 1)]);
    }

    #[test]
    fn a_set_range_is_found_counted_and_cleared_again() {
        for (start, end) in [
            (0, 0),
            (0, 1),
            (5, 64),
            (63, 65),
            (1, 255),
            (64, 192),
            (0, 256),
        ] {
            let mut words = [0; 4];
            set(&mut words, start..end);
            assert_eq!(crate::count::count(&words), end - start);
            assert_eq!(find(&words, 0..256, true), (start < end).then_some(start));
            assert_eq!(find(&words, start..256, false), (end < 256).then_some(end));
            assert_eq!(nth(&words, 0), (start < end).then_some(start));
            assert_eq!(nth(&words, end - start), None);
            assert_eq!(is_full(&words, end), start == 0);
            clear(&mut words, start..end);
            assert!(all(&words, 0));
        }
    }

    #[test]
    fn a_find_does_not_look_past_its_range() {
        assert_eq!(find(&[0, 1 << 10], 0..74, true), None);
        assert_eq!(find(&[0, 1 << 10], 0..75, true), Some(74));
        assert_eq!(find(&[u64::MAX, u64::MAX], 0..128, false), None);
    }
}
