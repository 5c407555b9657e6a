//! `checkpoint verify`: everything that can be proved, proved.

use clap::Args;
use serde_json::json;
use tidemark_checkpoint::Problem;

use crate::domain::{Access, Disks};
use crate::exit::{Exit, Outcome};
use crate::open::Share;
use crate::out::{Out, say};

/// Prove every bitmap, and compare descriptors with the images
#[derive(Args, Debug)]
pub(crate) struct Verify {
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    disks: Disks,
}

impl Verify {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Look(self.share))?;
        let found = open.domain.verify()?;
        // A bitmap of somebody else is worth a word and harms nobody.
        let (notes, problems): (Vec<_>, Vec<_>) = found
            .iter()
            .partition(|problem| matches!(problem, Problem::Foreign { .. }));
        let text = |list: &[&Problem]| {
            list.iter()
                .map(|problem| problem.to_string())
                .collect::<Vec<_>>()
        };
        if out.is_json() {
            out.json(&json!({ "problems": text(&problems), "notes": text(&notes) }))?;
        } else {
            for note in text(&notes) {
                say!(out, "note: {note}")?;
            }
            for problem in text(&problems) {
                say!(out, "{problem}")?;
            }
            if problems.is_empty() {
                say!(out, "all checkpoints are sound")?;
            }
        }
        Ok(if problems.is_empty() {
            Exit::Done
        } else {
            Exit::Damage
        })
    }
}
