//! Every numeric conversion of the crate: the one file with `as`.

#![expect(
    clippy::as_conversions,
    reason = "the conversions of the crate live here, each checked"
)]

const _: () = assert!(
    usize::BITS == 64,
    "host offsets and table indexes need 64-bit usize"
);

/// A length or index in memory as a 64-bit number; lossless.
pub(crate) const fn to_u64(value: usize) -> u64 {
    value as u64
}

/// A 64-bit number as an index; lossless because the crate needs a 64-bit target.
pub(crate) const fn to_usize(value: u64) -> usize {
    value as usize
}

/// A 32-bit number as an index; lossless.
pub(crate) const fn index(value: u32) -> usize {
    value as usize
}

/// The low 32 bits.
///
/// # Panics
/// If `value` does not fit; callers have bounded it before.
pub(crate) const fn to_u32(value: u64) -> u32 {
    assert!(
        value <= u32::MAX as u64,
        "value was bounded before it was narrowed"
    );
    value as u32
}

/// The low 16 bits.
///
/// # Panics
/// If `value` does not fit; callers have bounded it before.
pub(crate) const fn to_u16(value: usize) -> u16 {
    assert!(
        value <= u16::MAX as usize,
        "value was bounded before it was narrowed"
    );
    value as u16
}

/// The low 32 bits, other bits dropped.
pub(crate) const fn low_u32(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// The low byte, other bits dropped.
pub(crate) const fn low_byte(value: u64) -> u8 {
    (value & 0xff) as u8
}
