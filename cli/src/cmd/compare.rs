//! `compare`: whether two disks hold the same bytes.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tidemark_qcow2::transfer::{self, CompareError, CompareOptions, Comparison};

use crate::exit::{Exit, Failure, Outcome};
use crate::open::{self, Gates, Share};
use crate::out::{Out, say};
use crate::progress::Progress;

/// Say whether two disks hold the same bytes
#[derive(Args, Debug)]
pub(crate) struct Compare {
    /// Format of A
    #[arg(short = 'f', value_name = "FMT", default_value = "qcow2")]
    format: String,
    /// Format of B
    #[arg(short = 'F', value_name = "FMT", default_value = "qcow2")]
    second_format: String,
    /// Sizes and allocation must agree too
    #[arg(short, long)]
    strict: bool,
    /// Threads that read
    #[arg(short = 'm', long, value_name = "N")]
    parallel: Option<u16>,
    /// Show progress from the start
    #[arg(short, long)]
    progress: bool,
    /// Say nothing; the exit code tells
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    gates: Gates,
    /// One disk
    #[arg(value_name = "A")]
    first: PathBuf,
    /// The other disk
    #[arg(value_name = "B")]
    second: PathBuf,
}

impl Compare {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let open = |path: &PathBuf, format: &str| {
            open::source(path, format, &self.gates, self.share).map_err(|failure| {
                match failure.exit {
                    Exit::Unsupported => failure,
                    _ => failure.ending(Exit::UNOPENED),
                }
            })
        };
        let first = open(&self.first, &self.format)?;
        let second = open(&self.second, &self.second_format)?;
        let mut options = CompareOptions {
            strict: self.strict,
            ..CompareOptions::default()
        };
        if let Some(threads) = self.parallel {
            options.threads = threads.max(1).into();
        }
        let bar = Progress::new(out.progress && !self.quiet, "compare", 0).eager(self.progress);
        let found = transfer::compare(&first, &second, &options, &|done, total| {
            bar.of(done, total);
        });
        drop(bar);
        let found = found.map_err(|error| match error {
            CompareError::Map(error) => Failure::from(error).ending(Exit::UNMAPPED),
            CompareError::Read(error) => Failure::from(error).ending(Exit::Unread),
        })?;
        self.answer(out, found, [first.size(), second.size()])
    }

    fn answer(&self, out: &mut Out, found: Comparison, sizes: [u64; 2]) -> Outcome {
        let same_size = sizes[0] == sizes[1];
        let (reason, offset) = match found {
            Comparison::Identical { .. } => (None, None),
            Comparison::Sizes => (Some("size"), None),
            Comparison::Allocation(at) => (Some("allocation"), Some(at)),
            Comparison::Content(at) => (Some("content"), Some(at)),
        };
        let exit = match reason {
            None => Exit::Done,
            Some(_) => Exit::DIFFERENT,
        };
        if out.is_json() {
            out.json(&json!({
                "identical": reason.is_none(),
                "reason": reason,
                "offset": offset,
                "same-size": same_size,
            }))?;
            return Ok(exit);
        }
        if self.quiet {
            return Ok(exit);
        }
        // As qemu-img: said when the end of the shorter disk is reached.
        let reached = match found {
            Comparison::Content(at) => at >= sizes[0].min(sizes[1]),
            _ => true,
        };
        if !same_size && !self.strict && reached {
            say!(out, "Warning: Image size mismatch!")?;
        }
        match found {
            Comparison::Identical { .. } => say!(out, "Images are identical.")?,
            Comparison::Sizes => say!(out, "Strict mode: Image size mismatch!")?,
            Comparison::Allocation(at) => {
                say!(out, "Strict mode: Offset {at} block status mismatch!")?;
            }
            Comparison::Content(at) => say!(out, "Content mismatch at offset {at}!")?,
        }
        Ok(exit)
    }
}
