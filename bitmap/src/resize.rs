//! Bitmaps follow their disk when it grows or shrinks.

use crate::{Bitmap, Error, Page, Shape};

impl Bitmap {
    /// The bitmap of the same disk at another size.
    ///
    /// Bits past a smaller end are cut. Bytes that a larger disk gains are dirty if
    /// `grown_is_dirty`, else clean, except those in a granule that was dirty and reached past the
    /// old end: it stays dirty.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the granularity is too fine for the new size.
    pub fn resize(&self, new_disk_bytes: u64, grown_is_dirty: bool) -> Result<Self, Error> {
        let old = self.shape;
        let shape = Shape::new(new_disk_bytes, old.granularity(), old.page_bytes())?;
        let mut result = Self::new(shape);
        for (index, page) in self.pages.iter().enumerate().take(shape.pages()) {
            let mut page = page.clone();
            // All ones meant the old bits only; now there may be more.
            let valid = old.bits_in_page(index);
            if matches!(page, Page::Ones) && shape.bits_in_page(index) > valid {
                page.make_bits(old.words_per_page(), valid);
            }
            result.set_page(index, page);
        }
        if grown_is_dirty && new_disk_bytes > old.disk_bytes() {
            result.mark(old.disk_bytes()..new_disk_bytes)?;
        }
        Ok(result)
    }
}
