//! Where new structures go: behind the end of the file, around whatever a damaged entry names
//! there.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::check::{Census, MAX_BEYOND};
use crate::convert::{to_u64, to_usize};
use crate::error::{Feature, Result};
use crate::format::limits;
use crate::image::file::ImageFile;
use crate::units::{HostCluster, HostOffset};

/// The new end of the file, cluster by cluster: other structures, refcount blocks, refcount table.
#[derive(Debug)]
pub(super) struct Place {
    /// Clusters of the other structures.
    pub(super) others: Range<u64>,
    /// Numbers of the refcount blocks that are needed.
    pub(super) blocks: Vec<u64>,
    /// First refcount block; the others follow.
    pub(super) first_block: u64,
    /// Clusters of the refcount table.
    pub(super) table: Range<u64>,
}

impl Place {
    /// Finds room for `others` clusters and for refcounts of everything that `census` counted.
    pub(super) fn find(file: &ImageFile, census: &Census<'_>, others: u64) -> Result<Self> {
        if census.beyond.len() >= MAX_BEYOND {
            return Err(file.unsupported(Feature::Limit {
                what: "entries that point past the end of the file",
                value: to_u64(census.beyond.len()),
                limit: to_u64(MAX_BEYOND) - 1,
            }));
        }
        let mut avoid = census.beyond.clone();
        avoid.sort_unstable_by_key(|range| range.start);
        let used = used_blocks(census);
        // Grows until it holds what counts it too; what is reserved and not needed stays free.
        let (mut blocks, mut table) = (to_u64(used.len()), 1);
        loop {
            let total = others + blocks + table;
            let start = first_gap(&avoid, census.clusters, total);
            let all = with_region(census, &used, start..start + total);
            let entries = all.last().map_or(1, |last| last + 1);
            let needed_table = census.geometry.clusters_for(entries.saturating_mul(8));
            check_limits(file, census, start + total, needed_table)?;
            if to_u64(all.len()) <= blocks && needed_table <= table {
                let first_block = start + others;
                return Ok(Self {
                    others: start..first_block,
                    blocks: all.into_iter().collect(),
                    first_block,
                    table: first_block + blocks..first_block + blocks + table,
                });
            }
            blocks = blocks.max(to_u64(all.len()));
            table = table.max(needed_table);
        }
    }

    /// Every cluster that will be used.
    pub(super) fn clusters(&self) -> impl Iterator<Item = u64> {
        let blocks = self.first_block..self.first_block + to_u64(self.blocks.len());
        self.others.clone().chain(blocks).chain(self.table.clone())
    }
}

/// Numbers of the blocks that count something now.
fn used_blocks(census: &Census<'_>) -> BTreeSet<u64> {
    let per_block = census.geometry.refcounts_per_block();
    let mut used = BTreeSet::new();
    let mut from = 0;
    while let Some(cluster) = census.counts.next_referenced(from, census.clusters) {
        let number = cluster / per_block;
        used.insert(number);
        from = (number + 1) * per_block;
    }
    used
}

fn with_region(census: &Census<'_>, used: &BTreeSet<u64>, region: Range<u64>) -> BTreeSet<u64> {
    let per_block = census.geometry.refcounts_per_block();
    let mut all = used.clone();
    all.extend(region.start / per_block..=(region.end - 1) / per_block);
    all
}

/// First cluster from `from` on with `clusters` free ones in a row.
fn first_gap(avoid: &[Range<u64>], from: u64, clusters: u64) -> u64 {
    let mut start = from;
    for range in avoid {
        if range.start < start.saturating_add(clusters) && range.end > start {
            start = range.end;
        }
    }
    start
}

fn check_limits(file: &ImageFile, census: &Census<'_>, end: u64, table: u64) -> Result<()> {
    let bytes = table.saturating_mul(census.geometry.cluster_bytes());
    let limit = limits::MAX_REFCOUNT_TABLE_BYTES;
    let most = limits::MAX_HOST_OFFSET >> census.geometry.cluster_bits;
    if bytes > limit || end > most {
        return Err(file.unsupported(Feature::Limit {
            what: "refcount table bytes",
            value: bytes,
            limit,
        }));
    }
    Ok(())
}

/// Writes the refcount blocks and the table at their place, with the counts of `census`.
pub(super) fn write_refcounts(file: &ImageFile, census: &Census<'_>, place: &Place) -> Result<()> {
    let geometry = census.geometry;
    let per_block = geometry.refcounts_per_block();
    let mut table = vec![0; to_usize(geometry.table_entries(place.table.end - place.table.start))];
    for (step, &number) in (0..).zip(&place.blocks) {
        let mut block = vec![0; geometry.cluster_len()];
        let range = number * per_block..(number + 1) * per_block;
        let mut from = range.start;
        while let Some(cluster) = census.counts.next_referenced(from, range.end) {
            let slot = to_usize(cluster - range.start);
            let count = census.counts.get(cluster);
            crate::format::refcount::set_count(&mut block, geometry.refcount_order, slot, count);
            from = cluster + 1;
        }
        let at = geometry.host_offset(HostCluster(place.first_block + step));
        file.write(&block, at, "write refcount block")?;
        table[to_usize(number)] = at.0;
    }
    let bytes: Vec<u8> = table.into_iter().flat_map(u64::to_be_bytes).collect();
    let at: HostOffset = geometry.host_offset(HostCluster(place.table.start));
    file.write(&bytes, at, "write refcount table")
}
