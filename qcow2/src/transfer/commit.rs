//! What an overlay holds, written into a layer below it.
//!
//! 1. The base grows to the size of the disk, if it is smaller.
//! 2. What the layers above the base show is written into it: data, and zeros where it has none.
//!    Its recording bitmaps mark it. All of it is made durable.
//! 3. Bitmaps of the overlay go over into the base; see [`super::commit_bitmaps`].
//! 4. The overlay is emptied, by one write of its header.
//!
//! Nothing of the base that shows through the overlay changes, so that before, after and at every
//! crash the overlay's disk reads the same. Layers between the two show garbage by themselves
//! afterwards, as in QEMU.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::commit_bitmaps::{self, LeftBehind};
use super::pieces::{self, Kind, PIECE_BYTES, Pieces, Run};
use super::{Progress, crew, default_threads};
use crate::convert::{to_u64, to_usize};
use crate::error::{Error, Mistake, Result};
use crate::image::backing::Layer;
use crate::image::file::ImageFile;
use crate::image::{Extent, Gate, Image, NoFiles, OpenOptions, Shrink};
use crate::storage::Storage;
use crate::units::HostOffset;

/// How an overlay is committed.
#[derive(Clone, Debug)]
pub struct CommitOptions {
    /// Lets the backing chain through, and the base for writing.
    pub gate: Arc<dyn Gate>,
    /// How many layers below the overlay the base is: 1 is its backing file.
    pub base: usize,
    /// Empty the overlay afterwards. Only possible when the base is its backing file: another layer
    /// between them would show.
    pub empty: bool,
    /// Threads that read and write.
    pub threads: usize,
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self {
            gate: Arc::new(NoFiles),
            base: 1,
            empty: true,
            threads: default_threads(),
        }
    }
}

/// What was committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// What the base is called.
    pub base: String,
    /// Bytes of data written.
    pub data_bytes: u64,
    /// Bytes that were made zero explicitly.
    pub zero_bytes: u64,
    /// The base's size, if it had to grow.
    pub grown_to: Option<u64>,
    /// Bitmaps that the base records from now on, or that it had and that were joined.
    pub carried: Vec<String>,
    /// Bitmaps that the base does not have now, or that do not say there what they say above it.
    pub left_behind: Vec<LeftBehind>,
}

/// What is done with a run of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// The base shows it already.
    Nothing,
    Zeros,
    Data,
}

impl Kind for Work {
    fn moves(self) -> bool {
        self == Self::Data
    }
}

/// Writes what the image in `overlay` and the layers above the base hold into the base, and makes it
/// durable. The storage is written only if the overlay is to be emptied.
///
/// # Errors
/// Before the first write: no such layer, a chain that cannot be opened, an overlay with internal
/// snapshots (their disks would change), a base that cannot be written or cannot grow. Later:
/// damage, I/O; the overlay's disk is then the same, and committing again finishes the work.
pub fn commit(
    overlay: Box<dyn Storage>,
    options: &CommitOptions,
    progress: Progress<'_>,
) -> Result<Committed> {
    let open = OpenOptions {
        writable: options.empty,
        gate: Arc::clone(&options.gate),
        writable_layer: options.base,
        ..OpenOptions::default()
    };
    let top = Image::open(overlay, open)?;
    let base = check(&top, options)?;
    let plan = commit_bitmaps::Plan::new(&top, options.base)?;
    let mut committed = Committed {
        base: base.name().to_owned(),
        grown_to: base.grow(top.size())?,
        ..Committed::default()
    };
    let work = Commit {
        top: &top,
        base,
        depth: to_u64(options.base),
        data_bytes: AtomicU64::new(0),
        zero_bytes: AtomicU64::new(0),
    };
    work.run(options.threads, progress)?;
    committed.data_bytes = work.data_bytes.into_inner();
    committed.zero_bytes = work.zero_bytes.into_inner();
    base.flush()?;
    plan.carry_out(&top, &mut committed)?;
    base.finish()?;
    if options.empty {
        top.give_up_content()?;
    }
    top.close()?;
    Ok(committed)
}

/// The refusals; returns the base.
fn check<'a>(top: &'a Image, options: &CommitOptions) -> Result<Base<'a>> {
    let refuse = |option, problem| Err(top.file().invalid(Mistake::Option { option, problem }));
    let Some(layer) = top.layer(options.base) else {
        return match options.base {
            1 => refuse("base", "the image has no backing file"),
            _ => refuse("base", "the backing chain has no such layer"),
        };
    };
    if options.empty && options.base > 1 {
        let problem = "only a commit into the backing file itself can empty the image";
        return refuse("base", problem);
    }
    if top.header().snapshot_count > 0 {
        let problem = "the image has internal snapshots, whose disks would change";
        return refuse("snapshot", problem);
    }
    if options.empty {
        top.check_writable()?;
    }
    let base = Base::new(layer);
    if let Some(identity) = base.file().storage().identity() {
        let elsewhere = (0..options.base)
            .filter_map(|depth| above(top, depth))
            .any(|image| image.owns(identity))
            || base.stands_on(identity);
        if elsewhere {
            return refuse("base", "it occurs twice in the backing chain");
        }
    }
    for image in (0..options.base).filter_map(|depth| above(top, depth)) {
        image.guest_file()?;
    }
    base.check()?;
    Ok(base)
}

/// An image above the base.
pub(super) fn above(top: &Image, depth: usize) -> Option<&Image> {
    match (depth, top.layer(depth)) {
        (0, _) => Some(top),
        (_, Some(Layer::Image(image))) => Some(image),
        _ => None,
    }
}

/// The layer that is written.
#[derive(Clone, Copy)]
enum Base<'a> {
    Image(&'a Image),
    Raw { file: &'a ImageFile, size: u64 },
}

impl<'a> Base<'a> {
    fn new(layer: &'a Layer) -> Self {
        match layer {
            Layer::Image(image) => Self::Image(image),
            Layer::Raw { file, size } => Self::Raw { file, size: *size },
        }
    }

    fn file(&self) -> &'a ImageFile {
        match self {
            Self::Image(image) => image.file(),
            Self::Raw { file, .. } => file,
        }
    }

    fn name(&self) -> &'a str {
        self.file().name()
    }

    /// Whether a file is one of those below it.
    fn stands_on(&self, identity: crate::storage::FileIdentity) -> bool {
        match self {
            Self::Image(image) => image
                .layer(1)
                .is_some_and(|below| below.is_made_of(identity)),
            Self::Raw { .. } => false,
        }
    }

    fn check(&self) -> Result<()> {
        match self {
            Self::Image(image) => {
                image.check_writable()?;
                image.guest_file().map(|_| ())
            }
            Self::Raw { file, .. } if file.storage().writable() => Ok(()),
            Self::Raw { file, .. } => Err(file.invalid(Mistake::ReadOnly)),
        }
    }

    /// Makes it as large as the disk; returns the new size if it was smaller.
    fn grow(&self, size: u64) -> Result<Option<u64>> {
        let old = match self {
            Self::Image(image) => image.size(),
            Self::Raw { size, .. } => *size,
        };
        if old >= size {
            return Ok(None);
        }
        match self {
            Self::Image(image) => image.resize(size, Shrink::Refused)?,
            Self::Raw { file, .. } => file
                .storage()
                .set_len(size)
                .map_err(|error| file.io(error, "grow", size))?,
        }
        Ok(Some(size))
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        match self {
            Self::Image(image) => image.write(data, offset),
            Self::Raw { file, .. } => file.write(data, HostOffset(offset), "write data"),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        match self {
            Self::Image(image) => image.write_zeroes(offset, len),
            Self::Raw { file, .. } => file
                .storage()
                .write_zeroes(offset, len)
                .map_err(|error| file.io(error, "write zeros", offset)),
        }
    }

    /// What of a range may read as something else than zero, as far as the tables say.
    fn not_zero(&self, range: &Range<u64>) -> Result<Vec<Range<u64>>> {
        let Self::Image(image) = self else {
            return Ok(vec![range.clone()]);
        };
        let extents = image.map(range.start, range.end - range.start)?;
        let shown = extents.iter().filter(|extent| !extent.zero);
        Ok(shown.map(|run| run.start..run.start + run.length).collect())
    }

    fn flush(&self) -> Result<()> {
        match self {
            Self::Image(image) => image.flush(),
            Self::Raw { file, .. } => file.barrier(),
        }
    }

    fn finish(&self) -> Result<()> {
        match self {
            Self::Image(image) => image.finish(),
            Self::Raw { .. } => Ok(()),
        }
    }
}

struct Commit<'a> {
    top: &'a Image,
    base: Base<'a>,
    /// Layers above the base.
    depth: u64,
    data_bytes: AtomicU64,
    zero_bytes: AtomicU64,
}

impl Commit<'_> {
    fn run(&self, threads: usize, progress: Progress<'_>) -> Result<()> {
        let size = self.top.size();
        let pieces = Pieces::new(0..size, PIECE_BYTES, |window| self.survey(window));
        let done = AtomicU64::new(0);
        crew::run(
            threads,
            pieces,
            || vec![0; to_usize(PIECE_BYTES.min(size))],
            |run, buffer: &mut Vec<u8>| {
                self.piece(&run, buffer)?;
                let before = done.fetch_add(run.len(), Ordering::Relaxed);
                progress(before + run.len(), size);
                Ok::<(), Error>(())
            },
        )
    }

    fn survey(&self, window: Range<u64>) -> Result<Vec<Run<Work>>> {
        let mut runs = Vec::new();
        for extent in self.top.map(window.start, window.end - window.start)? {
            let range = extent.start..extent.start + extent.length;
            pieces::push(&mut runs, range, self.work_for(&extent));
        }
        Ok(runs)
    }

    fn work_for(&self, extent: &Extent) -> Work {
        // Where a layer above the base has nothing and the next one has ended, the disk is zero. The
        // base is so behind its own old end, but not behind the end of a layer between.
        let ended = !extent.present && extent.depth + 1 == self.depth;
        if extent.depth >= self.depth || ended {
            Work::Nothing
        } else if extent.zero {
            Work::Zeros
        } else {
            Work::Data
        }
    }

    fn piece(&self, run: &Run<Work>, buffer: &mut [u8]) -> Result<()> {
        match run.kind {
            Work::Nothing => Ok(()),
            Work::Zeros => {
                for range in self.base.not_zero(&run.range)? {
                    let len = range.end - range.start;
                    self.base.write_zeroes(range.start, len)?;
                    self.zero_bytes.fetch_add(len, Ordering::Relaxed);
                }
                Ok(())
            }
            Work::Data => {
                let data = &mut buffer[..to_usize(run.len())];
                self.top.read(data, run.range.start)?;
                self.base.write(data, run.range.start)?;
                self.data_bytes.fetch_add(run.len(), Ordering::Relaxed);
                Ok(())
            }
        }
    }
}
