//! L2 tables in memory: shared lookups, dirty ranges, eviction.
//!
//! Invariants:
//! - An entry is changed under its table's own lock together with the dirty range, so that a
//!   write-back copies entries that belong to one moment.
//! - A dirty table is held by the dirty list as well: eviction cannot drop it.
//! - `fresh` tables are not named by the L1 table on disk; they may be written in any order before
//!   the barrier that precedes their L1 entry.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use byteorder::{BigEndian, ByteOrder};

use crate::convert::{to_u64, to_usize};
use crate::error::Result;
use crate::format::table::RawL2;
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, RwLock};
use crate::units::HostOffset;

const SHARDS: usize = 16;
/// Tables are written back in whole sectors.
const WORDS_PER_SECTOR: usize = 64;
/// Bytes of clean L2 tables kept in memory.
const CLEAN_BYTES: u64 = 32 << 20;

/// One L2 table.
#[derive(Debug)]
pub(crate) struct L2Table {
    words: Box<[AtomicU64]>,
    words_per_entry: usize,
    offset: HostOffset,
    fresh: AtomicBool,
    guarded: AtomicBool,
    dirty: Mutex<Option<Range<usize>>>,
}

impl L2Table {
    /// Raw entry `slot`. The caller holds the lock of its cluster, so that the two words of an
    /// extended entry belong together.
    pub(crate) fn entry(&self, slot: usize) -> RawL2 {
        let at = slot * self.words_per_entry;
        let word = |at: usize| self.words[at].load(Ordering::Acquire);
        RawL2 {
            entry: word(at),
            subclusters: if self.words_per_entry == 2 {
                word(at + 1)
            } else {
                0
            },
        }
    }

    /// Raw entry `slot`, for those who do not hold the lock of its cluster.
    pub(crate) fn steady_entry(&self, slot: usize) -> RawL2 {
        // Entries change under this lock. One word is whole without it.
        let _steady = (self.words_per_entry > 1).then(|| self.dirty());
        self.entry(slot)
    }

    /// All words as they are now.
    pub(crate) fn words(&self) -> Vec<u64> {
        let _steady = self.dirty();
        let words = self.words.iter();
        words.map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Where the table lies.
    pub(crate) fn offset(&self) -> HostOffset {
        self.offset
    }

    /// Whether its data clusters were found not to lie on metadata.
    pub(crate) fn is_guarded(&self) -> bool {
        self.guarded.load(Ordering::Acquire)
    }

    /// Its data clusters do not lie on metadata.
    pub(crate) fn set_guarded(&self) {
        self.guarded.store(true, Ordering::Release);
    }

    fn dirty(&self) -> MutexGuard<'_, Option<Range<usize>>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A copy of the dirty part of a table, taken at one moment.
#[derive(Debug)]
pub(crate) struct DirtyPart {
    pub(crate) index: usize,
    pub(crate) fresh: bool,
    table: Arc<L2Table>,
    range: Range<usize>,
    bytes: Vec<u8>,
}

impl DirtyPart {
    pub(crate) fn write(&self, file: &ImageFile) -> Result<()> {
        let at = self
            .table
            .offset
            .plus(Geometry::entries_bytes(self.range.start));
        file.write(&self.bytes, at, "write L2 table")
    }

    /// The L1 table on disk names the table now.
    pub(crate) fn published(&self) {
        self.table.fresh.store(false, Ordering::Release);
    }
}

/// All L2 tables in memory, by L1 index.
#[derive(Debug)]
pub(crate) struct TableCache {
    shards: Vec<RwLock<HashMap<usize, Arc<L2Table>>>>,
    dirty: Mutex<BTreeMap<usize, Arc<L2Table>>>,
    clean_per_shard: usize,
    words: usize,
    words_per_entry: usize,
}

impl TableCache {
    pub(crate) fn new(geometry: &Geometry) -> Self {
        let tables = to_usize(CLEAN_BYTES >> geometry.cluster_bits);
        Self {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            dirty: Mutex::default(),
            clean_per_shard: (tables / SHARDS).max(2),
            words: to_usize(geometry.table_entries(1)),
            words_per_entry: geometry.words_per_l2_entry(),
        }
    }

    fn shard(&self, index: usize) -> &RwLock<HashMap<usize, Arc<L2Table>>> {
        &self.shards[index % SHARDS]
    }

    /// The table if it is in memory.
    pub(crate) fn peek(&self, index: usize) -> Option<Arc<L2Table>> {
        let shard = self
            .shard(index)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        shard.get(&index).cloned()
    }

    /// The table, read from where `place` says unless it is in memory.
    ///
    /// `place` is asked and the table read under the lock that creating and clearing take: what was
    /// seen outside could be older than a table that was loaded, changed, written and evicted in
    /// the meantime, or belong to a mapping that was replaced.
    pub(crate) fn load(
        &self,
        file: &ImageFile,
        index: usize,
        place: impl FnOnce() -> Result<Option<HostOffset>>,
    ) -> Result<Option<Arc<L2Table>>> {
        if let Some(table) = self.peek(index) {
            return Ok(Some(table));
        }
        let mut shard = self
            .shard(index)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = shard.get(&index) {
            return Ok(Some(Arc::clone(table)));
        }
        let Some(offset) = place()? else {
            return Ok(None);
        };
        let raw = file.read_table(offset, self.words, "read L2 table")?;
        Ok(Some(self.insert(&mut shard, index, offset, raw, false)))
    }

    /// A new table that the disk does not have yet, with these words.
    pub(crate) fn create(&self, index: usize, offset: HostOffset, raw: Vec<u64>) -> Arc<L2Table> {
        let mut shard = self
            .shard(index)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        shard.remove(&index);
        let table = self.insert(&mut shard, index, offset, raw, true);
        drop(shard);
        *table.dirty() = Some(0..self.words);
        self.dirty_list().insert(index, Arc::clone(&table));
        table
    }

    fn insert(
        &self,
        shard: &mut HashMap<usize, Arc<L2Table>>,
        index: usize,
        offset: HostOffset,
        raw: Vec<u64>,
        fresh: bool,
    ) -> Arc<L2Table> {
        if shard.len() >= self.clean_per_shard {
            // A count of one: neither on the dirty list nor in anybody's hands.
            let mut excess = shard.len() / 2 + 1;
            shard.retain(|_, table| {
                let keep = excess == 0 || Arc::strong_count(table) > 1;
                excess -= usize::from(!keep);
                keep
            });
        }
        let table = shard.entry(index).or_insert_with(|| {
            Arc::new(L2Table {
                words: raw.into_iter().map(AtomicU64::new).collect(),
                words_per_entry: self.words_per_entry,
                offset,
                fresh: AtomicBool::new(fresh),
                guarded: AtomicBool::new(false),
                dirty: Mutex::new(None),
            })
        });
        Arc::clone(table)
    }

    fn dirty_list(&self) -> MutexGuard<'_, BTreeMap<usize, Arc<L2Table>>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes entries from `slot` on.
    pub(crate) fn set(&self, index: usize, table: &Arc<L2Table>, slot: usize, raw: &[RawL2]) {
        let mut dirty = table.dirty();
        let first = slot * self.words_per_entry;
        for (entry, value) in table.words[first..].chunks(self.words_per_entry).zip(raw) {
            for (word, value) in entry.iter().zip([value.entry, value.subclusters]) {
                word.store(value, Ordering::Release);
            }
        }
        let start = first / WORDS_PER_SECTOR * WORDS_PER_SECTOR;
        let end = (first + raw.len() * self.words_per_entry)
            .next_multiple_of(WORDS_PER_SECTOR)
            .min(self.words);
        let was_clean = dirty.is_none();
        *dirty = Some(match dirty.take() {
            None => start..end,
            Some(old) => old.start.min(start)..old.end.max(end),
        });
        drop(dirty);
        if was_clean {
            self.dirty_list().insert(index, Arc::clone(table));
        }
    }

    /// Forgets every table, after the tables on disk were replaced. Nothing is dirty, and nobody
    /// reads or writes.
    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            shard
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }
    }

    /// Tables with entries not yet written.
    pub(crate) fn dirty_tables(&self) -> usize {
        self.dirty_list().len()
    }

    /// Takes a copy of everything dirty; from now on it counts as clean.
    pub(crate) fn take_dirty(&self) -> Vec<DirtyPart> {
        let taken = std::mem::take(&mut *self.dirty_list());
        let mut parts = Vec::new();
        for (index, table) in taken {
            let mut dirty = table.dirty();
            let Some(range) = dirty.take() else { continue };
            let raw: Vec<u64> = table.words[range.clone()]
                .iter()
                .map(|word| word.load(Ordering::Acquire))
                .collect();
            drop(dirty);
            let mut bytes = vec![0; to_usize(to_u64(raw.len()) * 8)];
            BigEndian::write_u64_into(&raw, &mut bytes);
            let fresh = table.fresh.load(Ordering::Acquire);
            parts.push(DirtyPart {
                index,
                fresh,
                table,
                range,
                bytes,
            });
        }
        parts
    }

    /// Makes parts dirty again whose write failed.
    pub(crate) fn restore_dirty(&self, parts: Vec<DirtyPart>) {
        for part in parts {
            let mut dirty = part.table.dirty();
            *dirty = Some(match dirty.take() {
                None => part.range.clone(),
                Some(old) => old.start.min(part.range.start)..old.end.max(part.range.end),
            });
            drop(dirty);
            self.dirty_list().insert(part.index, part.table);
        }
    }
}
