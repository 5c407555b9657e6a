//! What is wrong with a chain without being anybody's mistake: reported, never guessed over.

use tidemark_qcow2::chain::{Health, Identity};

/// One finding about the checkpoints of a domain. Its display is a sentence for an operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A detached root: its parent is in no image that was given.
    #[error("the parent of checkpoint '{checkpoint}' is unknown; it is shown as a root")]
    ParentUnknown {
        /// The child.
        checkpoint: String,
    },
    /// Parents that lead in a circle; all members are shown as roots.
    #[error("checkpoints {checkpoints:?} are each other's parents; they are shown as roots")]
    Cycle {
        /// The members.
        checkpoints: Vec<String>,
    },
    /// Disks name different parents, and no unfinished deletion explains it.
    #[error("the disks name different parents of checkpoint '{checkpoint}'; it is shown as a root")]
    ParentsDiffer {
        /// The child.
        checkpoint: String,
    },
    /// Some disks have another parent for a checkpoint than others, an earlier one: a deletion
    /// reached some disks only, or a disk was rolled back, or was not given, at some time.
    #[error(
        "some disks do not know that '{parent}' came before '{checkpoint}': they were rolled back \
         or missing, or the deletion of '{parent}' stopped half way; deleting it ends this"
    )]
    ParentSkipped {
        /// The child.
        checkpoint: String,
        /// The parent that some disks do not know.
        parent: String,
    },
    /// The disks do not agree which checkpoint is current.
    #[error("the disks disagree about the current checkpoint; redefine one with CURRENT")]
    CurrentDiffers,
    /// The current checkpoint is in no image that was given.
    #[error("disk '{disk}': its current checkpoint {identity} is on no disk that was given")]
    CurrentUnknown {
        /// The disk.
        disk: String,
        /// Whom it names.
        identity: Identity,
    },
    /// Two moments carry one name.
    #[error("two different checkpoints are named '{name}'")]
    NameShared {
        /// The name.
        name: String,
    },
    /// The newer slot of the record is damaged, the older one was read.
    #[error("disk '{disk}': the chain record is an older one, for the newer is damaged")]
    StaleRecord {
        /// The disk.
        disk: String,
    },
    /// Nothing of the record can be read.
    #[error("disk '{disk}': the chain record is damaged")]
    DamagedRecord {
        /// The disk.
        disk: String,
    },
    /// The list of bitmaps itself is damaged.
    #[error("disk '{disk}': the list of bitmaps cannot be read; `check` tells more")]
    DirectoryUnreadable {
        /// The disk.
        disk: String,
    },
    /// The table of snapshots is damaged.
    #[error("disk '{disk}': the list of snapshots cannot be read; `check` tells more")]
    SnapshotsUnreadable {
        /// The disk.
        disk: String,
    },
    /// Somebody else changed the directory of bitmaps.
    #[error("disk '{disk}': another program changed the list of bitmaps")]
    DirectoryChanged {
        /// The disk.
        disk: String,
    },
    /// A creation whose decision cannot be read.
    #[error(
        "disk '{disk}': checkpoint '{checkpoint}' is undecided; disk '{decider}' was not given"
    )]
    Undecided {
        /// The prepared disk.
        disk: String,
        /// The disk that knows.
        decider: String,
        /// The tentative checkpoint.
        checkpoint: String,
    },
    /// A creation that was interrupted and that the next operation finishes or undoes.
    #[error("disk '{disk}': creation of '{checkpoint}' was interrupted and {}",
        if *decided { "will be finished" } else { "will be undone" })]
    Interrupted {
        /// The prepared disk.
        disk: String,
        /// The checkpoint.
        checkpoint: String,
        /// Whether it counts as created.
        decided: bool,
    },
    /// A backup that was killed.
    #[error("a backup with checkpoint '{checkpoint}' is unfinished: resume it or cancel it")]
    PendingBackup {
        /// The prepared disk.
        disk: String,
        /// The tentative checkpoint.
        checkpoint: String,
    },
    /// A bitmap that does not serve an incremental backup.
    #[error("checkpoint '{checkpoint}': its bitmap on disk '{disk}' is {}", health.as_str())]
    BadBitmap {
        /// The disk.
        disk: String,
        /// The checkpoint.
        checkpoint: String,
        /// What is wrong with it.
        health: Health,
    },
    /// A bitmap that no record names.
    #[error("disk '{disk}': bitmap '{bitmap}' belongs to no checkpoint")]
    Foreign {
        /// The disk.
        disk: String,
        /// The bitmap.
        bitmap: String,
    },
    /// A descriptor counts on a bitmap that the image does not have.
    #[error("checkpoint '{checkpoint}' is described for disk '{disk}', which does not have it")]
    NotOnDisk {
        /// The disk.
        disk: String,
        /// The checkpoint.
        checkpoint: String,
    },
    /// A descriptor that cannot be read.
    #[error("descriptor {file}: {reason}")]
    DamagedDescriptor {
        /// File name in the store.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A descriptor of an earlier checkpoint of the same name.
    #[error("the descriptor of '{checkpoint}' describes another moment than the images")]
    DescriptorOfAnother {
        /// The name.
        checkpoint: String,
    },
    /// Descriptor and images disagree; the images count.
    #[error("the descriptor of '{checkpoint}' and the images disagree about its {field}")]
    DescriptorDiffers {
        /// The checkpoint.
        checkpoint: String,
        /// In what.
        field: &'static str,
    },
    /// The image is not the one that the descriptor was written for.
    #[error("disk '{disk}' is another image than checkpoint '{checkpoint}' was taken of")]
    OtherImage {
        /// The disk.
        disk: String,
        /// The checkpoint.
        checkpoint: String,
    },
    /// No order of age among the bitmaps of an image without a record.
    #[error("disk '{disk}': nothing tells the order of bitmaps {bitmaps:?}")]
    NoOrder {
        /// The disk.
        disk: String,
        /// Those whose order is not known.
        bitmaps: Vec<String>,
    },
    /// Two disks suggest opposite orders of age.
    #[error("the disks suggest opposite orders of their bitmaps; no parents are inferred")]
    OrdersDiffer,
    /// Recording and frozen bitmaps side by side, without a record.
    #[error("disk '{disk}': recording and disabled bitmaps are mixed; only the recording count")]
    MixedSchemes {
        /// The disk.
        disk: String,
    },
}
