//! Deleting a snapshot: what only it refers to is free, and what the disk shares with no other
//! snapshot is written in place again.

use super::change::{Change, DROP};
use super::{Selection, SnapshotInfo};
use crate::error::Result;
use crate::image::{Image, Update};

impl Image {
    /// Deletes a snapshot, chosen by identifier or else by name, and frees what only it refers to.
    ///
    /// Guest writes wait for as long as the mapping tables take to be read and, as far as clusters
    /// belong to the disk alone again, to be written.
    ///
    /// # Errors
    /// [`Mistake::NoSuchSnapshot`](crate::Mistake); damage, before the first write; I/O.
    pub fn delete_snapshot(&self, selector: &str) -> Result<SnapshotInfo> {
        self.delete(Selection::IdOrName(selector))
    }

    /// Deletes the first snapshot of this name, whatever the identifiers are.
    ///
    /// # Errors
    /// As [`delete_snapshot`](Self::delete_snapshot).
    pub fn delete_snapshot_named(&self, name: &str) -> Result<SnapshotInfo> {
        self.delete(Selection::Name(name))
    }

    fn delete(&self, selection: Selection<'_>) -> Result<SnapshotInfo> {
        self.check_writable()?;
        self.change_snapshots(|update, change| {
            let number = selection.position(self.file(), &change.entries)?;
            remove(self, update, change, number)
        })
    }
}

fn remove(
    image: &Image,
    update: &mut Update<'_>,
    change: &mut Change<'_>,
    number: usize,
) -> Result<SnapshotInfo> {
    let snapshot = change.entries[number].snapshot.clone();
    let old = change.read_l1(&snapshot)?;
    change.count_below(&old, DROP)?;
    change.drop_metadata(snapshot.l1_offset, snapshot.l1_bytes())?;
    let before = image.l1_words();
    let renewed = change.tables_to_renew(&before)?;
    change.drop_tables(&before, &renewed, 1)?;
    let mut l1 = before.clone();
    change.renew_tables(&mut l1, &renewed, 1)?;
    change.flag_l1(&mut l1)?;
    if l1 != before {
        change.set_active(update, l1)?;
    }
    let mut entries = change.entries.clone();
    entries.remove(number);
    change.set_table(update, &entries)?;
    update.commit_next_counts();
    Ok(SnapshotInfo::new(&snapshot, image.size()))
}
