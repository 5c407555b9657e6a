//! L1 tables, active and of snapshots: which L2 tables they name, and how often.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Census, Finding, UNREACHABLE, pieces};
use crate::convert::index;
use crate::format::header::Header;
use crate::format::limits;
use crate::format::snapshot::Snapshot;
use crate::format::table::{COPIED, OFFSET_MASK};
use crate::geometry::Geometry;
use crate::units::HostOffset;

/// Bits of an L1 entry that must be zero: 0 to 8, 56 to 62.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// How often an L2 table is named.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Named {
    /// By the active L1 table.
    pub(super) active: u64,
    /// By any.
    pub(super) all: u64,
}

/// The L2 tables that can be read, in the order of the file.
pub(super) type L2Tables = BTreeMap<HostOffset, Named>;

impl Census<'_> {
    /// Counts everything that the L1 tables lead to.
    pub(super) fn count_mapping(&mut self, header: &Header, snapshots: &[Snapshot]) -> L2Tables {
        let mut tables = L2Tables::new();
        let active = l1_range(header);
        let bytes = active.end - active.start;
        self.count_exclusive("L1 table", header.l1_offset, bytes);
        self.entries("L1 table", active, |census, place, entry| {
            census.l1_entry(place, entry, [1, 1], &mut tables);
        });
        let old = self.snapshot_tables(snapshots);
        self.count_tables("L1 table of a snapshot", &old);
        let ranges: Vec<Range<u64>> = old
            .iter()
            .map(|&(offset, bytes)| offset.0..(offset.0 + bytes).min(self.end & !7))
            .collect();
        for (range, times) in pieces(&ranges) {
            self.entries("L1 table of a snapshot", range, |census, place, entry| {
                census.l1_entry(place, entry, [0, times], &mut tables);
            });
        }
        self.count_l2_tables(&tables);
        self.find_foreign_use(&tables);
        tables
    }

    /// Places and bytes of the snapshots' L1 tables that can be followed.
    fn snapshot_tables(&mut self, snapshots: &[Snapshot]) -> Vec<(HostOffset, u64)> {
        let mut tables = Vec::new();
        for (number, snapshot) in (0..).zip(snapshots) {
            let offset = snapshot.l1_offset;
            let name = super::text(&snapshot.name);
            let finding = |problem| Finding::Snapshot {
                number,
                name,
                problem,
            };
            if !self.geometry.is_aligned(offset) {
                self.unfollowed = true;
                self.found(finding("its L1 table is not cluster aligned"), 1);
            } else if snapshot.l1_bytes() > limits::MAX_L1_BYTES {
                self.unfollowed = true;
                self.found(finding("its L1 table is too large"), 1);
            } else if offset.0 >= UNREACHABLE {
                self.unfollowed = true;
                self.found(Finding::unreachable("L1 table of a snapshot", offset), 1);
            } else {
                tables.push((offset, snapshot.l1_bytes()));
            }
        }
        tables
    }

    /// Counts an L1 entry that is named `times`: by the active table, by any.
    fn l1_entry(
        &mut self,
        place: HostOffset,
        entry: u64,
        [active, all]: [u64; 2],
        tables: &mut L2Tables,
    ) {
        let problem = |problem| Finding::Entry {
            table: "L1",
            place,
            entry,
            problem,
        };
        if entry & L1_RESERVED != 0 {
            self.found(problem("reserved bits are set"), all);
        }
        let offset = HostOffset(entry & OFFSET_MASK);
        if offset == HostOffset::ZERO {
            if entry & L1_RESERVED == 0 {
                self.found(problem("it names no L2 table"), all);
            }
            return;
        }
        let inside = self.count("L2 table", offset, self.geometry.cluster_bytes(), all);
        if !self.geometry.is_aligned(offset) {
            self.unfollowed = true;
            self.found(problem("the L2 table is not cluster aligned"), all);
        } else if inside {
            let named = tables.entry(offset).or_default();
            named.active += active;
            named.all += all;
        } else {
            self.unfollowed = true;
        }
    }

    /// L2 tables whose cluster something else refers to as well.
    fn find_foreign_use(&mut self, tables: &L2Tables) {
        for (&offset, named) in tables {
            let cluster = self.geometry.host_cluster(offset).0;
            let references = self.counts.get(cluster);
            if references > named.all {
                self.shared.insert(cluster, ("L2 table", references));
            }
        }
    }

    /// Compares the COPIED flags of the active tables with the refcounts on disk.
    pub(super) fn check_copied(&mut self, header: &Header, tables: &L2Tables) {
        self.check_copied_l1(header);
        let active = tables.iter().filter(|(_, named)| named.active > 0);
        let offsets: Vec<HostOffset> = active.map(|(&offset, _)| offset).collect();
        for offset in self.unsure_of_flags(&offsets) {
            let times = tables.get(&offset).map_or(0, |named| named.active);
            self.check_copied_l2(offset, times);
        }
    }

    pub(super) fn check_copied_l1(&mut self, header: &Header) {
        self.entries("L1 table", l1_range(header), |census, place, entry| {
            let offset = HostOffset(entry & OFFSET_MASK);
            if offset != HostOffset::ZERO {
                census.copied("L1", place, entry, offset, 1);
            }
        });
    }

    /// Compares one flag. Clusters of an external data file are not counted: there it is always set.
    pub(super) fn copied(
        &mut self,
        table: &'static str,
        place: HostOffset,
        entry: u64,
        target: HostOffset,
        times: u64,
    ) {
        let outside = self.geometry.external_data && table == "L2";
        let single = outside || self.counts.get(self.geometry.host_cluster(target).0) == 1;
        if single != (entry & COPIED != 0) {
            let finding = Finding::Copied {
                table,
                place,
                entry,
                single,
            };
            self.found(finding, times);
            if let Some(flags) = &mut self.flags {
                flags.note(place, entry);
            }
        }
    }
}

pub(super) fn l1_range(header: &Header) -> Range<u64> {
    let start = header.l1_offset;
    start.0..start.0 + Geometry::entries_bytes(index(header.l1_entries))
}
