//! Superset and equality, by content.

use crate::project::{Cover, Projection, Rounding};
use crate::{Bitmap, Page, words};

impl Bitmap {
    /// Whether every dirty byte of `other` is dirty here. False for disks of different sizes.
    pub fn contains(&self, other: &Self) -> bool {
        if self.shape.disk_bytes() != other.shape.disk_bytes() {
            return false;
        }
        // A granule of ours is all dirty or all clean, so what `other` touches it must cover.
        let projection = Projection::new(other, self.shape, Rounding::Outward);
        let mut scratch = Vec::new();
        (0..self.pages.len()).all(|index| match &self.pages[index] {
            Page::Ones => true,
            ours => match (projection.cover(index, &mut scratch), ours) {
                (Cover::Clean, _) | (_, Page::Ones) => true,
                (Cover::Dirty, Page::Zeros) => false,
                (Cover::Words(theirs), Page::Zeros) => words::all(theirs, 0),
                (Cover::Dirty, Page::Bits(words)) => {
                    words::is_full(words, self.shape.bits_in_page(index))
                }
                (Cover::Words(theirs), Page::Bits(words)) => words::covers(words, theirs),
            },
        })
    }
}

/// By content: disk size, granularity and set bits. Page size and representation do not count.
impl PartialEq for Bitmap {
    fn eq(&self, other: &Self) -> bool {
        let is_comparable = self.shape.disk_bytes() == other.shape.disk_bytes()
            && self.shape.granularity() == other.shape.granularity();
        if !is_comparable {
            return false;
        }
        let projection = Projection::new(other, self.shape, Rounding::Outward);
        let mut scratch = Vec::new();
        (0..self.pages.len()).all(|index| {
            let valid = self.shape.bits_in_page(index);
            match (&self.pages[index], projection.cover(index, &mut scratch)) {
                (Page::Zeros, Cover::Clean) | (Page::Ones, Cover::Dirty) => true,
                (Page::Zeros, Cover::Dirty) | (Page::Ones, Cover::Clean) => false,
                (Page::Zeros, Cover::Words(words)) => words::all(words, 0),
                (Page::Ones, Cover::Words(words)) => words::is_full(words, valid),
                (Page::Bits(words), Cover::Clean) => words::all(words, 0),
                (Page::Bits(words), Cover::Dirty) => words::is_full(words, valid),
                (Page::Bits(ours), Cover::Words(theirs)) => **ours == *theirs,
            }
        })
    }
}

impl Eq for Bitmap {}
