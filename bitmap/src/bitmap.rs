//! A bitmap that one thread owns: marking, clearing, looking up.

use std::fmt;
use std::ops::Range;

use crate::convert::to_u64;
use crate::{Error, Page, Shape, count, parallel, words};

/// A set of granules of one disk, as a table of pages.
///
/// The bitmap denotes a set of bytes: the granules of its set bits, clipped to the disk's end. Two
/// bitmaps are equal if they have the same disk size, granularity and set bits, whatever their page
/// sizes and however their pages are represented.
///
/// Invariant: every `Bits` page has the length of the shape's page, and no bit past the disk's end
/// is set in it.
#[derive(Clone)]
pub struct Bitmap {
    pub(crate) shape: Shape,
    pub(crate) pages: Box<[Page]>,
}

impl Bitmap {
    /// A bitmap with no bit set.
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            pages: vec![Page::Zeros; shape.pages()].into_boxed_slice(),
        }
    }

    /// A bitmap with every bit set.
    pub fn all_dirty(shape: Shape) -> Self {
        Self {
            shape,
            pages: vec![Page::Ones; shape.pages()].into_boxed_slice(),
        }
    }

    /// The bitmap's shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// All pages, in order.
    pub fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// One page.
    ///
    /// # Panics
    /// If the bitmap has no page `index`.
    pub fn page(&self, index: usize) -> &Page {
        &self.pages[index]
    }

    /// Replaces one page. Bits past the disk's end are cleared on the way in: foreign writers
    /// leave some there.
    ///
    /// # Panics
    /// If the bitmap has no page `index`, or the bits are not one page long.
    pub fn set_page(&mut self, index: usize, mut page: Page) {
        if let Page::Bits(words) = &mut page {
            assert_eq!(words.len(), self.shape.words_per_page(), "one page of bits");
            words::mask_tail(words, self.shape.bits_in_page(index));
        }
        self.pages[index] = page;
    }

    /// Sets the bits of all granules that a range of disk bytes touches. An empty range sets none.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if the range does not lie within the disk; nothing is marked then.
    pub fn mark(&mut self, range: Range<u64>) -> Result<(), Error> {
        let bits = self.shape.bits_touching(&range)?;
        self.edit(bits, true);
        Ok(())
    }

    /// Clears the bits of all granules that lie wholly inside a range of disk bytes. The disk's end
    /// completes its last granule.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if the range does not lie within the disk; nothing is cleared then.
    pub fn clear_inward(&mut self, range: Range<u64>) -> Result<(), Error> {
        let bits = self.shape.bits_inside(&range)?;
        self.edit(bits, false);
        Ok(())
    }

    /// Clears every bit.
    pub fn clear_all(&mut self) {
        self.pages.fill(Page::Zeros);
    }

    /// Whether the granule of the byte at `offset` is dirty; false past the disk's end.
    pub fn test(&self, offset: u64) -> bool {
        offset < self.shape.disk_bytes() && {
            let bit = offset >> self.shape.granularity().bits();
            self.pages[self.shape.page_of_bit(bit)].test(bit % self.shape.bits_per_page())
        }
    }

    /// Set bits.
    pub fn count(&self) -> u64 {
        let page_bytes = self.shape.page_bytes();
        parallel::sum(
            self.pages.len(),
            page_bytes,
            parallel::pays(&[self]),
            |page| self.count_in_page(page),
        )
    }

    /// Bytes of the disk in dirty granules, clipped to the disk's end.
    pub fn dirty_bytes(&self) -> u64 {
        let granule = self.shape.granularity().bytes();
        let disk = self.shape.disk_bytes();
        let overhang = self.shape.bits() * granule - disk;
        let last_is_dirty = disk > 0 && self.test(disk - 1);
        self.count() * granule - if last_is_dirty { overhang } else { 0 }
    }

    /// Whether no bit is set.
    pub fn is_clean(&self) -> bool {
        self.pages.iter().all(|page| match page {
            Page::Zeros => true,
            Page::Ones => false,
            Page::Bits(words) => words::all(words, 0),
        })
    }

    /// Set bits of one page, within the disk.
    pub(crate) fn count_in_page(&self, page: usize) -> u64 {
        match &self.pages[page] {
            Page::Zeros => 0,
            Page::Ones => self.shape.bits_in_page(page),
            Page::Bits(words) => count::count(words),
        }
    }

    /// Makes `bits` all dirty or all clean; whole pages lose their bits of their own.
    fn edit(&mut self, bits: Range<u64>, dirty: bool) {
        for (index, part) in self.shape.split(bits) {
            let valid = self.shape.bits_in_page(index);
            let page = &mut self.pages[index];
            match (&page, dirty) {
                (Page::Ones, true) | (Page::Zeros, false) => {}
                (_, true) if part == (0..valid) => *page = Page::Ones,
                (_, false) if part == (0..valid) => *page = Page::Zeros,
                (_, true) => words::set(page.make_bits(self.shape.words_per_page(), valid), part),
                (_, false) => {
                    words::clear(page.make_bits(self.shape.words_per_page(), valid), part);
                }
            }
        }
    }
}

/// Tells the shape and how the pages are represented, not the bits: there may be four thousand
/// million of them.
impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages_like =
            |like: fn(&Page) -> bool| to_u64(self.pages.iter().filter(|page| like(page)).count());
        f.debug_struct("Bitmap")
            .field("shape", &self.shape)
            .field("count", &self.count())
            .field("zeros", &pages_like(|page| matches!(page, Page::Zeros)))
            .field("ones", &pages_like(|page| matches!(page, Page::Ones)))
            .field("bits", &pages_like(|page| matches!(page, Page::Bits(_))))
            .finish()
    }
}
