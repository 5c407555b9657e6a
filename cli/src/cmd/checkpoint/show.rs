//! `checkpoint show`, `current`, `parent`: one checkpoint.

use clap::Args;
use serde_json::json;
use tidemark_checkpoint::{CheckpointInfo, ListFlags, ListOptions, XmlFlags};

use crate::answer::checkpoint::to_json;
use crate::answer::date;
use crate::domain::{Access, Disks};
use crate::exit::{Exit, Outcome};
use crate::open::Share;
use crate::out::{Out, say, warn};
use crate::size::human;

/// Show one checkpoint
#[derive(Args, Debug)]
pub(crate) struct Show {
    /// Name of the checkpoint
    name: String,
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    disks: Disks,
    /// Print its descriptor
    #[arg(long)]
    xml: bool,
    /// With what is security-sensitive
    #[arg(long, requires = "xml")]
    secure: bool,
    /// With the bytes changed on each disk
    #[arg(long, requires = "xml")]
    size: bool,
    /// Without the domain's definition
    #[arg(long, requires = "xml")]
    no_domain: bool,
    /// Only what libvirt's schema knows
    #[arg(long, requires = "xml")]
    libvirt: bool,
}

/// Print the name of the current checkpoint
#[derive(Args, Debug)]
pub(crate) struct Current {
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    disks: Disks,
}

/// Print the name of a checkpoint's parent
#[derive(Args, Debug)]
pub(crate) struct Parent {
    /// Name of the checkpoint
    name: String,
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    disks: Disks,
}

impl Show {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Look(self.share))?;
        let checkpoint = open.domain.lookup(&self.name)?;
        if self.xml {
            let xml = checkpoint.xml(self.xml_flags())?;
            if out.is_json() {
                out.json(&json!({ "name": self.name, "xml": xml }))?;
            } else {
                out.text(xml.trim_end())?;
                out.text("\n")?;
            }
            return Ok(Exit::Done);
        }
        let options = ListOptions {
            flags: ListFlags::NONE,
            judge: true,
            sizes: true,
        };
        let info = checkpoint.info(options)?;
        if out.is_json() {
            out.json(&to_json(&info))?;
        } else {
            print(out, &info)?;
        }
        Ok(Exit::Done)
    }

    fn xml_flags(&self) -> XmlFlags {
        let mut flags = XmlFlags::NONE;
        for (set, flag) in [
            (self.secure, XmlFlags::SECURE),
            (self.size, XmlFlags::SIZE),
            (self.no_domain, XmlFlags::NO_DOMAIN),
            (self.libvirt, XmlFlags::LIBVIRT),
        ] {
            if set {
                flags |= flag;
            }
        }
        flags
    }
}

fn print(out: &mut Out, info: &CheckpointInfo) -> Outcome<()> {
    let unknown = || "-".to_owned();
    say!(out, "name: {}", info.name)?;
    say!(
        out,
        "identity: {}",
        info.identity.map_or_else(unknown, |id| id.to_string())
    )?;
    say!(out, "parent: {}", info.parent.as_deref().unwrap_or("-"))?;
    say!(out, "current: {}", info.current)?;
    say!(out, "metadata: {}", info.metadata)?;
    say!(out, "created: {}", info.created.map_or_else(unknown, date))?;
    if let Some(description) = &info.description {
        say!(out, "description: {description}")?;
    }
    for disk in &info.disks {
        let state = disk.health.as_str();
        let recording = if disk.recording { ", recording" } else { "" };
        let changed = match disk.dirty_bytes {
            Some(bytes) => format!("at most {} changed since", human(bytes)),
            None => "the next backup since it is full".to_owned(),
        };
        say!(out, "disk {}: {state}{recording}, {changed}", disk.disk)?;
    }
    Ok(())
}

impl Current {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Look(self.share))?;
        let current = open.domain.current()?;
        let name = current.as_ref().map(|checkpoint| checkpoint.name());
        if out.is_json() {
            out.json(&json!({ "name": name }))?;
        } else if let Some(name) = name {
            say!(out, "{name}")?;
        } else {
            warn(format_args!("there is no current checkpoint"));
        }
        Ok(Exit::Done)
    }
}

impl Parent {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Look(self.share))?;
        let parent = open.domain.lookup(&self.name)?.parent()?;
        let parent = parent.as_ref().map(|checkpoint| checkpoint.name());
        if out.is_json() {
            out.json(&json!({ "name": self.name, "parent": parent }))?;
        } else if let Some(parent) = parent {
            say!(out, "{parent}")?;
        } else {
            warn(format_args!(
                "checkpoint '{}' is a root, it has no parent",
                self.name
            ));
        }
        Ok(Exit::Done)
    }
}
