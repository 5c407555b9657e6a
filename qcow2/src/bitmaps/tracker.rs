//! Change tracking under guest writes, safe against loss of power.
//!
//! Memory holds the exact bits. On disk the recording bitmaps are a superset of the truth at every
//! instant, so they stay valid for QEMU and for us whatever happens.
//!
//! - A *region* of the disk is **staged** before any change inside it: its pages are loaded, and it
//!   will be all ones on disk. It is **durable** once that is on the medium.
//! - An overwrite in place waits until its regions are durable. A change of the mapping only needs
//!   them staged: a flush writes staged regions before the mapping, behind one barrier.
//! - The bytes of a bitmap sector on disk are derived: exact bits, and ones for staged regions.
//!   Both only grow while the tracker lives, so writes in any order are supersets.
//! - A region leaves the staged set only while all writers are out: one by one when it has been idle
//!   ([`Tracker::age`]), all when the tracker ends ([`Tracker::narrow`]). Only then may its bits on
//!   disk become exact. A flush narrows nothing.
//! - A page without a cluster gets one, written and counted durably before the table names it. If
//!   there is no space its table entry becomes all ones: one write, no allocation.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use tidemark_bitmap::SharedBitmap;

use super::directory::{read_table, shape};
use super::load::load_page;
use super::regions::RegionSet;
use crate::alloc::{is_space, single};
use crate::convert::{to_u64, to_usize};
use crate::error::{Mistake, Result};
use crate::format::bitmap::{DirectoryEntry, TableEntry};
use crate::geometry::Geometry;
use crate::image::Image;
use crate::sync::{Mutex, MutexGuard};
use crate::units::HostOffset;

/// Smallest region, as a power of two: 4 MiB.
const MIN_REGION_BITS: u32 = 22;
/// Regions of one disk, as a power of two, at most.
const MAX_REGIONS_BITS: u32 = 22;
/// Bytes of a bitmap that are written at once at least.
const SECTOR: usize = 512;

/// The recording bitmaps of an image that is being written.
#[derive(Debug)]
pub(crate) struct Tracker {
    targets: Vec<Target>,
    /// What is written while backups hold bitmaps; in memory only, beside their bitmaps on disk.
    successors: Vec<Arc<SharedBitmap>>,
    staged: RegionSet,
    durable: RegionSet,
    /// Regions that were written since the last [`Tracker::age`].
    recent: RegionSet,
    /// Regions that are staged and not yet durable.
    pending: Mutex<Vec<u64>>,
    committing: Mutex<()>,
}

/// One recording bitmap.
#[derive(Debug)]
struct Target {
    name: Vec<u8>,
    table_offset: HostOffset,
    table: Mutex<Vec<TableEntry>>,
    bits: SharedBitmap,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tracker {
    /// A tracker of the bitmaps of `entries` that record; their tables are read, their bits not.
    pub(crate) fn new(image: &Image, entries: &[DirectoryEntry]) -> Result<Self> {
        let (mut targets, mut pages) = (Vec::new(), Vec::new());
        let size_bits = image.size().max(1).next_power_of_two().trailing_zeros();
        let mut region_bits = MIN_REGION_BITS.max(size_bits.saturating_sub(MAX_REGIONS_BITS));
        for entry in entries.iter().filter(|entry| entry.auto && !entry.in_use) {
            let shape = shape(
                image.file(),
                &image.geometry(),
                image.size(),
                entry.granularity,
            )?;
            region_bits = region_bits.max(entry.granularity.bits().into());
            let table = read_table(image.file(), &image.geometry(), shape, entry)?;
            pages.extend(table.iter().filter_map(|page| match page {
                TableEntry::Cluster(offset) => Some(*offset),
                TableEntry::Zeros | TableEntry::Ones => None,
            }));
            targets.push(Target {
                name: entry.name.clone(),
                table_offset: entry.table_offset,
                table: Mutex::new(table),
                bits: SharedBitmap::new(shape),
            });
        }
        image.with_allocator(|allocator, _| allocator.protect_pages(image.file(), &pages))?;
        Ok(Self {
            targets,
            successors: image.successors(),
            staged: RegionSet::new(image.size(), region_bits),
            durable: RegionSet::new(image.size(), region_bits),
            recent: RegionSet::new(image.size(), region_bits),
            pending: Mutex::default(),
            committing: Mutex::default(),
        })
    }

    /// The same for a session that writes only what the disk shows already: it marks nothing.
    pub(crate) fn silent(self) -> Self {
        Self {
            targets: Vec::new(),
            ..self
        }
    }

    /// Whether any bit was marked.
    pub(crate) fn was_marked(&self) -> bool {
        self.targets.iter().any(|target| target.bits.bits_marked())
    }

    /// Sets the bits of `range` in memory; its regions must be staged.
    pub(crate) fn mark(&self, image: &Image, range: Range<u64>) -> Result<()> {
        if !self.targets.is_empty() && !self.recent.has_all(&range) {
            self.recent
                .touched(&range)
                .for_each(|region| self.recent.insert(region));
        }
        let bitmaps = self.targets.iter().map(|target| &target.bits);
        for bits in bitmaps.chain(self.successors.iter().map(|bits| &**bits)) {
            bits.mark(range.clone())
                .map_err(|error| image.file().invalid(Mistake::Bitmap(error)))?;
        }
        Ok(())
    }

    /// Loads the pages of the regions of `range` and queues them for the next barrier.
    pub(crate) fn stage(&self, image: &Image, range: Range<u64>) -> Result<()> {
        if self.targets.is_empty() || self.staged.has_all(&range) {
            return Ok(());
        }
        let mut pending = lock(&self.pending);
        for region in self.staged.touched(&range) {
            if self.staged.has(region) {
                continue;
            }
            for target in &self.targets {
                for page in target.pages_of(self.staged.bytes(region), image.size()) {
                    if !target.bits.is_loaded(page) {
                        let entry = lock(&target.table)[page];
                        target.bits.load_page(page, &load_page(image, entry)?);
                    }
                }
            }
            self.staged.insert(region);
            pending.push(region);
        }
        Ok(())
    }

    /// Returns when every region of `range` is all ones on the medium, in every bitmap.
    pub(crate) fn cover_durably(&self, image: &Image, range: Range<u64>) -> Result<()> {
        if self.targets.is_empty() || self.durable.has_all(&range) {
            return Ok(());
        }
        self.stage(image, range.clone())?;
        // Whoever comes first writes for all that wait.
        let committing = lock(&self.committing);
        if self.durable.has_all(&range) {
            return Ok(());
        }
        self.commit(image, &committing)
    }

    /// Makes all staged regions durable; ends with a barrier that the caller's writes share.
    pub(crate) fn make_durable(&self, image: &Image) -> Result<()> {
        let committing = lock(&self.committing);
        self.commit(image, &committing)
    }

    fn commit(&self, image: &Image, _committing: &MutexGuard<'_, ()>) -> Result<()> {
        let regions = std::mem::take(&mut *lock(&self.pending));
        let written = self
            .write_regions(image, &regions)
            .and_then(|()| image.settle());
        match written {
            Ok(()) => regions
                .iter()
                .for_each(|&region| self.durable.insert(region)),
            Err(_) => lock(&self.pending).extend(&regions),
        }
        written
    }

    /// Writes the sectors of all bitmaps that hold bits of `regions`.
    fn write_regions(&self, image: &Image, regions: &[u64]) -> Result<()> {
        for target in &self.targets {
            let mut sectors: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
            for &region in regions {
                target.add_sectors(self.staged.bytes(region), image.size(), &mut sectors);
            }
            let homeless = |page: &usize| lock(&target.table)[*page] == TableEntry::Zeros;
            let (fresh, placed): (Vec<_>, Vec<_>) =
                sectors.into_iter().partition(|(page, _)| homeless(page));
            for (page, sectors) in placed {
                self.write_sectors(image, target, page, &sectors)?;
            }
            let fresh: Vec<usize> = fresh.into_iter().map(|(page, _)| page).collect();
            self.place_pages(image, target, &fresh)?;
        }
        Ok(())
    }

    fn write_sectors(
        &self,
        image: &Image,
        target: &Target,
        page: usize,
        sectors: &BTreeSet<usize>,
    ) -> Result<()> {
        let TableEntry::Cluster(offset) = lock(&target.table)[page] else {
            return Ok(());
        };
        for &sector in sectors {
            let mut bytes = [0; SECTOR];
            self.derive(target, page, sector * SECTOR, &mut bytes);
            let at = offset.plus(to_u64(sector * SECTOR));
            image.file().write(&bytes, at, "write bitmap data")?;
        }
        Ok(())
    }

    /// Gives clusters to pages that the disk has as zeros, and names them in the table.
    fn place_pages(&self, image: &Image, target: &Target, pages: &[usize]) -> Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        let mut entries = Vec::new();
        let mut bytes = vec![0; image.geometry().cluster_len()];
        for &page in pages {
            self.derive(target, page, 0, &mut bytes);
            let entry = match write_new_page(image, &bytes) {
                Ok(offset) => TableEntry::Cluster(offset),
                Err(error) if is_space(&error) => TableEntry::Ones,
                Err(error) => return Err(error),
            };
            entries.push((page, entry));
        }
        image.settle()?;
        for (page, entry) in entries {
            target.write_entry(image, page, entry)?;
        }
        Ok(())
    }

    /// Bytes of a page on disk from `first_byte` on: exact bits, and ones for staged regions.
    fn derive(&self, target: &Target, page: usize, first_byte: usize, out: &mut [u8]) {
        target.bits.copy_page_bytes(page, first_byte, out);
        let shape = target.bits.shape();
        let granule = shape.granularity().bytes();
        let first_bit = to_u64(page) * shape.bits_per_page() + to_u64(first_byte) * 8;
        let bits = first_bit..(first_bit + to_u64(out.len()) * 8).min(shape.bits());
        if bits.is_empty() {
            return;
        }
        for region in self
            .staged
            .touched(&(bits.start * granule..bits.end * granule))
        {
            if self.staged.has(region) {
                let bytes = self.staged.bytes(region);
                let ones = (bytes.start / granule).max(bits.start)
                    ..bytes.end.div_ceil(granule).min(bits.end);
                set_bits(out, ones.start - first_bit..ones.end - first_bit);
            }
        }
    }

    /// Writes the exact bits of everything that was staged. The caller owns the entrance: no
    /// writer is inside, and none will stage again.
    pub(crate) fn narrow(&self, image: &Image) -> Result<()> {
        for target in &self.targets {
            let pages: BTreeSet<usize> = self
                .staged
                .iter()
                .flat_map(|region| target.pages_of(self.staged.bytes(region), image.size()))
                .collect();
            for page in pages {
                target.narrow_page(image, page)?;
            }
        }
        Ok(())
    }

    /// Takes the regions that were idle since the last call out of the staged set, with all writers
    /// kept out by `alone`; their exact bits are to be written with [`Self::write_exact`].
    pub(crate) fn age<T>(&self, _alone: &T) -> Vec<u64> {
        let idle: Vec<u64> = self
            .durable
            .iter()
            .filter(|&region| self.staged.has(region) && !self.recent.has(region))
            .collect();
        for &region in &idle {
            self.staged.remove(region);
            self.durable.remove(region);
        }
        self.recent.clear();
        idle
    }

    /// Writes what is known of regions that left the staged set. Writers are back: a region that one
    /// of them staged again is wide again, and its commit comes after this one.
    pub(crate) fn write_exact(&self, image: &Image, regions: &[u64]) -> Result<()> {
        let _committing = lock(&self.committing);
        self.write_regions(image, regions)
    }

    /// Exact bits of a page that was touched, by name of the bitmap.
    pub(crate) fn touched_pages(&self, name: &[u8]) -> Option<Vec<(usize, tidemark_bitmap::Page)>> {
        let target = self.targets.iter().find(|target| target.name == name)?;
        let pages = target.bits.loaded_pages();
        Some(
            pages
                .filter_map(|page| Some((page, target.bits.snapshot_page(page)?)))
                .collect(),
        )
    }
}

impl Target {
    fn pages_of(&self, bytes: Range<u64>, disk_bytes: u64) -> Range<usize> {
        let shape = self.bits.shape();
        let last = bytes.end.min(disk_bytes).saturating_sub(1);
        shape.page_of(bytes.start)..shape.page_of(last) + 1
    }

    fn add_sectors(
        &self,
        bytes: Range<u64>,
        disk_bytes: u64,
        out: &mut BTreeMap<usize, BTreeSet<usize>>,
    ) {
        let shape = self.bits.shape();
        let granule = shape.granularity().bytes();
        let sector_bits = to_u64(SECTOR) * 8;
        let first = bytes.start / granule / sector_bits;
        let last = (bytes.end.min(disk_bytes) - 1) / granule / sector_bits;
        let per_page = shape.bits_per_page() / sector_bits;
        for sector in first..=last {
            out.entry(to_usize(sector / per_page))
                .or_default()
                .insert(to_usize(sector % per_page));
        }
    }

    fn write_entry(&self, image: &Image, page: usize, entry: TableEntry) -> Result<()> {
        let at = self.table_offset.plus(Geometry::entries_bytes(page));
        image.file().write(
            &entry.encode().to_be_bytes(),
            at,
            "write bitmap table entry",
        )?;
        lock(&self.table)[page] = entry;
        Ok(())
    }

    fn narrow_page(&self, image: &Image, page: usize) -> Result<()> {
        let mut bytes = vec![0; image.geometry().cluster_len()];
        if !self.bits.copy_page_bytes(page, 0, &mut bytes) {
            return Ok(());
        }
        let entry = lock(&self.table)[page];
        match entry {
            TableEntry::Cluster(offset) => image.file().write(&bytes, offset, "write bitmap data"),
            TableEntry::Zeros if bytes.iter().all(|&byte| byte == 0) => Ok(()),
            TableEntry::Ones if bytes.iter().all(|&byte| byte == 0xff) => Ok(()),
            TableEntry::Zeros | TableEntry::Ones => {
                match write_new_page(image, &bytes) {
                    Ok(offset) => {
                        image.settle()?;
                        self.write_entry(image, page, TableEntry::Cluster(offset))
                    }
                    // All ones stays: it says too much, never too little.
                    Err(error) if is_space(&error) && entry == TableEntry::Ones => Ok(()),
                    Err(error) => Err(error),
                }
            }
        }
    }
}

/// Writes a page into a new cluster that nothing names yet.
fn write_new_page(image: &Image, bytes: &[u8]) -> Result<HostOffset> {
    let file = image.file();
    let offset = image.with_allocator(|allocator, _| allocator.allocate_exact(file, 1))?;
    match file.write(bytes, offset, "write bitmap data") {
        Ok(()) => Ok(offset),
        Err(error) => {
            image.with_allocator(|allocator, _| allocator.free_now(file, &[single(offset)]))?;
            Err(error)
        }
    }
}

/// Sets a range of bits, least significant first.
fn set_bits(bytes: &mut [u8], bits: Range<u64>) {
    let mut at = bits.start;
    while at < bits.end {
        let byte = &mut bytes[to_usize(at / 8)];
        if at.is_multiple_of(8) && bits.end - at >= 8 {
            *byte = 0xff;
            at += 8;
        } else {
            *byte |= 1 << (at % 8);
            at += 1;
        }
    }
}
