//! Files that appear whole or not at all.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::{Error, Result};

/// Suffix of files that belong to nobody yet.
const PARTIAL_SUFFIX: &str = ".partial";

/// A file beside `target` that vanishes unless it is published.
pub(super) fn temporary(target: &Path) -> Result<NamedTempFile> {
    let directory = directory_of(target);
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(PARTIAL_SUFFIX)
        // As any program's new file: the user's mask decides.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .map_err(Error::io("create", target))
}

/// Makes a temporary file durable and gives it its name, unless something has that name.
pub(super) fn publish(file: NamedTempFile, target: &Path) -> Result<()> {
    file.as_file()
        .sync_all()
        .map_err(Error::io("sync", target))?;
    match file.persist_noclobber(target) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
            Err(Error::TargetExists(target.to_owned()))
        }
        Err(error) => Err(Error::io("rename", target)(error.error)),
    }
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io("sync", directory))
}

/// Creates a directory where it is missing, durably.
pub(super) fn create_directory(directory: &Path) -> Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(directory).map_err(Error::io("create directory", directory))?;
    sync_directory(directory_of(directory))
}

/// The directory that a path's last name is in.
pub(super) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Names that were published for something that is not yet true; removed again unless kept.
#[derive(Debug, Default)]
pub(super) struct Provisional {
    paths: Vec<PathBuf>,
}

impl Provisional {
    pub(super) fn publish(&mut self, file: NamedTempFile, target: PathBuf) -> Result<()> {
        publish(file, &target)?;
        self.paths.push(target);
        Ok(())
    }

    pub(super) fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for Provisional {
    fn drop(&mut self) {
        // The manifest was the last: it must not name what is gone.
        for path in self.paths.iter().rev() {
            // What cannot be removed is an orphan: in the way of nothing, named by no manifest.
            let _ = fs::remove_file(path);
        }
    }
}
