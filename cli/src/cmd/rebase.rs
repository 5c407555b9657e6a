//! `rebase`: another backing file for an overlay.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use tidemark_qcow2::transfer::{self, RebaseOptions, Rebased};
use tidemark_qcow2::{BackingReference, Below};

use crate::cmd::create::is_same_file;
use crate::cmd::info::full_name;
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{self, Format, Gates, Share};
use crate::out::{Out, say};
use crate::progress::Progress;
use crate::size;

/// Give an overlay another backing file; its disk stays as it is
#[derive(Args, Debug)]
pub(crate) struct Rebase {
    #[command(flatten)]
    format: Format,
    /// Change the name alone; recording bitmaps mark what the image does not hold itself
    #[arg(short = 'u')]
    unsafe_name: bool,
    /// With -u: you vouch that the disk reads the same, so that no bitmap is marked
    #[arg(long, requires = "unsafe_name")]
    same_content: bool,
    /// The new backing file; an empty name makes the image stand alone
    #[arg(short = 'b', value_name = "BACKING")]
    backing: String,
    /// Format of the new backing file
    #[arg(short = 'F', value_name = "FMT")]
    backing_format: Option<String>,
    /// Threads that read and write
    #[arg(short = 'm', long, value_name = "N")]
    parallel: Option<u16>,
    /// Show progress from the start
    #[arg(short, long)]
    progress: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    gates: Gates,
    /// Overlay to change
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
}

impl Rebase {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let backing = self.reference()?;
        if self.unsafe_name {
            let below = match self.same_content {
                true => Below::Same,
                false => Below::Unknown,
            };
            open::write_alone(&self.image)?.set_backing(backing.as_ref(), below)?;
            return self.answer(out, Rebased::default());
        }
        let overlay = self.gates.write(&self.image)?;
        let mut options = RebaseOptions {
            gate: self.gates.gate(Share::default()),
            ..RebaseOptions::default()
        };
        if let Some(threads) = self.parallel {
            options.threads = threads.max(1).into();
        }
        let bar = Progress::new(out.progress && !self.quiet, "rebase", 0).eager(self.progress);
        let rebased = transfer::rebase(overlay, backing.as_ref(), &options, &|done, total| {
            bar.of(done, total);
        });
        drop(bar);
        self.answer(out, rebased?)
    }

    /// What the header is to name.
    fn reference(&self) -> Outcome<Option<BackingReference>> {
        let name = &self.backing;
        if name.is_empty() {
            return match self.backing_format {
                Some(_) => Err(Failure::usage(
                    "-F names the format of a backing file; -b is empty",
                )),
                None => Ok(None),
            };
        }
        let format = self.backing_format.clone().ok_or_else(|| {
            Failure::usage(format!(
                "backing file {name}: formats are not guessed; add -F qcow2"
            ))
        })?;
        if format != "qcow2" && format != "raw" {
            let message = format!("backing file {name}: format '{format}' is not supported");
            return Err(Failure::unsupported(message));
        }
        if is_same_file(&self.image, Path::new(&full_name(&self.image, name))) {
            return Err(Failure::usage(format!("-b {name}: it is the image itself")));
        }
        Ok(Some(BackingReference {
            name: name.clone().into_bytes(),
            format,
        }))
    }

    fn answer(&self, out: &mut Out, rebased: Rebased) -> Outcome {
        let image = self.image.display();
        if out.is_json() {
            out.json(&json!({
                "image": image.to_string(),
                "backing-filename": Some(&self.backing).filter(|name| !name.is_empty()),
                "backing-filename-format": self.backing_format,
                "data-bytes": rebased.data_bytes,
                "zero-bytes": rebased.zero_bytes,
            }))?;
        } else if !self.quiet {
            let data = size::human(rebased.data_bytes);
            match self.backing.as_str() {
                "" => say!(out, "{image}: stands alone, {data} of data copied")?,
                name => say!(out, "{image}: backed by {name}, {data} of data copied")?,
            }
        }
        Ok(Exit::Done)
    }
}
