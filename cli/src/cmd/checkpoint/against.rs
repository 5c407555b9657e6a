//! Filling a lost interval by comparing the disk with a backup.
//!
//! Lost interval n becomes: where the backup of an earlier-or-same checkpoint j differs from the
//! disk now, and all that the other intervals since j marked: a byte that changed during n either
//! differs from the backup, or was changed back during one of the others.

use std::path::Path;
use std::sync::Arc;

use tidemark_bitmap::{Bitmap, Shape};
use tidemark_checkpoint::backup::{Catalogue, DiskEntry, Format, catalogue, verify};
use tidemark_checkpoint::{Disk, Domain};
use tidemark_qcow2::chain::{ChainRecord, CheckpointEntry, Reading, Scheme};
use tidemark_qcow2::{FileStorage, Image, OpenOptions, PlainFiles, Sharing, Storage};

use crate::exit::{Exit, Failure, Outcome};

/// Bytes compared at once.
const PIECE: u64 = 1 << 20;

/// A bitmap that a comparison brought back.
pub(super) struct Compared {
    pub(super) disk: String,
    pub(super) checkpoint: String,
    /// Name of the checkpoint whose backup it was compared with.
    pub(super) with: String,
}

/// Fills what can be filled, newest first: then an older gap finds the newer ones whole.
pub(super) fn fill(domain: &Domain, directory: &Path) -> Outcome<Vec<Compared>> {
    let catalogue = sound(directory)?;
    let mut filled = Vec::new();
    for disk in domain.disks() {
        let Some(names) = record(&disk.image).map(|record| names(&record)) else {
            continue;
        };
        for name in names.into_iter().rev() {
            if let Some(with) = fill_one(domain, disk, &name, &catalogue)? {
                filled.push(Compared {
                    disk: disk.name.clone(),
                    checkpoint: name,
                    with,
                });
            }
        }
    }
    Ok(filled)
}

/// A backup that is not what it was would hide differences.
fn sound(directory: &Path) -> Outcome<Catalogue> {
    match verify(directory)?.findings.first() {
        Some(finding) => Err(Failure::with(
            Exit::Damage,
            format!("{}: {finding}; no comparison was made", directory.display()),
        )),
        None => Ok(catalogue(directory)?),
    }
}

fn record(image: &Image) -> Option<ChainRecord> {
    match image.chain() {
        Reading::Current(record) => Some(record),
        _ => None,
    }
}

fn names(record: &ChainRecord) -> Vec<String> {
    record
        .checkpoints
        .iter()
        .map(|entry| entry.name.clone())
        .collect()
}

fn fill_one(
    domain: &Domain,
    disk: &Disk,
    name: &str,
    catalogue: &Catalogue,
) -> Outcome<Option<String>> {
    let image = &disk.image;
    let Some(record) = record(image) else {
        return Ok(None);
    };
    let entries = &record.checkpoints;
    let Some(lost) = entries.iter().position(|entry| entry.name == name) else {
        return Ok(None);
    };
    let is_whole = |entry: &CheckpointEntry| Ok::<_, Failure>(image.judge(entry)?.is_usable());
    let Some(entry) = entries.get(lost) else {
        return Ok(None);
    };
    if is_whole(entry)? {
        return Ok(None);
    }
    // Every other interval from the backup's moment on must be whole.
    for later in entries.iter().skip(lost + 1) {
        if record.scheme == Scheme::Intervals && !is_whole(later)? {
            return Ok(None);
        }
    }
    for (position, base) in entries.iter().enumerate().take(lost + 1).rev() {
        if position != lost && (record.scheme == Scheme::Cumulative || !is_whole(base)?) {
            return Ok(None);
        }
        let backup = catalogue
            .point(base.identity)
            .and_then(|point| point.disk(&disk.name));
        let Some(backup) = backup.filter(|backup| is_of(backup, &record)) else {
            continue;
        };
        let mut changed = differences(image, entry, catalogue.directory(), backup)?;
        if record.scheme == Scheme::Intervals {
            let others = entries.iter().enumerate().skip(position);
            for (_, other) in others.filter(|(other, _)| *other != lost) {
                unite(image, &mut changed, other)?;
            }
        }
        domain.reinstate(name, &disk.name, &changed)?;
        return Ok(Some(base.name.clone()));
    }
    Ok(None)
}

/// Whether the backup was made of this image, or of the one that it was restored from.
fn is_of(backup: &DiskEntry, record: &ChainRecord) -> bool {
    let descends = |image| record.descents.iter().any(|descent| descent.image == image);
    backup
        .image
        .is_some_and(|image| image == record.image || descends(image))
}

fn unite(image: &Image, changed: &mut Bitmap, entry: &CheckpointEntry) -> Outcome<()> {
    let mut bits = image.load_bitmap(&entry.name)?;
    let failed = |error: tidemark_bitmap::Error| {
        Failure::new(format!(
            "{}: bitmap '{}': {error}",
            image.name(),
            entry.name
        ))
    };
    if let Some(size) = entry.disk_bytes.filter(|&size| size < image.size()) {
        // The disk grew since: its new part counts as changed.
        bits.mark(size..image.size()).map_err(failed)?;
    }
    changed.union_outward(&bits).map_err(failed)
}

/// Where the disk differs from its backup, in granules.
fn differences(
    image: &Image,
    entry: &CheckpointEntry,
    directory: &Path,
    backup: &DiskEntry,
) -> Outcome<Bitmap> {
    let failed = |error: tidemark_bitmap::Error| Failure::new(format!("{}: {error}", image.name()));
    let page = u32::try_from(image.geometry().cluster_bytes()).unwrap_or(u32::MAX);
    let shape = Shape::new(image.size(), entry.granularity, page).map_err(failed)?;
    let mut changed = Bitmap::new(shape);
    let old = Old::open(&directory.join(&backup.path), directory, backup)?;
    let granule = entry.granularity.bytes();
    let step = PIECE.max(granule);
    let mut at = 0;
    while at < image.size() {
        let end = (at + step).min(image.size());
        let mut now = vec![0; usize::try_from(end - at).unwrap_or(0)];
        let mut then = now.clone();
        image.read(&mut now, at)?;
        old.read(&mut then, at)?;
        let mut offset = at;
        let size = usize::try_from(granule).unwrap_or(usize::MAX);
        for (now, then) in now.chunks(size).zip(then.chunks(size)) {
            let stop = (offset + granule).min(end);
            if now != then || stop > backup.size {
                changed.mark(offset..stop).map_err(failed)?;
            }
            offset = stop;
        }
        at = end;
    }
    Ok(changed)
}

/// The disk as it was backed up; zeros beyond its end.
enum Old {
    Image(Box<Image>),
    Raw(FileStorage),
}

impl Old {
    fn open(path: &Path, directory: &Path, backup: &DiskEntry) -> Outcome<Self> {
        let storage = FileStorage::open(path, false, Sharing::Exclusive)
            .map_err(|error| Failure::io(path, "open", &error))?;
        if backup.format == Format::Raw {
            return Ok(Self::Raw(storage));
        }
        let gate = PlainFiles {
            below: vec![directory.to_owned()],
            ..PlainFiles::default()
        };
        let options = OpenOptions::reading(Arc::new(gate));
        Ok(Self::Image(Box::new(Image::open(
            Box::new(storage),
            options,
        )?)))
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Outcome<()> {
        match self {
            Self::Image(image) => {
                let inside = image.size().saturating_sub(offset);
                let inside = usize::try_from(inside)
                    .unwrap_or(usize::MAX)
                    .min(buffer.len());
                match buffer.get_mut(..inside) {
                    Some(part) if inside > 0 => Ok(image.read(part, offset)?),
                    _ => Ok(()),
                }
            }
            Self::Raw(storage) => storage
                .read_at(buffer, offset)
                .map(|_| ())
                .map_err(|error| Failure::io(Path::new(&storage.name()), "read backup", &error)),
        }
    }
}
