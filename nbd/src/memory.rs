//! A disk in memory: the simplest export, for tests and as an example.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use crate::convert::{to_u64, to_usize};
use crate::export::{BlockSizes, BlockStatus, Export, Offers, StatusRuns, Zeroing};
use crate::fault::{ErrorCode, Fault};
use crate::protocol::numbers::allocation;

/// Bytes that `base:allocation` looks at together.
const BLOCK: u64 = 4096;

/// Bytes in memory, gone with the process.
#[derive(Debug)]
pub struct MemoryExport {
    bytes: RwLock<Vec<u8>>,
    writable: bool,
    sizes: BlockSizes,
    contexts: BTreeMap<String, Vec<BlockStatus>>,
}

impl MemoryExport {
    /// A disk of zeroes that clients may write.
    pub fn new(size: u64) -> Self {
        Self::with_bytes(vec![0; to_usize(size)])
    }

    /// A disk of these bytes.
    pub fn with_bytes(bytes: Vec<u8>) -> Self {
        Self {
            bytes: RwLock::new(bytes),
            writable: true,
            sizes: BlockSizes::default(),
            contexts: BTreeMap::new(),
        }
    }

    /// The same disk, which clients may only read.
    pub fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }

    /// The same disk, for other requests.
    pub fn with_block_sizes(mut self, sizes: BlockSizes) -> Self {
        self.sizes = sizes;
        self
    }

    /// The same disk with a further context, whose runs cover it.
    pub fn with_context(mut self, name: &str, runs: Vec<BlockStatus>) -> Self {
        self.contexts.insert(name.to_owned(), runs);
        self
    }

    /// A copy of its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, offset: u64, length: u64, work: impl FnOnce(&mut [u8])) -> Result<(), Fault> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        let end = to_usize(offset.saturating_add(length));
        let range = bytes.get_mut(to_usize(offset)..end);
        work(range.ok_or(ErrorCode::Invalid)?);
        Ok(())
    }

    /// Whether the block from `at` on holds only zeroes, and where it ends.
    fn block_at(&self, at: u64) -> BlockStatus {
        let bytes = self.lock();
        let end = (at / BLOCK * BLOCK + BLOCK).min(to_u64(bytes.len()));
        let block = bytes.get(to_usize(at)..to_usize(end)).unwrap_or_default();
        let zero = block.iter().all(|byte| *byte == 0);
        let flags = if zero {
            allocation::HOLE | allocation::ZERO
        } else {
            0
        };
        BlockStatus {
            length: to_u64(block.len()),
            flags,
        }
    }
}

impl Export for MemoryExport {
    fn size(&self) -> u64 {
        to_u64(self.lock().len())
    }

    fn offers(&self) -> Offers {
        Offers {
            writable: self.writable,
            multi_conn: true,
            rotational: false,
        }
    }

    fn block_sizes(&self) -> BlockSizes {
        self.sizes
    }

    fn description(&self) -> String {
        "a disk in memory".to_owned()
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Fault> {
        let bytes = self.lock();
        let end = to_usize(offset).saturating_add(buffer.len());
        let range = bytes.get(to_usize(offset)..end);
        buffer.copy_from_slice(range.ok_or(ErrorCode::Invalid)?);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<(), Fault> {
        self.change(offset, to_u64(data.len()), |range| {
            range.copy_from_slice(data);
        })
    }

    fn zero(&self, offset: u64, length: u64, _how: Zeroing) -> Result<(), Fault> {
        self.change(offset, length, |range| range.fill(0))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), Fault> {
        self.zero(offset, length, Zeroing::default())
    }

    fn flush(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn contexts(&self) -> Vec<String> {
        let own = std::iter::once("base:allocation".to_owned());
        own.chain(self.contexts.keys().cloned()).collect()
    }

    fn block_status<'a>(
        &'a self,
        context: &str,
        range: Range<u64>,
    ) -> Result<StatusRuns<'a>, Fault> {
        let mut at = range.start;
        if context == "base:allocation" {
            return Ok(Box::new(std::iter::from_fn(move || {
                let next = (at < range.end).then(|| self.block_at(at))?;
                at += next.length;
                Some(Ok(next))
            })));
        }
        let runs = self.contexts.get(context).ok_or(ErrorCode::Invalid)?;
        let mut start = 0;
        Ok(Box::new(runs.iter().filter_map(move |run| {
            let end = start + run.length;
            start = end;
            let length = end.checked_sub(at).filter(|length| *length > 0)?;
            at = end;
            Some(Ok(BlockStatus { length, ..*run }))
        })))
    }
}
