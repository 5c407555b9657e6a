//! Whether somebody else changed the directory of bitmaps since we wrote the record.

use tidemark_qcow2::BitmapInfo;
use tidemark_qcow2::chain::ChainRecord;

/// Whether the chain's bitmaps are those that the record was written with, by the digest that is
/// documented with the record.
pub(super) fn matches(record: &ChainRecord, bitmaps: &[BitmapInfo]) -> bool {
    let mut rows: Vec<Vec<u8>> = bitmaps
        .iter()
        .filter(|info| record.checkpoint_named(&info.name).is_some())
        .map(|info| {
            let mut row = info.name.clone().into_bytes();
            row.extend_from_slice(&[0, info.granularity.bits(), u8::from(info.auto)]);
            row
        })
        .collect();
    rows.sort_unstable();
    crc32fast::hash(&rows.concat()) == record.directory_digest
}
