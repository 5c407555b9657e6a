//! The snapshot table as a whole: read entry by entry, within the limits of the format, and
//! replaced by another one in fresh clusters.

use super::SnapshotInfo;
use crate::convert::{to_u32, to_u64};
use crate::error::{Damage, Error, Feature, Result};
use crate::format::header::Header;
use crate::format::limits;
use crate::format::snapshot::{HEAD_BYTES, Snapshot};
use crate::image::file::ImageFile;
use crate::image::{NextMapping, Update};
use crate::storage::Storage;
use crate::units::HostOffset;

/// One entry and its bytes with their padding, as they are stored.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) snapshot: Snapshot,
    pub(crate) bytes: Vec<u8>,
}

impl Entry {
    /// An entry of ours.
    pub(super) fn new(snapshot: Snapshot) -> Self {
        let bytes = snapshot.encode();
        Self { snapshot, bytes }
    }
}

/// The internal snapshots of the image in `storage`, whose header is `header`, in the order of
/// their table. For whoever cannot open the image, because its data is encrypted for example.
///
/// # Errors
/// A table that breaks the limits or is cut short, or I/O.
pub fn list(storage: &dyn Storage, header: &Header) -> Result<Vec<SnapshotInfo>> {
    let entries = read(storage, &storage.name(), header)?;
    Ok(entries
        .iter()
        .map(|entry| SnapshotInfo::new(&entry.snapshot, header.disk_bytes))
        .collect())
}

/// Reads the table that `header` names from the image called `name`.
pub(crate) fn read(storage: &dyn Storage, name: &str, header: &Header) -> Result<Vec<Entry>> {
    let damaged = |damage| Error::Corrupt {
        image: name.to_owned(),
        damage,
    };
    let mut entries = Vec::new();
    let mut bytes = 0;
    for number in 0..u64::from(header.snapshot_count) {
        let at = header.snapshots_offset.0 + bytes;
        let mut head = [0; HEAD_BYTES];
        read_all(storage, name, &mut head, at)?;
        let span = Snapshot::span(&head, number).map_err(damaged)?;
        bytes += to_u64(span);
        if bytes > limits::MAX_SNAPSHOT_TABLE_BYTES {
            return Err(damaged(Damage::Place {
                structure: "snapshot table",
                offset: header.snapshots_offset,
                problem: "is longer than 64 MiB",
            }));
        }
        let mut entry = vec![0; span];
        read_all(storage, name, &mut entry, at)?;
        let snapshot = Snapshot::decode(&entry, number).map_err(damaged)?;
        entries.push(Entry {
            snapshot,
            bytes: entry,
        });
    }
    Ok(entries)
}

/// Fills `buffer`. The padding of the last entry may lie behind the end of the file; an entry whose
/// beginning does is cut short.
fn read_all(storage: &dyn Storage, name: &str, buffer: &mut [u8], at: u64) -> Result<()> {
    let count = storage.read_at(buffer, at).map_err(|source| Error::Io {
        image: name.to_owned(),
        operation: "read snapshot table",
        offset: at,
        source,
    })?;
    if count < buffer.len().min(HEAD_BYTES) {
        let structure = "snapshot table";
        return Err(Error::Corrupt {
            image: name.to_owned(),
            damage: Damage::Truncated { structure },
        });
    }
    buffer[count..].fill(0);
    Ok(())
}

/// The table as it is before a change of the mapping.
pub(super) fn present(next: &NextMapping<'_>) -> Result<Vec<Entry>> {
    let file = next.image().file();
    read(file.storage(), file.name(), next.header())
}

/// Refuses a table that is larger than QEMU reads.
pub(super) fn check_limits(file: &ImageFile, entries: &[Entry]) -> Result<()> {
    let count = to_u64(entries.len());
    for (what, value, limit) in [
        ("internal snapshots", count, limits::MAX_SNAPSHOTS.into()),
        (
            "snapshot table bytes",
            stored_bytes(entries),
            limits::MAX_SNAPSHOT_TABLE_BYTES,
        ),
    ] {
        if value > limit {
            let feature = Feature::Limit { what, value, limit };
            return Err(file.unsupported(feature));
        }
    }
    Ok(())
}

/// Names a table of these entries in the header to come, and gives up the present one.
pub(super) fn replace(
    update: &mut Update<'_>,
    next: &mut NextMapping<'_>,
    present: &[Entry],
    entries: &[Entry],
) -> Result<()> {
    next.drop_metadata(next.header().snapshots_offset, stored_bytes(present))?;
    let place = if entries.is_empty() {
        HostOffset::ZERO
    } else {
        let bytes = entries.iter().flat_map(|entry| entry.bytes.iter().copied());
        next.write_new(bytes.collect(), "write snapshot table")?
    };
    let header = update.header_mut();
    header.snapshots_offset = place;
    header.snapshot_count = to_u32(to_u64(entries.len()));
    Ok(())
}

fn stored_bytes(entries: &[Entry]) -> u64 {
    entries.iter().map(|entry| to_u64(entry.bytes.len())).sum()
}
