//! Applying a snapshot: the disk becomes what it was, and the snapshot stays.
//!
//! QEMU refuses this while the image has bitmaps. Here all bitmaps follow the disk's size, and
//! recording ones are marked, in the same commit, wherever the mapping of the present and of the
//! snapshot differ: no other byte can have changed, so that incremental backups stay right.

use super::{SnapshotInfo, disk_bytes, position, read_l1, table};
use crate::error::{Mistake, Result};
use crate::image::{ADD, DROP, Image, NextMapping, Update};

impl Image {
    /// Makes the disk what it was in a snapshot, chosen by identifier or else by name: content,
    /// mapping and size, with what is stored behind the end. Recording bitmaps are marked where
    /// something may differ, and where the disk gets longer; frozen ones only follow the size.
    ///
    /// # Errors
    /// [`Mistake::NoSuchSnapshot`]; for a snapshot of another size a bitmap that is in use, or too
    /// fine for that size; damage, or a refcount that is full, before the first write; I/O.
    pub fn apply_snapshot(&self, selector: &str) -> Result<SnapshotInfo> {
        self.check_writable()?;
        self.remap(|update, next| apply(update, next, selector))
    }
}

fn apply(
    update: &mut Update<'_>,
    next: &mut NextMapping<'_>,
    selector: &str,
) -> Result<SnapshotInfo> {
    let image = next.image();
    let entries = table::present(next)?;
    let snapshot = &entries[position(image.file(), &entries, selector)?].snapshot;
    let size = disk_bytes(image.file(), next.header(), snapshot)?;
    let l1 = read_l1(image.file(), &next.header().geometry, snapshot)?;
    mark(image, update, size, &l1)?;
    next.count_below(next.l1(), DROP)?;
    next.count_below(&l1, ADD)?;
    next.set_l1(l1);
    next.flag_tables(1)?;
    Ok(SnapshotInfo::new(snapshot, size))
}

/// Gives the disk to come its size, and marks recording bitmaps where the mapping will differ from
/// the present one.
fn mark(image: &Image, update: &mut Update<'_>, size: u64, l1: &[u64]) -> Result<()> {
    update.resize_bitmaps(size)?;
    let bitmaps = update.bitmaps();
    if bitmaps.is_empty() {
        return Ok(());
    }
    let changed = image.delta_to_l1(size, l1.to_vec())?.changed;
    for bitmap in bitmaps
        .iter()
        .filter(|bitmap| bitmap.auto && !bitmap.in_use)
    {
        let mut bits = update.load(&bitmap.name)?;
        for range in changed.dirty_ranges() {
            bits.mark(range)
                .map_err(|error| image.file().invalid(Mistake::Bitmap(error)))?;
        }
        update.put(&bitmap.name, bits, true)?;
    }
    Ok(())
}
