//! Storage in memory, for tests and for images that never touch a disk.

use std::io;
use std::sync::PoisonError;

use super::Storage;
use crate::convert::{to_u64, to_usize};
use crate::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A growable byte vector behind a lock; durable by definition.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryStorage {
    /// An empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// A storage that holds `bytes`.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self {
            bytes: RwLock::new(bytes),
        }
    }

    /// A copy of all bytes as they are now.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.read().clone()
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<u8>> {
        self.bytes.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Grows with zeros up to `end`; memory that is not there is a full disk, not the end of the program.
fn grow(bytes: &mut Vec<u8>, end: usize) -> io::Result<()> {
    let missing = end.saturating_sub(bytes.len());
    bytes
        .try_reserve(missing)
        .map_err(|_| io::ErrorKind::StorageFull)?;
    bytes.resize(end.max(bytes.len()), 0);
    Ok(())
}

impl Storage for MemoryStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = self.read();
        let start = to_usize(offset.min(to_u64(bytes.len())));
        let available = bytes.get(start..).unwrap_or_default();
        let count = available.len().min(buf.len());
        buf[..count].copy_from_slice(&available[..count]);
        Ok(count)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.write();
        let start = to_usize(offset);
        let end = start
            .checked_add(buf.len())
            .ok_or(io::ErrorKind::FileTooLarge)?;
        grow(&mut bytes, end)?;
        bytes[start..end].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = self.write();
        let start = to_usize(offset);
        let end = start
            .checked_add(to_usize(len))
            .ok_or(io::ErrorKind::FileTooLarge)?;
        grow(&mut bytes, end)?;
        bytes[start..end].fill(0);
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(to_u64(self.read().len()))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut bytes = self.write();
        bytes.truncate(to_usize(len));
        grow(&mut bytes, to_usize(len))
    }

    fn writable(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }
}
