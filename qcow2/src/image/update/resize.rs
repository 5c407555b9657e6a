//! Bitmaps and chain record of a disk that gets another size, staged for the same header commit.
//!
//! - What the disk gains is dirty in every bitmap that records, and clean in the others: a frozen
//!   one speaks of a time when those bytes did not exist.
//! - What the disk loses is cut.
//! - Bits and proofs go over together. A bitmap that its old proof did not confirm gets no new one:
//!   its loss is recorded instead.

use super::Update;
use crate::bitmaps::{BitmapInfo, load, proof};
use crate::convert::{to_u32, to_u64};
use crate::error::{Mistake, Result};

impl Update<'_> {
    /// Gives the disk to come `size` bytes, and all bitmaps with it. The mapping is the caller's
    /// work, and so is the size in memory once the header is durable.
    ///
    /// # Errors
    /// A bitmap that is in use, or too fine for a disk of that size, or damaged; I/O. Nothing is
    /// written before the commit.
    pub(crate) fn resize_bitmaps(&mut self, size: u64) -> Result<()> {
        if size == self.disk_bytes() {
            return Ok(());
        }
        if size == 0 && !self.slots.is_empty() {
            let problem = "a disk of size zero cannot have bitmaps";
            let option = "size";
            return Err(self.invalid(Mistake::Option { option, problem }));
        }
        if let Some(slot) = self.slots.iter().find(|slot| slot.entry.in_use) {
            let name = BitmapInfo::from(&slot.entry).name;
            return Err(self.invalid(Mistake::BitmapInconsistent(name)));
        }
        for slot in &self.slots {
            self.refuse_busy_raw(&slot.entry.name)?;
        }
        let mut record = self.content.record.clone();
        for number in 0..self.slots.len() {
            self.resize_bitmap(number, size, record.as_mut())?;
        }
        self.content.record = record;
        self.header_mut().disk_bytes = size;
        Ok(())
    }

    fn resize_bitmap(
        &mut self,
        number: usize,
        size: u64,
        record: Option<&mut crate::chain::ChainRecord>,
    ) -> Result<()> {
        let image = self.image();
        let slot = &mut self.slots[number];
        let info = BitmapInfo::from(&slot.entry);
        let before = match &slot.content {
            Some(bits) => bits.clone(),
            None => load::load(image, &slot.entry)?,
        };
        let mut after = before.resize(size, info.auto).map_err(|_| {
            let name = info.name.clone();
            image.file().invalid(Mistake::BitmapTooFine { name, size })
        })?;
        if let Some(entry) = record.and_then(|record| record.checkpoint_named_mut(&info.name)) {
            proof::resize(image, entry, &info, &before, &mut after)?;
        }
        let slot = &mut self.slots[number];
        if slot.content.is_none() {
            self.retired.push(slot.entry.clone());
        }
        slot.entry.table_entries = to_u32(to_u64(after.shape().pages()));
        slot.content = Some(after);
        Ok(())
    }
}
