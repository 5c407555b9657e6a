//! A qcow2 engine with crash-safe persistent dirty bitmaps.
//!
//! Layers, bottom up; each uses those above it in this list and never those below:
//! [`codec`] (one compressed cluster), [`mod@format`] (bytes and values), [`storage`] (the only
//! code that meets the system), `cache` (mapping tables), `alloc` (who owns a cluster), [`image`]
//! (the virtual disk), [`bitmaps`] (persistent bitmaps), [`snapshots`] (moments inside the image),
//! [`mod@check`] (the consistency check), [`transfer`] (whole disks on the move).
//!
//! Where to begin: [`guide`].

mod alloc;
pub mod bitmaps;
mod cache;
pub mod check;
pub mod codec;
mod convert;
pub mod error;
pub mod format;
pub mod geometry;
#[doc = include_str!("../../docs/vmm.md")]
pub mod guide {}
pub mod image;
pub mod snapshots;
pub mod storage;
mod sync;
pub mod transfer;
pub mod units;

pub use bitmaps::{BitmapInfo, BitmapMode, Loan, proof};
pub use check::{CheckReport, Finding, Loss, Repair, RepairReport};
pub use codec::CompressionType;
pub use error::{Damage, Error, Feature, Mistake, Result};
pub use format::chain;
pub use image::{
    BackingReference, Below, CreateOptions, DataFileReference, Extent, Gate, Image, NoFiles,
    OpenOptions, Packed, Packer, PlainFiles, Preallocation, Shrink, Update,
};
pub use snapshots::{Delta, Moment, SnapshotInfo};
pub use storage::{FileStorage, MappedStorage, MemoryStorage, Sharing, Storage};
pub use tidemark_bitmap::{Bitmap, Granularity};
