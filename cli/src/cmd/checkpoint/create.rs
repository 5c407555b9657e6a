//! `checkpoint create`: a new moment, or the descriptor of an old one.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;
use tidemark_checkpoint::{CreateFlags, CreateSpec, Descriptor, Domain};
use tidemark_qcow2::Granularity;
use tidemark_qcow2::chain::Scheme;

use crate::domain::{Access, Disks};
use crate::exit::{Exit, Failure, Outcome};
use crate::out::{Out, say};
use crate::size;

/// Take a checkpoint now; prints its name
#[derive(Args, Debug)]
pub(crate) struct Create {
    /// Name of the checkpoint; without it the seconds since the epoch
    name: Option<String>,
    #[command(flatten)]
    disks: Disks,
    /// Free text for the descriptor
    #[arg(long, value_name = "D")]
    description: Option<String>,
    /// Leave no descriptor in the metadata directory
    #[arg(long, conflicts_with = "redefine")]
    no_metadata: bool,
    /// Reinstate the descriptor in FILE; no bitmap is touched
    #[arg(long, value_name = "FILE", conflicts_with = "description")]
    redefine: Option<PathBuf>,
    /// Believe the descriptor without a look at the bitmaps
    #[arg(long, requires = "redefine")]
    no_validate: bool,
    /// The redefined checkpoint becomes current
    #[arg(long, requires = "redefine")]
    current: bool,
    /// How bitmaps share the work, on an image without checkpoints
    #[arg(long, value_enum, value_name = "SCHEME")]
    scheme: Option<SchemeName>,
    /// Anchor it by an internal snapshot, so that no crash of anybody costs the next increment
    #[arg(long, conflicts_with = "redefine")]
    anchor: bool,
    /// Bytes of disk per bit
    #[arg(short, long, value_name = "N", value_parser = size::parse)]
    granularity: Option<u64>,
    /// First undo an unfinished backup or creation
    #[arg(long)]
    abandon: bool,
}

/// The two schemes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum SchemeName {
    /// Each bitmap holds the changes up to the next checkpoint
    Intervals,
    /// Each bitmap holds all changes since its checkpoint
    Cumulative,
}

impl From<SchemeName> for Scheme {
    fn from(name: SchemeName) -> Self {
        match name {
            SchemeName::Intervals => Self::Intervals,
            SchemeName::Cumulative => Self::Cumulative,
        }
    }
}

impl Create {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let (name, disks) = self.positions();
        let spec = CreateSpec {
            name,
            description: self.description.clone(),
            granularity: self.granularity()?,
            scheme: self.scheme.map(Scheme::from),
            anchor: self.anchor,
            ..CreateSpec::default()
        };
        let redefined = self
            .redefine
            .as_deref()
            .map(|file| self.described(file, &spec));
        let redefined = redefined.transpose()?;
        let open = disks.open(&Access::Change)?;
        if self.abandon {
            abandon(&open.domain)?;
        }
        let checkpoint = match &redefined {
            Some(descriptor) => open.domain.redefine(descriptor, self.flags())?,
            None => open.domain.create(&spec, self.flags())?,
        };
        let (name, identity) = (
            checkpoint.name().to_owned(),
            checkpoint.identity().to_string(),
        );
        drop(checkpoint);
        open.close()?;
        if out.is_json() {
            out.json(&json!({ "name": name, "identity": identity }))?;
        } else {
            say!(out, "{name}")?;
        }
        Ok(Exit::Done)
    }

    /// A single position is the image unless the disks were named otherwise.
    fn positions(&self) -> (Option<String>, Disks) {
        match &self.name {
            Some(only) if self.disks.is_empty() => {
                (None, self.disks.clone().with_image(PathBuf::from(only)))
            }
            name => (name.clone(), self.disks.clone()),
        }
    }

    fn granularity(&self) -> Outcome<Option<Granularity>> {
        let checked = self.granularity.map(|bytes| {
            Granularity::from_bytes(bytes).ok_or_else(|| {
                Failure::usage(format!("-g {bytes}: must be a power of two from 512 to 2G"))
            })
        });
        checked.transpose()
    }

    fn flags(&self) -> CreateFlags {
        let mut flags = CreateFlags::NONE;
        for (set, flag) in [
            (self.redefine.is_some(), CreateFlags::REDEFINE),
            (self.current, CreateFlags::CURRENT),
            (self.no_validate, CreateFlags::NO_VALIDATE),
            (self.no_metadata, CreateFlags::NO_METADATA),
        ] {
            if set {
                flags |= flag;
            }
        }
        flags
    }

    fn described(&self, file: &Path, spec: &CreateSpec) -> Outcome<Descriptor> {
        let text =
            std::fs::read_to_string(file).map_err(|error| Failure::io(file, "read", &error))?;
        let descriptor = Descriptor::parse(&text)?;
        match &spec.name {
            Some(name) if *name != descriptor.name => Err(Failure::usage(format!(
                "{} describes '{}', not '{name}'",
                file.display(),
                descriptor.name
            ))),
            _ => Ok(descriptor),
        }
    }
}

/// Takes back what a killed backup or creation left prepared.
fn abandon(domain: &Domain) -> Outcome<()> {
    if let Some(tentative) = domain.tentative()? {
        tentative.abandon()?;
    }
    Ok(domain.undo_undecided()?)
}
