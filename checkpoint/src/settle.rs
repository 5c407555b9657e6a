//! Finishing or undoing what was interrupted, on the disks themselves.

use std::collections::HashSet;

use tidemark_qcow2::Image;
use tidemark_qcow2::chain::{ChainRecord, Identity, Intent, Reading};

use crate::anchor;
use crate::fold::{self, Findings, fold_out, freeze, is_recording};
use crate::view::{Standing, View};
use crate::{Error, Result};

/// Decisions that a record keeps for disks that have not followed. There is one for each creation
/// that was interrupted after its decision, which is rare; a disk that missed the last eight is
/// full once.
const MAX_DECISIONS: usize = 8;

/// Brings every interrupted creation to its end. The caller has refused what cannot be settled.
pub(crate) fn settle(view: &View) -> Result<()> {
    for disk in &view.disks {
        let Some(pending) = &disk.pending else {
            continue;
        };
        let outcome = match pending.standing {
            Standing::Finish => follow(&disk.image, &pending.intent, Decision::Elsewhere),
            Standing::Undo => undo(&disk.image, &pending.intent),
            Standing::Undecided | Standing::Backup => Ok(()),
        };
        outcome.map_err(Error::on(&disk.name))?;
    }
    Ok(())
}

/// Whether a disk's commit is itself the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// This disk decides for others that will follow.
    Here,
    /// This disk follows, or is alone.
    Elsewhere,
}

/// Makes the tentative checkpoint real on one disk, by one header write. Does nothing if it is.
pub(crate) fn follow(image: &Image, intent: &Intent, decision: Decision) -> fold::Result<()> {
    let Some(record) = record_of(image) else {
        return Ok(());
    };
    if !is_prepared(&record, intent) {
        return Ok(());
    }
    let findings = Findings::of(image, &record, is_recording)?;
    image.update(|update| {
        let Some(mut record) = update.record().cloned() else {
            return Ok(());
        };
        if record.checkpoint(intent.checkpoint).is_some() {
            freeze(update, &mut record, intent.checkpoint, &findings)?;
            anchor::let_go_older(&mut record);
            record.current = Some(intent.checkpoint);
        }
        record.intent = None;
        if decision == Decision::Here {
            let surplus = record.decisions.len().saturating_sub(MAX_DECISIONS - 1);
            record.decisions.drain(..surplus);
            record.decisions.push(intent.transaction);
        }
        update.set_record(Some(record));
        Ok(())
    })
}

/// Makes the tentative checkpoint never have been on one disk. Does nothing if it is not there.
pub(crate) fn undo(image: &Image, intent: &Intent) -> fold::Result<()> {
    let Some(record) = record_of(image) else {
        return Ok(());
    };
    if !is_prepared(&record, intent) {
        return Ok(());
    }
    let findings = Findings::of(image, &record, is_recording)?;
    let gone = HashSet::from([intent.checkpoint]);
    image.update(|update| {
        let Some(mut record) = update.record().cloned() else {
            return Ok(());
        };
        fold_out(update, &mut record, &gone, &findings)?;
        record.intent = None;
        update.set_record(Some(record));
        Ok(())
    })
}

/// Forgets a decision that all disks have followed.
pub(crate) fn forget(image: &Image, transaction: Identity) -> fold::Result<()> {
    image.update(|update| {
        let Some(mut record) = update.record().cloned() else {
            return Ok(());
        };
        record.decisions.retain(|decision| *decision != transaction);
        update.set_record(Some(record));
        Ok(())
    })
}

/// The sound record of an image as it is on disk.
pub(crate) fn record_of(image: &Image) -> Option<ChainRecord> {
    match image.chain() {
        Reading::Current(record) => Some(record),
        Reading::Absent | Reading::Stale(_) | Reading::Damaged => None,
    }
}

fn is_prepared(record: &ChainRecord, intent: &Intent) -> bool {
    record
        .intent
        .as_ref()
        .is_some_and(|found| found.transaction == intent.transaction)
}
