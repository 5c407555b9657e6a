//! One point: what each disk counts from, its copy, and their publication.

use std::ops::ControlFlow;

use tidemark_qcow2::chain::Identity;

use super::base::Plan;
use super::catalogue::{Catalogue, catalogue};
use super::copy::{Copied, Job};
use super::manifest::{self, DiskEntry, Format, Manifest, Mode, Since};
use super::options::{BackupOptions, Progress, Report};
use super::target::Shape;
use super::{Error, Result, files};
use crate::{Disk, DiskChange, Domain, SinceOptions, settle};

/// Largest and smallest cluster of a target, as powers of two: what a changed byte costs, and
/// what a disk costs in tables and hashes.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 12..=16;
/// Longest part of a name that goes into a file's name.
const MAX_LABEL_BYTES: usize = 80;
/// Digits of the identity in a file's name: enough that two never meet in one directory.
const IDENTITY_DIGITS: usize = 16;

/// What changed since a checkpoint, on all disks.
pub(super) struct Question {
    since: Option<Since>,
    changes: Vec<DiskChange>,
}

impl Question {
    pub(super) fn ask(domain: &Domain, options: &BackupOptions) -> Result<Self> {
        let Some(name) = &options.since else {
            return Ok(Self {
                since: None,
                changes: Vec::new(),
            });
        };
        let checkpoint = domain.lookup(name)?;
        let since = Since {
            name: name.clone(),
            identity: checkpoint.identity(),
        };
        Ok(Self {
            since: Some(since),
            changes: checkpoint.changed_since(SinceOptions::default())?,
        })
    }

    fn take(&mut self, disk: &str) -> Option<DiskChange> {
        let at = self.changes.iter().position(|change| change.disk == disk)?;
        Some(self.changes.swap_remove(at))
    }
}

/// A point that is being made.
pub(super) struct Point<'a> {
    domain: &'a Domain,
    options: &'a BackupOptions,
    catalogue: Catalogue,
    question: Question,
    manifest: Manifest,
}

impl<'a> Point<'a> {
    pub(super) fn new(
        domain: &'a Domain,
        options: &'a BackupOptions,
        question: Question,
        identity: Identity,
        checkpoint: Option<String>,
    ) -> Result<Self> {
        files::create_directory(&options.to)?;
        let catalogue = catalogue(&options.to)?;
        let last = catalogue.points().last();
        let sequence = last.map_or(1, |point| point.sequence.saturating_add(1));
        Ok(Self {
            manifest: Manifest::new(identity, checkpoint, sequence),
            domain,
            options,
            catalogue,
            question,
        })
    }

    /// Copies every disk, then publishes targets and manifest.
    pub(super) fn take(mut self) -> Result<Report> {
        let stem = self.stem();
        let mut copies = Vec::new();
        self.manifest.since = self.question.since.take();
        for disk in self.domain.disks() {
            let (entry, copied) = self.copy(disk, &stem)?;
            self.manifest.disks.push(entry);
            copies.push(copied);
        }
        let to = &self.options.to;
        let mut provisional = files::Provisional::default();
        for (entry, copied) in self.manifest.disks.iter().zip(copies) {
            provisional.publish(copied.target, to.join(&entry.path))?;
            provisional.publish(copied.hashes, to.join(&entry.hashes))?;
        }
        files::sync_directory(to)?;
        let manifest = to.join(format!("{stem}{}", manifest::SUFFIX));
        let staged = self.manifest.stage(&manifest)?;
        provisional.publish(staged, manifest)?;
        files::sync_directory(to)?;
        provisional.keep();
        Ok(Report::of(&self.manifest))
    }

    fn copy(&mut self, disk: &Disk, stem: &str) -> Result<(DiskEntry, Copied)> {
        let change = self.question.take(&disk.name);
        let plan = Plan::choose(&self.catalogue, &disk.image, change)?;
        let (changed, backing, reason) = match plan {
            Plan::Full(reason) => (None, None, reason),
            Plan::Incremental { backing, changed } => (Some(changed), Some(backing), None),
        };
        let (mode, format) = match backing {
            Some(_) => (Mode::Incremental, Format::Qcow2),
            None => (Mode::Full, self.options.format),
        };
        let (path, hashes) = self.names(disk, stem, format);
        let bits = disk.image.geometry().cluster_bits;
        let block = 1 << bits.clamp(*CLUSTER_BITS.start(), *CLUSTER_BITS.end());
        let job = Job {
            disk: &disk.name,
            image: &disk.image,
            changed: changed.as_ref(),
            shape: Shape {
                size: disk.image.size(),
                format,
                block,
                backing: backing.as_ref(),
            },
            identity: self.manifest.identity,
            target: &self.options.to.join(&path),
            hashes: &self.options.to.join(&hashes),
        };
        let copied = self.watched(&job)?;
        let file = copied.target.as_file().metadata();
        let file_bytes = file.map_err(Error::io("look at", job.target))?.len();
        let entry = DiskEntry {
            disk: disk.name.clone(),
            image: settle::record_of(&disk.image).map(|record| record.image),
            size: disk.image.size(),
            format,
            mode,
            reason,
            path,
            file_bytes,
            backing: backing.clone(),
            bytes: copied.bytes,
            block_size: block,
            hashes,
            hashes_blake3: copied.hashes_blake3,
            layout_blake3: copied.layout_blake3,
        };
        Ok((entry, copied))
    }

    fn watched(&self, job: &Job<'_>) -> Result<Copied> {
        let (mut done, total) = (0, job.total());
        job.run(|bytes| {
            done += bytes;
            let Some(watch) = &self.options.watch else {
                return Ok(());
            };
            let progress = Progress {
                disk: job.disk,
                done: done.min(total),
                total,
            };
            match watch(progress) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(Error::Stopped),
            }
        })
    }

    /// How the names of the point's files begin.
    fn stem(&self) -> String {
        let label = self.manifest.checkpoint.as_deref().unwrap_or("backup");
        let mut identity = self.manifest.identity.to_string();
        identity.truncate(IDENTITY_DIGITS);
        format!("{}-{identity}", plain(label))
    }

    /// Names of a disk's target and hashes, which no other disk of the point has.
    fn names(&self, disk: &Disk, stem: &str, format: Format) -> (String, String) {
        let mut name = plain(&disk.name);
        let is_taken = |name: &str| {
            let hashes = format!("{stem}.{name}.hashes");
            self.manifest
                .disks
                .iter()
                .any(|entry| entry.hashes == hashes)
        };
        while is_taken(&name) {
            name.push('_');
        }
        let path = format!("{stem}.{name}.{}", format.as_str());
        (path, format!("{stem}.{name}.hashes"))
    }
}

/// A name without what a path, a shell or QEMU could read as something else.
fn plain(name: &str) -> String {
    let letters = name.chars().map(|letter| match letter {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' => letter,
        '.' => '.',
        _ => '_',
    });
    letters.take(MAX_LABEL_BYTES).collect()
}
