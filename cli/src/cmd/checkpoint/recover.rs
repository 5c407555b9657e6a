//! `checkpoint recover`: what can be proved after a crash of a foreign writer comes back.

use clap::Args;
use serde_json::{Value, json};
use tidemark_checkpoint::{Outcome as Recovered, Recovery};

use crate::domain::{Access, Disks};
use crate::exit::{Exit, Outcome};
use crate::out::{Out, say};

/// Recover bitmaps after a crash of QEMU; what is lost is named
#[derive(Args, Debug)]
pub(crate) struct Recover {
    #[command(flatten)]
    disks: Disks,
}

impl Recover {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Change)?;
        let recoveries = open.domain.recover()?;
        open.close()?;
        if out.is_json() {
            out.json(&Value::Array(recoveries.iter().map(to_json).collect()))?;
            return Ok(Exit::Done);
        }
        for recovery in &recoveries {
            let (name, disk) = (&recovery.checkpoint, &recovery.disk);
            let (before, after) = (recovery.before.as_str(), recovery.after.as_str());
            let outcome = recovery.outcome.as_str();
            say!(
                out,
                "{name} on {disk}: {before} -> {after}, {outcome}: {}",
                how(recovery.outcome)
            )?;
        }
        Ok(Exit::Done)
    }
}

fn to_json(recovery: &Recovery) -> Value {
    json!({
        "name": recovery.checkpoint,
        "disk": recovery.disk,
        "before": recovery.before.as_str(),
        "after": recovery.after.as_str(),
        "outcome": recovery.outcome.as_str(),
        "how": how(recovery.outcome),
        "lost": matches!(recovery.outcome, Recovered::Restarted | Recovered::Lost),
    })
}

fn how(outcome: Recovered) -> &'static str {
    match outcome {
        Recovered::Intact => "nothing was wrong",
        Recovered::Rewritten => "its checksum proved the bits",
        Recovered::Restarted => "what it recorded is lost, it records again from now",
        Recovered::Lost => "nothing proves its bits; a backup through it is full",
    }
}
