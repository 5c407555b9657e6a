//! One refcount block in memory, with the bytes that differ from the disk.

use std::ops::Range;

use crate::convert::to_u64;
use crate::error::Result;
use crate::format::refcount;
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::units::HostOffset;

/// Bytes are written in whole sectors of this size.
const SECTOR: usize = 512;

#[derive(Debug)]
pub(super) struct RefcountBlock {
    offset: HostOffset,
    order: u32,
    bytes: Vec<u8>,
    dirty: Option<Range<usize>>,
}

impl RefcountBlock {
    /// A new block with all counts zero, not yet on disk.
    pub(super) fn zeroed(geometry: Geometry, offset: HostOffset) -> Self {
        let bytes = vec![0; geometry.cluster_len()];
        let dirty = Some(0..bytes.len());
        Self {
            offset,
            order: geometry.refcount_order,
            bytes,
            dirty,
        }
    }

    /// A block that the disk has at `offset` with these bytes.
    pub(super) fn durable(geometry: Geometry, offset: HostOffset, bytes: Vec<u8>) -> Self {
        Self {
            offset,
            order: geometry.refcount_order,
            bytes,
            dirty: None,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn read(geometry: Geometry, offset: HostOffset, file: &ImageFile) -> Result<Self> {
        let mut bytes = vec![0; geometry.cluster_len()];
        file.read(&mut bytes, offset, "read refcount block")?;
        Ok(Self {
            offset,
            order: geometry.refcount_order,
            bytes,
            dirty: None,
        })
    }

    pub(super) fn count(&self, slot: usize) -> u64 {
        refcount::count(&self.bytes, self.order, slot)
    }

    pub(super) fn set(&mut self, slot: usize, value: u64) {
        refcount::set_count(&mut self.bytes, self.order, slot, value);
        let byte = (slot << self.order) / 8;
        let sector = byte / SECTOR * SECTOR;
        let touched = sector..(sector + SECTOR).min(self.bytes.len());
        self.dirty = Some(match self.dirty.take() {
            None => touched,
            Some(old) => old.start.min(touched.start)..old.end.max(touched.end),
        });
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.is_some()
    }

    pub(super) fn mark_all_dirty(&mut self) {
        self.dirty = Some(0..self.bytes.len());
    }

    /// Writes what differs; stays dirty when that fails.
    pub(super) fn write_back(&mut self, file: &ImageFile) -> Result<()> {
        if let Some(range) = self.dirty.clone() {
            let at = self.offset.plus(to_u64(range.start));
            file.write(&self.bytes[range], at, "write refcount block")?;
            self.dirty = None;
        }
        Ok(())
    }
}
