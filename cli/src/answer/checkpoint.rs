//! Checkpoints as an answer.

use serde_json::{Value, json};
use tidemark_checkpoint::{CheckpointInfo, DiskState, Evidence};

use crate::answer::date;
use crate::exit::Outcome;
use crate::out::{Out, say};
use crate::size::human;

/// One checkpoint as in `checkpoint list`.
pub(crate) fn to_json(info: &CheckpointInfo) -> Value {
    json!({
        "name": info.name,
        "kind": info.kind.as_str(),
        "parent": info.parent,
        "current": info.current,
        "metadata": info.metadata,
        "creation-time": info.created,
        "disks": info.disks.iter().map(disk_to_json).collect::<Vec<_>>(),
        "identity": info.identity.map(|identity| identity.to_string()),
        "description": info.description,
    })
}

fn disk_to_json(disk: &DiskState) -> Value {
    json!({
        "name": disk.disk,
        "state": disk.health.as_str(),
        "inferred": disk.inferred,
        "dirty-bytes": disk.dirty_bytes,
        "recording": disk.recording,
        "evidence": disk.evidence.as_str(),
    })
}

/// The weakest evidence among the disks: that of the whole checkpoint.
pub(crate) fn evidence(info: &CheckpointInfo) -> Evidence {
    let weakest = info.disks.iter().map(|disk| disk.evidence).max();
    weakest.unwrap_or(Evidence::Descriptor)
}

/// One line for a checkpoint, `indent` steps in.
pub(crate) fn line(out: &mut Out, info: &CheckpointInfo, indent: usize) -> Outcome<()> {
    let created = info.created.map_or_else(|| "-".to_owned(), date);
    let disks: Vec<String> = info.disks.iter().map(disk_text).collect();
    let name = format!("{}{}", "  ".repeat(indent), info.name);
    let current = if info.current { "*" } else { " " };
    let parent = info.parent.as_deref().unwrap_or("-");
    say!(
        out,
        "{current} {name:<24} {parent:<24} {created:<19} {}",
        disks.join(", ")
    )
}

fn disk_text(disk: &DiskState) -> String {
    let changed = disk
        .dirty_bytes
        .map(|bytes| format!(" {} changed", human(bytes)));
    format!(
        "{}: {}{}",
        disk.disk,
        disk.health.as_str(),
        changed.unwrap_or_default()
    )
}
