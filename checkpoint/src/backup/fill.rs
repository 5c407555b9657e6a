//! Filling a lost interval by comparing the disk with a backup, or with an image of its past.
//!
//! Lost interval n becomes: where the disk at the moment of an earlier-or-same checkpoint j differs
//! from the disk now, and all that the other intervals since j marked, earlier and later than n. A
//! byte that changed during n either differs now, or was changed back during one of the others. So
//! all of those must be whole; of two that are lost, only the later can be filled, from a moment
//! between them, and then the earlier from one before it.

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::Image;
use tidemark_qcow2::chain::{ChainRecord, CheckpointEntry, Reading, Scheme};

use super::catalogue::{Catalogue, Link};
use super::compare::{differences, differences_between};
use super::manifest::DiskEntry;
use super::{Error, Result};
use crate::{Disk, Domain};

/// A bitmap that a comparison brought back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filled {
    /// The disk.
    pub disk: String,
    /// The checkpoint.
    pub checkpoint: String,
    /// Name of the checkpoint whose moment it was compared with.
    pub compared_with: String,
}

/// Fills every lost bitmap of the domain for which `catalogue` has a backup to compare with, by the
/// hashes of its blocks. Nobody must write to the disks meanwhile.
///
/// # Errors
/// [`Error::Damaged`] when a backup that is needed cannot be believed; reading, or storing a bitmap.
/// What was filled before stays.
pub fn fill(domain: &Domain, catalogue: &Catalogue) -> Result<Vec<Filled>> {
    let mut filled = Vec::new();
    for disk in domain.disks() {
        let from_backup =
            |entry: &CheckpointEntry, base: &CheckpointEntry, record: &ChainRecord| {
                let point = catalogue.point(base.identity);
                let link = point.and_then(|point| {
                    Some(Link {
                        point,
                        entry: point.disk(&disk.name)?,
                    })
                });
                match link.filter(|link| is_of(link.entry, record)) {
                    Some(link) => {
                        differences(&disk.image, catalogue, link, entry.granularity).map(Some)
                    }
                    None => Ok(None),
                }
            };
        filled.extend(fill_disk(domain, disk, from_backup)?);
    }
    Ok(filled)
}

/// As [`fill`], for one disk and an image that holds what the disk held at `checkpoint`, a copy of
/// it or a restored backup.
///
/// # Errors
/// As [`fill`]; an unknown disk.
pub fn fill_from_image(
    domain: &Domain,
    disk: &str,
    checkpoint: &str,
    then: &Image,
) -> Result<Vec<Filled>> {
    let Some(disk) = domain.disks().iter().find(|found| found.name == disk) else {
        return Err(crate::Error::UnknownDisk(disk.to_owned()).into());
    };
    fill_disk(domain, disk, |entry, base, _| {
        let is_it = base.name == checkpoint;
        is_it
            .then(|| differences_between(&disk.image, then, entry.granularity))
            .transpose()
    })
}

/// Newest first: then an older gap finds the newer ones whole.
fn fill_disk(
    domain: &Domain,
    disk: &Disk,
    compare: impl Fn(&CheckpointEntry, &CheckpointEntry, &ChainRecord) -> Result<Option<Bitmap>>,
) -> Result<Vec<Filled>> {
    let mut filled = Vec::new();
    let places = record(&disk.image).map_or(0, |record| record.checkpoints.len());
    for lost in (0..places).rev() {
        let Some(record) = record(&disk.image) else {
            break;
        };
        let Some(entry) = record.checkpoints.get(lost) else {
            continue;
        };
        let Some((changed, base)) = compute(disk, &record, lost, &compare)? else {
            continue;
        };
        domain.reinstate(&entry.name, &disk.name, &changed)?;
        filled.push(Filled {
            disk: disk.name.clone(),
            checkpoint: entry.name.clone(),
            compared_with: base,
        });
    }
    Ok(filled)
}

/// What interval `lost` of the record must hold, and the checkpoint that it was compared with. None
/// if it is whole, or cannot be computed.
fn compute(
    disk: &Disk,
    record: &ChainRecord,
    lost: usize,
    compare: impl Fn(&CheckpointEntry, &CheckpointEntry, &ChainRecord) -> Result<Option<Bitmap>>,
) -> Result<Option<(Bitmap, String)>> {
    let image = &disk.image;
    let entries = &record.checkpoints;
    let failed = Error::disk(&disk.name);
    let is_whole = |entry: &CheckpointEntry| -> Result<bool> {
        Ok(image.judge(entry).map_err(&failed)?.is_usable())
    };
    let Some(entry) = entries.get(lost) else {
        return Ok(None);
    };
    if is_whole(entry)? {
        return Ok(None);
    }
    let intervals = record.scheme == Scheme::Intervals;
    for later in entries.iter().skip(lost + 1) {
        if intervals && !is_whole(later)? {
            return Ok(None);
        }
    }
    for (position, base) in entries.iter().enumerate().take(lost + 1).rev() {
        if position != lost && (!intervals || !is_whole(base)?) {
            return Ok(None);
        }
        let Some(mut changed) = compare(entry, base, record)? else {
            continue;
        };
        if intervals {
            let others = entries.iter().enumerate().skip(position);
            for (_, other) in others.filter(|(other, _)| *other != lost) {
                unite(image, &mut changed, other)?;
            }
        }
        return Ok(Some((changed, base.name.clone())));
    }
    Ok(None)
}

fn record(image: &Image) -> Option<ChainRecord> {
    match image.chain() {
        Reading::Current(record) => Some(record),
        Reading::Absent | Reading::Stale(_) | Reading::Damaged => None,
    }
}

/// Whether the backup was made of this image, or of the one that it was restored from.
fn is_of(backup: &DiskEntry, record: &ChainRecord) -> bool {
    let descends = |image| record.descents.iter().any(|descent| descent.image == image);
    backup
        .image
        .is_some_and(|image| image == record.image || descends(image))
}

fn unite(image: &Image, changed: &mut Bitmap, entry: &CheckpointEntry) -> Result<()> {
    image
        .add_bitmap_to(&entry.name, changed)
        .map_err(Error::disk(image.name()))?;
    if let Some(size) = entry.disk_bytes.filter(|&size| size < image.size()) {
        // The disk grew since: its new part counts as changed.
        changed
            .mark(size..image.size())
            .map_err(crate::Error::from)?;
    }
    Ok(())
}
