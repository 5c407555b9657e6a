//! The crate's only `as`: between `u64` positions and `usize` indexes.
//!
//! A shape holds at most 2^32 bits, so an index of a page, a word or a byte is below 2^30 and fits
//! a `usize` of 32 bits. Positions of bits and bytes of the disk stay `u64`.

/// An index that a shape has bounded.
#[expect(
    clippy::as_conversions,
    reason = "indexes are below 2^30; the assertion says so"
)]
pub(crate) fn to_usize(index: u64) -> usize {
    debug_assert!(usize::try_from(index).is_ok());
    index as usize
}

/// An index or a length as a position.
#[expect(
    clippy::as_conversions,
    reason = "no target has a usize wider than 64 bits"
)]
pub(crate) const fn to_u64(index: usize) -> u64 {
    index as u64
}
