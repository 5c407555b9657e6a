//! `commit`: what an overlay holds, written into a layer below it.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use tidemark_qcow2::Storage;
use tidemark_qcow2::transfer::{self, CommitOptions, Committed};

use crate::cmd::create::is_same_file;
use crate::cmd::info::full_name;
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{self, Format, Gates, Share};
use crate::out::{Out, say, warn};
use crate::progress::Progress;
use crate::size;

/// Write what an overlay holds into its backing file, and empty the overlay
#[derive(Args, Debug)]
pub(crate) struct Commit {
    #[command(flatten)]
    format: Format,
    /// Commit into this layer of the backing chain; the overlay is not emptied
    #[arg(short = 'b', value_name = "BASE")]
    base: Option<String>,
    /// Do not empty the overlay
    #[arg(short = 'd')]
    keep: bool,
    /// Threads that read and write
    #[arg(short = 'm', long, value_name = "N")]
    parallel: Option<u16>,
    /// Show progress from the start
    #[arg(short, long)]
    progress: bool,
    /// Say nothing but what was lost
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    gates: Gates,
    /// Overlay to commit
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
}

impl Commit {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let mut options = CommitOptions {
            gate: self.gates.gate(Share::default()),
            base: match &self.base {
                Some(base) => self.find(base)?,
                None => 1,
            },
            // As in qemu-img: layers between would show in an emptied overlay.
            empty: !self.keep && self.base.is_none(),
            ..CommitOptions::default()
        };
        if let Some(threads) = self.parallel {
            options.threads = threads.max(1).into();
        }
        let storage: Box<dyn Storage> = match options.empty {
            true => Box::new(open::writable(&self.image)?),
            false => Box::new(Share::default().storage(&self.image)?),
        };
        let bar = Progress::new(out.progress && !self.quiet, "commit", 0).eager(self.progress);
        let committed = transfer::commit(storage, &options, &|done, total| bar.of(done, total));
        drop(bar);
        self.answer(out, &committed?, options.empty)
    }

    /// How many layers below the overlay a file is.
    fn find(&self, base: &str) -> Outcome<usize> {
        let image = self.gates.read(&self.image, Share::default())?;
        let beside = full_name(&self.image, base);
        let is_base = |layer: &&str| {
            let same = |name: &str| is_same_file(Path::new(name), Path::new(layer));
            same(base) || same(&beside)
        };
        match image.layer_names().iter().position(is_base) {
            Some(0) | None => Err(Failure::new(format!(
                "{}: {base} is not a layer below it",
                self.image.display()
            ))),
            Some(depth) => Ok(depth),
        }
    }

    fn answer(&self, out: &mut Out, committed: &Committed, emptied: bool) -> Outcome {
        let image = self.image.display();
        let left = &committed.left_behind;
        for bitmap in left {
            let (name, reason) = (&bitmap.name, &bitmap.reason);
            let base = &committed.base;
            warn(format_args!(
                "bitmap '{name}' did not go over into {base}: {reason}"
            ));
        }
        if out.is_json() {
            let left: Vec<_> = left
                .iter()
                .map(|bitmap| json!({"name": bitmap.name, "reason": bitmap.reason.to_string()}))
                .collect();
            out.json(&json!({
                "image": image.to_string(),
                "base": committed.base,
                "data-bytes": committed.data_bytes,
                "zero-bytes": committed.zero_bytes,
                "base-size": committed.grown_to,
                "emptied": emptied,
                "bitmaps": committed.carried,
                "bitmaps-left-behind": left,
            }))?;
        } else if !self.quiet {
            let data = size::human(committed.data_bytes);
            say!(
                out,
                "{image}: {data} of data written into {}",
                committed.base
            )?;
            if let Some(size) = committed.grown_to {
                say!(out, "{} has {size} bytes now", committed.base)?;
            }
            if !committed.carried.is_empty() {
                say!(out, "bitmaps: {}", committed.carried.join(", "))?;
            }
        }
        Ok(Exit::Done)
    }
}
