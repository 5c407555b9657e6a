//! Bits from disk into memory.

use tidemark_bitmap::{Bitmap, Page};

use super::directory::{read_table, shape};
use crate::convert::{to_u64, to_usize};
use crate::error::Result;
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
    let page_len = image.geometry().cluster_len();
    let mut bitmap = Bitmap::new(shape);
    let mut number = 0;
    while number < table.len() {
        match table[number] {
            TableEntry::Zeros => number += 1,
            TableEntry::Ones => {
                bitmap.set_page(number, Page::Ones);
                number += 1;
            }
            TableEntry::Cluster(start) => {
                let most = (READ_BYTES / page_len).max(1);
                let count = run_length(&table[number..], start, page_len).min(most);
                let mut bytes = vec![0; count * page_len];
                image.file().read(&mut bytes, start, "read bitmap data")?;
                for (step, page) in bytes.chunks_exact(page_len).enumerate() {
                    bitmap.set_page(number + step, Page::from_bytes(page));
                }
                number += count;
            }
        }
    }
    Ok(bitmap)
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
