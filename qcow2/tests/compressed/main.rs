//! Compressed clusters: QEMU's read by us, ours by QEMU, overwritten, torn, raced and hostile.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod crash;
mod extended;
mod faults;
mod foreign;
mod hostile;
mod model;
mod ours;
mod threads;

use tidemark_fixtures::random::Random;
use tidemark_qcow2::CompressionType;

pub(crate) const KINDS: [CompressionType; 2] = [CompressionType::Zlib, CompressionType::Zstd];

/// Bytes that shrink, differently for every `seed`.
pub(crate) fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        let word = random.next_u64();
        out.extend_from_slice(format!("{:x} {} ", word % 5000, seed % 1000).as_bytes());
        if word.is_multiple_of(7) {
            out.extend(std::iter::repeat_n(b'.', to_usize(word >> 58)));
        }
    }
    out.truncate(len);
    out
}

/// Bytes that do not shrink.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::stream(seed, 5);
    let mut out: Vec<u8> = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&random.next_u64().to_be_bytes());
    }
    out.truncate(len);
    out
}

/// A disk with text, zeros and noise, in pieces of odd lengths.
pub(crate) fn disk(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::stream(seed, 77);
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let piece = to_usize(random.within(1..40_000));
        match random.next_u64() % 4 {
            0 => out.extend(std::iter::repeat_n(0, piece)),
            1 => out.extend(noise(seed, piece)),
            _ => out.extend(text(random.next_u64(), piece)),
        }
    }
    out.truncate(len);
    out
}

pub(crate) fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

pub(crate) fn to_u64(value: usize) -> u64 {
    u64::try_from(value).unwrap()
}
