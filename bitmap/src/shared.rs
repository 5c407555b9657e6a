//! A bitmap that many threads mark at once.
//!
//! # Invariants
//! 1. A bit that is set stays set: there is no clear. A new moment is a new bitmap.
//! 2. A page is loaded once its bits are in; until then marks on it are refused, because a mark
//!    that the load would not see could not be told from a bit that the disk lacks.
//! 3. No lock: a mark is one atomic OR a word, and none where the bits are already set.
//!
//! # What it does not do
//! It does not order marks against data writes, nor a snapshot against marks in flight. Both are
//! the caller's gate; marks that happened before the snapshot, by that gate, are in it.

use std::ops::Range;
use std::sync::OnceLock;
#[cfg(not(shuttle))]
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

// Under the model checker every access is a point where another thread may go on.
#[cfg(shuttle)]
use shuttle::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crate::convert::to_u64;
use crate::{Bitmap, Error, Page, Shape, words};

/// A bitmap whose pages are loaded one by one and marked through a shared reference.
pub struct SharedBitmap {
    shape: Shape,
    pages: Box<[Slot]>,
    marked: AtomicBool,
}

/// Nobody has loaded the page.
const ABSENT: u8 = 0;
/// The page's bits are in `words`, or all clear where there are none.
const LOADED: u8 = 1;
/// Every bit of the page is set, whatever `words` holds.
const FULL: u8 = 2;

/// One page. `state` only grows, and `words` are in place before it says so.
#[derive(Default)]
struct Slot {
    state: AtomicU8,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl SharedBitmap {
    /// A bitmap with no page loaded.
    pub fn new(shape: Shape) -> Self {
        let pages = (0..shape.pages()).map(|_| Slot::default()).collect();
        Self {
            shape,
            pages,
            marked: AtomicBool::new(false),
        }
    }

    /// A bitmap with every page loaded. Pages of zeros take no memory until they are marked.
    pub fn from_bitmap(bitmap: &Bitmap) -> Self {
        let shared = Self::new(bitmap.shape());
        for (index, page) in bitmap.pages().iter().enumerate() {
            shared.load_page(index, page);
        }
        shared
    }

    /// The bitmap's shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Whether page `index` is loaded.
    ///
    /// # Panics
    /// If the bitmap has no page `index`.
    pub fn is_loaded(&self, index: usize) -> bool {
        self.pages[index].state() != ABSENT
    }

    /// The indexes of the loaded pages, in order.
    pub fn loaded_pages(&self) -> impl Iterator<Item = usize> {
        (0..self.pages.len()).filter(|index| self.is_loaded(*index))
    }

    /// Gives page `index` its bits. On a page that is already loaded they are added: bits that
    /// were marked meanwhile stay.
    ///
    /// # Panics
    /// If the bitmap has no page `index`, or the bits are not one page long.
    pub fn load_page(&self, index: usize, page: &Page) {
        let slot = &self.pages[index];
        let state = match page {
            Page::Zeros => LOADED,
            Page::Ones => FULL,
            Page::Bits(words) => {
                assert_eq!(words.len(), self.shape.words_per_page(), "one page of bits");
                let atoms = slot.words(self.shape.words_per_page());
                for (word, mask) in words::masks(0..self.shape.bits_in_page(index)) {
                    raise(&atoms[word], words[word] & mask);
                }
                LOADED
            }
        };
        slot.state.fetch_max(state, Ordering::Release);
    }

    /// Sets the bits of all granules that a range of disk bytes touches. An empty range sets none.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if the range does not lie within the disk;
    /// [`Error::PageNotLoaded`] for the first page of the range that is not loaded. Nothing is
    /// marked then.
    pub fn mark(&self, range: Range<u64>) -> Result<(), Error> {
        let bits = self.shape.bits_touching(&range)?;
        if bits.is_empty() {
            return Ok(());
        }
        self.require_loaded(&bits)?;
        if !self.marked.load(Ordering::Relaxed) {
            self.marked.store(true, Ordering::Release);
        }
        for (index, part) in self.shape.split(bits) {
            let slot = &self.pages[index];
            if slot.state() == FULL {
                continue;
            }
            if part == (0..self.shape.bits_in_page(index)) {
                slot.state.fetch_max(FULL, Ordering::Release);
                continue;
            }
            let atoms = slot.words(self.shape.words_per_page());
            words::masks(part).for_each(|(word, mask)| raise(&atoms[word], mask));
        }
        Ok(())
    }

    /// Whether the granule of the byte at `offset` is dirty; false past the disk's end and on
    /// pages that are not loaded.
    pub fn test(&self, offset: u64) -> bool {
        offset < self.shape.disk_bytes() && self.covers(offset..offset + 1)
    }

    /// Whether every granule that the range touches is dirty: a mark of it would change nothing.
    /// False for a range outside the disk and on pages that are not loaded.
    pub fn covers(&self, range: Range<u64>) -> bool {
        let Ok(bits) = self.shape.bits_touching(&range) else {
            return false;
        };
        self.shape.split(bits).all(|(index, part)| {
            let slot = &self.pages[index];
            match (slot.state(), slot.words.get()) {
                (FULL, _) => true,
                (LOADED, Some(atoms)) => words::masks(part)
                    .all(|(word, mask)| atoms[word].load(Ordering::Acquire) & mask == mask),
                _ => false,
            }
        })
    }

    /// The bits of page `index` as they are now; `None` if it is not loaded.
    ///
    /// # Panics
    /// If the bitmap has no page `index`.
    pub fn snapshot_page(&self, index: usize) -> Option<Page> {
        let slot = &self.pages[index];
        match (slot.state(), slot.words.get()) {
            (ABSENT, _) => None,
            (FULL, _) => Some(Page::Ones),
            (_, None) => Some(Page::Zeros),
            (_, Some(atoms)) => {
                let words = atoms
                    .iter()
                    .map(|word| word.load(Ordering::Acquire))
                    .collect();
                let mut page = Page::Bits(words);
                page.normalise(self.shape.bits_in_page(index));
                Some(page)
            }
        }
    }

    /// The whole bitmap as it is now, pages that are not loaded as zeros. Behind a gate that holds
    /// the markers it is one moment.
    pub fn snapshot(&self) -> Bitmap {
        let mut bitmap = Bitmap::new(self.shape);
        for index in 0..self.pages.len() {
            if let Some(page) = self.snapshot_page(index) {
                bitmap.set_page(index, page);
            }
        }
        bitmap
    }

    /// The serialized bytes of page `index` from `first_byte` on, as many as `out` is long, with
    /// zero bits past the disk's end. False, and `out` untouched, if the page is not loaded.
    ///
    /// For writers that store a page sector by sector.
    ///
    /// # Panics
    /// If the bitmap has no page `index`, if the bytes reach past the page, or if they are not
    /// whole 64-bit words.
    pub fn copy_page_bytes(&self, index: usize, first_byte: usize, out: &mut [u8]) -> bool {
        assert!(
            first_byte.is_multiple_of(8) && out.len().is_multiple_of(8),
            "whole 64-bit words"
        );
        let wanted = first_byte / 8..(first_byte + out.len()) / 8;
        assert!(wanted.end <= self.shape.words_per_page(), "within one page");
        let slot = &self.pages[index];
        let (state, atoms) = (slot.state(), slot.words.get());
        if state == ABSENT {
            return false;
        }
        out.fill(0);
        let (chunks, _) = out.as_chunks_mut::<8>();
        let valid = self.shape.bits_in_page(index);
        let bits = (to_u64(wanted.start) * 64).min(valid)..(to_u64(wanted.end) * 64).min(valid);
        for (word, mask) in words::masks(bits) {
            let bits = match atoms {
                _ if state == FULL => mask,
                Some(atoms) => atoms[word].load(Ordering::Acquire),
                None => 0,
            };
            chunks[word - wanted.start] = bits.to_le_bytes();
        }
        true
    }

    /// Whether anything was marked since construction. Loading is not marking.
    pub fn bits_marked(&self) -> bool {
        self.marked.load(Ordering::Acquire)
    }

    fn require_loaded(&self, bits: &Range<u64>) -> Result<(), Error> {
        let pages = self.shape.page_of_bit(bits.start)..self.shape.page_of_bit(bits.end - 1) + 1;
        match pages.into_iter().find(|page| !self.is_loaded(*page)) {
            None => Ok(()),
            Some(page) => Err(Error::PageNotLoaded(page)),
        }
    }
}

impl Slot {
    fn state(&self) -> u8 {
        self.state.load(Ordering::Acquire)
    }

    /// The page's words, made on the first mark. Threads that come at once wait for one of them.
    fn words(&self, count: usize) -> &[AtomicU64] {
        self.words
            .get_or_init(|| (0..count).map(|_| AtomicU64::new(0)).collect())
    }
}

/// Sets the bits of `mask`. Where they are all set already, nothing is written: the cache line
/// stays shared between the threads that mark the same place again and again.
fn raise(word: &AtomicU64, mask: u64) {
    if word.load(Ordering::Relaxed) & mask != mask {
        word.fetch_or(mask, Ordering::Release);
    }
}

impl std::fmt::Debug for SharedBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedBitmap")
            .field("shape", &self.shape)
            .field("pages", &self.pages.len())
            .field("loaded", &self.loaded_pages().count())
            .field("bits_marked", &self.bits_marked())
            .finish()
    }
}
