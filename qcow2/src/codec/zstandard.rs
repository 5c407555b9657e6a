//! Zstandard frames.
//!
//! Frames are expanded straight into the cluster, never through a window of their own: what a
//! frame says of its size or window costs no memory. Several frames in a row make one cluster, as
//! QEMU reads them; a frame that would go on behind the cluster's end is damage, as in QEMU.

use std::cell::RefCell;

use zstd::zstd_safe::{CCtx, CParameter, DCtx, find_frame_compressed_size};

use super::TOO_SHORT;

const DEFAULT_LEVEL: u32 = 3;
const MAX_LEVEL: u32 = 22;

thread_local! {
    static ENCODER: RefCell<CCtx<'static>> = RefCell::new(CCtx::create());
    static DECODER: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

pub(super) fn compress(cluster: &[u8], room: usize, level: Option<u32>) -> Option<Vec<u8>> {
    let level = level.unwrap_or(DEFAULT_LEVEL).clamp(1, MAX_LEVEL);
    let mut stored = vec![0; room];
    ENCODER.with_borrow_mut(|encoder| {
        let level = i32::try_from(level).ok()?;
        encoder
            .set_parameter(CParameter::CompressionLevel(level))
            .ok()?;
        // Fails when there is no room: then it would not be shorter.
        let len = encoder.compress2(stored.as_mut_slice(), cluster).ok()?;
        stored.truncate(len);
        Some(stored)
    })
}

pub(super) fn decompress(stored: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    let (mut input, mut output) = (stored, cluster);
    while !output.is_empty() {
        if input.is_empty() {
            return Err(TOO_SHORT);
        }
        let frame =
            find_frame_compressed_size(input).map_err(|_| "it is not a whole zstd frame")?;
        let (frame, behind) = input
            .split_at_checked(frame)
            .filter(|(frame, _)| !frame.is_empty())
            .ok_or("it is not a whole zstd frame")?;
        let written = DECODER
            .with_borrow_mut(|decoder| decoder.decompress(output, frame))
            .map_err(|_| "its zstd frame is damaged or longer than the cluster")?;
        output = output.split_at_mut(written).1;
        input = behind;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use zstd::zstd_safe::{CCtx, CParameter};

    fn frame(content: &[u8], window_log: u32) -> Vec<u8> {
        let mut encoder = CCtx::create();
        for parameter in [
            CParameter::WindowLog(window_log),
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(true),
        ] {
            encoder.set_parameter(parameter).expect("a valid parameter");
        }
        let mut out = vec![0; content.len() + 64];
        let len = encoder
            .compress2(out.as_mut_slice(), content)
            .expect("there is room");
        out.truncate(len);
        out
    }

    #[test]
    fn several_frames_fill_one_cluster() {
        let content: Vec<u8> = (0..4096_u32)
            .map(|at| (at % 251).to_be_bytes()[3])
            .collect();
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        let stored = [
            frame(&content[..1000], 10),
            frame(&[], 10),
            skippable.to_vec(),
            frame(&content[1000..], 27),
            vec![0xaa; 200],
        ]
        .concat();
        let mut back = vec![0; 4096];
        super::decompress(&stored, &mut back).expect("all of it is there");
        assert!(back == content);
    }

    #[test]
    fn a_frame_that_goes_on_behind_the_cluster_is_damage() {
        let stored = frame(&vec![7; 4097], 12);
        assert!(super::decompress(&stored, &mut vec![0; 4096]).is_err());
        assert!(super::decompress(&stored, &mut vec![0; 4097]).is_ok());
    }
}
