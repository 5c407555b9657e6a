//! A checkpoint that is about to be taken, with everything checked that can be refused.

use std::collections::HashSet;
use std::sync::Arc;

use tidemark_bitmap::{Bitmap, Granularity};
use tidemark_qcow2::chain::{
    AnchorProof, ChainRecord, CheckpointEntry, Health, Identity, Intent, IntentKind, Proof, Scheme,
};
use tidemark_qcow2::{BitmapInfo, Feature, Image, proof};

use super::CreateSpec;
use crate::anchor;
use crate::fold::blank;
use crate::settle::{Decision, follow, forget, record_of, undo};
use crate::view::{CurrentState, DiskView, View};
use crate::{DescribedDisk, Descriptor, Disk, Domain, Error, Result, name};

/// A disk that takes part.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) disk: String,
    pub(super) image: Arc<Image>,
    /// The record that the image begins if it has none.
    pub(super) fresh: ChainRecord,
    /// The parent as this disk knows it.
    pub(super) parent: Option<Identity>,
    /// The anchor that was taken for it.
    pub(super) anchor: Option<AnchorProof>,
    /// Whether its history does not lead to this moment, and nobody else's record can say so.
    pub(super) cut: bool,
}

/// A creation whose every refusal lies behind it.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) name: String,
    pub(super) identity: Identity,
    pub(super) parent: Option<Identity>,
    pub(super) created: u64,
    pub(super) description: Option<String>,
    pub(super) granularity: Option<Granularity>,
    /// By name; the first decides.
    pub(super) participants: Vec<Part>,
    /// Disks that take no part and whose history leads to the moment.
    pub(super) witnesses: Vec<Disk>,
}

/// Disks that all hold the intent, not yet decided.
#[derive(Clone, Debug)]
pub(super) struct Prepared {
    pub(super) intent: Intent,
    /// The decider first.
    pub(super) participants: Vec<Part>,
    /// Disks that take no part and whose history leads to the moment.
    pub(super) witnesses: Vec<Disk>,
}

impl Draft {
    pub(super) fn new(domain: &Domain, view: &View, spec: &CreateSpec) -> Result<Self> {
        let created = name::now();
        let name = choose_name(view, spec, created)?;
        let CurrentState::Agreed(parent) = view.current else {
            return Err(Error::CurrentDisputed);
        };
        let mut participants = choose_disks(domain, spec)?
            .into_iter()
            .map(|disk| {
                let known = parent_on(view.disk(&disk.name)?, parent);
                Ok(Part {
                    parent: known,
                    ..Part::new(disk, spec.scheme)?
                })
            })
            .collect::<Result<Vec<_>>>()?;
        if participants.iter().all(|part| part.parent != parent) {
            for part in &mut participants {
                (part.parent, part.cut) = (parent, true);
            }
        }
        for part in &participants {
            if spec.anchor {
                super::anchoring::check(part)?;
            }
            if part.image.geometry().version < 3 {
                let (image, feature) = (part.image.name().to_owned(), Feature::BitmapsInVersion2);
                let refused = tidemark_qcow2::Error::Unsupported { image, feature };
                return Err(Error::on(&part.disk)(refused));
            }
            let disk = view.disk(&part.disk)?;
            let tentative = disk
                .pending
                .as_ref()
                .is_some_and(|pending| pending.name == name);
            if disk.bitmap(&name).is_some() && !tentative {
                return Err(Error::BitmapExists {
                    disk: part.disk.clone(),
                    name,
                });
            }
        }
        Ok(Self {
            name,
            identity: Identity::random().map_err(Error::Random)?,
            parent,
            created,
            description: spec.description.clone(),
            granularity: spec.granularity,
            witnesses: witnesses(domain, view, &participants, parent),
            participants,
        })
    }

    /// What goes into the store.
    pub(super) fn descriptor(&self, domain: &Domain, view: &View) -> Descriptor {
        let disk = |disk: &DiskView| {
            let part = self.participants.iter().find(|part| part.disk == disk.name);
            let record = disk.record.as_ref().or(part.map(|part| &part.fresh));
            DescribedDisk {
                name: disk.name.clone(),
                bitmap: part.is_some(),
                changed_bytes: None,
                image: record.map(|record| record.image),
            }
        };
        let parent = self.parent.and_then(|parent| view.tree.find(parent));
        Descriptor {
            name: self.name.clone(),
            identity: Some(self.identity),
            description: self.description.clone(),
            created: Some(self.created),
            parent: parent.map(|parent| view.tree.node(parent).name.clone()),
            disks: Some(view.disks.iter().map(disk).collect()),
            domain: domain.definition().map(ToOwned::to_owned),
            others: Vec::new(),
        }
    }

    /// The bitmap that will record from now on, with its witnesses planted, and its entry.
    pub(super) fn new_bitmap(&self, part: &Part) -> Result<(Bitmap, CheckpointEntry)> {
        let image = &part.image;
        let make = || {
            let cluster = image.geometry().cluster_bytes().clamp(1 << 12, 1 << 16);
            let usual = Granularity::from_bytes(cluster).unwrap_or(Granularity::DEFAULT);
            let mut bits = blank(image, self.granularity.unwrap_or(usual))?;
            let proof = super::planting::plant(image, &mut bits)?;
            Ok((bits, proof))
        };
        let (bits, proof) = make().map_err(Error::on(&part.disk))?;
        let entry = CheckpointEntry {
            identity: self.identity,
            name: self.name.clone(),
            parent: part.parent,
            created: Some(self.created),
            disk_bytes: Some(image.size()),
            granularity: bits.shape().granularity(),
            health: Health::Ok,
            proof: Proof::Recording(proof),
            anchor: part.anchor,
        };
        Ok((bits, entry))
    }

    /// Publishes the new bitmap and the intent on every disk. After a failure none has them, as
    /// far as the disks still let themselves be written.
    pub(super) fn prepare(&self, kind: IntentKind) -> Result<Prepared> {
        let first = self.participants.first().ok_or(Error::NoDisks)?;
        let decider = record_of(&first.image).unwrap_or_else(|| first.fresh.clone());
        let intent = Intent {
            kind,
            transaction: Identity::random().map_err(Error::Random)?,
            checkpoint: self.identity,
            decider: first.disk.clone(),
            decider_image: decider.image,
        };
        let prepared = Prepared {
            intent,
            participants: self.participants.clone(),
            witnesses: self.witnesses.clone(),
        };
        for part in &self.participants {
            if let Err(error) = self.prepare_disk(part, &prepared.intent) {
                // What cannot be undone now is undone by whoever finds it.
                let _ = prepared.abandon();
                return Err(error);
            }
        }
        Ok(prepared)
    }

    fn prepare_disk(&self, part: &Part, intent: &Intent) -> Result<()> {
        let (bits, entry) = self.new_bitmap(part)?;
        let publish = part.image.update(|update| {
            let mut record = update
                .record()
                .cloned()
                .unwrap_or_else(|| part.fresh.clone());
            update.put(&self.name, bits, true)?;
            part.cut_history(&mut record);
            record.checkpoints.push(entry);
            record.intent = Some(intent.clone());
            update.set_record(Some(record));
            Ok(())
        });
        publish.map_err(Error::on(&part.disk))
    }
}

impl Prepared {
    /// Decides, lets the others follow, forgets the decision.
    pub(super) fn commit_all(&self) -> Result<()> {
        let Some((decider, others)) = self.participants.split_first() else {
            return Ok(());
        };
        let decision = if others.is_empty() {
            Decision::Elsewhere
        } else {
            Decision::Here
        };
        follow(&decider.image, &self.intent, decision).map_err(Error::on(&decider.disk))?;
        for part in others {
            follow(&part.image, &self.intent, Decision::Elsewhere)
                .map_err(Error::on(&part.disk))?;
        }
        for part in &self.participants {
            // One that stays costs room and is cleared away by the next checkpoint.
            let _ = anchor::sweep(&part.image);
        }
        if decision == Decision::Here {
            // The checkpoint is real everywhere; a decision that stays is only room lost.
            let _ = forget(&decider.image, self.intent.transaction);
        }
        bear_witness(&self.witnesses, self.intent.checkpoint)
    }

    /// Takes everything back, on every disk that lets itself be written.
    pub(super) fn abandon(&self) -> Result<()> {
        let mut outcome = Ok(());
        for part in &self.participants {
            let undone = undo(&part.image, &self.intent)
                .and_then(|()| anchor::sweep(&part.image))
                .map_err(Error::on(&part.disk));
            outcome = outcome.and(undone);
        }
        outcome
    }
}

impl Part {
    /// Where the links must be the tree's, the gap in the history is told by the last bitmap.
    pub(super) fn cut_history(&self, record: &mut ChainRecord) {
        if let Some(last) = record.checkpoints.last_mut().filter(|_| self.cut) {
            last.health = Health::Lost;
        }
    }

    pub(super) fn new(disk: &Disk, scheme: Option<Scheme>) -> Result<Self> {
        let bitmaps = disk.image.bitmaps().map_err(Error::on(&disk.name))?;
        let usual = usual_scheme(&bitmaps);
        let fresh = proof::fresh_record(scheme.unwrap_or(usual)).map_err(Error::Random)?;
        Ok(Self {
            disk: disk.name.clone(),
            image: Arc::clone(&disk.image),
            fresh,
            parent: None,
            anchor: None,
            cut: false,
        })
    }
}

/// The parent as one disk knows it. A disk that was rolled back, or not given for a while, does not
/// know the checkpoints that were taken without it; its own link says so for ever.
fn parent_on(disk: &DiskView, parent: Option<Identity>) -> Option<Identity> {
    match &disk.record {
        Some(record) if !record.checkpoints.is_empty() => record.current,
        _ => parent,
    }
}

/// Disks that take no part and whose record knows the parent: that they are at hand now is a fact
/// that their older bitmaps need to answer for the new checkpoint.
fn witnesses(
    domain: &Domain,
    view: &View,
    participants: &[Part],
    parent: Option<Identity>,
) -> Vec<Disk> {
    let knows = |disk: &&Disk| {
        let record = view
            .disk(&disk.name)
            .ok()
            .and_then(|disk| disk.record.as_ref());
        disk.image.is_writable()
            && participants.iter().all(|part| part.disk != disk.name)
            && record.is_some_and(|r| !r.checkpoints.is_empty() && r.current == parent)
    };
    domain.disks().iter().filter(knows).cloned().collect()
}

/// Writes down on the disks that took no part that they were at hand. One that it cannot be
/// written to will be full.
pub(super) fn bear_witness(witnesses: &[Disk], checkpoint: Identity) -> Result<()> {
    for disk in witnesses {
        let write = disk.image.update(|update| {
            let Some(mut record) = update.record().cloned() else {
                return Ok(());
            };
            record.current = Some(checkpoint);
            update.set_record(Some(record));
            Ok(())
        });
        write.map_err(Error::on(&disk.name))?;
    }
    Ok(())
}

/// The scheme of an image without a record: as that of the recording bitmaps it already has.
pub(super) fn usual_scheme(bitmaps: &[BitmapInfo]) -> Scheme {
    if bitmaps.iter().any(|info| info.auto) {
        Scheme::Cumulative
    } else {
        Scheme::Intervals
    }
}

fn choose_name(view: &View, spec: &CreateSpec, created: u64) -> Result<String> {
    let Some(wanted) = &spec.name else {
        return Ok(name::from_time(created, &view.names()));
    };
    name::check(wanted)?;
    if view.tree.has_name(wanted) {
        return Err(Error::NameTaken(wanted.clone()));
    }
    Ok(wanted.clone())
}

fn choose_disks<'a>(domain: &'a Domain, spec: &CreateSpec) -> Result<Vec<&'a Disk>> {
    let Some(listed) = &spec.disks else {
        let all: Vec<&Disk> = domain
            .disks()
            .iter()
            .filter(|disk| disk.image.is_writable())
            .collect();
        return if all.is_empty() {
            Err(Error::NoDisks)
        } else {
            Ok(all)
        };
    };
    let mut seen = HashSet::new();
    let mut chosen = Vec::new();
    for wanted in listed {
        let disk = domain.disk(&wanted.name)?;
        if !seen.insert(&wanted.name) {
            return Err(Error::DoubledDisk(wanted.name.clone()));
        }
        if !wanted.bitmap {
            continue;
        }
        if !disk.image.is_writable() {
            return Err(Error::DiskReadOnly(wanted.name.clone()));
        }
        chosen.push(disk);
    }
    if chosen.is_empty() {
        return Err(Error::NoDisks);
    }
    chosen.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(chosen)
}
