//! Counting set bits of many words: carry-save adders take sixteen vectors at a time, so that only
//! one of them is counted bit by bit (Harley and Seal).

use std::array::from_fn;

/// Words that are added side by side; the compiler makes vectors of them.
const LANES: usize = 4;
/// Vectors that become one.
const VECTORS: usize = 16;

type Vector = [u64; LANES];

/// Set bits.
pub(crate) fn count(words: &[u64]) -> u64 {
    let (blocks, rest) = words.as_chunks::<{ VECTORS * LANES }>();
    let mut counter = Counter::default();
    for block in blocks {
        counter.add(block.as_chunks().0);
    }
    counter.total() + count_plainly(rest)
}

/// The same, word by word.
fn count_plainly(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// A binary counter for each bit of a vector; what overflows it is counted at once.
#[derive(Default)]
struct Counter {
    ones: Vector,
    twos: Vector,
    fours: Vector,
    eights: Vector,
    sixteens: u64,
}

impl Counter {
    fn add(&mut self, vectors: &[Vector]) {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = vectors else {
            return;
        };
        let first = self.add_eight([a, b, c, d, e, f, g, h]);
        let second = self.add_eight([i, j, k, l, m, n, o, p]);
        let carry = add(&mut self.eights, &first, &second);
        self.sixteens += count_plainly(&carry);
    }

    /// Returns the carry: eights.
    fn add_eight(&mut self, [a, b, c, d, e, f, g, h]: [&Vector; 8]) -> Vector {
        let first = self.add_four([a, b, c, d]);
        let second = self.add_four([e, f, g, h]);
        add(&mut self.fours, &first, &second)
    }

    /// Returns the carry: fours.
    fn add_four(&mut self, [a, b, c, d]: [&Vector; 4]) -> Vector {
        let first = add(&mut self.ones, a, b);
        let second = add(&mut self.ones, c, d);
        add(&mut self.twos, &first, &second)
    }

    fn total(&self) -> u64 {
        let places = [&self.ones, &self.twos, &self.fours, &self.eights];
        let low: u64 = places
            .iter()
            .zip(0..)
            .map(|(place, power)| count_plainly(*place) << power)
            .sum();
        low + (self.sixteens << 4)
    }
}

/// Adds two vectors, bit by bit, to a place of the counters; returns the carries.
fn add(place: &mut Vector, a: &Vector, b: &Vector) -> Vector {
    let carry = from_fn(|lane| {
        let half = a[lane] ^ b[lane];
        (a[lane] & b[lane]) | (half & place[lane])
    });
    *place = from_fn(|lane| place[lane] ^ a[lane] ^ b[lane]);
    carry
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn full_and_empty_blocks_are_counted() {
        for words in [0, 1, 63, 64, 65, 1000, 4096] {
            assert_eq!(
                count(&vec![u64::MAX; words]),
                64 * u64::try_from(words).expect("small")
            );
            assert_eq!(count(&vec![0; words]), 0);
        }
    }

    proptest! {
        #[test]
        fn counts_agree_with_those_word_by_word(words in proptest::collection::vec(any::<u64>(), 0..400)) {
            prop_assert_eq!(count(&words), count_plainly(&words));
        }
    }
}
