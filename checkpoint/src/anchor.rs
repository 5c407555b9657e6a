//! Anchors: internal snapshots that remember the moment of a checkpoint in the mapping tables.
//!
//! While an anchor exists every write must move what it shares with the disk, whoever writes and
//! however often he crashes. So the clusters whose mapping differs from the anchor's are a superset
//! of what changed since its checkpoint, without any bitmap.
//!
//! # Invariants
//! 1. An anchor is taken before its checkpoint's moment, so it has seen no less.
//! 2. It is found by a name that contains the checkpoint's identity and believed only with the date
//!    and the L1 table that the record has of it.
//! 3. A cluster that neither moment maps shows the backing file, of which the tables prove nothing:
//!    it counts as changed.
//! 4. Only the newest checkpoint of a disk keeps its anchor; what the record does not name is
//!    cleared away.

use std::collections::HashSet;

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::chain::{AnchorProof, ChainRecord, CheckpointEntry, Identity};
use tidemark_qcow2::{Error as ImageError, Image, Mistake, Moment};

use crate::fold::{Result, refused};
use crate::settle::record_of;

/// What names of anchors begin with; the identity follows.
const PREFIX: &str = "tidemark-anchor-";

fn name_of(identity: Identity) -> String {
    format!("{PREFIX}{identity}")
}

/// Whether a snapshot is an anchor, of whatever checkpoint.
pub(crate) fn is_anchor(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Takes the anchor of a checkpoint that is about to be taken.
pub(crate) fn take(image: &Image, identity: Identity) -> Result<AnchorProof> {
    let name = name_of(identity);
    image.create_snapshot(&name)?;
    image.snapshot_proof(&name)
}

/// Everything that may have changed since an anchored checkpoint; `None` without an anchor that can
/// be believed.
pub(crate) fn changed_since(image: &Image, entry: &CheckpointEntry) -> Result<Option<Bitmap>> {
    let Some(expected) = entry.anchor else {
        return Ok(None);
    };
    let name = name_of(entry.identity);
    match image.snapshot_proof(&name) {
        Ok(found) if found == expected => {}
        Ok(_) | Err(ImageError::Corrupt { .. }) => return Ok(None),
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    since_snapshot(image, &name).map(Some)
}

/// Everything that may have changed since a snapshot.
pub(crate) fn since_snapshot(image: &Image, selector: &str) -> Result<Bitmap> {
    let delta = image.delta(Moment::Snapshot(selector), Moment::Present)?;
    let mut changed = delta.changed;
    changed
        .union_outward(&delta.below)
        .map_err(|error| refused(image, error))?;
    Ok(changed)
}

/// The latest anchor that saw all of the interval at `place`, with where it stands in the record
/// and what changed since it.
pub(crate) fn before(
    image: &Image,
    entries: &[CheckpointEntry],
    place: usize,
) -> Result<Option<(usize, Bitmap)>> {
    let older = entries.iter().enumerate().take(place.saturating_add(1));
    for (at, entry) in older.rev() {
        if let Some(changed) = changed_since(image, entry)? {
            return Ok(Some((at, changed)));
        }
    }
    Ok(None)
}

/// Takes from the record the anchors of all but the newest checkpoint.
pub(crate) fn let_go_older(record: &mut ChainRecord) {
    if let Some((_, older)) = record.checkpoints.split_last_mut() {
        older.iter_mut().for_each(|entry| entry.anchor = None);
    }
}

/// Deletes the anchors that the record does not name. A failure costs room, nothing else.
pub(crate) fn sweep(image: &Image) -> Result<()> {
    let record = record_of(image);
    let named: HashSet<String> = record
        .iter()
        .flat_map(|record| &record.checkpoints)
        .filter(|entry| entry.anchor.is_some())
        .map(|entry| name_of(entry.identity))
        .collect();
    let stray: Vec<String> = image
        .snapshots()?
        .into_iter()
        .map(|snapshot| snapshot.name)
        .filter(|name| is_anchor(name) && !named.contains(name))
        .collect();
    for name in stray {
        image.delete_snapshot_named(&name)?;
    }
    Ok(())
}

fn is_missing(error: &ImageError) -> bool {
    matches!(error.mistake(), Some(Mistake::NoSuchSnapshot(_)))
}
