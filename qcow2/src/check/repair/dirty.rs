//! An image that was not closed cleanly, made fit for writing.
//!
//! The dirty bit says one thing: refcounts and COPIED flags may be behind the mapping, which is the
//! truth. So they follow from it without a guess, and putting them right may be a part of opening.
//! Whatever else is wrong needs somebody who asks for a repair and hears what was lost: such an
//! image is refused before the first write.

use super::salvage::Salvage;
use super::{Repair, RepairReport, directory, repair_image};
use crate::check::Census;
use crate::error::{Feature, Result};
use crate::format::extension;
use crate::format::header::incompatible;
use crate::image::Image;
use crate::storage::Storage;

/// Puts refcounts and COPIED flags right and takes the dirty bit back.
///
/// # Errors
/// [`Feature::Dirty`] when something else is wrong, and then nothing was written; I/O.
pub(crate) fn repair_dirty(storage: Box<dyn Storage>) -> Result<(Box<dyn Storage>, RepairReport)> {
    let image = Image::open_for_repair(storage)?;
    if !follows_from_mapping(&image)? {
        return Err(image.file().unsupported(Feature::Dirty));
    }
    let (image, report) = repair_image(image, Repair::All)?;
    if image.header().incompatible & incompatible::DIRTY != 0 {
        return Err(image.file().unsupported(Feature::Dirty));
    }
    Ok((image.into_storage(), report))
}

/// Whether everything but refcounts and flags is sound, so that a repair loses nothing.
fn follows_from_mapping(image: &Image) -> Result<bool> {
    let stale = {
        let first = image.first_cluster();
        let mut others = first.others().iter();
        first.broken_bitmaps().is_some() || others.any(|entry| entry.kind == extension::BITMAPS)
    };
    if stale {
        return Ok(false);
    }
    let header = image.header();
    let found = directory::read(image)?;
    let mut census = Census::unlimited(image.file(), &header)?;
    census.count_contents(image, &header);
    census.count_bitmap_structures(found.place, &found.entries);
    census.check_bitmaps(image, &found.entries);
    census.find_shared();
    let report = &census.report;
    let followed = report.corruptions == 0 && report.check_errors == 0 && !census.unfollowed;
    if !followed || !census.shared.is_empty() {
        return Ok(false);
    }
    let salvage = Salvage::plan(image, &census, found)?;
    if salvage.changed || !salvage.losses.is_empty() {
        return Ok(false);
    }
    let mut census = Census::new(image.file(), &header)?;
    census.count_image(image, &header);
    Ok(!census.overflowed)
}
