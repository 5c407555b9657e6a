//! The hash of what is not data in a target: header, tables and everything between.
//!
//! Together with the block hashes it covers every byte of the file. It also says where data is,
//! because what is hashed are the gaps, each with its place.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tidemark_qcow2::{FileStorage, Image, Sharing};

use super::manifest::Format;
use super::units::{WINDOW_BYTES, steps, to_usize};
use super::{Error, Result};

const BUFFER_BYTES: u64 = 1 << 20;

/// The hash of the layout of the target at `path`. A raw file has none but its length.
pub(super) fn hash(path: &Path, format: Format) -> Result<blake3::Hash> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let len = file.metadata().map_err(Error::io("look at", path))?.len();
    let mut data = match format {
        Format::Raw => std::iter::once(0..len).collect(),
        Format::Qcow2 => data_ranges(path)?,
    };
    data.push(len..len);
    let mut hasher = blake3::Hasher::new();
    let mut buffer = Vec::new();
    let mut at = 0;
    for held in data {
        let gap = at..held.start.min(len).max(at);
        at = held.end.max(at);
        hasher.update(&gap.start.to_be_bytes());
        hasher.update(&gap.end.to_be_bytes());
        for step in steps(gap, BUFFER_BYTES) {
            buffer.resize(to_usize(step.end - step.start), 0);
            file.read_exact_at(&mut buffer, step.start)
                .map_err(Error::io("read", path))?;
            hasher.update(&buffer);
        }
    }
    Ok(hasher.finalize())
}

/// Where the file holds the disk's data, sorted, neighbours joined.
fn data_ranges(path: &Path) -> Result<Vec<Range<u64>>> {
    // Nobody writes to it: it is not published yet, or will never change.
    let storage =
        FileStorage::open(path, false, Sharing::ForceShare).map_err(Error::io("open", path))?;
    let image = Image::open_unbacked(Box::new(storage), false).map_err(Error::target(path))?;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for window in steps(0..image.size(), WINDOW_BYTES) {
        let extents = image
            .map(window.start, window.end - window.start)
            .map_err(Error::target(path))?;
        let held = extents.iter().filter(|extent| extent.data);
        ranges.extend(held.filter_map(|extent| {
            let start = extent.offset?;
            Some(start..start.saturating_add(extent.length))
        }));
    }
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, before| {
        let touches = next.start <= before.end;
        if touches {
            before.end = before.end.max(next.end);
        }
        touches
    });
    Ok(ranges)
}
