//! New structures behind the end of the file, and the one header write that makes them true.

use std::collections::HashSet;

use super::place::{Place, write_refcounts};
use super::salvage::{Kept, Salvage};
use super::{Loss, clusters_of, refuse_overflowed};
use crate::bitmaps::{BitmapInfo, proof};
use crate::check::Census;
use crate::convert::{to_u32, to_u64};
use crate::error::{Mistake, Result};
use crate::format::bitmap::{
    BitmapsExtension, DirectoryEntry, TableEntry, decode_directory, encode_directory, encode_table,
};
use crate::format::chain::{Health, Proof};
use crate::format::extension;
use crate::format::header::{Header, autoclear};
use crate::geometry::Geometry;
use crate::image::Image;
use crate::image::first_cluster::Content;
use crate::units::{HostCluster, HostOffset};

/// Writes refcounts of everything, of the width that `header` has, and the directory if it changed,
/// and publishes both with that header; returns what was lost.
pub(super) fn publish(image: &Image, header: &Header, salvage: Salvage) -> Result<Vec<Loss>> {
    let Salvage {
        mut kept,
        mut losses,
        changed,
    } = salvage;
    let file = image.file();
    let geometry = image.geometry();
    let mut census = census_to_be(image, header, &kept, changed)?;
    let mut room = NewClusters::default();
    let new_tables: Vec<u64> = kept
        .iter()
        .map(|kept| {
            kept.table
                .as_ref()
                .map_or(0, |table| table_clusters(&geometry, table))
        })
        .map(|clusters| room.take(clusters))
        .collect();
    let entries = || kept.iter().map(|kept| kept.entry.clone());
    let directory_bytes = to_u64(encode_directory(&entries().collect::<Vec<_>>()).len());
    let directory_step = room.take(match changed {
        true => clusters_of(&geometry, directory_bytes),
        false => 0,
    });
    let place = Place::find(file, &census, room.taken)?;
    let host = |step: u64| geometry.host_offset(HostCluster(place.others.start + step));
    for (kept, &step) in kept.iter_mut().zip(&new_tables) {
        if kept.table.is_some() {
            kept.entry.table_offset = host(step);
        }
    }
    place
        .clusters()
        .for_each(|cluster| _ = census.counts.add(cluster, 1));
    let entries: Vec<DirectoryEntry> = kept.iter().map(|kept| kept.entry.clone()).collect();
    let extension = BitmapsExtension {
        count: to_u32(to_u64(entries.len())),
        directory_bytes,
        directory_offset: host(directory_step),
    };
    let stale = forget_stale(image)?;
    let mut next = if changed {
        let bitmaps = (!entries.is_empty()).then_some(extension);
        content(image, header, &entries, bitmaps, &mut losses)
    } else {
        Content {
            header: header.clone(),
            ..image.first_cluster().content().clone()
        }
    };
    next.header.refcount_table_offset = geometry.host_offset(HostCluster(place.table.start));
    next.header.refcount_table_clusters = to_u32(place.table.end - place.table.start);
    losses.extend(stale.into_iter().map(Loss::Stale));
    image.first_cluster().check_room(file, &next)?;
    write_tables(image, &kept)?;
    if changed && !entries.is_empty() {
        write_padded(
            image,
            encode_directory(&entries),
            extension.directory_offset,
        )?;
    }
    write_refcounts(file, &census, &place)?;
    file.barrier()?;
    image.first_cluster().commit(file, next)?;
    Ok(losses)
}

/// Counts what will be referred to, as refcounts of that header's width hold it.
fn census_to_be<'a>(
    image: &'a Image,
    header: &Header,
    kept: &[Kept],
    changed: bool,
) -> Result<Census<'a>> {
    let file = image.file();
    let mut census = Census::new(file, header)?;
    census.count_contents(image, header);
    count_kept(&mut census, image, kept, changed);
    refuse_overflowed(image, &census)?;
    let same_width = header.geometry.refcount_order == image.geometry().refcount_order;
    if !same_width && (census.unfollowed || census.report.check_errors > 0) {
        // What was not seen cannot be kept by its old count.
        return Err(file.invalid(Mistake::Damaged));
    }
    if census.unfollowed {
        let table = census.read_refcount_table(header);
        census.keep_unexplained(&table)?;
    }
    Ok(census)
}

/// Clusters of the new region, handed out one behind the other.
#[derive(Default)]
struct NewClusters {
    taken: u64,
}

impl NewClusters {
    fn take(&mut self, clusters: u64) -> u64 {
        self.taken += clusters;
        self.taken - clusters
    }
}

/// Counts what the bitmaps that stay refer to, but for what will be written anew.
fn count_kept(census: &mut Census<'_>, image: &Image, kept: &[Kept], changed: bool) {
    let old = |kept: &&Kept| kept.table.is_none();
    let stays: Vec<DirectoryEntry> = kept
        .iter()
        .filter(old)
        .map(|kept| kept.entry.clone())
        .collect();
    let place = match changed {
        true => None,
        false => image.directory().place(),
    };
    census.count_bitmap_structures(place, &stays);
    let bytes = census.geometry.cluster_bytes();
    for table in kept.iter().filter_map(|kept| kept.table.as_ref()) {
        for page in table {
            if let TableEntry::Cluster(page) = page {
                census.count("bitmap page", *page, bytes, 1);
            }
        }
    }
}

fn table_clusters(geometry: &Geometry, table: &[TableEntry]) -> u64 {
    clusters_of(geometry, Geometry::entries_bytes(table.len()))
}

/// Writes the bitmap tables that are new.
fn write_tables(image: &Image, kept: &[Kept]) -> Result<()> {
    for kept in kept {
        if let Some(table) = &kept.table {
            write_padded(image, encode_table(table), kept.entry.table_offset)?;
        }
    }
    Ok(())
}

fn write_padded(image: &Image, mut bytes: Vec<u8>, at: HostOffset) -> Result<()> {
    let whole = bytes.len().next_multiple_of(image.geometry().cluster_len());
    bytes.resize(whole, 0);
    image.file().write(&bytes, at, "write bitmap structures")
}

/// What the first cluster will say: the record keeps every checkpoint, those without a bitmap as
/// missing.
fn content(
    image: &Image,
    header: &Header,
    entries: &[DirectoryEntry],
    bitmaps: Option<BitmapsExtension>,
    losses: &mut Vec<Loss>,
) -> Content {
    let mut next = image.first_cluster().content().clone();
    next.header = header.clone();
    next.bitmaps = bitmaps;
    match bitmaps {
        Some(_) => next.header.autoclear |= autoclear::BITMAPS,
        None => next.header.autoclear &= !autoclear::BITMAPS,
    }
    if let Some(record) = &mut next.record {
        let names: HashSet<&[u8]> = entries.iter().map(|entry| &entry.name[..]).collect();
        for checkpoint in &mut record.checkpoints {
            let gone = !names.contains(checkpoint.name.as_bytes());
            if gone && checkpoint.proof != Proof::None && checkpoint.health.is_usable() {
                checkpoint.health = Health::Missing;
                losses.push(Loss::Checkpoint(checkpoint.name.clone()));
            }
        }
        record.directory_digest =
            proof::directory_digest(record, entries.iter().map(BitmapInfo::from));
    }
    next
}

/// Takes the bitmaps out of the header: there are none that anybody could use.
pub(super) fn drop_bitmaps(image: &Image) -> Result<Vec<Loss>> {
    let mut losses = Vec::new();
    let stale = forget_stale(image)?;
    let next = content(image, &image.header(), &[], None, &mut losses);
    losses.extend(stale.into_iter().map(Loss::Stale));
    image.first_cluster().check_room(image.file(), &next)?;
    image.first_cluster().commit(image.file(), next)?;
    Ok(losses)
}

/// Lets go of a stale bitmaps extension; the next commit leaves it out. Returns the names that it
/// led to.
fn forget_stale(image: &Image) -> Result<Vec<String>> {
    let mut first = image.first_cluster();
    let stale: Vec<(Vec<u8>, usize)> = first
        .others()
        .iter()
        .filter(|entry| entry.kind == extension::BITMAPS)
        .map(|entry| (entry.data.clone(), entry.data_offset))
        .collect();
    first.forget_stale_bitmaps();
    let geometry = image.geometry();
    let end = image.file().len()?;
    let mut names = Vec::new();
    for (data, offset) in stale {
        let Ok(extension) = BitmapsExtension::decode(&data, offset, &geometry) else {
            continue;
        };
        let start = extension.directory_offset;
        if start.0.saturating_add(extension.directory_bytes) > end {
            continue;
        }
        let mut bytes = vec![0; crate::convert::to_usize(extension.directory_bytes)];
        image
            .file()
            .read(&mut bytes, start, "read bitmap directory")?;
        if let Ok(entries) = decode_directory(&bytes, extension.count, &geometry) {
            names.extend(entries.iter().map(|entry| crate::check::text(&entry.name)));
        }
    }
    Ok(names)
}
