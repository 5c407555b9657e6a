//! Runs of dirty and clean bytes. Uniform pages and uniform words are stepped over whole.

use std::ops::Range;

use crate::convert::to_u64;
use crate::turns::Turns;
use crate::{Bitmap, Page, words};

impl Bitmap {
    /// Maximal runs of dirty bytes of the disk, in order, the last clipped to the disk's end.
    pub fn dirty_ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let bits = self.shape.bits();
        let mut turns = Turns::new(self);
        std::iter::from_fn(move || {
            let start = turns.seek(true);
            let end = turns.seek(false);
            (start < bits).then(|| self.shape.bytes_of(start..end))
        })
    }

    /// The whole disk as maximal runs, alternately dirty (`true`) and clean, in order.
    pub fn runs(&self) -> impl Iterator<Item = (Range<u64>, bool)> {
        let bits = self.shape.bits();
        let mut turns = Turns::new(self);
        let (mut at, mut is_dirty) = (0, turns.seek(true) == 0);
        std::iter::from_fn(move || {
            let (start, was_dirty) = (at, is_dirty);
            at = turns.seek(!was_dirty);
            is_dirty = !was_dirty;
            (start < bits).then(|| (self.shape.bytes_of(start..at), was_dirty))
        })
    }

    /// The first run of dirty bytes within `from..end`, clipped to it and to the disk. Nothing past
    /// `end` is looked at.
    pub fn next_dirty(&self, from: u64, end: u64) -> Option<Range<u64>> {
        let end = end.min(self.shape.disk_bytes());
        if from >= end {
            return None;
        }
        let granularity = self.shape.granularity();
        let last = end.div_ceil(granularity.bytes());
        let first_dirty = self.find(from >> granularity.bits()..last, true)?;
        let first_clean = self.find(first_dirty..last, false).unwrap_or(last);
        let run = self.shape.bytes_of(first_dirty..first_clean);
        Some(run.start.max(from)..run.end.min(end))
    }

    /// The byte offset of the `n`-th dirty granule, counted from zero: a random `n` below
    /// [`count`](Self::count) is a random dirty place.
    pub fn nth_dirty(&self, n: u64) -> Option<u64> {
        let mut n = n;
        for (index, page) in self.pages.iter().enumerate() {
            let count = self.count_in_page(index);
            if n >= count {
                n -= count;
                continue;
            }
            let within = match page {
                Page::Zeros => None,
                Page::Ones => Some(n),
                Page::Bits(words) => words::nth(words, n),
            };
            let bit = to_u64(index) * self.shape.bits_per_page() + within?;
            return Some(bit << self.shape.granularity().bits());
        }
        None
    }

    /// The first bit of a range that is dirty, or that is clean.
    fn find(&self, bits: Range<u64>, dirty: bool) -> Option<u64> {
        self.shape.split(bits).find_map(|(index, part)| {
            let within = match &self.pages[index] {
                Page::Zeros => (!dirty).then_some(part.start),
                Page::Ones => dirty.then_some(part.start),
                Page::Bits(words) => words::find(words, part, dirty),
            };
            within.map(|bit| to_u64(index) * self.shape.bits_per_page() + bit)
        })
    }
}
