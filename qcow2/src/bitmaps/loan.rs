//! A bitmap lent to a backup: what it marks at one instant, and what is written meanwhile.
//!
//! Invariants:
//! - While it is lent, a bitmap is *busy*: it is not cleared, replaced, removed, switched, resized or
//!   lent again.
//! - The instant lies between writers: a write that was done before it is in the bits that were
//!   lent, one that begins after it is in the successor.
//! - On disk the bitmap goes on recording everything, the bits that were lent too. So a crash, a
//!   dropped loan and a failed backup lose nothing: it is then as if it had not been lent.
//! - The outcome becomes true by one write of the header.
//!
//! With B the bits that were lent, N what was written since and U what the backup did not copy:
//!
//! | mode | success | failure |
//! |---|---|---|
//! | on success | N | B or N |
//! | never | B or N | B or N |
//! | always | N | U or N |
//!
//! A bitmap that does not record has no N.

use std::sync::{Arc, PoisonError};

use tidemark_bitmap::{Bitmap, SharedBitmap};

use crate::error::{Error, Mistake, Result};
use crate::image::{Image, Update};
use crate::sync::{RwLockReadGuard, RwLockWriteGuard};

/// When a backup uses up the bitmap that it was told to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// When the backup succeeds.
    OnSuccess,
    /// Never: it is only read.
    Never,
    /// Also when it fails, as far as it came.
    Always,
}

/// A lent bitmap as the image knows it.
#[derive(Debug)]
pub(crate) struct Lent {
    name: Vec<u8>,
    /// What is written since; none for a bitmap that does not record.
    successor: Option<Arc<SharedBitmap>>,
}

/// A bitmap that a backup holds. Dropping it gives the bitmap back as if the backup had failed and
/// copied nothing.
#[derive(Debug)]
pub struct Loan<'a> {
    image: &'a Image,
    name: String,
    mode: BitmapMode,
    bits: Bitmap,
    lent: Arc<Lent>,
}

impl Image {
    /// Lends a bitmap to a backup: from here on it is busy, and its bits of this instant stay as
    /// they are in the loan. Whoever copies must hold the disk's content of the same instant.
    ///
    /// # Errors
    /// No such bitmap, one that is in use or busy, a checkpoint's unless the mode is
    /// [`BitmapMode::Never`], a read-only image, damage, or I/O.
    pub fn lend_bitmap(&self, name: &str, mode: BitmapMode) -> Result<Loan<'_>> {
        let loan = self.update(|update| -> Result<Loan<'_>> {
            let bits = update.load(name)?;
            update.refuse_busy(name)?;
            let info = update.info(name)?;
            let in_chain = update
                .record()
                .is_some_and(|record| record.checkpoint_named(&info.name).is_some());
            if in_chain && mode != BitmapMode::Never {
                return Err(update.invalid(Mistake::BitmapInChain(info.name)));
            }
            let successor = info.auto.then(|| Arc::new(clean(bits.shape())));
            let lent = Arc::new(Lent {
                name: update.raw_name(name)?,
                successor,
            });
            // The writers are out: whoever comes next finds it.
            let mut loans = self.loans_mut();
            loans.push(Arc::clone(&lent));
            Ok(Loan {
                image: self,
                name: info.name,
                mode,
                bits,
                lent,
            })
        })?;
        Ok(loan)
    }

    /// Whether a backup holds the bitmap of that name on disk.
    pub(crate) fn is_lent(&self, name: &[u8]) -> bool {
        self.loans().iter().any(|lent| lent.name == name)
    }

    /// What must be marked beside the bitmaps on disk.
    pub(crate) fn successors(&self) -> Vec<Arc<SharedBitmap>> {
        let loans = self.loans();
        loans
            .iter()
            .filter_map(|lent| lent.successor.clone())
            .collect()
    }

    fn loans(&self) -> RwLockReadGuard<'_, Vec<Arc<Lent>>> {
        self.lent().read().unwrap_or_else(PoisonError::into_inner)
    }

    fn loans_mut(&self) -> RwLockWriteGuard<'_, Vec<Arc<Lent>>> {
        self.lent().write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every page loaded and clear.
fn clean(shape: tidemark_bitmap::Shape) -> SharedBitmap {
    SharedBitmap::from_bitmap(&Bitmap::new(shape))
}

impl Loan<'_> {
    /// What the bitmap marked at the instant of the loan.
    pub fn bits(&self) -> &Bitmap {
        &self.bits
    }

    /// Ends the loan after everything that was lent has been copied.
    ///
    /// # Errors
    /// I/O while the outcome is stored; the bitmap then says more than it must, and is busy no
    /// longer.
    pub fn succeed(self) -> Result<()> {
        match self.mode {
            BitmapMode::Never => Ok(()),
            BitmapMode::OnSuccess | BitmapMode::Always => self.store(None),
        }
    }

    /// Ends the loan of a backup that failed or was cancelled; `uncopied` is what it did not copy,
    /// of the bits that were lent or of the whole disk.
    ///
    /// # Errors
    /// As [`succeed`](Self::succeed); a bitmap of another disk size.
    pub fn fail(self, uncopied: &Bitmap) -> Result<()> {
        match self.mode {
            BitmapMode::OnSuccess | BitmapMode::Never => Ok(()),
            BitmapMode::Always => self.store(Some(uncopied)),
        }
    }

    /// Stores what was written since, and `besides`.
    fn store(self, besides: Option<&Bitmap>) -> Result<()> {
        let image = self.image;
        image.update(|update| {
            let mut bits = match &self.lent.successor {
                Some(successor) => successor.snapshot(),
                None => Bitmap::new(self.bits.shape()),
            };
            if let Some(more) = besides {
                bits.union_outward(more)
                    .map_err(|error| image.file().invalid(Mistake::Bitmap(error)))?;
            }
            update.replace_lent(&self.name, bits)
        })
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        let mut loans = self.image.loans_mut();
        loans.retain(|lent| !Arc::ptr_eq(lent, &self.lent));
    }
}

impl Update<'_> {
    /// Refuses a bitmap that a backup holds.
    pub(crate) fn refuse_busy(&self, name: &str) -> Result<()> {
        let raw = self.raw_name(name)?;
        self.refuse_busy_raw(&raw)
    }

    pub(crate) fn refuse_busy_raw(&self, raw: &[u8]) -> Result<()> {
        if self.image().is_lent(raw) {
            let name = super::name::text(raw);
            return Err::<(), Error>(self.invalid(Mistake::BitmapBusy(name)));
        }
        Ok(())
    }
}
