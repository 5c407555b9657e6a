//! What can go wrong, in four families.
//!
//! - [`Error::Io`]: the storage failed; says the operation, the file and the offset.
//! - [`Error::Corrupt`]: the image breaks its own format's rules. Typed evidence in [`Damage`].
//! - [`Error::Unsupported`]: a valid image that this version does not handle.
//! - [`Error::Invalid`]: the caller asked for what cannot be.

use std::io;

use crate::units::HostOffset;

/// Result of the engine.
pub type Result<T> = std::result::Result<T, Error>;

/// Any failure of the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The storage below the image failed.
    #[error("{image}: {operation} at offset {offset}: {source}")]
    Io {
        /// File that was used.
        image: String,
        /// What was being done.
        operation: &'static str,
        /// Byte offset in that file.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The image breaks the rules of its format.
    #[error("{image}: {damage}")]
    Corrupt {
        /// File that is damaged.
        image: String,
        /// What is wrong, with evidence.
        damage: Damage,
    },
    /// The image uses something that this version does not handle.
    #[error("{image}: {feature}")]
    Unsupported {
        /// File that was refused.
        image: String,
        /// What is not handled.
        feature: Feature,
    },
    /// The caller asked for what cannot be.
    #[error("{image}: {mistake}")]
    Invalid {
        /// File that was addressed.
        image: String,
        /// What is wrong with the request.
        mistake: Mistake,
    },
}

impl Error {
    /// Whether the failure is the storage's "no space left".
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }

    /// The same failure of the storage once more, when that is what failed.
    pub(crate) fn io_again(&self) -> Option<Self> {
        let Self::Io {
            image,
            operation,
            offset,
            source,
        } = self
        else {
            return None;
        };
        let again = match source.raw_os_error() {
            Some(number) => std::io::Error::from_raw_os_error(number),
            None => source.kind().into(),
        };
        Some(Self::Io {
            image: image.clone(),
            operation,
            offset: *offset,
            source: again,
        })
    }

    /// The damage found, when that is what failed.
    pub fn damage(&self) -> Option<&Damage> {
        match self {
            Self::Corrupt { damage, .. } => Some(damage),
            _ => None,
        }
    }

    /// The feature refused, when that is what failed.
    pub fn feature(&self) -> Option<&Feature> {
        match self {
            Self::Unsupported { feature, .. } => Some(feature),
            _ => None,
        }
    }

    /// The caller's mistake, when that is what failed.
    pub fn mistake(&self) -> Option<&Mistake> {
        match self {
            Self::Invalid { mistake, .. } => Some(mistake),
            _ => None,
        }
    }
}

/// Evidence that an image breaks the rules of the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// A structure ends before its declared length.
    #[error("the {structure} is cut short")]
    Truncated {
        /// Name of the structure in the specification.
        structure: &'static str,
    },
    /// A header field has an impossible value.
    #[error("header field {field} has the impossible value {value:#x}")]
    HeaderField {
        /// Name of the field in the specification.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A header extension is malformed.
    #[error("header extension {kind:#010x} of {length} bytes at offset {offset}: {problem}")]
    Extension {
        /// Type of the extension.
        kind: u32,
        /// Declared length of its data, bytes.
        length: u64,
        /// Offset of its header in the file.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// A table lies where it cannot be.
    #[error("the {structure} at offset {offset} {problem}")]
    Place {
        /// Name of the structure.
        structure: &'static str,
        /// Its host offset.
        offset: HostOffset,
        /// What is wrong.
        problem: &'static str,
    },
    /// A table entry is invalid.
    #[error("{table} entry {index} is {entry:#018x}: {problem}")]
    Entry {
        /// Which kind of table.
        table: &'static str,
        /// Index of the entry.
        index: u64,
        /// The raw entry.
        entry: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// The bitmap directory cannot be read.
    #[error("bitmap directory: entry {index}: {problem}")]
    BitmapDirectory {
        /// Number of the entry, from 0.
        index: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// Compressed data that does not hold one cluster.
    #[error("the compressed data of guest cluster {cluster} at {offset}: {problem}")]
    Compressed {
        /// Number of the guest cluster.
        cluster: u64,
        /// First byte of the data in the file.
        offset: HostOffset,
        /// What is wrong.
        problem: &'static str,
    },
    /// A write would land on metadata.
    #[error("a data cluster at {offset} overlaps the {structure}")]
    Overlap {
        /// Host offset of the cluster.
        offset: HostOffset,
        /// What lies there.
        structure: &'static str,
    },
    /// The image says of itself that it is corrupt.
    #[error("the image is marked corrupt; it can be read but not written before it is repaired")]
    MarkedCorrupt,
}

/// A valid feature that this version does not handle.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Feature {
    /// Not a qcow2 image at all.
    #[error("not a qcow2 image (its first bytes are {magic:02x?})")]
    NotQcow2 {
        /// First bytes of the file.
        magic: [u8; 4],
    },
    /// A version other than 2 and 3.
    #[error("qcow2 version {0} is not supported")]
    Version(u32),
    /// An incompatible feature bit, with its name as the image gives it.
    #[error("incompatible feature bit {bit}{} is not supported", name.as_deref().map(|n| format!(" ({n})")).unwrap_or_default())]
    Incompatible {
        /// Bit number.
        bit: u8,
        /// Name from the image's feature name table, control characters escaped.
        name: Option<String>,
    },
    /// Guest data is encrypted.
    #[error("the image is encrypted (method {0}): its guest data is neither read nor written")]
    Encryption(u32),
    /// An internal snapshot of a disk whose data is not in the image.
    #[error("an image with an external data file cannot have internal snapshots")]
    SnapshotOfDataFile,
    /// Stale reference counts, when opened for writing without repair, or with more damage than
    /// they explain.
    #[error(
        "the image was not closed cleanly (dirty bit) and opening did not repair it: `check` says \
         what is wrong, `check --repair all` mends it"
    )]
    Dirty,
    /// Persistent bitmaps in a version 2 image.
    #[error("version 2 images cannot hold persistent bitmaps; convert to version 3 (compat=1.1)")]
    BitmapsInVersion2,
    /// A backing file that the gate does not let through.
    #[error("backing file {name:?}: {reason}")]
    Backing {
        /// Name as the image gives it, lossily decoded.
        name: String,
        /// Why it was not opened.
        reason: String,
    },
    /// An external data file that the gate does not let through, or that was not opened.
    #[error("external data file {name:?}: {reason}")]
    DataFile {
        /// Name as the image gives it, lossily decoded; empty when it gives none.
        name: String,
        /// Why it was not opened.
        reason: String,
    },
    /// The first cluster has no room for what must be written into it.
    #[error("the first cluster has no room for {what}: {needed} bytes needed, {available} left")]
    NoRoomInFirstCluster {
        /// What should have been written.
        what: &'static str,
        /// Bytes it needs.
        needed: usize,
        /// Bytes there are.
        available: usize,
    },
    /// Something larger than the limits of this engine.
    #[error("{what} of {value} exceeds the limit of {limit}")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// Value asked for.
        value: u64,
        /// Largest value handled.
        limit: u64,
    },
}

/// A request that cannot be fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mistake {
    /// Beyond the end of the disk.
    #[error("bytes {offset}..{end} are outside the disk of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// End of the request, exclusive.
        end: u64,
        /// Virtual size of the disk.
        size: u64,
    },
    /// Compressed data comes in whole clusters.
    #[error(
        "bytes {offset}..{end} are not whole clusters of {cluster} bytes, as compressed data must be"
    )]
    NotWholeClusters {
        /// First byte of the request.
        offset: u64,
        /// End of the request, exclusive.
        end: u64,
        /// Bytes of a cluster.
        cluster: u64,
    },
    /// A write to an image that was opened for reading.
    #[error("the image was opened read-only")]
    ReadOnly,
    /// A change that a damaged image does not bear.
    #[error("the image is damaged: `check` says how, `check --repair all` mends it")]
    Damaged,
    /// An earlier failure left the state in memory ahead of the disk.
    #[error("an earlier write of metadata failed; close the image and open it again")]
    Poisoned,
    /// A creation option that cannot be.
    #[error("{option}: {problem}")]
    Option {
        /// Name of the option as in qemu-img.
        option: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
    /// No bitmap of that name.
    #[error("bitmap '{0}' not found")]
    NoSuchBitmap(String),
    /// A bitmap of that name exists.
    #[error("bitmap '{0}' already exists")]
    BitmapExists(String),
    /// The name is empty or over 1,023 bytes.
    #[error("a bitmap name has 1 to 1023 bytes, not {0}")]
    BitmapName(usize),
    /// The bitmap is marked in use by a writer that never finished.
    #[error("bitmap '{0}' is inconsistent (in use): it can only be removed or recovered")]
    BitmapInconsistent(String),
    /// A backup holds the bitmap.
    #[error("bitmap '{0}' is busy: a backup holds it")]
    BitmapBusy(String),
    /// The bitmap belongs to a checkpoint chain.
    #[error("bitmap '{0}' belongs to a checkpoint; deleting the checkpoint is the safe way")]
    BitmapInChain(String),
    /// No snapshot with that identifier or name.
    #[error("snapshot '{0}' not found")]
    NoSuchSnapshot(String),
    /// A bitmap cannot follow the disk to that size.
    #[error(
        "bitmap '{name}' is too fine for a disk of {size} bytes: remove it, or add a coarser one"
    )]
    BitmapTooFine {
        /// Name of the bitmap.
        name: String,
        /// Size that was asked for.
        size: u64,
    },
    /// The set algebra refused.
    #[error(transparent)]
    Bitmap(#[from] tidemark_bitmap::Error),
}

/// What the format layer, which knows no file name, reports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes break the rules.
    #[error(transparent)]
    Damage(#[from] Damage),
    /// The bytes are valid but not handled.
    #[error(transparent)]
    Feature(#[from] Feature),
}

impl FormatError {
    /// The engine's error, with the file's name.
    pub fn in_image(self, image: &str) -> Error {
        match self {
            Self::Damage(damage) => Error::Corrupt {
                image: image.to_owned(),
                damage,
            },
            Self::Feature(feature) => Error::Unsupported {
                image: image.to_owned(),
                feature,
            },
        }
    }
}
