//! `bitmap dump`: what a bitmap marks, as runs.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::exit::{Exit, Outcome};
use crate::open::{Format, Share, read_alone};
use crate::out::{Out, say};

/// Show what a bitmap marks: maximal runs, clean ones too
#[derive(Args, Debug)]
pub(crate) struct Dump {
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    share: Share,
    /// Image to look at
    image: PathBuf,
    /// Name of the bitmap
    name: String,
}

impl Dump {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let bitmap = read_alone(&self.image, self.share)?.load_bitmap(&self.name)?;
        if out.is_json() {
            out.array(bitmap.runs().map(|(range, dirty)| {
                let length = range.end - range.start;
                Ok(json!({ "start": range.start, "length": length, "dirty": dirty }))
            }))?;
            return Ok(Exit::Done);
        }
        say!(out, "Offset          Length          State")?;
        for (range, dirty) in bitmap.runs() {
            let start = format!("{:#x}", range.start);
            let length = format!("{:#x}", range.end - range.start);
            let state = if dirty { "dirty" } else { "clean" };
            say!(out, "{start:<15} {length:<15} {state}")?;
        }
        Ok(Exit::Done)
    }
}
