//! Opening images as the command line asks for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use tidemark_qcow2::transfer::{Source, Target};
use tidemark_qcow2::{
    FileStorage, Gate, Image, NoFiles, OpenOptions, PlainFiles, Sharing, Storage,
};

use crate::exit::{Failure, Outcome};
use crate::out::{trace, warn};

/// Which format IMAGE has.
#[derive(Args, Clone, Debug)]
pub(crate) struct Format {
    /// Format of IMAGE; it is never guessed
    #[arg(short = 'f', value_name = "FMT", default_value = "qcow2")]
    pub(crate) format: String,
}

/// Whether an image that another process holds may be looked at.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct Share {
    /// Look at an image that another process holds; the answer is unsteady
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
}

/// Which files named inside an image may be opened.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Gates {
    /// Open no backing file and no data file
    #[arg(long)]
    pub(crate) no_backing: bool,
    /// Open backing and data files only below DIR (may be repeated)
    #[arg(long, value_name = "DIR", conflicts_with = "no_backing")]
    pub(crate) allow_backing: Vec<PathBuf>,
}

impl Format {
    /// Refuses every format but qcow2.
    pub(crate) fn require_qcow2(&self, path: &Path) -> Outcome<()> {
        if self.format == "qcow2" {
            return Ok(());
        }
        Err(Failure::unsupported(format!(
            "{}: format '{}' is not supported by this command; it works on qcow2 images",
            path.display(),
            self.format
        )))
    }
}

impl Share {
    pub(crate) fn sharing(self) -> Sharing {
        if self.force_share {
            Sharing::ForceShare
        } else {
            Sharing::Exclusive
        }
    }

    /// Opens a file for reading, and says when the answer will be unsteady.
    pub(crate) fn storage(self, path: &Path) -> Outcome<FileStorage> {
        trace(format_args!("{}: open for reading", path.display()));
        let storage = FileStorage::open(path, false, self.sharing())
            .map_err(|error| Failure::io(path, "open", &error))?;
        if self.force_share && self.is_held(path) {
            let path = path.display();
            warn(format_args!(
                "{path}: in use by another process, the answer is unsteady"
            ));
        }
        Ok(storage)
    }

    /// Whether somebody is writing the image.
    pub(crate) fn is_held(self, path: &Path) -> bool {
        self.force_share
            && FileStorage::open(path, false, Sharing::Exclusive)
                .is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }
}

impl Gates {
    /// The gate: plain paths with an explicit format, unless narrowed.
    pub(crate) fn gate(&self, share: Share) -> Arc<dyn Gate> {
        if self.no_backing {
            return Arc::new(NoFiles);
        }
        Arc::new(PlainFiles {
            below: self.allow_backing.clone(),
            sharing: share.sharing(),
        })
    }

    /// Opens an image with its backing chain for reading.
    pub(crate) fn read(&self, path: &Path, share: Share) -> Outcome<Image> {
        let storage: Box<dyn Storage> = Box::new(share.storage(path)?);
        Ok(Image::open(
            storage,
            OpenOptions::reading(self.gate(share)),
        )?)
    }

    /// Opens an image with its backing chain for writing.
    pub(crate) fn write(&self, path: &Path) -> Outcome<Image> {
        let storage: Box<dyn Storage> = Box::new(writable(path)?);
        let gate = self.gate(Share::default());
        Ok(said(Image::open(storage, OpenOptions::writing(gate))?))
    }
}

/// Says what opening put right.
pub(crate) fn said(image: Image) -> Image {
    if let Some(report) = image.repaired_on_open() {
        let (name, errors, leaks) = (image.name(), report.corruptions_fixed, report.leaks_fixed);
        warn(format_args!(
            "{name}: was not closed cleanly; opening it for writing repaired {errors} errors and \
             freed {leaks} leaked clusters"
        ));
    }
    image
}

/// Opens a disk of a declared format for reading, with its backing chain.
pub(crate) fn source(path: &Path, format: &str, gates: &Gates, share: Share) -> Outcome<Source> {
    match format {
        "qcow2" => Ok(Source::image(gates.read(path, share)?)),
        "raw" => Ok(Source::raw(Box::new(share.storage(path)?))?),
        _ => Err(unknown_format(path, format)),
    }
}

/// The same, or the disk as it was in an internal snapshot, named as qemu-img's `-l` does.
pub(crate) fn source_or_snapshot(
    path: &Path,
    format: &str,
    snapshot: Option<&str>,
    gates: &Gates,
    share: Share,
) -> Outcome<Source> {
    let Some(snapshot) = snapshot else {
        return source(path, format, gates, share);
    };
    if format != "qcow2" {
        return Err(Failure::usage(format!(
            "-l {snapshot}: only qcow2 images have internal snapshots"
        )));
    }
    let storage: Box<dyn Storage> = Box::new(share.storage(path)?);
    let options = OpenOptions::reading(gates.gate(share));
    let selector = ["snapshot.id=", "snapshot.name="]
        .iter()
        .find_map(|key| snapshot.strip_prefix(key))
        .unwrap_or(snapshot);
    let image = Image::open_snapshot(storage, options, selector)?;
    Ok(Source::image(image))
}

/// Opens an existing disk of a declared format for writing.
pub(crate) fn target(path: &Path, format: &str, gates: &Gates) -> Outcome<Target> {
    match format {
        "qcow2" => Ok(Target::image(gates.write(path)?)),
        "raw" => Ok(Target::raw(Box::new(writable(path)?))?),
        _ => Err(unknown_format(path, format)),
    }
}

/// Refuses a format that cannot be read or written.
pub(crate) fn unknown_format(path: &Path, format: &str) -> Failure {
    Failure::unsupported(format!(
        "{}: format '{format}' is not supported, only qcow2 and raw",
        path.display()
    ))
}

/// Opens an image alone, for questions that no backing file can answer.
pub(crate) fn read_alone(path: &Path, share: Share) -> Outcome<Image> {
    let storage: Box<dyn Storage> = Box::new(share.storage(path)?);
    Ok(Image::open_unbacked(storage, false)?)
}

/// Opens an image alone to change its bitmaps.
pub(crate) fn write_alone(path: &Path) -> Outcome<Image> {
    let storage: Box<dyn Storage> = Box::new(writable(path)?);
    Ok(said(Image::open_unbacked(storage, true)?))
}

/// Opens a file for writing, under the locks of a writer.
pub(crate) fn writable(path: &Path) -> Outcome<FileStorage> {
    trace(format_args!("{}: open for writing", path.display()));
    FileStorage::open(path, true, Sharing::Exclusive)
        .map_err(|error| Failure::io(path, "open for writing", &error))
}
