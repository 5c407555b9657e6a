//! How everything that was staged becomes true: structures into fresh clusters, then one write of
//! the header.

use std::collections::HashSet;

use super::Update;
use super::pages::Pages;
use super::retire::retired_structures;
use crate::alloc::{HostRun, TablePlace};
use crate::bitmaps::directory::Directory;
use crate::bitmaps::{BitmapInfo, proof};
use crate::convert::{to_u32, to_u64, to_usize};
use crate::error::{Error, Feature, Result};
use crate::format::bitmap::{self, BitmapsExtension, DirectoryEntry};
use crate::format::header::Header;
use crate::format::limits;
use crate::image::first_cluster::Content;
use crate::image::{Image, lock};
use crate::units::HostOffset;

impl Update<'_> {
    /// Makes everything true; returns what the header no longer names.
    pub(super) fn commit(mut self) -> Result<Vec<HostRun>> {
        let image = self.image;
        self.check_room()?;
        let mut freed = retired_structures(image, &self.retired)?;
        let (mut taken, mut kept) = (Vec::new(), HashSet::new());
        let written = self
            .write_structures(&mut taken, &mut kept)
            .and_then(|extension| {
                image.settle()?;
                Ok((extension, self.place_counts()?))
            });
        freed.retain(|run| !kept.contains(&run.start));
        let (extension, counts) = match written {
            Ok(written) => written,
            Err(error) => {
                image.with_allocator(|allocator, _| allocator.free_now(&image.file, &taken))?;
                return Err(error);
            }
        };
        let entries: Vec<DirectoryEntry> = self.slots.into_iter().map(|slot| slot.entry).collect();
        if let Err(error) = commit_header(image, self.content, counts, extension, &entries) {
            if matches!(error, Error::Unsupported { .. }) {
                // Refused before the first byte: the new clusters are nobody's.
                image.with_allocator(|allocator, _| allocator.free_now(&image.file, &taken))?;
            } else {
                image.poison();
            }
            return Err(error);
        }
        let place = extension.map(|found| (found.directory_offset, found.directory_bytes));
        *lock(&image.directory) = Directory::new(entries, place);
        if counts.is_some() {
            image
                .with_allocator(|allocator, _| allocator.adopt_next(&image.file))
                .inspect_err(|_| image.poison())?;
        }
        Ok(freed)
    }

    fn place_counts(&self) -> Result<Option<TablePlace>> {
        let image = self.image;
        if !self.next_counts {
            return Ok(None);
        }
        image
            .with_allocator(|allocator, first| allocator.place_next(&image.file, first))
            .map(Some)
            .inspect_err(|error| {
                if matches!(error, Error::Io { .. }) && !error.is_no_space() {
                    image.poison();
                }
            })
    }

    /// Refuses what the first cluster has no room for, before anything is written.
    fn check_room(&self) -> Result<()> {
        // Room depends on which extensions there are, not on what they say.
        let bitmaps = (!self.slots.is_empty()).then_some(BitmapsExtension {
            count: 0,
            directory_bytes: 0,
            directory_offset: HostOffset::ZERO,
        });
        let first = lock(&self.image.first);
        let next = next_content(&self.content, first.header(), None, bitmaps);
        first.check_room(&self.image.file, &next)
    }

    /// Writes new contents, tables and the directory; clusters that it took go to `taken`, pages of
    /// replaced bitmaps that stay as they are to `kept`.
    fn write_structures(
        &mut self,
        taken: &mut Vec<HostRun>,
        kept: &mut HashSet<HostOffset>,
    ) -> Result<Option<BitmapsExtension>> {
        let image = self.image;
        for slot in &mut self.slots {
            if let Some(bits) = &slot.content {
                let old = self.retired.iter().find(|old| old.name == slot.entry.name);
                let pages = Pages::new(image, bits, old)?;
                slot.entry.table_offset = pages.write(taken, kept)?;
            }
        }
        if self.slots.is_empty() {
            return Ok(None);
        }
        let entries: Vec<DirectoryEntry> =
            self.slots.iter().map(|slot| slot.entry.clone()).collect();
        let mut bytes = bitmap::encode_directory(&entries);
        let directory_bytes = to_u64(bytes.len());
        if directory_bytes > limits::MAX_BITMAP_DIRECTORY_BYTES {
            let limit = limits::MAX_BITMAP_DIRECTORY_BYTES;
            let what = "bitmap directory bytes";
            return Err(image.file.unsupported(Feature::Limit {
                what,
                value: directory_bytes,
                limit,
            }));
        }
        let directory_offset = write_new(image, &mut bytes, "write bitmap directory", taken)?;
        let count = to_u32(to_u64(entries.len()));
        Ok(Some(BitmapsExtension {
            count,
            directory_bytes,
            directory_offset,
        }))
    }
}

/// Writes `bytes`, padded with zeros to whole clusters, into fresh clusters in a row.
pub(super) fn write_new(
    image: &Image,
    bytes: &mut Vec<u8>,
    what: &'static str,
    taken: &mut Vec<HostRun>,
) -> Result<HostOffset> {
    let clusters = image.geometry.clusters_for(to_u64(bytes.len()));
    bytes.resize(to_usize(clusters << image.geometry.cluster_bits), 0);
    let start =
        image.with_allocator(|allocator, _| allocator.allocate_exact(&image.file, clusters))?;
    taken.push(HostRun {
        start,
        clusters,
        untouched: false,
    });
    image.file.write(bytes, start, what)?;
    Ok(start)
}

fn commit_header(
    image: &Image,
    mut content: Content,
    counts: Option<TablePlace>,
    extension: Option<BitmapsExtension>,
    entries: &[DirectoryEntry],
) -> Result<()> {
    let mut first = lock(&image.first);
    if let Some(record) = &mut content.record {
        record.directory_digest =
            proof::directory_digest(record, entries.iter().map(BitmapInfo::from));
    }
    let next = next_content(&content, first.header(), counts, extension);
    first.commit(&image.file, next)
}

fn next_content(
    wanted: &Content,
    present: &Header,
    counts: Option<TablePlace>,
    bitmaps: Option<BitmapsExtension>,
) -> Content {
    let mut next = Content {
        bitmaps,
        ..wanted.clone()
    };
    // It may have moved while the structures were written.
    next.header.refcount_table_offset = present.refcount_table_offset;
    next.header.refcount_table_clusters = present.refcount_table_clusters;
    if let Some((offset, clusters)) = counts {
        next.header.refcount_table_offset = offset;
        next.header.refcount_table_clusters = clusters;
    }
    next.header.autoclear = wanted.header.upheld_autoclear(next.bitmaps.is_some());
    next
}
