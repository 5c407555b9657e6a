//! One backup: prepare the checkpoint, copy, publish, commit.

use std::path::Path;

use tidemark_qcow2::chain::Identity;

use super::catalogue::{Link, catalogue};
use super::options::{BackupOptions, Report};
use super::point::{Point, Question};
use super::{Error, Result};
use crate::{CreateFlags, CreateSpec, Domain, Tentative};

/// Copies all disks of a domain at one moment into a directory.
///
/// # Errors
/// Before anything is written: [`Error::Checkpoint`] for a checkpoint that cannot be asked or
/// taken, [`Error::Disk`] for a disk whose data stays closed: encrypted, or without its data file.
/// Later, [`Error::Disk`], [`Error::Target`], [`Error::Io`], [`Error::Stopped`]: the
/// directory has no new point and the domain no new checkpoint. [`Error::Uncommitted`]: the point
/// is there, and the checkpoint waits for [`Domain::tentative`](crate::Domain::tentative).
pub fn backup(domain: &Domain, options: &BackupOptions) -> Result<Report> {
    for disk in domain.disks() {
        let readable = disk.image.require_guest_data();
        readable.map_err(Error::disk(&disk.name))?;
    }
    // Asked once for what must be refused before the checkpoint is prepared.
    let since = Question::ask(domain, options)?;
    let Some(name) = &options.checkpoint else {
        let identity = Identity::random().map_err(Error::Random)?;
        let point = Point::new(domain, options, since, identity, None)?;
        let report = point.take()?;
        return Ok(report);
    };
    let spec = CreateSpec {
        name: Some(name.clone()),
        ..CreateSpec::default()
    };
    let tentative = domain.prepare(&spec, CreateFlags::NONE)?;
    // Asked again: what is written from here on is also in the new interval, so that no later
    // increment misses it, and what was written before is in this answer.
    let taken = Question::ask(domain, options).and_then(|since| {
        let name = Some(tentative.name().to_owned());
        Point::new(domain, options, since, tentative.identity(), name)?.take()
    });
    match taken {
        Ok(report) => commit(tentative).map(|()| report),
        Err(error) => {
            // If that fails too, the prepared checkpoint is found and named by what comes next.
            let _ = tentative.abandon();
            Err(error)
        }
    }
}

/// Finishes a backup that was killed after its manifest was published in `directory`: what is left
/// to do is to make its checkpoint real. `None` if no backup was killed.
///
/// # Errors
/// [`Error::NotResumable`] when the directory has no such point, whole; then only [`cancel`] ends
/// it, and the next backup copies again. [`Error::Checkpoint`]; [`Error::Uncommitted`].
pub fn resume(domain: &Domain, directory: &Path) -> Result<Option<Report>> {
    let Some(tentative) = domain.tentative()? else {
        return Ok(None);
    };
    let catalogue = catalogue(directory)?;
    let Some(point) = catalogue.point(tentative.identity()) else {
        return Err(Error::NotResumable(tentative.name().to_owned()));
    };
    for entry in &point.disks {
        catalogue.chain(Link { point, entry })?;
    }
    let report = Report::of(point);
    commit(tentative).map(|()| Some(report))
}

/// Ends what a killed backup left in the images: the checkpoint that it had prepared was never
/// there. False if there is none. A point that was already published stays; it harms nothing.
///
/// # Errors
/// [`Error::Checkpoint`].
pub fn cancel(domain: &Domain) -> Result<bool> {
    match domain.tentative()? {
        Some(tentative) => Ok(tentative.abandon().map(|()| true)?),
        None => Ok(false),
    }
}

fn commit(tentative: Tentative) -> Result<()> {
    let checkpoint = tentative.name().to_owned();
    match tentative.commit() {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::Uncommitted {
            checkpoint,
            source: Box::new(error),
        }),
    }
}
