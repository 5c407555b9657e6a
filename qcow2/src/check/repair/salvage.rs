//! What can be kept of the bitmaps: which entries stay, and which tables must be written anew.
//!
//! A page that is lost becomes all ones: the bitmap then says too much, never too little, and goes
//! on recording. Whoever has its checksum sees that it is not what it was.

use super::directory::Found;
use super::{Loss, clusters_of};
use crate::bitmaps::directory::shape;
use crate::check::{Census, text};
use crate::convert::{index, to_u32, to_u64, to_usize};
use crate::error::Result;
use crate::format::bitmap::{DirectoryEntry, TableEntry};
use crate::geometry::Geometry;
use crate::image::Image;
use crate::units::HostOffset;

/// Bytes of tables that are written anew at most; what a hostile directory asks for beyond them is
/// lost.
const MAX_NEW_TABLES: u64 = 64 << 20;

/// A bitmap that stays.
pub(super) struct Kept {
    pub(super) entry: DirectoryEntry,
    /// Its table, when it must be written anew.
    pub(super) table: Option<Vec<TableEntry>>,
}

/// The bitmaps as they will be.
pub(super) struct Salvage {
    pub(super) kept: Vec<Kept>,
    pub(super) losses: Vec<Loss>,
    /// A new directory is needed.
    pub(super) changed: bool,
}

impl Salvage {
    /// Looks at every table; `census` has counted everything, the tables and pages too.
    pub(super) fn plan(image: &Image, census: &Census<'_>, found: Found) -> Result<Self> {
        let mut changed = found.damaged;
        if let Some((offset, bytes)) = found.place {
            changed |= is_shared(census, offset, bytes);
        }
        let mut salvage = Self {
            kept: Vec::new(),
            losses: found.losses,
            changed,
        };
        let mut room = MAX_NEW_TABLES;
        for entry in found.entries {
            salvage.judge(image, census, entry, &mut room)?;
        }
        Ok(salvage)
    }

    fn judge(
        &mut self,
        image: &Image,
        census: &Census<'_>,
        mut entry: DirectoryEntry,
        room: &mut u64,
    ) -> Result<()> {
        let geometry = image.geometry();
        let shape = shape(image.file(), &geometry, image.size(), entry.granularity);
        let needed = match shape {
            Ok(shape) if shape.pages() > 0 => shape.pages(),
            _ => {
                self.lose(&entry, "its granularity does not fit the disk");
                return Ok(());
            }
        };
        let Some((table, lost)) = judge_table(image, census, &entry, needed)? else {
            self.kept.push(Kept { entry, table: None });
            return Ok(());
        };
        let bytes =
            clusters_of(&geometry, Geometry::entries_bytes(needed)) << geometry.cluster_bits;
        if bytes > *room {
            self.lose(&entry, "there is no room for a new table");
            return Ok(());
        }
        *room -= bytes;
        self.changed = true;
        self.losses.push(Loss::Widened {
            name: text(&entry.name),
            pages: lost,
            of: needed,
        });
        entry.table_entries = to_u32(to_u64(needed));
        let table = Some(table);
        self.kept.push(Kept { entry, table });
        Ok(())
    }

    fn lose(&mut self, entry: &DirectoryEntry, problem: &str) {
        self.changed = true;
        self.losses.push(Loss::Entry {
            number: self.kept.len(),
            name: text(&entry.name),
            problem: problem.to_owned(),
        });
    }
}

/// The table that must be written in the place of the one on disk, and how many of its pages are
/// lost; nothing when the one on disk is sound.
fn judge_table(
    image: &Image,
    census: &Census<'_>,
    entry: &DirectoryEntry,
    needed: usize,
) -> Result<Option<(Vec<TableEntry>, usize)>> {
    let bytes = Geometry::entries_bytes(needed);
    let end = image.file().len()?;
    let outside = entry.table_offset.0.saturating_add(bytes) > end;
    let other_size = index(entry.table_entries) != needed;
    if outside || other_size || is_shared(census, entry.table_offset, bytes) {
        // Table or granularity is wrong, and nothing tells which.
        let most = to_usize(MAX_NEW_TABLES / 8);
        return Ok(Some((vec![TableEntry::Ones; needed.min(most)], needed)));
    }
    let mut raw = image
        .file()
        .read_table(entry.table_offset, needed, "read bitmap table")?;
    let geometry = image.geometry();
    let is_lost = |raw: u64| match TableEntry::decode(raw, 0, &geometry) {
        Ok(TableEntry::Cluster(page)) => {
            page.0 >= end || is_shared(census, page, geometry.cluster_bytes())
        }
        Ok(TableEntry::Zeros | TableEntry::Ones) => false,
        Err(_) => true,
    };
    let mut lost = 0;
    for entry in &mut raw {
        if is_lost(*entry) {
            *entry = TableEntry::Ones.encode();
            lost += 1;
        }
    }
    if lost == 0 {
        return Ok(None);
    }
    let table = raw
        .into_iter()
        .map(|raw| TableEntry::decode(raw, 0, &geometry).unwrap_or(TableEntry::Ones));
    Ok(Some((table.collect(), lost)))
}

/// Whether something else refers to a cluster of the structure.
fn is_shared(census: &Census<'_>, offset: HostOffset, bytes: u64) -> bool {
    let first = census.geometry.host_cluster(offset).0;
    let clusters = clusters_of(&census.geometry, bytes);
    (first..first.saturating_add(clusters)).any(|cluster| census.counts.get(cluster) > 1)
}
