//! Interrupted operations: what an intent found in a record means, given the other disks.

use tidemark_qcow2::chain::{ChainRecord, Intent, IntentKind};

use super::DiskView;
use crate::Problem;

/// What becomes of an intent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The decision was made: this disk follows.
    Finish,
    /// The deciding disk never decided: the moment has passed.
    Undo,
    /// The deciding disk is not here.
    Undecided,
    /// A backup's, not decided: only resuming or cancelling the backup ends it.
    Backup,
}

/// An intent with its standing.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) intent: Intent,
    pub(crate) standing: Standing,
    /// Name of the tentative checkpoint.
    pub(crate) name: String,
}

impl Pending {
    pub(crate) fn problem(&self, disk: &str) -> Problem {
        let (disk, checkpoint) = (disk.to_owned(), self.name.clone());
        match self.standing {
            Standing::Finish => Problem::Interrupted {
                disk,
                checkpoint,
                decided: true,
            },
            Standing::Undo => Problem::Interrupted {
                disk,
                checkpoint,
                decided: false,
            },
            Standing::Undecided => Problem::Undecided {
                disk,
                decider: self.intent.decider.clone(),
                checkpoint,
            },
            Standing::Backup => Problem::PendingBackup { disk, checkpoint },
        }
    }
}

/// Resolves every disk's intent in memory: the record then reads as if the operation had been
/// finished or had never begun. A tentative checkpoint whose fate is open is not shown; the
/// predecessor goes on recording beside it, so nothing that is shown is wrong for that.
pub(super) fn resolve(disks: &mut [DiskView]) {
    let standings: Vec<Option<Standing>> = disks
        .iter()
        .map(|disk| {
            disk.record
                .as_ref()?
                .intent
                .as_ref()
                .map(|i| judge(i, disks))
        })
        .collect();
    for (disk, standing) in disks.iter_mut().zip(standings) {
        let (Some(record), Some(standing)) = (&mut disk.record, standing) else {
            continue;
        };
        let Some(intent) = record.intent.take() else {
            continue;
        };
        let entry = record.checkpoint(intent.checkpoint);
        let name = entry.map_or_else(|| intent.checkpoint.to_string(), |entry| entry.name.clone());
        match standing {
            Standing::Finish => record.current = Some(intent.checkpoint),
            Standing::Undo | Standing::Undecided | Standing::Backup => {
                record
                    .checkpoints
                    .retain(|entry| entry.identity != intent.checkpoint);
            }
        }
        disk.pending = Some(Pending {
            intent,
            standing,
            name,
        });
    }
}

fn judge(intent: &Intent, disks: &[DiskView]) -> Standing {
    let decider = disks
        .iter()
        .filter_map(|disk| Some((disk, disk.record.as_ref()?)))
        .find(|(disk, record): &(&DiskView, &ChainRecord)| {
            disk.name == intent.decider && record.image == intent.decider_image
        });
    match decider {
        Some((_, record)) if record.decisions.contains(&intent.transaction) => Standing::Finish,
        _ if intent.kind == IntentKind::Backup => Standing::Backup,
        Some(_) => Standing::Undo,
        None => Standing::Undecided,
    }
}
