//! `checkpoint delete`: the eight combinations.

use clap::Args;
use tidemark_checkpoint::{DeleteFlags, Deleted};

use crate::domain::{Access, Disks};
use crate::exit::{Exit, Outcome};
use crate::out::{Out, say, warn};

/// Delete a checkpoint; those that stay still know what changed since them
#[derive(Args, Debug)]
pub(crate) struct Delete {
    /// Name of the checkpoint
    name: String,
    #[command(flatten)]
    disks: Disks,
    /// Its descendants too
    #[arg(long)]
    children: bool,
    /// Descriptors only: bitmaps and tree stay
    #[arg(long)]
    metadata_only: bool,
    /// With --children: its descendants only
    #[arg(long)]
    children_only: bool,
    /// Read the flags as virsh does: --children-only stands alone
    #[arg(long)]
    libvirt_flags: bool,
}

impl Delete {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let flags = self.flags()?;
        let open = self.disks.open(&Access::Change)?;
        let deleted = open.domain.delete(&self.name, flags)?;
        open.close()?;
        answer(out, &deleted)
    }

    fn flags(&self) -> Outcome<DeleteFlags> {
        let mut flags = DeleteFlags::NONE;
        for (set, flag) in [
            (self.children, DeleteFlags::CHILDREN),
            (self.metadata_only, DeleteFlags::METADATA_ONLY),
            (self.children_only, DeleteFlags::CHILDREN_ONLY),
        ] {
            if set {
                flags |= flag;
            }
        }
        if self.libvirt_flags {
            return Ok(DeleteFlags::from_libvirt(flags.bits())?);
        }
        flags.check()?;
        Ok(flags)
    }
}

/// What a deletion did.
pub(super) fn answer(out: &mut Out, deleted: &Deleted) -> Outcome {
    for warning in &deleted.warnings {
        warn(format_args!("{warning}"));
    }
    if out.is_json() {
        let warnings = deleted.warnings.iter().map(|warning| {
            serde_json::json!({
                "disk": warning.disk,
                "checkpoint": warning.checkpoint,
                "state": warning.health.as_str(),
                "moved-to": warning.moved_to,
            })
        });
        out.json(&serde_json::json!({
            "deleted": deleted.checkpoints,
            "descriptors": deleted.descriptors,
            "warnings": warnings.collect::<Vec<_>>(),
        }))?;
        return Ok(Exit::Done);
    }
    for name in &deleted.checkpoints {
        say!(out, "deleted {name}")?;
    }
    for name in deleted
        .descriptors
        .iter()
        .filter(|name| !deleted.checkpoints.contains(name))
    {
        say!(out, "deleted the descriptor of {name}")?;
    }
    Ok(Exit::Done)
}
