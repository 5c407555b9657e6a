//! `map`: where the disk's bytes are, through the backing chain.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use tidemark_qcow2::{Bitmap, Extent, Image};

use crate::exit::{Exit, Outcome};
use crate::open::{Format, Gates, Share};
use crate::out::{Out, say};
use crate::size;

/// Bytes of disk that are mapped at once, so that memory does not grow with the disk.
const STRETCH: u64 = 64 << 30;

/// Show where the bytes of a disk are, through its backing chain
#[derive(Args, Debug)]
pub(crate) struct Map {
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    gates: Gates,
    /// Also say what this bitmap marks: runs are split where it changes
    #[arg(long, value_name = "NAME")]
    bitmap: Option<String>,
    /// First byte of the disk to show
    #[arg(long, short = 's', value_name = "N", value_parser = size::parse, default_value = "0")]
    start_offset: u64,
    /// Bytes of the disk to show, at most
    #[arg(long, short = 'l', value_name = "N", value_parser = size::parse)]
    max_length: Option<u64>,
    /// Image to map
    image: PathBuf,
}

/// A run of equal kind, and what the bitmap says of it.
#[derive(Clone, Copy)]
struct Run {
    extent: Extent,
    dirty: Option<bool>,
}

impl Map {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let image = self.gates.read(&self.image, self.share)?;
        let bitmap = self
            .bitmap
            .as_ref()
            .map(|name| image.load_bitmap(name))
            .transpose()?;
        let start = self.start_offset.min(image.size());
        let end = self.max_length.map_or(image.size(), |length| {
            start.saturating_add(length).min(image.size())
        });
        let mut runs = Runs::new(&image, bitmap.as_ref(), start..end);
        if out.is_json() {
            if start == end {
                // As qemu-img: there is always an entry.
                let nothing = Run {
                    extent: nothing(self.start_offset),
                    dirty: None,
                };
                out.array(std::iter::once(Ok(nothing.to_json(self.bitmap.is_some()))))?;
                return Ok(Exit::Done);
            }
            out.array(runs.map(|run| run.map(|run| run.to_json(self.bitmap.is_some()))))?;
            return Ok(Exit::Done);
        }
        say!(out, "Offset          Length          Mapped to       Depth")?;
        runs.try_for_each(|run| run?.print(out))?;
        Ok(Exit::Done)
    }
}

fn nothing(start: u64) -> Extent {
    Extent {
        start,
        length: 0,
        depth: 0,
        present: false,
        zero: false,
        data: false,
        compressed: false,
        offset: None,
    }
}

impl Run {
    fn to_json(self, with_bitmap: bool) -> Value {
        let extent = self.extent;
        let mut value = json!({
            "start": extent.start,
            "length": extent.length,
            "depth": extent.depth,
            "present": extent.present,
            "zero": extent.zero,
            "data": extent.data,
            "compressed": extent.compressed,
            "offset": extent.offset,
        });
        if let Some(object) = value.as_object_mut().filter(|_| with_bitmap) {
            object.insert("dirty".into(), json!(self.dirty));
        }
        value
    }

    /// Only what has data, as qemu-img; what a bitmap marks is shown too.
    fn print(self, out: &mut Out) -> Outcome<()> {
        let extent = self.extent;
        if !extent.data && self.dirty != Some(true) {
            return Ok(());
        }
        let place = match (extent.offset, extent.compressed, extent.zero) {
            (_, true, _) => "compressed".to_owned(),
            (_, _, true) => "zero".to_owned(),
            (Some(offset), ..) => format!("{offset:#x}"),
            (None, ..) => "-".to_owned(),
        };
        let dirty = if self.dirty == Some(true) {
            " dirty"
        } else {
            ""
        };
        let (start, length) = (
            format!("{:#x}", extent.start),
            format!("{:#x}", extent.length),
        );
        say!(
            out,
            "{start:<15} {length:<15} {place:<15} {}{dirty}",
            extent.depth
        )
    }

    fn continues(&self, next: &Self) -> bool {
        let (mine, other) = (&self.extent, &next.extent);
        let key = |extent: &Extent| {
            (
                extent.depth,
                extent.present,
                extent.zero,
                extent.data,
                extent.compressed,
            )
        };
        let follows = match (mine.offset, other.offset) {
            (Some(offset), Some(next)) => offset.checked_add(mine.length) == Some(next),
            (offset, next) => offset == next,
        };
        follows && self.dirty == next.dirty && key(mine) == key(other)
    }
}

/// Maximal runs, mapped stretch by stretch.
struct Runs<'a> {
    image: &'a Image,
    bitmap: Option<&'a Bitmap>,
    at: u64,
    end: u64,
    /// Runs of the present stretch, the next one last.
    waiting: Vec<Run>,
    held: Option<Run>,
    failed: bool,
}

impl<'a> Runs<'a> {
    fn new(image: &'a Image, bitmap: Option<&'a Bitmap>, range: std::ops::Range<u64>) -> Self {
        Self {
            image,
            bitmap,
            at: range.start,
            end: range.end,
            waiting: Vec::new(),
            held: None,
            failed: false,
        }
    }

    fn next_piece(&mut self) -> Outcome<Option<Run>> {
        while self.waiting.is_empty() && self.at < self.end {
            let length = STRETCH.min(self.end - self.at);
            for extent in self.image.map(self.at, length)? {
                self.split(extent);
            }
            self.waiting.reverse();
            self.at += length;
        }
        Ok(self.waiting.pop())
    }

    /// Cuts an extent where the bitmap changes.
    fn split(&mut self, extent: Extent) {
        let Some(bitmap) = self.bitmap else {
            self.waiting.push(Run {
                extent,
                dirty: None,
            });
            return;
        };
        let end = extent.start + extent.length;
        let mut at = extent.start;
        while at < end {
            let next = bitmap.next_dirty(at, end);
            let (stop, dirty) = match next {
                Some(run) if run.start == at => (run.end, true),
                Some(run) => (run.start, false),
                None => (end, false),
            };
            let piece = Extent {
                start: at,
                length: stop - at,
                offset: extent.offset.map(|offset| offset + (at - extent.start)),
                ..extent
            };
            self.waiting.push(Run {
                extent: piece,
                dirty: Some(dirty),
            });
            at = stop;
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Outcome<Run>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        loop {
            match self.next_piece() {
                Err(failure) => {
                    self.failed = true;
                    return Some(Err(failure));
                }
                Ok(None) => return self.held.take().map(Ok),
                Ok(Some(next)) => match &mut self.held {
                    Some(held) if held.continues(&next) => {
                        held.extent.length += next.extent.length;
                    }
                    held => {
                        if let Some(done) = held.replace(next) {
                            return Some(Ok(done));
                        }
                    }
                },
            }
        }
    }
}
