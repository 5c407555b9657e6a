//! The chain record: parents of checkpoints, kept inside the image.
//!
//! A private header extension ([`super::extension::CHAIN`]) holds a 16-byte head and up to two
//! slots. The head stands in the image's first 512 bytes, so that the one write that changes the
//! bitmap directory also switches the active slot. All integers are big endian.
//!
//! Head, at the start of the extension's data:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | version, 1 |
//! | 1 | active slot, 0 or 1; 255 when there is no record |
//! | 2..4 | offset of slot 0 from the start of the extension's data, in units of 8 bytes |
//! | 4..6 | offset of slot 1, the same |
//! | 6..8 | zero |
//! | 8..12 | generation of the active slot |
//! | 12..16 | CRC-32 of bytes 0 to 11 |
//!
//! Slot:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | bytes of the slot, CRC included |
//! | 4..8 | generation |
//! | 8.. | the record, see [`ChainRecord`] |
//! | last 4 | CRC-32 of everything before |

mod fields;
mod frame;
mod ids;

use tidemark_bitmap::Granularity;

use crate::convert::{low_byte, to_u64};

pub use frame::{HEAD_BYTES, Head, Reading, read};
pub use ids::{Identity, ImageUuid};

/// How the bitmaps of a chain share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Each bitmap holds the changes from its checkpoint to the next; only the newest records.
    Intervals,
    /// Each bitmap holds all changes since its checkpoint; all record.
    Cumulative,
}

/// What is known about a checkpoint's bitmap on one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Health {
    /// All proofs hold.
    Ok,
    /// Rewritten from verified bits after a crash of a foreign writer; as good as [`Self::Ok`].
    Recovered,
    /// The disk's size is not that of the record; the new part counts as dirty.
    SizeDiffers,
    /// Consistent, but found by inference, without a record.
    Inferred,
    /// It should record and is disabled.
    NotRecording,
    /// A foreign writer holds it or died holding it.
    Inconsistent,
    /// A frozen bitmap whose content differs from its checksum.
    Changed,
    /// A recording bitmap that lost bits: somebody cleared or re-created it.
    Reset,
    /// The record names a bitmap that the directory does not have.
    Missing,
    /// Its bits are known to be gone, or to have been joined with such.
    Lost,
}

impl Health {
    const ALL: [Self; 10] = [
        Self::Ok,
        Self::Recovered,
        Self::SizeDiffers,
        Self::Inferred,
        Self::NotRecording,
        Self::Inconsistent,
        Self::Changed,
        Self::Reset,
        Self::Missing,
        Self::Lost,
    ];

    /// Whether an incremental backup may be built on it.
    pub const fn is_usable(self) -> bool {
        matches!(self, Self::Ok | Self::Recovered | Self::SizeDiffers)
    }

    /// The spelling used by the command line and in documents.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Recovered => "recovered",
            Self::SizeDiffers => "size-differs",
            Self::Inferred => "inferred",
            Self::NotRecording => "not-recording",
            Self::Inconsistent => "inconsistent",
            Self::Changed => "changed",
            Self::Reset => "reset",
            Self::Missing => "missing",
            Self::Lost => "lost",
        }
    }

    fn code(self) -> u8 {
        let position = Self::ALL.iter().position(|&health| health == self);
        low_byte(to_u64(position.unwrap_or(Self::ALL.len())))
    }
}

/// What must hold for a frozen bitmap to be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrozenProof {
    /// CRC-32 of the canonical content, see [`crate::bitmaps::proof::checksum`].
    pub checksum: u32,
    /// Set bits.
    pub count: u64,
}

/// What must hold for a recording bitmap to be believed: it may only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordingProof {
    /// Set bits at our last clean close; fewer later means that bits were lost.
    pub count: u64,
    /// Smallest disk seen; witnesses beyond it are void.
    pub smallest_disk_bytes: u64,
    /// Byte offsets of the bits set when the bitmap was published.
    pub planted: Vec<u64>,
    /// Byte offsets of further set bits, drawn at our last clean close.
    pub witnesses: Vec<u64>,
}

/// The proof that fits the state of the bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// None: the bitmap is gone, or was adopted without proof.
    None,
    /// The bitmap no longer changes.
    Frozen(FrozenProof),
    /// The bitmap records.
    Recording(RecordingProof),
}

/// What must hold for the internal snapshot that anchors a checkpoint to be believed: identifiers,
/// names and even seconds are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnchorProof {
    /// When it was taken, seconds since the epoch.
    pub seconds: u32,
    /// Nanoseconds within that second.
    pub nanoseconds: u32,
    /// CRC-32 of its L1 table, see [`crate::Image::snapshot_proof`].
    pub l1_checksum: u32,
}

/// One checkpoint on this disk. Its bitmap carries its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointEntry {
    /// Identity, the same on all disks of the domain.
    pub identity: Identity,
    /// Name of the checkpoint and of its bitmap.
    pub name: String,
    /// Identity of the parent; `None` for a root.
    pub parent: Option<Identity>,
    /// Seconds since the epoch; optional.
    pub created: Option<u64>,
    /// Virtual size of the disk at that moment, bytes; optional.
    pub disk_bytes: Option<u64>,
    /// Bytes of disk per bit.
    pub granularity: Granularity,
    /// What was last known; a loss sticks.
    pub health: Health,
    /// What must hold for the bits to be believed.
    pub proof: Proof,
    /// The proof of its anchor, if it has one: an internal snapshot whose name contains the
    /// identity.
    pub anchor: Option<AnchorProof>,
}

/// What an unfinished operation over several disks was going to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IntentKind {
    /// Create a checkpoint; undone when found undecided.
    Create,
    /// Create a checkpoint together with a backup; only resume and cancel end it.
    Backup,
}

/// An operation that this disk is prepared for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intent {
    /// What will be done.
    pub kind: IntentKind,
    /// Identity of the transaction, the same on all its disks.
    pub transaction: Identity,
    /// Identity of the checkpoint that the decision makes real. Its entry is already in the
    /// record, the last in recording order.
    pub checkpoint: Identity,
    /// Name of the disk that holds the decision.
    pub decider: String,
    /// UUID of that disk's image.
    pub decider_image: ImageUuid,
}

/// Where a restored image comes from: backups up to that checkpoint count as its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descent {
    /// UUID of the image that was backed up.
    pub image: ImageUuid,
    /// Last checkpoint restored.
    pub checkpoint: Identity,
}

/// Everything that one image knows of its chain.
///
/// Layout of the record inside a slot: image UUID (16) · scheme (1) · flags (1) · directory
/// digest (4) · \[current (16)\] · \[intent\] · number of decisions (1) and the transactions (16 each) · number of
/// descents (1) and (32 each) · number of checkpoints (2) and their entries in recording order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainRecord {
    /// Identity of the image.
    pub image: ImageUuid,
    /// How the bitmaps share the work.
    pub scheme: Scheme,
    /// The current checkpoint, which is the parent of the next.
    pub current: Option<Identity>,
    /// An operation that is prepared and not committed here.
    pub intent: Option<Intent>,
    /// Transactions that were decided and that other disks may not yet have followed.
    pub decisions: Vec<Identity>,
    /// Where this image comes from.
    pub descents: Vec<Descent>,
    /// CRC-32 over the sorted (name, granularity, auto) of the chain's bitmaps as last written by
    /// us. It only tells that somebody else changed the directory.
    pub directory_digest: u32,
    /// The checkpoints of this disk in recording order, oldest first.
    pub checkpoints: Vec<CheckpointEntry>,
}

/// How much of the optional is written when room is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// Identity, parent, order, checksums, planted witnesses: never dropped.
    Required,
    /// Also creation times and sizes.
    WithTimes,
    /// Everything.
    Full,
}

impl ChainRecord {
    /// An empty record for a new image.
    pub fn new(image: ImageUuid, scheme: Scheme) -> Self {
        Self {
            image,
            scheme,
            current: None,
            intent: None,
            decisions: Vec::new(),
            descents: Vec::new(),
            directory_digest: 0,
            checkpoints: Vec::new(),
        }
    }

    /// The entry of a checkpoint.
    pub fn checkpoint(&self, identity: Identity) -> Option<&CheckpointEntry> {
        self.checkpoints
            .iter()
            .find(|entry| entry.identity == identity)
    }

    /// The entry of a checkpoint, by name.
    pub fn checkpoint_named(&self, name: &str) -> Option<&CheckpointEntry> {
        self.checkpoints.iter().find(|entry| entry.name == name)
    }

    /// The entry of a checkpoint, by name, to change.
    pub fn checkpoint_named_mut(&mut self, name: &str) -> Option<&mut CheckpointEntry> {
        self.checkpoints.iter_mut().find(|entry| entry.name == name)
    }
}
