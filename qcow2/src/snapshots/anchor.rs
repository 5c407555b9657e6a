//! What tells a snapshot from one that has taken its name.

use super::{Selection, read_l1, table};
use crate::error::Result;
use crate::format::chain::AnchorProof;
use crate::format::table::COPIED;
use crate::image::Image;

impl Image {
    /// What proves later that the first snapshot of this name is still the one it is now: its date
    /// and a CRC-32 of its L1 table, whose entries a snapshot keeps for as long as it exists. The
    /// COPIED flags and zeros at the end do not count: other programs differ about them.
    ///
    /// # Errors
    /// [`Mistake::NoSuchSnapshot`](crate::Mistake), damaged tables, or I/O.
    pub fn snapshot_proof(&self, name: &str) -> Result<AnchorProof> {
        let file = self.file();
        let header = self.header();
        let entries = table::read(file.storage(), file.name(), &header)?;
        let number = Selection::Name(name).position(file, &entries)?;
        let snapshot = &entries[number].snapshot;
        let l1 = read_l1(file, &header.geometry, snapshot)?;
        let used = l1
            .iter()
            .rposition(|entry| *entry != 0)
            .map_or(0, |last| last + 1);
        let mut hasher = crc32fast::Hasher::new();
        for entry in &l1[..used] {
            hasher.update(&(entry & !COPIED).to_be_bytes());
        }
        Ok(AnchorProof {
            seconds: snapshot.seconds,
            nanoseconds: snapshot.nanoseconds,
            l1_checksum: hasher.finalize(),
        })
    }
}
