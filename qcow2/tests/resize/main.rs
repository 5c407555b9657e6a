//! Other sizes for a disk: contents, bitmaps and proofs, by us and by QEMU, through every crash and
//! every failure.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod crashes;
mod data_files;
mod failures;
mod lives;
mod overlays;
mod proofs;
mod qemu;
mod refusals;
