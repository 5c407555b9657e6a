//! The consistency check: who refers to each host cluster, compared with the refcounts.
//!
//! Invariants:
//! - Nothing is written.
//! - Memory follows the file and the structures that are really there, never a size that a field
//!   claims. A table that many entries share is read once and counted as often as it is named.
//! - Whatever the bytes are, the check ends with a report; only a header that cannot be understood
//!   is an error.
//!
//! Counts and exit codes are those of `qemu-img check`; where we see more, or go on where QEMU
//! gives up, `docs/testing.md` lists it.

mod amend;
mod bitmaps;
mod counts;
mod l2;
mod mapping;
mod outside;
mod pieces;
mod plain;
mod refcounts;
mod references;
mod repair;
mod report;
mod snapshots;

use std::collections::BTreeMap;
use std::ops::Range;

pub use self::amend::{Amend, amend};
pub(crate) use self::plain::{USUAL_ORDER, counts_enough};
pub(crate) use self::references::References;
pub use self::repair::{Loss, Repair, RepairReport, repair};

pub(crate) use self::repair::repair_dirty;
pub use self::report::{CheckReport, Finding, Severity};

use self::counts::ReferenceCounts;
use self::mapping::{L2Tables, l1_range};
use self::pieces::pieces;
use self::repair::Flags;
use crate::bitmaps::{BitmapInfo, proof};
use crate::convert::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::format::bitmap::DirectoryEntry;
use crate::format::chain::Reading;
use crate::format::extension;
use crate::format::header::{Header, autoclear, incompatible};
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::image::{Image, encryption_header};
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset};

/// Bytes of a table that are read at once.
const READ_BYTES: u64 = 1 << 20;
/// Ranges behind the end of the file that are remembered.
const MAX_BEYOND: usize = 1 << 16;
/// Offsets from here on cannot be read by any system.
const UNREACHABLE: u64 = 1 << 63;

/// Checks the image in `storage` by itself: its backing file is not opened.
///
/// # Errors
/// A header that cannot be understood, a feature that changes the meaning of the tables, or I/O
/// before the tables are reached.
pub fn check(storage: Box<dyn Storage>) -> Result<CheckReport> {
    Image::open_unbacked(storage, false)?.check()
}

impl Image {
    /// Checks the image as it is on disk; an image open for writing is flushed first, and nobody
    /// may write to it meanwhile.
    ///
    /// # Errors
    /// I/O while flushing or before the tables are reached. Everything else is in the report.
    pub fn check(&self) -> Result<CheckReport> {
        if self.is_writable() {
            // The first makes references durable, the second the frees that follow from them.
            self.flush()?;
            self.flush()?;
        }
        check_image(self)
    }
}

/// Checks what is on disk.
fn check_image(image: &Image) -> Result<CheckReport> {
    let header = image.header();
    let mut census = Census::new(image.file(), &header)?;
    census.warn(image, &header);
    let counted = census.count_image(image, &header);
    census.compare(&counted.refcount_table);
    census.check_copied(&header, &counted.tables);
    census.check_outside(&header);
    Ok(census.report)
}

/// What a count of everything met, for those who go on from there.
struct Counted {
    /// The L2 tables that can be read.
    tables: L2Tables,
    /// The refcount table as far as the file has it.
    refcount_table: Vec<u64>,
}

/// References found so far, and the report.
struct Census<'a> {
    file: &'a ImageFile,
    geometry: Geometry,
    /// Length of the file in whole sectors.
    end: u64,
    /// Clusters of the file, the last of them perhaps in part.
    clusters: u64,
    counts: ReferenceCounts,
    /// Clusters that may have one reference only.
    exclusive: Vec<(&'static str, Range<u64>)>,
    /// Clusters of `exclusive` structures that have more.
    shared: BTreeMap<u64, (&'static str, u64)>,
    /// Clusters behind the end of the file that something names, at most [`MAX_BEYOND`] of them.
    beyond: Vec<Range<u64>>,
    /// Something that may refer to clusters could not be followed: what looks leaked may be used.
    unfollowed: bool,
    /// Refcount table or blocks lie where they must not, or cannot be read.
    refcounts_broken: bool,
    /// A refcount block that something else refers to.
    shared_block: Option<HostOffset>,
    /// Something has more references than its refcount can hold.
    overflowed: bool,
    /// Every L2 table is plain, active, and says of all its data that it is its alone.
    uniform: bool,
    /// No cluster has a count above one.
    single: bool,
    /// The first read that failed.
    failed: Option<Error>,
    /// Present while COPIED flags are corrected and not only compared.
    flags: Option<Flags>,
    report: CheckReport,
}

impl<'a> Census<'a> {
    fn new(file: &'a ImageFile, header: &Header) -> Result<Self> {
        Self::counting_to(file, header, header.geometry.refcount_max())
    }

    /// As [`new`](Self::new), with counts that no refcount limits: who shares what shows at every
    /// width.
    fn unlimited(file: &'a ImageFile, header: &Header) -> Result<Self> {
        Self::counting_to(file, header, u64::MAX)
    }

    fn counting_to(file: &'a ImageFile, header: &Header, most: u64) -> Result<Self> {
        let geometry = header.geometry;
        let end = file.len()?.next_multiple_of(512);
        let clusters = geometry.clusters_for(end);
        let report = CheckReport {
            total_clusters: geometry.clusters_for(header.disk_bytes),
            ..CheckReport::default()
        };
        Ok(Self {
            file,
            geometry,
            end,
            clusters,
            counts: ReferenceCounts::new(clusters, most),
            exclusive: Vec::new(),
            shared: BTreeMap::new(),
            beyond: Vec::new(),
            unfollowed: false,
            refcounts_broken: false,
            shared_block: None,
            overflowed: false,
            uniform: true,
            single: true,
            failed: None,
            flags: None,
            report,
        })
    }

    /// Counts every reference of the image, and looks at each bitmap.
    fn count_image(&mut self, image: &Image, header: &Header) -> Counted {
        let (place, entries) = self.read_directory(image);
        let counted = self.count_all(image, header, place, &entries);
        self.check_bitmaps(image, &entries);
        counted
    }

    /// Counts every reference, with these bitmaps.
    fn count_all(
        &mut self,
        image: &Image,
        header: &Header,
        directory: Option<(HostOffset, u64)>,
        bitmaps: &[DirectoryEntry],
    ) -> Counted {
        let tables = self.count_contents(image, header);
        self.count_refcount_table(header);
        self.count_bitmap_structures(directory, bitmaps);
        let refcount_table = self.count_blocks(header);
        Counted {
            tables,
            refcount_table,
        }
    }

    /// Counts the header, the mapping and the snapshots: everything that holds guest data.
    fn count_contents(&mut self, image: &Image, header: &Header) -> L2Tables {
        let snapshots = self.read_snapshots(header);
        let bytes = self.geometry.cluster_bytes();
        self.count("header", HostOffset::ZERO, bytes, 1);
        let tables = self.count_mapping(header, &snapshots);
        self.count_snapshot_table(header, &snapshots);
        if let Some(place) = encryption_header(&image.first_cluster()) {
            self.count_exclusive("encryption header", place.offset, place.bytes);
        }
        tables
    }

    fn found(&mut self, finding: Finding, times: u64) {
        self.report.add(finding, times);
    }

    /// Counts `times` references to all clusters of a structure. Returns whether it lies in the
    /// file; the last cluster may go on behind its end.
    fn count(
        &mut self,
        structure: &'static str,
        offset: HostOffset,
        bytes: u64,
        times: u64,
    ) -> bool {
        let Some(clusters) = self.clusters_of(structure, offset, bytes, times) else {
            return bytes == 0;
        };
        for cluster in clusters {
            self.add(cluster, times);
        }
        true
    }

    /// Counts a structure whose clusters nothing else may refer to.
    fn count_exclusive(&mut self, structure: &'static str, offset: HostOffset, bytes: u64) {
        self.count_tables(structure, &[(offset, bytes)]);
    }

    /// Counts structures that may share clusters with one another, and should not.
    fn count_tables(&mut self, structure: &'static str, tables: &[(HostOffset, u64)]) {
        let ranges: Vec<Range<u64>> = tables
            .iter()
            .filter_map(|&(offset, bytes)| self.clusters_of(structure, offset, bytes, 1))
            .collect();
        for (clusters, times) in pieces(&ranges) {
            for cluster in clusters.clone() {
                self.add(cluster, times);
            }
            self.exclusive.push((structure, clusters));
        }
    }

    fn clusters_of(
        &mut self,
        structure: &'static str,
        offset: HostOffset,
        bytes: u64,
        times: u64,
    ) -> Option<Range<u64>> {
        if bytes == 0 {
            return None;
        }
        let end = offset.0.saturating_add(bytes);
        if end >= self.end + self.geometry.cluster_bytes() {
            let finding = Finding::BeyondEnd {
                structure,
                offset,
                bytes,
            };
            self.found(finding, times);
            self.unfollowed |= !matches!(structure, "data cluster" | "compressed cluster");
            self.note_beyond(
                self.geometry.host_cluster(offset).0..end >> self.geometry.cluster_bits,
            );
            return None;
        }
        let last = self.geometry.host_cluster(HostOffset(end - 1)).0;
        Some(self.geometry.host_cluster(offset).0..last + 1)
    }

    fn note_beyond(&mut self, clusters: Range<u64>) {
        if self.beyond.len() < MAX_BEYOND {
            self.beyond.push(clusters.start..clusters.end + 1);
        }
    }

    fn add(&mut self, cluster: u64, times: u64) {
        let lost = self.counts.add(cluster, times);
        if lost > 0 {
            let offset = self.geometry.host_offset(HostCluster(cluster));
            let most = self.geometry.refcount_max();
            self.overflowed = true;
            self.found(Finding::Overflow { offset, most }, lost);
        }
    }

    /// Reads `bytes` at `offset`; a failure becomes a finding.
    fn read(&mut self, structure: &'static str, offset: HostOffset, bytes: u64) -> Option<Vec<u8>> {
        let mut buffer = vec![0; to_usize(bytes)];
        match self.file.read(&mut buffer, offset, "check") {
            Ok(()) => Some(buffer),
            Err(error) => {
                self.unreadable(structure, offset, &error);
                None
            }
        }
    }

    fn unreadable(&mut self, structure: &'static str, offset: HostOffset, error: &Error) {
        if self.failed.is_none() {
            self.failed = error.io_again();
        }
        let problem = match error {
            Error::Io { source, .. } => source.to_string(),
            Error::Corrupt { damage, .. } => damage.to_string(),
            other => other.to_string(),
        };
        let finding = Finding::Unreadable {
            structure,
            offset,
            problem,
        };
        self.unfollowed = true;
        self.found(finding, 1);
    }

    /// Reads the 64-bit entries in a range of the file and hands out those that are not zero, with
    /// the place of each. What lies behind the end of the file is zero.
    fn entries(
        &mut self,
        structure: &'static str,
        range: Range<u64>,
        mut work: impl FnMut(&mut Self, HostOffset, u64),
    ) {
        let end = range.end.min(self.end);
        let mut at = range.start;
        while at < end {
            let hole = self.file.storage().hole_at(at).unwrap_or(0) & !7;
            if hole > 0 {
                at = at.saturating_add(hole);
                continue;
            }
            let step = (end - at).min(READ_BYTES);
            let Some(bytes) = self.read(structure, HostOffset(at), step) else {
                return;
            };
            for (number, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
                let entry = u64::from_be_bytes(*entry);
                if entry != 0 {
                    work(
                        self,
                        HostOffset(at + Geometry::entries_bytes(number)),
                        entry,
                    );
                }
            }
            at += step;
        }
    }

    /// Odd things that no count shows.
    fn warn(&mut self, image: &Image, header: &Header) {
        let first = image.first_cluster();
        let bit = header.autoclear & autoclear::BITMAPS != 0;
        let present = first.content().bitmaps.is_some();
        let stale = first
            .others()
            .iter()
            .any(|entry| entry.kind == extension::BITMAPS);
        if first.broken_bitmaps().is_some() {
            let problem = "the bitmaps extension of the header breaks the rules".to_owned();
            let structure = "bitmap directory";
            self.unfollowed = true;
            let offset = HostOffset::ZERO;
            let finding = Finding::Unreadable {
                structure,
                offset,
                problem,
            };
            self.found(finding, 1);
        }
        let chain = match first.reading() {
            Reading::Stale(_) => Some(Finding::ChainStale),
            Reading::Damaged => Some(Finding::ChainDamaged),
            Reading::Current(record) => {
                let directory = image.directory();
                let entries = directory.entries(self.file).unwrap_or_default();
                let digest = proof::directory_digest(record, entries.iter().map(BitmapInfo::from));
                (digest != record.directory_digest).then_some(Finding::DirectoryChanged)
            }
            Reading::Absent => None,
        };
        let findings = [
            (header.incompatible & incompatible::CORRUPT != 0).then_some(Finding::MarkedCorrupt),
            (header.incompatible & incompatible::DIRTY != 0).then_some(Finding::Dirty),
            stale.then_some(Finding::StaleBitmaps),
            (bit && !present && !stale && first.broken_bitmaps().is_none())
                .then_some(Finding::BitmapsBitAlone),
            chain,
        ];
        for finding in findings.into_iter().flatten() {
            self.found(finding, 1);
        }
    }
}

/// A name as text, as the bitmaps of an image have it.
fn text(bytes: &[u8]) -> String {
    crate::bitmaps::name::text(bytes)
}

/// A position in a table of 8-byte entries.
fn place(table: HostOffset, slot: usize) -> HostOffset {
    table.plus(to_u64(slot) * 8)
}
