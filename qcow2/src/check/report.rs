//! What a check found: typed findings, their weight, and the counts that QEMU reports too.

use crate::units::HostOffset;

/// Findings kept; further ones are only counted, so that a ruined image costs no memory.
const MAX_FINDINGS: usize = 1000;

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Something odd that harms nothing by itself.
    Warning,
    /// A cluster that nobody uses is not free.
    Leak,
    /// Using the image may lose or alter data.
    Corruption,
    /// Something could not be checked.
    CheckError,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// The refcount differs from the references that were found: higher is a leak, lower a
    /// corruption.
    #[error(
        "the host cluster at {offset} has refcount {refcount} and {references} reference{}",
        if *references == 1 { "" } else { "s" }
    )]
    Refcount {
        /// Host offset of the cluster.
        offset: HostOffset,
        /// Refcount on disk.
        refcount: u64,
        /// References found.
        references: u64,
    },
    /// More references than a refcount of this width can count.
    #[error("the host cluster at {offset} has more references than a refcount can hold ({most})")]
    Overflow {
        /// Host offset of the cluster.
        offset: HostOffset,
        /// Largest refcount of this width.
        most: u64,
    },
    /// A structure lies, at least by one cluster, behind the end of the file.
    #[error("the {structure} at {offset} of {bytes} bytes lies past the end of the file")]
    BeyondEnd {
        /// Name of the structure.
        structure: &'static str,
        /// Where it should be.
        offset: HostOffset,
        /// Its bytes.
        bytes: u64,
    },
    /// A table entry breaks the rules of the format.
    #[error("the {table} entry {entry:#018x} at {place}: {problem}")]
    Entry {
        /// Kind of table.
        table: &'static str,
        /// Host offset of the entry.
        place: HostOffset,
        /// The entry.
        entry: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// The COPIED flag disagrees with the refcount. Set wrongly, it lets a write alter what
    /// somebody else refers to.
    #[error("the {table} entry {entry:#018x} at {place} has a wrong COPIED flag: refcount {}",
        if *single { "1" } else { "not 1" })]
    Copied {
        /// Kind of table.
        table: &'static str,
        /// Host offset of the entry.
        place: HostOffset,
        /// The entry.
        entry: u64,
        /// Whether the refcount is one.
        single: bool,
    },
    /// Something else refers to a cluster that must belong to one structure alone; the refcount
    /// agrees with the references.
    #[error("the {structure} at {offset} shares its cluster: {references} references")]
    Overlap {
        /// Name of the structure.
        structure: &'static str,
        /// Host offset of the cluster.
        offset: HostOffset,
        /// References found.
        references: u64,
    },
    /// A refcount block that something else refers to as well.
    #[error("refcount block {number} at {offset} is referred to {references} times")]
    RefcountBlock {
        /// Its index in the refcount table.
        number: u64,
        /// Host offset of the block.
        offset: HostOffset,
        /// References found.
        references: u64,
    },
    /// An entry of the snapshot table that breaks the rules.
    #[error("snapshot {number} ({name:?}): {problem}")]
    Snapshot {
        /// Number of the entry, from 0.
        number: u64,
        /// Its name, lossily decoded.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A bitmap whose table does not fit the disk.
    #[error("bitmap {name:?}: its table at {offset} has {entries} entries, not {needed}")]
    BitmapTable {
        /// Its name, lossily decoded.
        name: String,
        /// Host offset of the table.
        offset: HostOffset,
        /// Entries it has.
        entries: u64,
        /// Entries that disk and granularity ask for.
        needed: u64,
    },
    /// Something could not be read or understood, and what depends on it was not checked.
    #[error("the {structure} at {offset} cannot be checked: {problem}")]
    Unreadable {
        /// Name of the structure.
        structure: &'static str,
        /// Its host offset.
        offset: HostOffset,
        /// Why.
        problem: String,
    },
    /// Bits are set behind the end of the disk; readers ignore them.
    #[error("bitmap {name:?}: bits past the end of the disk are set in its page at {offset}")]
    BitsPastEnd {
        /// Its name, lossily decoded.
        name: String,
        /// Host offset of the page.
        offset: HostOffset,
    },
    /// The image has a bitmaps extension without its autoclear bit: a program that does not know
    /// bitmaps wrote to it. What the extension names is counted as leaked.
    #[error("the bitmaps extension is stale: a program without bitmap support changed the image")]
    StaleBitmaps,
    /// The autoclear bit for bitmaps is set and there is none. QEMU then fails to write.
    #[error("the autoclear bit for bitmaps is set, but there is no bitmaps extension")]
    BitmapsBitAlone,
    /// A bitmap that a writer holds, or died holding.
    #[error("bitmap {name:?} is in use or was not stored: its bits cannot be trusted")]
    BitmapInUse {
        /// Its name, lossily decoded.
        name: String,
    },
    /// The active slot of the chain record is damaged, an older one can be read.
    #[error("the chain record is damaged; an older state of it can be read")]
    ChainStale,
    /// Nothing of the chain record can be read.
    #[error("the chain record is damaged and cannot be read")]
    ChainDamaged,
    /// The bitmap directory is not as the chain record left it: somebody else changed it.
    #[error("the bitmap directory was changed by somebody who does not know the chain record")]
    DirectoryChanged,
    /// The image was not closed cleanly; its refcounts may be stale.
    #[error("the image was not closed cleanly (dirty bit)")]
    Dirty,
    /// The image says of itself that it is corrupt.
    #[error("the image is marked corrupt")]
    MarkedCorrupt,
}

impl Finding {
    /// Something at a place where nothing can be read.
    pub(super) fn unreachable(structure: &'static str, offset: HostOffset) -> Self {
        let problem = "nothing can be read there".to_owned();
        Self::Unreadable {
            structure,
            offset,
            problem,
        }
    }

    /// How much it weighs.
    pub fn severity(&self) -> Severity {
        match self {
            Self::Refcount {
                refcount,
                references,
                ..
            } if refcount > references => Severity::Leak,
            Self::Refcount { .. }
            | Self::Overflow { .. }
            | Self::BeyondEnd { .. }
            | Self::Entry { .. }
            | Self::Copied { .. }
            | Self::Overlap { .. }
            | Self::RefcountBlock { .. }
            | Self::Snapshot { .. }
            | Self::BitmapTable { .. } => Severity::Corruption,
            Self::Unreadable { .. } => Severity::CheckError,
            Self::BitsPastEnd { .. }
            | Self::StaleBitmaps
            | Self::BitmapsBitAlone
            | Self::BitmapInUse { .. }
            | Self::ChainStale
            | Self::ChainDamaged
            | Self::DirectoryChanged
            | Self::Dirty
            | Self::MarkedCorrupt => Severity::Warning,
        }
    }
}

/// What a check found. The counts mean what they mean in `qemu-img check --output=json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Findings that endanger data.
    pub corruptions: u64,
    /// Clusters that nobody uses and that are not free.
    pub leaks: u64,
    /// Odd things that harm nothing by themselves.
    pub warnings: u64,
    /// End of the last host cluster in use, bytes.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Clusters of the virtual disk that have a host cluster.
    pub allocated_clusters: u64,
    /// Compressed ones among them.
    pub compressed_clusters: u64,
    /// Allocated ones that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// The findings in the order they were made, at most 1,000.
    pub findings: Vec<Finding>,
    /// Findings that were counted and not kept.
    pub omitted_findings: u64,
}

impl CheckReport {
    /// Exit code of `qemu-img check`: 0 clean, 1 the check failed, 2 corruption, 3 only leaks.
    pub fn exit_code(&self) -> u8 {
        match (self.check_errors, self.corruptions, self.leaks) {
            (0, 0, 0) => 0,
            (0, 0, _) => 3,
            (0, _, _) => 2,
            _ => 1,
        }
    }

    /// Whether nothing was found but, at most, warnings.
    pub fn is_clean(&self) -> bool {
        self.exit_code() == 0
    }

    /// Counts a finding `times` times and keeps it once.
    pub(super) fn add(&mut self, finding: Finding, times: u64) {
        if times == 0 {
            return;
        }
        let counter = match finding.severity() {
            Severity::Warning => &mut self.warnings,
            Severity::Leak => &mut self.leaks,
            Severity::Corruption => &mut self.corruptions,
            Severity::CheckError => &mut self.check_errors,
        };
        *counter = counter.saturating_add(times);
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        } else {
            self.omitted_findings += 1;
        }
    }
}
