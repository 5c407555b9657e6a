//! The seam between the engine and whatever holds the bytes of an image.
//!
//! This is the only place where the engine meets the operating system. Everything above works on
//! a [`Storage`]; the crash and fault tests put their own behind it.
//!
//! Contract of every implementation:
//! - All calls take `&self` and may run on many threads at once; overlapping writes are ordered by
//!   the caller.
//! - A write is durable only after a later [`Storage::flush`] returned `Ok`. Until then any subset
//!   of its sectors may survive a crash.
//! - After a failed flush nothing written since the last good one may be assumed durable.

mod file;
mod lock;
mod mapped;
mod memory;

use std::fmt::Debug;
use std::io;

use crate::convert::to_usize;

pub use file::{FileStorage, Sharing};
pub use mapped::MappedStorage;
pub use memory::MemoryStorage;

/// A file of the system, whatever its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Device that the file lies on; of a block device the device itself.
    pub device: u64,
    /// Number of the file there; zero for a block device.
    pub inode: u64,
}

impl FileIdentity {
    /// The identity of an open file.
    fn of(file: &std::fs::File) -> Option<Self> {
        use std::os::unix::fs::{FileTypeExt, MetadataExt};
        let metadata = file.metadata().ok()?;
        if metadata.file_type().is_block_device() {
            let (device, inode) = (metadata.rdev(), 0);
            return Some(Self { device, inode });
        }
        let (device, inode) = (metadata.dev(), metadata.ino());
        Some(Self { device, inode })
    }
}

/// Random-access bytes with an explicit durability barrier.
pub trait Storage: Send + Sync + Debug {
    /// Reads into `buf` from byte `offset`; returns the bytes read, fewer than asked only at the
    /// end of the storage (zero at or beyond it).
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `buf` at byte `offset`, growing the storage if it ends before.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes `len` bytes from `offset` read as zero, growing the storage if it ends before.
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes `len` bytes from `offset` read as zero and takes the space for them, so that later
    /// writes there do not run out of it; grows the storage if it ends before.
    fn allocate_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        write_zero_buffers(self, offset, len)
    }

    /// Says that the content of the range is no longer needed. Afterwards it reads as its old
    /// content or as zeros; a storage that cannot give space back does nothing.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes every completed write durable.
    fn flush(&self) -> io::Result<()>;

    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether the storage holds no byte.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or grows (with zeros) to `len` bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Whether writing is possible at all.
    fn writable(&self) -> bool;

    /// What an error message calls it: a path for a file.
    fn name(&self) -> String;

    /// Which file of the system it is, so that two names of one file can be told; `None` for what
    /// is no file.
    fn identity(&self) -> Option<FileIdentity> {
        None
    }

    /// Whether writing behind the end makes it longer; a block device has its size.
    fn can_grow(&self) -> bool {
        true
    }

    /// Bytes in a row at `offset` that certainly read as zero because nothing is stored there;
    /// zero when that is unknown. A hint that saves reading holes, never needed for correctness.
    fn hole_at(&self, _offset: u64) -> io::Result<u64> {
        Ok(0)
    }

    /// Bytes in a row at `offset`, which is in no hole, up to the next hole; more than there are
    /// when that is unknown. A hint as [`hole_at`](Self::hole_at).
    fn data_at(&self, _offset: u64) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

/// Largest buffer of zeros that is written at once.
const ZERO_BUFFER_BYTES: u64 = 1 << 20;

/// Writes zeros as data.
pub(crate) fn write_zero_buffers<S>(storage: &S, offset: u64, len: u64) -> io::Result<()>
where
    S: Storage + ?Sized,
{
    let buffer = vec![0; to_usize(len.min(ZERO_BUFFER_BYTES))];
    let mut done = 0;
    while done < len {
        let step = (len - done).min(ZERO_BUFFER_BYTES);
        storage.write_at(&buffer[..to_usize(step)], offset + done)?;
        done += step;
    }
    Ok(())
}
