//! What changed since a checkpoint, disk by disk.
//!
//! # Invariants
//! 1. The answer is a superset of the bytes that differ, or it is "full", with the reason.
//! 2. The tree only decides whether the question may be asked: the checkpoint must be an ancestor
//!    of the current one. The bits are the union of *all* intervals that recorded after it in time
//!    on that disk, on the path to the current one or not.
//! 3. Where a bitmap does not serve, an anchor that saw the beginning of its interval does.
//! 4. One disk that cannot answer does not take the answer from the others.

use std::collections::HashMap;
use std::fmt;

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::chain::{ChainRecord, CheckpointEntry, Health, Identity, ImageUuid, Scheme};

use crate::fold::{self, is_recording, refused, whole};
use crate::view::{CurrentState, DiskView, View};
use crate::{Domain, Error, NodeId, Result, anchor, infer};

/// How far the answer may go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SinceOptions {
    /// Take bitmaps of images without a record at their word: all that could belong to the
    /// checkpoint, in whatever order.
    pub trust_inferred: bool,
}

/// What changed on one disk.
#[derive(Clone, Debug)]
pub struct DiskChange {
    /// Name of the disk.
    pub disk: String,
    /// Identity of its image, if it has a record.
    pub image: Option<ImageUuid>,
    /// The checkpoint that the answer counts from: the one asked for, or the nearest ancestor that
    /// this disk took part in.
    pub base: Option<(Identity, String)>,
    /// The answer.
    pub delta: DiskDelta,
}

/// The answer for one disk.
#[derive(Clone, Debug)]
pub enum DiskDelta {
    /// Every byte that may have changed.
    Incremental(Bitmap),
    /// Nothing can be left out.
    Full {
        /// Why.
        reason: FullReason,
    },
}

/// Why a disk has to be copied in full.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FullReason {
    /// The image has no chain record.
    NoRecord,
    /// The disk took part in no ancestor.
    NotOnDisk,
    /// The disk took no part, and nothing tells that it was at hand then: it may have been rolled
    /// back since.
    NotWitnessed,
    /// A bitmap on the way does not serve.
    BadBitmap {
        /// Its name.
        bitmap: String,
        /// What is wrong with it.
        health: Health,
    },
    /// Nothing records now.
    NothingRecords,
    /// The image has a backing file, and no valid chain of bitmaps through the layers below was
    /// given: what was written there is not known.
    LayersUnknown,
    /// The checkpoint was taken of another image.
    OtherImage,
}

impl fmt::Display for FullReason {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRecord => out.write_str("the image has no chain record"),
            Self::NotOnDisk => out.write_str("the disk was not part of the checkpoint"),
            Self::NotWitnessed => out.write_str(
                "the disk was not part of the checkpoint, and its record does not lead back to it",
            ),
            Self::BadBitmap { bitmap, health } => {
                write!(out, "bitmap '{bitmap}' is {}", health.as_str())
            }
            Self::NothingRecords => out.write_str("no bitmap of the chain records"),
            Self::LayersUnknown => out.write_str(
                "the image has a backing file, and bitmaps of that name are not whole through the layers",
            ),
            Self::OtherImage => out.write_str("the checkpoint was taken of another image"),
        }
    }
}

/// Asks every disk.
pub(crate) fn changed_since(
    view: &View,
    id: NodeId,
    options: SinceOptions,
) -> Result<Vec<DiskChange>> {
    let CurrentState::Agreed(_) = view.current else {
        return Err(Error::CurrentDisputed);
    };
    let is_ancestor = view
        .tree
        .current()
        .is_some_and(|current| view.tree.is_in_lineage(id, current));
    // Without any record there is no current one: then only inference can answer.
    let no_records = view.disks.iter().all(|disk| disk.record.is_none());
    if !is_ancestor && !no_records {
        return Err(Error::NotAncestor(view.tree.node(id).name.clone()));
    }
    view.disks
        .iter()
        .map(|disk| on_disk(view, disk, id, options))
        .collect()
}

impl Domain {
    /// What changed on each disk since the checkpoint of a name. With
    /// [`SinceOptions::trust_inferred`] the name may also be that of a bitmap on images without a
    /// record.
    ///
    /// # Errors
    /// As [`crate::Checkpoint::changed_since`].
    pub fn changed_since(&self, name: &str, options: SinceOptions) -> Result<Vec<DiskChange>> {
        let _turn = self.reading();
        let view = View::read(self)?;
        let no_records = view.disks.iter().all(|disk| disk.record.is_none());
        match view.named(name) {
            Ok(id) => changed_since(&view, id, options),
            Err(Error::NoSuchCheckpoint(_))
                if options.trust_inferred
                    && no_records
                    && view.disks.iter().any(|disk| disk.bitmap(name).is_some()) =>
            {
                view.disks.iter().map(|disk| inferred(disk, name)).collect()
            }
            Err(error) => Err(error),
        }
    }
}

fn inferred(disk: &DiskView, name: &str) -> Result<DiskChange> {
    let delta = infer::changed_since(disk, name, true);
    Ok(DiskChange {
        disk: disk.name.clone(),
        image: None,
        base: None,
        delta: delta.map_err(Error::on(&disk.name))?,
    })
}

/// Asks one disk.
pub(crate) fn on_disk(
    view: &View,
    disk: &DiskView,
    id: NodeId,
    options: SinceOptions,
) -> Result<DiskChange> {
    let tree = &view.tree;
    let asked = tree.node(id).identity;
    let nearest = tree
        .lineage(id)
        .find(|id| disk.entry(tree.node(*id).identity).is_some());
    let witnessed =
        disk.entry(asked).is_some() || (tree.node(id).in_images && disk.witnessed(asked, tree));
    let base = nearest.filter(|_| witnessed);
    let change = |delta| DiskChange {
        disk: disk.name.clone(),
        image: disk.record.as_ref().map(|record| record.image),
        base: base.map(|id| (tree.node(id).identity, tree.node(id).name.clone())),
        delta,
    };
    let full = |reason| Ok(change(DiskDelta::Full { reason }));
    let Some(record) = &disk.record else {
        if !options.trust_inferred {
            return full(FullReason::NoRecord);
        }
        return inferred(disk, &tree.node(id).name);
    };
    if is_other_image(view, disk, record, id) {
        return full(FullReason::OtherImage);
    }
    let Some(base) = base else {
        return full(match nearest {
            Some(_) => FullReason::NotWitnessed,
            None => FullReason::NotOnDisk,
        });
    };
    let delta = since(
        disk,
        record,
        tree.node(base).identity,
        options.trust_inferred,
    );
    Ok(change(delta.map_err(Error::on(&disk.name))?))
}

/// A descriptor knows which image it was written for. A restored image counts as the one that it
/// descends from.
fn is_other_image(view: &View, disk: &DiskView, record: &ChainRecord, id: NodeId) -> bool {
    let identity = view.tree.node(id).identity;
    let described = view.descriptors.get(&identity).and_then(|descriptor| {
        descriptor
            .disks
            .iter()
            .flatten()
            .find(|described| described.name == disk.name)?
            .image
    });
    described.is_some_and(|image| {
        image != record.image && record.descents.iter().all(|descent| descent.image != image)
    })
}

/// The entries whose bitmaps together hold what changed since `base`.
pub(crate) fn entries_since(record: &ChainRecord, base: Identity) -> &[CheckpointEntry] {
    let position = record
        .checkpoints
        .iter()
        .position(|entry| entry.identity == base);
    let rest = position
        .and_then(|first| record.checkpoints.get(first..))
        .unwrap_or_default();
    match record.scheme {
        Scheme::Intervals => rest,
        Scheme::Cumulative => rest.get(..1).unwrap_or_default(),
    }
}

fn since(
    disk: &DiskView,
    record: &ChainRecord,
    base: Identity,
    trust_inferred: bool,
) -> fold::Result<DiskDelta> {
    let entries = entries_since(record, base);
    let mut union: Option<Bitmap> = None;
    for (number, entry) in entries.iter().enumerate() {
        let health = fold::judge(&disk.image, entry)?;
        let trusted = trust_inferred && health == Health::Inferred;
        if !health.is_usable() && !trusted {
            let reason = FullReason::BadBitmap {
                bitmap: entry.name.clone(),
                health,
            };
            return by_anchor(disk, record, (base, number), union, reason);
        }
        let bits = load(disk, entry)?;
        union = Some(join(disk, union, bits)?);
    }
    match union {
        Some(bits) if entries.last().is_some_and(is_recording) => Ok(DiskDelta::Incremental(bits)),
        union => {
            let last = entries.len().saturating_sub(1);
            by_anchor(
                disk,
                record,
                (base, last),
                union,
                FullReason::NothingRecords,
            )
        }
    }
}

/// The answer without the interval that is `number` places after `base`, and all after it: from an
/// anchor that saw their beginning, if there is one. `union` has the intervals before.
fn by_anchor(
    disk: &DiskView,
    record: &ChainRecord,
    (base, number): (Identity, usize),
    union: Option<Bitmap>,
    reason: FullReason,
) -> fold::Result<DiskDelta> {
    let entries = &record.checkpoints;
    let first = entries.iter().position(|entry| entry.identity == base);
    let place = first.unwrap_or(0).saturating_add(number);
    match anchor::before(&disk.image, entries, place)? {
        Some((_, changed)) => Ok(DiskDelta::Incremental(join(disk, union, changed)?)),
        None => Ok(DiskDelta::Full { reason }),
    }
}

/// Bytes that changed since each checkpoint of a disk; those for which it must be full are absent.
/// One pass from the newest to the oldest.
pub(crate) fn sizes(disk: &DiskView) -> fold::Result<HashMap<Identity, u64>> {
    let mut sizes = HashMap::new();
    let Some(record) = &disk.record else {
        return Ok(sizes);
    };
    let mut union: Option<Bitmap> = None;
    let mut newest = true;
    let cumulative = record.scheme == Scheme::Cumulative;
    for (place, entry) in record.checkpoints.iter().enumerate().rev() {
        let usable = fold::judge(&disk.image, entry)?.is_usable();
        let records = is_recording(entry);
        let bad = !usable || ((newest || cumulative) && !records);
        newest = false;
        if bad {
            match anchor::before(&disk.image, &record.checkpoints, place)? {
                Some((_, changed)) => {
                    sizes.insert(entry.identity, changed.dirty_bytes());
                    union = Some(changed);
                    continue;
                }
                None if cumulative => continue,
                None => break,
            }
        }
        let bits = load(disk, entry)?;
        let joined = join(disk, union.take().filter(|_| !cumulative), bits)?;
        sizes.insert(entry.identity, joined.dirty_bytes());
        union = Some(joined);
    }
    Ok(sizes)
}

fn load(disk: &DiskView, entry: &CheckpointEntry) -> fold::Result<Bitmap> {
    let bits = disk.image.load_bitmap(&entry.name)?;
    whole(bits, entry, disk.image.size()).map_err(|error| refused(&disk.image, error))
}

fn join(disk: &DiskView, union: Option<Bitmap>, bits: Bitmap) -> fold::Result<Bitmap> {
    let Some(mut union) = union else {
        return Ok(bits);
    };
    union
        .union_outward(&bits)
        .map_err(|error| refused(&disk.image, error))?;
    Ok(union)
}
