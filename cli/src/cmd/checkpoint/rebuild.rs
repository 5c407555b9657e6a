//! `checkpoint rebuild`: the chain from the images alone.

use clap::Args;
use serde_json::{Value, json};
use tidemark_checkpoint::CheckpointInfo;

use crate::answer::checkpoint::{evidence, line, to_json};
use crate::domain::{Access, Disks};
use crate::exit::{Exit, Outcome};
use crate::open::Share;
use crate::out::{Out, say};

/// Rebuild the chain of checkpoints from the images alone; ignores --metadata
#[derive(Args, Debug)]
pub(crate) struct Rebuild {
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    disks: Disks,
    /// Write what was found into the images
    #[arg(long, conflicts_with = "force_share")]
    adopt: bool,
    /// Take bitmaps without a record at their word
    #[arg(long)]
    trust_inferred: bool,
}

impl Rebuild {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let disks = self.disks.without_metadata();
        let rebuilt = if self.adopt {
            let open = disks.open(&Access::Change)?;
            let rebuilt = open.domain.adopt(self.trust_inferred)?;
            open.close()?;
            rebuilt
        } else {
            let open = disks.open(&Access::Look(self.share))?;
            open.domain.rebuild(self.trust_inferred)?
        };
        let problems: Vec<String> = rebuilt.problems.iter().map(ToString::to_string).collect();
        if out.is_json() {
            let checkpoints: Vec<Value> = rebuilt.checkpoints.iter().map(with_evidence).collect();
            out.json(&json!({ "checkpoints": checkpoints, "problems": problems }))?;
            return Ok(Exit::Done);
        }
        for info in &rebuilt.checkpoints {
            line(out, info, 0)?;
            say!(out, "    evidence: {}", evidence(info).as_str())?;
        }
        for problem in &problems {
            say!(out, "problem: {problem}")?;
        }
        Ok(Exit::Done)
    }
}

fn with_evidence(info: &CheckpointInfo) -> Value {
    let mut value = to_json(info);
    if let Some(object) = value.as_object_mut() {
        object.insert("evidence".into(), json!(evidence(info).as_str()));
    }
    value
}
