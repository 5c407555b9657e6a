//! What is served: a disk that many threads use at once.

use std::ops::Range;

use crate::fault::Fault;

/// What an export lets clients do beyond reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offers {
    /// It can be written, zeroed and trimmed.
    pub writable: bool,
    /// A flush on one connection makes durable what was answered on any other, and all connections
    /// see the same bytes.
    pub multi_conn: bool,
    /// Seeking costs time.
    pub rotational: bool,
}

/// Which requests an export can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it; a power of two up to 64 KiB.
    pub minimum: u32,
    /// What is fast; a power of two.
    pub preferred: u32,
    /// Most bytes of one read or write; lowered to [`crate::Limits::request_bytes`].
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// Any byte, best 4 KiB, at most 32 MiB.
    fn default() -> Self {
        Self {
            minimum: 1,
            preferred: 4096,
            maximum: 32 << 20,
        }
    }
}

/// How a range shall come to read as zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zeroing {
    /// Its space should stay reserved.
    pub keep_space: bool,
    /// Fail with [`crate::ErrorCode::NotSupported`] where it would be as slow as writing data.
    pub only_fast: bool,
}

/// What a metadata context says of a run of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Bytes.
    pub length: u64,
    /// The context's own bits.
    pub flags: u64,
}

/// What a context says of a range, run by run. Not a byte is left out; the last run may go beyond.
pub type StatusRuns<'a> = Box<dyn Iterator<Item = Result<BlockStatus, Fault>> + 'a>;

/// A disk to be served. Ranges are inside it and as its [`BlockSizes`] ask; nothing that changes it
/// is called unless it [`Offers`] so.
///
/// Calls come from many threads at once. What returned before a [`flush`](Self::flush) began must be
/// durable when that returns.
pub trait Export: Send + Sync {
    /// Bytes; the same as long as it is served.
    fn size(&self) -> u64;

    /// What clients may do.
    fn offers(&self) -> Offers {
        Offers::default()
    }

    /// Which requests it can take.
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes::default()
    }

    /// Text for people; may be empty.
    fn description(&self) -> String {
        String::new()
    }

    /// Fills `buffer` with the bytes from `offset` on.
    ///
    /// # Errors
    /// The fault that the client is told; so for all operations.
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Fault>;

    /// Replaces the bytes from `offset` on.
    ///
    /// # Errors
    /// Then any part of the range may have changed.
    fn write(&self, data: &[u8], offset: u64) -> Result<(), Fault>;

    /// Makes `length` bytes read as zero.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn zero(&self, offset: u64, length: u64, how: Zeroing) -> Result<(), Fault>;

    /// Gives up the content of `length` bytes, or parts of it.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn trim(&self, offset: u64, length: u64) -> Result<(), Fault>;

    /// Makes durable what was done before.
    ///
    /// # Errors
    /// Nothing is known to be durable then.
    fn flush(&self) -> Result<(), Fault>;

    /// Prepares for a read of `length` bytes.
    ///
    /// # Errors
    /// The fault that such a read would meet.
    fn cache(&self, _offset: u64, _length: u64) -> Result<(), Fault> {
        Ok(())
    }

    /// Names of its metadata contexts, such as `base:allocation`, at most 1000.
    fn contexts(&self) -> Vec<String> {
        Vec::new()
    }

    /// What one of its contexts says of a range.
    ///
    /// # Errors
    /// The fault that the client is told.
    fn block_status<'a>(
        &'a self,
        context: &str,
        range: Range<u64>,
    ) -> Result<StatusRuns<'a>, Fault>;
}
