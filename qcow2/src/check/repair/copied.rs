//! COPIED flags, corrected where they stand.

use std::collections::HashSet;

use crate::check::mapping::L2Tables;
use crate::check::{Census, l1_range};
use crate::error::Result;
use crate::format::header::Header;
use crate::format::table::COPIED;
use crate::units::HostOffset;

/// Corrections that are kept before they are written.
const MOST: usize = 1 << 16;

/// Entries whose flag is wrong, and the tables that must not be touched.
pub(in crate::check) struct Flags {
    /// Tables whose cluster something else refers to: a flag there may be guest data.
    foreign: HashSet<HostOffset>,
    /// The same for the active L1 table.
    l1_foreign: bool,
    wrong: Vec<(HostOffset, u64)>,
    corrected: Corrected,
}

/// What became of the flags.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Corrected {
    /// Flags that disagreed with the refcount.
    pub(super) flags: u64,
    /// Anything was written.
    pub(super) written: bool,
}

impl Flags {
    /// To be made while the census still holds references and not refcounts.
    pub(super) fn new(census: &mut Census<'_>, header: &Header, tables: &L2Tables) -> Self {
        let bits = census.geometry.cluster_bits;
        let l1 = l1_range(header);
        let mut clusters = l1.start >> bits..l1.end.div_ceil(1 << bits);
        Self {
            foreign: tables
                .iter()
                .filter(|(offset, named)| {
                    let cluster = census.geometry.host_cluster(**offset).0;
                    census.counts.get(cluster) != named.all
                })
                .map(|(offset, _)| *offset)
                .collect(),
            l1_foreign: clusters.any(|cluster| census.counts.get(cluster) > 1),
            wrong: Vec::new(),
            corrected: Corrected::default(),
        }
    }

    /// Notes an entry whose flag disagrees with the refcount.
    pub(in crate::check) fn note(&mut self, place: HostOffset, entry: u64) {
        self.corrected.flags += 1;
        self.note_compressed(place, entry);
    }

    /// Notes a compressed entry, which has no such flag.
    pub(in crate::check) fn note_compressed(&mut self, place: HostOffset, entry: u64) {
        self.wrong.push((place, entry ^ COPIED));
    }

    /// Whether the flags of an L2 table may be written.
    pub(in crate::check) fn may_touch(&self, table: HostOffset) -> bool {
        !self.foreign.contains(&table)
    }
}

impl Census<'_> {
    /// Corrects the flags of the active tables by the refcounts that `compare` left in the place
    /// of the references.
    pub(super) fn mend_copied(
        &mut self,
        header: &Header,
        tables: &L2Tables,
        flags: Flags,
    ) -> Result<Corrected> {
        let l1_foreign = flags.l1_foreign;
        self.flags = Some(flags);
        if !l1_foreign {
            self.check_copied_l1(header);
            self.write_flags()?;
        }
        for (&offset, &named) in tables.iter().filter(|(_, named)| named.active > 0) {
            if self
                .flags
                .as_ref()
                .is_some_and(|flags| flags.may_touch(offset))
            {
                self.check_copied_l2(offset, named.active);
            }
            if self
                .flags
                .as_ref()
                .is_some_and(|flags| flags.wrong.len() >= MOST)
            {
                self.write_flags()?;
            }
        }
        self.write_flags()?;
        let flags = self.flags.take();
        Ok(flags.map_or(Corrected::default(), |flags| flags.corrected))
    }

    fn write_flags(&mut self) -> Result<()> {
        let Some(flags) = &mut self.flags else {
            return Ok(());
        };
        flags.corrected.written |= !flags.wrong.is_empty();
        let wrong = std::mem::take(&mut flags.wrong);
        for (place, entry) in wrong {
            self.file
                .write(&entry.to_be_bytes(), place, "correct a table entry")?;
        }
        Ok(())
    }
}
