//! Storage in a regular file or block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::Whence;

use super::{FileIdentity, Storage, lock, write_zero_buffers};
use crate::convert::to_u64;

pub use super::lock::Sharing;

/// Gives the space of a range back; what was there reads as zero.
const PUNCH: FallocateFlags =
    FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);

/// An open image file with QEMU-compatible locks on it.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    writable: bool,
}

impl FileStorage {
    /// Opens an existing file or block device and takes the locks that QEMU would take.
    ///
    /// # Errors
    /// When it is missing, is neither a regular file nor a block device (a FIFO would hang), or is
    /// in use by somebody that does not share it.
    pub fn open(path: &Path, write: bool, sharing: Sharing) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_CLOEXEC)
            .open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file or block device",
            ));
        }
        lock::acquire(&file, write, sharing)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            writable: write,
        })
    }

    /// Creates the file, or takes an existing one that nobody uses and empties it.
    ///
    /// # Errors
    /// As [`open`](Self::open), or when the directory cannot be written.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path);
        match file {
            Ok(file) => {
                lock::acquire(&file, true, Sharing::Exclusive)?;
                Ok(Self {
                    file,
                    path: path.to_owned(),
                    writable: true,
                })
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let storage = Self::open(path, true, Sharing::Exclusive)?;
                storage.file.set_len(0)?;
                Ok(storage)
            }
            Err(error) => Err(error),
        }
    }

    /// The path it was opened under.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(io::ErrorKind::FileTooLarge.into());
        };
        match fallocate(&self.file, flags, offset, len) {
            Ok(()) => Ok(true),
            Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Storage for FileStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + to_u64(done)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let end = self.len()?;
        if offset >= end {
            return self.file.set_len(offset + len);
        }
        if !self.allocate(PUNCH, offset, len)? {
            return write_zero_buffers(self, offset, len);
        }
        if offset + len > end {
            self.file.set_len(offset + len)
        } else {
            Ok(())
        }
    }

    fn allocate_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let blank = offset >= self.len()? || self.allocate(PUNCH, offset, len)?;
        if blank && self.allocate(FallocateFlags::empty(), offset, len)? {
            return Ok(());
        }
        write_zero_buffers(self, offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(PUNCH, offset, len).map(|_| ())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        if metadata.file_type().is_block_device() {
            let end = nix::unistd::lseek(&self.file, 0, Whence::SeekEnd)?;
            return u64::try_from(end).map_err(io::Error::other);
        }
        Ok(metadata.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn can_grow(&self) -> bool {
        let kind = self.file.metadata().map(|metadata| metadata.file_type());
        !kind.is_ok_and(|kind| kind.is_block_device())
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn identity(&self) -> Option<FileIdentity> {
        FileIdentity::of(&self.file)
    }

    fn hole_at(&self, offset: u64) -> io::Result<u64> {
        let Ok(start) = i64::try_from(offset) else {
            return Ok(0);
        };
        match nix::unistd::lseek(&self.file, start, Whence::SeekData) {
            Ok(data) => Ok(u64::try_from(data)
                .map_err(io::Error::other)?
                .saturating_sub(offset)),
            // Past the last data: the rest of the file is a hole.
            Err(nix::errno::Errno::ENXIO) => Ok(self.len()?.saturating_sub(offset)),
            Err(_) => Ok(0),
        }
    }

    fn data_at(&self, offset: u64) -> io::Result<u64> {
        let hole = i64::try_from(offset)
            .ok()
            .and_then(|start| nix::unistd::lseek(&self.file, start, Whence::SeekHole).ok())
            .and_then(|hole| u64::try_from(hole).ok());
        Ok(hole.map_or(u64::MAX, |hole| hole.saturating_sub(offset)))
    }
}
