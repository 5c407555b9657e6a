//! `checkpoint export`: descriptors as files, for redefinition here or in libvirt.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tidemark_checkpoint::{ListFlags, XmlFlags};

use crate::domain::{Access, Disks};
use crate::exit::{Exit, Failure, Outcome};
use crate::open::Share;
use crate::out::{Out, say};

/// Write the descriptor of every checkpoint; prints the files, parents first
#[derive(Args, Debug)]
pub(crate) struct Export {
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    disks: Disks,
    /// Directory for the files; existing ones are replaced
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// With what is security-sensitive
    #[arg(long)]
    secure: bool,
    /// Without the domain's definition
    #[arg(long)]
    no_domain: bool,
    /// Only what libvirt's schema knows
    #[arg(long)]
    libvirt: bool,
}

impl Export {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Look(self.share))?;
        std::fs::create_dir_all(&self.to)
            .map_err(|error| Failure::io(&self.to, "create directory", &error))?;
        let mut flags = XmlFlags::NONE;
        for (set, flag) in [
            (self.secure, XmlFlags::SECURE),
            (self.no_domain, XmlFlags::NO_DOMAIN),
            (self.libvirt, XmlFlags::LIBVIRT),
        ] {
            if set {
                flags |= flag;
            }
        }
        let mut files = Vec::new();
        for checkpoint in open.domain.checkpoints(ListFlags::TOPOLOGICAL)? {
            let file = format!("{}.xml", checkpoint.name());
            let path = self.to.join(&file);
            std::fs::write(&path, checkpoint.xml(flags)?)
                .map_err(|error| Failure::io(&path, "write", &error))?;
            files.push(json!({ "name": checkpoint.name(), "path": file }));
        }
        if out.is_json() {
            out.json(&json!({ "checkpoints": files }))?;
            return Ok(Exit::Done);
        }
        for file in &files {
            let name = file["path"].as_str().unwrap_or_default();
            say!(out, "{}", self.to.join(name).display())?;
        }
        Ok(Exit::Done)
    }
}
