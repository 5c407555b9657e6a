//! What one bitmap says about a page of another shape.
//!
//! Every operation on two bitmaps, and every rescale, is a loop over the pages of the result that
//! asks a [`Projection`] for its words; granularities and page sizes differ nowhere else.
//!
//! Two facts keep it small. From coarse to fine, and at one granularity, a projection is exact.
//! From fine to coarse, the inward projection is the complement of the outward projection of the
//! complement, so one kernel serves both directions.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::ops::Range;

use crate::convert::{to_u64, to_usize};
use crate::{Bitmap, Page, Shape, scale, words};

/// Which way a granule goes that is dirty only in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// It is dirty: the result is a superset.
    Outward,
    /// It is clean: the result is a subset.
    Inward,
}

/// The words of a projected page.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cover<'a> {
    Clean,
    Dirty,
    Words(&'a [u64]),
}

/// `source`, seen through the bits of the shape `onto`, which has the same disk size.
#[derive(Clone, Copy)]
pub(crate) struct Projection<'a> {
    source: &'a Bitmap,
    onto: Shape,
    /// The kernel works on complements. Only for rounding inward to something coarser.
    inverted: bool,
}

impl<'a> Projection<'a> {
    pub(crate) fn new(source: &'a Bitmap, onto: Shape, rounding: Rounding) -> Self {
        debug_assert_eq!(source.shape.disk_bytes(), onto.disk_bytes());
        let is_finer = source.shape.granularity() < onto.granularity();
        Self {
            source,
            onto,
            inverted: is_finer && rounding == Rounding::Inward,
        }
    }

    /// Page `page` of the result. `scratch` is a buffer to work in.
    pub(crate) fn cover<'s>(&'s self, page: usize, scratch: &'s mut Vec<u64>) -> Cover<'s> {
        if let Some(uniform) = self.uniform(page) {
            return uniform;
        }
        if let Some(words) = self.borrow(page) {
            return Cover::Words(words);
        }
        scratch.clear();
        scratch.resize(self.onto.words_per_page(), 0);
        self.or_raw(page, scratch);
        if self.inverted {
            words::invert(scratch);
            words::mask_tail(scratch, self.onto.bits_in_page(page));
        }
        Cover::Words(scratch)
    }

    /// Page `page` of the result as a page of its own.
    pub(crate) fn page(&self, page: usize) -> Page {
        let mut scratch = Vec::new();
        let mut projected = match self.cover(page, &mut scratch) {
            Cover::Clean => return Page::Zeros,
            Cover::Dirty => return Page::Ones,
            Cover::Words(words) if self.borrow(page).is_some() => Page::Bits(words.into()),
            Cover::Words(_) => Page::Bits(scratch.into_boxed_slice()),
        };
        projected.normalise(self.onto.bits_in_page(page));
        projected
    }

    /// Sets the bits of the projection of page `page` in `out`, without a detour through a buffer.
    pub(crate) fn or_into(&self, page: usize, out: &mut [u64]) {
        debug_assert!(!self.inverted);
        self.or_raw(page, out);
    }

    /// What the source's pages say without a look at their bits.
    pub(crate) fn uniform(&self, page: usize) -> Option<Cover<'static>> {
        let pages = &self.source.pages[self.source_pages(&self.source_bits(page))];
        if pages.iter().all(|page| matches!(page, Page::Zeros)) {
            Some(Cover::Clean)
        } else if pages.iter().all(|page| matches!(page, Page::Ones)) {
            Some(Cover::Dirty)
        } else {
            None
        }
    }

    /// The source's own words, where they are the answer as they stand.
    fn borrow(&self, page: usize) -> Option<&'a [u64]> {
        let shape = self.source.shape;
        let fits = shape.page_bytes() >= self.onto.page_bytes();
        if shape.granularity() != self.onto.granularity() || !fits {
            return None;
        }
        let start = self.onto.page_bits(page).start;
        match &self.source.pages[shape.page_of_bit(start)] {
            Page::Bits(words) => {
                let first = to_usize(start % shape.bits_per_page() / 64);
                Some(&words[first..first + self.onto.words_per_page()])
            }
            Page::Zeros | Page::Ones => None,
        }
    }

    /// The source's bits that cover page `page`.
    fn source_bits(&self, page: usize) -> Range<u64> {
        let bytes = self.onto.page_range(page);
        let granularity = self.source.shape.granularity();
        bytes.start >> granularity.bits()..bytes.end.div_ceil(granularity.bytes())
    }

    fn source_pages(&self, bits: &Range<u64>) -> Range<usize> {
        self.source.shape.page_of_bit(bits.start)..self.source.shape.page_of_bit(bits.end - 1) + 1
    }

    /// Sets the bits of the outward projection of the source, or of its complement.
    fn or_raw(&self, page: usize, out: &mut [u64]) {
        let target = self.onto.page_bits(page);
        let wanted = self.source_bits(page);
        for index in self.source_pages(&wanted) {
            let of_page = self.source.shape.page_bits(index);
            let bits = of_page.start.max(wanted.start)..of_page.end.min(wanted.end);
            match &self.source.pages[index] {
                Page::Zeros if self.inverted => words::set(out, self.landing(&target, bits)),
                Page::Ones if !self.inverted => words::set(out, self.landing(&target, bits)),
                Page::Zeros | Page::Ones => {}
                Page::Bits(words) => {
                    let relative = bits.start - of_page.start..bits.end - of_page.start;
                    self.or_bits(&target, of_page.start, words, relative, out);
                }
            }
        }
        words::mask_tail(out, target.end - target.start);
    }

    /// Where bits of the source land on the target page: outward, relative to its start.
    fn landing(&self, target: &Range<u64>, bits: Range<u64>) -> Range<u64> {
        let bytes = self.source.shape.bytes_of(bits);
        let granularity = self.onto.granularity();
        let start = bytes.start >> granularity.bits();
        let end = bytes.end.div_ceil(granularity.bytes());
        start.max(target.start) - target.start..end.min(target.end) - target.start
    }

    /// [`Self::or_raw`] for the bits `bits` of one source page whose first bit is `origin`.
    fn or_bits(
        &self,
        target: &Range<u64>,
        origin: u64,
        source: &[u64],
        bits: Range<u64>,
        out: &mut [u64],
    ) {
        let (ours, theirs) = (self.source.shape.granularity(), self.onto.granularity());
        let k = u32::from(ours.bits().abs_diff(theirs.bits()));
        if k > scale::MAX_WORD_RATIO {
            return self.or_runs(target, origin, source, bits, out);
        }
        // Pages hold a multiple of 4,096 bits, so up to a ratio of 64 every boundary is a word's.
        let into = self.landing(target, origin + bits.start..origin + bits.end);
        let out = &mut out[to_usize(into.start / 64)..to_usize(into.end.div_ceil(64))];
        let source = &source[to_usize(bits.start / 64)..to_usize(bits.end.div_ceil(64))];
        match ours.cmp(&theirs) {
            Ordering::Equal => words::or(out, source),
            Ordering::Greater => scale::or_finer(out, source, k),
            Ordering::Less if self.inverted => {
                let source = with_tail_set(source, bits.end - bits.start);
                scale::or_coarser(out, &source, k, u64::MAX);
            }
            Ordering::Less => scale::or_coarser(out, source, k, 0),
        }
    }

    /// [`Self::or_bits`] for ratios beyond a word's: run by run.
    fn or_runs(
        &self,
        target: &Range<u64>,
        origin: u64,
        source: &[u64],
        bits: Range<u64>,
        out: &mut [u64],
    ) {
        let mut at = bits.start;
        while let Some(start) = words::find(source, at..bits.end, !self.inverted) {
            let end = words::find(source, start..bits.end, self.inverted).unwrap_or(bits.end);
            words::set(out, self.landing(target, origin + start..origin + end));
            at = end;
        }
    }
}

/// The words with every bit from `valid` on set, so that the complement has none past the end.
fn with_tail_set(source: &[u64], valid: u64) -> Cow<'_, [u64]> {
    let end = to_u64(source.len()) * 64;
    if valid == end {
        return Cow::Borrowed(source);
    }
    let mut source = source.to_vec();
    words::set(&mut source, valid..end);
    Cow::Owned(source)
}
