//! The bitmaps of an image copied into another one.

use super::convert::{ConvertOptions, Converted};
use super::source::Source;
use super::target::Target;
use crate::bitmaps::BitmapInfo;
use crate::error::{Error, Feature, Mistake, Result};
use crate::image::Image;

/// Which bitmaps are copied; every refusal has been made.
#[derive(Default)]
pub(super) struct Plan {
    copied: Vec<BitmapInfo>,
    skipped: Vec<String>,
}

/// The bitmaps of the source, as far as it goes.
pub(super) fn from_source(source: &Source, options: &ConvertOptions) -> Result<Plan> {
    let mut plan = Plan::default();
    if !options.bitmaps {
        return Ok(plan);
    }
    let Some(image) = source.as_image() else {
        return Err(refusal(source.name(), "a raw disk has no bitmaps"));
    };
    for info in image.bitmaps()? {
        if !info.in_use {
            plan.copied.push(info);
        } else if options.skip_broken_bitmaps {
            plan.skipped.push(info.name);
        } else {
            return Err(image.file().invalid(Mistake::BitmapInconsistent(info.name)));
        }
    }
    Ok(plan)
}

impl Plan {
    pub(super) fn new(source: &Source, target: &Target, options: &ConvertOptions) -> Result<Self> {
        let plan = from_source(source, options)?;
        if !options.bitmaps {
            return Ok(plan);
        }
        let Some(image) = target.as_image() else {
            return Err(refusal(target.name(), "a raw disk cannot hold bitmaps"));
        };
        if image.geometry().version == 2 {
            return Err(image.file().unsupported(Feature::BitmapsInVersion2));
        }
        let present = image.bitmaps()?;
        let taken = |info: &&BitmapInfo| present.iter().any(|found| found.name == info.name);
        if let Some(info) = plan.copied.iter().find(taken) {
            return Err(image
                .file()
                .invalid(Mistake::BitmapExists(info.name.clone())));
        }
        if !plan.copied.is_empty() && source.size() != target.size() {
            let problem = "bitmaps need disks of the same size";
            return Err(refusal(target.name(), problem));
        }
        Ok(plan)
    }

    /// Copies names, granularities, bits and whether they record; one at a time, so that memory
    /// holds one of them.
    pub(super) fn carry_out(
        self,
        source: &Source,
        target: &Target,
        converted: &mut Converted,
    ) -> Result<()> {
        converted.skipped_bitmaps = self.skipped;
        let (Some(from), Some(to)) = (source.as_image(), target.as_image()) else {
            return Ok(());
        };
        for info in self.copied {
            copy(from, to, &info)?;
            converted.bitmaps.push(info.name);
        }
        Ok(())
    }
}

fn refusal(name: &str, problem: &'static str) -> Error {
    Error::Invalid {
        image: name.to_owned(),
        mistake: Mistake::Option {
            option: "bitmaps",
            problem,
        },
    }
}

fn copy(from: &Image, to: &Image, info: &BitmapInfo) -> Result<()> {
    let bits = from.load_bitmap(&info.name)?;
    let name = from.directory().find(from.file(), &info.name)?.name.clone();
    to.update(|update| update.put_named(&name, bits, info.auto))
}
