//! Bits from disk into memory.

use std::ops::Range;

use tidemark_bitmap::{Bitmap, Page};

use super::directory::{read_table, shape};
use crate::convert::{to_u64, to_usize};
use crate::error::{Mistake, Result};
use crate::format::bitmap::{DirectoryEntry, TableEntry};
use crate::image::Image;
use crate::units::HostOffset;

/// Most bytes of neighbouring pages that are read at once.
const READ_BYTES: usize = 4 << 20;

/// Reads all bits of one bitmap as they are on disk.
pub(crate) fn load(image: &Image, entry: &DirectoryEntry) -> Result<Bitmap> {
    let shape = shape(
        image.file(),
        &image.geometry(),
        image.size(),
        entry.granularity,
    )?;
    let table = read_table(image.file(), &image.geometry(), shape, entry)?;
    let mut bitmap = Bitmap::new(shape);
    load_pages(image, &table, 0..table.len(), &mut bitmap)?;
    Ok(bitmap)
}

/// Adds all bits of one bitmap to `target`, a window of its pages after another, so that memory
/// never holds both. Pages in `newer` replace those on disk.
pub(crate) fn add_to(
    image: &Image,
    entry: &DirectoryEntry,
    newer: &[(usize, Page)],
    target: &mut Bitmap,
) -> Result<()> {
    let shape = shape(
        image.file(),
        &image.geometry(),
        image.size(),
        entry.granularity,
    )?;
    let table = read_table(image.file(), &image.geometry(), shape, entry)?;
    let (ours, theirs) = (target.shape().disk_bytes(), shape.disk_bytes());
    if ours != theirs {
        // Also where nothing is marked.
        let error = tidemark_bitmap::Error::SizesDiffer { ours, theirs };
        return Err(image.file().invalid(Mistake::Bitmap(error)));
    }
    let window_pages = (READ_BYTES / image.geometry().cluster_len()).max(1);
    let mut window = Bitmap::new(shape);
    let mut newer = newer.iter().peekable();
    for first in (0..table.len()).step_by(window_pages) {
        let pages = first..(first + window_pages).min(table.len());
        let own: Vec<_> =
            std::iter::from_fn(|| newer.next_if(|(page, _)| *page < pages.end)).collect();
        let clean = |entry: &TableEntry| *entry == TableEntry::Zeros;
        if own.is_empty() && table[pages.clone()].iter().all(clean) {
            continue;
        }
        load_pages(image, &table, pages.clone(), &mut window)?;
        for (page, bits) in own {
            window.set_page(*page, bits.clone());
        }
        target
            .union_outward(&window)
            .map_err(|error| image.file().invalid(Mistake::Bitmap(error)))?;
        pages.for_each(|page| window.set_page(page, Page::Zeros));
    }
    Ok(())
}

/// Reads some pages of a bitmap.
fn load_pages(
    image: &Image,
    table: &[TableEntry],
    pages: Range<usize>,
    bitmap: &mut Bitmap,
) -> Result<()> {
    let page_len = image.geometry().cluster_len();
    let mut number = pages.start;
    while number < pages.end {
        match table[number] {
            TableEntry::Zeros => number += 1,
            TableEntry::Ones => {
                bitmap.set_page(number, Page::Ones);
                number += 1;
            }
            TableEntry::Cluster(start) => {
                let most = (READ_BYTES / page_len).max(1);
                let count = run_length(&table[number..pages.end], start, page_len).min(most);
                let mut bytes = vec![0; count * page_len];
                image.file().read(&mut bytes, start, "read bitmap data")?;
                for (step, page) in bytes.chunks_exact(page_len).enumerate() {
                    bitmap.set_page(number + step, Page::from_bytes(page));
                }
                number += count;
            }
        }
    }
    Ok(())
}

/// Pages in a row that lie one behind the other in the file.
fn run_length(table: &[TableEntry], start: HostOffset, page_len: usize) -> usize {
    let follows = |(step, entry): &(usize, &TableEntry)| {
        **entry == TableEntry::Cluster(start.plus(to_u64(step * page_len)))
    };
    table.iter().enumerate().take_while(follows).count()
}

/// Reads one page.
pub(crate) fn load_page(image: &Image, entry: TableEntry) -> Result<Page> {
    match entry {
        TableEntry::Zeros => Ok(Page::Zeros),
        TableEntry::Ones => Ok(Page::Ones),
        TableEntry::Cluster(offset) => {
            let mut bytes = vec![0; to_usize(image.geometry().cluster_bytes())];
            image.file().read(&mut bytes, offset, "read bitmap data")?;
            Ok(Page::from_bytes(&bytes))
        }
    }
}
