//! Raw deflate, without the header and checksum of zlib.

use std::cell::RefCell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::TOO_SHORT;
use crate::convert::to_u64;

/// Farthest that a stream looks back, as a power of two. Readers may not keep more.
const WRITE_WINDOW_BITS: u8 = 12;
const DEFAULT_LEVEL: u32 = 6;
const MAX_LEVEL: u32 = 9;

thread_local! {
    static ENCODER: RefCell<Option<(u32, Compress)>> = const { RefCell::new(None) };
    // The widest window that deflate has: the standard one of `new`.
    static DECODER: RefCell<Decompress> = RefCell::new(Decompress::new(false));
}

pub(super) fn compress(cluster: &[u8], room: usize, level: Option<u32>) -> Option<Vec<u8>> {
    let level = level.unwrap_or(DEFAULT_LEVEL).clamp(1, MAX_LEVEL);
    ENCODER.with_borrow_mut(|slot| {
        let encoder = match slot {
            Some((known, encoder)) if *known == level => encoder,
            other => {
                let level = Compression::new(level);
                let encoder = Compress::new_with_window_bits(level, false, WRITE_WINDOW_BITS);
                &mut other.insert((level.level(), encoder)).1
            }
        };
        encoder.reset();
        let mut stored = vec![0; room];
        let status = encoder.compress(cluster, &mut stored, FlushCompress::Finish);
        if !matches!(status, Ok(Status::StreamEnd)) {
            return None;
        }
        stored.truncate(crate::convert::to_usize(encoder.total_out()));
        Some(stored)
    })
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
                read += crate::convert::to_usize(narrow.total_in() - before.0);
                let wrote = crate::convert::to_usize(narrow.total_out() - before.1);
                back.extend_from_slice(&piece[..wrote]);
                assert!(wrote > 0, "level {level}");
            }
            assert!(back == cluster, "level {level}");
        }
    }
}
