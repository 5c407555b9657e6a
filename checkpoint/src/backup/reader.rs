//! Reading a published target, every byte against its hash.

use std::ops::Range;
use std::path::{Path, PathBuf};

use tidemark_qcow2::{BackingReference, FileStorage, Image, Sharing, Storage};

use super::catalogue::Link;
use super::hashes::{Hashes, Run};
use super::manifest::{DiskEntry, Format};
use super::units::{to_u64, to_usize};
use super::verify::Defect;
use super::{Error, Result};

/// A target with its hashes, both as the manifest says as far as can be told without reading data.
#[derive(Debug)]
pub(super) struct Reader {
    path: PathBuf,
    name: String,
    hashes: Hashes,
    file: Held,
}

#[derive(Debug)]
enum Held {
    Qcow2(Box<Image>),
    Raw(FileStorage),
}

impl Reader {
    /// Opens a target without what is below it.
    pub(super) fn open(directory: &Path, link: Link<'_>) -> Result<Self> {
        let entry = link.entry;
        let path = directory.join(&entry.path);
        let hashes = Hashes::open(directory, entry, link.point.identity)?;
        let damaged = |defect: Defect| Error::from(defect.in_file(&entry.path));
        let storage = match FileStorage::open(&path, false, Sharing::Exclusive) {
            Ok(storage) => storage,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(damaged(Defect::Missing));
            }
            Err(error) => return Err(Error::io("open", &path)(error)),
        };
        let found = storage.len().map_err(Error::io("look at", &path))?;
        if found != entry.file_bytes {
            let expected = entry.file_bytes;
            return Err(damaged(Defect::Length { expected, found }));
        }
        let file = match entry.format {
            Format::Raw => Held::Raw(storage),
            Format::Qcow2 => {
                let image = Image::open_unbacked(Box::new(storage), false)
                    .map_err(|error| unreadable(&path, &entry.path, error))?;
                if !is_as_stated(&image, entry) {
                    return Err(damaged(Defect::Header));
                }
                Held::Qcow2(Box::new(image))
            }
        };
        Ok(Self {
            name: entry.path.clone(),
            path,
            hashes,
            file,
        })
    }

    /// What the target holds, in the order of the disk.
    pub(super) fn runs(&self) -> &[Run] {
        self.hashes.runs()
    }

    /// Bytes of a block.
    pub(super) fn block(&self) -> u64 {
        self.hashes.block()
    }

    /// Reads whole blocks of a data run into `buffer`, which is as long, and returns those that are
    /// not what they were.
    pub(super) fn read(
        &self,
        run: &Run,
        range: &Range<u64>,
        buffer: &mut [u8],
    ) -> Result<Vec<Range<u64>>> {
        let expected = self.hashes.of(run, range)?;
        match self.fill(buffer, range.start) {
            Ok(()) => {}
            // A table that leads nowhere: all that was behind it is gone.
            Err(Error::Damaged(_)) => return Ok(vec![range.clone()]),
            Err(error) => return Err(error),
        }
        let mut at = range.start;
        let mut bad = Vec::new();
        for (bytes, expected) in buffer.chunks(to_usize(self.block())).zip(&expected) {
            let end = at + to_u64(bytes.len());
            if blake3::hash(bytes).as_bytes() != expected {
                bad.push(at..end);
            }
            at = end;
        }
        Ok(bad)
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        match &self.file {
            Held::Qcow2(image) => image
                .read(buffer, offset)
                .map_err(|error| unreadable(&self.path, &self.name, error)),
            Held::Raw(storage) => {
                let count = storage
                    .read_at(buffer, offset)
                    .map_err(Error::io("read", &self.path))?;
                buffer[count..].fill(0);
                Ok(())
            }
        }
    }

    /// Bytes of a raw target from `offset` on, and how many there certainly are zeros.
    pub(super) fn raw(&self) -> Option<&FileStorage> {
        match &self.file {
            Held::Raw(storage) => Some(storage),
            Held::Qcow2(_) => None,
        }
    }
}

/// An engine's answer about a target: damage is a finding, failing storage an error.
fn unreadable(path: &Path, name: &str, error: tidemark_qcow2::Error) -> Error {
    match error {
        tidemark_qcow2::Error::Io { .. } => Error::target(path)(error),
        _ => Defect::Unreadable(error.to_string()).in_file(name).into(),
    }
}

fn is_as_stated(image: &Image, entry: &DiskEntry) -> bool {
    let backing = entry.backing.as_ref().map(|backing| BackingReference {
        name: backing.path.clone().into_bytes(),
        format: backing.format.as_str().to_owned(),
    });
    let size = entry.size.next_multiple_of(512);
    image.size() == size
        && image.geometry().cluster_bytes() == entry.block_size
        && image.backing() == backing
}
