//! `bitmap merge`: a bitmap takes over what others mark.

use std::path::PathBuf;

use clap::Args;
use tidemark_qcow2::{Bitmap, Update};

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
            match &foreign {
                Some(sources) => self.unite(&mut bits, sources.iter().cloned().map(Ok))?,
                None => self.unite(
                    &mut bits,
                    self.sources.iter().map(|name| load(update, name)),
                )?,
            }
            Ok(update.put(name, bits, recording)?)
        })
    }

    /// The sources, when they are in another image.
    fn foreign(&self) -> Outcome<Option<Vec<Bitmap>>> {
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
        let image = read_alone(path, Share::default())?;
        let load = |name: &String| Ok(image.load_bitmap(name)?);
        self.sources
            .iter()
            .map(load)
            .collect::<Outcome<Vec<_>>>()
            .map(Some)
    }

    fn unite(
        &self,
        bits: &mut Bitmap,
        sources: impl Iterator<Item = Outcome<Bitmap>>,
    ) -> Outcome<()> {
        for source in sources {
            bits.union_outward(&source?).map_err(|error| {
                let image = self.target.image.display();
                Failure::new(format!(
                    "{image}: merge into '{}': {error}",
                    self.target.name
                ))
            })?;
        }
        Ok(())
    }
}

fn load(update: &Update<'_>, name: &str) -> Outcome<Bitmap> {
    Ok(update.load(name)?)
}
