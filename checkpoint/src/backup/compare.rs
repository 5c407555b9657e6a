//! Where a disk differs from a backup or from another image: how a lost bitmap is computed anew.
//!
//! # Invariants
//! 1. The answer holds every byte that differs. What cannot be compared differs.
//! 2. A backup is compared by the 256-bit hashes of its blocks. Its targets are not read, and may be
//!    elsewhere or damaged; the hashes are under the manifest's own.
//! 3. Only the image is read, on all threads; where its tables say zero, not even that.

use std::ops::Range;

use rayon::prelude::*;
use tidemark_bitmap::{Bitmap, Granularity, Shape, SharedBitmap};
use tidemark_qcow2::Image;

use super::catalogue::{Catalogue, Link};
use super::hashes::{Hashes, Run};
use super::pieces::{self, Piece};
use super::units::{
    PIECE_BYTES, WINDOW_BYTES, is_zero, overlap, steps, to_u64, to_usize, with_buffer,
};
use super::{Error, Result};

/// What an image may hold that the disk of a backup did not, at a granularity. The image must not be
/// written meanwhile.
///
/// # Errors
/// [`Error::Damaged`] when the hashes of the backup, or of one that it builds on, cannot be
/// believed; [`Error::Disk`]; a granularity too fine for the disk.
pub fn differences(
    image: &Image,
    catalogue: &Catalogue,
    link: Link<'_>,
    granularity: Granularity,
) -> Result<Bitmap> {
    let marks = blank(image, granularity)?;
    let common = image.size().min(link.entry.size);
    mark(&marks, common..image.size())?;
    let mut gaps: Vec<Range<u64>> = std::iter::once(0..common).collect();
    let mut at = Some(link);
    while let Some(link) = at {
        let hashes = Hashes::open(catalogue.directory(), link.entry, link.point.identity)?;
        gaps = compare_with(image, &hashes, gaps, &marks)?;
        at = catalogue.parent(link)?;
    }
    // What no target holds was zero.
    for gap in gaps {
        compare_zeros(image, gap, &marks)?;
    }
    Ok(marks.snapshot())
}

/// What an image may hold that another one does not; beyond the end of the other everything. Neither
/// may be written meanwhile.
///
/// # Errors
/// [`Error::Disk`]; a granularity too fine for the disk.
pub fn differences_between(
    image: &Image,
    other: &Image,
    granularity: Granularity,
) -> Result<Bitmap> {
    let marks = blank(image, granularity)?;
    let common = image.size().min(other.size());
    mark(&marks, common..image.size())?;
    let block = granularity.bytes().min(PIECE_BYTES);
    for window in steps(0..common, WINDOW_BYTES) {
        let windows = std::slice::from_ref(&window);
        let theirs = pieces::plan(other, windows, block).map_err(Error::disk(other.name()))?;
        let zeros: Vec<Range<u64>> = theirs
            .into_iter()
            .filter(|piece| piece.zero)
            .map(|piece| piece.range)
            .collect();
        let ours = pieces::plan(image, windows, block).map_err(Error::disk(image.name()))?;
        ours.into_par_iter()
            .flat_map_iter(|piece| {
                let zero = piece.zero;
                steps(piece.range, PIECE_BYTES).map(move |range| Piece { range, zero })
            })
            .filter(|piece| {
                // Both in the order of the disk.
                let behind = zeros.partition_point(|gap| gap.end < piece.range.end);
                let zero = zeros
                    .get(behind)
                    .is_some_and(|gap| gap.start <= piece.range.start);
                !(piece.zero && zero)
            })
            .try_for_each(|piece| {
                let len = piece.range.end - piece.range.start;
                let mut then = vec![0; to_usize(len)];
                other
                    .read(&mut then, piece.range.start)
                    .map_err(Error::disk(other.name()))?;
                with_buffer(len, |now| {
                    image
                        .read(now, piece.range.start)
                        .map_err(Error::disk(image.name()))?;
                    let step = to_usize(block);
                    let blocks = now.chunks(step).zip(then.chunks(step));
                    mark_blocks(
                        &marks,
                        &piece.range,
                        block,
                        blocks.map(|(now, then)| now != then),
                    )
                })
            })?;
    }
    Ok(marks.snapshot())
}

/// Compares what a target holds of `gaps`; returns what it does not hold.
fn compare_with(
    image: &Image,
    hashes: &Hashes,
    gaps: Vec<Range<u64>>,
    marks: &SharedBitmap,
) -> Result<Vec<Range<u64>>> {
    let mut rest = Vec::new();
    let mut runs = hashes.runs().iter().peekable();
    for gap in gaps {
        let mut at = gap.start;
        while let Some(run) = runs.peek() {
            let Some(held) = overlap(&run.range, &(at..gap.end)) else {
                if run.range.start >= gap.end {
                    break;
                }
                runs.next();
                continue;
            };
            if at < held.start {
                rest.push(at..held.start);
            }
            at = held.end;
            if run.is_zero() {
                compare_zeros(image, held, marks)?;
            } else {
                compare_run(image, hashes, run, held, marks)?;
            }
            if at >= gap.end {
                break;
            }
        }
        if at < gap.end {
            rest.push(at..gap.end);
        }
    }
    Ok(rest)
}

/// Compares `held`, a part of a run of data, block by block.
fn compare_run(
    image: &Image,
    hashes: &Hashes,
    run: &Run,
    held: Range<u64>,
    marks: &SharedBitmap,
) -> Result<()> {
    let block = hashes.block();
    if !block.is_power_of_two() || block > PIECE_BYTES {
        // Nobody writes such; pieces would not begin where blocks do.
        return mark(marks, held);
    }
    // A block of which only a part is asked for has no hash of that part.
    let start = held.start.next_multiple_of(block).min(held.end);
    let end = match held.end == run.range.end {
        true => held.end,
        false => (held.end / block * block).max(start),
    };
    mark(marks, held.start..start)?;
    mark(marks, end..held.end)?;
    let zero = *blake3::hash(&vec![0; to_usize(block)]).as_bytes();
    for window in steps(start..end, WINDOW_BYTES) {
        let plan = pieces::plan(image, std::slice::from_ref(&window), block);
        plan.map_err(Error::disk(image.name()))?
            .into_par_iter()
            .flat_map_iter(|piece| {
                let zero = piece.zero;
                steps(piece.range, PIECE_BYTES).map(move |range| Piece { range, zero })
            })
            .try_for_each(|piece| {
                let expected = hashes.of(run, &piece.range)?;
                let len = piece.range.end - piece.range.start;
                if piece.zero && len.is_multiple_of(block) {
                    let differs = expected.iter().map(|hash| *hash != zero);
                    return mark_blocks(marks, &piece.range, block, differs);
                }
                with_buffer(len, |data| {
                    image
                        .read(data, piece.range.start)
                        .map_err(Error::disk(image.name()))?;
                    let blocks = data.chunks(to_usize(block)).zip(&expected);
                    let differs = blocks.map(|(data, hash)| blake3::hash(data).as_bytes() != hash);
                    mark_blocks(marks, &piece.range, block, differs)
                })
            })?;
    }
    Ok(())
}

/// Compares with zeros.
fn compare_zeros(image: &Image, range: Range<u64>, marks: &SharedBitmap) -> Result<()> {
    let block = marks.shape().granularity().bytes().min(PIECE_BYTES);
    for window in steps(range, WINDOW_BYTES) {
        let extents = image
            .map(window.start, window.end - window.start)
            .map_err(Error::disk(image.name()))?;
        extents
            .into_par_iter()
            .filter(|extent| !extent.zero)
            .flat_map_iter(|extent| steps(extent.start..extent.start + extent.length, PIECE_BYTES))
            .try_for_each(|piece| {
                with_buffer(piece.end - piece.start, |data| {
                    image
                        .read(data, piece.start)
                        .map_err(Error::disk(image.name()))?;
                    let mut at = 0;
                    for step in steps(piece.clone(), block) {
                        let len = to_usize(step.end - step.start);
                        if !is_zero(&data[at..at + len]) {
                            mark(marks, step)?;
                        }
                        at += len;
                    }
                    Ok::<(), Error>(())
                })
            })?;
    }
    Ok(())
}

fn blank(image: &Image, granularity: Granularity) -> Result<SharedBitmap> {
    let page = image.geometry().cluster_bytes();
    let page = u32::try_from(page).unwrap_or(u32::MAX);
    let shape = Shape::new(image.size(), granularity, page).map_err(crate::Error::from)?;
    Ok(SharedBitmap::from_bitmap(&Bitmap::new(shape)))
}

fn mark(marks: &SharedBitmap, range: Range<u64>) -> Result<()> {
    Ok(marks.mark(range).map_err(crate::Error::from)?)
}

/// Marks those blocks of `range` that differ.
fn mark_blocks(
    marks: &SharedBitmap,
    range: &Range<u64>,
    block: u64,
    differs: impl Iterator<Item = bool>,
) -> Result<()> {
    for (number, differs) in differs.enumerate() {
        let start = range.start + to_u64(number) * block;
        if differs {
            mark(marks, start..(start + block).min(range.end))?;
        }
    }
    Ok(())
}
