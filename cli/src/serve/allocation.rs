//! Where the disk's bytes are, as `base:allocation` and `qemu:allocation-depth` say it.

use std::collections::VecDeque;
use std::ops::Range;

use tidemark_nbd::protocol::numbers::allocation;
use tidemark_nbd::{BlockStatus, Fault};
use tidemark_qcow2::{Extent, Image};

use super::export::fault;

/// Bytes that are mapped at first: a client may only want to know one extent.
const FIRST_WINDOW: u64 = 1 << 20;
/// Bytes that are mapped at once when more and more is asked for.
const LARGEST_WINDOW: u64 = 1 << 30;

/// `base:allocation`: whether data is stored, and whether it reads as zero.
pub(super) fn state(extent: &Extent, _layers: u64) -> u64 {
    let hole = if extent.data { 0 } else { allocation::HOLE };
    let zero = if extent.zero { allocation::ZERO } else { 0 };
    hole | zero
}

/// `qemu:allocation-depth`: 0 where no layer has an entry, else the layer, counted from 1. What lies
/// beyond the end of a layer counts as its own, as in QEMU.
pub(super) fn depth(extent: &Extent, layers: u64) -> u64 {
    match extent.present {
        true => extent.depth + 1,
        false if extent.depth + 1 < layers => extent.depth + 2,
        false => 0,
    }
}

/// What a context says of an extent of a disk of so many layers.
type Flags = fn(&Extent, u64) -> u64;

/// The runs of a range, mapped window by window.
pub(super) struct Runs<'a> {
    image: &'a Image,
    rest: Range<u64>,
    window: u64,
    waiting: VecDeque<Extent>,
    flags: Flags,
}

impl<'a> Runs<'a> {
    pub(super) fn new(image: &'a Image, range: Range<u64>, flags: Flags) -> Self {
        Self {
            image,
            rest: range,
            window: FIRST_WINDOW,
            waiting: VecDeque::new(),
            flags,
        }
    }

    fn map_more(&mut self) -> Result<(), Fault> {
        let length = self.window.min(self.rest.end - self.rest.start);
        let extents = self.image.map(self.rest.start, length);
        self.waiting.extend(extents.map_err(|error| fault(&error))?);
        self.rest.start += length;
        self.window = (self.window * 4).min(LARGEST_WINDOW);
        Ok(())
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<BlockStatus, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.waiting.is_empty()
            && !self.rest.is_empty()
            && let Err(fault) = self.map_more()
        {
            return Some(Err(fault));
        }
        let extent = self.waiting.pop_front()?;
        Some(Ok(BlockStatus {
            length: extent.length,
            flags: (self.flags)(&extent, self.image.layers()),
        }))
    }
}
