//! A disk copied into another format, another layout, another file.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::pieces::{self, Kind, PIECE_BYTES, Pieces, Run};
use super::source::Source;
use super::target::Target;
use super::{Progress, bitmaps, crew, default_threads, zeros};
use crate::convert::{to_u64, to_usize};
use crate::error::{Mistake, Result};

/// How a disk is copied; defaults as qemu-img's.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Zeros in a row that are worth a hole, bytes; 0 makes a full copy without any hole.
    pub sparse: u64,
    /// Threads that read and write.
    pub threads: usize,
    /// The target reads as zero already, so that zeros need not be written.
    pub target_is_zero: bool,
    /// The target's backing file shows what the source's backing file shows: only what the source
    /// itself holds is copied. The caller vouches for that.
    pub over_backing: bool,
    /// Compress every whole cluster that is not zero, as its target compresses. The target is an
    /// image with its data inside.
    pub compress: bool,
    /// Copy the bitmaps of the source image.
    pub bitmaps: bool,
    /// With `bitmaps`: leave out those that are inconsistent. Otherwise they are an error.
    pub skip_broken_bitmaps: bool,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            sparse: 4096,
            threads: default_threads(),
            target_is_zero: false,
            over_backing: false,
            compress: false,
            bitmaps: false,
            skip_broken_bitmaps: false,
        }
    }
}

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Bytes of data written.
    pub data_bytes: u64,
    /// Bytes that were made zero explicitly.
    pub zero_bytes: u64,
    /// Bitmaps that the target has now.
    pub bitmaps: Vec<String>,
    /// Bitmaps that were left out because they are inconsistent.
    pub skipped_bitmaps: Vec<String>,
}

/// What is done with a run of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// The target shows it already.
    Nothing,
    Zeros,
    Data,
}

impl Kind for Work {
    fn moves(self) -> bool {
        self == Self::Data
    }
}

/// Copies all of `source` into `target` and makes it durable. The chain record of an image is not
/// copied: a copy is a fork of the disk, whose checkpoints are those of the original.
///
/// # Errors
/// Before the first write: a target smaller than the source, bitmaps that cannot be copied, a target
/// that cannot be compressed. Later:
/// damage of the source, I/O; the target is then incomplete.
pub fn convert(
    source: &Source,
    target: Target,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<Converted> {
    if target.size() < source.size() {
        let problem = "the target is smaller than the source";
        return Err(target.file().invalid(Mistake::Option {
            option: "size",
            problem,
        }));
    }
    let plan = bitmaps::Plan::new(source, &target, options)?;
    if options.compress {
        target.require_compressible()?;
    }
    let copy = Copy {
        source,
        target: &target,
        options,
        unit: match options.sparse {
            0 => u64::MAX,
            sparse => sparse.next_multiple_of(target.block()),
        },
        data_bytes: AtomicU64::new(0),
        zero_bytes: AtomicU64::new(0),
    };
    copy.run(progress)?;
    let mut converted = Converted {
        data_bytes: copy.data_bytes.into_inner(),
        zero_bytes: copy.zero_bytes.into_inner(),
        ..Converted::default()
    };
    plan.carry_out(source, &target, &mut converted)?;
    target.finish()?;
    Ok(converted)
}

/// Refuses a copy of bitmaps that the source does not allow, before a target is made.
///
/// # Errors
/// A raw source, an unreadable directory, or an inconsistent bitmap that is not to be skipped.
pub fn check_bitmaps(source: &Source, options: &ConvertOptions) -> Result<()> {
    bitmaps::from_source(source, options).map(|_| ())
}

struct Copy<'a> {
    source: &'a Source,
    target: &'a Target,
    options: &'a ConvertOptions,
    /// Bytes that are looked at for zeros as a whole.
    unit: u64,
    data_bytes: AtomicU64,
    zero_bytes: AtomicU64,
}

impl Copy<'_> {
    fn run(&self, progress: Progress<'_>) -> Result<()> {
        let size = self.source.size();
        let piece = PIECE_BYTES.max(self.target.block());
        let pieces = Pieces::new(0..size, piece, |window| self.survey(window));
        let done = AtomicU64::new(0);
        crew::run(
            self.options.threads,
            pieces,
            || vec![0; to_usize(piece.min(size.next_multiple_of(512)))],
            |run, buffer: &mut Vec<u8>| {
                self.piece(&run, buffer)?;
                let before = done.fetch_add(run.len(), Ordering::Relaxed);
                progress(before + run.len(), size);
                Ok(())
            },
        )
    }

    /// What to do in a window, data in whole blocks of the target.
    fn survey(&self, window: Range<u64>) -> Result<Vec<Run<Work>>> {
        let mut runs = Vec::new();
        for extent in self.source.map(window.start, window.end - window.start)? {
            let range = extent.start..extent.start + extent.length;
            if self.options.over_backing && extent.depth > 0 {
                pieces::push(&mut runs, range, Work::Nothing);
            } else if !extent.zero || self.options.sparse == 0 {
                pieces::push(&mut runs, range, Work::Data);
            } else if self.options.over_backing {
                self.push_whole_zeros(&mut runs, range);
            } else {
                pieces::push(&mut runs, range, self.zeros());
            }
        }
        let end = window.end.min(self.source.size());
        Ok(pieces::whole_blocks(runs, self.target.block(), end))
    }

    /// Zeros in whole blocks of the target. A block that is zero in part is data: its other part
    /// would otherwise have to come from the target's backing file.
    fn push_whole_zeros(&self, runs: &mut Vec<Run<Work>>, range: Range<u64>) {
        let block = self.target.block();
        let start = range.start.next_multiple_of(block).min(range.end);
        let end = if range.end == self.source.size() {
            range.end
        } else {
            (range.end / block * block).max(start)
        };
        pieces::push(runs, range.start..start, Work::Data);
        pieces::push(runs, start..end, self.zeros());
        pieces::push(runs, end..range.end, Work::Data);
    }

    fn zeros(&self) -> Work {
        if self.options.target_is_zero {
            Work::Nothing
        } else {
            Work::Zeros
        }
    }

    fn piece(&self, run: &Run<Work>, buffer: &mut [u8]) -> Result<()> {
        match run.kind {
            Work::Nothing => Ok(()),
            Work::Zeros => self.make_zero(run.range.start, run.len()),
            Work::Data => {
                let data = &mut buffer[..to_usize(run.len())];
                self.source.read(data, run.range.start)?;
                self.write(data, run.range.start)
            }
        }
    }

    fn write(&self, data: &[u8], start: u64) -> Result<()> {
        let unit = to_usize(self.unit.min(to_u64(data.len())));
        for (range, zero) in zeros::runs(data, unit) {
            let at = start + to_u64(range.start);
            let len = to_u64(range.len());
            if zero && self.options.sparse > 0 {
                if self.zeros() == Work::Zeros {
                    self.make_zero(at, len)?;
                }
            } else {
                self.store(&data[range], at)?;
                self.data_bytes.fetch_add(len, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Stores data of whole blocks; a last one is cut where the source ends.
    fn store(&self, data: &[u8], at: u64) -> Result<()> {
        if !self.options.compress {
            return self.target.write(data, at);
        }
        // In a target that goes on behind the source, a cluster cut by the source's end is not
        // whole: it is written plainly.
        let cut = if at + to_u64(data.len()) == self.target.size() {
            0
        } else {
            data.len() % to_usize(self.target.block())
        };
        let (whole, rest) = data.split_at(data.len() - cut);
        self.target.write_compressed(whole, at)?;
        self.target.write(rest, at + to_u64(whole.len()))
    }

    fn make_zero(&self, start: u64, len: u64) -> Result<()> {
        self.target.write_zeroes(start, len)?;
        self.zero_bytes.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }
}
