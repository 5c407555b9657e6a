//! The snapshot table.

use super::{Census, Finding};
use crate::error::{Damage, Result};
use crate::format::header::Header;
use crate::format::limits;
use crate::format::snapshot::{HEAD_BYTES, REQUIRED_EXTRA_BYTES, Snapshot};
use crate::image::Image;
use crate::image::file::ImageFile;
use crate::units::HostOffset;

impl Image {
    /// The internal snapshots, in the order of their table.
    ///
    /// # Errors
    /// A table that breaks the limits, or I/O.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        read_table(self.file(), &self.header()).map(|(snapshots, _)| snapshots)
    }
}

/// The snapshots and the bytes that their table has.
fn read_table(file: &ImageFile, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let mut snapshots = Vec::new();
    let mut bytes = 0;
    for number in 0..u64::from(header.snapshot_count) {
        let at = header.snapshots_offset.plus(bytes);
        let mut head = [0; HEAD_BYTES];
        file.read(&mut head, at, "read snapshot table")?;
        let span = Snapshot::span(&head, number).map_err(|damage| file.damage(damage))?;
        bytes += crate::convert::to_u64(span);
        if bytes > limits::MAX_SNAPSHOT_TABLE_BYTES {
            return Err(file.damage(Damage::Place {
                structure: "snapshot table",
                offset: header.snapshots_offset,
                problem: "is longer than 64 MiB",
            }));
        }
        let mut entry = vec![0; span];
        file.read(&mut entry, at, "read snapshot table")?;
        snapshots.push(Snapshot::decode(&entry, number).map_err(|damage| file.damage(damage))?);
    }
    Ok((snapshots, bytes))
}

impl Census<'_> {
    /// Reads the table; one that cannot be read counts as a failed check.
    pub(super) fn read_snapshots(&mut self, header: &Header) -> Vec<Snapshot> {
        let snapshots = match read_table(self.file, header) {
            Ok((snapshots, _)) => snapshots,
            Err(error) => {
                self.unreadable("snapshot table", header.snapshots_offset, &error);
                return Vec::new();
            }
        };
        for (number, snapshot) in (0..).zip(&snapshots) {
            if header.geometry.version > 2 && snapshot.extra_bytes < REQUIRED_EXTRA_BYTES {
                let finding = Finding::Snapshot {
                    number,
                    name: super::text(&snapshot.name),
                    problem: "its entry lacks the sizes of VM state and disk",
                };
                self.found(finding, 1);
            }
        }
        snapshots
    }

    /// Counts the clusters of the table itself.
    pub(super) fn count_snapshot_table(&mut self, header: &Header, snapshots: &[Snapshot]) {
        let bytes = snapshots.iter().map(span).sum();
        let start: HostOffset = header.snapshots_offset;
        self.count_exclusive("snapshot table", start, bytes);
    }
}

fn span(snapshot: &Snapshot) -> u64 {
    let names = crate::convert::to_u64(snapshot.id.len() + snapshot.name.len());
    let head = crate::convert::to_u64(HEAD_BYTES);
    (head + u64::from(snapshot.extra_bytes) + names).next_multiple_of(8)
}
