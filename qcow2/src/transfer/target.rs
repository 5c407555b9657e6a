//! Where a disk's bytes go: an image, or a raw file.

use crate::error::{Mistake, Result};
use crate::image::Image;
use crate::image::file::ImageFile;
use crate::storage::Storage;
use crate::units::HostOffset;

/// Bytes of a raw file that are a hole or not.
const RAW_BLOCK: u64 = 4096;

/// A disk that can be written, by many threads at once.
#[derive(Debug)]
pub struct Target {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Image(Box<Image>),
    Raw { file: ImageFile, size: u64 },
}

impl Target {
    /// An image that was opened for writing.
    pub fn image(image: Image) -> Self {
        Self {
            kind: Kind::Image(Box::new(image)),
        }
    }

    /// A raw disk as large as the storage is now.
    ///
    /// # Errors
    /// I/O.
    pub fn raw(storage: Box<dyn Storage>) -> Result<Self> {
        let file = ImageFile::new(storage);
        let size = file.len()?;
        Ok(Self {
            kind: Kind::Raw { file, size },
        })
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

    /// The file, for errors.
    pub(super) fn file(&self) -> &ImageFile {
        match &self.kind {
            Kind::Image(image) => image.file(),
            Kind::Raw { file, .. } => file,
        }
    }

    /// Bytes that are best written as a whole.
    pub(super) fn block(&self) -> u64 {
        match &self.kind {
            Kind::Image(image) => image.geometry().cluster_bytes(),
            Kind::Raw { .. } => RAW_BLOCK,
        }
    }

    /// Writes at byte `offset` of the disk.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        match &self.kind {
            Kind::Image(image) => image.write(data, offset),
            Kind::Raw { file, .. } => file.write(data, HostOffset(offset), "write data"),
        }
    }

    /// Refuses a target whose clusters cannot be compressed.
    pub(super) fn require_compressible(&self) -> Result<()> {
        match &self.kind {
            Kind::Image(image) => image.require_compressible(),
            Kind::Raw { file, .. } => Err(file.invalid(Mistake::Option {
                option: "compress",
                problem: "a raw disk cannot be compressed",
            })),
        }
    }

    /// Writes whole clusters at byte `offset` of the disk, compressed.
    pub(super) fn write_compressed(&self, data: &[u8], offset: u64) -> Result<()> {
        match &self.kind {
            Kind::Image(image) => image.write_packed(&image.packer(None).pack(data), offset),
            Kind::Raw { .. } => self.require_compressible(),
        }
    }

    /// Makes a range read as zero whatever it held, giving space back where that is possible.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        match &self.kind {
            Kind::Image(image) => image.write_zeroes(offset, len),
            Kind::Raw { file, .. } => file
                .storage()
                .write_zeroes(offset, len)
                .map_err(|error| file.io(error, "write zeros", offset)),
        }
    }

    /// Makes everything durable and lets go of the files.
    pub(super) fn finish(self) -> Result<()> {
        match self.kind {
            Kind::Image(image) => image.close(),
            Kind::Raw { file, .. } => file.barrier(),
        }
    }
}
