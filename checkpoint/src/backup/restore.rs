//! Giving a disk back as it was at a point.
//!
//! The chain is laid out first: for each byte of the disk the newest target that holds it, told by
//! the hash files, which are checked whole. Nothing is written before that has succeeded. Then
//! data is copied, each block compared with its hash on the way.

use std::ops::Range;
use std::path::PathBuf;

use rayon::prelude::*;
use tidemark_qcow2::chain::Identity;

use super::catalogue::{Catalogue, Link, catalogue};
use super::hashes::Run;
use super::manifest::Format;
use super::reader::Reader;
use super::target::{Shape, Target};
use super::units::{PIECE_BYTES, outward, overlap, steps, to_usize, with_buffer};
use super::verify::Defect;
use super::{Error, Result, files};

/// Pieces copied between two looks at the first error.
const BATCH_PIECES: usize = 4096;

/// What to restore, and where to.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// The directory of backups.
    pub from: PathBuf,
    /// Name of the disk.
    pub disk: String,
    /// Name of a checkpoint, or the identity of a point; `None` for the newest of the disk.
    pub at: Option<String>,
    /// The file to make; it must not exist.
    pub to: PathBuf,
    /// Its format.
    pub format: Format,
}

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Identity of the point: a name can mean several, this one was taken.
    pub identity: Identity,
    /// Name of its checkpoint.
    pub checkpoint: Option<String>,
    /// When the backup was made, seconds since the epoch.
    pub created: u64,
    /// Virtual size of the disk, bytes.
    pub size: u64,
    /// Bytes of data that were written.
    pub bytes: u64,
}

/// Makes an image of a disk as it was at a point: a disk of its own, without backing file, bitmaps
/// or chain record, so that the next backup of it is a full one.
///
/// # Errors
/// Before anything is written: [`Error::TargetExists`], [`Error::NoSuchPoint`],
/// [`Error::NoSuchDisk`], [`Error::Damaged`] for a chain that does not hold. Later,
/// [`Error::Damaged`] for data that differs from its hash, or I/O; then there is no target.
pub fn restore(options: &RestoreOptions) -> Result<Restored> {
    if options.to.symlink_metadata().is_ok() {
        return Err(Error::TargetExists(options.to.clone()));
    }
    let catalogue = catalogue(&options.from)?;
    let link = find(&catalogue, options)?;
    let chain = Chain::open(&catalogue, link)?;
    let file = files::temporary(&options.to)?;
    let target = Target::create(
        file.path(),
        &Shape {
            size: link.entry.size,
            format: options.format,
            block: link.entry.block_size,
            backing: None,
        },
    )?;
    let bytes = chain.copy(&target)?;
    target.finish()?;
    files::publish(file, &options.to)?;
    files::sync_directory(files::directory_of(&options.to))?;
    Ok(Restored {
        identity: link.point.identity,
        checkpoint: link.point.checkpoint.clone(),
        created: link.point.created,
        size: link.entry.size,
        bytes,
    })
}

/// A point that is damaged must not look as if it had never been, nor give way to an older one.
fn find<'a>(catalogue: &'a Catalogue, options: &RestoreOptions) -> Result<Link<'a>> {
    let found = catalogue.find(&options.disk, options.at.as_deref());
    match (found, catalogue.damaged()) {
        (Err(_), [finding, ..]) => Err(finding.clone().into()),
        (Ok(_), [finding, ..]) if options.at.is_none() => Err(finding.clone().into()),
        (found, _) => found,
    }
}

/// All targets that a point needs, open, and what each gives.
struct Chain<'a> {
    links: Vec<(Link<'a>, Reader, Vec<Range<u64>>)>,
}

impl<'a> Chain<'a> {
    fn open(catalogue: &'a Catalogue, link: Link<'a>) -> Result<Self> {
        let mut links = Vec::new();
        // What no newer target holds; sorted.
        let mut open: Vec<_> = std::iter::once(0..link.entry.size).collect();
        for link in catalogue.chain(link)? {
            let reader = Reader::open(catalogue.directory(), link)?;
            // Beyond the end of a smaller disk there were zeros, whatever is below it.
            open = cut(open, link.entry.size);
            let (data, rest) = claim(open, reader.runs());
            open = rest;
            links.push((link, reader, data));
        }
        Ok(Self { links })
    }

    fn copy(&self, target: &Target) -> Result<u64> {
        let mut bytes = 0;
        for (link, reader, wanted) in &self.links {
            let mut pieces = Pieces::new(reader, wanted);
            loop {
                let batch: Vec<_> = pieces.by_ref().take(BATCH_PIECES).collect();
                if batch.is_empty() {
                    break;
                }
                bytes += batch
                    .into_par_iter()
                    .map(|(run, range)| copy_piece(link, reader, run, &range, target))
                    .try_reduce(|| 0, |a, b| Ok(a + b))?;
            }
        }
        Ok(bytes)
    }
}

/// Ranges of the disk that a target gives, each inside one data run and one piece.
struct Pieces<'a> {
    runs: std::iter::Peekable<std::slice::Iter<'a, Run>>,
    wanted: std::iter::Peekable<std::iter::Cloned<std::slice::Iter<'a, Range<u64>>>>,
}

impl<'a> Pieces<'a> {
    fn new(reader: &'a Reader, wanted: &'a [Range<u64>]) -> Self {
        Self {
            runs: reader.runs().iter().peekable(),
            wanted: wanted.iter().cloned().peekable(),
        }
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = (&'a Run, Range<u64>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let wanted = self.wanted.peek_mut()?;
            let run = *self.runs.peek()?;
            match overlap(wanted, &run.range).filter(|_| !run.is_zero()) {
                Some(common) => {
                    let piece = steps(common, PIECE_BYTES).next()?;
                    wanted.start = piece.end;
                    if wanted.is_empty() {
                        self.wanted.next();
                    }
                    return Some((run, piece));
                }
                None if run.range.end <= wanted.start || run.is_zero() => {
                    self.runs.next();
                }
                None => {
                    self.wanted.next();
                }
            }
        }
    }
}

fn copy_piece(
    link: &Link<'_>,
    reader: &Reader,
    run: &Run,
    wanted: &Range<u64>,
    target: &Target,
) -> Result<u64> {
    // A hash is of a whole block.
    let whole = outward(wanted, reader.block(), run.range.end);
    with_buffer(whole.end - whole.start, |buffer| {
        if let Some(bad) = reader.read(run, &whole, buffer)?.into_iter().next() {
            return Err(Defect::Data(bad).in_file(&link.entry.path).into());
        }
        let from = to_usize(wanted.start - whole.start);
        let len = to_usize(wanted.end - wanted.start);
        target.write(&buffer[from..from + len], wanted.start)?;
        Ok(wanted.end - wanted.start)
    })
}

fn cut(ranges: Vec<Range<u64>>, end: u64) -> Vec<Range<u64>> {
    let inside = |range: Range<u64>| overlap(&range, &(0..end));
    ranges.into_iter().filter_map(inside).collect()
}

/// What of `open` lies in data runs, and what in no run at all. What lies in a run of zeros is
/// settled: a fresh target reads as zero.
fn claim(open: Vec<Range<u64>>, runs: &[Run]) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let (mut data, mut rest) = (Vec::new(), Vec::new());
    let mut runs = runs.iter().peekable();
    for range in open {
        let mut at = range.start;
        while at < range.end {
            match runs.peek() {
                Some(run) if run.range.end <= at => {
                    runs.next();
                }
                Some(run) if run.range.start < range.end => {
                    if at < run.range.start {
                        rest.push(at..run.range.start);
                        at = run.range.start;
                    }
                    let end = run.range.end.min(range.end);
                    if !run.is_zero() {
                        data.push(at..end);
                    }
                    at = end;
                }
                _ => {
                    rest.push(at..range.end);
                    at = range.end;
                }
            }
        }
    }
    (data, rest)
}
