//! One page of serialized bits.

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;

use crate::convert::to_usize;
use crate::words;

/// One cluster of serialized bits, in the shape it has on disk: a qcow2 bitmap table entry says
/// all zeros, all ones, or where the bits are.
///
/// Bit `i` of the page is bit `i % 64` of word `i / 64`, so the little-endian bytes of the words
/// are the serialized form, least significant bit first.
///
/// As the last page of a bitmap, `Ones` stands for the bits within the disk; use
/// [`Bitmap::write_page`](crate::Bitmap::write_page) for bytes whose tail is zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    /// Every bit is clear.
    Zeros,
    /// Every bit is set.
    Ones,
    /// The bits, `page_bytes / 8` words of them. May be all zeros or all ones.
    Bits(Box<[u64]>),
}

impl Page {
    /// Reads a page from its serialized form. All zero bytes make `Zeros`, all 0xff `Ones`.
    ///
    /// # Panics
    /// If the length is not a multiple of eight; page sizes are.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let (chunks, rest) = bytes.as_chunks::<8>();
        assert!(rest.is_empty(), "a page is whole 64-bit words");
        let is_all = |value: u64| {
            chunks
                .iter()
                .all(|chunk| u64::from_le_bytes(*chunk) == value)
        };
        if is_all(0) {
            return Self::Zeros;
        }
        if is_all(u64::MAX) {
            return Self::Ones;
        }
        Self::Bits(
            chunks
                .iter()
                .map(|chunk| u64::from_le_bytes(*chunk))
                .collect(),
        )
    }

    /// Writes the serialized form, filling `out`, which is one page long.
    ///
    /// # Panics
    /// If the page is `Bits` and `out` is not exactly as long as the bits.
    pub fn write_bytes(&self, out: &mut [u8]) {
        match self {
            Self::Zeros => out.fill(0),
            Self::Ones => out.fill(0xff),
            Self::Bits(words) => {
                assert_eq!(
                    out.len(),
                    words.len() * 8,
                    "one page of bytes for one page of bits"
                );
                let (chunks, _) = out.as_chunks_mut::<8>();
                for (chunk, word) in chunks.iter_mut().zip(words) {
                    *chunk = word.to_le_bytes();
                }
            }
        }
    }

    /// A borrowed view of the bits; `None` for a page that has none of its own.
    pub fn view(&self) -> Option<&BitSlice<u64, Lsb0>> {
        match self {
            Self::Bits(words) => Some(BitSlice::from_slice(words)),
            Self::Zeros | Self::Ones => None,
        }
    }

    /// Whether bit `bit` of the page is set.
    pub(crate) fn test(&self, bit: u64) -> bool {
        match self {
            Self::Zeros => false,
            Self::Ones => true,
            Self::Bits(words) => words[to_usize(bit / 64)] >> (bit % 64) & 1 != 0,
        }
    }

    /// The page's bits to work on, `valid` of them within the disk.
    pub(crate) fn make_bits(&mut self, word_count: usize, valid: u64) -> &mut [u64] {
        match self {
            Self::Zeros => *self = Self::Bits(vec![0; word_count].into_boxed_slice()),
            Self::Ones => {
                let mut words = vec![u64::MAX; word_count].into_boxed_slice();
                words::mask_tail(&mut words, valid);
                *self = Self::Bits(words);
            }
            Self::Bits(_) => {}
        }
        match self {
            Self::Bits(words) => words,
            Self::Zeros | Self::Ones => &mut [],
        }
    }

    /// Drops bits that say nothing: all clear, or all `valid` set.
    pub(crate) fn normalise(&mut self, valid: u64) {
        if let Self::Bits(words) = self {
            if words::all(words, 0) {
                *self = Self::Zeros;
            } else if words::is_full(words, valid) {
                *self = Self::Ones;
            }
        }
    }
}
