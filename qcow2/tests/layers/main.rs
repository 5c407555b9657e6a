//! Layers of a backing chain: read through, moved onto another base, committed into the one below.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod chains;
mod commit;
mod commit_bitmaps;
mod commit_failures;
mod rebase;
mod rebase_bitmaps;
mod rebase_failures;
mod stack;
