//! Persistent dirty bitmaps of one image: directory, bits, tracking, proofs.
//!
//! Invariants:
//! - A recording bitmap on disk is a superset of the changes at every instant (`tracker`).
//! - A frozen bitmap is never changed in place; every structural change writes fresh clusters and
//!   becomes true by one write of the header ([`crate::image::Update`]).
//! - A bitmap that is in use by a foreign writer is kept as it is: never read, never healed by a
//!   clean close.
//! - What nobody asks about is not read: listing reads the directory, a write reads the pages it
//!   touches.

pub(crate) mod directory;
pub(crate) mod load;
mod loan;
pub(crate) mod name;
pub mod proof;
mod regions;
pub(crate) mod tracker;

use std::sync::Arc;

use tidemark_bitmap::{Bitmap, Page};

use self::tracker::Tracker;
use crate::error::{Feature, Mistake, Result};
use crate::format::bitmap::DirectoryEntry;
use crate::format::chain::Proof;
use crate::image::{Image, Purpose};

pub use directory::BitmapInfo;
pub(crate) use loan::Lent;
pub use loan::{BitmapMode, Loan};

impl Image {
    /// The bitmaps of the directory, in its order; their bits are not read.
    ///
    /// # Errors
    /// The damage, when the directory cannot be read.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        Ok(self
            .directory()
            .entries(self.file())?
            .iter()
            .map(BitmapInfo::from)
            .collect())
    }

    /// The bits of one bitmap as of now, marks of this session included.
    ///
    /// # Errors
    /// No such bitmap, an inconsistent one, damage, or I/O.
    pub fn load_bitmap(&self, name: &str) -> Result<Bitmap> {
        let entry = self.consistent(name)?;
        let mut bitmap = load::load(self, &entry)?;
        for (number, page) in self.touched_pages(&entry) {
            bitmap.set_page(number, page);
        }
        Ok(bitmap)
    }

    /// Adds the bits of one bitmap as of now to `target`, which may have another granularity; what
    /// is added rounds outward. It is read piece by piece: memory never holds the whole of it.
    ///
    /// # Errors
    /// As [`load_bitmap`](Self::load_bitmap), then `target` holds some of them; a `target` of
    /// another disk size.
    pub fn add_bitmap_to(&self, name: &str, target: &mut Bitmap) -> Result<()> {
        let entry = self.consistent(name)?;
        load::add_to(self, &entry, &self.touched_pages(&entry), target)
    }

    fn consistent(&self, name: &str) -> Result<DirectoryEntry> {
        let entry = self.directory().find(self.file(), name)?.clone();
        if entry.in_use {
            let name = name.to_owned();
            return Err(self.file().invalid(Mistake::BitmapInconsistent(name)));
        }
        Ok(entry)
    }

    /// On disk staged regions are wide; memory has their exact bits.
    fn touched_pages(&self, entry: &DirectoryEntry) -> Vec<(usize, Page)> {
        self.tracker()
            .and_then(|tracker| tracker.touched_pages(&entry.name))
            .unwrap_or_default()
    }

    /// The tracker of this session, made before its first change of guest data.
    ///
    /// First what the header may no longer say after a write is taken back: autoclear bits that we
    /// do not know, and the health of recording bitmaps that lost bits while others had the image.
    pub(crate) fn tracking(&self) -> Result<Arc<Tracker>> {
        if let Some(tracker) = self.tracker() {
            return Ok(tracker);
        }
        let _making = self.tracker_creation();
        if let Some(tracker) = self.tracker() {
            return Ok(tracker);
        }
        // Refcounts and bitmaps that cannot be trusted are refused before the header changes.
        self.vet_claims(Purpose::Data)?;
        let entries = self.directory().entries(self.file())?.to_vec();
        let tracker = Tracker::new(self, &entries)?;
        let tracker = Arc::new(match self.keeps_content() {
            true => tracker.silent(),
            false => tracker,
        });
        let content = self.first_cluster().content().clone();
        let mut next = content.clone();
        next.header.autoclear &= next.header.upheld_autoclear(next.bitmaps.is_some());
        if let Some(record) = &mut next.record {
            for (name, health) in self.new_losses(record)? {
                if let Some(entry) = record.checkpoint_named_mut(&name) {
                    entry.health = health;
                }
            }
        }
        if next.header.autoclear != content.header.autoclear || next.record != content.record {
            self.first_cluster()
                .commit(self.file(), next)
                .inspect_err(|error| self.poison_unless_refused(error))?;
        }
        self.set_tracker(Some(Arc::clone(&tracker)));
        Ok(tracker)
    }

    /// Draws new witnesses for the recording bitmaps of the chain and records their counts, in one
    /// write of the header; without room there the old ones stay. No tracker is alive.
    pub(crate) fn refresh_proofs(&self) -> Result<()> {
        let content = self.first_cluster().content().clone();
        let Some(old) = &content.record else {
            return Ok(());
        };
        let mut record = old.clone();
        for entry in &mut record.checkpoints {
            let Proof::Recording(proof) = &entry.proof else {
                continue;
            };
            let recording = self
                .directory()
                .find(self.file(), &entry.name)
                .is_ok_and(|found| found.auto && !found.in_use);
            if recording && entry.health.is_usable() {
                let bitmap = self.load_bitmap(&entry.name)?;
                entry.proof = Proof::Recording(proof::refresh(self, &bitmap, proof)?);
            }
        }
        if record == *old {
            return Ok(());
        }
        let next = crate::image::first_cluster::Content {
            record: Some(record),
            ..content
        };
        match self.first_cluster().commit(self.file(), next) {
            // Not a byte was written, and the old proofs still hold: bits only came.
            Err(error) if matches!(error.feature(), Some(Feature::NoRoomInFirstCluster { .. })) => {
                Ok(())
            }
            answer => answer.inspect_err(|error| self.poison_unless_refused(error)),
        }
    }
}
