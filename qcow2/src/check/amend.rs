//! Amend: what the header says of an image is changed, and the width of its refcounts.
//!
//! An image that nobody has open is changed by the means of a repair: refcounts of another width go
//! behind the end of the file, and one write of the header makes everything true.
//!
//! Invariants:
//! - The mapping, the data, the bitmaps and the chain record stay as they are, byte for byte.
//! - What cannot be is refused before the first write; so is a damaged image, for which a change of
//!   meaning would turn damage into loss.

use super::check_image;
use super::repair::republish;
use crate::error::{Damage, Feature, Mistake, Result};
use crate::format::header::{Header, V3_LENGTH, autoclear, compatible, incompatible};
use crate::image::Image;
use crate::storage::Storage;

/// What is to be changed; what is `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amend {
    /// The version of the format: 3 for an image of version 2.
    pub version: Option<u32>,
    /// Whether others may postpone refcount updates. Version 3.
    pub lazy_refcounts: Option<bool>,
    /// Bits of a refcount, a power of two from 1 to 64. Version 3.
    pub refcount_bits: Option<u32>,
    /// Whether the external data file is a raw image of the disk: can be taken back only.
    pub data_file_raw: Option<bool>,
}

/// Changes the image in `storage`; its backing file is not opened. Returns whether there was
/// anything to change.
///
/// # Errors
/// A storage that cannot be written; a change that cannot be; a damaged or dirty image; more
/// references to one cluster than the new width can hold; I/O. After an error the image is as
/// before, except for one while the header was written, when it is as before or as asked.
pub fn amend(storage: Box<dyn Storage>, change: &Amend) -> Result<bool> {
    let image = Image::open_for_repair(storage)?;
    if !image.file().storage().writable() {
        return Err(image.file().invalid(Mistake::ReadOnly));
    }
    let old = image.header();
    let new = change
        .applied_to(&old)
        .map_err(|mistake| image.file().invalid(mistake))?;
    if new == old {
        return Ok(false);
    }
    refuse_marked(&image, &old)?;
    // The bits of an entry, or the counts, are about to be read in another way.
    if new.geometry != old.geometry && !is_sound(&image)? {
        return Err(image.file().invalid(Mistake::Damaged));
    }
    if new.geometry.refcount_order == old.geometry.refcount_order {
        let mut first = image.first_cluster();
        let mut next = first.content().clone();
        next.header = new;
        first.commit(image.file(), next)?;
    } else {
        republish(&image, &new)?;
    }
    Ok(true)
}

impl Amend {
    fn applied_to(&self, old: &Header) -> std::result::Result<Header, Mistake> {
        let problem = |option, problem| Err(Mistake::Option { option, problem });
        let mut new = old.clone();
        match self.version {
            None => {}
            Some(version) if version == old.geometry.version => {}
            Some(3) => {
                new.geometry.version = 3;
                new.length = V3_LENGTH;
            }
            Some(_) => {
                return problem(
                    "compat",
                    "an image only becomes newer; `convert -O qcow2 -o compat=0.10` makes an older copy",
                );
            }
        }
        let version = new.geometry.version;
        if let Some(lazy) = self.lazy_refcounts {
            if lazy && version == 2 {
                return problem("lazy_refcounts", "needs compat=1.1 (version 3)");
            }
            new.compatible &= !compatible::LAZY_REFCOUNTS;
            new.compatible |= u64::from(lazy) * compatible::LAZY_REFCOUNTS;
        }
        if let Some(bits) = self.refcount_bits {
            if !bits.is_power_of_two() || bits > 64 {
                return problem("refcount_bits", "must be a power of two between 1 and 64");
            }
            if version == 2 && bits != 16 {
                return problem(
                    "refcount_bits",
                    "another width needs compat=1.1 (version 3)",
                );
            }
            new.geometry.refcount_order = bits.trailing_zeros();
        }
        let is_raw = old.autoclear & autoclear::RAW_DATA_FILE != 0;
        match self.data_file_raw {
            Some(true) if !is_raw => {
                return problem(
                    "data_file_raw",
                    "cannot be turned on for an image that exists",
                );
            }
            Some(false) => new.autoclear &= !autoclear::RAW_DATA_FILE,
            _ => {}
        }
        Ok(new)
    }
}

fn refuse_marked(image: &Image, header: &Header) -> Result<()> {
    if header.incompatible & incompatible::DIRTY != 0 {
        return Err(image.file().unsupported(Feature::Dirty));
    }
    if header.incompatible & incompatible::CORRUPT != 0 {
        return Err(image.file().damage(Damage::MarkedCorrupt));
    }
    Ok(())
}

fn is_sound(image: &Image) -> Result<bool> {
    let report = check_image(image)?;
    Ok(report.corruptions == 0 && report.check_errors == 0)
}
