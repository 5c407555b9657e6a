//! `create`: a new, empty image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::json;
use tidemark_qcow2::{
    BackingReference, CreateOptions, DataFileReference, FileStorage, Gate, Image, MemoryStorage,
    OpenOptions, Sharing, Storage,
};

use crate::cmd::info::full_name;
use crate::creation::{self, Creation};
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{Gates, Share};
use crate::out::{Out, say};
use crate::size;

/// Create an empty image; an existing file is replaced
#[derive(Args, Debug)]
pub(crate) struct Create {
    /// Format of the new image
    #[arg(short = 'f', value_name = "FMT", default_value = "qcow2")]
    format: String,
    /// Options of the image, as KEY=VALUE,...; `-o help` lists them
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<String>,
    /// Image that shows through where nothing is written
    #[arg(short = 'b', value_name = "BACKING")]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', value_name = "FMT")]
    backing_format: Option<String>,
    /// Do not look at the backing file
    #[arg(short = 'u')]
    unsafe_backing: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    gates: Gates,
    /// Image to create
    #[arg(required_unless_present = "options")]
    image: Option<PathBuf>,
    /// Size of the disk; without it that of the backing file
    #[arg(value_parser = size::parse)]
    size: Option<u64>,
}

impl Create {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        if self.format != "qcow2" {
            let format = &self.format;
            return Err(Failure::unsupported(format!(
                "format '{format}' cannot be created, only qcow2"
            )));
        }
        if creation::wants_help(&self.options) {
            out.text(&creation::help())?;
            return Ok(Exit::Done);
        }
        let path = self
            .image
            .as_deref()
            .ok_or_else(|| Failure::usage("no IMAGE given; try 'tidemark create --help'"))?;
        let wanted = self.wanted()?;
        let backing = wanted.backing_reference()?;
        let backing_size = match &backing {
            Some(reference) if !self.unsafe_backing => Some(look_at(&self.gates, path, reference)?),
            _ => None,
        };
        let size = wanted.size.or(backing_size).ok_or_else(|| {
            Failure::usage(format!("{}: no SIZE given, as in 10G", path.display()))
        })?;
        let image = make(path, &wanted, size, backing)?;
        let size = image.size();
        image.close()?;
        self.answer(out, path, size, &wanted)?;
        Ok(Exit::Done)
    }

    /// What `-o`, `-b`, `-F` and SIZE come to.
    fn wanted(&self) -> Outcome<Creation> {
        let mut wanted = Creation::parse(&self.options)?;
        wanted.size = wanted.size.or(self.size);
        wanted.or_backing(self.backing.as_ref(), self.backing_format.as_ref());
        Ok(wanted)
    }

    fn answer(&self, out: &mut Out, path: &Path, size: u64, wanted: &Creation) -> Outcome<()> {
        let options = &wanted.options;
        let cluster_bytes = 1_u64 << options.cluster_bits;
        if out.is_json() {
            return out.json(&json!({
                "filename": path.display().to_string(),
                "format": "qcow2",
                "virtual-size": size,
                "cluster-size": cluster_bytes,
                "compat": if options.version == 2 { "0.10" } else { "1.1" },
                "refcount-bits": options.refcount_bits,
                "extended-l2": options.extended_l2,
                "backing-filename": wanted.backing,
                "backing-filename-format": wanted.backing_format,
            }));
        }
        if self.quiet {
            return Ok(());
        }
        let (human, clusters) = (size::human(size), size::human(cluster_bytes));
        say!(
            out,
            "{}: {human} ({size} bytes), clusters of {clusters}",
            path.display()
        )
    }
}

/// Opens the backing file of the image to come, and returns the size of its disk.
pub(crate) fn look_at(gates: &Gates, image: &Path, reference: &BackingReference) -> Outcome<u64> {
    let from = image.display().to_string();
    let name = String::from_utf8_lossy(&reference.name).into_owned();
    let share = Share { force_share: true };
    let storage = gates.gate(share).open(reference, &from).map_err(|reason| {
        Failure::new(format!(
            "backing file {name}: {reason}; -u creates without looking"
        ))
    })?;
    if reference.format == "raw" {
        let path = full_name(image, &name);
        return storage
            .len()
            .map_err(|error| Failure::io(Path::new(&path), "length", &error));
    }
    Ok(Image::open(storage, OpenOptions::reading(gates.gate(share)))?.size())
}

/// Makes the image and its data file. Options that cannot be are refused before an old file is
/// replaced. The backing file has been looked at: nothing is read of it.
pub(crate) fn make(
    path: &Path,
    wanted: &Creation,
    size: u64,
    backing: Option<BackingReference>,
) -> Outcome<Image> {
    let options = CreateOptions {
        size,
        backing,
        data_file: wanted.data_file_reference()?,
        ..wanted.options.clone()
    };
    options
        .check()
        .map_err(|mistake| Failure::usage(format!("{}: {mistake}", path.display())))?;
    let data_file = match &wanted.data_file {
        Some(name) => Some(make_data_file(path, name)?),
        None => None,
    };
    let storage = FileStorage::create(path).map_err(|error| Failure::io(path, "create", &error))?;
    let open = OpenOptions::writing(Arc::new(NewImage { data_file }));
    Ok(Image::create(Box::new(storage), &options, open)?)
}

/// Makes the data file, empty, at its place beside the image; an existing file is replaced.
fn make_data_file(image: &Path, name: &str) -> Outcome<PathBuf> {
    let path = PathBuf::from(full_name(image, name));
    if is_same_file(image, &path) {
        return Err(Failure::usage(format!(
            "-o data_file={name}: it is the image itself"
        )));
    }
    FileStorage::create(&path).map_err(|error| Failure::io(&path, "create data file", &error))?;
    Ok(path)
}

/// Whether two names are, or would be, one file.
pub(crate) fn is_same_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    if let (Ok(one), Ok(other)) = (std::fs::metadata(one), std::fs::metadata(other)) {
        return (one.dev(), one.ino()) == (other.dev(), other.ino());
    }
    let place = |path: &Path| {
        let parent = path.parent().filter(|parent| *parent != Path::new(""));
        let parent = parent.unwrap_or(Path::new(".")).canonicalize();
        Some((parent.ok()?, path.file_name()?.to_owned()))
    };
    place(one).is_some_and(|one| place(other) == Some(one))
}

/// The files around an image that is being made: its data file, and a backing file that has been
/// looked at and of which nothing is read.
#[derive(Debug)]
struct NewImage {
    data_file: Option<PathBuf>,
}

impl Gate for NewImage {
    fn open(&self, backing: &BackingReference, _from: &str) -> Result<Box<dyn Storage>, String> {
        if backing.format == "qcow2" {
            return Ok(Box::new(MemoryStorage::from_bytes(empty_image())));
        }
        Ok(Box::new(MemoryStorage::new()))
    }

    fn open_data(
        &self,
        _reference: &DataFileReference,
        _from: &str,
        writable: bool,
    ) -> Result<Box<dyn Storage>, String> {
        let path = self.data_file.as_deref().unwrap_or(Path::new(""));
        match FileStorage::open(path, writable, Sharing::Exclusive) {
            Ok(storage) => Ok(Box::new(storage)),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// The shortest header that opens: version 2, a disk without a byte.
fn empty_image() -> Vec<u8> {
    let mut bytes = vec![0; 72];
    for (at, value) in [
        (0, 0x5146_49fb_u32),
        (4, 2),
        (20, 16),
        (52, 65_536),
        (56, 1),
    ] {
        let end: usize = at + 4;
        bytes[at..end].copy_from_slice(&value.to_be_bytes());
    }
    bytes
}
