//! The virtual disk: open, create, map, read, write, flush, close.
//!
//! Invariants, in the order of the project's goals:
//! - Whatever happens, flushed guest data is there and refcounts are at worst too high. The order
//!   of writes that ensures it is in `docs/ordering.md`.
//! - Before guest data is issued, every recording bitmap holds its mark; see [`crate::bitmaps`].
//! - Opening writes nothing, and opening without a later guest write leaves every byte as it was.

pub(crate) mod backing;
mod claims;
mod create;
mod data_file;
mod distrust;
mod empty;
mod expand;
pub(crate) mod file;
pub(crate) mod first_cluster;
mod flush;
mod grow;
mod layout;
mod locks;
pub(crate) mod map;
mod next_mapping;
mod open;
mod pack;
mod preallocate;
mod read;
mod resize;
mod set_backing;
mod update;
mod write;

use std::sync::{Arc, PoisonError};
use std::time::Instant;

pub use backing::{BackingReference, Gate, NoFiles, PlainFiles};
pub use create::CreateOptions;
pub use data_file::DataFileReference;
pub use map::Extent;
pub use open::OpenOptions;
pub use pack::{Packed, Packer};
pub use preallocate::Preallocation;
pub use resize::Shrink;
pub use set_backing::Below;
pub use update::Update;

pub(crate) use self::next_mapping::{ADD, DROP, NextMapping};

use self::backing::Layer;
use self::claims::Claims;
pub(crate) use self::claims::Purpose;
use self::data_file::GuestData;
use self::expand::ExpandedClusters;
use self::file::ImageFile;
use self::first_cluster::FirstCluster;
use self::locks::{ClusterLocks, Entrance};
use crate::alloc::{Allocator, Structure};
use crate::bitmaps::Lent;
use crate::bitmaps::directory::Directory;
use crate::bitmaps::tracker::Tracker;
use crate::cache::TableCache;
use crate::check::RepairReport;
use crate::codec::CompressionType;
use crate::error::{Damage, Error, Mistake, Result};
use crate::format::chain::Reading;
use crate::format::encryption::EncryptionHeader;
use crate::format::header::{Header, incompatible};
use crate::format::table::L1Entry;
use crate::geometry::Geometry;
use crate::snapshots;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
use crate::units::HostOffset;

/// An open qcow2 image. All operations take `&self` and may run on many threads at once.
///
/// Dropping an image without [`close`](Self::close) is safe at any moment, as a crash is: flushed
/// data is there and no changed block is missed, but bitmaps stay wider than needed and freed
/// clusters may be leaked.
pub struct Image {
    file: ImageFile,
    geometry: Geometry,
    /// Virtual size of the disk, bytes. Changes only while the entrance is closed.
    size: AtomicU64,
    writable: bool,
    backing: Option<Layer>,
    guest: GuestData,
    has_backing_name: bool,
    /// A backing file is about to be named.
    backing_to_come: AtomicBool,
    /// What is written is what the disk shows already.
    keeps_content: AtomicBool,
    /// Entries of the active L1 table as they should be on disk. The table is replaced as a whole
    /// only while the entrance is closed and all cluster locks are owned.
    l1: RwLock<Vec<AtomicU64>>,
    tables: TableCache,
    compression: CompressionType,
    expanded: ExpandedClusters,
    table_creation: Mutex<()>,
    entrance: Entrance,
    clusters: ClusterLocks,
    flushing: Mutex<()>,
    allocator: Mutex<Option<Allocator>>,
    claims: Claims,
    first: Mutex<FirstCluster>,
    directory: Mutex<Directory>,
    /// Present from the first guest write on.
    tracker: RwLock<Option<Arc<Tracker>>>,
    tracker_creation: Mutex<()>,
    /// Bitmaps that backups hold. Changes only while the entrance is closed, but for a loan that
    /// ends.
    lent: RwLock<Vec<Arc<Lent>>>,
    last_narrowing: Mutex<Instant>,
    failed: AtomicBool,
    /// A change met damage: no further one is let in.
    distrusted: AtomicBool,
    /// What opening put right.
    repaired: Option<RepairReport>,
}

impl std::fmt::Debug for Image {
    /// Name, size and mode; the tables of an image would fill screens.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Image")
            .field("name", &self.name())
            .field("size", &self.size())
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the encryption header lies; checked when the image was opened.
pub(crate) fn encryption_header(first: &FirstCluster) -> Option<EncryptionHeader> {
    EncryptionHeader::find(first.header(), first.others())
        .ok()
        .flatten()
}

impl Image {
    /// Virtual size of the disk, bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Cluster size, refcount width and version.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// How its compressed clusters are compressed.
    pub fn compression_type(&self) -> CompressionType {
        self.compression
    }

    /// The storage's name, a path for a file.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The header as it is on disk.
    pub fn header(&self) -> Header {
        lock(&self.first).header().clone()
    }

    /// The backing file that the image names, whether or not it was opened.
    pub fn backing(&self) -> Option<BackingReference> {
        open::backing_reference(&lock(&self.first))
    }

    /// The chain record as it is on disk.
    pub fn chain(&self) -> Reading {
        lock(&self.first).reading().clone()
    }

    /// Whether the image says of itself that it is corrupt.
    pub fn is_marked_corrupt(&self) -> bool {
        self.header().incompatible & incompatible::CORRUPT != 0
    }

    /// The file, for modules that read structures of their own.
    pub(crate) fn file(&self) -> &ImageFile {
        &self.file
    }

    pub(crate) fn l1(&self) -> RwLockReadGuard<'_, Vec<AtomicU64>> {
        self.l1.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps structural changes out until the guard is dropped.
    pub(crate) fn enter(&self) -> impl Sized + '_ {
        self.entrance.enter()
    }

    /// Shows the disk as of a snapshot: its size and its L1 table. Nobody has read from the image.
    pub(crate) fn become_snapshot(&mut self, size: u64, l1: Vec<u64>) {
        self.size = AtomicU64::new(size);
        self.l1 = RwLock::new(l1.into_iter().map(AtomicU64::new).collect());
        self.directory = Mutex::new(Directory::new(Vec::new(), None));
    }

    /// The active L1 table as it is in memory.
    pub(crate) fn l1_words(&self) -> Vec<u64> {
        self.l1()
            .iter()
            .map(|entry| entry.load(Ordering::Acquire))
            .collect()
    }

    /// Where the active L2 tables lie.
    pub(crate) fn active_tables(&self) -> Result<Vec<HostOffset>> {
        let mut tables = Vec::new();
        for number in 0..self.l1_words().len() {
            if let L1Entry::Table { offset, .. } = self.l1_entry(number)? {
                tables.push(offset);
            }
        }
        Ok(tables)
    }

    /// Puts another size and L1 table into memory, which the header names by now. The caller owns
    /// the entrance and all clusters.
    pub(crate) fn replace_mapping(&self, size: u64, l1: Vec<u64>) {
        self.size.store(size, Ordering::Release);
        let mut present = self.l1.write().unwrap_or_else(PoisonError::into_inner);
        *present = l1.into_iter().map(AtomicU64::new).collect();
        drop(present);
        self.tables.clear();
        if let Some(allocator) = lock(&self.allocator).as_mut() {
            allocator.forget_claims();
        }
    }

    pub(crate) fn first_cluster(&self) -> MutexGuard<'_, FirstCluster> {
        lock(&self.first)
    }

    pub(crate) fn directory(&self) -> MutexGuard<'_, Directory> {
        lock(&self.directory)
    }

    pub(crate) fn tracker(&self) -> Option<Arc<Tracker>> {
        self.tracker
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn lent(&self) -> &RwLock<Vec<Arc<Lent>>> {
        &self.lent
    }

    pub(crate) fn tracker_creation(&self) -> MutexGuard<'_, ()> {
        lock(&self.tracker_creation)
    }

    pub(crate) fn set_tracker(&self, tracker: Option<Arc<Tracker>>) {
        *self.tracker.write().unwrap_or_else(PoisonError::into_inner) = tracker;
    }

    /// Runs `work` with the allocator and the first cluster, opening the refcounts if needed.
    pub(crate) fn with_allocator<R>(
        &self,
        work: impl FnOnce(&mut Allocator, &mut FirstCluster) -> Result<R>,
    ) -> Result<R> {
        let mut allocator = lock(&self.allocator);
        let mut first = lock(&self.first);
        let allocator = match &mut *allocator {
            Some(allocator) => allocator,
            empty => empty.insert(self.open_allocator(&first)?),
        };
        work(allocator, &mut first)
    }

    /// Reads the refcount table and protects all metadata, whatever the refcounts say of it. An
    /// image whose metadata shares clusters is refused.
    fn open_allocator(&self, first: &FirstCluster) -> Result<Allocator> {
        let mut allocator = Allocator::open(&self.file, first)?;
        let structure = |name, offset, bytes, counted| Structure {
            name,
            offset,
            clusters: self.geometry.clusters_for(bytes),
            counted,
        };
        // Not inside the loop's head: that would hold the lock that the body takes.
        let l1_entries = self.l1().len();
        let l1_bytes = Geometry::entries_bytes(l1_entries);
        let l1_offset = first.header().l1_offset;
        let mut structures = vec![structure("L1 table", l1_offset, l1_bytes, true)];
        for number in 0..l1_entries {
            if let L1Entry::Table { offset, .. } = self.l1_entry(number)? {
                let bytes = self.geometry.cluster_bytes();
                structures.push(structure("L2 table", offset, bytes, false));
            }
        }
        if let Some(place) = encryption_header(first) {
            let name = "encryption header";
            structures.push(structure(name, place.offset, place.bytes, true));
        }
        let directory = lock(&self.directory);
        for (offset, bytes) in directory.places() {
            let whole = directory.place() == Some((offset, bytes));
            let name = if whole {
                "bitmap directory"
            } else {
                "bitmap table"
            };
            structures.push(structure(name, offset, bytes, whole));
        }
        allocator.vet(&self.file, &structures)?;
        for structure in snapshots::structures(&self.file, first.header())? {
            allocator.protect(&self.file, &structure)?;
        }
        Ok(allocator)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            end => {
                let end = end.unwrap_or(u64::MAX);
                Err(self.file.invalid(Mistake::OutOfRange {
                    offset,
                    end,
                    size: self.size(),
                }))
            }
        }
    }

    pub(crate) fn check_writable(&self) -> Result<()> {
        self.check_flushable()?;
        if self.is_distrusted() {
            return Err(self.file.damage(Damage::MarkedCorrupt));
        }
        Ok(())
    }

    /// Whether what was changed can still be made durable.
    pub(crate) fn check_flushable(&self) -> Result<()> {
        if !self.writable {
            return Err(self.file.invalid(Mistake::ReadOnly));
        }
        if self.failed.load(Ordering::Acquire) {
            return Err(self.file.invalid(Mistake::Poisoned));
        }
        Ok(())
    }

    /// For an error of a header commit: a refusal came before the first byte, anything else leaves
    /// the header in doubt.
    pub(crate) fn poison_unless_refused(&self, error: &Error) {
        if !matches!(error, Error::Unsupported { .. }) {
            self.poison();
        }
    }

    /// After this nothing is written any more: what is durable is no longer known.
    pub(crate) fn poison(&self) {
        self.failed.store(true, Ordering::Release);
    }
}
