//! Where a bitmap turns from clean to dirty and back: one walk forward, a word or a uniform page at
//! a time, without looking a page up again for each turn.

use std::slice;

use crate::{Bitmap, Page};

/// Bits that are looked at together.
#[derive(Clone, Copy)]
enum Stretch {
    /// All alike.
    Uniform(bool),
    /// A word.
    Word(u64),
}

/// A place in a bitmap that only moves on.
pub(crate) struct Turns<'a> {
    pages: slice::Iter<'a, Page>,
    /// Words of the present page behind the present stretch.
    words: slice::Iter<'a, u64>,
    stretch: Stretch,
    /// First bit of the stretch, and the first behind it.
    start: u64,
    end: u64,
    /// The place.
    at: u64,
    /// Bits of the bitmap, and of a page.
    bits: u64,
    bits_per_page: u64,
}

impl<'a> Turns<'a> {
    /// At the first bit.
    pub(crate) fn new(bitmap: &'a Bitmap) -> Self {
        Self {
            pages: bitmap.pages.iter(),
            words: [].iter(),
            stretch: Stretch::Uniform(false),
            start: 0,
            end: 0,
            at: 0,
            bits: bitmap.shape.bits(),
            bits_per_page: bitmap.shape.bits_per_page(),
        }
    }

    /// Moves to the first bit from here on that is dirty, or clean; behind the last bit if there is
    /// none.
    pub(crate) fn seek(&mut self, dirty: bool) -> u64 {
        // What is skipped.
        let dull = if dirty { 0 } else { u64::MAX };
        loop {
            let found = match self.stretch {
                Stretch::Uniform(value) => {
                    (value == dirty && self.at < self.end).then_some(self.at)
                }
                Stretch::Word(word) => {
                    let ahead = self.at - self.start;
                    let wanted = if ahead < 64 {
                        (word ^ dull) & (u64::MAX << ahead)
                    } else {
                        0
                    };
                    (wanted != 0).then(|| self.start + u64::from(wanted.trailing_zeros()))
                }
            };
            if let Some(found) = found {
                self.at = found;
                return found.min(self.bits);
            }
            if !self.next_stretch(dull) {
                return self.bits;
            }
        }
    }

    /// Goes on to the next stretch, past words that are `dull`; false at the end.
    fn next_stretch(&mut self, dull: u64) -> bool {
        loop {
            for &word in self.words.by_ref() {
                self.start = self.end;
                self.end += 64;
                if word != dull {
                    self.stretch = Stretch::Word(word);
                    self.at = self.start;
                    return true;
                }
            }
            let value = match self.pages.next() {
                None => {
                    self.start = self.end;
                    self.at = self.end;
                    return false;
                }
                Some(Page::Bits(words)) => {
                    self.words = words.iter();
                    continue;
                }
                Some(Page::Zeros) => false,
                Some(Page::Ones) => true,
            };
            self.stretch = Stretch::Uniform(value);
            self.start = self.end;
            self.at = self.start;
            self.end += self.bits_per_page;
            return true;
        }
    }
}
