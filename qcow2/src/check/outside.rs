//! Images with an external data file: every data cluster lies where it is on the disk.

use super::mapping::l1_range;
use super::{Census, Finding, place};
use crate::convert::to_u64;
use crate::format::header::Header;
use crate::format::table::OFFSET_MASK;
use crate::units::HostOffset;

impl Census<'_> {
    /// Compares the place of every mapped cluster with its place on the disk.
    pub(super) fn check_outside(&mut self, header: &Header) {
        if !self.geometry.external_data {
            return;
        }
        let l1 = l1_range(header);
        let start = l1.start;
        self.entries("L1 table", l1, |census, at, entry| {
            let offset = HostOffset(entry & OFFSET_MASK);
            // Tables that cannot be read were reported when they were counted.
            if census.geometry.is_aligned(offset) && (1..census.end).contains(&offset.0) {
                let first = (at.0 - start) / 8 * census.geometry.l2_entries();
                census.check_outside_l2(offset, first);
            }
        });
    }

    fn check_outside_l2(&mut self, table: HostOffset, first: u64) {
        let Some(bytes) = self.read_l2(table) else {
            return;
        };
        let words = self.geometry.words_per_l2_entry();
        for (slot, raw) in bytes.as_chunks::<8>().0.iter().enumerate().step_by(words) {
            let entry = u64::from_be_bytes(*raw);
            let guest = first + to_u64(slot / words);
            let Some(data) = self.target(entry) else {
                continue;
            };
            if data.0 >> self.geometry.cluster_bits != guest {
                let finding = Finding::Entry {
                    table: "L2",
                    place: place(table, slot),
                    entry,
                    problem: "the external data file has this cluster at another place",
                };
                self.found(finding, 1);
            }
        }
    }
}
