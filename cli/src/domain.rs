//! The domain that a command acts on: its disks, and where its descriptors are.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use tidemark_checkpoint::{Disk, Domain, DomainOptions, Store};
use tidemark_qcow2::Image;

use crate::exit::{Failure, Outcome};
use crate::open::{Gates, Share, read_alone, write_alone};
use crate::out::warn;

/// Name of the disk when a command was given an image and nothing else.
const ONLY_DISK: &str = "vda";

/// Which disks, and where their descriptors are.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Disks {
    /// A disk of the domain and its image (may be repeated)
    #[arg(long, value_name = "NAME=PATH", conflicts_with_all = ["domain_xml", "image"])]
    disk: Vec<String>,
    /// Take the disks from a libvirt domain definition
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    domain_xml: Option<PathBuf>,
    /// Directory of descriptors; without it checkpoints live in the images alone
    #[arg(long, value_name = "DIR")]
    metadata: Option<PathBuf>,
    /// Image of the only disk, which is then called vda
    image: Option<PathBuf>,
}

/// What a command is going to do with the images.
#[derive(Clone, Debug)]
pub(crate) enum Access {
    /// Look at bitmaps and chain records.
    Look(Share),
    /// Change them.
    Change,
    /// Change them, and read guest data through the backing chain.
    Copy(Gates),
    /// Read guest data through the backing chain.
    Read(Gates, Share),
}

/// A disk as the command line names it.
struct Named {
    name: String,
    path: PathBuf,
    read_only: bool,
}

/// An open domain. Images that were changed must be closed.
pub(crate) struct Open {
    pub(crate) domain: Domain,
}

impl Disks {
    /// One image and, if any, a directory of descriptors.
    pub(crate) fn only(image: PathBuf, metadata: Option<PathBuf>) -> Self {
        Self {
            metadata,
            ..Self::default()
        }
        .with_image(image)
    }

    /// Whether disks were named by an option, so that a position is no image.
    pub(crate) fn are_named(&self) -> bool {
        !self.disk.is_empty() || self.domain_xml.is_some()
    }

    /// Whether no disk was named at all.
    pub(crate) fn is_empty(&self) -> bool {
        !self.are_named() && self.image.is_none()
    }

    /// Takes a position that turned out to be the image.
    pub(crate) fn with_image(mut self, image: PathBuf) -> Self {
        self.image = Some(image);
        self
    }

    /// The same disks without descriptors.
    pub(crate) fn without_metadata(&self) -> Self {
        Self {
            metadata: None,
            ..self.clone()
        }
    }

    /// Opens all disks.
    pub(crate) fn open(&self, access: &Access) -> Outcome<Open> {
        let (named, definition) = self.named()?;
        let mut disks = Vec::new();
        for disk in named {
            let image = Arc::new(disk.open(access)?);
            disks.push(Disk {
                name: disk.name,
                image,
            });
        }
        let options = DomainOptions {
            store: self.metadata.as_ref().map(Store::new),
            definition,
            read_only: false,
        };
        Ok(Open {
            domain: Domain::new(disks, options)?,
        })
    }

    fn named(&self) -> Outcome<(Vec<Named>, Option<String>)> {
        if let Some(path) = &self.image {
            return Ok((vec![Named::new(ONLY_DISK, path)], None));
        }
        if let Some(path) = &self.domain_xml {
            return from_definition(path);
        }
        if self.disk.is_empty() {
            let message = "no disk given: name an IMAGE, or --disk NAME=PATH, or --domain-xml FILE";
            return Err(Failure::usage(message));
        }
        let mut named = Vec::new();
        for option in &self.disk {
            match option.split_once('=') {
                Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                    named.push(Named::new(name, Path::new(path)));
                }
                _ => {
                    let advice = "write NAME=PATH, as in vda=disk.qcow2";
                    return Err(Failure::usage(format!("--disk {option}: {advice}")));
                }
            }
        }
        Ok((named, None))
    }
}

impl Named {
    fn new(name: &str, path: &Path) -> Self {
        Self {
            name: name.to_owned(),
            path: path.to_owned(),
            read_only: false,
        }
    }

    fn open(&self, access: &Access) -> Outcome<Image> {
        let path = &self.path;
        match access {
            Access::Look(share) => read_alone(path, *share),
            Access::Change if self.read_only => read_alone(path, Share::default()),
            Access::Change => write_alone(path),
            Access::Copy(gates) if self.read_only => gates.read(path, Share::default()),
            Access::Copy(gates) => gates.write(path),
            Access::Read(gates, share) => gates.read(path, *share),
        }
    }
}

impl Open {
    /// Lets go of all images; what was changed is then as narrow on disk as it can be.
    pub(crate) fn close(self) -> Outcome<()> {
        let images: Vec<Arc<Image>> = self
            .domain
            .disks()
            .iter()
            .map(|disk| Arc::clone(&disk.image))
            .collect();
        drop(self.domain);
        for image in images {
            // Somebody who still holds a handle closes it as a crash would: safe, only wider.
            if let Some(image) = Arc::into_inner(image) {
                image.close()?;
            }
        }
        Ok(())
    }
}

/// Disks of a libvirt domain definition, and the definition itself.
fn from_definition(path: &Path) -> Outcome<(Vec<Named>, Option<String>)> {
    let text = std::fs::read_to_string(path).map_err(|error| Failure::io(path, "read", &error))?;
    let wrong = |problem: String| {
        Failure::new(format!(
            "{}: not a libvirt domain definition: {problem}",
            path.display()
        ))
    };
    let document = roxmltree::Document::parse(&text).map_err(|error| wrong(error.to_string()))?;
    let root = document.root_element();
    if !root.has_tag_name("domain") {
        return Err(wrong(format!("its root is <{}>", root.tag_name().name())));
    }
    let disks = root
        .children()
        .filter(|node| node.has_tag_name("devices"))
        .flat_map(|devices| devices.children())
        .filter(|node| node.has_tag_name("disk"));
    let named: Vec<Named> = disks.filter_map(described).collect();
    if named.is_empty() {
        return Err(wrong("it has no qcow2 disk in a file".to_owned()));
    }
    Ok((
        named,
        Some(text.get(root.range()).unwrap_or_default().to_owned()),
    ))
}

/// A disk that can take part: a qcow2 image in a file or on a block device.
fn described(disk: roxmltree::Node<'_, '_>) -> Option<Named> {
    let child = |name: &str| disk.children().find(|node| node.has_tag_name(name));
    let name = child("target")?.attribute("dev")?;
    if !matches!(disk.attribute("device"), None | Some("disk")) {
        return None;
    }
    let format = child("driver").and_then(|driver| driver.attribute("type"));
    if format != Some("qcow2") {
        let format = format.unwrap_or("not said");
        warn(format_args!(
            "disk '{name}' takes no part: its format is {format}, not qcow2"
        ));
        return None;
    }
    let source = child("source");
    let attribute = |name| source.and_then(|source| source.attribute(name));
    let Some(path) = attribute("file").or_else(|| attribute("dev")) else {
        warn(format_args!(
            "disk '{name}' takes no part: its image is in no file"
        ));
        return None;
    };
    let read_only = child("readonly").is_some();
    Some(Named {
        name: name.to_owned(),
        path: PathBuf::from(path),
        read_only,
    })
}
