//! `convert`: a disk copied into another format or layout.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tidemark_qcow2::transfer::{self, ConvertOptions, Converted, Source, Target};
use tidemark_qcow2::{FileStorage, Preallocation, Storage};

use crate::cmd::create;
use crate::cmd::info::full_name;
use crate::creation::Creation;
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{self, Gates, Share};
use crate::out::{Out, say, trace, warn};
use crate::progress::Progress;
use crate::size;

/// Copy a disk into another format or layout; an existing target is replaced
#[derive(Args, Debug)]
pub(crate) struct Convert {
    /// Format of SRC
    #[arg(short = 'f', value_name = "FMT", default_value = "qcow2")]
    format: String,
    /// Format of DST, qcow2 or raw
    #[arg(short = 'O', value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Options of a qcow2 target, as in `create`
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<String>,
    /// Image that shows what the backing file of SRC shows: only what SRC itself holds is copied
    #[arg(short = 'B', value_name = "BACKING")]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', value_name = "FMT")]
    backing_format: Option<String>,
    /// Copy into an existing target
    #[arg(short = 'n', conflicts_with_all = ["options", "backing"])]
    no_create: bool,
    /// With -n: the target reads as zero already
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,
    /// Zeros in a row that become a hole; 0 makes a full copy
    #[arg(short = 'S', value_name = "SIZE", value_parser = size::parse, default_value = "4K")]
    sparse: u64,
    /// Compress the clusters of a qcow2 target
    #[arg(short)]
    compress: bool,
    /// Copy the disk as it was in this internal snapshot of SRC, an identifier or a name
    #[arg(short = 'l', value_name = "SNAP", conflicts_with = "bitmaps")]
    snapshot: Option<String>,
    /// Copy the bitmaps of SRC too
    #[arg(long)]
    bitmaps: bool,
    /// With --bitmaps: leave out those that are inconsistent
    #[arg(long, requires = "bitmaps")]
    skip_broken_bitmaps: bool,
    /// Threads that read and write
    #[arg(short = 'm', long, value_name = "N")]
    parallel: Option<u16>,
    /// Write out of order, which is what happens anyway
    #[arg(short = 'W')]
    out_of_order: bool,
    /// Show progress from the start
    #[arg(short, long)]
    progress: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    gates: Gates,
    /// Disk to copy
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// File to make
    #[arg(value_name = "DST")]
    target: PathBuf,
}

impl Convert {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let source = self.open_source()?;
        let options = self.convert_options()?;
        transfer::check_bitmaps(&source, &options)?;
        if create::is_same_file(&self.source, &self.target) {
            let target = self.target.display();
            return Err(Failure::usage(format!(
                "{target}: SRC and DST are one file"
            )));
        }
        let target = if self.no_create {
            open::target(&self.target, &self.target_format, &self.gates)?
        } else {
            self.create(source.size())?
        };
        if self.out_of_order {
            trace(format_args!("-W: writes go out of order anyway"));
        }
        let bar = Progress::new(out.progress && !self.quiet, "convert", 0).eager(self.progress);
        let converted = transfer::convert(&source, target, &options, &|done, total| {
            bar.of(done, total);
        });
        drop(bar);
        self.answer(out, &source, &converted?)
    }

    fn open_source(&self) -> Outcome<Source> {
        let snapshot = self.snapshot.as_deref();
        open::source_or_snapshot(
            &self.source,
            &self.format,
            snapshot,
            &self.gates,
            self.share,
        )
    }

    fn convert_options(&self) -> Outcome<ConvertOptions> {
        if !self.sparse.is_multiple_of(512) {
            let sparse = self.sparse;
            return Err(Failure::usage(format!(
                "-S {sparse}: must be a multiple of 512"
            )));
        }
        if self.bitmaps && self.target_format == "raw" {
            return Err(Failure::usage(
                "--bitmaps: format 'raw' cannot hold bitmaps; use -O qcow2",
            ));
        }
        if self.compress && self.target_format == "raw" {
            return Err(Failure::usage(
                "-c: format 'raw' cannot be compressed; use -O qcow2",
            ));
        }
        let mut options = ConvertOptions {
            compress: self.compress,
            sparse: self.sparse,
            target_is_zero: self.target_is_zero,
            bitmaps: self.bitmaps,
            skip_broken_bitmaps: self.skip_broken_bitmaps,
            ..ConvertOptions::default()
        };
        if let Some(threads) = self.parallel {
            options.threads = threads.max(1).into();
        }
        if !self.no_create {
            options.over_backing = self.wanted()?.backing.is_some();
            options.target_is_zero = !options.over_backing;
        }
        Ok(options)
    }

    fn wanted(&self) -> Outcome<Creation> {
        let mut wanted = Creation::parse(&self.options)?;
        wanted.or_backing(self.backing.as_ref(), self.backing_format.as_ref());
        Ok(wanted)
    }

    /// Makes the target; everything that can be refused is refused before an old file is replaced.
    fn create(&self, size: u64) -> Outcome<Target> {
        let wanted = self.wanted()?;
        if self.target_format == "raw" {
            if !self.options.is_empty() || wanted.backing.is_some() {
                return Err(Failure::usage(
                    "-o and -B are for qcow2 targets; use -O qcow2",
                ));
            }
            let storage = self.create_file()?;
            storage
                .set_len(size)
                .map_err(|error| Failure::io(&self.target, "grow", &error))?;
            return Ok(Target::raw(Box::new(storage))?);
        }
        if self.target_format != "qcow2" {
            return Err(open::unknown_format(&self.target, &self.target_format));
        }
        let backing = wanted.backing_reference()?;
        if let Some(reference) = &backing {
            create::look_at(&self.gates, &self.target, reference)?;
        }
        let size_of_target = wanted.size.unwrap_or(size);
        if self.compress && wanted.options.preallocation != Preallocation::Off {
            return Err(Failure::usage(
                "-c: what is compressed takes another place; leave out -o preallocation",
            ));
        }
        if let Some(name) = &wanted.data_file {
            if self.compress {
                return Err(Failure::usage(
                    "-c: clusters in a data file cannot be compressed; leave out -o data_file",
                ));
            }
            let path = PathBuf::from(full_name(&self.target, name));
            if create::is_same_file(&self.source, &path) {
                return Err(Failure::usage(format!("-o data_file={name}: it is SRC")));
            }
        }
        if size_of_target < size {
            return Err(Failure::usage("-o size: smaller than the disk of SRC"));
        }
        if self.bitmaps && size_of_target != size {
            return Err(Failure::usage(
                "--bitmaps: needs a target of the same size; leave out -o size",
            ));
        }
        if self.bitmaps && wanted.options.version == 2 {
            return Err(Failure::usage(
                "--bitmaps: version 2 images cannot hold bitmaps; use compat=1.1",
            ));
        }
        // Whole clusters are written: nothing of the backing file is read.
        let image = create::make(&self.target, &wanted, size_of_target, backing)?;
        Ok(Target::image(image))
    }

    fn create_file(&self) -> Outcome<FileStorage> {
        FileStorage::create(&self.target)
            .map_err(|error| Failure::io(&self.target, "create", &error))
    }

    fn answer(&self, out: &mut Out, source: &Source, converted: &Converted) -> Outcome {
        let target = self.target.display().to_string();
        for name in &converted.skipped_bitmaps {
            warn(format_args!(
                "{}: bitmap '{name}' is inconsistent and was left out",
                self.source.display()
            ));
        }
        if out.is_json() {
            out.json(&json!({
                "source": self.source.display().to_string(),
                "target": target,
                "format": self.target_format,
                "virtual-size": source.size(),
                "data-bytes": converted.data_bytes,
                "zero-bytes": converted.zero_bytes,
                "bitmaps": converted.bitmaps,
                "skipped-bitmaps": converted.skipped_bitmaps,
            }))?;
        } else if !self.quiet {
            let (size, data) = (
                size::human(source.size()),
                size::human(converted.data_bytes),
            );
            let bitmaps = match converted.bitmaps.len() {
                0 => String::new(),
                count => format!(", bitmaps: {count}"),
            };
            say!(out, "{target}: {size}, {data} of data{bitmaps}")?;
        }
        Ok(Exit::Done)
    }
}
