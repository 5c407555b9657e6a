//! The one structural change of bitmaps and chain record.
//!
//! Everything that is staged becomes true by one write of the header, or nothing does:
//! 1. guest writers leave, the mapping is flushed, recording bitmaps are narrowed to exact bits;
//! 2. new contents, tables and the new directory go into fresh clusters, counted durably;
//! 3. the header's first sector names the new directory and the new slot of the record;
//! 4. what nothing names any more is freed.
//!
//! A crash before 3 leaves the old state and leaked clusters; after it the new one.

use tidemark_bitmap::{Bitmap, Granularity};

use super::first_cluster::Content;
use super::retire::{free_retired, retired_structures};
use super::{Image, lock};
use crate::alloc::{HostRun, TablePlace};
use crate::bitmaps::directory::{Directory, shape};
use crate::bitmaps::{BitmapInfo, load, proof};
use crate::convert::{to_u32, to_u64, to_usize};
use crate::error::{Error, Feature, Mistake, Result};
use crate::format::bitmap::{self, BitmapsExtension, DirectoryEntry, TableEntry};
use crate::format::chain::ChainRecord;
use crate::format::header::Header;
use crate::format::limits;
use crate::units::HostOffset;

/// A bitmap of the directory to come.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) entry: DirectoryEntry,
    /// Bits that replace what is on disk, or are new.
    pub(super) content: Option<Bitmap>,
}

/// Changes of bitmaps and chain record that are staged and not yet true.
///
/// While it exists, guest writes wait: do not write to or flush the same image from inside.
#[derive(Debug)]
pub struct Update<'a> {
    image: &'a Image,
    pub(super) slots: Vec<Slot>,
    pub(super) record: Option<ChainRecord>,
    /// The header to come; the bitmaps' autoclear bit and the refcount table are not taken from it.
    header: Header,
    changed: bool,
    /// The allocator holds refcounts that become true with the header.
    next_counts: bool,
    /// Entries on disk whose structures will no longer be named.
    pub(super) retired: Vec<DirectoryEntry>,
}

impl Image {
    /// Runs `work` on the bitmaps and the chain record and makes all its changes true at once.
    ///
    /// # Errors
    /// Those of `work`, and then nothing has changed; a read-only image; no room in the first
    /// cluster; I/O. After an error while the header itself was written the image refuses to go
    /// on, because only the disk knows which of the two states it has.
    pub fn update<R, E: From<Error>>(
        &self,
        work: impl FnOnce(&mut Update<'_>) -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        self.check_writable()?;
        let _alone = self.entrance.close();
        self.end_tracking()?;
        let (answer, retired) = self.run_update(work)?;
        if let Some(retired) = retired {
            free_retired(self, &retired)?;
        }
        Ok(answer)
    }

    /// As [`update`](Self::update), for a change of the mapping or of the disk's size: nobody reads
    /// either, and `after` puts the new L1 table or size into memory once the header is durable.
    pub(crate) fn restructure<R>(
        &self,
        work: impl FnOnce(&mut Update<'_>) -> Result<R>,
        after: impl FnOnce(&Self, R) -> Result<()>,
    ) -> Result<()> {
        self.check_writable()?;
        let _alone = self.entrance.close();
        self.end_tracking()?;
        let _everything = self.clusters.own_all();
        let (answer, retired) = self.run_update(work)?;
        // Before anything else can fail: memory must not fall behind the header.
        after(self, answer)?;
        retired.map_or(Ok(()), |retired| free_retired(self, &retired))
    }

    /// Everything in memory goes to disk, recording bitmaps with their exact bits. The caller owns
    /// the entrance.
    fn end_tracking(&self) -> Result<()> {
        self.sync()?;
        if let Some(tracker) = self.tracker() {
            if tracker.was_marked() {
                tracker.narrow(self)?;
            }
            self.set_tracker(None);
            self.refresh_proofs()?;
        }
        Ok(())
    }

    /// Returns the answer and, if the header changed, what it no longer names.
    fn run_update<R, E: From<Error>>(
        &self,
        work: impl FnOnce(&mut Update<'_>) -> std::result::Result<R, E>,
    ) -> std::result::Result<(R, Option<Vec<HostRun>>), E> {
        let mut update = Update::new(self)?;
        let answer = work(&mut update)?;
        let retired = update.changed.then(|| update.commit()).transpose()?;
        Ok((answer, retired))
    }
}

impl<'a> Update<'a> {
    fn new(image: &'a Image) -> Result<Self> {
        let content = lock(&image.first).content().clone();
        let entries = lock(&image.directory).entries(&image.file)?.to_vec();
        let slots = entries
            .into_iter()
            .map(|entry| Slot {
                entry,
                content: None,
            })
            .collect();
        Ok(Self {
            image,
            slots,
            record: content.record,
            header: content.header,
            changed: false,
            next_counts: false,
            retired: Vec::new(),
        })
    }

    /// The image that is being changed.
    pub fn image(&self) -> &'a Image {
        self.image
    }

    /// The bitmaps as they will be.
    pub fn bitmaps(&self) -> Vec<BitmapInfo> {
        self.slots
            .iter()
            .map(|slot| BitmapInfo::from(&slot.entry))
            .collect()
    }

    /// The bits of a bitmap as they will be.
    ///
    /// # Errors
    /// No such bitmap, an inconsistent one, damage, or I/O.
    pub fn load(&self, name: &str) -> Result<Bitmap> {
        let slot = &self.slots[self.find(name)?];
        match &slot.content {
            Some(bitmap) => Ok(bitmap.clone()),
            None if slot.entry.in_use => {
                Err(self.invalid(Mistake::BitmapInconsistent(name.to_owned())))
            }
            None => load::load(self.image, &slot.entry),
        }
    }

    /// The bits of a bitmap that is marked in use, for whoever can prove that they are right.
    ///
    /// # Errors
    /// No such bitmap, damage, or I/O.
    pub fn load_unproven(&self, name: &str) -> Result<Bitmap> {
        let slot = &self.slots[self.find(name)?];
        match &slot.content {
            Some(bitmap) => Ok(bitmap.clone()),
            None => load::load(self.image, &slot.entry),
        }
    }

    /// The chain record as it will be.
    pub fn record(&self) -> Option<&ChainRecord> {
        self.record.as_ref()
    }

    /// Virtual size of the disk as it will be.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.header.disk_bytes
    }

    /// The header as it will be, to be changed: disk size, L1, snapshots, feature bits. What it
    /// names must be counted and written before the update ends.
    pub(crate) fn header_mut(&mut self) -> &mut Header {
        self.changed = true;
        &mut self.header
    }

    /// The refcounts that were staged in the allocator become true with the header.
    pub(crate) fn commit_next_counts(&mut self) {
        self.changed = true;
        self.next_counts = true;
    }

    /// Replaces the chain record, or drops it.
    pub fn set_record(&mut self, record: Option<ChainRecord>) {
        self.changed = true;
        self.record = record;
    }

    /// A clean bitmap of this image's shape.
    ///
    /// # Errors
    /// A granularity too fine for the disk.
    pub fn blank(&self, granularity: Granularity) -> Result<Bitmap> {
        let image = self.image;
        let size = self.disk_bytes();
        shape(&image.file, &image.geometry, size, granularity).map(Bitmap::new)
    }

    /// Adds a bitmap, or replaces its content; the bits always go into fresh clusters. An
    /// inconsistent bitmap of that name becomes consistent: the caller vouches for the bits.
    ///
    /// # Errors
    /// A name that cannot be, too many bitmaps, a version 2 image, or bits of another disk size.
    pub fn put(&mut self, name: &str, bits: Bitmap, recording: bool) -> Result<()> {
        let bits = self.fit(bits)?;
        self.check_new(name)?;
        let entry = DirectoryEntry {
            table_offset: HostOffset::ZERO,
            table_entries: to_u32(to_u64(bits.shape().pages())),
            in_use: false,
            auto: recording,
            granularity: bits.shape().granularity(),
            name: name.as_bytes().to_vec(),
        };
        let slot = Slot {
            entry,
            content: Some(bits),
        };
        match self
            .slots
            .iter_mut()
            .find(|slot| slot.entry.name == name.as_bytes())
        {
            Some(old) => {
                let old = std::mem::replace(old, slot);
                self.retire(old);
            }
            None => self.slots.push(slot),
        }
        self.changed = true;
        Ok(())
    }

    /// Bits in pages of this image's cluster size.
    fn fit(&self, bits: Bitmap) -> Result<Bitmap> {
        let image = self.image;
        let wanted = shape(
            &image.file,
            &image.geometry,
            self.disk_bytes(),
            bits.shape().granularity(),
        )?;
        if bits.shape() == wanted {
            return Ok(bits);
        }
        let mut fitted = Bitmap::new(wanted);
        fitted
            .union_outward(&bits)
            .map_err(|error| self.invalid(Mistake::Bitmap(error)))?;
        Ok(fitted)
    }

    fn check_new(&self, name: &str) -> Result<()> {
        if self.image.geometry.version == 2 {
            return Err(self.image.file.unsupported(Feature::BitmapsInVersion2));
        }
        if name.is_empty() || name.len() > limits::MAX_BITMAP_NAME_BYTES || name.contains('\0') {
            return Err(self.invalid(Mistake::BitmapName(name.len())));
        }
        if self.disk_bytes() == 0 {
            let problem = "a disk of size zero cannot have bitmaps";
            return Err(self.invalid(Mistake::Option {
                option: "size",
                problem,
            }));
        }
        let value = to_u64(self.slots.len());
        if value >= limits::MAX_BITMAPS.into() {
            let limit = limits::MAX_BITMAPS.into();
            return Err(self.image.file.unsupported(Feature::Limit {
                what: "bitmaps",
                value,
                limit,
            }));
        }
        Ok(())
    }

    /// Makes a bitmap record from now on, or stop.
    ///
    /// # Errors
    /// No such bitmap, or an inconsistent one.
    pub fn set_recording(&mut self, name: &str, recording: bool) -> Result<()> {
        let position = self.find(name)?;
        if self.slots[position].entry.in_use {
            return Err(self.invalid(Mistake::BitmapInconsistent(name.to_owned())));
        }
        let entry = &mut self.slots[position].entry;
        self.changed |= entry.auto != recording;
        entry.auto = recording;
        Ok(())
    }

    /// Removes a bitmap, also an inconsistent one.
    ///
    /// # Errors
    /// No such bitmap.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let slot = self.slots.remove(self.find(name)?);
        self.retire(slot);
        self.changed = true;
        Ok(())
    }

    fn retire(&mut self, slot: Slot) {
        if slot.content.is_none() {
            self.retired.push(slot.entry);
        }
    }

    fn find(&self, name: &str) -> Result<usize> {
        self.slots
            .iter()
            .position(|slot| slot.entry.name == name.as_bytes())
            .ok_or_else(|| self.invalid(Mistake::NoSuchBitmap(name.to_owned())))
    }

    pub(super) fn invalid(&self, mistake: Mistake) -> Error {
        self.image.file.invalid(mistake)
    }

    /// Makes everything true; returns what the header no longer names.
    fn commit(mut self) -> Result<Vec<HostRun>> {
        let image = self.image;
        self.check_room()?;
        let freed = retired_structures(image, &self.retired)?;
        let mut taken = Vec::new();
        let written = self.write_structures(&mut taken).and_then(|extension| {
            image.settle()?;
            Ok((extension, self.place_counts()?))
        });
        let (extension, counts) = match written {
            Ok(written) => written,
            Err(error) => {
                image.with_allocator(|allocator, _| allocator.free_now(&image.file, &taken))?;
                return Err(error);
            }
        };
        let entries: Vec<DirectoryEntry> = self.slots.into_iter().map(|slot| slot.entry).collect();
        let committed = commit_header(
            image,
            &self.header,
            counts,
            extension,
            self.record,
            &entries,
        );
        if let Err(error) = committed {
            if matches!(error, Error::Unsupported { .. }) {
                // Refused before the first byte: the new clusters are nobody's.
                image.with_allocator(|allocator, _| allocator.free_now(&image.file, &taken))?;
            } else {
                image.poison();
            }
            return Err(error);
        }
        let place = extension.map(|found| (found.directory_offset, found.directory_bytes));
        *lock(&image.directory) = Directory::new(entries, place);
        if counts.is_some() {
            image
                .with_allocator(|allocator, _| allocator.adopt_next(&image.file))
                .inspect_err(|_| image.poison())?;
        }
        Ok(freed)
    }

    fn place_counts(&self) -> Result<Option<TablePlace>> {
        let image = self.image;
        if !self.next_counts {
            return Ok(None);
        }
        image
            .with_allocator(|allocator, first| allocator.place_next(&image.file, first))
            .map(Some)
            .inspect_err(|error| {
                if matches!(error, Error::Io { .. }) && !error.is_no_space() {
                    image.poison();
                }
            })
    }

    /// Refuses what the first cluster has no room for, before anything is written.
    fn check_room(&self) -> Result<()> {
        // Room depends on which extensions there are, not on what they say.
        let bitmaps = (!self.slots.is_empty()).then_some(BitmapsExtension {
            count: 0,
            directory_bytes: 0,
            directory_offset: HostOffset::ZERO,
        });
        let first = lock(&self.image.first);
        let record = self.record.clone();
        let next = next_content(&self.header, first.header(), None, bitmaps, record);
        first.check_room(&self.image.file, &next)
    }

    /// Writes new contents, tables and the directory; clusters that it took go to `taken`.
    fn write_structures(&mut self, taken: &mut Vec<HostRun>) -> Result<Option<BitmapsExtension>> {
        let image = self.image;
        for slot in &mut self.slots {
            if let Some(bits) = &slot.content {
                slot.entry.table_offset = write_bits(image, bits, taken)?;
            }
        }
        if self.slots.is_empty() {
            return Ok(None);
        }
        let entries: Vec<DirectoryEntry> =
            self.slots.iter().map(|slot| slot.entry.clone()).collect();
        let mut bytes = bitmap::encode_directory(&entries);
        let directory_bytes = to_u64(bytes.len());
        if directory_bytes > limits::MAX_BITMAP_DIRECTORY_BYTES {
            let limit = limits::MAX_BITMAP_DIRECTORY_BYTES;
            let what = "bitmap directory bytes";
            return Err(image.file.unsupported(Feature::Limit {
                what,
                value: directory_bytes,
                limit,
            }));
        }
        let directory_offset = write_new(image, &mut bytes, "write bitmap directory", taken)?;
        let count = to_u32(to_u64(entries.len()));
        Ok(Some(BitmapsExtension {
            count,
            directory_bytes,
            directory_offset,
        }))
    }
}

/// Writes pages and table of one bitmap into fresh clusters; returns where the table is.
fn write_bits(image: &Image, bits: &Bitmap, taken: &mut Vec<HostRun>) -> Result<HostOffset> {
    let mut entries = Vec::with_capacity(bits.shape().pages());
    for (number, page) in bits.pages().iter().enumerate() {
        entries.push(match page {
            tidemark_bitmap::Page::Zeros => TableEntry::Zeros,
            // QEMU reads all-ones entries, but a clipped last page must not say more than it has.
            tidemark_bitmap::Page::Ones
                if bits.shape().bits_in_page(number) == bits.shape().bits_per_page() =>
            {
                TableEntry::Ones
            }
            _ => {
                let mut bytes = vec![0; image.geometry.cluster_len()];
                bits.write_page(number, &mut bytes);
                TableEntry::Cluster(write_new(image, &mut bytes, "write bitmap data", taken)?)
            }
        });
    }
    let mut table = bitmap::encode_table(&entries);
    write_new(image, &mut table, "write bitmap table", taken)
}

/// Writes `bytes`, padded with zeros to whole clusters, into fresh clusters in a row.
fn write_new(
    image: &Image,
    bytes: &mut Vec<u8>,
    what: &'static str,
    taken: &mut Vec<HostRun>,
) -> Result<HostOffset> {
    let clusters = image.geometry.clusters_for(to_u64(bytes.len()));
    bytes.resize(to_usize(clusters << image.geometry.cluster_bits), 0);
    let start =
        image.with_allocator(|allocator, _| allocator.allocate_exact(&image.file, clusters))?;
    taken.push(HostRun {
        start,
        clusters,
        untouched: false,
    });
    image.file.write(bytes, start, what)?;
    Ok(start)
}

fn commit_header(
    image: &Image,
    header: &Header,
    counts: Option<TablePlace>,
    extension: Option<BitmapsExtension>,
    record: Option<ChainRecord>,
    entries: &[DirectoryEntry],
) -> Result<()> {
    let mut first = lock(&image.first);
    let record = record.map(|mut record| {
        record.directory_digest =
            proof::directory_digest(&record, entries.iter().map(BitmapInfo::from));
        record
    });
    let next = next_content(header, first.header(), counts, extension, record);
    first.commit(&image.file, next)
}

fn next_content(
    wanted: &Header,
    present: &Header,
    counts: Option<TablePlace>,
    bitmaps: Option<BitmapsExtension>,
    record: Option<ChainRecord>,
) -> Content {
    let mut header = wanted.clone();
    // It may have moved while the structures were written.
    header.refcount_table_offset = present.refcount_table_offset;
    header.refcount_table_clusters = present.refcount_table_clusters;
    if let Some((offset, clusters)) = counts {
        header.refcount_table_offset = offset;
        header.refcount_table_clusters = clusters;
    }
    header.autoclear = wanted.upheld_autoclear(bitmaps.is_some());
    Content {
        header,
        bitmaps,
        record,
    }
}
