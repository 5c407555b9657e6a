//! The second word of an extended L2 entry (format, section "Extended L2 Entries").

use std::marker::PhantomData;
use std::ops::Range;

use bitvec::array::BitArray;
use bitvec::order::Lsb0;

use crate::convert::{to_u32, to_u64, to_usize};

/// Subclusters of one cluster.
pub const COUNT: usize = 32;

const LOW_WORD: u64 = 0xffff_ffff;

type Bits = BitArray<[u32; 1], Lsb0>;

const fn bits(word: u32) -> Bits {
    Bits {
        _ord: PhantomData,
        data: [word],
    }
}

/// What one subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// Nothing here: the backing file shows through, or zeros.
    Unallocated,
    /// Reads as zero.
    Zero,
    /// Its data lies at its place in the host cluster.
    Allocated,
}

/// What each of the subclusters of one cluster is.
///
/// | bits | meaning |
/// |---|---|
/// | 0..32 | bit n: subcluster n is allocated |
/// | 32..64 | bit 32 + n: subcluster n reads as zero |
///
/// A subcluster with neither shows what lies below; none has both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subclusters {
    allocated: Bits,
    zero: Bits,
}

impl Subclusters {
    /// All of them unallocated.
    pub const UNALLOCATED: Self = Self::uniform(0, 0);
    /// All of them zero.
    pub const ZERO: Self = Self::uniform(0, u32::MAX);
    /// All of them allocated.
    pub const ALLOCATED: Self = Self::uniform(u32::MAX, 0);

    const fn uniform(allocated: u32, zero: u32) -> Self {
        Self {
            allocated: bits(allocated),
            zero: bits(zero),
        }
    }

    /// Decodes the word; `None` when a subcluster is allocated and reads as zero at once.
    pub const fn decode(word: u64) -> Option<Self> {
        let (allocated, zero) = (to_u32(word & LOW_WORD), to_u32(word >> 32));
        if allocated & zero == 0 {
            Some(Self::uniform(allocated, zero))
        } else {
            None
        }
    }

    /// The word as it is stored.
    pub fn encode(self) -> u64 {
        u64::from(self.zero.data[0]) << 32 | u64::from(self.allocated.data[0])
    }

    /// Whether the host cluster holds data of any of them.
    pub fn any_allocated(self) -> bool {
        self.allocated.any()
    }

    /// What subcluster `number` is, and the end of the run that is the same.
    pub fn run(self, number: usize) -> (Subcluster, usize) {
        let (allocated, zero) = (&self.allocated[number..], &self.zero[number..]);
        let (kind, length) = match (allocated[0], zero[0]) {
            (true, _) => (Subcluster::Allocated, allocated.leading_ones()),
            (_, true) => (Subcluster::Zero, zero.leading_ones()),
            _ => {
                let length = allocated.leading_zeros().min(zero.leading_zeros());
                (Subcluster::Unallocated, length)
            }
        };
        (kind, number + length)
    }

    /// The same, with those of `range` allocated.
    #[must_use]
    pub fn with_allocated(mut self, range: Range<usize>) -> Self {
        self.allocated[range.clone()].fill(true);
        self.zero[range].fill(false);
        self
    }

    /// The same, with those of `range` reading as zero.
    #[must_use]
    pub fn with_zero(mut self, range: Range<usize>) -> Self {
        self.allocated[range.clone()].fill(false);
        self.zero[range].fill(true);
        self
    }
}

/// Numbers of the subclusters, of `bytes` bytes each, that a range of bytes in a cluster touches.
pub fn touched(range: Range<u64>, bytes: u64) -> Range<usize> {
    to_usize(range.start / bytes)..to_usize(range.end.div_ceil(bytes).min(to_u64(COUNT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_without_a_contradiction_survives() {
        for word in [0, 1, 1 << 63, 0x0000_ffff_ffff_0000, 0xffff_ffff, !0 << 32] {
            let subclusters = Subclusters::decode(word);
            assert_eq!(subclusters.map(Subclusters::encode), Some(word));
        }
        assert_eq!(Subclusters::decode(1 << 32 | 1), None);
        assert_eq!(Subclusters::decode(u64::MAX), None);
    }

    #[test]
    fn runs_follow_one_another_to_the_end() {
        let mixed = Subclusters::UNALLOCATED
            .with_allocated(3..7)
            .with_zero(6..9)
            .with_zero(31..32);
        let mut runs = Vec::new();
        let mut at = 0;
        while at < COUNT {
            let (kind, end) = mixed.run(at);
            runs.push((kind, end));
            at = end;
        }
        let expected = [
            (Subcluster::Unallocated, 3),
            (Subcluster::Allocated, 6),
            (Subcluster::Zero, 9),
            (Subcluster::Unallocated, 31),
            (Subcluster::Zero, 32),
        ];
        assert_eq!(runs, expected);
        assert!(mixed.any_allocated() && !Subclusters::ZERO.any_allocated());
    }

    #[test]
    fn a_range_of_bytes_touches_whole_subclusters() {
        assert_eq!(touched(0..1, 2048), 0..1);
        assert_eq!(touched(2047..2049, 2048), 0..2);
        assert_eq!(touched(4096..65536, 2048), 2..32);
    }
}
