//! `restore`, `verify`, `catalogue`: what a directory of backups gives back.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use tidemark_checkpoint::backup::{
    self, DiskEntry, Manifest, RestoreOptions, Restored, catalogue, verify,
};

use crate::answer::date;
use crate::cmd::backup::{Target, mode};
use crate::exit::{Exit, Outcome};
use crate::out::{Out, say, warn};
use crate::size::human;

/// Give a disk back as it was at a point
#[derive(Args, Debug)]
pub(crate) struct Restore {
    /// Directory of backups
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Name of the disk
    #[arg(long, value_name = "NAME", default_value = "vda")]
    disk: String,
    /// The point: a checkpoint's name or identity; without it the newest
    #[arg(long, value_name = "CHECKPOINT")]
    at: Option<String>,
    /// File to make; it must not exist
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// Format of the file
    #[arg(long, value_enum, value_name = "FMT", default_value = "qcow2")]
    format: Target,
}

/// Read a directory of backups and compare everything with its hashes
#[derive(Args, Debug)]
pub(crate) struct Verify {
    /// Directory of backups
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// List the points of a directory of backups
#[derive(Args, Debug)]
pub(crate) struct Catalogue {
    /// Directory of backups
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

impl Restore {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let restored = backup::restore(&RestoreOptions {
            from: self.from.clone(),
            disk: self.disk.clone(),
            at: self.at.clone(),
            to: self.to.clone(),
            format: self.format.into(),
        })?;
        self.answer(out, &restored)?;
        Ok(Exit::Done)
    }

    fn answer(&self, out: &mut Out, restored: &Restored) -> Outcome<()> {
        let to = self.to.display().to_string();
        if out.is_json() {
            return out.json(&json!({
                "disk": self.disk,
                "checkpoint": restored.checkpoint,
                "identity": restored.identity.to_string(),
                "creation-time": restored.created,
                "virtual-size": restored.size,
                "bytes": restored.bytes,
                "path": to,
            }));
        }
        let identity = restored.identity.to_string();
        let point = restored.checkpoint.as_ref().unwrap_or(&identity);
        let (size, bytes) = (human(restored.size), human(restored.bytes));
        let moment = date(restored.created);
        say!(
            out,
            "{to}: '{}' as of {point} ({moment}), {size}, {bytes} of data",
            self.disk
        )
    }
}

impl Verify {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let found = verify(&self.directory)?;
        let findings: Vec<String> = found.findings.iter().map(ToString::to_string).collect();
        if out.is_json() {
            out.json(&json!({
                "sound": found.is_sound(),
                "points": found.points,
                "bytes": found.bytes,
                "findings": findings,
                "strangers": found.strangers,
            }))?;
        } else {
            for finding in &findings {
                say!(out, "damage: {finding}")?;
            }
            for stranger in &found.strangers {
                warn(format_args!(
                    "{stranger}: belongs to no backup, it can be removed"
                ));
            }
            let verdict = if found.is_sound() { "sound" } else { "damaged" };
            say!(
                out,
                "{} points, {} read: {verdict}",
                found.points,
                human(found.bytes)
            )?;
        }
        Ok(if found.is_sound() {
            Exit::Done
        } else {
            Exit::Damage
        })
    }
}

impl Catalogue {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let catalogue = catalogue(&self.directory)?;
        for finding in catalogue.damaged() {
            warn(format_args!("{finding}"));
        }
        if out.is_json() {
            let points: Vec<Value> = catalogue.points().iter().map(point_to_json).collect();
            let damaged: Vec<String> = catalogue
                .damaged()
                .iter()
                .map(ToString::to_string)
                .collect();
            out.json(&json!({ "points": points, "damaged": damaged }))?;
        } else {
            for point in catalogue.points() {
                print(out, point)?;
            }
        }
        Ok(if catalogue.damaged().is_empty() {
            Exit::Done
        } else {
            Exit::Damage
        })
    }
}

fn point_to_json(point: &Manifest) -> Value {
    json!({
        "checkpoint": point.checkpoint,
        "identity": point.identity.to_string(),
        "creation-time": point.created,
        "since": point.since.as_ref().map(|since| &since.name),
        "disks": point.disks.iter().map(disk_to_json).collect::<Vec<_>>(),
    })
}

fn disk_to_json(disk: &DiskEntry) -> Value {
    json!({
        "disk": disk.disk,
        "mode": mode(disk.mode),
        "reason": disk.reason,
        "format": disk.format.as_str(),
        "virtual-size": disk.size,
        "bytes": disk.bytes,
        "path": disk.path,
        "backing": disk.backing.as_ref().map(|backing| &backing.path),
    })
}

fn print(out: &mut Out, point: &Manifest) -> Outcome<()> {
    let since = point
        .since
        .as_ref()
        .map(|since| format!(" since {}", since.name));
    let (moment, since) = (date(point.created), since.unwrap_or_default());
    say!(out, "{} ({moment}){since}", point.label())?;
    for disk in &point.disks {
        let (mode, bytes) = (mode(disk.mode), human(disk.bytes));
        say!(out, "    {}: {mode}, {bytes} in {}", disk.disk, disk.path)?;
    }
    Ok(())
}
