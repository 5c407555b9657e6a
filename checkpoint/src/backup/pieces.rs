//! What to copy: pieces of the disk that one thread handles at once. Tables are read, data is not.

use std::ops::Range;

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::Image;

use super::units::{PIECE_BYTES, WINDOW_BYTES, outward, steps};

/// Most ranges planned at once.
const BATCH_RANGES: usize = 16 << 10;

/// Whole blocks of the disk, the last cut at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) range: Range<u64>,
    /// The tables say that it reads as zero.
    pub(super) zero: bool,
}

/// The ranges of `bits` grown to whole blocks, those that then touch joined.
pub(super) fn changed(bits: &Bitmap, block: u64) -> impl Iterator<Item = Range<u64>> {
    let end = bits.shape().disk_bytes();
    let mut grown = bits
        .dirty_ranges()
        .map(move |range| outward(&range, block, end))
        .peekable();
    std::iter::from_fn(move || {
        let mut range = grown.next()?;
        while let Some(next) = grown.next_if(|next| next.start <= range.end) {
            range.end = next.end;
        }
        Some(range)
    })
}

/// Ranges gathered to batches of at most [`WINDOW_BYTES`].
pub(super) fn batches(
    ranges: impl Iterator<Item = Range<u64>>,
) -> impl Iterator<Item = Vec<Range<u64>>> {
    let mut cut = ranges
        .flat_map(|range| steps(range, WINDOW_BYTES))
        .peekable();
    std::iter::from_fn(move || {
        let mut batch = vec![cut.next()?];
        let mut bytes = batch
            .iter()
            .map(|range| range.end - range.start)
            .sum::<u64>();
        while batch.len() < BATCH_RANGES
            && let Some(next) = cut.next_if(|next| bytes + (next.end - next.start) <= WINDOW_BYTES)
        {
            bytes += next.end - next.start;
            batch.push(next);
        }
        Some(batch)
    })
}

/// The pieces of one batch of whole-block ranges, in order. All of it is in some piece.
pub(super) fn plan(
    image: &Image,
    batch: &[Range<u64>],
    block: u64,
) -> tidemark_qcow2::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    for range in batch {
        let mut at = range.start;
        for extent in image.map(range.start, range.end - range.start)? {
            if extent.zero {
                continue;
            }
            let found = extent.start..extent.start + extent.length;
            // A block that is data in part is data.
            let data = outward(&found, block, range.end);
            let start = data.start.max(at);
            if data.end <= start {
                continue;
            }
            push_zeros(&mut pieces, at..start);
            at = data.end;
            push_data(&mut pieces, start..data.end);
        }
        push_zeros(&mut pieces, at..range.end);
    }
    Ok(pieces)
}

fn push_zeros(pieces: &mut Vec<Piece>, range: Range<u64>) {
    if !range.is_empty() {
        pieces.push(Piece { range, zero: true });
    }
}

/// Neighbours of different places in the file are one piece: one read and one write.
fn push_data(pieces: &mut Vec<Piece>, range: Range<u64>) {
    let mut rest = range;
    if let Some(last) = pieces
        .last_mut()
        .filter(|last| !last.zero && last.range.end == rest.start)
    {
        let limit = (last.range.start / PIECE_BYTES + 1) * PIECE_BYTES;
        let end = rest.end.min(limit).max(last.range.end);
        last.range.end = end;
        rest.start = end;
    }
    let cut = steps(rest, PIECE_BYTES);
    pieces.extend(cut.map(|range| Piece { range, zero: false }));
}
