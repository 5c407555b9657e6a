//! Repair: what the check finds wrong is put right, as far as that is certain.
//!
//! Invariants:
//! - No byte of guest data is written, and no guest cluster changes its content.
//! - Whatever moment the machine dies at, the image is not worse than before. New structures go
//!   behind the end of the file, where nothing refers to, and become true by one write of the
//!   header; counts are corrected one by one, each by itself right; flags follow the counts. In
//!   between a COPIED flag may be missing, which costs a copy and no data.
//! - A count is only lowered when every reference could be followed. What looks leaked below a
//!   table that cannot be read may be all that is left of it.
//! - History is not dropped in silence: each bitmap that is lost, renamed or widened is named.
//! - What cannot end well is refused before the first write.

mod copied;
mod directory;
mod dirty;
mod loss;
mod place;
mod publish;
mod salvage;

pub use self::loss::Loss;

pub(crate) use self::dirty::repair_dirty;

pub(super) use self::copied::Flags;
use self::salvage::Salvage;
use super::{Census, CheckReport, Counted, check_image};
use crate::convert::to_u64;
use crate::error::{Feature, Mistake, Result};
use crate::format::extension;
use crate::format::header::{Header, autoclear, incompatible};
use crate::geometry::Geometry;
use crate::image::Image;
use crate::storage::Storage;

/// Times that the structures are laid out anew before a repair gives up: an entry that named the
/// end of the file may lie inside it afterwards, and then has to be counted.
const ROUNDS: usize = 4;

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Clusters that nobody uses are freed; nothing else changes.
    Leaks,
    /// Everything that can be put right without a guess.
    All,
}

/// What a repair did, and what is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepairReport {
    /// The check after the repair.
    pub check: CheckReport,
    /// Leaked clusters that are free now.
    pub leaks_fixed: u64,
    /// Corruptions that are gone.
    pub corruptions_fixed: u64,
    /// What could not be saved as it was.
    pub losses: Vec<Loss>,
}

/// Repairs the image in `storage`; its backing file is not opened. An image that nothing is wrong
/// with is not written to.
///
/// # Errors
/// A storage that cannot be written; a header that cannot be understood; more references to one
/// cluster than its refcount can hold, or no room for new structures, both before the first write;
/// I/O.
pub fn repair(storage: Box<dyn Storage>, what: Repair) -> Result<RepairReport> {
    repair_image(Image::open_for_repair(storage)?, what).map(|(_, report)| report)
}

fn repair_image(mut image: Image, what: Repair) -> Result<(Image, RepairReport)> {
    if !image.file().storage().writable() {
        return Err(image.file().invalid(Mistake::ReadOnly));
    }
    let before = count_report(&image)?;
    let mut losses = Vec::new();
    for _ in 0..ROUNDS {
        match repair_structures(&image, what, &mut losses)? {
            Progress::Done => break,
            Progress::Header => image = Image::open_for_repair(image.into_storage())?,
        }
    }
    repair_counts(&image, what)?;
    let flags = repair_flags(&image, what)?;
    let counted = count_report(&image)?;
    let mut after = check_image(&image)?;
    let marks = incompatible::DIRTY | incompatible::CORRUPT;
    let marked = image.header().incompatible & marks != 0;
    if marked && after.check_errors == 0 && after.corruptions == 0 {
        clear_marks(&image, marks)?;
        after = check_image(&image)?;
    }
    let report = RepairReport {
        leaks_fixed: before.leaks.saturating_sub(counted.leaks),
        corruptions_fixed: flags
            + (before.corruptions + before.check_errors)
                .saturating_sub(counted.corruptions + counted.check_errors),
        check: after,
        losses,
    };
    Ok((image, report))
}

/// The check without the COPIED flags, which depend on counts that are still wrong.
fn count_report(image: &Image) -> Result<CheckReport> {
    let header = image.header();
    let mut census = Census::new(image.file(), &header)?;
    census.warn(image, &header);
    let counted = census.count_image(image, &header);
    census.compare(&counted.refcount_table);
    Ok(census.report)
}

/// How far a step came.
enum Progress {
    /// There was nothing to do.
    Done,
    /// The header changed: everything is to be read again.
    Header,
}

/// Puts directory and refcount structures right, where that takes a new header.
fn repair_structures(image: &Image, what: Repair, losses: &mut Vec<Loss>) -> Result<Progress> {
    let stale = image
        .first_cluster()
        .others()
        .iter()
        .any(|entry| entry.kind == extension::BITMAPS);
    if what == Repair::Leaks {
        if stale {
            losses.extend(publish::drop_bitmaps(image)?);
            return Ok(Progress::Header);
        }
        return Ok(Progress::Done);
    }
    let header = image.header();
    let found = directory::read(image)?;
    let mut census = Census::unlimited(image.file(), &header)?;
    let counted = census.count_all(image, &header, found.place, &found.entries);
    let salvage = Salvage::plan(image, &census, found)?;
    let rebuild = census.refcounts_broken || has_uncounted(&census, &counted);
    let bit = header.autoclear & autoclear::BITMAPS != 0;
    let alone = bit && image.first_cluster().content().bitmaps.is_none();
    let nothing_left = salvage.kept.is_empty() && (salvage.changed || stale || alone);
    let in_place = !rebuild && (nothing_left || (!salvage.changed && !stale));
    if in_place && !nothing_left {
        refuse_overflow(image, &header)?;
        return Ok(Progress::Done);
    }
    if in_place {
        refuse_overflow_without_bitmaps(image, &header)?;
        losses.extend(salvage.losses);
        losses.extend(publish::drop_bitmaps(image)?);
        return Ok(Progress::Header);
    }
    losses.extend(publish::publish(image, &header, salvage)?);
    Ok(Progress::Header)
}

/// Publishes another header of a sound image, with refcounts of its width.
///
/// # Errors
/// Bitmaps that are stale, more references to a cluster than can be counted, no room, all before
/// the first write; I/O.
pub(super) fn republish(image: &Image, header: &Header) -> Result<()> {
    let found = directory::read(image)?;
    let mut census = Census::unlimited(image.file(), &image.header())?;
    census.count_all(image, &image.header(), found.place, &found.entries);
    let stale = |entry: &extension::Extension| entry.kind == extension::BITMAPS;
    let is_stale = image.first_cluster().others().iter().any(stale);
    let salvage = Salvage::plan(image, &census, found)?;
    if is_stale || salvage.changed || !salvage.losses.is_empty() {
        return Err(image.file().invalid(Mistake::Damaged));
    }
    publish::publish(image, header, salvage).map(drop)
}

/// Whether something is referred to that no refcount block counts.
fn has_uncounted(census: &Census<'_>, counted: &Counted) -> bool {
    let per_block = census.geometry.refcounts_per_block();
    let covered = to_u64(counted.refcount_table.len()) * per_block;
    let missing = |number: usize| {
        let start = to_u64(number) * per_block;
        let end = (start + per_block).min(census.clusters);
        census.counts.next_referenced(start, end).is_some()
    };
    let holes = counted
        .refcount_table
        .iter()
        .enumerate()
        .filter(|(_, entry)| **entry == 0);
    census
        .counts
        .next_referenced(covered, census.clusters)
        .is_some()
        || holes.into_iter().any(|(number, _)| missing(number))
}

/// A cluster with more references than can be counted would be freed too early one day.
fn refuse_overflow(image: &Image, header: &Header) -> Result<()> {
    let mut census = Census::new(image.file(), header)?;
    census.count_image(image, header);
    refuse_overflowed(image, &census)
}

/// The same for an image whose bitmaps are going to be dropped.
fn refuse_overflow_without_bitmaps(image: &Image, header: &Header) -> Result<()> {
    let mut census = Census::new(image.file(), header)?;
    census.count_all(image, header, None, &[]);
    refuse_overflowed(image, &census)
}

fn refuse_overflowed(image: &Image, census: &Census<'_>) -> Result<()> {
    if census.overflowed {
        let limit = census.geometry.refcount_max();
        return Err(image.file().unsupported(Feature::Limit {
            what: "references to one host cluster",
            value: limit.saturating_add(1),
            limit,
        }));
    }
    Ok(())
}

/// Corrects the counts where they stand.
fn repair_counts(image: &Image, what: Repair) -> Result<()> {
    let header = image.header();
    let mut census = Census::new(image.file(), &header)?;
    let counted = census.count_image(image, &header);
    let how = Counts {
        raise: what == Repair::All && !census.refcounts_broken,
        lower: !census.unfollowed && !census.refcounts_broken,
    };
    if census.mend_counts(&counted.refcount_table, how)? {
        image.file().barrier()?;
    }
    Ok(())
}

/// Which counts may change.
#[derive(Clone, Copy, Debug)]
pub(in crate::check) struct Counts {
    /// Those that are too low.
    pub(in crate::check) raise: bool,
    /// Those that are too high.
    pub(in crate::check) lower: bool,
}

/// Corrects COPIED flags by the counts that are on disk now; returns how many. A repair of leaks
/// does so only when the counts are right.
fn repair_flags(image: &Image, what: Repair) -> Result<u64> {
    let header = image.header();
    let mut census = Census::new(image.file(), &header)?;
    let counted = census.count_image(image, &header);
    if census.refcounts_broken {
        return Ok(0);
    }
    let flags = Flags::new(&mut census, &header, &counted.tables);
    census.compare(&counted.refcount_table);
    let sound = census.report.corruptions == 0 && census.report.check_errors == 0;
    if what == Repair::Leaks && !sound {
        return Ok(0);
    }
    let corrected = census.mend_copied(&header, &counted.tables, flags)?;
    if corrected.written {
        image.file().barrier()?;
    }
    Ok(corrected.flags)
}

/// Takes back what the image says of itself.
fn clear_marks(image: &Image, marks: u64) -> Result<()> {
    let mut first = image.first_cluster();
    let mut next = first.content().clone();
    next.header.incompatible &= !marks;
    first.commit(image.file(), next)
}

/// Clusters that `bytes` bytes take, for structures that may be empty.
fn clusters_of(geometry: &Geometry, bytes: u64) -> u64 {
    geometry.clusters_for(bytes)
}
