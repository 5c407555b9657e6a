//! `bitmap merge`: a bitmap takes over what others mark.

use std::path::PathBuf;

use clap::Args;
use tidemark_qcow2::Image;

use super::change::{Target, is_recording};
use super::loss::Change;
use crate::exit::{Failure, Outcome};
use crate::open::{Share, read_alone};
use crate::out::Out;

/// Add what other bitmaps mark to a bitmap
#[derive(Args, Debug)]
pub(crate) struct Merge {
    /// Bitmap that takes over, with its image
    #[command(flatten)]
    target: Target,
    /// Image that the sources are in, when it is another
    #[arg(short = 'b', value_name = "OTHER_IMAGE")]
    other: Option<PathBuf>,
    /// Format of the other image
    #[arg(
        short = 'F',
        value_name = "FMT",
        default_value = "qcow2",
        requires = "other"
    )]
    other_format: String,
    /// Bitmaps to take over
    #[arg(required = true, value_name = "SRC")]
    sources: Vec<String>,
}

impl Merge {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let foreign = self.foreign()?;
        self.target.change(out, Change::Merge, |update, name| {
            let mut bits = update.load(name)?;
            let recording = is_recording(update, name);
            // A source is read piece by piece: memory holds the target and a piece.
            for source in &self.sources {
                match &foreign {
                    Some(image) => image.add_bitmap_to(source, &mut bits)?,
                    None => update.add_to(source, &mut bits)?,
                }
            }
            Ok(update.put(name, bits, recording)?)
        })
    }

    /// The image that the sources are in, when it is another.
    fn foreign(&self) -> Outcome<Option<Image>> {
        let Some(path) = &self.other else {
            return Ok(None);
        };
        if self.other_format != "qcow2" {
            let format = &self.other_format;
            let path = path.display();
            return Err(Failure::unsupported(format!(
                "{path}: format '{format}' has no bitmaps"
            )));
        }
        Ok(Some(read_alone(path, Share::default())?))
    }
}
