//! The arithmetic between bytes of the disk, bits, words and pages, done once and checked.

use std::ops::Range;

use crate::convert::{to_u64, to_usize};
use crate::{Error, Granularity};

/// The largest serialized bitmap, in bytes: 2^32 bits.
///
/// 512 MiB is what QEMU accepts as the size of a bitmap's data; a larger one could not be read
/// back by anybody else.
pub const MAX_SERIALIZED_BYTES: u64 = 512 << 20;

const MIN_PAGE_BYTES: u32 = 512;
const MAX_PAGE_BYTES: u32 = 2 << 20;

/// Which bytes of a disk a bit stands for, and how the serialized bits are cut into pages.
///
/// A page is one cluster of serialized bits, so `page_bytes` is the image's cluster size. The last
/// page, and the last granule, may reach past the disk's end; what lies there is no part of the
/// bitmap. A disk of no bytes has no bits and no pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    disk_bytes: u64,
    granularity: Granularity,
    page_bytes: u32,
    /// log2 of the bits in a page: turns the hot divisions into shifts.
    page_shift: u32,
}

impl Shape {
    /// A shape for a disk of `disk_bytes`, one bit for each `granularity`, `page_bytes` bytes of
    /// serialized bits a page.
    ///
    /// # Errors
    /// [`Error::BadPageSize`] unless `page_bytes` is a power of two from 512 to 2 MiB;
    /// [`Error::TooLarge`] if the serialized bits exceed [`MAX_SERIALIZED_BYTES`].
    pub fn new(disk_bytes: u64, granularity: Granularity, page_bytes: u32) -> Result<Self, Error> {
        let in_range = (MIN_PAGE_BYTES..=MAX_PAGE_BYTES).contains(&page_bytes);
        if !in_range || !page_bytes.is_power_of_two() {
            return Err(Error::BadPageSize(page_bytes));
        }
        let page_shift = page_bytes.trailing_zeros() + 3;
        let shape = Self {
            disk_bytes,
            granularity,
            page_bytes,
            page_shift,
        };
        let serialized_bytes = shape.serialized_bytes();
        if serialized_bytes > MAX_SERIALIZED_BYTES {
            return Err(Error::TooLarge {
                serialized_bytes,
                limit: MAX_SERIALIZED_BYTES,
            });
        }
        Ok(shape)
    }

    /// The disk's size in bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// Bytes of the disk that one bit covers.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Bytes of serialized bits in a page.
    pub fn page_bytes(&self) -> u32 {
        self.page_bytes
    }

    /// Bits in the bitmap: granules that the disk begins.
    pub fn bits(&self) -> u64 {
        self.disk_bytes.div_ceil(self.granularity.bytes())
    }

    /// Bytes of all serialized bits, the last byte padded with zero bits.
    pub fn serialized_bytes(&self) -> u64 {
        self.bits().div_ceil(8)
    }

    /// Pages in the bitmap; the entries of its table.
    pub fn pages(&self) -> usize {
        to_usize(self.bits().div_ceil(self.bits_per_page()))
    }

    /// Bits in a full page.
    pub fn bits_per_page(&self) -> u64 {
        1 << self.page_shift
    }

    /// 64-bit words in a page.
    pub fn words_per_page(&self) -> usize {
        1 << (self.page_shift - 6)
    }

    /// Bits of page `page` that lie within the disk; less than a full page only in the last.
    pub fn bits_in_page(&self, page: usize) -> u64 {
        let bits = self.page_bits(page);
        bits.end - bits.start
    }

    /// Bytes of the disk that a full page covers.
    pub fn bytes_per_page_coverage(&self) -> u64 {
        self.bits_per_page() << self.granularity.bits()
    }

    /// Bytes of the disk that page `page` covers, clipped to the disk's end.
    pub fn page_range(&self, page: usize) -> Range<u64> {
        self.bytes_of(self.page_bits(page))
    }

    /// The page whose bits cover the byte at `offset`; `pages()` or more for one past the end.
    pub fn page_of(&self, offset: u64) -> usize {
        let page = offset >> (u32::from(self.granularity.bits()) + self.page_shift);
        usize::try_from(page).unwrap_or(usize::MAX)
    }

    /// `range` rounded outward to granules and clipped to the disk's end.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if `range` does not lie within the disk.
    pub fn round_outward(&self, range: Range<u64>) -> Result<Range<u64>, Error> {
        Ok(self.bytes_of(self.bits_touching(&range)?))
    }

    /// Bits of the granules that `range` touches.
    pub(crate) fn bits_touching(&self, range: &Range<u64>) -> Result<Range<u64>, Error> {
        self.require_within(range)?;
        if range.is_empty() {
            return Ok(0..0);
        }
        let shift = self.granularity.bits();
        Ok(range.start >> shift..((range.end - 1) >> shift) + 1)
    }

    /// Bits of the granules that lie wholly inside `range`; the disk's end completes the last one.
    pub(crate) fn bits_inside(&self, range: &Range<u64>) -> Result<Range<u64>, Error> {
        self.require_within(range)?;
        let start = range.start.div_ceil(self.granularity.bytes());
        let end = if range.end == self.disk_bytes {
            self.bits()
        } else {
            range.end >> self.granularity.bits()
        };
        Ok(if start < end { start..end } else { 0..0 })
    }

    /// Bits of page `page`, clipped to the disk's end.
    pub(crate) fn page_bits(&self, page: usize) -> Range<u64> {
        let start = to_u64(page) << self.page_shift;
        start..(start + self.bits_per_page()).min(self.bits())
    }

    /// Bytes of the disk that `bits` cover, clipped to the disk's end.
    pub(crate) fn bytes_of(&self, bits: Range<u64>) -> Range<u64> {
        let shift = self.granularity.bits();
        (bits.start << shift).min(self.disk_bytes)..(bits.end << shift).min(self.disk_bytes)
    }

    /// The page that holds bit `bit`.
    pub(crate) fn page_of_bit(&self, bit: u64) -> usize {
        to_usize(bit >> self.page_shift)
    }

    /// Cuts a range of bits at page boundaries: the page, and the bits relative to its start.
    pub(crate) fn split(&self, bits: Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> {
        let shape = *self;
        let mut at = bits.start;
        std::iter::from_fn(move || {
            if at >= bits.end {
                return None;
            }
            let page = shape.page_of_bit(at);
            let start = to_u64(page) << shape.page_shift;
            let end = (start + shape.bits_per_page()).min(bits.end);
            let part = at - start..end - start;
            at = end;
            Some((page, part))
        })
    }

    fn require_within(&self, range: &Range<u64>) -> Result<(), Error> {
        if range.start > range.end || range.end > self.disk_bytes {
            return Err(Error::OutOfRange {
                range: range.clone(),
                disk_bytes: self.disk_bytes,
            });
        }
        Ok(())
    }
}
