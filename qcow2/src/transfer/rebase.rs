//! An overlay moved onto another backing file, its disk unchanged.
//!
//! Where the overlay holds nothing of its own, old and new backing file are compared, and what
//! differs is written into the overlay. Only when that is durable does the header name the new
//! backing file. Before and after that one write, and at every crash, the disk reads the same.
//!
//! No byte of the disk changes, so no bitmap is marked; bitmaps and chain record stay as they are.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::pieces::{self, Kind, PIECE_BYTES, Pieces, Run};
use super::source::Source;
use super::{Progress, crew, default_threads, zeros};
use crate::convert::{to_u64, to_usize};
use crate::error::{Error, Mistake, Result};
use crate::image::{BackingReference, Below, Gate, Image, NoFiles, OpenOptions};

/// How an overlay is moved.
#[derive(Clone, Debug)]
pub struct RebaseOptions {
    /// Lets the new backing file and its chain through.
    pub gate: Arc<dyn Gate>,
    /// Threads that read and write.
    pub threads: usize,
}

impl Default for RebaseOptions {
    fn default() -> Self {
        Self {
            gate: Arc::new(NoFiles),
            threads: default_threads(),
        }
    }
}

/// What the overlay holds more than before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rebased {
    /// Bytes of data written.
    pub data_bytes: u64,
    /// Bytes that were made zero explicitly.
    pub zero_bytes: u64,
}

/// What is done with a run of the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// The overlay holds it, or both backing files read as zero.
    Nothing,
    Compare,
}

impl Kind for Work {
    fn moves(self) -> bool {
        self == Self::Compare
    }
}

/// Moves `overlay`, opened for writing with its present backing file, onto `backing`, or onto none:
/// it then holds its whole disk. The image is closed.
///
/// # Errors
/// Before the first write: an image that was opened without its backing file or that has internal
/// snapshots, a new backing file that cannot be opened, a name for which the header has no room.
/// Later: damage, I/O; the overlay then has its old backing file and the same disk.
pub fn rebase(
    overlay: Image,
    backing: Option<&BackingReference>,
    options: &RebaseOptions,
    progress: Progress<'_>,
) -> Result<Rebased> {
    check(&overlay, backing)?;
    let open = OpenOptions::reading(Arc::clone(&options.gate));
    let below = match backing {
        Some(reference) => Some(Source::below(&overlay, reference, &open)?),
        None => None,
    };
    if let (Some(below), Some(identity)) = (&below, overlay.file().storage().identity())
        && below.is_made_of(identity)
    {
        return Err(refusal(&overlay, "it stands on the image itself"));
    }
    overlay.keep_content()?;
    if below.is_some() {
        overlay.expect_backing();
    }
    let work = Rebase {
        block: to_usize(overlay.geometry().subcluster_bytes()),
        overlay: &overlay,
        below,
        data_bytes: AtomicU64::new(0),
        zero_bytes: AtomicU64::new(0),
    };
    work.run(options.threads, progress)?;
    let rebased = Rebased {
        data_bytes: work.data_bytes.into_inner(),
        zero_bytes: work.zero_bytes.into_inner(),
    };
    // The update begins with a flush: what was written is durable before the header changes.
    overlay.set_backing(backing, Below::Same)?;
    Ok(rebased)
}

fn check(overlay: &Image, backing: Option<&BackingReference>) -> Result<()> {
    overlay.check_writable()?;
    overlay.check_new_backing(backing)?;
    if overlay.is_without_backing() {
        let problem = "the image was opened without its present backing file";
        return Err(refusal(overlay, problem));
    }
    if overlay.header().snapshot_count > 0 {
        let problem = "internal snapshots show the present backing file, too";
        return Err(refusal(overlay, problem));
    }
    Ok(())
}

fn refusal(overlay: &Image, problem: &'static str) -> Error {
    let option = "backing_file";
    overlay.file().invalid(Mistake::Option { option, problem })
}

struct Rebase<'a> {
    overlay: &'a Image,
    /// The new backing file; none reads as zero.
    below: Option<Source>,
    block: usize,
    data_bytes: AtomicU64,
    zero_bytes: AtomicU64,
}

impl Rebase<'_> {
    fn run(&self, threads: usize, progress: Progress<'_>) -> Result<()> {
        let size = self.overlay.size();
        let piece = PIECE_BYTES.max(to_u64(self.block));
        let pieces = Pieces::new(0..size, piece, |window| self.survey(window));
        let done = AtomicU64::new(0);
        let buffer = || vec![0; to_usize(piece.min(size.next_multiple_of(512)))];
        crew::run(
            threads,
            pieces,
            || [buffer(), buffer()],
            |run, buffers: &mut [Vec<u8>; 2]| {
                self.piece(&run, buffers)?;
                let before = done.fetch_add(run.len(), Ordering::Relaxed);
                progress(before + run.len(), size);
                Ok(())
            },
        )
    }

    /// What to compare in a window, in whole clusters or subclusters of the overlay.
    fn survey(&self, window: Range<u64>) -> Result<Vec<Run<Work>>> {
        let mut runs = Vec::new();
        for extent in self.overlay.map(window.start, window.end - window.start)? {
            let range = extent.start..extent.start + extent.length;
            let own = extent.present && extent.depth == 0;
            if own || extent.zero && self.is_zero_below(&range)? {
                pieces::push(&mut runs, range, Work::Nothing);
            } else {
                pieces::push(&mut runs, range, Work::Compare);
            }
        }
        Ok(pieces::whole_blocks(runs, to_u64(self.block), window.end))
    }

    fn is_zero_below(&self, range: &Range<u64>) -> Result<bool> {
        match &self.below {
            Some(below) => below.is_zero(range.start, range.end),
            None => Ok(true),
        }
    }

    fn piece(&self, run: &Run<Work>, buffers: &mut [Vec<u8>; 2]) -> Result<()> {
        if run.kind == Work::Nothing {
            return Ok(());
        }
        let start = run.range.start;
        let [old, new] = buffers;
        let (old, new) = (
            &mut old[..to_usize(run.len())],
            &mut new[..to_usize(run.len())],
        );
        self.overlay.read(old, start)?;
        match &self.below {
            Some(below) => below.read_padded(new, start)?,
            None => new.fill(0),
        }
        let mut at = 0;
        while at < old.len() {
            let same = self.same(old, new, at);
            let from = at;
            while at < old.len() && self.same(old, new, at) == same {
                at += self.block;
            }
            let end = at.min(old.len());
            if !same {
                self.keep(&old[from..end], start + to_u64(from))?;
            }
        }
        Ok(())
    }

    fn same(&self, old: &[u8], new: &[u8], at: usize) -> bool {
        let end = (at + self.block).min(old.len());
        old[at..end] == new[at..end]
    }

    /// Writes into the overlay what it shows.
    fn keep(&self, data: &[u8], start: u64) -> Result<()> {
        for (range, zero) in zeros::runs(data, self.block) {
            let at = start + to_u64(range.start);
            let len = to_u64(range.len());
            if zero {
                self.overlay.write_zeroes(at, len)?;
                self.zero_bytes.fetch_add(len, Ordering::Relaxed);
            } else {
                self.overlay.write(&data[range], at)?;
                self.data_bytes.fetch_add(len, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}
