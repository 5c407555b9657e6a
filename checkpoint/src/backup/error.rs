//! What can go wrong with a backup, beyond what can go wrong with a checkpoint.

use std::io;
use std::path::{Path, PathBuf};

use super::verify::Finding;

/// Result of an operation on backups.
pub type Result<T> = std::result::Result<T, Error>;

/// Any failure of a backup, a restore or a verification.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint could not be asked, prepared or committed.
    #[error(transparent)]
    Checkpoint(#[from] crate::Error),
    /// The data and manifest are durable, and the checkpoint could not be made real.
    #[error("the backup is complete, but checkpoint '{checkpoint}' is not yet real: {source}")]
    Uncommitted {
        /// Name of the checkpoint.
        checkpoint: String,
        /// Why.
        source: Box<crate::Error>,
    },
    /// A disk could not be read.
    #[error("disk '{disk}': {source}")]
    Disk {
        /// Name of the disk.
        disk: String,
        /// The engine's answer.
        source: tidemark_qcow2::Error,
    },
    /// A target could not be read or written.
    #[error("{}: {source}", path.display())]
    Target {
        /// The file.
        path: PathBuf,
        /// The engine's answer.
        source: tidemark_qcow2::Error,
    },
    /// A file or directory could not be used.
    #[error("{}: {operation}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// File or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Existing files are never replaced.
    #[error("{} already exists", .0.display())]
    TargetExists(PathBuf),
    /// No point of that name or identity.
    #[error("no backup '{0}' in the directory")]
    NoSuchPoint(String),
    /// No point has that disk.
    #[error("no backup of disk '{0}' in the directory")]
    NoSuchDisk(String),
    /// The directory is damaged where it was needed.
    #[error(transparent)]
    Damaged(#[from] Finding),
    /// A killed backup whose point was never published.
    #[error("the backup with checkpoint '{0}' is not complete here: cancel it and back up again")]
    NotResumable(String),
    /// The system gave no random numbers.
    #[error("no random numbers for an identity: {0}")]
    Random(#[source] io::Error),
    /// The caller's watch said stop.
    #[error("stopped on request")]
    Stopped,
}

impl Error {
    /// Names operation and file of a system's error.
    pub(super) fn io(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    }

    /// Names the disk that an engine's error came from.
    pub(super) fn disk(disk: &str) -> impl Fn(tidemark_qcow2::Error) -> Self {
        move |source| Self::Disk {
            disk: disk.to_owned(),
            source,
        }
    }

    /// Names the target that an engine's error came from.
    pub(super) fn target(path: &Path) -> impl Fn(tidemark_qcow2::Error) -> Self {
        move |source| Self::Target {
            path: path.to_owned(),
            source,
        }
    }
}
