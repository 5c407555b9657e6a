//! The bitmap directory, the tables that it names, and their pages.

use std::collections::HashSet;
use std::ops::Range;

use tidemark_bitmap::Shape;

use super::{Census, Finding, pieces, place, text};
use crate::bitmaps::directory::shape;
use crate::convert::{index, to_u64, to_usize};
use crate::format::bitmap::{DirectoryEntry, TableEntry};
use crate::geometry::Geometry;
use crate::image::Image;
use crate::units::HostOffset;

impl Census<'_> {
    /// Place and entries of the directory, when its autoclear bit says that it can be trusted. One
    /// that cannot be read counts as a failed check.
    pub(super) fn read_directory(
        &mut self,
        image: &Image,
    ) -> (Option<(HostOffset, u64)>, Vec<DirectoryEntry>) {
        let Some(extension) = image.first_cluster().content().bitmaps else {
            return (None, Vec::new());
        };
        let start = extension.directory_offset;
        let entries = match image.directory().entries(self.file) {
            Ok(entries) => entries.to_vec(),
            Err(error) => {
                self.unreadable("bitmap directory", start, &error);
                Vec::new()
            }
        };
        (Some((start, extension.directory_bytes)), entries)
    }

    /// Counts directory, tables and pages.
    pub(super) fn count_bitmap_structures(
        &mut self,
        directory: Option<(HostOffset, u64)>,
        entries: &[DirectoryEntry],
    ) {
        if let Some((start, bytes)) = directory {
            self.count_exclusive("bitmap directory", start, bytes);
        }
        let tables: Vec<(HostOffset, u64)> = entries
            .iter()
            .map(|entry| (entry.table_offset, table_bytes(entry)))
            .collect();
        self.count_tables("bitmap table", &tables);
        let ranges: Vec<Range<u64>> = tables
            .iter()
            .map(|&(offset, bytes)| offset.0..(offset.0 + bytes).min(self.end & !7))
            .collect();
        for (range, times) in pieces(&ranges) {
            self.entries("bitmap table", range, |census, at, entry| {
                census.count_page(at, entry, times);
            });
        }
    }

    /// Looks at each bitmap by itself.
    pub(super) fn check_bitmaps(&mut self, image: &Image, entries: &[DirectoryEntry]) {
        let mut tails = HashSet::new();
        for entry in entries {
            self.check_bitmap(image, entry, &mut tails);
        }
    }

    fn count_page(&mut self, at: HostOffset, raw: u64, times: u64) {
        match TableEntry::decode(raw, 0, &self.geometry) {
            Ok(TableEntry::Cluster(page)) => {
                let bytes = self.geometry.cluster_bytes();
                if self.count("bitmap page", page, bytes, times) {
                    let first = self.geometry.host_cluster(page).0;
                    self.exclusive.push(("bitmap page", first..first + 1));
                }
            }
            Ok(TableEntry::Zeros | TableEntry::Ones) => {}
            Err(_) => {
                let finding = Finding::Entry {
                    table: "bitmap table",
                    place: at,
                    entry: raw,
                    problem: "reserved bits, an unaligned page, or all ones together with a page",
                };
                self.found(finding, times);
            }
        }
    }

    /// What concerns one bitmap alone: its use, its size, its tail.
    fn check_bitmap(
        &mut self,
        image: &Image,
        entry: &DirectoryEntry,
        tails: &mut HashSet<(HostOffset, u64)>,
    ) {
        let name = text(&entry.name);
        if entry.in_use {
            return self.found(Finding::BitmapInUse { name }, 1);
        }
        let shape = shape(self.file, &self.geometry, image.size(), entry.granularity);
        match shape {
            Ok(shape) if shape.pages() == index(entry.table_entries) => {
                self.check_tail(entry, shape, tails);
            }
            other => {
                let finding = Finding::BitmapTable {
                    name,
                    offset: entry.table_offset,
                    entries: entry.table_entries.into(),
                    needed: other.map_or(0, |shape| to_u64(shape.pages())),
                };
                self.found(finding, 1);
            }
        }
    }

    /// Looks for bits behind the end of the disk in the last page.
    fn check_tail(
        &mut self,
        entry: &DirectoryEntry,
        shape: Shape,
        tails: &mut HashSet<(HostOffset, u64)>,
    ) {
        let Some(last) = shape.pages().checked_sub(1) else {
            return;
        };
        let used = shape.bits_in_page(last);
        let at = place(entry.table_offset, last);
        if used == shape.bits_per_page() || at.0 + 8 > self.end {
            return;
        }
        let raw = self.read("bitmap table", at, 8).unwrap_or_default();
        let raw = raw.first_chunk().map_or(0, |raw| u64::from_be_bytes(*raw));
        let Ok(TableEntry::Cluster(page)) = TableEntry::decode(raw, 0, &self.geometry) else {
            return;
        };
        // Bitmaps may share a page, in a damaged image; it is read once.
        if page.0 >= self.end || !tails.insert((page, used)) {
            return;
        }
        let from = page.plus(used / 8);
        let bytes = self.geometry.cluster_bytes() - used / 8;
        let Some(mut tail) = self.read("bitmap page", from, bytes) else {
            return;
        };
        tail[0] &= !0 << (used % 8);
        if tail.iter().any(|&byte| byte != 0) {
            let name = text(&entry.name);
            self.found(Finding::BitsPastEnd { name, offset: page }, 1);
        }
    }
}

fn table_bytes(entry: &DirectoryEntry) -> u64 {
    Geometry::entries_bytes(to_usize(entry.table_entries.into()))
}
