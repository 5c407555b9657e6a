//! What a directory holds: its manifests, in order, and how they build on each other.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tidemark_qcow2::chain::Identity;

use super::manifest::{self, DiskEntry, Manifest};
use super::verify::{Defect, Finding};
use super::{Error, Result};

/// The points of a directory. Of targets nothing was read.
#[derive(Clone, Debug)]
pub struct Catalogue {
    directory: PathBuf,
    points: Vec<Manifest>,
    damaged: Vec<Finding>,
}

/// One disk of one point.
#[derive(Clone, Copy, Debug)]
pub struct Link<'a> {
    /// The point.
    pub point: &'a Manifest,
    /// The disk.
    pub entry: &'a DiskEntry,
}

/// Reads all manifests of a directory. A directory that does not exist has none.
///
/// # Errors
/// [`Error::Io`] when the directory or a manifest cannot be read. One that is damaged is a finding
/// and hides no other.
pub fn catalogue(directory: &Path) -> Result<Catalogue> {
    let mut found = Catalogue {
        directory: directory.to_owned(),
        points: Vec::new(),
        damaged: Vec::new(),
    };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(Error::io("list", directory)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(Error::io("list", directory))?.file_name();
        let name = name.to_string_lossy().into_owned();
        if name.ends_with(manifest::SUFFIX) && !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    for name in names {
        match Manifest::load(directory, &name) {
            Ok(point) => found.points.push(point),
            Err(Error::Damaged(finding)) => found.damaged.push(finding),
            Err(error) => return Err(error),
        }
    }
    found
        .points
        .sort_by_key(|point| (point.sequence, point.created, point.identity));
    Ok(found)
}

impl Catalogue {
    /// The points, oldest first.
    pub fn points(&self) -> &[Manifest] {
        &self.points
    }

    /// Manifests that cannot be believed.
    pub fn damaged(&self) -> &[Finding] {
        &self.damaged
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The disk at the point `at`, a name of a checkpoint or an identity; without it at the newest
    /// that has the disk. A name that was taken again means the newest that had it.
    ///
    /// # Errors
    /// [`Error::NoSuchPoint`]; [`Error::NoSuchDisk`].
    pub fn find(&self, disk: &str, at: Option<&str>) -> Result<Link<'_>> {
        let is_meant = |point: &&Manifest| match at {
            None => true,
            Some(at) => point.checkpoint.as_deref() == Some(at) || point.identity.to_string() == at,
        };
        let mut known = false;
        for point in self.points.iter().rev().filter(is_meant) {
            known = true;
            if let Some(entry) = point.disk(disk) {
                return Ok(Link { point, entry });
            }
        }
        match at {
            Some(at) if !known => Err(Error::NoSuchPoint(at.to_owned())),
            _ => Err(Error::NoSuchDisk(disk.to_owned())),
        }
    }

    /// The newest point of an identity.
    pub fn point(&self, identity: Identity) -> Option<&Manifest> {
        let mut newest_first = self.points.iter().rev();
        newest_first.find(|point| point.identity == identity)
    }

    /// What a disk's target needs to be read, itself first, the full one last. All files exist and
    /// have their length.
    ///
    /// # Errors
    /// [`Error::Damaged`] for the first link that does not hold.
    pub fn chain<'a>(&'a self, link: Link<'a>) -> Result<Vec<Link<'a>>> {
        let mut links = vec![link];
        let mut at = link;
        self.look(at)?;
        while let Some(parent) = self.parent(at)? {
            self.look(parent)?;
            links.push(parent);
            at = parent;
        }
        Ok(links)
    }

    /// The target below a disk's target; none below a full one.
    pub(super) fn parent<'a>(&'a self, link: Link<'a>) -> Result<Option<Link<'a>>> {
        let Some(backing) = &link.entry.backing else {
            return Ok(None);
        };
        let broken = |defect: Defect| Err(defect.in_file(&link.entry.path).into());
        let parent = self.points.iter().rev().find_map(|point| {
            let entry = point.disk(&link.entry.disk)?;
            let is_it = point.identity == backing.identity && entry.path == backing.path;
            is_it.then_some(Link { point, entry })
        });
        match parent {
            None => broken(Defect::NoParent(backing.identity)),
            // Older in sequence, so that following parents ends.
            Some(parent) if parent.point.sequence < link.point.sequence => Ok(Some(parent)),
            Some(_) => broken(Defect::Unreadable("it builds on a later backup".to_owned())),
        }
    }

    fn look(&self, link: Link<'_>) -> Result<()> {
        let path = self.directory.join(&link.entry.path);
        let damaged = |defect: Defect| Err(defect.in_file(&link.entry.path).into());
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => damaged(Defect::Missing),
            Err(error) => Err(Error::io("look at", &path)(error)),
            Ok(found) if found.len() != link.entry.file_bytes => damaged(Defect::Length {
                expected: link.entry.file_bytes,
                found: found.len(),
            }),
            Ok(_) => Ok(()),
        }
    }
}
