//! Raw deflate, without the header and checksum of zlib.

use std::cell::RefCell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::TOO_SHORT;
use crate::convert::{to_u64, to_usize};

/// Farthest that a stream looks back, as a power of two. Readers may not keep more.
const WRITE_WINDOW_BITS: u8 = 12;
/// As small as zlib's own level 6, which QEMU uses; level 6 here is faster and 0.6 % larger.
const DEFAULT_LEVEL: u32 = 7;
const MAX_LEVEL: u32 = 9;

thread_local! {
    static ENCODER: RefCell<Option<(u32, Compress)>> = const { RefCell::new(None) };
    // The widest window that deflate has: the standard one of `new`.
    static DECODER: RefCell<Decompress> = RefCell::new(Decompress::new(false));
}

pub(super) fn compress(cluster: &[u8], room: usize, level: Option<u32>) -> Option<Vec<u8>> {
    let level = level.unwrap_or(DEFAULT_LEVEL).clamp(1, MAX_LEVEL);
    let (known, mut encoder) = ENCODER
        .take()
        .filter(|(known, _)| *known == level)
        .unwrap_or_else(|| {
            let window = WRITE_WINDOW_BITS;
            let encoder = Compress::new_with_window_bits(Compression::new(level), false, window);
            (level, encoder)
        });
    let mut stored = vec![0; room];
    let status = encoder.compress(cluster, &mut stored, FlushCompress::Finish);
    if !matches!(status, Ok(Status::StreamEnd)) {
        // The encoder goes: a stream that was left in its middle is not wholly reset.
        return None;
    }
    stored.truncate(to_usize(encoder.total_out()));
    encoder.reset();
    ENCODER.set(Some((known, encoder)));
    Some(stored)
}

pub(super) fn decompress(stored: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    DECODER.with_borrow_mut(|decoder| {
        decoder.reset(false);
        let status = decoder.decompress(stored, cluster, FlushDecompress::Finish);
        // A stream that would go on is no error as long as the cluster is full, as in QEMU.
        if status.is_ok() && decoder.total_out() == to_u64(cluster.len()) {
            return Ok(());
        }
        Err(match status {
            Ok(_) => TOO_SHORT,
            Err(_) => "it is not a deflate stream",
        })
    })
}

#[cfg(test)]
mod tests {
    use flate2::{Decompress, FlushDecompress};

    use crate::convert::to_usize;

    /// `zlib-rs` keeps a position in its output when a stream that found no room is reset, and
    /// panics later.
    #[test]
    fn an_encoder_that_found_no_room_spoils_nothing_later() {
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..1 << 18)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                crate::convert::low_byte(state >> 40)
            })
            .collect();
        for room in [100, 70_000, 200_000, (1 << 18) - 1] {
            assert_eq!(super::compress(&noise, room, None), None);
            let stored = super::compress(&noise, 1 << 19, None).expect("there is room");
            let mut back = vec![0; noise.len()];
            super::decompress(&stored, &mut back).expect("it was whole");
            assert!(back == noise, "room {room}");
        }
    }

    #[test]
    fn no_stream_looks_back_more_than_4_kib() {
        // Runs that come again 5,000 and 30,000 bytes later: tempting for a wider window.
        let mut cluster: Vec<u8> = (0..65_536_u32)
            .map(|at| crate::convert::low_byte(u64::from(at.wrapping_mul(2_654_435_761) >> 13)))
            .collect();
        for distance in [5_000, 30_000] {
            cluster.copy_within(0..4_000, distance);
        }
        for level in 1..=9 {
            let stored = super::compress(&cluster, 1 << 17, Some(level)).expect("it fits");
            // A decoder with a window of 4 KiB that gets the output out in small pieces has
            // nothing else to look back to.
            let mut narrow = Decompress::new_with_window_bits(false, 12);
            let mut back = Vec::new();
            let mut read = 0;
            while back.len() < cluster.len() {
                let mut piece = [0; 512];
                let before = (narrow.total_in(), narrow.total_out());
                narrow
                    .decompress(&stored[read..], &mut piece, FlushDecompress::None)
                    .expect("no distance is too far");
                read += to_usize(narrow.total_in() - before.0);
                let wrote = to_usize(narrow.total_out() - before.1);
                back.extend_from_slice(&piece[..wrote]);
                assert!(wrote > 0, "level {level}");
            }
            assert!(back == cluster, "level {level}");
        }
    }
}
