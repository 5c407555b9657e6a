//! Dirty bitmaps in memory, in the shape that qcow2 serializes them.
//!
//! A bitmap says which granules of a virtual disk may have changed since a moment. It may say too
//! much, never too little, and this crate is where that promise turns into arithmetic.
//!
//! # What this crate owns
//! - [`Shape`]: how bits map to bytes of the disk and to pages of serialized bits.
//! - [`Page`]: all zeros, all ones, or bits, as a qcow2 bitmap table entry has it.
//! - [`Bitmap`]: a table of pages with the algebra of sets, owned by one thread at a time.
//! - [`SharedBitmap`]: the same bits, marked by many threads at once without a lock.
//!
//! # Invariants
//! 1. Bit `i` covers bytes `i * granularity .. (i + 1) * granularity` of the disk, clipped to its
//!    end. Serialized, bit `i` is bit `i % 8` of byte `i / 8`, least significant first.
//! 2. Bits past the disk's end are zero. An all-ones last page stands for its bits within the disk.
//! 3. Rounding has a direction and the name of the operation says it: *outward* results are
//!    supersets of the exact bytes, *inward* results are subsets.
//! 4. A range outside the disk is an error, never cut in silence: a lost mark is a lost change.
//! 5. No operation costs more than the pages that are bits, plus one step for each page.
//!
//! # What it does not do
//! No I/O, no addresses, no persistence, no names. `tidemark-qcow2` joins shapes and addresses.
//!
//! ```
//! use tidemark_bitmap::{Bitmap, Granularity, Shape};
//!
//! // Two clients kept track at different granularities. What must a backup copy?
//! let disk = 10 << 20;
//! let coarse = Granularity::from_bytes(64 << 10).unwrap();
//! let mut since_monday = Bitmap::new(Shape::new(disk, coarse, 65_536)?);
//! since_monday.mark(0..1)?;
//! let fine = Granularity::from_bytes(4096).unwrap();
//! let mut since_noon = Bitmap::new(Shape::new(disk, fine, 65_536)?);
//! since_noon.mark(70_000..70_001)?;
//!
//! since_monday.union_outward(&since_noon)?;
//! assert_eq!(since_monday.dirty_ranges().collect::<Vec<_>>(), [0..131_072]);
//! # Ok::<(), tidemark_bitmap::Error>(())
//! ```
#![forbid(unsafe_code)]

mod algebra;
mod bitmap;
mod compare;
mod convert;
mod count;
mod error;
mod granularity;
mod iter;
mod page;
mod parallel;
mod project;
mod rescale;
mod resize;
mod scale;
mod serial;
mod shape;
mod shared;
mod turns;
mod words;

pub use bitmap::Bitmap;
pub use error::Error;
pub use granularity::Granularity;
pub use page::Page;
pub use serial::CANONICAL_CHUNK_BYTES;
pub use shape::{MAX_SERIALIZED_BYTES, Shape};
pub use shared::SharedBitmap;
