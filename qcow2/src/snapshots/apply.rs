//! Applying a snapshot: the disk becomes what it was, and the snapshot stays.
//!
//! QEMU refuses this while the image has bitmaps. Here recording bitmaps are marked, in the same
//! commit, wherever the mapping of the present and of the snapshot differ: no other byte can have
//! changed, so that incremental backups stay right.

use super::change::{ADD, Change, DROP};
use super::{SnapshotInfo, disk_bytes, position};
use crate::error::{Mistake, Result};
use crate::image::{Image, Update};

impl Image {
    /// Makes the disk what it was in a snapshot, chosen by identifier or else by name: content,
    /// mapping and size, with what is stored behind the end. Recording bitmaps are marked where
    /// something may differ; frozen ones stay as they are.
    ///
    /// # Errors
    /// [`Mistake::NoSuchSnapshot`]; damage, or a refcount that is full, before the first write;
    /// I/O.
    pub fn apply_snapshot(&self, selector: &str) -> Result<SnapshotInfo> {
        self.check_writable()?;
        self.change_snapshots(|update, change| {
            let number = position(self.file(), &change.entries, selector)?;
            apply(self, update, change, number)
        })
    }
}

fn apply(
    image: &Image,
    update: &mut Update<'_>,
    change: &mut Change<'_>,
    number: usize,
) -> Result<SnapshotInfo> {
    let snapshot = change.entries[number].snapshot.clone();
    let size = disk_bytes(image.file(), change.header(), &snapshot)?;
    let mut l1 = change.read_l1(&snapshot)?;
    mark(image, update, size, &l1)?;
    change.count_below(&image.l1_words(), DROP)?;
    change.count_below(&l1, ADD)?;
    let renewed = change.tables_to_renew(&l1)?;
    change.drop_tables(&l1, &renewed, 1)?;
    change.renew_tables(&mut l1, &renewed, 1)?;
    change.flag_l1(&mut l1)?;
    change.set_active(update, l1)?;
    update.header_mut().disk_bytes = size;
    update.commit_next_counts();
    Ok(SnapshotInfo::new(&snapshot, image.size()))
}

/// Marks recording bitmaps where the mapping will differ from the present one.
fn mark(image: &Image, update: &mut Update<'_>, size: u64, l1: &[u64]) -> Result<()> {
    let bitmaps = update.bitmaps();
    if bitmaps.is_empty() {
        return Ok(());
    }
    if size != image.size() {
        return Err(image.file().invalid(Mistake::Option {
            option: "snapshot",
            problem: "its disk has another size, and the image has bitmaps",
        }));
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
