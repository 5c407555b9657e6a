//! A checkpoint that waits for its backup.

use tidemark_qcow2::chain::{Identity, Intent, IntentKind};

use super::draft::{Draft, Part, Prepared};
use crate::settle::record_of;
use crate::view::{Standing, View};
use crate::{Checkpoint, Descriptor, Domain, Error, Result};

/// A checkpoint that its bitmaps already record and that is not yet real. Dropping it changes
/// nothing: it stays in the images until somebody commits or abandons it.
#[derive(Debug)]
pub struct Tentative {
    domain: Domain,
    name: String,
    prepared: Prepared,
    descriptor: Option<Descriptor>,
}

impl Tentative {
    pub(super) fn new(
        domain: &Domain,
        draft: &Draft,
        prepared: Prepared,
        descriptor: Option<Descriptor>,
    ) -> Self {
        Self {
            domain: domain.clone(),
            name: draft.name.clone(),
            prepared,
            descriptor,
        }
    }

    /// Name of the checkpoint that it will be.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identity of the checkpoint that it will be.
    pub fn identity(&self) -> Identity {
        self.prepared.intent.checkpoint
    }

    /// Identity of the transaction.
    pub fn transaction(&self) -> Identity {
        self.prepared.intent.transaction
    }

    /// Names of the disks that take part, sorted.
    pub fn disks(&self) -> impl Iterator<Item = &str> {
        self.prepared
            .participants
            .iter()
            .map(|part| part.disk.as_str())
    }

    /// Makes the checkpoint real on all disks.
    ///
    /// # Errors
    /// [`Error::Image`]: it is real on no disk, or will be on all when the next operation
    /// finishes it. [`Error::Store`]: it is real, and has no descriptor.
    pub fn commit(self) -> Result<Checkpoint> {
        let _turn = self.domain.changing()?;
        let store = self.domain.store();
        let staged = match (store, &self.descriptor) {
            (Some(store), Some(descriptor)) => Some(store.stage(descriptor)?),
            _ => None,
        };
        self.prepared.commit_all()?;
        staged.map_or(Ok(()), crate::store::Staged::publish)?;
        Ok(Checkpoint::new(
            &self.domain,
            self.prepared.intent.checkpoint,
            self.name,
        ))
    }

    /// Undoes the preparation: the bits are folded into the predecessor on each disk.
    ///
    /// # Errors
    /// [`Error::Image`]: repeat it with what [`Domain::tentative`] then finds.
    pub fn abandon(self) -> Result<()> {
        let _turn = self.domain.changing()?;
        self.prepared.abandon()
    }
}

impl Domain {
    /// The checkpoint that a killed backup left behind, if there is one. Until it is committed or
    /// abandoned, operations that change the chain are refused with its name.
    ///
    /// # Errors
    /// [`Error::DiskReadOnly`] when a disk of it cannot be written; [`Error::Store`].
    pub fn tentative(&self) -> Result<Option<Tentative>> {
        let _turn = self.reading();
        let view = View::read(self)?;
        let waiting = view.disks.iter().filter_map(|disk| {
            let pending = disk.pending.as_ref()?;
            (pending.standing == Standing::Backup).then_some((disk, pending))
        });
        let mut found: Option<(Intent, String)> = None;
        let mut participants = Vec::new();
        for (disk, pending) in waiting {
            let (intent, _) = found.get_or_insert((pending.intent.clone(), pending.name.clone()));
            if intent.transaction != pending.intent.transaction {
                continue;
            }
            if !disk.image.is_writable() {
                return Err(Error::DiskReadOnly(disk.name.clone()));
            }
            participants.push(Part::new(self.disk(&disk.name)?, None)?);
        }
        let Some((intent, name)) = found else {
            return Ok(None);
        };
        participants.sort_by_key(|part| part.disk != intent.decider);
        let descriptor = self.descriptor_of(&view, &participants, &intent, &name);
        // After a kill nobody knows whether the other disks are still what they were.
        let prepared = Prepared {
            intent,
            participants,
            witnesses: Vec::new(),
        };
        Ok(Some(Tentative {
            domain: self.clone(),
            name,
            prepared,
            descriptor,
        }))
    }

    /// Undoes an interrupted creation whose decision cannot be read, because the disk that holds
    /// it was not given; also a backup's. If that disk did decide, its checkpoint is missing on
    /// the disks undone here, and they will be full.
    ///
    /// # Errors
    /// [`Error::DiskReadOnly`], [`Error::RecordUnsound`] before anything is written;
    /// [`Error::Image`].
    pub fn undo_undecided(&self) -> Result<()> {
        let _turn = self.changing()?;
        let view = View::read(self)?;
        let open = |standing| matches!(standing, Standing::Undecided | Standing::Backup);
        let waiting: Vec<_> = view
            .disks
            .iter()
            .filter_map(|disk| Some((disk, disk.pending.as_ref()?)))
            .filter(|(_, pending)| open(pending.standing))
            .collect();
        if let Some((disk, _)) = waiting.iter().find(|(disk, _)| !disk.image.is_writable()) {
            return Err(Error::DiskReadOnly(disk.name.clone()));
        }
        for (disk, pending) in waiting {
            crate::settle::undo(&disk.image, &pending.intent).map_err(Error::on(&disk.name))?;
        }
        Ok(())
    }

    fn descriptor_of(
        &self,
        view: &View,
        participants: &[Part],
        intent: &Intent,
        name: &str,
    ) -> Option<Descriptor> {
        debug_assert_eq!(intent.kind, IntentKind::Backup);
        let first = participants.first()?;
        let entry = record_of(&first.image)?
            .checkpoint(intent.checkpoint)?
            .clone();
        let draft = Draft {
            name: name.to_owned(),
            identity: intent.checkpoint,
            parent: entry.parent,
            created: entry.created.unwrap_or_default(),
            description: None,
            granularity: None,
            witnesses: Vec::new(),
            participants: participants.to_vec(),
        };
        Some(draft.descriptor(self, view))
    }
}
