//! A read-only file mapped into memory: the fastest random reader there is.
#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe by nature; see the contract of `open`"
)]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::Storage;
use super::lock::{self, Sharing};
use crate::convert::{to_u64, to_usize};

/// A read-only mapping of a whole image file, held under the same locks as a reading
/// [`FileStorage`](super::FileStorage).
#[derive(Debug)]
pub struct MappedStorage {
    map: Mmap,
    path: PathBuf,
    // Keeps the locks: they belong to the open file description.
    _file: File,
}

impl MappedStorage {
    /// Maps the file at `path` for reading.
    ///
    /// # Safety
    /// The caller vouches that nobody cuts the file while it is mapped: reading past a cut raises
    /// SIGBUS and ends the process, and the locks taken here are only honoured by programs that
    /// ask for them.
    ///
    /// # Errors
    /// When the file cannot be opened, locked or mapped.
    pub unsafe fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        lock::acquire(&file, false, Sharing::Exclusive)?;
        // SAFETY: the mapping is private to this value and only read; that the file keeps its
        // length is the caller's promise.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self {
            map,
            path: path.to_owned(),
            _file: file,
        })
    }
}

fn read_only() -> io::Error {
    io::Error::new(
        io::ErrorKind::PermissionDenied,
        "a mapped image is read-only",
    )
}

impl Storage for MappedStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let start = to_usize(offset.min(to_u64(self.map.len())));
        let available = self.map.get(start..).unwrap_or_default();
        let count = available.len().min(buf.len());
        buf[..count].copy_from_slice(&available[..count]);
        Ok(count)
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(to_u64(self.map.len()))
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn writable(&self) -> bool {
        false
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}
