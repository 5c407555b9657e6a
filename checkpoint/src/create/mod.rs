//! Taking a checkpoint: a new bitmap on every disk that takes part, all disks or none.
//!
//! On one disk a single header write does everything. On several:
//! 1. *Prepare* each disk: the new bitmap records beside the old one, and the record says what is
//!    intended. Found later, undecided, this is undone.
//! 2. *Decide* on the first disk by name: its own freeze and the decision are one header write.
//! 3. *Follow* on the others, then forget the decision.
//!
//! A disk that freezes late freezes what it then has, which is a superset.

mod anchoring;
mod draft;
mod planting;
mod redefine;
mod tentative;

use tidemark_bitmap::Granularity;
use tidemark_qcow2::chain::{IntentKind, Scheme};

pub use tentative::Tentative;

use self::draft::Draft;
use crate::anchor;
use crate::fold::{Findings, freeze, is_recording};
use crate::settle::{record_of, settle};
use crate::view::View;
use crate::{Checkpoint, CreateFlags, DescribedDisk, Descriptor, Domain, Error, Result};

/// What a new checkpoint shall be. The default is a good one: a name from the clock, all writable
/// disks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateSpec {
    /// Name; `None` for the seconds since the epoch.
    pub name: Option<String>,
    /// Free text for the descriptor.
    pub description: Option<String>,
    /// Disks; those not listed take no part. `None` for all writable ones.
    pub disks: Option<Vec<DescribedDisk>>,
    /// Bytes of disk per bit; `None` for the cluster size, between 4 KiB and 64 KiB.
    pub granularity: Option<Granularity>,
    /// Anchor it: an internal snapshot on every disk that takes part, so that what changed since is
    /// known from the mapping tables, whatever becomes of the bitmaps. It costs a copy at each
    /// first overwrite, and the room of what is overwritten, until the next checkpoint.
    pub anchor: bool,
    /// Scheme of an image that has no record yet; `None` for intervals, or cumulative where
    /// recording bitmaps of others are.
    pub scheme: Option<Scheme>,
}

impl From<Descriptor> for CreateSpec {
    /// Takes what a description may say of a new checkpoint: creation time, parent and identity
    /// are not for it to choose.
    fn from(descriptor: Descriptor) -> Self {
        Self {
            name: Some(descriptor.name).filter(|name| !name.is_empty()),
            description: descriptor.description,
            disks: descriptor.disks,
            ..Self::default()
        }
    }
}

impl Domain {
    /// Creates a checkpoint from a `<domaincheckpoint>`, or reinstates the descriptor of one with
    /// [`CreateFlags::REDEFINE`].
    ///
    /// # Errors
    /// As [`Self::create`] and [`Self::redefine`]; [`Error::Xml`].
    pub fn create_xml(&self, xml: &str, flags: CreateFlags) -> Result<Checkpoint> {
        flags.check()?;
        let descriptor = Descriptor::parse(xml)?;
        if flags.contains(CreateFlags::REDEFINE) {
            self.redefine(&descriptor, flags)
        } else {
            self.create(&descriptor.into(), flags)
        }
    }

    /// Takes a checkpoint now: its parent is the current one, and it becomes current.
    ///
    /// Of the flags only [`CreateFlags::NO_METADATA`] has a meaning here.
    ///
    /// # Errors
    /// Before anything is written: [`Error::NameTaken`], [`Error::BitmapExists`], errors of names
    /// and disks, [`Error::CurrentDisputed`], [`Error::RecordUnsound`], [`Error::Undecided`],
    /// [`Error::PendingBackup`]. Later, [`Error::Image`]: no disk has the checkpoint then, or all
    /// will have it when the next operation finishes it.
    pub fn create(&self, spec: &CreateSpec, flags: CreateFlags) -> Result<Checkpoint> {
        check_flags(flags)?;
        let turn = self.changing()?;
        let view = View::read(self)?;
        let mut draft = Draft::new(self, &view, spec)?;
        view.require_changeable()?;
        let wants_descriptor = !flags.contains(CreateFlags::NO_METADATA);
        let store = self.store().filter(|_| wants_descriptor);
        let staged = store
            .map(|store| store.stage(&draft.descriptor(self, &view)))
            .transpose()?;
        settle(&view)?;
        self.flush_all()?;
        draft.mend_by_anchors()?;
        draft.anchor(spec.anchor)?;
        let taken = match draft.participants.as_slice() {
            [_] => draft.take_at_once(),
            _ => draft
                .prepare(IntentKind::Create)
                .and_then(|p| p.commit_all()),
        };
        // Also after a failure: what the record does not name is nobody's.
        draft.sweep_anchors();
        taken?;
        staged.map_or(Ok(()), crate::store::Staged::publish)?;
        drop(turn);
        Ok(Checkpoint::new(self, draft.identity, draft.name))
    }

    /// The moment is one of all disks, also of those that take no part: what a guest has not
    /// flushed there would be different after a crash, and no bitmap would know.
    fn flush_all(&self) -> Result<()> {
        let writable = self.disks().iter().filter(|disk| disk.image.is_writable());
        writable
            .into_iter()
            .try_for_each(|disk| disk.image.flush().map_err(Error::on(&disk.name)))
    }

    /// Prepares a checkpoint that becomes real only with [`Tentative::commit`]: for a backup,
    /// whose data and manifest must be durable first. From now on the new bitmaps record.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn prepare(&self, spec: &CreateSpec, flags: CreateFlags) -> Result<Tentative> {
        check_flags(flags)?;
        let _turn = self.changing()?;
        let view = View::read(self)?;
        let mut draft = Draft::new(self, &view, spec)?;
        view.require_changeable()?;
        settle(&view)?;
        self.flush_all()?;
        draft.mend_by_anchors()?;
        draft.anchor(spec.anchor)?;
        let descriptor =
            (!flags.contains(CreateFlags::NO_METADATA)).then(|| draft.descriptor(self, &view));
        let prepared = draft.prepare(IntentKind::Backup)?;
        Ok(Tentative::new(self, &draft, prepared, descriptor))
    }
}

/// Refuses flags that have no meaning where a checkpoint is taken now.
fn check_flags(flags: CreateFlags) -> Result<()> {
    flags.check()?;
    if flags.contains(CreateFlags::REDEFINE) {
        let problem = "needs a description";
        return Err(Error::FlagConflict {
            flag: "REDEFINE",
            problem,
        });
    }
    Ok(())
}

impl Draft {
    /// The whole creation on a domain of one disk: one header write.
    fn take_at_once(&self) -> Result<()> {
        for part in &self.participants {
            let (bits, entry) = self.new_bitmap(part)?;
            let before = record_of(&part.image).unwrap_or_else(|| part.fresh.clone());
            let take = || {
                let findings = Findings::of(&part.image, &before, is_recording)?;
                part.image.update(|update| {
                    let mut record = update.record().cloned().unwrap_or(before.clone());
                    part.cut_history(&mut record);
                    freeze(update, &mut record, self.identity, &findings)?;
                    update.put(&self.name, bits, true)?;
                    record.checkpoints.push(entry);
                    anchor::let_go_older(&mut record);
                    record.current = Some(self.identity);
                    update.set_record(Some(record));
                    Ok(())
                })
            };
            take().map_err(Error::on(&part.disk))?;
        }
        draft::bear_witness(&self.witnesses, self.identity)
    }
}
