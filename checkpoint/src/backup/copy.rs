//! Copying one disk into one target, and hashing it on the way.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use tempfile::NamedTempFile;
use tidemark_bitmap::Bitmap;
use tidemark_qcow2::Image;
use tidemark_qcow2::chain::Identity;

use super::hashes::{BlockHash, HashWriter};
use super::pieces::{self, Piece};
use super::target::{Shape, Target};
use super::units::{is_zero, to_u64, to_usize, with_buffer};
use super::{Error, Result, files, layout};

/// One disk to copy.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) disk: &'a str,
    pub(super) image: &'a Image,
    /// What to copy; none for everything.
    pub(super) changed: Option<&'a Bitmap>,
    pub(super) shape: Shape<'a>,
    pub(super) identity: Identity,
    /// Final path of the target.
    pub(super) target: &'a Path,
    /// Final path of the file of hashes.
    pub(super) hashes: &'a Path,
}

/// A copied disk: complete files that have no names yet.
#[derive(Debug)]
pub(super) struct Copied {
    pub(super) target: NamedTempFile,
    pub(super) hashes: NamedTempFile,
    pub(super) hashes_blake3: blake3::Hash,
    pub(super) layout_blake3: blake3::Hash,
    /// Bytes of the disk that the target holds as data.
    pub(super) bytes: u64,
}

impl Job<'_> {
    /// Bytes of the disk to look at.
    pub(super) fn total(&self) -> u64 {
        self.changed.map_or(self.shape.size, Bitmap::dirty_bytes)
    }

    /// Copies. `done` hears of bytes looked at and may stop it.
    pub(super) fn run(&self, mut done: impl FnMut(u64) -> Result<()>) -> Result<Copied> {
        let file = files::temporary(self.target)?;
        let target = Target::create(file.path(), &self.shape)?;
        let mut hashes = HashWriter::create(self.hashes, self.identity, self.shape.block)?;
        let mut bytes = 0;
        let ranges: Box<dyn Iterator<Item = Range<u64>>> = match self.changed {
            Some(bits) => Box::new(pieces::changed(bits, self.shape.block)),
            None => Box::new(std::iter::once(0..self.shape.size)),
        };
        for batch in pieces::batches(ranges) {
            let pieces = pieces::plan(self.image, &batch, self.shape.block)
                .map_err(Error::disk(self.disk))?;
            let blocks: Vec<Vec<Blocks>> = pieces
                .into_par_iter()
                .map(|piece| self.piece(piece, &target))
                .collect::<Result<_>>()?;
            for run in blocks.into_iter().flatten() {
                match &run.hashes {
                    Some(of_data) => {
                        bytes += run.range.end - run.range.start;
                        hashes.data(run.range.start / self.shape.block, of_data)?;
                    }
                    None if self.changed.is_some() => {
                        let blocks = (run.range.end - run.range.start).div_ceil(self.shape.block);
                        hashes.zeros(run.range.start / self.shape.block, blocks)?;
                    }
                    None => {}
                }
            }
            done(batch.iter().map(|range| range.end - range.start).sum())?;
        }
        target.finish()?;
        let layout_blake3 = layout::hash(file.path(), self.shape.format)?;
        let (hashes, hashes_blake3) = hashes.finish()?;
        Ok(Copied {
            target: file,
            hashes,
            hashes_blake3,
            layout_blake3,
            bytes,
        })
    }

    fn piece(&self, piece: Piece, target: &Target) -> Result<Vec<Blocks>> {
        if piece.zero {
            return self.zeros(piece.range, target).map(|run| vec![run]);
        }
        with_buffer(piece.range.end - piece.range.start, |data| {
            self.image
                .read(data, piece.range.start)
                .map_err(Error::disk(self.disk))?;
            self.data(data, piece.range.start, target)
        })
    }

    /// Writes and hashes what was read from byte `start` on.
    fn data(&self, data: &[u8], start: u64, target: &Target) -> Result<Vec<Blocks>> {
        let block = to_usize(self.shape.block);
        let mut runs = Vec::new();
        let mut at = start;
        for run in data
            .chunks(block)
            .map(|chunk| (chunk, is_zero(chunk)))
            .collect::<Vec<_>>()
            .chunk_by(|a, b| a.1 == b.1)
        {
            let len: usize = run.iter().map(|(chunk, _)| chunk.len()).sum();
            let range = at..at + to_u64(len);
            at = range.end;
            runs.push(match run {
                [(_, true), ..] => self.zeros(range, target)?,
                _ => {
                    let from = to_usize(range.start - start);
                    target.write(&data[from..from + len], range.start)?;
                    let hash = |(chunk, _): &(&[u8], bool)| *blake3::hash(chunk).as_bytes();
                    Blocks {
                        range,
                        hashes: Some(run.iter().map(hash).collect()),
                    }
                }
            });
        }
        Ok(runs)
    }

    /// In an increment zeros are said; in a full target they are what nobody wrote.
    fn zeros(&self, range: Range<u64>, target: &Target) -> Result<Blocks> {
        if self.changed.is_some() {
            target.write_zeroes(&range)?;
        }
        Ok(Blocks {
            range,
            hashes: None,
        })
    }
}

/// Neighbouring blocks that were copied.
struct Blocks {
    range: Range<u64>,
    /// None for zeros.
    hashes: Option<Vec<BlockHash>>,
}
