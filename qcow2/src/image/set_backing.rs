//! Another backing file for an image, by the one commit of the header.
//!
//! - Nothing but the name and the format changes: the mapping and the chain record stay, and so does
//!   every extension of others.
//! - What the image does not hold itself may read differently from then on. Unless the caller
//!   vouches that it does not, it is marked in the recording bitmaps, in the same commit.
//! - [`crate::transfer::rebase`] makes it read the same, and then vouches for it.

use std::ops::Range;

use super::{BackingReference, Image, Update, lock};
use crate::error::{Error, Mistake, Result};
use crate::format::limits;
use crate::sync::atomic::Ordering;

/// Bytes of the longest format name that QEMU reads.
const MAX_FORMAT_BYTES: usize = 15;
/// Bytes of disk whose mapping is looked at in one go.
const WINDOW_BYTES: u64 = 64 << 30;

/// What the caller knows of the disk below an image that gets another backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// Where the image holds nothing, the old and the new backing file show the same bytes; the
    /// caller vouches for it. No bitmap is marked.
    Same,
    /// It may show anything: recording bitmaps mark all that the image does not hold.
    Unknown,
}

impl Image {
    /// Names another backing file, or none, in the header, and closes the image. The file is not
    /// looked at.
    ///
    /// # Errors
    /// A name or a format that cannot be, a disk whose data file is to be raw, no room in the first
    /// cluster, a damaged mapping, all before the first write; I/O.
    pub fn set_backing(self, backing: Option<&BackingReference>, below: Below) -> Result<()> {
        self.check_writable()?;
        self.check_new_backing(backing)?;
        self.update(|update| {
            if below == Below::Unknown {
                self.mark_what_shows_through(update)?;
            }
            update.set_backing(backing);
            Ok::<(), Error>(())
        })?;
        self.close()
    }

    fn mark_what_shows_through(&self, update: &mut Update<'_>) -> Result<()> {
        let mut recording = Vec::new();
        for info in update.bitmaps() {
            if info.auto && !info.in_use {
                recording.push((update.load(&info.name)?, info.name));
            }
        }
        if recording.is_empty() {
            return Ok(());
        }
        self.each_gap(|range| {
            recording.iter_mut().try_for_each(|(bits, _)| {
                bits.mark(range.clone())
                    .map_err(|error| self.file.invalid(Mistake::Bitmap(error)))
            })
        })?;
        for (bits, name) in recording {
            update.put(&name, bits, true)?;
        }
        Ok(())
    }

    /// Runs of the disk that this image does not hold itself, in order.
    fn each_gap(&self, mut found: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let size = self.size();
        let mut at = 0;
        while at < size {
            let end = (at + WINDOW_BYTES).min(size);
            for extent in self.map_own(at, end)? {
                if !extent.present {
                    found(extent.start..extent.start + extent.length)?;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Refuses what [`set_backing`](Self::set_backing) would refuse; nothing is written.
    pub(crate) fn check_new_backing(&self, backing: Option<&BackingReference>) -> Result<()> {
        if let Some(backing) = backing {
            self.check_reference(backing)?;
        }
        let first = lock(&self.first);
        let mut next = first.content().clone();
        next.set_backing(backing);
        first.check_room(&self.file, &next)
    }

    /// From now on only what the disk shows already is written: no bitmap is marked.
    pub(crate) fn keep_content(&self) -> Result<()> {
        // Ends a tracker that was there before, with its exact bits on disk.
        self.update(|_| Ok::<(), Error>(()))?;
        self.keeps_content.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether what is written is what the disk shows already.
    pub(crate) fn keeps_content(&self) -> bool {
        self.keeps_content.load(Ordering::Acquire)
    }

    /// From now on zeros are stored as zeros, for a backing file will show where nothing is.
    pub(crate) fn expect_backing(&self) {
        self.backing_to_come.store(true, Ordering::Release);
    }

    /// Whether what is not allocated shows, or is about to show, a backing file.
    pub(super) fn shows_backing(&self) -> bool {
        self.names_backing() || self.backing_to_come.load(Ordering::Acquire)
    }

    /// Whether the image names a backing file that was not opened.
    pub(crate) fn is_without_backing(&self) -> bool {
        self.has_backing_name && self.backing.is_none()
    }

    fn check_reference(&self, backing: &BackingReference) -> Result<()> {
        let refuse = |option, problem| Err(self.file.invalid(Mistake::Option { option, problem }));
        let longest = crate::convert::index(limits::MAX_BACKING_NAME_BYTES);
        if backing.name.is_empty() || backing.name.len() > longest {
            return refuse("backing_file", "a name has 1 to 1023 bytes");
        }
        if backing.name.contains(&0) {
            return refuse("backing_file", "a name has no NUL byte");
        }
        if backing.format.is_empty() || backing.format.len() > MAX_FORMAT_BYTES {
            return refuse("backing_fmt", "a format has 1 to 15 bytes");
        }
        if self.header().has_raw_data_file() {
            return refuse("data_file_raw", "a raw disk cannot have a backing file");
        }
        Ok(())
    }
}
