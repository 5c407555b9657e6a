//! After a crash of a foreign writer: what can be proved comes back, what is lost is named.
//!
//! QEMU marks every bitmap of an image in use while it runs. A frozen one does not change for
//! that: its checksum proves the bits, and they are written into fresh clusters, also when QEMU died
//! while it opened the image and the directory is stale. The recording one
//! is lost, and with it every "since" through it; it starts again from now, so that a comparison
//! with a backup can fill the gap later.

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::chain::{ChainRecord, CheckpointEntry, Health, Proof};
use tidemark_qcow2::{Image, Update, proof};

use crate::fold::{self, blank, is_recording, refused};
use crate::settle::{record_of, settle};
use crate::view::View;
use crate::{Domain, Error, Result};

/// What recovery did for one bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was wrong.
    Intact,
    /// Its checksum proved the bits; they stand in fresh clusters.
    Rewritten,
    /// It was lost; its anchor told what changed, and it records on.
    Anchored,
    /// It is lost, and records again from now.
    Restarted,
    /// It is lost.
    Lost,
}

impl Outcome {
    /// The spelling used by the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Intact => "intact",
            Self::Rewritten => "rewritten",
            Self::Anchored => "anchored",
            Self::Restarted => "restarted",
            Self::Lost => "lost",
        }
    }
}

/// One bitmap after recovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The disk.
    pub disk: String,
    /// The checkpoint.
    pub checkpoint: String,
    /// How it was found.
    pub before: Health,
    /// How it is now.
    pub after: Health,
    /// What was done.
    pub outcome: Outcome,
}

impl Domain {
    /// Recovers what can be proved. Repeating it changes nothing.
    ///
    /// # Errors
    /// Before anything is written: [`Error::DiskReadOnly`], [`Error::RecordUnsound`],
    /// [`Error::Undecided`], [`Error::PendingBackup`]. Later, [`Error::Image`].
    pub fn recover(&self) -> Result<Vec<Recovery>> {
        let _turn = self.changing()?;
        let view = View::read(self)?;
        view.require_changeable()?;
        if let Some(disk) = view
            .disks
            .iter()
            .find(|disk| disk.record.is_some() && !disk.image.is_writable())
        {
            return Err(Error::DiskReadOnly(disk.name.clone()));
        }
        settle(&view)?;
        let mut recoveries = Vec::new();
        for disk in &view.disks {
            let mut found = recover(&disk.image).map_err(Error::on(&disk.name))?;
            let mended = mend_by_anchor(&disk.image).map_err(Error::on(&disk.name))?;
            for (name, _, after, outcome) in &mut found {
                if mended.as_ref() == Some(name) {
                    (*after, *outcome) = (Health::Recovered, Outcome::Anchored);
                }
            }
            recoveries.extend(
                found
                    .into_iter()
                    .map(|(name, before, after, outcome)| Recovery {
                        disk: disk.name.clone(),
                        checkpoint: name,
                        before,
                        after,
                        outcome,
                    }),
            );
        }
        Ok(recoveries)
    }

    /// Gives a lost bitmap its content back, computed by the caller from a comparison: `changed`
    /// must hold every byte that may have changed during its interval, up to now if it records.
    /// What it recorded since is kept.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`] when the disk does not have it; [`Error::UnknownDisk`];
    /// [`Error::RecordUnsound`]; [`Error::Image`].
    pub fn reinstate(&self, checkpoint: &str, disk: &str, changed: &Bitmap) -> Result<()> {
        let _turn = self.changing()?;
        let view = View::read(self)?;
        view.require_changeable()?;
        settle(&view)?;
        let id = view.named(checkpoint)?;
        let disk = view.disk(disk)?;
        let missing = || Error::NoSuchCheckpoint(checkpoint.to_owned());
        let entry = disk
            .entry(view.tree.node(id).identity)
            .ok_or_else(missing)?
            .clone();
        reinstate(&disk.image, &entry, changed).map_err(Error::on(&disk.name))
    }
}

/// Fills a newest bitmap that was lost from the anchor of its checkpoint; says whose.
pub(crate) fn mend_by_anchor(image: &Image) -> fold::Result<Option<String>> {
    let Some(record) = record_of(image) else {
        return Ok(None);
    };
    let Some(newest) = record
        .checkpoints
        .last()
        .filter(|entry| is_recording(entry))
    else {
        return Ok(None);
    };
    if newest.anchor.is_none() || fold::judge(image, newest)?.is_usable() {
        return Ok(None);
    }
    if needs_restart(image, newest)? {
        recover(image)?;
    }
    let Some(changed) = crate::anchor::changed_since(image, newest)? else {
        return Ok(None);
    };
    reinstate(image, newest, &changed)?;
    Ok(Some(newest.name.clone()))
}

type Found = (String, Health, Health, Outcome);

fn recover(image: &Image) -> fold::Result<Vec<Found>> {
    let Some(record) = record_of(image) else {
        return Ok(Vec::new());
    };
    let mut judged = Vec::new();
    for entry in &record.checkpoints {
        let mut spare = blank(image, entry.granularity)?;
        let plant = needs_restart(image, entry)?;
        let planted = if plant {
            Some(proof::plant(image, &mut spare)?)
        } else {
            None
        };
        judged.push((
            fold::judge(image, entry)?,
            planted.map(|proof| (spare, proof)),
        ));
    }
    if judged
        .iter()
        .zip(&record.checkpoints)
        .all(|((health, spare), entry)| {
            spare.is_none() && (health.is_usable() || *health == entry.health)
        })
    {
        let intact = |((health, _), entry): (&(Health, _), &CheckpointEntry)| {
            let outcome = if health.is_usable() {
                Outcome::Intact
            } else {
                Outcome::Lost
            };
            (entry.name.clone(), *health, *health, outcome)
        };
        return Ok(judged.iter().zip(&record.checkpoints).map(intact).collect());
    }
    image.update(|update| {
        let mut renewed: ChainRecord = update.record().cloned().unwrap_or(record);
        let mut found = Vec::new();
        for (entry, (before, spare)) in renewed.checkpoints.iter_mut().zip(judged) {
            let outcome = mend(update, entry, before, spare)?;
            let after = if entry.health.is_usable() && before.is_usable() {
                before
            } else {
                entry.health
            };
            found.push((entry.name.clone(), before, after, outcome));
        }
        update.set_record(Some(renewed));
        Ok(found)
    })
}

/// Whether the record wants it to record, and nothing does.
fn needs_restart(image: &Image, entry: &CheckpointEntry) -> fold::Result<bool> {
    let bitmaps = image.bitmaps()?;
    let info = bitmaps.iter().find(|info| info.name == entry.name);
    Ok(is_recording(entry) && info.is_none_or(|info| info.in_use || !info.auto))
}

fn mend(
    update: &mut Update<'_>,
    entry: &mut CheckpointEntry,
    before: Health,
    spare: Option<(Bitmap, tidemark_qcow2::chain::RecordingProof)>,
) -> fold::Result<Outcome> {
    if let Some((bits, proof)) = spare {
        entry.health = Health::Lost;
        entry.granularity = bits.shape().granularity();
        entry.proof = Proof::Recording(proof);
        update.put(&entry.name, bits, true)?;
        return Ok(Outcome::Restarted);
    }
    if before.is_usable() {
        return Ok(Outcome::Intact);
    }
    let bits = match before {
        Health::Inconsistent => match update.load_unproven(&entry.name) {
            Ok(bits) => Some(bits),
            Err(tidemark_qcow2::Error::Corrupt { .. }) => None,
            Err(error) => return Err(error),
        },
        // QEMU clears the autoclear bit for a moment whenever it opens an image for writing.
        Health::Missing if entry.health.is_usable() => update.load_stale(&entry.name)?,
        _ => None,
    };
    if bits.is_none() && before != Health::Inconsistent {
        entry.health = before;
        return Ok(Outcome::Lost);
    }
    let proved = bits.filter(
        |bits| matches!(&entry.proof, Proof::Frozen(proof) if proof::frozen(bits) == *proof),
    );
    match proved {
        Some(bits) => {
            entry.health = Health::Recovered;
            update.put(&entry.name, bits, false)?;
            Ok(Outcome::Rewritten)
        }
        None => {
            entry.health = Health::Lost;
            entry.proof = Proof::None;
            if before == Health::Inconsistent {
                update.remove(&entry.name)?;
            }
            Ok(Outcome::Lost)
        }
    }
}

fn reinstate(image: &Image, entry: &CheckpointEntry, changed: &Bitmap) -> fold::Result<()> {
    let mut bits = blank(image, entry.granularity)?;
    let proof = if is_recording(entry) {
        Some(proof::plant(image, &mut bits)?)
    } else {
        None
    };
    bits.union_outward(changed)
        .map_err(|error| refused(image, error))?;
    image.update(|update| {
        if update
            .bitmaps()
            .iter()
            .any(|info| info.name == entry.name && !info.in_use)
        {
            let recorded = update.load(&entry.name)?;
            bits.union_outward(&recorded)
                .map_err(|error| refused(image, error))?;
        }
        let Some(mut record) = update.record().cloned() else {
            return Ok(());
        };
        if let Some(entry) = record.checkpoint_named_mut(&entry.name) {
            entry.health = Health::Recovered;
            entry.granularity = bits.shape().granularity();
            entry.disk_bytes = Some(image.size());
            entry.proof = match proof {
                Some(mut proof) => {
                    proof.count = bits.count();
                    Proof::Recording(proof)
                }
                None => Proof::Frozen(proof::frozen(&bits)),
            };
            let recording = is_recording(entry);
            update.put(&entry.name, bits, recording)?;
        }
        update.set_record(Some(record));
        Ok(())
    })
}
