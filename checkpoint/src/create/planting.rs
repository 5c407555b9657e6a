//! The first bits of a new recording bitmap: witnesses that somebody cleared it, should they go.

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::chain::{Proof, RecordingProof, Scheme};
use tidemark_qcow2::{Image, proof};

use crate::fold::{Result, refused};
use crate::settle::record_of;

/// Plants witnesses. In the cumulative scheme all recording bitmaps share one list of them: bits of
/// its own would break the rule that an older bitmap contains every newer one, by which a chain is
/// put in order without a record.
pub(super) fn plant(image: &Image, bits: &mut Bitmap) -> Result<RecordingProof> {
    let shared = record_of(image)
        .filter(|record| record.scheme == Scheme::Cumulative)
        .and_then(|record| {
            let older = record.checkpoints.into_iter().rev();
            older
                .filter(|entry| entry.health.is_usable())
                .find_map(|entry| match entry.proof {
                    Proof::Recording(proof) => Some(proof.planted),
                    Proof::None | Proof::Frozen(_) => None,
                })
        })
        .unwrap_or_default();
    let size = bits.shape().disk_bytes();
    let planted: Vec<u64> = shared.into_iter().filter(|offset| *offset < size).collect();
    if planted.is_empty() {
        return proof::plant(image, bits);
    }
    for offset in &planted {
        bits.mark(*offset..offset.saturating_add(1))
            .map_err(|error| refused(image, error))?;
    }
    Ok(RecordingProof {
        count: bits.count(),
        smallest_disk_bytes: size,
        planted,
        witnesses: Vec::new(),
    })
}
