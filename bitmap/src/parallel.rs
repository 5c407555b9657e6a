//! One way to work on all pages of a bitmap, on several threads when it pays.

use rayon::prelude::*;

use crate::convert::to_usize;
use crate::{Bitmap, Page};

/// Bits in memory, in bytes, from which waking other threads costs less than it saves.
const WORTH_SHARING_BYTES: usize = 2 << 20;

/// Bytes of bits that one task should at least look at.
const TASK_BYTES: u32 = 256 << 10;

/// Whether work on the bits of these bitmaps is worth several threads.
pub(crate) fn pays(bitmaps: &[&Bitmap]) -> bool {
    let bits_bytes = |bitmap: &&Bitmap| {
        let busy = bitmap
            .pages
            .iter()
            .filter(|page| matches!(page, Page::Bits(_)))
            .count();
        busy.saturating_mul(bitmap.shape.words_per_page())
            .saturating_mul(8)
    };
    bitmaps.iter().map(bits_bytes).sum::<usize>() >= WORTH_SHARING_BYTES
}

/// Adds up what `part` says of each page.
pub(crate) fn sum(
    pages: usize,
    page_bytes: u32,
    shared: bool,
    part: impl Fn(usize) -> u64 + Sync + Send,
) -> u64 {
    if !shared {
        return (0..pages).map(part).sum();
    }
    (0..pages)
        .into_par_iter()
        .with_min_len(pages_of_task(page_bytes))
        .map(part)
        .sum()
}

fn pages_of_task(page_bytes: u32) -> usize {
    to_usize(u64::from((TASK_BYTES / page_bytes).max(1)))
}

/// Calls `work` with each page, its index and a scratch buffer that is kept from page to page.
pub(crate) fn for_each_page<F>(pages: &mut [Page], page_bytes: u32, shared: bool, work: F)
where
    F: Fn(usize, &mut Page, &mut Vec<u64>) + Sync + Send,
{
    if !shared {
        let mut scratch = Vec::new();
        pages
            .iter_mut()
            .enumerate()
            .for_each(|(index, page)| work(index, page, &mut scratch));
        return;
    }
    pages
        .par_iter_mut()
        .enumerate()
        .with_min_len(pages_of_task(page_bytes))
        .for_each_init(Vec::new, |scratch, (index, page)| {
            work(index, page, scratch)
        });
}
