//! One cluster at a time, compressed and expanded (format, section "Compressed clusters").
//!
//! Invariants:
//! - Expanding fills exactly one cluster or fails: output that is too short is an error, and no
//!   output is larger, whatever the stored bytes claim of themselves. Memory is the caller's
//!   buffer and one decoder a thread (under 256 KiB).
//! - Bytes behind the end of the stream are ignored: an image knows the length of compressed data
//!   only in whole sectors, and the next cluster's data may begin in the last of them.
//! - What is written can be read by everybody: raw deflate with a window of 4 KiB, as QEMU writes
//!   it; one zstd frame with its content size. What is read may be more: windows of 32 KiB, zstd
//!   frames with any window, several of them.
//!
//! Nothing here knows an image; both directions are pure and run on any number of threads.

mod deflate;
mod zstandard;

/// How the compressed clusters of an image are compressed; one for the whole image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate, the only one of version 2.
    #[default]
    Zlib,
    /// Zstandard frames; needs incompatible feature bit 3.
    Zstd,
}

impl CompressionType {
    /// Name as in `qemu-img create -o compression_type=`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Zlib, Self::Zstd]
            .into_iter()
            .find(|kind| kind.name() == name)
    }

    /// Value of the header's byte 104.
    pub(crate) const fn byte(self) -> u8 {
        match self {
            Self::Zlib => 0,
            Self::Zstd => 1,
        }
    }

    /// The type that a checked header names.
    pub(crate) const fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Zstd,
            _ => Self::Zlib,
        }
    }
}

/// Compresses one cluster. `None` when that does not make it shorter: such a cluster is stored as
/// it is.
///
/// `level` is 1 to 9 for zlib and 1 to 22 for zstd, larger ones are the largest; without it the
/// default of each, 7 and 3, whose size is that of QEMU's or less.
pub fn compress(cluster: &[u8], kind: CompressionType, level: Option<u32>) -> Option<Vec<u8>> {
    let room = cluster.len().checked_sub(1)?;
    match kind {
        CompressionType::Zlib => deflate::compress(cluster, room, level),
        CompressionType::Zstd => zstandard::compress(cluster, room, level),
    }
}

/// Fills `cluster` with what `stored` begins with.
///
/// # Errors
/// What is wrong with the stored bytes; `cluster` then holds anything.
pub fn decompress(
    stored: &[u8],
    cluster: &mut [u8],
    kind: CompressionType,
) -> Result<(), &'static str> {
    match kind {
        CompressionType::Zlib => deflate::decompress(stored, cluster),
        CompressionType::Zstd => zstandard::decompress(stored, cluster),
    }
}

/// The stored bytes end before the cluster is full.
const TOO_SHORT: &str = "it ends before the cluster is full";

#[cfg(test)]
mod tests {
    use super::{CompressionType, compress, decompress};

    const KINDS: [CompressionType; 2] = [CompressionType::Zlib, CompressionType::Zstd];

    /// Bytes of some order: words that come again at many distances.
    fn text(len: usize) -> Vec<u8> {
        let mut state = 7_u32;
        let mut out = Vec::new();
        while out.len() < len {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            out.extend_from_slice(format!("{} ", (state >> 16) % 700).as_bytes());
        }
        out.truncate(len);
        out
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            crate::convert::low_byte(state >> 24)
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn every_cluster_size_and_level_comes_back() {
        let mut cases = 0;
        for kind in KINDS {
            for bits in 9..=21 {
                let cluster = text(1 << bits);
                for level in [None, Some(1), Some(9), Some(99)] {
                    if bits > 13 && level == Some(99) && kind == CompressionType::Zstd {
                        continue;
                    }
                    let stored = compress(&cluster, kind, level).expect("text shrinks");
                    assert!(stored.len() < cluster.len());
                    let mut back = vec![0xee; cluster.len()];
                    decompress(&stored, &mut back, kind).expect("it was whole");
                    assert!(back == cluster, "{kind:?} 2^{bits} {level:?}");
                    cases += 1;
                }
            }
        }
        assert!(cases > 90, "{cases}");
    }

    #[test]
    fn noise_is_not_compressed() {
        for kind in KINDS {
            for len in [512, 4096, 65_536] {
                assert_eq!(compress(&noise(len), kind, None), None);
            }
            assert_eq!(compress(&[], kind, None), None);
        }
    }

    #[test]
    fn bytes_behind_the_end_are_ignored_and_missing_ones_are_not() {
        for kind in KINDS {
            let cluster = text(4096);
            let stored = compress(&cluster, kind, None).expect("text shrinks");
            let mut back = vec![0; 4096];
            for tail in [vec![0; 511], vec![0xff; 300], stored.clone()] {
                let longer = [stored.clone(), tail].concat();
                decompress(&longer, &mut back, kind).expect("the first bytes are whole");
                assert!(back == cluster);
            }
            // The last bytes of a stream may hold no data any more.
            for cut in 0..stored.len() - 8 {
                assert!(
                    decompress(&stored[..cut], &mut back, kind).is_err(),
                    "{cut}"
                );
            }
        }
    }

    #[test]
    fn names_and_bytes_are_those_of_the_format() {
        for (byte, kind) in (0..).zip(KINDS) {
            assert_eq!(kind.byte(), byte);
            assert_eq!(CompressionType::from_byte(byte), kind);
            assert_eq!(CompressionType::from_name(kind.name()), Some(kind));
        }
        assert_eq!(CompressionType::from_name("lzo"), None);
    }
}
