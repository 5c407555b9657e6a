//! Descriptors outside the images: one XML file a checkpoint, in one directory.
//!
//! # Invariants
//! 1. A file is published whole: written beside, synced, renamed, and the directory synced.
//! 2. A descriptor that cannot be read is named and skipped; it hides no other.
//! 3. A directory that does not exist is an empty store. Reading creates nothing.
//! 4. Whoever changes descriptors holds the directory's lock, from the look at what is there to the
//!    last change; readers need none, for what they find is whole.
//! 5. Elements of others are kept.

mod depth;
mod descriptor;
mod read;
mod redact;
mod write;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tempfile::NamedTempFile;

pub use descriptor::{DescribedDisk, Descriptor, NAMESPACE};

use crate::{Error, Problem, Result, name};

/// Largest descriptor read: a domain's definition inside is a few hundred KiB at the most.
const MAX_DESCRIPTOR_BYTES: usize = 16 << 20;
const SUFFIX: &str = ".xml";
const STAGED: &str = ".staged-";
/// No writer is that long between staging and publishing.
const ABANDONED: Duration = Duration::from_secs(3600);

/// A directory of descriptors.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

/// The right to change a store; other processes wait for it.
#[derive(Debug)]
pub(crate) struct Held {
    /// None where the directory does not exist yet.
    _lock: Option<Flock<File>>,
}

/// A descriptor that is on the disk but not yet under its name.
#[derive(Debug)]
pub(crate) struct Staged {
    file: NamedTempFile,
    target: PathBuf,
}

impl Store {
    /// The store in `directory`, which is created by the first descriptor written.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Waits until no other process changes descriptors, and keeps them out.
    pub(crate) fn hold(&self) -> Result<Held> {
        let failed = self.failed("lock", &self.directory);
        let mut directory = match File::open(&self.directory) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Held { _lock: None });
            }
            Err(source) => return Err(failed(source)),
        };
        loop {
            match Flock::lock(directory, FlockArg::LockExclusive) {
                Ok(lock) => {
                    self.sweep();
                    return Ok(Held { _lock: Some(lock) });
                }
                Err((back, Errno::EINTR)) => directory = back,
                Err((_, error)) => return Err(failed(error.into())),
            }
        }
    }

    /// Removes what a writer that died left unpublished. What cannot be removed does no harm.
    fn sweep(&self) {
        let entries = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten();
        for entry in entries {
            let is_staged = entry
                .file_name()
                .to_str()
                .is_some_and(|n| n.starts_with(STAGED));
            let written = entry.metadata().and_then(|metadata| metadata.modified());
            let age = written.ok().and_then(|written| written.elapsed().ok());
            if is_staged && age.is_some_and(|age| age > ABANDONED) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// All descriptors by name, and those that cannot be read.
    ///
    /// # Errors
    /// [`Error::Store`] when the directory exists and cannot be listed.
    pub fn read_all(&self) -> Result<(Vec<Descriptor>, Vec<Problem>)> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((Vec::new(), Vec::new()));
            }
            Err(source) => return Err(self.failed("list", &self.directory)(source)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(self.failed("list", &self.directory))?;
            let file = entry.file_name();
            if let Some(file) = file.to_str().filter(|file| !file.starts_with('.')) {
                names.extend(file.strip_suffix(SUFFIX).map(ToOwned::to_owned));
            }
        }
        names.sort();
        let (mut descriptors, mut problems) = (Vec::new(), Vec::new());
        for name in names {
            match self.read_file(&name) {
                Ok(Some(descriptor)) => descriptors.push(descriptor),
                Ok(None) => {}
                Err(reason) => {
                    let file = format!("{name}{SUFFIX}");
                    problems.push(Problem::DamagedDescriptor { file, reason });
                }
            }
        }
        Ok((descriptors, problems))
    }

    /// The descriptor of one checkpoint, if there is one.
    ///
    /// # Errors
    /// [`Error::BadName`]; [`Error::Xml`] when it cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Descriptor>> {
        name::check(name)?;
        self.read_file(name)
            .map_err(|reason| Error::Xml(format!("{name}{SUFFIX}: {reason}")))
    }

    /// Writes a descriptor, replacing one of the same name.
    ///
    /// # Errors
    /// [`Error::BadName`]; [`Error::Store`] when it cannot be written; the old one stays then.
    pub fn write(&self, descriptor: &Descriptor) -> Result<()> {
        self.stage(descriptor)?.publish()
    }

    /// Removes a descriptor, also a damaged one; says whether there was one.
    ///
    /// # Errors
    /// [`Error::BadName`]; [`Error::Store`].
    pub fn remove(&self, name: &str) -> Result<bool> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(self.failed("remove", &path)(source)),
        }
        sync(&self.directory).map_err(self.failed("sync", &self.directory))?;
        Ok(true)
    }

    /// Writes a descriptor durably, not yet under its name, so that what remains to be done when
    /// its checkpoint exists cannot run out of space.
    pub(crate) fn stage(&self, descriptor: &Descriptor) -> Result<Staged> {
        let target = self.path(&descriptor.name)?;
        let write = || -> io::Result<NamedTempFile> {
            fs::create_dir_all(&self.directory)?;
            let mut file = tempfile::Builder::new()
                .prefix(STAGED)
                .tempfile_in(&self.directory)?;
            file.write_all(descriptor.to_xml().as_bytes())?;
            file.as_file().sync_all()?;
            Ok(file)
        };
        let file = write().map_err(self.failed("write", &target))?;
        Ok(Staged { file, target })
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        name::check(name)?;
        Ok(self.directory.join(format!("{name}{SUFFIX}")))
    }

    fn read_file(&self, name: &str) -> std::result::Result<Option<Descriptor>, String> {
        let path = self.path(name).map_err(|error| error.to_string())?;
        let kind = match fs::metadata(&path) {
            Ok(metadata) => metadata.file_type(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        if !kind.is_file() {
            return Err("not a regular file".to_owned());
        }
        let mut text = String::new();
        let file = File::open(&path).map_err(|error| error.to_string())?;
        let bound = u64::try_from(MAX_DESCRIPTOR_BYTES).unwrap_or(u64::MAX);
        file.take(bound.saturating_add(1))
            .read_to_string(&mut text)
            .map_err(|error| error.to_string())?;
        let descriptor = Descriptor::parse(&text).map_err(|error| error.to_string())?;
        if descriptor.name != name {
            return Err(format!("it describes '{}'", descriptor.name));
        }
        Ok(Some(descriptor))
    }

    fn failed<'a>(
        &self,
        operation: &'static str,
        path: &'a Path,
    ) -> impl Fn(io::Error) -> Error + use<'a> {
        move |source| Error::Store {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}

impl Staged {
    /// Gives the descriptor its name.
    pub(crate) fn publish(self) -> Result<()> {
        let target = self.target;
        let failed = |source| Error::Store {
            operation: "publish",
            path: target.clone(),
            source,
        };
        self.file
            .persist(&target)
            .map_err(|error| failed(error.error))?;
        target.parent().map_or(Ok(()), sync).map_err(failed)
    }
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
