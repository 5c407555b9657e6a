//! `backup`: a point of a directory of backups.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use clap::{Args, ValueEnum};
use serde_json::json;
use tidemark_checkpoint::backup::{
    self, BackupOptions, Error, Format, Mode, Progress as Step, Report, Watch,
};

use crate::domain::{Access, Disks};
use crate::exit::{Exit, Failure, Outcome, exit_of};
use crate::open::Gates;
use crate::out::{Out, say};
use crate::progress::Progress;
use crate::size::human;

/// Back up disks: in full, or what changed since a checkpoint
#[derive(Args, Debug)]
pub(crate) struct Backup {
    #[command(flatten)]
    disks: Disks,
    #[command(flatten)]
    gates: Gates,
    /// Directory of backups; created when missing
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Take a checkpoint in the same transaction
    #[arg(long, value_name = "NEW")]
    checkpoint: Option<String>,
    /// Copy only what changed since this checkpoint
    #[arg(long, value_name = "NAME")]
    since: Option<String>,
    /// Format of the backup
    #[arg(long, value_enum, value_name = "FMT", default_value = "qcow2")]
    format: Target,
    /// Finish a backup that was killed after its manifest was written
    #[arg(long, conflicts_with_all = ["checkpoint", "since", "cancel"])]
    resume: bool,
    /// End a backup that was killed: its checkpoint is taken back
    #[arg(long, conflicts_with_all = ["checkpoint", "since"])]
    cancel: bool,
}

/// Formats that a disk is copied into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// An image that qemu-img restores by itself
    Qcow2,
    /// The bytes of the disk
    Raw,
}

impl From<Target> for Format {
    fn from(target: Target) -> Self {
        match target {
            Target::Qcow2 => Self::Qcow2,
            Target::Raw => Self::Raw,
        }
    }
}

impl Backup {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        if self.cancel {
            return self.cancel(out);
        }
        if self.resume {
            return self.resume(out);
        }
        // Without a new checkpoint nothing in the images changes.
        let access = match self.checkpoint {
            Some(_) => Access::Copy(self.gates.clone()),
            None => Access::Read(self.gates.clone(), crate::open::Share::default()),
        };
        let open = self.disks.open(&access)?;
        let options = BackupOptions {
            to: self.to.clone(),
            checkpoint: self.checkpoint.clone(),
            since: self.since.clone(),
            format: self.format.into(),
            watch: Some(watch(out.progress)),
        };
        let report = backup::backup(&open.domain, &options)?;
        drop(options);
        open.close()?;
        answer(out, &report)
    }

    fn resume(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Change)?;
        let report = backup::resume(&open.domain, &self.to)?;
        open.close()?;
        match report {
            Some(report) => answer(out, &report),
            None if out.is_json() => {
                out.json(&json!({ "disks": [] }))?;
                Ok(Exit::Done)
            }
            None => {
                say!(out, "there was no unfinished backup")?;
                Ok(Exit::Done)
            }
        }
    }

    fn cancel(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Change)?;
        let cancelled = backup::cancel(&open.domain)?;
        open.close()?;
        if out.is_json() {
            out.json(&json!({ "cancelled": cancelled }))?;
        } else if cancelled {
            say!(
                out,
                "the unfinished backup is cancelled, its checkpoint taken back"
            )?;
        } else {
            say!(out, "there was no unfinished backup")?;
        }
        Ok(Exit::Done)
    }
}

/// A bar for each disk, one after the other.
fn watch(wanted: bool) -> Watch {
    let shown: Mutex<Option<(String, Progress)>> = Mutex::new(None);
    Arc::new(move |step: Step<'_>| {
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.as_ref().is_none_or(|(disk, _)| disk != step.disk) {
            let bar = Progress::new(wanted, step.disk, step.total);
            *shown = Some((step.disk.to_owned(), bar));
        }
        if let Some((_, bar)) = shown.as_ref() {
            bar.at(step.done);
        }
        ControlFlow::Continue(())
    })
}

pub(crate) const fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Full => "full",
        Mode::Incremental => "incremental",
    }
}

fn answer(out: &mut Out, report: &Report) -> Outcome {
    if out.is_json() {
        let disks = report.disks.iter().map(|disk| {
            json!({
                "disk": disk.disk,
                "mode": mode(disk.mode),
                "reason": disk.reason,
                "bytes": disk.bytes,
                "path": disk.path,
            })
        });
        out.json(&json!({ "disks": disks.collect::<Vec<_>>() }))?;
        return Ok(Exit::Done);
    }
    for disk in &report.disks {
        let reason = disk
            .reason
            .as_ref()
            .map(|reason| format!(" because {reason}"));
        let (mode, reason) = (mode(disk.mode), reason.unwrap_or_default());
        say!(
            out,
            "{}: {mode}{reason}, {} in {}",
            disk.disk,
            human(disk.bytes),
            disk.path
        )?;
    }
    Ok(Exit::Done)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Checkpoint(error) => error.into(),
            Error::Disk { ref source, .. } | Error::Target { ref source, .. } => {
                Self::with(exit_of(source), error.to_string())
            }
            Error::Damaged(_) => {
                let failure = Self::with(Exit::Damage, error.to_string());
                failure.advise("`tidemark verify DIR` lists all damage")
            }
            Error::TargetExists(_) => {
                Self::new(error.to_string()).advise("name another, or remove it first")
            }
            Error::NoSuchPoint(_) | Error::NoSuchDisk(_) => {
                Self::new(error.to_string()).advise("`tidemark catalogue DIR` lists all")
            }
            _ => Self::new(error.to_string()),
        }
    }
}
