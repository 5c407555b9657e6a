//! `bitmap add`, `remove`, `clear`, `enable`, `disable`: one commit each.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use tidemark_qcow2::{Error, Granularity, Image, Mistake, Update};

use super::loss::{self, Change};
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{Format, write_alone};
use crate::out::{Out, say};
use crate::size;

/// The image and the bitmap of a change.
#[derive(Args, Debug)]
pub(super) struct Target {
    #[command(flatten)]
    pub(super) format: Format,
    /// Change it although a checkpoint needs it; its record then says what was lost
    #[arg(long)]
    pub(super) force: bool,
    /// Image to change
    pub(super) image: PathBuf,
    /// Name of the bitmap
    pub(super) name: String,
}

/// Add an empty bitmap that records from now on
#[derive(Args, Debug)]
pub(crate) struct Add {
    #[command(flatten)]
    format: Format,
    /// Bytes of disk per bit, a power of two from 512 to 2G
    #[arg(short, long, value_name = "N", value_parser = size::parse)]
    granularity: Option<u64>,
    /// It does not record yet
    #[arg(long)]
    disabled: bool,
    /// Image to change
    image: PathBuf,
    /// Name of the new bitmap
    name: String,
}

/// Remove a bitmap, also an inconsistent one
#[derive(Args, Debug)]
pub(crate) struct Remove {
    #[command(flatten)]
    target: Target,
}

/// Forget everything that a bitmap marks
#[derive(Args, Debug)]
pub(crate) struct Clear {
    #[command(flatten)]
    target: Target,
}

/// Make a bitmap record from now on
#[derive(Args, Debug)]
pub(crate) struct Enable {
    #[command(flatten)]
    target: Target,
}

/// Make a bitmap stop recording
#[derive(Args, Debug)]
pub(crate) struct Disable {
    #[command(flatten)]
    target: Target,
}

impl Add {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let asked = self.granularity.map(|bytes| {
            Granularity::from_bytes(bytes).ok_or_else(|| {
                Failure::usage(format!("-g {bytes}: must be a power of two from 512 to 2G"))
            })
        });
        let asked = asked.transpose()?;
        let image = write_alone(&self.image)?;
        let granularity = asked.unwrap_or_else(|| default_granularity(&image));
        let name = &self.name;
        image.update(|update: &mut Update<'_>| -> Outcome<()> {
            if update.bitmaps().iter().any(|known| known.name == *name) {
                return Err(exists(&self.image, name));
            }
            let blank = update.blank(granularity)?;
            Ok(update.put(name, blank, !self.disabled)?)
        })?;
        image.close()?;
        done(out, &self.image, name, "added")
    }
}

/// As QEMU chooses it: the cluster size, but 4 KiB to 64 KiB.
fn default_granularity(image: &Image) -> Granularity {
    let bytes = image.geometry().cluster_bytes().clamp(4096, 65_536);
    Granularity::from_bytes(bytes).unwrap_or(Granularity::DEFAULT)
}

fn exists(path: &Path, name: &str) -> Failure {
    let image = path.display().to_string();
    let mistake = Mistake::BitmapExists(name.to_owned());
    Failure::from(Error::Invalid { image, mistake })
        .advise("choose another name, or remove that bitmap first")
}

impl Remove {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.target
            .change(out, Change::Remove, |update, name| Ok(update.remove(name)?))
    }
}

impl Clear {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.target.change(out, Change::Clear, |update, name| {
            let mut bits = update.load(name)?;
            let recording = is_recording(update, name);
            bits.clear_all();
            Ok(update.put(name, bits, recording)?)
        })
    }
}

impl Enable {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.target.change(out, Change::Enable, |update, name| {
            Ok(update.set_recording(name, true)?)
        })
    }
}

impl Disable {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.target.change(out, Change::Disable, |update, name| {
            Ok(update.set_recording(name, false)?)
        })
    }
}

pub(super) fn is_recording(update: &Update<'_>, name: &str) -> bool {
    update
        .bitmaps()
        .iter()
        .any(|info| info.name == name && info.auto)
}

impl Target {
    /// One commit: the change, and in the chain record what it cost.
    pub(super) fn change(
        &self,
        out: &mut Out,
        change: Change,
        work: impl FnOnce(&mut Update<'_>, &str) -> Outcome<()>,
    ) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let image = write_alone(&self.image)?;
        let name = &self.name;
        let lost = image.update(|update: &mut Update<'_>| -> Outcome<Option<String>> {
            if !update.bitmaps().iter().any(|info| info.name == *name) {
                let mistake = Mistake::NoSuchBitmap(name.clone());
                return Err(Error::Invalid {
                    image: image.name().to_owned(),
                    mistake,
                }
                .into());
            }
            let lost = loss::admit(update, name, change, self.force)?;
            work(update, name)?;
            Ok(lost)
        })?;
        image.close()?;
        if let Some(lost) = lost {
            crate::out::warn(format_args!("{}: {lost}", self.image.display()));
        }
        done(out, &self.image, name, change.past())
    }
}

/// The answer of a change.
pub(super) fn done(out: &mut Out, image: &Path, name: &str, what: &str) -> Outcome {
    if out.is_json() {
        let image = image.display().to_string();
        out.json(&json!({ "image": image, "bitmap": name, "done": what }))?;
    } else {
        say!(out, "{}: bitmap '{name}' {what}", image.display())?;
    }
    Ok(Exit::Done)
}
