//! What a structural change leaves behind: found before the header commits, freed after it.

use std::collections::HashSet;

use crate::alloc::{HostRun, single};
use crate::bitmaps::directory::{read_table, shape};
use crate::convert::{index, to_u64};
use crate::error::{Error, Result};
use crate::format::bitmap::{DirectoryEntry, TableEntry};
use crate::format::table::L1Entry;
use crate::geometry::Geometry;
use crate::image::{Image, lock};
use crate::units::{GuestCluster, HostCluster};

/// Everything that the present header names and the next one will not. What a foreign writer left
/// in use is only taken where nothing else owns it; what is damaged is left alone.
pub(super) fn retired_structures(
    image: &Image,
    retired: &[DirectoryEntry],
) -> Result<Vec<HostRun>> {
    let mut runs = Vec::new();
    if let Some((start, bytes)) = lock(&image.directory).place() {
        let clusters = image.geometry.clusters_for(bytes);
        runs.push(HostRun {
            start,
            clusters,
            untouched: false,
        });
    }
    let mut unsure = Vec::new();
    for entry in retired {
        let found = match structures(image, entry) {
            Ok(found) => found,
            Err(Error::Corrupt { .. }) => continue,
            Err(error) => return Err(error),
        };
        if entry.in_use {
            unsure.extend(found)
        } else {
            runs.extend(found)
        }
    }
    let clusters = unsure
        .iter()
        .map(|run| image.geometry.host_cluster(run.start).0)
        .collect();
    if !unsure.is_empty() && !image.guest_owns_any(&clusters)? {
        runs.extend(unsure);
    }
    Ok(runs)
}

/// Table and pages of a bitmap.
fn structures(image: &Image, entry: &DirectoryEntry) -> Result<Vec<HostRun>> {
    let shape = shape(
        &image.file,
        &image.geometry,
        image.size(),
        entry.granularity,
    )?;
    let table = read_table(&image.file, &image.geometry, shape, entry)?;
    let bytes = Geometry::entries_bytes(index(entry.table_entries));
    let clusters = image.geometry.clusters_for(bytes);
    let own = HostRun {
        start: entry.table_offset,
        clusters,
        untouched: false,
    };
    let pages = table.into_iter().filter_map(|page| match page {
        TableEntry::Cluster(offset) => Some(offset),
        TableEntry::Zeros | TableEntry::Ones => None,
    });
    image.with_allocator(|allocator, _| {
        // A page that lies on metadata is somebody else's: it stays.
        let pages = pages.filter(|&page| !allocator.is_fixed(image.geometry.host_cluster(page)));
        Ok(std::iter::once(own).chain(pages.map(single)).collect())
    })
}

/// Frees what nothing names any more, and protects the directory and tables that came instead.
pub(super) fn free_retired(image: &Image, runs: &[HostRun]) -> Result<()> {
    let places = lock(&image.directory).places();
    image.with_allocator(|allocator, _| {
        runs.iter().for_each(|&run| allocator.release(run));
        allocator.free_now(&image.file, runs)?;
        for (start, bytes) in places {
            allocator.fix_run(start, image.geometry.clusters_for(bytes));
        }
        Ok(())
    })
}

impl Image {
    /// Whether any guest cluster maps to one of `clusters`: then a bitmap's claim on it is wrong.
    fn guest_owns_any(&self, clusters: &HashSet<u64>) -> Result<bool> {
        let l1_entries = self.l1().len();
        for number in 0..l1_entries {
            let L1Entry::Table { offset, .. } = self.l1_entry(number)? else {
                continue;
            };
            if clusters.contains(&self.geometry.host_cluster(offset).0) {
                return Ok(true);
            }
            if self.has_external_data() {
                continue;
            }
            for (slot, raw) in self.read_l2(offset)?.into_iter().enumerate() {
                let guest =
                    GuestCluster(to_u64(number) * self.geometry.l2_entries() + to_u64(slot));
                let run = self.decode(raw, guest)?.host_run(&self.geometry);
                let (first, count) = run.unwrap_or((HostCluster(0), 0));
                if (first.0..first.0 + count).any(|host| clusters.contains(&host)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}
