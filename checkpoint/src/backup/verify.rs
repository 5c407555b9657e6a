//! Whether a directory is what its manifests say, to the last bit.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use tidemark_qcow2::Storage;
use tidemark_qcow2::chain::Identity;

use super::catalogue::{Catalogue, Link, catalogue};
use super::hashes::Run;
use super::manifest::{self, Format};
use super::reader::Reader;
use super::units::{PIECE_BYTES, WINDOW_BYTES, is_zero, steps, to_usize, with_buffer};
use super::{Error, Result, layout};

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Defect {
    /// It is not there.
    Missing,
    /// It is longer or shorter than it was.
    Length {
        /// Bytes it had.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// It cannot be understood.
    Unreadable(String),
    /// It differs from its hash.
    Checksum,
    /// Its size, its cluster size or its backing file is not what it was.
    Header,
    /// Something in it that is not data differs: header, tables or reference counts.
    Layout,
    /// It holds other data for these bytes of the disk than it did.
    Data(Range<u64>),
    /// What it builds on is not in the directory, or cannot be believed.
    NoParent(Identity),
}

impl fmt::Display for Defect {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => out.write_str("it is missing"),
            Self::Length { expected, found } => {
                write!(out, "it has {found} bytes and had {expected}")
            }
            Self::Unreadable(reason) => out.write_str(reason),
            Self::Checksum => out.write_str("it differs from its checksum"),
            Self::Header => out.write_str("its header is not what it was"),
            Self::Layout => out.write_str("its header, tables or reference counts differ"),
            Self::Data(range) => {
                write!(
                    out,
                    "bytes {}..{} of the disk differ",
                    range.start, range.end
                )
            }
            Self::NoParent(identity) => write!(out, "it builds on backup {identity}, not found"),
        }
    }
}

impl Defect {
    pub(super) fn in_file(self, file: &str) -> Finding {
        Finding {
            file: file.to_owned(),
            defect: self,
        }
    }
}

/// One defect with its file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {defect}")]
pub struct Finding {
    /// Name in the directory.
    pub file: String,
    /// What is wrong with it.
    pub defect: Defect,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Points looked at.
    pub points: usize,
    /// Bytes of data whose hashes were computed.
    pub bytes: u64,
    /// What is damaged; nothing if the directory is sound.
    pub findings: Vec<Finding>,
    /// Files that no manifest names: a killed backup leaves some, and they harm nothing.
    pub strangers: Vec<String>,
}

impl Verification {
    /// Whether every point can be restored.
    pub fn is_sound(&self) -> bool {
        self.findings.is_empty()
    }
}

/// Reads every file of every point of a directory and compares all of it with its hashes.
///
/// # Errors
/// [`Error::Io`], [`Error::Target`] when something cannot be read at all. Damage is no error.
pub fn verify(directory: &Path) -> Result<Verification> {
    // Unlike a catalogue, what is not there cannot be sound.
    fs::metadata(directory).map_err(Error::io("open", directory))?;
    let catalogue = catalogue(directory)?;
    let mut answer = Verification {
        points: catalogue.points().len(),
        findings: catalogue.damaged().to_vec(),
        strangers: strangers(&catalogue)?,
        ..Verification::default()
    };
    for point in catalogue.points() {
        for entry in &point.disks {
            check(&catalogue, Link { point, entry }, &mut answer)?;
        }
    }
    Ok(answer)
}

fn check(catalogue: &Catalogue, link: Link<'_>, answer: &mut Verification) -> Result<()> {
    let mut note = |outcome: Result<()>| match outcome {
        Err(Error::Damaged(finding)) => {
            answer.findings.push(finding);
            Ok(())
        }
        other => other,
    };
    note(catalogue.parent(link).map(|_| ()))?;
    let reader = match Reader::open(catalogue.directory(), link) {
        Ok(reader) => reader,
        Err(error) => return note(Err(error)),
    };
    let entry = link.entry;
    let path = catalogue.directory().join(&entry.path);
    // Damaged tables can keep the layout from being read at all.
    let found = match layout::hash(&path, entry.format) {
        Ok(hash) => Some(hash),
        Err(Error::Target { source, .. }) if source.damage().is_some() => None,
        Err(error) => return Err(error),
    };
    if found != Some(entry.layout_blake3) {
        answer.findings.push(Defect::Layout.in_file(&entry.path));
    }
    for run in reader.runs().iter().filter(|run| !run.is_zero()) {
        answer.bytes += run.range.end - run.range.start;
    }
    let mut bad = changed_blocks(&reader)?;
    if entry.format == Format::Raw {
        bad.extend(unexpected_data(&reader, entry.size)?);
    }
    bad.sort_unstable_by_key(|range| range.start);
    let damaged = joined(bad)
        .into_iter()
        .map(|range| Defect::Data(range).in_file(&entry.path));
    answer.findings.extend(damaged);
    Ok(())
}

/// Blocks that are not what they were.
fn changed_blocks(reader: &Reader) -> Result<Vec<Range<u64>>> {
    let runs: Vec<&Run> = reader.runs().iter().filter(|run| !run.is_zero()).collect();
    let bad: Vec<Vec<Range<u64>>> = runs
        .into_par_iter()
        .flat_map_iter(|run| steps(run.range.clone(), PIECE_BYTES).map(move |range| (run, range)))
        .map(|(run, range)| {
            with_buffer(range.end - range.start, |buffer| {
                reader.read(run, &range, buffer)
            })
        })
        .collect::<Result<_>>()?;
    Ok(bad.into_iter().flatten().collect())
}

/// Bytes of a raw target that were never written and are not zero.
fn unexpected_data(reader: &Reader, size: u64) -> Result<Vec<Range<u64>>> {
    let Some(file) = reader.raw() else {
        return Ok(Vec::new());
    };
    let mut gaps = Vec::new();
    let mut at = 0;
    for run in reader.runs() {
        gaps.push(at..run.range.start);
        at = run.range.end;
    }
    gaps.push(at..size);
    let failed = |error| Error::io("read", Path::new(&file.name()))(error);
    let mut bad = Vec::new();
    let mut buffer = Vec::new();
    for window in gaps.into_iter().flat_map(|gap| steps(gap, WINDOW_BYTES)) {
        let mut at = window.start;
        while at < window.end {
            at = at.saturating_add(file.hole_at(at).map_err(failed)?);
            let Some(step) = steps(at..window.end, PIECE_BYTES).next() else {
                break;
            };
            buffer.resize(to_usize(step.end - step.start), 0);
            let count = file.read_at(&mut buffer, step.start).map_err(failed)?;
            if !is_zero(&buffer[..count]) {
                bad.push(step.clone());
            }
            at = step.end;
        }
    }
    Ok(bad)
}

fn joined(sorted: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Files of the directory that belong to no point.
fn strangers(catalogue: &Catalogue) -> Result<Vec<String>> {
    let known: HashSet<&str> = catalogue
        .points()
        .iter()
        .flat_map(|point| &point.disks)
        .flat_map(|entry| [entry.path.as_str(), entry.hashes.as_str()])
        .collect();
    let directory = catalogue.directory();
    let mut strangers = Vec::new();
    for entry in fs::read_dir(directory).map_err(Error::io("list", directory))? {
        let name = entry.map_err(Error::io("list", directory))?.file_name();
        let name = name.to_string_lossy().into_owned();
        if !known.contains(name.as_str()) && !name.ends_with(manifest::SUFFIX) {
            strangers.push(name);
        }
    }
    strangers.sort();
    Ok(strangers)
}
