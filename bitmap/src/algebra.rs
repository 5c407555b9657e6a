//! Sets of bytes: union, difference, intersection, complement.
//!
//! Both bitmaps denote sets of bytes; the result is given in the granules of `self`, rounded as the
//! name says. At one granularity every operation is exact.

use crate::project::{Cover, Projection, Rounding};
use crate::{Bitmap, Error, Granularity, Page, parallel, words};

impl Bitmap {
    /// Adds `other`: every granule that touches one of its dirty bytes becomes dirty.
    ///
    /// Granularities and page sizes may differ.
    ///
    /// # Errors
    /// [`Error::SizesDiffer`] unless the disks are of one size.
    pub fn union_outward(&mut self, other: &Self) -> Result<(), Error> {
        self.require_same_disk(other)?;
        let shape = self.shape;
        let projection = Projection::new(other, shape, Rounding::Outward);
        self.for_each_page_with(other, |index, page, _| {
            if matches!(page, Page::Ones) {
                return;
            }
            match projection.uniform(index) {
                Some(Cover::Clean) => {}
                Some(Cover::Dirty) => *page = Page::Ones,
                Some(Cover::Words(_)) | None => {
                    let valid = shape.bits_in_page(index);
                    projection.or_into(index, page.make_bits(shape.words_per_page(), valid));
                    page.normalise(valid);
                }
            }
        });
        Ok(())
    }

    /// Takes `other` away: a granule becomes clean only if all of its bytes are dirty in `other`.
    ///
    /// # Errors
    /// [`Error::SizesDiffer`] unless the disks are of one size.
    pub fn subtract_inward(&mut self, other: &Self) -> Result<(), Error> {
        self.require_same_disk(other)?;
        let shape = self.shape;
        let projection = Projection::new(other, shape, Rounding::Inward);
        self.for_each_page_with(other, |index, page, scratch| {
            if matches!(page, Page::Zeros) {
                return;
            }
            match projection.cover(index, scratch) {
                Cover::Clean => {}
                Cover::Dirty => *page = Page::Zeros,
                Cover::Words(theirs) => {
                    let valid = shape.bits_in_page(index);
                    words::and_not(page.make_bits(shape.words_per_page(), valid), theirs);
                    page.normalise(valid);
                }
            }
        });
        Ok(())
    }

    /// Keeps the dirty granules that touch a dirty byte of `other`: a superset of the bytes that
    /// are dirty in both.
    ///
    /// # Errors
    /// [`Error::SizesDiffer`] unless the disks are of one size.
    pub fn intersect_outward(&mut self, other: &Self) -> Result<(), Error> {
        self.require_same_disk(other)?;
        let shape = self.shape;
        let projection = Projection::new(other, shape, Rounding::Outward);
        self.for_each_page_with(other, |index, page, scratch| {
            if matches!(page, Page::Zeros) {
                return;
            }
            match projection.cover(index, scratch) {
                Cover::Dirty => {}
                Cover::Clean => *page = Page::Zeros,
                Cover::Words(theirs) => {
                    let valid = shape.bits_in_page(index);
                    words::and(page.make_bits(shape.words_per_page(), valid), theirs);
                    page.normalise(valid);
                }
            }
        });
        Ok(())
    }

    /// The clean bytes, exactly, at the bitmap's own granularity.
    #[must_use]
    pub fn complement(&self) -> Self {
        let shape = self.shape;
        let mut result = self.clone();
        result.for_each_page_with(self, |index, page, _| match page {
            Page::Zeros => *page = Page::Ones,
            Page::Ones => *page = Page::Zeros,
            Page::Bits(words) => {
                let valid = shape.bits_in_page(index);
                words::invert(words);
                words::mask_tail(words, valid);
                page.normalise(valid);
            }
        });
        result
    }

    /// The clean bytes at another granularity, rounded inward: the granules without a dirty byte.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the granularity is too fine for the disk.
    pub fn complement_inward(&self, granularity: Granularity) -> Result<Self, Error> {
        Ok(self.rescale_outward(granularity)?.complement())
    }

    /// The clean bytes at another granularity, rounded outward: the granules with a clean byte.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the granularity is too fine for the disk.
    pub fn complement_outward(&self, granularity: Granularity) -> Result<Self, Error> {
        Ok(self.rescale_inward(granularity)?.complement())
    }

    fn require_same_disk(&self, other: &Self) -> Result<(), Error> {
        let (ours, theirs) = (self.shape.disk_bytes(), other.shape.disk_bytes());
        if ours == theirs {
            Ok(())
        } else {
            Err(Error::SizesDiffer { ours, theirs })
        }
    }

    /// Works on every page, on several threads if the bits of both bitmaps are many.
    fn for_each_page_with<F>(&mut self, other: &Self, work: F)
    where
        F: Fn(usize, &mut Page, &mut Vec<u64>) + Sync + Send,
    {
        let shared = parallel::pays(&[self, other]);
        parallel::for_each_page(&mut self.pages, self.shape.page_bytes(), shared, work);
    }
}
