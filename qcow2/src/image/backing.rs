//! The files that an image names, opened only as far as the caller's gate lets them through.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::{DataFileReference, Image, OpenOptions};
use crate::convert::{to_u64, to_usize};
use crate::error::{Feature, Result};
use crate::format::limits;
use crate::image::file::ImageFile;
use crate::storage::{FileIdentity, FileStorage, Sharing, Storage};
use crate::units::HostOffset;

/// A backing file as an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingReference {
    /// The name, bytes as stored. Relative names start at the directory of the naming image.
    pub name: Vec<u8>,
    /// Its format, `qcow2` or `raw`; empty when the image does not say.
    pub format: String,
}

/// Decides whether a file that an image names may be opened, and opens it.
pub trait Gate: Send + Sync + std::fmt::Debug {
    /// Opens the file named by `reference` inside the image called `from`, for reading.
    ///
    /// # Errors
    /// A sentence that says why it is not let through or cannot be opened.
    fn open(
        &self,
        reference: &BackingReference,
        from: &str,
    ) -> std::result::Result<Box<dyn Storage>, String>;

    /// Opens a backing file for writing, because the caller asked for just that: it is committed to.
    ///
    /// # Errors
    /// A sentence that says why it is not let through or cannot be opened; always, unless the
    /// gate says otherwise.
    fn open_for_writing(
        &self,
        _reference: &BackingReference,
        _from: &str,
    ) -> std::result::Result<Box<dyn Storage>, String> {
        Err("backing files are not opened for writing here".to_owned())
    }

    /// Opens the external data file named inside the image called `from`. It is raw by definition.
    ///
    /// # Errors
    /// A sentence that says why it is not let through or cannot be opened; always, unless the
    /// gate says otherwise.
    fn open_data(
        &self,
        _reference: &DataFileReference,
        _from: &str,
        _writable: bool,
    ) -> std::result::Result<Box<dyn Storage>, String> {
        Err("external data files are not opened here".to_owned())
    }
}

/// Lets nothing through: what a library starts from.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFiles;

impl Gate for NoFiles {
    fn open(
        &self,
        _reference: &BackingReference,
        _from: &str,
    ) -> std::result::Result<Box<dyn Storage>, String> {
        Err("files named inside images are not opened here".to_owned())
    }
}

/// Lets plain path names with an explicit format through, optionally only below some directories.
#[derive(Clone, Debug)]
pub struct PlainFiles {
    /// Directories that a backing or data file must lie below; empty: anywhere.
    pub below: Vec<PathBuf>,
    /// How the files are locked.
    pub sharing: Sharing,
}

impl Default for PlainFiles {
    fn default() -> Self {
        Self {
            below: Vec::new(),
            sharing: Sharing::Exclusive,
        }
    }
}

impl PlainFiles {
    fn resolve(name: &[u8], from: &str) -> std::result::Result<PathBuf, String> {
        let text = std::str::from_utf8(name).map_err(|_| "its name is not UTF-8".to_owned())?;
        if text.is_empty() || text.contains('\0') {
            return Err("its name is empty or has a NUL byte".to_owned());
        }
        // A colon before any slash makes it a protocol name for QEMU (json:, nbd://, fd:).
        let head = text.split('/').next().unwrap_or_default();
        if head.contains(':') {
            return Err("only plain path names are opened, not protocols".to_owned());
        }
        let path = Path::new(text);
        if path.is_absolute() {
            return Ok(path.to_owned());
        }
        Ok(Path::new(from).parent().unwrap_or(Path::new("")).join(path))
    }
}

impl Gate for PlainFiles {
    fn open(
        &self,
        reference: &BackingReference,
        from: &str,
    ) -> std::result::Result<Box<dyn Storage>, String> {
        self.open_plain(&reference.name, from, false)
    }

    fn open_for_writing(
        &self,
        reference: &BackingReference,
        from: &str,
    ) -> std::result::Result<Box<dyn Storage>, String> {
        self.open_plain(&reference.name, from, true)
    }

    fn open_data(
        &self,
        reference: &DataFileReference,
        from: &str,
        writable: bool,
    ) -> std::result::Result<Box<dyn Storage>, String> {
        if reference.name.is_empty() {
            return Err("the image does not say its name".to_owned());
        }
        self.open_plain(&reference.name, from, writable)
    }
}

impl PlainFiles {
    fn open_plain(
        &self,
        name: &[u8],
        from: &str,
        writable: bool,
    ) -> std::result::Result<Box<dyn Storage>, String> {
        let path = Self::resolve(name, from)?;
        if !self.below.is_empty() {
            let real = path.canonicalize().map_err(|error| error.to_string())?;
            let allowed = self.below.iter().any(|directory| {
                directory
                    .canonicalize()
                    .is_ok_and(|directory| real.starts_with(directory))
            });
            if !allowed || real.components().any(|part| part == Component::ParentDir) {
                return Err("it lies outside the allowed directories".to_owned());
            }
        }
        FileStorage::open(&path, writable, self.sharing)
            .map(|storage| -> Box<dyn Storage> { Box::new(storage) })
            .map_err(|error| format!("{}: {error}", path.display()))
    }
}

/// The layer right below an image.
#[derive(Debug)]
pub(crate) enum Layer {
    Image(Box<Image>),
    Raw { file: ImageFile, size: u64 },
}

impl Layer {
    /// Opens what `reference` names, through the gate.
    pub(crate) fn open(
        reference: &BackingReference,
        file: &ImageFile,
        options: &OpenOptions,
    ) -> Result<Self> {
        let refuse = |reason: String| {
            let name = String::from_utf8_lossy(&reference.name).into_owned();
            file.unsupported(Feature::Backing { name, reason })
        };
        if reference.format != "qcow2" && reference.format != "raw" {
            let reason = match reference.format.as_str() {
                "" => "the image does not say its format, and formats are not guessed".to_owned(),
                format => format!("format {format:?} is not supported"),
            };
            return Err(refuse(reason));
        }
        if options.depth + 1 >= limits::MAX_BACKING_DEPTH {
            return Err(refuse(
                "the backing chain is too long, or a cycle".to_owned(),
            ));
        }
        let depth = options.depth + 1;
        let writable = depth == options.writable_layer;
        let storage = match writable {
            true => options.gate.open_for_writing(reference, file.name()),
            false => options.gate.open(reference, file.name()),
        }
        .map_err(refuse)?;
        if reference.format == "raw" {
            let file = ImageFile::new(storage);
            let size = file.len()?;
            return Ok(Self::Raw { file, size });
        }
        let below = OpenOptions {
            writable,
            gate: Arc::clone(&options.gate),
            depth,
            writable_layer: options.writable_layer,
            repair_dirty: options.repair_dirty,
        };
        Image::open(storage, below).map(|image| Self::Image(Box::new(image)))
    }

    /// Whether a file is this layer, or one of those that its data comes from.
    pub(crate) fn is_made_of(&self, identity: FileIdentity) -> bool {
        match self {
            Self::Image(image) => image.is_made_of(identity),
            Self::Raw { file, .. } => file.storage().identity() == Some(identity),
        }
    }

    /// What error messages call it.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Image(image) => image.name(),
            Self::Raw { file, .. } => file.name(),
        }
    }

    /// Virtual size of the layer.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Image(image) => image.size(),
            Self::Raw { size, .. } => *size,
        }
    }

    /// Reads; beyond the layer's end there are zeros.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let present = to_usize(self.size().saturating_sub(offset).min(to_u64(buf.len())));
        let (inside, beyond) = buf.split_at_mut(present);
        beyond.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        match self {
            Self::Image(image) => image.read(inside, offset),
            Self::Raw { file, .. } => file.read(inside, HostOffset(offset), "read backing file"),
        }
    }
}

impl Image {
    /// The layer `depth` below this image, if the chain goes so far.
    pub(crate) fn layer(&self, depth: usize) -> Option<&Layer> {
        match (depth, &self.backing) {
            (0, _) | (_, None) => None,
            (1, Some(layer)) => Some(layer),
            (_, Some(Layer::Image(image))) => image.layer(depth - 1),
            (_, Some(Layer::Raw { .. })) => None,
        }
    }

    /// What the files of its layers are called, this image first.
    pub fn layer_names(&self) -> Vec<&str> {
        let below = (1..).map_while(|depth| self.layer(depth)).map(Layer::name);
        std::iter::once(self.name()).chain(below).collect()
    }
}
