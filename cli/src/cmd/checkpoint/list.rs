//! `checkpoint list`: filtered, ordered, with the state of every bitmap.

use std::collections::HashMap;

use clap::Args;
use serde_json::Value;
use tidemark_checkpoint::{CheckpointInfo, ListFlags, ListOptions};

use crate::answer::checkpoint::{line, to_json};
use crate::domain::{Access, Disks};
use crate::exit::{Exit, Outcome};
use crate::open::Share;
use crate::out::{Out, warn};

/// List checkpoints, with state and bytes changed on every disk
#[derive(Args, Debug)]
pub(crate) struct List {
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    disks: Disks,
    /// Only those without parent
    #[arg(long, conflicts_with = "from")]
    roots: bool,
    /// Only those without children
    #[arg(long)]
    leaves: bool,
    /// Only those with children
    #[arg(long)]
    no_leaves: bool,
    /// Only those with a descriptor
    #[arg(long)]
    with_metadata: bool,
    /// Only those without a descriptor
    #[arg(long)]
    without_metadata: bool,
    /// Parents before their children, not by name
    #[arg(long)]
    topological: bool,
    /// Only the children of a checkpoint
    #[arg(long, value_name = "NAME")]
    from: Option<String>,
    /// With --from: all generations
    #[arg(long, requires = "from")]
    descendants: bool,
    /// Show who is whose child
    #[arg(long)]
    tree: bool,
    /// Read no bits: states as recorded, no bytes changed
    #[arg(long)]
    quick: bool,
}

impl List {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Look(self.share))?;
        let options = ListOptions {
            flags: self.flags(),
            judge: !self.quick,
            sizes: !self.quick,
        };
        let listing = match &self.from {
            Some(name) => open.domain.list_from(name, options)?,
            None => open.domain.list(options)?,
        };
        for problem in &listing.problems {
            warn(format_args!("{problem}"));
        }
        if out.is_json() {
            out.json(&Value::Array(
                listing.checkpoints.iter().map(to_json).collect(),
            ))?;
            return Ok(Exit::Done);
        }
        let depths = self.tree.then(|| depths(&listing.checkpoints));
        for info in &listing.checkpoints {
            let depth = depths
                .as_ref()
                .and_then(|depths| depths.get(info.name.as_str()));
            line(out, info, depth.copied().unwrap_or(0))?;
        }
        Ok(Exit::Done)
    }

    fn flags(&self) -> ListFlags {
        let mut flags = ListFlags::NONE;
        for (set, flag) in [
            (self.roots, ListFlags::ROOTS),
            (self.descendants, ListFlags::DESCENDANTS),
            (self.leaves, ListFlags::LEAVES),
            (self.no_leaves, ListFlags::NO_LEAVES),
            (self.with_metadata, ListFlags::METADATA),
            (self.without_metadata, ListFlags::NO_METADATA),
            (self.topological || self.tree, ListFlags::TOPOLOGICAL),
        ] {
            if set {
                flags |= flag;
            }
        }
        flags
    }
}

/// Generations above each checkpoint that are in the list too; parents come first in it.
fn depths(infos: &[CheckpointInfo]) -> HashMap<&str, usize> {
    let mut depths: HashMap<&str, usize> = HashMap::new();
    for info in infos {
        let above = info.parent.as_deref().and_then(|parent| depths.get(parent));
        let depth = above.map_or(0, |depth| depth + 1);
        depths.insert(&info.name, depth);
    }
    depths
}
