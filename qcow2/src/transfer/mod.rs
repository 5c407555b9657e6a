//! Whole disks on the move: convert, compare, measure, rebase, commit.
//!
//! A layer above the image and its bitmaps. It owns how a disk is cut into pieces, how many threads
//! work on them, and what is read or skipped; it knows no command line and opens no file by name.
//!
//! Invariants:
//! - Memory is bounded: each thread has one buffer of a piece, and tables are mapped window by
//!   window. Nothing grows with the size of a disk.
//! - What the tables say reads as zero is never read; what is zero is never stored as data, unless
//!   the caller asks for a full copy.
//! - Refusals come before the first write. When copying ends, the target is durable.

mod bitmaps;
mod commit;
mod commit_bitmaps;
mod compare;
mod convert;
mod crew;
mod measure;
mod pieces;
mod rebase;
mod source;
mod target;
mod zeros;

pub use commit::{CommitOptions, Committed, commit};
pub use commit_bitmaps::{LeftBehind, LeftReason};
pub use compare::{CompareError, CompareOptions, Comparison, compare};
pub use convert::{ConvertOptions, Converted, check_bitmaps, convert};
pub use measure::{Measure, Measured};
pub use rebase::{RebaseOptions, Rebased, rebase};
pub use source::Source;
pub use target::Target;

/// Hears how many bytes of how many are done; called by many threads.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Threads that work on one disk unless the caller says otherwise.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(2, |count| count.get().clamp(2, 16))
}
