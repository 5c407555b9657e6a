//! Every numeric conversion of the crate: the one file with `as`.

#![expect(
    clippy::as_conversions,
    reason = "the conversions of the crate live here, each checked"
)]

const _: () = assert!(usize::BITS == 64, "lengths of requests need 64-bit usize");

/// A length in memory as a 64-bit number; lossless.
pub(crate) const fn to_u64(value: usize) -> u64 {
    value as u64
}

/// A 64-bit number as a length in memory; lossless because the crate needs a 64-bit target.
pub(crate) const fn to_usize(value: u64) -> usize {
    value as usize
}

/// A 32-bit number as a length in memory; lossless.
pub(crate) const fn index(value: u32) -> usize {
    value as usize
}

/// The low 32 bits, other bits dropped.
pub(crate) const fn low_u32(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// A length that its caller has bounded far below 4 GiB.
///
/// # Panics
/// If it does not fit.
pub(crate) const fn to_u32(value: usize) -> u32 {
    assert!(value <= u32::MAX as usize, "bounded before it was narrowed");
    value as u32
}
