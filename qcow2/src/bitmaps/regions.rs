//! A set of regions of the disk, one bit each, changed and asked by many threads.

use std::ops::Range;

use crate::convert::to_usize;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Regions of `1 << bits` bytes.
#[derive(Debug)]
pub(super) struct RegionSet {
    bits: u32,
    words: Box<[AtomicU64]>,
}

impl RegionSet {
    pub(super) fn new(disk_bytes: u64, bits: u32) -> Self {
        let regions = disk_bytes.div_ceil(1 << bits);
        let words = (0..regions.div_ceil(64))
            .map(|_| AtomicU64::new(0))
            .collect();
        Self { bits, words }
    }

    /// Numbers of the regions that a non-empty range of bytes touches.
    pub(super) fn touched(&self, range: &Range<u64>) -> Range<u64> {
        range.start >> self.bits..((range.end - 1) >> self.bits) + 1
    }

    pub(super) fn has(&self, region: u64) -> bool {
        self.words
            .get(to_usize(region / 64))
            .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (region % 64)) != 0)
    }

    pub(super) fn has_all(&self, range: &Range<u64>) -> bool {
        self.touched(range).all(|region| self.has(region))
    }

    pub(super) fn insert(&self, region: u64) {
        self.words[to_usize(region / 64)].fetch_or(1 << (region % 64), Ordering::AcqRel);
    }

    pub(super) fn remove(&self, region: u64) {
        self.words[to_usize(region / 64)].fetch_and(!(1 << (region % 64)), Ordering::AcqRel);
    }

    pub(super) fn clear(&self) {
        self.words
            .iter()
            .for_each(|word| word.store(0, Ordering::Release));
    }

    /// All regions of the set, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0_u64..).zip(self.words.iter()).flat_map(|(number, word)| {
            let word = word.load(Ordering::Acquire);
            (0..64)
                .filter(move |bit| word & (1 << bit) != 0)
                .map(move |bit| number * 64 + bit)
        })
    }

    /// Bytes of the disk in a region, not clipped to its end.
    pub(super) fn bytes(&self, region: u64) -> Range<u64> {
        region << self.bits..(region + 1) << self.bits
    }
}
