//! Whether two disks hold the same bytes.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::pieces::{self, Kind, PIECE_BYTES, Pieces, Run};
use super::source::Source;
use super::{Progress, crew, default_threads, zeros};
use crate::convert::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::image::Extent;

/// Differences are told to the sector, as qemu-img tells them.
const SECTOR: usize = 512;

/// How two disks are compared.
#[derive(Clone, Debug)]
pub struct CompareOptions {
    /// Sizes and allocation must agree too.
    pub strict: bool,
    /// Threads that read.
    pub threads: usize,
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self {
            strict: false,
            threads: default_threads(),
        }
    }
}

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Every byte is the same; the longer disk ends in zeros.
    Identical {
        /// Whether both have the same size.
        same_size: bool,
    },
    /// Strict: the sizes differ.
    Sizes,
    /// Strict: what the tables say differs first at this byte.
    Allocation(u64),
    /// The content differs first in the sector at this byte.
    Content(u64),
}

/// What failed while two disks were compared.
#[derive(Debug)]
pub enum CompareError {
    /// The tables of a disk could not be read.
    Map(Error),
    /// Data could not be read.
    Read(Error),
}

impl From<Error> for CompareError {
    fn from(error: Error) -> Self {
        Self::Map(error)
    }
}

/// Which of two disks has data in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Data {
    left: bool,
    right: bool,
}

impl Kind for Data {
    fn moves(self) -> bool {
        self.left || self.right
    }
}

/// Compares two disks; what both tables say reads as zero is not read. A longer disk must be zero
/// behind the end of the shorter one.
///
/// # Errors
/// What could not be mapped or read.
pub fn compare(
    left: &Source,
    right: &Source,
    options: &CompareOptions,
    progress: Progress<'_>,
) -> std::result::Result<Comparison, CompareError> {
    if options.strict && left.size() != right.size() {
        return Ok(Comparison::Sizes);
    }
    let pair = Pair {
        left,
        right,
        strict: options.strict,
        content: AtomicU64::new(u64::MAX),
        allocation: AtomicU64::new(u64::MAX),
    };
    let size = left.size().max(right.size());
    let done = AtomicU64::new(0);
    let pieces = Pieces::new(0..size, PIECE_BYTES, |window| pair.survey(window));
    let answer = crew::run(
        options.threads,
        // Pieces are handed out in order: those before the first difference are in work already.
        pieces.take_while(|piece| {
            let wanted = |run: &Run<Data>| run.range.start < pair.first_difference();
            piece.as_ref().map_or(true, wanted)
        }),
        || {
            [
                vec![0; to_usize(PIECE_BYTES)],
                vec![0; to_usize(PIECE_BYTES)],
            ]
        },
        |run, buffers: &mut [Vec<u8>; 2]| {
            pair.piece(&run, buffers).map_err(CompareError::Read)?;
            let before = done.fetch_add(run.len(), Ordering::Relaxed);
            progress(before + run.len(), size);
            Ok(())
        },
    );
    match answer {
        // Tables are read in order: a difference that is known lies before the damage.
        Err(CompareError::Map(_)) if pair.first_difference() < u64::MAX => {}
        answer => answer?,
    }
    let (content, allocation) = (pair.content.into_inner(), pair.allocation.into_inner());
    Ok(if allocation < u64::MAX && allocation <= content {
        Comparison::Allocation(allocation)
    } else if content < u64::MAX {
        Comparison::Content(content)
    } else {
        Comparison::Identical {
            same_size: left.size() == right.size(),
        }
    })
}

struct Pair<'a> {
    left: &'a Source,
    right: &'a Source,
    strict: bool,
    /// First byte where the content differs, as far as is known.
    content: AtomicU64,
    /// First byte where the tables differ.
    allocation: AtomicU64,
}

impl Pair<'_> {
    /// First byte where something differs, as far as is known.
    fn first_difference(&self) -> u64 {
        let content = self.content.load(Ordering::Relaxed);
        content.min(self.allocation.load(Ordering::Relaxed))
    }

    /// Where either disk has data in a window.
    fn survey(&self, window: Range<u64>) -> Result<Vec<Run<Data>>> {
        let mut left = map(self.left, &window)?.into_iter();
        let mut right = map(self.right, &window)?.into_iter();
        let (mut a, mut b) = (left.next(), right.next());
        let mut runs = Vec::new();
        let mut at = window.start;
        while let (Some(x), Some(y)) = (&a, &b) {
            let end = (x.start + x.length).min(y.start + y.length);
            if self.strict && status(x) != status(y) {
                self.allocation.fetch_min(at, Ordering::Relaxed);
                return Ok(runs);
            }
            let data = Data {
                left: !x.zero,
                right: !y.zero,
            };
            pieces::push(&mut runs, at..end, data);
            at = end;
            if x.start + x.length == end {
                a = left.next();
            }
            if y.start + y.length == end {
                b = right.next();
            }
        }
        Ok(runs)
    }

    fn piece(&self, run: &Run<Data>, [left, right]: &mut [Vec<u8>; 2]) -> Result<()> {
        let (len, start) = (to_usize(run.len().min(PIECE_BYTES)), run.range.start);
        let found = match run.kind {
            Data {
                left: false,
                right: false,
            } => return Ok(()),
            Data {
                left: true,
                right: true,
            } => {
                self.left.read_padded(&mut left[..len], start)?;
                self.right.read_padded(&mut right[..len], start)?;
                first_difference(&left[..len], &right[..len])
            }
            Data { left: on_left, .. } => {
                let source = if on_left { self.left } else { self.right };
                source.read_padded(&mut left[..len], start)?;
                first_data(&left[..len])
            }
        };
        if let Some(at) = found {
            self.content
                .fetch_min(start + to_u64(at), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The runs of a window; beyond the disk's end it reads as zero.
fn map(source: &Source, window: &Range<u64>) -> Result<Vec<Extent>> {
    let end = source.size().clamp(window.start, window.end);
    let mut extents = if window.start < end {
        source.map(window.start, end - window.start)?
    } else {
        Vec::new()
    };
    if end < window.end {
        extents.push(Extent {
            start: end,
            length: window.end - end,
            depth: 0,
            present: false,
            zero: true,
            data: false,
            compressed: false,
            offset: None,
        });
    }
    Ok(extents)
}

/// What a strict comparison looks at.
fn status(extent: &Extent) -> (bool, bool, bool, bool) {
    (extent.present, extent.zero, extent.data, extent.compressed)
}

fn first_difference(left: &[u8], right: &[u8]) -> Option<usize> {
    if left == right {
        return None;
    }
    let sectors = left.chunks(SECTOR).zip(right.chunks(SECTOR));
    sectors
        .enumerate()
        .find(|(_, (left, right))| left != right)
        .map(|(number, _)| number * SECTOR)
}

fn first_data(bytes: &[u8]) -> Option<usize> {
    if zeros::is_zero(bytes) {
        return None;
    }
    bytes
        .chunks(SECTOR)
        .position(|sector| !zeros::is_zero(sector))
        .map(|number| number * SECTOR)
}
