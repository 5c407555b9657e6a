//! Whole disks on the move, both ways with QEMU.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(missing_docs, reason = "a test crate exports nothing")]

#[path = "../common/mod.rs"]
mod common;

mod compare;
mod compressed;
mod convert;
mod scene;
