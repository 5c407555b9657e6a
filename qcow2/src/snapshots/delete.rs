//! Deleting a snapshot: what only it refers to is free, and what the disk shares with no other
//! snapshot is written in place again.

use super::{Selection, SnapshotInfo, read_l1, table};
use crate::error::Result;
use crate::image::{DROP, Image, NextMapping, Update};

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
        self.remap(|update, next| remove(update, next, selection))
    }
}

fn remove(
    update: &mut Update<'_>,
    next: &mut NextMapping<'_>,
    selection: Selection<'_>,
) -> Result<SnapshotInfo> {
    let image = next.image();
    let present = table::present(next)?;
    let number = selection.position(image.file(), &present)?;
    let mut entries = present.clone();
    let snapshot = entries.remove(number).snapshot;
    let old = read_l1(image.file(), &next.header().geometry, &snapshot)?;
    next.count_below(&old, DROP)?;
    next.drop_metadata(snapshot.l1_offset, snapshot.l1_bytes())?;
    next.flag_tables(1)?;
    table::replace(update, next, &present, &entries)?;
    Ok(SnapshotInfo::new(&snapshot, image.size()))
}
