//! `create`: a new, empty image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::json;
use tidemark_qcow2::{
    BackingReference, CreateOptions, FileStorage, Gate, Image, MemoryStorage, OpenOptions, Storage,
};

use crate::cmd::info::full_name;
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{Gates, Share};
use crate::out::{Out, say};
use crate::size;

/// Create an empty image; an existing file is replaced
#[derive(Args, Debug)]
pub(crate) struct Create {
    /// Format of the new image
    #[arg(short = 'f', value_name = "FMT", default_value = "qcow2")]
    format: String,
    /// Options: cluster_size, compat, refcount_bits, backing_file, backing_fmt, size
    #[arg(short = 'o', value_name = "OPTS", value_delimiter = ',')]
    options: Vec<String>,
    /// Image that shows through where nothing is written
    #[arg(short = 'b', value_name = "BACKING")]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', value_name = "FMT")]
    backing_format: Option<String>,
    /// Do not look at the backing file
    #[arg(short = 'u')]
    unsafe_backing: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    gates: Gates,
    /// Image to create
    image: PathBuf,
    /// Size of the disk; without it that of the backing file
    #[arg(value_parser = size::parse)]
    size: Option<u64>,
}

/// What `-o`, `-b`, `-F` and SIZE come to.
struct Wanted {
    size: Option<u64>,
    cluster_bytes: u64,
    refcount_bits: u32,
    version: u32,
    backing: Option<String>,
    backing_format: Option<String>,
}

impl Create {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        if self.format != "qcow2" {
            let format = &self.format;
            return Err(Failure::unsupported(format!(
                "{}: format '{format}' cannot be created, only qcow2",
                self.image.display()
            )));
        }
        let wanted = self.wanted()?;
        let backing = wanted.backing_reference()?;
        let backing_size = match &backing {
            Some(reference) if !self.unsafe_backing => Some(self.look_at(reference)?),
            _ => None,
        };
        let size = wanted.size.or(backing_size).ok_or_else(|| {
            Failure::usage(format!(
                "{}: no SIZE given, as in 10G",
                self.image.display()
            ))
        })?;
        let options = CreateOptions {
            cluster_bits: wanted.cluster_bytes.trailing_zeros(),
            refcount_bits: wanted.refcount_bits,
            version: wanted.version,
            backing,
            ..CreateOptions::new(size)
        };
        self.rehearse(&options)?;
        let storage = FileStorage::create(&self.image)
            .map_err(|error| Failure::io(&self.image, "create", &error))?;
        // The backing file has been looked at; a new image has nothing to read from it.
        let image = Image::create(Box::new(storage), &options, pretending())?;
        let size = image.size();
        image.close()?;
        self.answer(out, size, &wanted)?;
        Ok(Exit::Done)
    }

    fn wanted(&self) -> Outcome<Wanted> {
        let mut wanted = Wanted {
            size: self.size,
            cluster_bytes: 65_536,
            refcount_bits: 16,
            version: 3,
            backing: self.backing.clone(),
            backing_format: self.backing_format.clone(),
        };
        for option in &self.options {
            let (key, value) = option.split_once('=').ok_or_else(|| {
                Failure::usage(format!(
                    "-o {option}: write KEY=VALUE, as in cluster_size=64K"
                ))
            })?;
            wanted.set(key, value)?;
        }
        Ok(wanted)
    }

    /// Opens the backing file, and returns the size of its disk.
    fn look_at(&self, reference: &BackingReference) -> Outcome<u64> {
        let from = self.image.display().to_string();
        let name = String::from_utf8_lossy(&reference.name).into_owned();
        let share = Share { force_share: true };
        let storage = self
            .gates
            .gate(share)
            .open(reference, &from)
            .map_err(|reason| {
                Failure::new(format!(
                    "backing file {name}: {reason}; -u creates without looking"
                ))
            })?;
        if reference.format == "raw" {
            let path = full_name(&self.image, &name);
            return storage
                .len()
                .map_err(|error| Failure::io(Path::new(&path), "length", &error));
        }
        Ok(Image::open(storage, OpenOptions::reading(self.gates.gate(share)))?.size())
    }

    /// Creates it in memory: options that cannot be are refused before an old file is replaced.
    fn rehearse(&self, options: &CreateOptions) -> Outcome<()> {
        let storage: Box<dyn Storage> = Box::new(MemoryStorage::new());
        match Image::create(storage, options, pretending()) {
            Ok(_) => Ok(()),
            Err(tidemark_qcow2::Error::Invalid { mistake, .. }) => Err(Failure::usage(format!(
                "{}: {mistake}",
                self.image.display()
            ))),
            Err(error) => Err(error.into()),
        }
    }

    fn answer(&self, out: &mut Out, size: u64, wanted: &Wanted) -> Outcome<()> {
        if out.is_json() {
            return out.json(&json!({
                "filename": self.image.display().to_string(),
                "format": "qcow2",
                "virtual-size": size,
                "cluster-size": wanted.cluster_bytes,
                "compat": if wanted.version == 2 { "0.10" } else { "1.1" },
                "refcount-bits": wanted.refcount_bits,
                "backing-filename": wanted.backing,
                "backing-filename-format": wanted.backing_format,
            }));
        }
        if self.quiet {
            return Ok(());
        }
        let (human, clusters) = (size::human(size), size::human(wanted.cluster_bytes));
        say!(
            out,
            "{}: {human} ({size} bytes), clusters of {clusters}",
            self.image.display()
        )
    }
}

impl Wanted {
    fn set(&mut self, key: &str, value: &str) -> Outcome<()> {
        let wrong = |problem: &str| Failure::usage(format!("-o {key}={value}: {problem}"));
        let only = |accepted: &str| {
            if value == accepted {
                return Ok(());
            }
            let message = format!("-o {key}={value} is not supported yet, only {key}={accepted}");
            Err(Failure::unsupported(message))
        };
        match key {
            "size" => self.size = Some(size::parse(value).map_err(|problem| wrong(&problem))?),
            "cluster_size" => {
                let bytes = size::parse(value).map_err(|problem| wrong(&problem))?;
                if !bytes.is_power_of_two() {
                    return Err(wrong("must be a power of two between 512 and 2M"));
                }
                self.cluster_bytes = bytes;
            }
            "refcount_bits" => {
                let bits = value
                    .parse()
                    .map_err(|_| wrong("must be a number from 1 to 64"))?;
                self.refcount_bits = bits;
            }
            "compat" => {
                self.version = match value {
                    "0.10" | "v2" => 2,
                    "1.1" | "v3" => 3,
                    _ => return Err(wrong("must be 0.10 or 1.1")),
                }
            }
            "backing_file" => self.backing = Some(value.to_owned()),
            "backing_fmt" => self.backing_format = Some(value.to_owned()),
            "compression_type" => only("zlib")?,
            "lazy_refcounts" | "extended_l2" => only("off")?,
            "preallocation" => only("off")?,
            "data_file" | "data_file_raw" | "encryption" => {
                return Err(Failure::unsupported(format!(
                    "-o {key} is not supported yet"
                )));
            }
            _ => return Err(wrong("no such option")),
        }
        Ok(())
    }

    fn backing_reference(&self) -> Outcome<Option<BackingReference>> {
        let Some(name) = &self.backing else {
            return match self.backing_format {
                Some(_) => Err(Failure::usage(
                    "-F names the format of a backing file; add -b",
                )),
                None => Ok(None),
            };
        };
        let format = self.backing_format.clone().ok_or_else(|| {
            Failure::usage(format!(
                "backing file {name}: formats are not guessed; add -F qcow2"
            ))
        })?;
        if format != "qcow2" && format != "raw" {
            let message = format!("backing file {name}: format '{format}' is not supported");
            return Err(Failure::unsupported(message));
        }
        Ok(Some(BackingReference {
            name: name.clone().into_bytes(),
            format,
        }))
    }
}

/// A backing file as seen by an image that has just been made: nothing is read from it.
#[derive(Debug)]
struct Pretend;

impl Gate for Pretend {
    fn open(&self, backing: &BackingReference, _from: &str) -> Result<Box<dyn Storage>, String> {
        if backing.format == "qcow2" {
            return Ok(Box::new(MemoryStorage::from_bytes(empty_image())));
        }
        Ok(Box::new(MemoryStorage::new()))
    }
}

/// The shortest header that opens: version 2, a disk without a byte.
fn empty_image() -> Vec<u8> {
    let mut bytes = vec![0; 72];
    for (at, value) in [
        (0, 0x5146_49fb_u32),
        (4, 2),
        (20, 16),
        (52, 65_536),
        (56, 1),
    ] {
        let end: usize = at + 4;
        bytes[at..end].copy_from_slice(&value.to_be_bytes());
    }
    bytes
}

fn pretending() -> OpenOptions {
    OpenOptions::writing(Arc::new(Pretend))
}
