//! What can go wrong, in the vocabulary of libvirt.

use std::io;
use std::path::PathBuf;

use tidemark_qcow2::chain::Health;

/// Result of an operation on checkpoints.
pub type Result<T> = std::result::Result<T, Error>;

/// The class of a failure, named as libvirt names it, so that tools written against libvirt know
/// what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// No checkpoint of that name.
    NoDomainCheckpoint,
    /// The checkpoint cannot serve: tools fall back to a full backup.
    CheckpointInconsistent,
    /// The caller's flags or arguments contradict each other.
    InvalidArg,
    /// The operation was possible and failed.
    OperationFailed,
    /// Not in this state of the domain.
    OperationInvalid,
    /// Not on this handle.
    OperationDenied,
    /// The description asks for disks that the domain does not have, or whose format cannot take
    /// part.
    ConfigUnsupported,
    /// The description is not a checkpoint.
    XmlError,
}

impl ErrorCode {
    /// libvirt's spelling, without its prefix `VIR_ERR_`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoDomainCheckpoint => "NO_DOMAIN_CHECKPOINT",
            Self::CheckpointInconsistent => "CHECKPOINT_INCONSISTENT",
            Self::InvalidArg => "INVALID_ARG",
            Self::OperationFailed => "OPERATION_FAILED",
            Self::OperationInvalid => "OPERATION_INVALID",
            Self::OperationDenied => "OPERATION_DENIED",
            Self::ConfigUnsupported => "CONFIG_UNSUPPORTED",
            Self::XmlError => "XML_ERROR",
        }
    }
}

/// Any failure of an operation on checkpoints.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name is not in the domain.
    #[error("checkpoint '{0}' not found")]
    NoSuchCheckpoint(String),
    /// Two moments carry the name, for disks of different origin were put together.
    #[error("two different checkpoints are named '{0}'; `checkpoint verify` tells on which disks")]
    Ambiguous(String),
    /// Bits that no version of this interface gives a meaning to.
    #[error("unknown {what} flags {bits:#x}")]
    UnknownFlags {
        /// Which flag type.
        what: &'static str,
        /// The bits nobody knows.
        bits: u32,
    },
    /// A flag that must not stand with, or without, another.
    #[error("flag {flag} {problem}")]
    FlagConflict {
        /// The flag at fault.
        flag: &'static str,
        /// What it needs or excludes.
        problem: &'static str,
    },
    /// Not a name that can also be a file's.
    #[error("{name:?} cannot name a checkpoint: {problem}")]
    BadName {
        /// The name refused.
        name: String,
        /// Which rule it breaks.
        problem: &'static str,
    },
    /// The name is taken.
    #[error("checkpoint '{0}' already exists")]
    NameTaken(String),
    /// A bitmap that is not a checkpoint's has the name.
    #[error("disk '{disk}' already has a bitmap '{name}' that belongs to no checkpoint")]
    BitmapExists {
        /// The disk.
        disk: String,
        /// The bitmap.
        name: String,
    },
    /// The domain has no such disk.
    #[error("the domain has no disk '{0}'")]
    UnknownDisk(String),
    /// A disk was named twice.
    #[error("disk '{0}' is named twice")]
    DoubledDisk(String),
    /// No disk would take part.
    #[error("no disk takes part: none is writable, or none was chosen")]
    NoDisks,
    /// The image was opened read-only and has to change.
    #[error("disk '{0}' is open read-only and would have to change")]
    DiskReadOnly(String),
    /// A prepared operation whose decision stands on a disk that was not given.
    #[error(
        "disk '{disk}' is prepared for checkpoint '{checkpoint}', undecided: \
         the decision is on disk '{decider}', which was not given"
    )]
    Undecided {
        /// The prepared disk.
        disk: String,
        /// The disk that knows.
        decider: String,
        /// The tentative checkpoint.
        checkpoint: String,
    },
    /// A backup was killed; only resuming or cancelling it ends this.
    #[error("a backup with checkpoint '{checkpoint}' is unfinished: resume it or cancel it first")]
    PendingBackup {
        /// The tentative checkpoint.
        checkpoint: String,
    },
    /// The chain record is not sound enough to be written to.
    #[error("disk '{disk}': its chain record is {state}; `checkpoint rebuild --adopt` renews it")]
    RecordUnsound {
        /// The disk.
        disk: String,
        /// "stale" or "damaged".
        state: &'static str,
    },
    /// The disks do not agree which checkpoint is current.
    #[error("the disks disagree about the current checkpoint; redefine one with CURRENT")]
    CurrentDisputed,
    /// The question "what changed since" has no answer for it.
    #[error("checkpoint '{0}' is not an ancestor of the current one")]
    NotAncestor(String),
    /// A checkpoint as its own parent.
    #[error("checkpoint '{0}' cannot be its own parent")]
    SelfParent(String),
    /// A parent among the descendants.
    #[error("parent '{parent}' would make a cycle with checkpoint '{name}'")]
    Cycle {
        /// The checkpoint.
        name: String,
        /// The parent asked for.
        parent: String,
    },
    /// The parent has to be defined first.
    #[error("parent '{parent}' of checkpoint '{name}' not found")]
    UnknownParent {
        /// The checkpoint.
        name: String,
        /// The parent asked for.
        parent: String,
    },
    /// A bitmap that the description counts on does not serve.
    #[error("checkpoint '{name}': its bitmap on disk '{disk}' is {}", health.as_str())]
    BrokenBitmap {
        /// The checkpoint.
        name: String,
        /// The disk.
        disk: String,
        /// What is wrong with the bitmap.
        health: Health,
    },
    /// Description and images disagree about what the checkpoint is.
    #[error("the description of '{name}' and the images disagree about its {field}")]
    Disagrees {
        /// The checkpoint.
        name: String,
        /// In what they disagree.
        field: &'static str,
    },
    /// The description cannot be read.
    #[error("not a checkpoint description: {0}")]
    Xml(String),
    /// An operation on descriptors in a domain that keeps none.
    #[error("the domain keeps no descriptors: name a directory for them")]
    NoStore,
    /// A change was asked of a read-only handle.
    #[error("this handle is read-only: it changes nothing")]
    ReadOnlyHandle,
    /// Security-sensitive text was asked of a read-only handle.
    #[error("security-sensitive text is not given to a read-only handle")]
    SecureDenied,
    /// The scheme cannot be told or changed.
    #[error("disk '{disk}': {problem}")]
    Scheme {
        /// The disk.
        disk: String,
        /// Why.
        problem: &'static str,
    },
    /// The engine refused or failed.
    #[error("disk '{disk}': {source}")]
    Image {
        /// The disk.
        disk: String,
        /// The engine's answer.
        source: tidemark_qcow2::Error,
    },
    /// Bitmaps could not be combined.
    #[error(transparent)]
    Bitmap(#[from] tidemark_bitmap::Error),
    /// A descriptor could not be read or written.
    #[error("{}: {operation}: {source}", path.display())]
    Store {
        /// What was being done.
        operation: &'static str,
        /// File or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The system gave no random numbers.
    #[error("no random numbers for an identity: {0}")]
    Random(#[source] io::Error),
}

impl Error {
    /// The failure's class.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NoSuchCheckpoint(_) => ErrorCode::NoDomainCheckpoint,
            Self::Ambiguous(_)
            | Self::RecordUnsound { .. }
            | Self::CurrentDisputed
            | Self::NotAncestor(_)
            | Self::BrokenBitmap { .. }
            | Self::Disagrees { .. } => ErrorCode::CheckpointInconsistent,
            Self::UnknownFlags { .. }
            | Self::FlagConflict { .. }
            | Self::SelfParent(_)
            | Self::UnknownParent { .. }
            | Self::Cycle { .. } => ErrorCode::InvalidArg,
            // The format cannot hold a checkpoint, or not this one.
            Self::Image { source, .. } if source.feature().is_some() => {
                ErrorCode::ConfigUnsupported
            }
            Self::NameTaken(_)
            | Self::BitmapExists { .. }
            | Self::Image { .. }
            | Self::Bitmap(_)
            | Self::Store { .. }
            | Self::Random(_) => ErrorCode::OperationFailed,
            Self::DiskReadOnly(_)
            | Self::Undecided { .. }
            | Self::PendingBackup { .. }
            | Self::NoStore
            | Self::Scheme { .. } => ErrorCode::OperationInvalid,
            Self::ReadOnlyHandle | Self::SecureDenied => ErrorCode::OperationDenied,
            Self::UnknownDisk(_) | Self::DoubledDisk(_) | Self::NoDisks => {
                ErrorCode::ConfigUnsupported
            }
            Self::BadName { .. } | Self::Xml(_) => ErrorCode::XmlError,
        }
    }

    /// Names the disk that an engine's error came from.
    pub(crate) fn on(disk: &str) -> impl Fn(tidemark_qcow2::Error) -> Self {
        move |source| Self::Image {
            disk: disk.to_owned(),
            source,
        }
    }
}
