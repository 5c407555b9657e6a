//! Kernels that change the number of bits: many fine bits to one coarse, one coarse to many fine.
//!
//! Ratios up to 64 work on whole words. Both directions rest on one permutation: with `2^k` groups
//! in play, rotating the six bits of a bit's position by `k` gathers the bits that lie `2^k` apart
//! into runs, and rotating back deals runs out again. One rotation by one is the perfect
//! (un)shuffle of a word, five swaps of neighbouring fields; `k` to one side is `6 - k` to the
//! other.

/// The largest exponent of a ratio that the word kernels take.
pub(crate) const MAX_WORD_RATIO: u32 = 6;

/// Sets bit `i` of `into` if any of the bits `i << k .. (i + 1) << k` of `from` is set.
///
/// With `flip` all ones, the bits of `from` count turned over. Words that `from` lacks at its end
/// count as clear.
pub(crate) fn or_coarser(into: &mut [u64], from: &[u64], k: u32, flip: u64) {
    match k {
        1 => coarser::<1, 2>(into, from, flip),
        2 => coarser::<2, 4>(into, from, flip),
        3 => coarser::<3, 8>(into, from, flip),
        4 => coarser::<4, 16>(into, from, flip),
        5 => coarser::<5, 32>(into, from, flip),
        MAX_WORD_RATIO => coarser::<6, 64>(into, from, flip),
        _ => unreachable!("larger ratios go by runs"),
    }
}

/// Sets the bits `i << k .. (i + 1) << k` of `into` for every set bit `i` of `from`.
pub(crate) fn or_finer(into: &mut [u64], from: &[u64], k: u32) {
    match k {
        1 => finer::<1, 2>(into, from),
        2 => finer::<2, 4>(into, from),
        3 => finer::<3, 8>(into, from),
        4 => finer::<4, 16>(into, from),
        5 => finer::<5, 32>(into, from),
        MAX_WORD_RATIO => finer::<6, 64>(into, from),
        _ => unreachable!("larger ratios go by runs"),
    }
}

/// `N` is `2^K`: the ratio, and the words of `from` that make one word of `into`.
fn coarser<const K: u32, const N: usize>(into: &mut [u64], from: &[u64], flip: u64) {
    let (groups, rest) = from.as_chunks::<N>();
    for (into, group) in into.iter_mut().zip(groups) {
        *into |= gather::<K, N>(group.map(|word| word ^ flip));
    }
    if let Some(into) = into.get_mut(groups.len()) {
        let mut group = [0; N];
        group
            .iter_mut()
            .zip(rest)
            .for_each(|(lane, word)| *lane = word ^ flip);
        *into |= gather::<K, N>(group);
    }
}

/// One word of coarse bits out of `N` words of fine ones.
///
/// Each step ORs neighbouring fields and lays the results of two words into the fields of one, so
/// that the work halves with every step. At the end bit `l * N + j` is group `l` of word `j`.
#[inline(always)]
fn gather<const K: u32, const N: usize>(mut lanes: [u64; N]) -> u64 {
    for step in 0..K {
        let width = 1 << step;
        let fields = u64::MAX / ((1 << width) + 1);
        for pair in 0..N >> (step + 1) {
            let (even, odd) = (lanes[2 * pair], lanes[2 * pair + 1]);
            let even = (even | even >> width) & fields;
            let odd = (odd | odd << width) & !fields;
            lanes[pair] = even | odd;
        }
    }
    if K <= 3 {
        (0..K).fold(lanes[0], |word, _| unshuffle(word))
    } else {
        (K..6).fold(lanes[0], |word, _| shuffle(word))
    }
}

fn finer<const K: u32, const N: usize>(into: &mut [u64], from: &[u64]) {
    for (group, word) in into.chunks_mut(N).zip(from) {
        if *word == 0 {
            continue;
        }
        let dealt = if K <= 3 {
            (0..K).fold(*word, |word, _| shuffle(word))
        } else {
            (K..6).fold(*word, |word, _| unshuffle(word))
        };
        for (lane, into) in group.iter_mut().enumerate() {
            let firsts = (dealt >> lane) & every::<N>();
            // Each set bit grows to N bits: 2^(p + N) - 2^p. For N = 64 the first term is gone.
            let ends = if N == 64 { 0 } else { firsts << (N % 64) };
            *into |= ends.wrapping_sub(firsts);
        }
    }
}

/// Every `N`-th bit, from bit 0.
const fn every<const N: usize>() -> u64 {
    if N == 64 {
        1
    } else {
        u64::MAX / ((1 << (N % 64)) - 1)
    }
}

/// Even bits to the low half, odd bits to the high half.
fn unshuffle(word: u64) -> u64 {
    FIELDS.iter().fold(word, swap)
}

/// Low half to the even bits, high half to the odd bits.
fn shuffle(word: u64) -> u64 {
    FIELDS.iter().rev().fold(word, swap)
}

/// Fields that one step swaps with the fields that many bits above them.
const FIELDS: [(u64, u32); 5] = [
    (0x2222_2222_2222_2222, 1),
    (0x0c0c_0c0c_0c0c_0c0c, 2),
    (0x00f0_00f0_00f0_00f0, 4),
    (0x0000_ff00_0000_ff00, 8),
    (0x0000_0000_ffff_0000, 16),
];

#[inline(always)]
fn swap(word: u64, (field, distance): &(u64, u32)) -> u64 {
    let differs = (word ^ (word >> distance)) & field;
    word ^ differs ^ (differs << distance)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn bit(words: &[u64], index: usize) -> bool {
        words
            .get(index / 64)
            .is_some_and(|word| word >> (index % 64) & 1 != 0)
    }

    /// The scalar twin of [`or_coarser`].
    fn coarser_by_bits(into: &mut [u64], from: &[u64], k: u32, flip: u64) {
        let flipped: Vec<u64> = from.iter().map(|word| word ^ flip).collect();
        for index in 0..into.len() * 64 {
            if (index << k..(index + 1) << k).any(|fine| bit(&flipped, fine)) {
                into[index / 64] |= 1 << (index % 64);
            }
        }
    }

    /// The scalar twin of [`or_finer`].
    fn finer_by_bits(into: &mut [u64], from: &[u64], k: u32) {
        for index in 0..into.len() * 64 {
            if bit(from, index >> k) {
                into[index / 64] |= 1 << (index % 64);
            }
        }
    }

    fn word() -> impl Strategy<Value = u64> {
        prop_oneof![
            any::<u64>(),
            Just(0),
            Just(u64::MAX),
            (0..64).prop_map(|bit| 1_u64 << bit),
            (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(a, b, c)| a & b & c),
        ]
    }

    proptest! {
        #[test]
        fn coarser_words_agree_with_the_scalar_twin(
            k in 1..=6_u32,
            from in vec(word(), 0..130),
            before in vec(word(), 0..4),
            flip in prop_oneof![Just(0), Just(u64::MAX)],
        ) {
            let (mut fast, mut slow) = (before.clone(), before);
            or_coarser(&mut fast, &from, k, flip);
            coarser_by_bits(&mut slow, &from, k, flip);
            prop_assert_eq!(fast, slow);
        }

        #[test]
        fn finer_words_agree_with_the_scalar_twin(
            k in 1..=6_u32,
            from in vec(word(), 0..4),
            before in vec(word(), 0..130),
        ) {
            let (mut fast, mut slow) = (before.clone(), before);
            or_finer(&mut fast, &from, k);
            finer_by_bits(&mut slow, &from, k);
            prop_assert_eq!(fast, slow);
        }
    }

    #[test]
    fn shuffling_undoes_unshuffling() {
        assert_eq!(unshuffle(0xaaaa_aaaa_aaaa_aaaa), 0xffff_ffff_0000_0000);
        assert_eq!(
            shuffle(unshuffle(0x0123_4567_89ab_cdef)),
            0x0123_4567_89ab_cdef
        );
    }
}
