//! Where a disk's bytes come from: an image with its backing chain, or a raw file.

use crate::convert::{to_u64, to_usize};
use crate::error::Result;
use crate::image::backing::Layer;
use crate::image::file::ImageFile;
use crate::image::map::map_raw;
use crate::image::{BackingReference, Extent, Image, OpenOptions};
use crate::storage::{FileIdentity, Storage};
use crate::units::HostOffset;

/// Bytes of an image that count as data when their start is not a hole.
const STEP: u64 = 2 << 20;
/// Disks end at a whole sector, as QEMU sees them.
const SECTOR: u64 = 512;

/// A disk that can be mapped and read.
#[derive(Debug)]
pub struct Source {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Image(Box<Image>),
    Raw { file: ImageFile, size: u64 },
}

impl Source {
    /// The present disk of an image, seen through its backing chain.
    pub fn image(image: Image) -> Self {
        Self {
            kind: Kind::Image(Box::new(image)),
        }
    }

    /// A raw disk; a last sector that is cut ends in zeros.
    ///
    /// # Errors
    /// I/O.
    pub fn raw(storage: Box<dyn Storage>) -> Result<Self> {
        let file = ImageFile::new(storage);
        let size = file.len()?.next_multiple_of(SECTOR);
        Ok(Self {
            kind: Kind::Raw { file, size },
        })
    }

    /// What `reference` would show as the backing file of `overlay`, opened with its own chain
    /// through the gate of `options`.
    ///
    /// # Errors
    /// The gate's refusal; those of [`Image::open`].
    pub(super) fn below(
        overlay: &Image,
        reference: &BackingReference,
        options: &OpenOptions,
    ) -> Result<Self> {
        let kind = match Layer::open(reference, overlay.file(), options)? {
            Layer::Image(image) => Kind::Image(image),
            Layer::Raw { file, size } => Kind::Raw { file, size },
        };
        Ok(Self { kind })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        match &self.kind {
            Kind::Image(image) => image.size(),
            Kind::Raw { size, .. } => *size,
        }
    }

    /// What error messages call it.
    pub fn name(&self) -> &str {
        match &self.kind {
            Kind::Image(image) => image.name(),
            Kind::Raw { file, .. } => file.name(),
        }
    }

    /// The image, unless the disk is raw.
    pub fn as_image(&self) -> Option<&Image> {
        match &self.kind {
            Kind::Image(image) => Some(image),
            Kind::Raw { .. } => None,
        }
    }

    /// Runs of `len` bytes from `offset` on, in order and without gaps. Holes of the files that hold
    /// the data read as zero here.
    ///
    /// # Errors
    /// A range outside the disk, damaged tables, or I/O.
    pub fn map(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let extents = self.map_tables(offset, len)?;
        let mut found = Vec::with_capacity(extents.len());
        for extent in extents {
            self.find_holes(extent, &mut found)?;
        }
        Ok(found)
    }

    /// The same as the tables of images tell it: an allocated cluster in a hole counts as data.
    pub(super) fn map_tables(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        match &self.kind {
            Kind::Image(image) => image.map(offset, len),
            Kind::Raw { file, .. } => {
                let mut extents = Vec::new();
                map_raw(file, offset, offset + len, 0, &mut extents)?;
                Ok(extents)
            }
        }
    }

    /// Cuts an extent of data where the file that holds it has holes.
    fn find_holes(&self, extent: Extent, out: &mut Vec<Extent>) -> Result<()> {
        let Some(host) = extent.offset.filter(|_| extent.data && !extent.compressed) else {
            out.push(extent);
            return Ok(());
        };
        let mut done = 0;
        while done < extent.length {
            let rest = extent.length - done;
            let hole = self.hole_at(extent.depth, host + done)?.min(rest);
            let zero = hole > 0;
            let length = if zero { hole } else { STEP.min(rest) };
            let piece = Extent {
                start: extent.start + done,
                length,
                zero,
                offset: Some(host + done),
                ..extent
            };
            match out.last_mut() {
                Some(last) if done > 0 && last.zero == zero => last.length += length,
                _ => out.push(piece),
            }
            done += length;
        }
        Ok(())
    }

    fn hole_at(&self, depth: u64, host: u64) -> Result<u64> {
        match &self.kind {
            Kind::Image(image) => image.hole_at(depth, HostOffset(host)),
            Kind::Raw { file, .. } => file.hole_at(HostOffset(host)),
        }
    }

    /// Fills `buf` with the disk's content from byte `offset` on.
    ///
    /// # Errors
    /// A range outside the disk, damage, or I/O.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match &self.kind {
            Kind::Image(image) => image.read(buf, offset),
            Kind::Raw { file, .. } => file.read(buf, HostOffset(offset), "read data"),
        }
    }

    /// As [`read`](Self::read); what lies beyond the disk's end is zero.
    pub(super) fn read_padded(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let present = self.size().saturating_sub(offset).min(to_u64(buf.len()));
        let (inside, beyond) = buf.split_at_mut(to_usize(present));
        beyond.fill(0);
        match inside.is_empty() {
            true => Ok(()),
            false => self.read(inside, offset),
        }
    }
}

impl Source {
    /// Whether a file is this disk, or one of those that its data comes from.
    pub(super) fn is_made_of(&self, identity: FileIdentity) -> bool {
        match &self.kind {
            Kind::Image(image) => image.is_made_of(identity),
            Kind::Raw { file, .. } => file.storage().identity() == Some(identity),
        }
    }

    /// Whether every byte of a range certainly reads as zero, as far as the tables say; what lies
    /// beyond the disk's end is zero.
    pub(super) fn is_zero(&self, start: u64, end: u64) -> Result<bool> {
        let end = end.min(self.size());
        if start >= end {
            return Ok(true);
        }
        let extents = self.map(start, end - start)?;
        Ok(extents.iter().all(|extent| extent.zero))
    }
}
