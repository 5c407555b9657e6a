//! What a backup or a restore writes to: a fresh qcow2 image or a sparse file.

use std::fs::{File, OpenOptions as FileOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_qcow2::{
    BackingReference, CreateOptions, FileStorage, Image, OpenOptions, PlainFiles, Sharing,
};

use super::manifest::{Backing, Format};
use super::units::to_u64;
use super::{Error, Result, files};

/// An empty disk that is being filled, by many threads at once.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    /// Size of the disk; an image's is rounded up to whole sectors.
    size: u64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Qcow2(Box<Image>),
    Raw(File),
}

/// What a new target is.
#[derive(Debug)]
pub(super) struct Shape<'a> {
    pub(super) size: u64,
    pub(super) format: Format,
    pub(super) block: u64,
    pub(super) backing: Option<&'a Backing>,
}

impl Target {
    /// Fills the existing, empty file at `path`.
    pub(super) fn create(path: &Path, shape: &Shape<'_>) -> Result<Self> {
        let kind = match shape.format {
            Format::Qcow2 => Kind::Qcow2(Box::new(create_image(path, shape)?)),
            Format::Raw => {
                let file = FileOptions::new().write(true).open(path);
                let file = file.map_err(Error::io("open", path))?;
                file.set_len(shape.size).map_err(Error::io("grow", path))?;
                Kind::Raw(file)
            }
        };
        Ok(Self {
            path: path.to_owned(),
            size: shape.size,
            kind,
        })
    }

    /// Writes at byte `offset` of the disk.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        match &self.kind {
            Kind::Raw(file) => file
                .write_all_at(data, offset)
                .map_err(Error::io("write", &self.path)),
            Kind::Qcow2(image) => {
                let end = offset + to_u64(data.len());
                let written = match self.padding(image, end) {
                    0 => image.write(data, offset),
                    padding => {
                        let mut padded = data.to_vec();
                        padded.extend((0..padding).map(|_| 0));
                        image.write(&padded, offset)
                    }
                };
                written.map_err(Error::target(&self.path))
            }
        }
    }

    /// Makes whole blocks read as zero whatever is below. A raw target holds nothing else yet.
    pub(super) fn write_zeroes(&self, range: &Range<u64>) -> Result<()> {
        let Kind::Qcow2(image) = &self.kind else {
            return Ok(());
        };
        let len = range.end - range.start + self.padding(image, range.end);
        image
            .write_zeroes(range.start, len)
            .map_err(Error::target(&self.path))
    }

    /// Makes everything durable, but for the file's name.
    pub(super) fn finish(self) -> Result<()> {
        match self.kind {
            Kind::Raw(file) => file.sync_all().map_err(Error::io("sync", &self.path)),
            Kind::Qcow2(image) => image.close().map_err(Error::target(&self.path)),
        }
    }

    /// Bytes from the disk's end to the image's, if `end` is the disk's: a part of a sector must
    /// not be filled from the backing file.
    fn padding(&self, image: &Image, end: u64) -> u64 {
        if end == self.size {
            image.size() - end
        } else {
            0
        }
    }
}

fn create_image(path: &Path, shape: &Shape<'_>) -> Result<Image> {
    let storage =
        FileStorage::open(path, true, Sharing::Exclusive).map_err(Error::io("open", path))?;
    let options = CreateOptions {
        cluster_bits: shape.block.trailing_zeros(),
        backing: shape.backing.map(|backing| BackingReference {
            name: backing.path.clone().into_bytes(),
            format: backing.format.as_str().to_owned(),
        }),
        ..CreateOptions::new(shape.size)
    };
    let gate = PlainFiles {
        below: vec![files::directory_of(path).to_owned()],
        sharing: Sharing::Exclusive,
    };
    Image::create(
        Box::new(storage),
        &options,
        OpenOptions::writing(Arc::new(gate)),
    )
    .map_err(Error::target(path))
}
