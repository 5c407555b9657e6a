//! Bitmaps as they will be: added, replaced, switched and removed, in memory.

use tidemark_bitmap::{Bitmap, Granularity};

use super::{Slot, Update};
use crate::bitmaps::directory::{read_stale, shape};
use crate::bitmaps::{BitmapInfo, load, name};
use crate::convert::{to_u32, to_u64};
use crate::error::{Error, Feature, Mistake, Result};
use crate::format::bitmap::DirectoryEntry;
use crate::format::limits;
use crate::image::lock;
use crate::units::HostOffset;

impl Update<'_> {
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

    /// Adds the bits of a bitmap as they will be to `target`, read piece by piece; what is added
    /// rounds outward.
    ///
    /// # Errors
    /// As [`load`](Self::load); a `target` of another disk size.
    pub fn add_to(&self, name: &str, target: &mut Bitmap) -> Result<()> {
        let slot = &self.slots[self.find(name)?];
        match &slot.content {
            Some(bitmap) => target
                .union_outward(bitmap)
                .map_err(|error| self.invalid(Mistake::Bitmap(error))),
            None if slot.entry.in_use => {
                Err(self.invalid(Mistake::BitmapInconsistent(name.to_owned())))
            }
            None => load::add_to(self.image, &slot.entry, &[], target),
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

    /// The bits of a bitmap whose directory is stale, for whoever can prove that they are right: a
    /// writer that was killed while it opened the image leaves it without the autoclear bit. Its
    /// clusters may be somebody else's by now; they are read, and never taken over. `None` when
    /// nothing of that name can be read.
    ///
    /// # Errors
    /// I/O.
    pub fn load_stale(&self, name: &str) -> Result<Option<Bitmap>> {
        let image = self.image;
        if image.geometry.version == 2 {
            return Ok(None);
        }
        let entries = read_stale(&image.file, &lock(&image.first))?;
        let mut named = entries.iter().filter(|entry| entry.name == name.as_bytes());
        let (Some(entry), None) = (named.next(), named.next()) else {
            return Ok(None);
        };
        match load::load(image, entry) {
            Ok(bitmap) => Ok(Some(bitmap)),
            Err(Error::Corrupt { .. } | Error::Invalid { .. }) => Ok(None),
            Err(error) => Err(error),
        }
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
        match self.position(name) {
            Some(position) => {
                let name = self.slots[position].entry.name.clone();
                self.put_named(&name, bits, recording)
            }
            None => self.put_named(name.as_bytes(), bits, recording),
        }
    }

    /// As [`put`](Self::put), for a name of any bytes.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub(crate) fn put_named(&mut self, name: &[u8], bits: Bitmap, recording: bool) -> Result<()> {
        let bits = self.fit(bits)?;
        self.check_new(name)?;
        self.refuse_busy_raw(name)?;
        self.replace(name, bits, recording);
        Ok(())
    }

    /// Stores the outcome of a loan; the bitmap goes on recording, or not, as it did.
    pub(crate) fn replace_lent(&mut self, name: &str, bits: Bitmap) -> Result<()> {
        let entry = &self.slots[self.find(name)?].entry;
        let (name, recording) = (entry.name.clone(), entry.auto);
        let bits = self.fit(bits)?;
        self.replace(&name, bits, recording);
        Ok(())
    }

    fn replace(&mut self, name: &[u8], bits: Bitmap, recording: bool) {
        let entry = DirectoryEntry {
            table_offset: HostOffset::ZERO,
            table_entries: to_u32(to_u64(bits.shape().pages())),
            in_use: false,
            auto: recording,
            granularity: bits.shape().granularity(),
            name: name.to_vec(),
        };
        let slot = Slot {
            entry,
            content: Some(bits),
        };
        match self.slots.iter_mut().find(|slot| slot.entry.name == name) {
            Some(old) => {
                let old = std::mem::replace(old, slot);
                self.retire(old);
            }
            None => self.slots.push(slot),
        }
        self.changed = true;
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

    fn check_new(&self, name: &[u8]) -> Result<()> {
        if self.image.geometry.version == 2 {
            return Err(self.image.file.unsupported(Feature::BitmapsInVersion2));
        }
        if name.is_empty() || name.len() > limits::MAX_BITMAP_NAME_BYTES || name.contains(&0) {
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
        let known = self.slots.iter().any(|slot| slot.entry.name == name);
        if !known && value >= limits::MAX_BITMAPS.into() {
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
        self.refuse_busy(name)?;
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
        self.refuse_busy(name)?;
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
        self.position(name)
            .ok_or_else(|| self.invalid(Mistake::NoSuchBitmap(name.to_owned())))
    }

    /// What the directory to come says of a bitmap.
    ///
    /// # Errors
    /// No such bitmap.
    pub(crate) fn info(&self, name: &str) -> Result<BitmapInfo> {
        Ok(BitmapInfo::from(&self.slots[self.find(name)?].entry))
    }

    /// The bytes of a name on disk.
    ///
    /// # Errors
    /// No such bitmap.
    pub(crate) fn raw_name(&self, name: &str) -> Result<Vec<u8>> {
        Ok(self.slots[self.find(name)?].entry.name.clone())
    }

    fn position(&self, name: &str) -> Option<usize> {
        name::position(self.slots.iter().map(|slot| &slot.entry.name[..]), name)
    }

    pub(crate) fn invalid(&self, mistake: Mistake) -> Error {
        self.image.file.invalid(mistake)
    }
}
