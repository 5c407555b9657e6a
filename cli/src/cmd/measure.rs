//! `measure`: how large a file a disk would take.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tidemark_qcow2::transfer::{self, Measured};

use crate::creation::Creation;
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{self, Gates, Share};
use crate::out::{Out, say};
use crate::size;

/// Say how many bytes a copy of a disk, or a new disk, would take
#[derive(Args, Debug)]
pub(crate) struct Measure {
    /// Format of IMAGE
    #[arg(short = 'f', value_name = "FMT", default_value = "qcow2")]
    format: String,
    /// Format of the copy, qcow2 or raw
    #[arg(short = 'O', value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Options of a qcow2 copy, as in `create`
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<String>,
    /// Measure the disk as it was in this internal snapshot, an identifier or a name
    #[arg(short = 'l', value_name = "SNAP", requires = "image")]
    snapshot: Option<String>,
    /// Measure a new, empty disk of this size
    #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "image")]
    size: Option<u64>,
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    gates: Gates,
    /// Disk to measure
    #[arg(value_name = "IMAGE", required_unless_present = "size")]
    image: Option<PathBuf>,
}

impl Measure {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let wanted = self.wanted()?;
        let measured = match &self.image {
            Some(path) => {
                let snapshot = self.snapshot.as_deref();
                let source = open::source_or_snapshot(
                    path,
                    &self.format,
                    snapshot,
                    &self.gates,
                    self.share,
                )?;
                measure(&transfer::Measure::Disk(&source), wanted.as_ref())?
            }
            None => {
                let wanted_size = wanted.as_ref().and_then(|wanted| wanted.size);
                let size = self.size.or(wanted_size).unwrap_or_default();
                measure(&transfer::Measure::Size(size), wanted.as_ref())?
            }
        };
        answer(out, &measured)
    }

    /// The options of a qcow2 target; `None` for a raw one.
    fn wanted(&self) -> Outcome<Option<Creation>> {
        match self.target_format.as_str() {
            "qcow2" => Creation::parse(&self.options).map(Some),
            "raw" if self.options.is_empty() => Ok(None),
            "raw" => Err(Failure::usage("-o is for qcow2 targets; use -O qcow2")),
            other => Err(Failure::unsupported(format!(
                "-O {other}: only qcow2 and raw are supported"
            ))),
        }
    }
}

fn measure(what: &transfer::Measure, wanted: Option<&Creation>) -> Outcome<Measured> {
    let Some(wanted) = wanted else {
        return Ok(what.as_raw());
    };
    let mut options = wanted.options.clone();
    options.backing = wanted.backing_reference()?;
    Ok(what.as_qcow2(&options)?)
}

fn answer(out: &mut Out, measured: &Measured) -> Outcome {
    let Measured {
        required,
        fully_allocated,
        bitmaps,
    } = *measured;
    if out.is_json() {
        let mut answer = json!({ "required": required, "fully-allocated": fully_allocated });
        if let Some(bytes) = bitmaps {
            answer["bitmaps"] = json!(bytes);
        }
        out.json(&answer)?;
        return Ok(Exit::Done);
    }
    say!(out, "required size: {required}")?;
    say!(out, "fully allocated size: {fully_allocated}")?;
    if let Some(bytes) = bitmaps {
        say!(out, "bitmaps size: {bytes}")?;
    }
    Ok(Exit::Done)
}
