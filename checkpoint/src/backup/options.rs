//! What a backup is asked for, and what it answers.

use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::manifest::{Format, Manifest, Mode};

/// Hears of progress and may stop.
pub type Watch = Arc<dyn Fn(Progress<'_>) -> ControlFlow<()> + Send + Sync>;

/// How far a disk's copy is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The disk.
    pub disk: &'a str,
    /// Bytes of the disk that were looked at.
    pub done: u64,
    /// Bytes of the disk to look at.
    pub total: u64,
}

/// What to back up, and where to.
#[derive(Clone, Default)]
pub struct BackupOptions {
    /// The directory of backups; created if missing.
    pub to: PathBuf,
    /// Name of a checkpoint to take in the same transaction: then a later backup can be since it.
    pub checkpoint: Option<String>,
    /// Name of the checkpoint to count from; without it all disks are full.
    pub since: Option<String>,
    /// Format of full targets; increments are always qcow2.
    pub format: Format,
    /// Told after each few hundred MiB.
    pub watch: Option<Watch>,
}

impl fmt::Debug for BackupOptions {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("BackupOptions")
            .field("to", &self.to)
            .field("checkpoint", &self.checkpoint)
            .field("since", &self.since)
            .field("format", &self.format)
            .finish_non_exhaustive()
    }
}

/// What a backup did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The disks, by name.
    pub disks: Vec<DiskReport>,
}

/// What a backup did with one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskReport {
    /// Name of the disk.
    pub disk: String,
    /// What its target holds.
    pub mode: Mode,
    /// Why it is full although an increment was asked for.
    pub reason: Option<String>,
    /// Bytes of the disk that the target holds as data.
    pub bytes: u64,
    /// The target, relative to the directory.
    pub path: String,
}

impl Report {
    /// What the backup that made a point did.
    pub(super) fn of(point: &Manifest) -> Self {
        let disks = point.disks.iter().map(|entry| DiskReport {
            disk: entry.disk.clone(),
            mode: entry.mode,
            reason: entry.reason.clone(),
            bytes: entry.bytes,
            path: entry.path.clone(),
        });
        Self {
            disks: disks.collect(),
        }
    }
}
