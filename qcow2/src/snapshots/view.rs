//! A snapshot as a disk that can be read.

use super::{disk_bytes, position, read_l1, table};
use crate::error::{Mistake, Result};
use crate::image::{Image, OpenOptions};
use crate::storage::Storage;

impl Image {
    /// Opens the disk as it was in a snapshot, chosen by identifier or name, for reading. Mapping,
    /// size and content are those of that moment; bitmaps belong to the present and are not seen.
    ///
    /// # Errors
    /// [`Mistake::NoSuchSnapshot`]; options that ask for writing; those of [`open`](Self::open).
    pub fn open_snapshot(
        storage: Box<dyn Storage>,
        options: OpenOptions,
        selector: &str,
    ) -> Result<Self> {
        let writable = options.writable;
        let mut image = Self::open(
            storage,
            OpenOptions {
                writable: false,
                ..options
            },
        )?;
        if writable {
            return Err(image.file().invalid(Mistake::Option {
                option: "snapshot",
                problem: "a snapshot can only be read",
            }));
        }
        let file = image.file();
        let header = image.header();
        let entries = table::read(file.storage(), file.name(), &header)?;
        let snapshot = &entries[position(file, &entries, selector)?].snapshot;
        let size = disk_bytes(file, &header, snapshot)?;
        let l1 = read_l1(file, &header.geometry, snapshot)?;
        image.become_snapshot(size, l1);
        Ok(image)
    }
}
