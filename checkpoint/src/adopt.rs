//! Writing what was rebuilt back into the images as chain records.

use std::collections::HashMap;
use std::sync::Arc;

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::chain::{
    ChainRecord, CheckpointEntry, Health, Identity, ImageUuid, Proof, Scheme,
};
use tidemark_qcow2::{BitmapInfo, Image, proof};

use crate::fold::{self, refused};
use crate::infer::{self, Inferred};
use crate::rebuild::{Kinship, Rebuilt, rebuild};
use crate::settle::settle;
use crate::view::{DiskView, Soundness, Standing, View};
use crate::{Domain, Error, Result, layers};

impl Domain {
    /// Rebuilds, and gives every image a record that says so. Repeating it changes nothing.
    ///
    /// - A sound record stays; losses found now are written into it.
    /// - An older record, of which the newer is damaged, is written anew with what its proofs
    ///   confirm.
    /// - Recording bitmaps without a record become a cumulative chain with new identities.
    /// - Disabled ones without a record become intervals that do not serve; with `trust_inferred`
    ///   the recording one takes the union of all, which is right for every order, and they do.
    ///
    /// # Errors
    /// Before anything is written: [`Error::DiskReadOnly`], [`Error::Undecided`],
    /// [`Error::PendingBackup`]. Later, [`Error::Image`]: repeat it.
    pub fn adopt(&self, trust_inferred: bool) -> Result<Rebuilt> {
        let _turn = self.changing()?;
        let view = View::of_images(self)?;
        require_adoptable(&view)?;
        let mut works = Vec::new();
        for disk in &view.disks {
            let work = Work::of(disk).map_err(Error::on(&disk.name))?;
            works.extend(work.map(|work| (disk, work)));
        }
        if let Some((disk, _)) = works.iter().find(|(disk, _)| !disk.image.is_writable()) {
            return Err(Error::DiskReadOnly(disk.name.clone()));
        }
        settle(&view)?;
        let kinship = Kinship::of(works.iter().filter_map(|(_, work)| work.inferred()));
        let identities = identities(&view, &works)?;
        for (disk, work) in &works {
            match work {
                Work::Renew(record) => renew(&disk.image, record).map_err(Error::on(&disk.name))?,
                Work::Begin(inferred) => {
                    let uuid = ImageUuid::random().map_err(Error::Random)?;
                    let unknown_below = disk.image.backing().is_some() && !trust_inferred;
                    let adoption = Adoption {
                        layers: &disk.layers,
                        unknown_below: unknown_below && disk.layers.is_empty(),
                        kinship: &kinship,
                        identities: &identities,
                        uuid,
                    };
                    adoption
                        .carry_out(&disk.image, inferred.as_ref(), trust_inferred)
                        .map_err(Error::on(&disk.name))?;
                }
            }
        }
        rebuild(&View::of_images(self)?, trust_inferred)
    }
}

/// What a disk needs.
enum Work {
    /// The record with what was found.
    Renew(ChainRecord),
    /// A first record, with what its bitmaps suggest.
    Begin(Option<Inferred>),
}

impl Work {
    fn of(disk: &DiskView) -> fold::Result<Option<Self>> {
        let Some(record) = &disk.record else {
            let inferred = infer::infer(&disk.name, &disk.image, &disk.bitmaps)?;
            let needed = inferred.is_some() || disk.soundness == Soundness::Damaged;
            return Ok(needed.then_some(Self::Begin(inferred)));
        };
        let mut renewed = record.clone();
        for entry in &mut renewed.checkpoints {
            let found = fold::judge(&disk.image, entry)?;
            // What only recovery can end is left to it.
            if !found.is_usable() && found != Health::Inconsistent {
                entry.health = found;
            }
        }
        let sound = disk.soundness == Soundness::Current && disk.directory_is_ours;
        let unchanged = sound && renewed == *record;
        Ok((!unchanged).then_some(Self::Renew(renewed)))
    }

    fn inferred(&self) -> Option<&Inferred> {
        match self {
            Self::Begin(inferred) => inferred.as_ref(),
            Self::Renew(_) => None,
        }
    }
}

fn require_adoptable(view: &View) -> Result<()> {
    for disk in &view.disks {
        let Some(pending) = &disk.pending else {
            continue;
        };
        match pending.standing {
            Standing::Finish | Standing::Undo => {}
            Standing::Undecided => {
                return Err(Error::Undecided {
                    disk: disk.name.clone(),
                    decider: pending.intent.decider.clone(),
                    checkpoint: pending.name.clone(),
                });
            }
            Standing::Backup => {
                return Err(Error::PendingBackup {
                    checkpoint: pending.name.clone(),
                });
            }
        }
    }
    Ok(())
}

/// One identity a name: that of a record on another disk, or a new one.
fn identities(view: &View, works: &[(&DiskView, Work)]) -> Result<HashMap<String, Identity>> {
    let mut identities = HashMap::new();
    for info in works
        .iter()
        .filter_map(|(_, work)| work.inferred())
        .flat_map(|i| &i.order)
    {
        if identities.contains_key(&info.name) {
            continue;
        }
        let identity = match view.tree.named(&info.name) {
            Ok(id) => view.tree.node(id).identity,
            Err(_) => Identity::random().map_err(Error::Random)?,
        };
        identities.insert(info.name.clone(), identity);
    }
    Ok(identities)
}

fn renew(image: &Image, record: &ChainRecord) -> fold::Result<()> {
    image.update(|update| {
        let mut renewed = record.clone();
        // Settling may have moved the record on; losses are facts all the same.
        if let Some(now) = update.record().filter(|now| now.image == record.image) {
            renewed = now.clone();
            for entry in &mut renewed.checkpoints {
                if let Some(found) = record.checkpoint(entry.identity) {
                    entry.health = found.health;
                }
            }
        }
        update.set_record(Some(renewed));
        Ok(())
    })
}

/// A first record for an image with bitmaps of others.
struct Adoption<'a> {
    kinship: &'a Kinship,
    /// The images below, from the top down, as far as they were given.
    layers: &'a [Arc<Image>],
    /// Whether something lies below that was not given.
    unknown_below: bool,
    identities: &'a HashMap<String, Identity>,
    uuid: ImageUuid,
}

impl Adoption<'_> {
    fn carry_out(
        &self,
        image: &Image,
        inferred: Option<&Inferred>,
        trust_inferred: bool,
    ) -> fold::Result<()> {
        let Some(inferred) = inferred else {
            let record = ChainRecord::new(self.uuid, Scheme::Intervals);
            return image.update(|update| {
                update.set_record(Some(record));
                Ok(())
            });
        };
        let mut record = ChainRecord::new(self.uuid, inferred.scheme);
        let mut contents = Vec::new();
        let sound: Vec<&BitmapInfo> = inferred.order.iter().filter(|info| !info.in_use).collect();
        let joins = inferred.scheme == Scheme::Intervals
            && trust_inferred
            && sound.len() == inferred.order.len()
            && sound.iter().filter(|info| info.auto).count() == 1;
        let serves = joins || inferred.scheme == Scheme::Cumulative;
        let all_bitmaps = image.bitmaps()?;
        let mut all: Option<Bitmap> = None;
        // The recording one comes last and takes the union of all.
        for info in sound {
            let mut bits = image.load_bitmap(&info.name)?;
            let mut serves = serves && !self.unknown_below;
            if !self.layers.is_empty() {
                // What the layers below recorded is the top's from now on.
                match layers::below((image, &all_bitmaps), self.layers, &info.name)? {
                    Some(union) => bits = union,
                    None => serves = false,
                }
            }
            if joins {
                if let Some(all) = &all {
                    bits.union_outward(all)
                        .map_err(|error| refused(image, error))?;
                }
                all = Some(bits.clone());
            }
            let proof = match info.auto {
                true => Proof::Recording(proof::plant(image, &mut bits)?),
                false => Proof::Frozen(proof::frozen(&bits)),
            };
            record
                .checkpoints
                .push(self.entry(image, info, serves, proof));
            contents.push((info.clone(), bits));
        }
        record.current = record.checkpoints.last().map(|entry| entry.identity);
        image.update(|update| {
            for (info, bits) in contents {
                update.put(&info.name, bits, info.auto)?;
            }
            update.set_record(Some(record));
            Ok(())
        })
    }

    fn entry(
        &self,
        image: &Image,
        info: &BitmapInfo,
        serves: bool,
        proof: Proof,
    ) -> CheckpointEntry {
        let identity = |name: &String| self.identities.get(name).copied();
        CheckpointEntry {
            identity: identity(&info.name).unwrap_or(Identity([0; 16])),
            name: info.name.clone(),
            parent: self.kinship.parent(&info.name).and_then(identity),
            created: None,
            disk_bytes: Some(image.size()),
            granularity: info.granularity,
            health: if serves { Health::Ok } else { Health::Inferred },
            proof,
            anchor: None,
        }
    }
}
