//! Other granularities and other page sizes.
//!
//! There is no neutral rescale. What will be added to something, or copied by a backup, goes to a
//! superset; what will be taken away goes to a subset; to something finer is exact.

use crate::project::{Projection, Rounding};
use crate::{Bitmap, Error, Granularity, Shape, parallel};

impl Bitmap {
    /// At a coarser granularity: a granule is dirty if any of its bytes is.
    ///
    /// # Errors
    /// [`Error::NotCoarser`] if `granularity` is finer than the bitmap's.
    pub fn to_coarser_superset(&self, granularity: Granularity) -> Result<Self, Error> {
        self.require_coarser(granularity)?;
        self.rescale_outward(granularity)
    }

    /// At a coarser granularity: a granule is dirty only if all of its bytes are.
    ///
    /// # Errors
    /// [`Error::NotCoarser`] if `granularity` is finer than the bitmap's.
    pub fn to_coarser_subset(&self, granularity: Granularity) -> Result<Self, Error> {
        self.require_coarser(granularity)?;
        self.rescale_inward(granularity)
    }

    /// At a finer granularity: the same bytes.
    ///
    /// # Errors
    /// [`Error::NotFiner`] if `granularity` is coarser than the bitmap's; [`Error::TooLarge`] if
    /// it is too fine for the disk.
    pub fn to_finer(&self, granularity: Granularity) -> Result<Self, Error> {
        let from = self.shape.granularity();
        if granularity > from {
            return Err(Error::NotFiner {
                from,
                to: granularity,
            });
        }
        self.rescale_outward(granularity)
    }

    /// At any granularity: the smallest bitmap that has every dirty byte.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the granularity is too fine for the disk.
    pub fn rescale_outward(&self, granularity: Granularity) -> Result<Self, Error> {
        self.reshape(granularity, self.shape.page_bytes(), Rounding::Outward)
    }

    /// At any granularity: the largest bitmap without a clean byte.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the granularity is too fine for the disk.
    pub fn rescale_inward(&self, granularity: Granularity) -> Result<Self, Error> {
        self.reshape(granularity, self.shape.page_bytes(), Rounding::Inward)
    }

    /// The same bits cut into pages of another size, as for an image of another cluster size.
    ///
    /// # Errors
    /// [`Error::BadPageSize`] for a size that [`Shape::new`] refuses.
    pub fn with_page_bytes(&self, page_bytes: u32) -> Result<Self, Error> {
        self.reshape(self.shape.granularity(), page_bytes, Rounding::Outward)
    }

    fn reshape(
        &self,
        granularity: Granularity,
        page_bytes: u32,
        rounding: Rounding,
    ) -> Result<Self, Error> {
        let shape = Shape::new(self.shape.disk_bytes(), granularity, page_bytes)?;
        if shape == self.shape {
            return Ok(self.clone());
        }
        let projection = Projection::new(self, shape, rounding);
        let mut result = Self::new(shape);
        let shared = parallel::pays(&[self]);
        parallel::for_each_page(&mut result.pages, page_bytes, shared, |index, page, _| {
            *page = projection.page(index);
        });
        Ok(result)
    }

    fn require_coarser(&self, to: Granularity) -> Result<(), Error> {
        let from = self.shape.granularity();
        if to < from {
            Err(Error::NotCoarser { from, to })
        } else {
            Ok(())
        }
    }
}
