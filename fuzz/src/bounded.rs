//! A file in memory on a full disk: damaged images make an engine write wherever they point, and
//! that must be an error here and not gigabytes of memory.

use std::io;
use std::sync::Arc;

use tidemark_qcow2::{MemoryStorage, Storage};

/// Bytes that the file can have.
const ROOM: u64 = 64 << 20;

/// A file that its clones share.
#[derive(Clone, Debug)]
pub(crate) struct Bounded(Arc<MemoryStorage>);

impl Bounded {
    /// A file that holds `bytes`.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self(Arc::new(MemoryStorage::from_bytes(bytes.to_vec())))
    }

    /// What it holds now.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.0.to_bytes()
    }

    fn within(&self, offset: u64, len: u64) -> io::Result<&MemoryStorage> {
        match offset.checked_add(len) {
            Some(end) if end <= ROOM => Ok(&self.0),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }
}

impl Storage for Bounded {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let len = u64::try_from(buf.len()).map_err(|_| io::ErrorKind::StorageFull)?;
        self.within(offset, len)?.write_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.within(offset, len)?.write_zeroes(offset, len)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.within(len, 0)?.set_len(len)
    }
    fn writable(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        "damaged".to_owned()
    }
}
