//! Changing which bitmap holds which interval, inside one update of one image.
//!
//! # Invariants
//! 1. What goes is joined into the predecessor in recording order: no interval is ever left out of
//!    the union that a later question asks for.
//! 2. Nothing is joined over a hole. What was lost before, or is found lost now, makes the
//!    predecessor [`Health::Lost`], and no new checksum heals that.
//! 3. A bitmap with a checksum is never changed in place: `put` always takes fresh clusters.

use std::collections::{HashMap, HashSet};

use tidemark_bitmap::{Bitmap, Granularity, Shape};
use tidemark_qcow2::chain::{
    ChainRecord, CheckpointEntry, Health, Identity, Proof, RecordingProof, Scheme,
};
use tidemark_qcow2::proof;
use tidemark_qcow2::{Error as ImageError, Image, Mistake, Update};

/// Result inside an update.
pub(crate) type Result<T> = std::result::Result<T, ImageError>;

/// A bitmap that was not whole when its checkpoint went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    pub(crate) checkpoint: String,
    pub(crate) health: Health,
    /// Who cannot be asked any more because of it.
    pub(crate) moved_to: Option<String>,
}

/// What the bitmaps of one image were found to be, just before an update.
pub(crate) struct Findings<'a> {
    image: &'a Image,
    health: HashMap<Identity, Health>,
}

impl<'a> Findings<'a> {
    /// Looks at the bitmaps of all entries that `wanted` names.
    pub(crate) fn of(
        image: &'a Image,
        record: &ChainRecord,
        wanted: impl Fn(&CheckpointEntry) -> bool,
    ) -> Result<Self> {
        let mut health = HashMap::new();
        for entry in record.checkpoints.iter().filter(|entry| wanted(entry)) {
            health.insert(entry.identity, judge(image, entry)?);
        }
        Ok(Self { image, health })
    }

    /// The health to go on with, and the bits if they can be had. A loss sticks; a size that
    /// differs is told by the entry itself; a frozen bitmap that a dead writer left in use is whole
    /// if its checksum says so.
    pub(crate) fn take(
        &self,
        update: &Update<'_>,
        entry: &CheckpointEntry,
    ) -> Result<(Health, Option<Bitmap>)> {
        let found = self
            .health
            .get(&entry.identity)
            .copied()
            .unwrap_or(entry.health);
        let health = if found.is_usable() {
            entry.health
        } else {
            found
        };
        let Some(info) = update
            .bitmaps()
            .into_iter()
            .find(|info| info.name == entry.name)
        else {
            return Ok((health, None));
        };
        let read = if info.in_use {
            update.load_unproven(&entry.name)
        } else {
            update.load(&entry.name)
        };
        let bits = match read {
            Ok(bits) => bits,
            Err(ImageError::Corrupt { .. }) => return Ok((health, None)),
            Err(error) => return Err(error),
        };
        let proved = matches!(&entry.proof, Proof::Frozen(proof) if proof::frozen(&bits) == *proof);
        match info.in_use {
            true if health == Health::Inconsistent && proved => {
                Ok((Health::Recovered, Some(self.whole(bits, entry)?)))
            }
            true => Ok((health, None)),
            false => Ok((health, Some(self.whole(bits, entry)?))),
        }
    }

    fn whole(&self, bits: Bitmap, entry: &CheckpointEntry) -> Result<Bitmap> {
        whole(bits, entry, self.image.size()).map_err(|error| refused(self.image, error))
    }
}

/// The engine's judgement; a bitmap that cannot be read is lost.
pub(crate) fn judge(image: &Image, entry: &CheckpointEntry) -> Result<Health> {
    match image.judge(entry) {
        Err(ImageError::Corrupt { .. }) => Ok(Health::Lost),
        other => other,
    }
}

/// `bits` for a disk of `size` bytes, with what the disk gained since the checkpoint dirty:
/// foreign programs grow a bitmap clean.
pub(crate) fn whole(
    bits: Bitmap,
    entry: &CheckpointEntry,
    size: u64,
) -> std::result::Result<Bitmap, tidemark_bitmap::Error> {
    let mut bits = if bits.shape().disk_bytes() == size {
        bits
    } else {
        bits.resize(size, true)?
    };
    if let Some(before) = entry.disk_bytes.filter(|before| *before < size) {
        bits.mark(before..size)?;
    }
    Ok(bits)
}

/// A clean bitmap for the disk as it is; coarser than asked where the disk is too large for that.
pub(crate) fn blank(image: &Image, granularity: Granularity) -> Result<Bitmap> {
    let page_bytes = u32::try_from(image.geometry().cluster_bytes()).unwrap_or(u32::MAX);
    let mut bits = granularity.bits();
    loop {
        let granularity = Granularity::from_bits(bits).unwrap_or(Granularity::MAX);
        match Shape::new(image.size(), granularity, page_bytes) {
            Ok(shape) => return Ok(Bitmap::new(shape)),
            Err(tidemark_bitmap::Error::TooLarge { .. }) if granularity < Granularity::MAX => {
                bits = bits.saturating_add(1);
            }
            Err(error) => return Err(refused(image, error)),
        }
    }
}

/// An error of the set algebra as the engine reports it.
pub(crate) fn refused(image: &Image, error: tidemark_bitmap::Error) -> ImageError {
    ImageError::Invalid {
        image: image.name().to_owned(),
        mistake: Mistake::Bitmap(error),
    }
}

/// Whether the record means the bitmap to record.
pub(crate) fn is_recording(entry: &CheckpointEntry) -> bool {
    matches!(entry.proof, Proof::Recording(_))
}

/// Ends the interval of every recording bitmap but that of `newest`.
pub(crate) fn freeze(
    update: &mut Update<'_>,
    record: &mut ChainRecord,
    newest: Identity,
    findings: &Findings<'_>,
) -> Result<()> {
    if record.scheme == Scheme::Cumulative {
        return Ok(());
    }
    let ending = |entry: &&mut CheckpointEntry| entry.identity != newest && is_recording(entry);
    for entry in record.checkpoints.iter_mut().filter(ending) {
        let (health, bits) = findings.take(update, entry)?;
        entry.health = health;
        match bits {
            Some(bits) => {
                entry.proof = Proof::Frozen(proof::frozen(&bits));
                update.put(&entry.name, bits, false)?;
            }
            None => {
                entry.proof = Proof::None;
                if entry.health.is_usable() {
                    entry.health = Health::Lost;
                }
            }
        }
    }
    Ok(())
}

/// Takes `gone` out of the record and their bitmaps out of the image. In the intervals scheme each
/// is folded into its predecessor in recording order; a first one's is dropped.
pub(crate) fn fold_out(
    update: &mut Update<'_>,
    record: &mut ChainRecord,
    gone: &HashSet<Identity>,
    findings: &Findings<'_>,
) -> Result<Vec<Loss>> {
    let mut losses = Vec::new();
    let mut kept: Vec<CheckpointEntry> = Vec::new();
    let mut run = Vec::new();
    let folds = record.scheme == Scheme::Intervals;
    for entry in std::mem::take(&mut record.checkpoints) {
        if gone.contains(&entry.identity) {
            run.push(entry);
            continue;
        }
        let heir = kept.last_mut().filter(|_| folds);
        losses.extend(fold_run(update, heir, std::mem::take(&mut run), findings)?);
        kept.push(entry);
    }
    let heir = kept.last_mut().filter(|_| folds);
    losses.extend(fold_run(update, heir, run, findings)?);
    record.checkpoints = kept;
    Ok(losses)
}

/// Folds neighbours in recording order into the one before them.
fn fold_run(
    update: &mut Update<'_>,
    heir: Option<&mut CheckpointEntry>,
    run: Vec<CheckpointEntry>,
    findings: &Findings<'_>,
) -> Result<Vec<Loss>> {
    let mut losses = Vec::new();
    let mut estate = Vec::new();
    for entry in run {
        let (health, bits) = findings.take(update, &entry)?;
        if !health.is_usable() {
            let moved_to = heir.as_deref().map(|heir| heir.name.clone());
            losses.push(Loss {
                checkpoint: entry.name.clone(),
                health,
                moved_to,
            });
        }
        if update.bitmaps().iter().any(|info| info.name == entry.name) {
            update.remove(&entry.name)?;
        }
        estate.push(Gone {
            entry,
            health,
            bits,
        });
    }
    match heir {
        Some(heir) if !estate.is_empty() => inherit(update, heir, estate, findings)?,
        _ => {}
    }
    Ok(losses)
}

/// A checkpoint that is leaving, with what it leaves.
struct Gone {
    entry: CheckpointEntry,
    health: Health,
    bits: Option<Bitmap>,
}

fn inherit(
    update: &mut Update<'_>,
    heir: &mut CheckpointEntry,
    estate: Vec<Gone>,
    findings: &Findings<'_>,
) -> Result<()> {
    let (own_health, mut bits) = findings.take(update, heir)?;
    heir.health = estate
        .iter()
        .map(|gone| gone.health)
        .fold(own_health, joined_health);
    let recorder = estate
        .iter()
        .rev()
        .map(|gone| &gone.entry)
        .chain([&*heir])
        .find(|entry| is_recording(entry));
    // Both recorded when a creation is undone: then the heir's witnesses are the older ones.
    let recorder = recorder
        .map(|entry| if is_recording(heir) { &*heir } else { entry })
        .cloned();
    let mut changed = false;
    for more in estate.into_iter().filter_map(|gone| gone.bits) {
        changed = true;
        bits = Some(match bits {
            Some(mut bits) => {
                bits.union_outward(&more)
                    .map_err(|error| refused(findings.image, error))?;
                bits
            }
            None => more,
        });
    }
    match (recorder, bits) {
        (Some(recorder), bits) => {
            let bits = bits.map_or_else(|| blank(findings.image, heir.granularity), Ok)?;
            heir.proof = Proof::Recording(inherited_proof(&recorder, &bits));
            heir.granularity = bits.shape().granularity();
            update.put(&heir.name, bits, true)
        }
        (None, Some(bits)) if changed => {
            heir.proof = Proof::Frozen(proof::frozen(&bits));
            heir.granularity = bits.shape().granularity();
            update.put(&heir.name, bits, false)
        }
        _ => Ok(()),
    }
}

/// The worst of both; a loss of one is a loss of the whole.
fn joined_health(worst: Health, health: Health) -> Health {
    match health {
        // Told by the entry's own size, and already made dirty in the bits.
        Health::SizeDiffers => worst,
        Health::Ok | Health::Recovered | Health::Inferred => worst.max(health),
        _ => Health::Lost,
    }
}

/// The recorder's witnesses are in the union too; they go on testifying, under another name.
pub(crate) fn inherited_proof(recorder: &CheckpointEntry, bits: &Bitmap) -> RecordingProof {
    let size = bits.shape().disk_bytes();
    match &recorder.proof {
        Proof::Recording(proof) => RecordingProof {
            count: bits.count(),
            smallest_disk_bytes: proof.smallest_disk_bytes.min(size),
            ..proof.clone()
        },
        Proof::None | Proof::Frozen(_) => RecordingProof::default(),
    }
}
