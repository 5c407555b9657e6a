//! Damaged refcounts and shared clusters under a writer: no byte changes that nobody wrote to.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cases;
#[path = "../common/mod.rs"]
mod common;
mod image;
mod large;
mod random;
