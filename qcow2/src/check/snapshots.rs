//! The snapshot table.

use super::{Census, Finding};
use crate::format::header::Header;
use crate::format::snapshot::{HEAD_BYTES, REQUIRED_EXTRA_BYTES, Snapshot};
use crate::snapshots::read_table;
use crate::units::HostOffset;

impl Census<'_> {
    /// Reads the table; one that cannot be read counts as a failed check.
    pub(super) fn read_snapshots(&mut self, header: &Header) -> Vec<Snapshot> {
        let table = read_table(self.file.storage(), self.file.name(), header);
        let snapshots: Vec<Snapshot> = match table {
            Ok(entries) => entries.into_iter().map(|entry| entry.snapshot).collect(),
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
