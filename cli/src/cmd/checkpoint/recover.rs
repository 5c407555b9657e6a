//! `checkpoint recover`: what can be proved after a crash of a foreign writer comes back.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use tidemark_checkpoint::backup::Filled;
use tidemark_checkpoint::{Outcome as Recovered, Recovery};
use tidemark_qcow2::chain::Health;

use super::against;

use crate::domain::{Access, Disks};
use crate::exit::{Exit, Outcome};
use crate::open::Gates;
use crate::out::{Out, say};

/// Recover bitmaps after a crash of QEMU; what is lost is named
#[derive(Args, Debug)]
pub(crate) struct Recover {
    #[command(flatten)]
    disks: Disks,
    #[command(flatten)]
    gates: Gates,
    /// Fill what was lost by comparing the disk with a backup
    #[arg(long, value_name = "BACKUP_DIR")]
    against: Option<PathBuf>,
    /// Fill what was lost by comparing the only disk with an image of it as it was at CHECKPOINT
    #[arg(long, value_name = "CHECKPOINT=IMAGE", conflicts_with = "against")]
    against_image: Option<String>,
}

/// One bitmap, and the backup that it was compared with.
struct Row {
    recovery: Recovery,
    compared_with: Option<String>,
}

impl Recover {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let compares = self.against.is_some() || self.against_image.is_some();
        let access = match compares {
            true => Access::Copy(self.gates.clone()),
            false => Access::Change,
        };
        let open = self.disks.open(&access)?;
        let found = open.domain.recover()?;
        let filled = match (&self.against, &self.against_image) {
            (Some(directory), _) => against::directory(&open.domain, directory)?,
            (None, Some(image)) => against::image(&open.domain, image, &self.gates)?,
            (None, None) => Vec::new(),
        };
        open.close()?;
        let rows: Vec<Row> = found
            .into_iter()
            .map(|recovery| Row::new(recovery, &filled))
            .collect();
        if out.is_json() {
            out.json(&Value::Array(rows.iter().map(Row::to_json).collect()))?;
            return Ok(Exit::Done);
        }
        for row in &rows {
            let (name, disk) = (&row.recovery.checkpoint, &row.recovery.disk);
            let (before, after) = (row.recovery.before.as_str(), row.after());
            say!(
                out,
                "{name} on {disk}: {before} -> {after}, {}: {}",
                row.outcome(),
                row.how()
            )?;
        }
        Ok(Exit::Done)
    }
}

impl Row {
    fn new(recovery: Recovery, filled: &[Filled]) -> Self {
        let own = |compared: &&Filled| {
            compared.disk == recovery.disk && compared.checkpoint == recovery.checkpoint
        };
        let compared_with = filled
            .iter()
            .find(own)
            .map(|compared| compared.compared_with.clone());
        Self {
            recovery,
            compared_with,
        }
    }

    fn after(&self) -> &'static str {
        match self.compared_with {
            Some(_) => Health::Recovered.as_str(),
            None => self.recovery.after.as_str(),
        }
    }

    fn outcome(&self) -> &'static str {
        match self.compared_with {
            Some(_) => "compared",
            None => self.recovery.outcome.as_str(),
        }
    }

    fn how(&self) -> String {
        match &self.compared_with {
            Some(with) => format!("filled from a comparison with the backup of '{with}'"),
            None => how(self.recovery.outcome).to_owned(),
        }
    }

    fn to_json(&self) -> Value {
        let gone = matches!(
            self.recovery.outcome,
            Recovered::Restarted | Recovered::Lost
        );
        json!({
            "name": self.recovery.checkpoint,
            "disk": self.recovery.disk,
            "before": self.recovery.before.as_str(),
            "after": self.after(),
            "outcome": self.outcome(),
            "how": self.how(),
            "lost": gone && self.compared_with.is_none(),
        })
    }
}

fn how(outcome: Recovered) -> &'static str {
    match outcome {
        Recovered::Intact => "nothing was wrong",
        Recovered::Rewritten => "its checksum proved the bits",
        Recovered::Anchored => "its anchor told what changed, it records on",
        Recovered::Restarted => "what it recorded is lost, it records again from now",
        Recovered::Lost => "nothing proves its bits; a backup through it is full",
    }
}
