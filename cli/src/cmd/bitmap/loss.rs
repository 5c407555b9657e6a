//! What a change of a checkpoint's bitmap costs the chain, and who may do it.

use tidemark_qcow2::chain::{Health, Proof, Reading};
use tidemark_qcow2::{Error, Mistake, Update};

use crate::exit::{Failure, Outcome};

/// A change of one bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Remove,
    Clear,
    Enable,
    Disable,
    Merge,
}

impl Change {
    pub(super) const fn past(self) -> &'static str {
        match self {
            Self::Remove => "removed",
            Self::Clear => "cleared",
            Self::Enable => "enabled",
            Self::Disable => "disabled",
            Self::Merge => "merged",
        }
    }

    /// What the bitmap is worth afterwards; `None`: as much as before.
    fn cost(self, proof: &Proof) -> Option<Health> {
        let recording = matches!(proof, Proof::Recording(_));
        match self {
            Self::Remove => Some(Health::Lost),
            Self::Clear if recording => Some(Health::Reset),
            Self::Clear => Some(Health::Lost),
            // It will miss writes until it is enabled again, and nobody can tell which.
            Self::Disable if recording => Some(Health::NotRecording),
            Self::Disable => None,
            // A recording one that can be enabled was disabled, and missed writes.
            Self::Enable if recording => Some(Health::Lost),
            Self::Enable => Some(Health::Changed),
            // A recording bitmap may say too much; a frozen one no longer has its checksum.
            Self::Merge if recording => None,
            Self::Merge => Some(Health::Changed),
        }
    }
}

/// Refuses a checkpoint's bitmap unless forced; then stages what is lost in the chain record and
/// returns it as a sentence.
pub(super) fn admit(
    update: &mut Update<'_>,
    name: &str,
    change: Change,
    force: bool,
) -> Outcome<Option<String>> {
    refuse_unsound(update)?;
    let Some(record) = update.record() else {
        return Ok(None);
    };
    let Some(entry) = record.checkpoint_named(name) else {
        return Ok(None);
    };
    if !force {
        let image = update.image().name().to_owned();
        let mistake = Mistake::BitmapInChain(name.to_owned());
        return Err(Failure::from(Error::Invalid { image, mistake })
            .advise("--force changes it all the same, and records the loss"));
    }
    let Some(health) = change.cost(&entry.proof) else {
        return Ok(None);
    };
    if !entry.health.is_usable() && health != Health::Lost {
        return Ok(None);
    }
    let mut record = record.clone();
    if let Some(entry) = record.checkpoint_named_mut(name) {
        entry.health = health;
        if matches!(change, Change::Remove) {
            entry.proof = Proof::None;
        }
    }
    update.set_record(Some(record));
    Ok(Some(format!(
        "checkpoint '{name}' is now {}: what changed since it, or through it, needs a full backup",
        health.as_str()
    )))
}

/// A record that cannot be trusted may name any bitmap: nothing is changed under it.
fn refuse_unsound(update: &Update<'_>) -> Outcome<()> {
    let state = match update.image().chain() {
        Reading::Absent | Reading::Current(_) => return Ok(()),
        Reading::Stale(_) => "stale",
        Reading::Damaged => "damaged",
    };
    Err(Failure::new(format!(
        "{}: the chain record is {state}, so nobody knows whose this bitmap is; \
         `tidemark checkpoint rebuild --adopt` renews the record",
        update.image().name()
    )))
}
