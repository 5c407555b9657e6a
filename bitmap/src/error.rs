//! What a caller can get wrong. Bits themselves cannot be wrong, so there is nothing else.

use std::ops::Range;

use crate::Granularity;

/// A request that a bitmap cannot serve. The bitmap is unchanged after any of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A range of disk bytes ends past the disk's end, or ends before it starts.
    #[error("range {range:?} does not lie within a disk of {disk_bytes} bytes")]
    OutOfRange {
        /// The range asked for, in bytes of the disk.
        range: Range<u64>,
        /// The disk's size in bytes.
        disk_bytes: u64,
    },
    /// Two bitmaps of disks of different sizes. Resize one first, and say what the growth means.
    #[error("bitmaps of disks of {ours} and {theirs} bytes cannot be combined")]
    SizesDiffer {
        /// The disk size of the bitmap that was asked, in bytes.
        ours: u64,
        /// The disk size of the argument, in bytes.
        theirs: u64,
    },
    /// The serialized bits would exceed [`MAX_SERIALIZED_BYTES`](crate::MAX_SERIALIZED_BYTES).
    #[error("a bitmap of {serialized_bytes} bytes is larger than the limit of {limit} bytes")]
    TooLarge {
        /// The size that the serialized bits would have, in bytes.
        serialized_bytes: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A page is not a power of two between 512 bytes and 2 MiB.
    #[error("a bitmap page of {0} bytes is not a power of two from 512 to 2097152")]
    BadPageSize(u32),
    /// A concurrent mark met a page that nobody has loaded. Load it, then mark again.
    #[error("bitmap page {0} is not loaded")]
    PageNotLoaded(usize),
    /// A rescale to a coarser granularity was asked for a finer one.
    #[error("{} bytes is not coarser than {} bytes", to.bytes(), from.bytes())]
    NotCoarser {
        /// The bitmap's granularity.
        from: Granularity,
        /// The granularity asked for.
        to: Granularity,
    },
    /// A rescale to a finer granularity was asked for a coarser one.
    #[error("{} bytes is not finer than {} bytes", to.bytes(), from.bytes())]
    NotFiner {
        /// The bitmap's granularity.
        from: Granularity,
        /// The granularity asked for.
        to: Granularity,
    },
}
