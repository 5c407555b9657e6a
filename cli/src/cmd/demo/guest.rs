//! A virtual machine that writes, and a memory of what every byte must be.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use tidemark_qcow2::{FileStorage, Image, OpenOptions, PlainFiles, Sharing};

use crate::exit::{Failure, Outcome};

/// Bytes read at once.
const PIECE: usize = 1 << 20;

/// What the disk must hold.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Model {
    pub(super) bytes: Vec<u8>,
}

/// A running machine: its image, open for writing.
pub(super) struct Guest<'a> {
    image: Image,
    model: &'a mut Model,
}

/// One thing that a guest does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    /// Data of its own at an offset.
    Write(u64, u64, u8),
    /// Zeroes.
    Zero(u64, u64),
    /// No longer needed: reads as zero or as before.
    Discard(u64, u64),
}

impl Model {
    pub(super) fn new(size: usize) -> Self {
        Self {
            bytes: vec![0; size],
        }
    }

    fn slice(&mut self, offset: u64, length: u64) -> &mut [u8] {
        let range = range(offset, length);
        self.bytes.get_mut(range).unwrap_or_default()
    }

    /// Bytes that differ from another moment.
    pub(super) fn difference(&self, other: &Self) -> u64 {
        let pairs = self.bytes.iter().zip(&other.bytes);
        pairs.map(|(mine, theirs)| u64::from(mine != theirs)).sum()
    }

    /// Whether every byte that differs from `before` is marked.
    pub(super) fn is_covered(&self, before: &Self, bitmap: &tidemark_qcow2::Bitmap) -> bool {
        let mut offset = 0;
        for (now, then) in self.bytes.chunks(512).zip(before.bytes.chunks(512)) {
            if now != then && !bitmap.test(offset) {
                return false;
            }
            offset += 512;
        }
        true
    }
}

impl<'a> Guest<'a> {
    /// Starts the machine.
    pub(super) fn start(path: &Path, model: &'a mut Model) -> Outcome<Self> {
        Ok(Self {
            image: open(path, true)?,
            model,
        })
    }

    /// Does something, on the image and in memory.
    pub(super) fn act(&mut self, act: Act) -> Outcome<()> {
        match act {
            Act::Write(offset, length, seed) => {
                let data = data(seed, length);
                self.image.write(&data, offset)?;
                self.model.slice(offset, length).copy_from_slice(&data);
            }
            Act::Zero(offset, length) => {
                self.image.write_zeroes(offset, length)?;
                self.model.slice(offset, length).fill(0);
            }
            Act::Discard(offset, length) => {
                self.image.discard(offset, length)?;
                // What a discarded range reads is the engine's choice.
                self.image.read(self.model.slice(offset, length), offset)?;
            }
        }
        Ok(())
    }

    pub(super) fn flush(&self) -> Outcome<()> {
        Ok(self.image.flush()?)
    }

    /// Bytes that the bitmap marks at this moment, in memory.
    pub(super) fn marked(&self, bitmap: &str) -> Outcome<u64> {
        Ok(self.image.load_bitmap(bitmap)?.dirty_bytes())
    }

    /// Shuts the machine down.
    pub(super) fn stop(self) -> Outcome<()> {
        Ok(self.image.close()?)
    }

    /// The machine, and its host, are gone between two instructions.
    pub(super) fn crash(self) {
        drop(self.image);
    }
}

/// Opens an image as a guest's program would.
pub(super) fn open(path: &Path, write: bool) -> Outcome<Image> {
    let storage = FileStorage::open(path, write, Sharing::Exclusive)
        .map_err(|error| Failure::io(path, "open", &error))?;
    let gate = Arc::new(PlainFiles::default());
    let options = if write {
        OpenOptions::writing(gate)
    } else {
        OpenOptions::reading(gate)
    };
    Ok(Image::open(Box::new(storage), options)?)
}

/// The whole disk as it reads now.
pub(super) fn read_disk(path: &Path) -> Outcome<Model> {
    let image = open(path, false)?;
    let mut model = Model::new(usize::try_from(image.size()).unwrap_or(0));
    let mut offset = 0;
    for piece in model.bytes.chunks_mut(PIECE) {
        image.read(piece, offset)?;
        offset += u64::try_from(piece.len()).unwrap_or(0);
    }
    Ok(model)
}

/// Bytes that look like data and depend on the seed.
pub(super) fn data(seed: u8, length: u64) -> Vec<u8> {
    let mut state = u64::from(seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let length = usize::try_from(length).unwrap_or(0);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_be_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn range(offset: u64, length: u64) -> Range<usize> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    start..start.saturating_add(usize::try_from(length).unwrap_or(0))
}
