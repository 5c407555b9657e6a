//! The serialized form: pages for the image, canonical chunks for a checksum.

use crate::convert::{to_u64, to_usize};
use crate::{Bitmap, Page, words};

/// Bytes in a canonical chunk.
pub const CANONICAL_CHUNK_BYTES: usize = 4096;

/// Words in a canonical chunk.
const CHUNK_WORDS: usize = CANONICAL_CHUNK_BYTES / 8;

impl Bitmap {
    /// Writes the serialized bits of page `index`, with zero bits past the disk's end.
    ///
    /// # Panics
    /// If the bitmap has no page `index`, or `out` is not one page long.
    pub fn write_page(&self, index: usize, out: &mut [u8]) {
        assert_eq!(
            to_u64(out.len()),
            u64::from(self.shape.page_bytes()),
            "one page of bytes"
        );
        let page = &self.pages[index];
        page.write_bytes(out);
        if matches!(page, Page::Ones) {
            let valid = self.shape.bits_in_page(index);
            let whole = to_usize(valid / 8);
            if let Some((partial, past_end)) = out[whole..].split_first_mut() {
                *partial &= !(u8::MAX << (valid % 8));
                past_end.fill(0);
            }
        }
    }

    /// The serialized bits that are not all zero, as chunks of 4,096 bytes with their positions in
    /// units of 4,096 bytes, in order; the last is padded with zeros.
    ///
    /// This is the content of a bitmap apart from every accident of its storage: page size, pages
    /// that are all zeros or all ones by table entry or by bits, and bits past the disk's end make
    /// no difference. Pages of zeros are not touched.
    pub fn canonical_chunks(&self) -> impl Iterator<Item = (u64, [u8; CANONICAL_CHUNK_BYTES])> {
        let shape = self.shape;
        let chunk_bits = to_u64(CHUNK_WORDS) * 64;
        let chunks = shape.bits().div_ceil(chunk_bits);
        let mut next = 0;
        std::iter::from_fn(move || {
            while next < chunks {
                let page = shape.page_of_bit(next * chunk_bits);
                if matches!(self.pages[page], Page::Zeros) && shape.bits_per_page() > chunk_bits {
                    next = (to_u64(page) + 1) * (shape.bits_per_page() / chunk_bits);
                    continue;
                }
                let chunk = next;
                next += 1;
                if let Some(bytes) = self.canonical_chunk(chunk) {
                    return Some((chunk, bytes));
                }
            }
            None
        })
    }

    /// One canonical chunk; `None` if it is all zeros.
    fn canonical_chunk(&self, chunk: u64) -> Option<[u8; CANONICAL_CHUNK_BYTES]> {
        let start = chunk * to_u64(CHUNK_WORDS) * 64;
        let end = (start + to_u64(CHUNK_WORDS) * 64).min(self.shape.bits());
        let mut words = [0_u64; CHUNK_WORDS];
        let mut is_zero = true;
        for (index, part) in self.shape.split(start..end) {
            let page_start = to_u64(index) * self.shape.bits_per_page();
            let at = to_usize((page_start + part.start - start) / 64);
            match &self.pages[index] {
                Page::Zeros => continue,
                Page::Ones => {
                    let first = to_u64(at) * 64;
                    words::set(&mut words, first..first + (part.end - part.start));
                }
                Page::Bits(bits) => {
                    let bits = &bits[to_usize(part.start / 64)..to_usize(part.end.div_ceil(64))];
                    words[at..at + bits.len()].copy_from_slice(bits);
                }
            }
            is_zero = false;
        }
        if is_zero || words::all(&words, 0) {
            return None;
        }
        let mut bytes = [0; CANONICAL_CHUNK_BYTES];
        let (chunks, _) = bytes.as_chunks_mut::<8>();
        for (bytes, word) in chunks.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        Some(bytes)
    }
}
