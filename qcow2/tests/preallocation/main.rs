//! Disks whose clusters have their places before they are written: beside QEMU's, through every
//! crash and every failure.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod crashes;
mod failures;
mod qemu;

use tidemark_qcow2::Preallocation;

const MODES: [(Preallocation, &str); 3] = [
    (Preallocation::Metadata, "metadata"),
    (Preallocation::Falloc, "falloc"),
    (Preallocation::Full, "full"),
];

fn at(value: u64) -> usize {
    usize::try_from(value).unwrap()
}
