//! `snapshot`: the letters of `qemu-img snapshot`.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use tidemark_qcow2::{Image, SnapshotInfo, snapshots};

use crate::exit::{Exit, Outcome};
use crate::open::{Format, Share, write_alone};
use crate::out::{Out, say};
use crate::{facts, snapshots as table};

/// List, take, apply or delete internal snapshots
#[derive(Args, Debug)]
pub(crate) struct Snapshot {
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    action: Action,
    /// Image that has the snapshots
    image: PathBuf,
}

/// What is done; without any of them, list.
#[derive(Args, Debug)]
#[group(multiple = false)]
struct Action {
    /// List them (what is done by default)
    #[arg(short, long)]
    list: bool,
    /// Take a snapshot of this name
    #[arg(short, long, value_name = "NAME", conflicts_with = "force_share")]
    create: Option<String>,
    /// Make the disk what it was in this snapshot, an identifier or else a name
    #[arg(short, long, value_name = "SNAP", conflicts_with = "force_share")]
    apply: Option<String>,
    /// Delete the first snapshot of this name
    #[arg(short, long, value_name = "NAME", conflicts_with = "force_share")]
    delete: Option<String>,
}

impl Snapshot {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let action = &self.action;
        if let Some(name) = &action.create {
            let image = write_alone(&self.image)?;
            let snapshot = image.create_snapshot(name)?;
            self.done(out, image, &snapshot, "taken")
        } else if let Some(selector) = &action.apply {
            let image = write_alone(&self.image)?;
            let snapshot = image.apply_snapshot(selector)?;
            self.done(out, image, &snapshot, "applied")
        } else if let Some(name) = &action.delete {
            let image = write_alone(&self.image)?;
            let snapshot = image.delete_snapshot_named(name)?;
            self.done(out, image, &snapshot, "deleted")
        } else {
            self.list(out)
        }
    }

    /// Needs the first cluster and the table only, so that no key and no other file is missed.
    fn list(&self, out: &mut Out) -> Outcome {
        let storage = self.share.storage(&self.image)?;
        let facts = facts::read(&self.image, &storage)?;
        let found = snapshots::list(&storage, &facts.header)?;
        if out.is_json() {
            out.json(&Value::Array(found.iter().map(table::to_json).collect()))?;
        } else {
            table::print(out, &found)?;
        }
        Ok(Exit::Done)
    }

    fn done(&self, out: &mut Out, image: Image, snapshot: &SnapshotInfo, what: &str) -> Outcome {
        image.close()?;
        let path = self.image.display();
        let SnapshotInfo { id, name, .. } = snapshot;
        if out.is_json() {
            let path = path.to_string();
            out.json(&json!({ "image": path, "id": id, "name": name, "done": what }))?;
        } else {
            say!(out, "{path}: snapshot '{name}' (identifier {id}) {what}")?;
        }
        Ok(Exit::Done)
    }
}
