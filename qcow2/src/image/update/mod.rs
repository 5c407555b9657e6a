//! The one structural change of bitmaps and chain record.
//!
//! Everything that is staged becomes true by one write of the header, or nothing does:
//! 1. guest writers leave, the mapping is flushed, recording bitmaps are narrowed to exact bits;
//! 2. new contents, tables and the new directory go into fresh clusters, counted durably;
//! 3. the header's first sector names the new directory and the new slot of the record;
//! 4. what nothing names any more is freed.
//!
//! A crash before 3 leaves the old state and leaked clusters; after it the new one. Here is who
//! waits for it and what is staged; 2 and 3 are in `commit`, 4 in `retire`.

mod commit;
mod pages;
mod resize;
mod retire;
mod stage;

use tidemark_bitmap::Bitmap;

use self::retire::free_retired;
use super::first_cluster::Content;
use super::{BackingReference, Image, Purpose, lock};
use crate::alloc::HostRun;
use crate::error::{Error, Result};
use crate::format::bitmap::DirectoryEntry;
use crate::format::chain::ChainRecord;
use crate::format::header::Header;

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
    /// What the first cluster is to say; the bitmaps, their autoclear bit and the refcount table are
    /// not taken from it.
    content: Content,
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
        self.vet_claims(Purpose::Bitmaps)?;
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
        self.vet_claims(Purpose::Data)?;
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
            let marked = tracker.was_marked();
            if marked {
                tracker.narrow(self)?;
            }
            self.set_tracker(None);
            if marked {
                self.refresh_proofs()?;
            }
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
            content,
            changed: false,
            next_counts: false,
            retired: Vec::new(),
        })
    }

    /// The image that is being changed.
    pub fn image(&self) -> &'a Image {
        self.image
    }

    /// The chain record as it will be.
    pub fn record(&self) -> Option<&ChainRecord> {
        self.content.record.as_ref()
    }

    /// Virtual size of the disk as it will be.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.content.header.disk_bytes
    }

    /// The header as it will be, to be changed: disk size, L1, snapshots, feature bits. What it
    /// names must be counted and written before the update ends.
    pub(crate) fn header_mut(&mut self) -> &mut Header {
        self.changed = true;
        &mut self.content.header
    }

    /// Names another backing file, or none.
    pub(super) fn set_backing(&mut self, backing: Option<&BackingReference>) {
        self.changed = true;
        self.content.set_backing(backing);
    }

    /// The refcounts that were staged in the allocator become true with the header.
    pub(crate) fn commit_next_counts(&mut self) {
        self.changed = true;
        self.next_counts = true;
    }

    /// Replaces the chain record, or drops it.
    pub fn set_record(&mut self, record: Option<ChainRecord>) {
        self.changed = true;
        self.content.record = record;
    }
}
