//! Internal snapshots: moments of the disk that live in the image itself.
//!
//! A snapshot is an L1 table of its own. Whatever it maps is counted once more, so that a guest
//! write moves every cluster that a snapshot still needs.
//!
//! Invariants:
//! - The refcounts, the active mapping with its COPIED flags and the snapshot table change by one
//!   write of the header (`NextMapping`): no crash shows one of them without the others.
//! - A snapshot's tables and data never change while it exists.
//! - Entries of the table that are not ours keep every byte.

mod anchor;
mod apply;
mod create;
mod delete;
mod delta;
mod table;
mod view;

pub use delta::{Delta, Moment};
pub use table::list;

pub(crate) use table::read as read_table;

use crate::alloc::Structure;
use crate::convert::to_u64;
use crate::error::{Damage, Mistake, Result};
use crate::format::header::Header;
use crate::format::limits;
use crate::format::snapshot::Snapshot;
use crate::geometry::Geometry;
use crate::image::Image;
use crate::image::file::ImageFile;

/// What the snapshot table says of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its identifier, decimal digits in images made by QEMU; bytes that are not UTF-8 are
    /// replaced. Two snapshots of one image never share it unless the image is damaged.
    pub id: String,
    /// Its name; bytes that are not UTF-8 are replaced. Names may repeat.
    pub name: String,
    /// When it was taken, seconds since the epoch.
    pub seconds: u32,
    /// Nanoseconds within that second.
    pub nanoseconds: u32,
    /// Time that the virtual machine had run, nanoseconds.
    pub vm_clock: u64,
    /// Bytes of saved machine state, stored behind the end of the disk.
    pub vm_state_bytes: u64,
    /// Virtual size of the disk at that moment, bytes.
    pub disk_bytes: u64,
    /// Instructions executed so far, when they were counted.
    pub instruction_count: Option<u64>,
}

impl SnapshotInfo {
    /// `present` is the disk's size now, which counts where the entry does not say.
    fn new(snapshot: &Snapshot, present: u64) -> Self {
        Self {
            id: String::from_utf8_lossy(&snapshot.id).into_owned(),
            name: String::from_utf8_lossy(&snapshot.name).into_owned(),
            seconds: snapshot.seconds,
            nanoseconds: snapshot.nanoseconds,
            vm_clock: snapshot.vm_clock,
            vm_state_bytes: snapshot.vm_state_bytes,
            disk_bytes: snapshot.disk_bytes.unwrap_or(present),
            instruction_count: snapshot
                .instruction_count
                .filter(|&count| count != u64::MAX),
        }
    }
}

impl Image {
    /// The internal snapshots, in the order of their table.
    ///
    /// # Errors
    /// A table that breaks the limits or is cut short, or I/O.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        list(self.file().storage(), &self.header())
    }

    /// The snapshot with this identifier or, when there is none, the first of this name.
    ///
    /// # Errors
    /// [`Mistake::NoSuchSnapshot`]; those of [`snapshots`](Self::snapshots).
    pub fn find_snapshot(&self, selector: &str) -> Result<SnapshotInfo> {
        let header = self.header();
        let entries = table::read(self.file().storage(), self.name(), &header)?;
        let number = position(self.file(), &entries, selector)?;
        Ok(SnapshotInfo::new(
            &entries[number].snapshot,
            header.disk_bytes,
        ))
    }
}

/// How a snapshot is chosen.
#[derive(Clone, Copy, Debug)]
enum Selection<'a> {
    /// By identifier or, when there is none, by name.
    IdOrName(&'a str),
    /// By name alone.
    Name(&'a str),
}

impl Selection<'_> {
    /// Number of the first entry that is meant.
    fn position(self, file: &ImageFile, entries: &[table::Entry]) -> Result<usize> {
        let find = |wanted: &str, field: fn(&Snapshot) -> &[u8]| {
            entries
                .iter()
                .position(|entry| field(&entry.snapshot) == wanted.as_bytes())
        };
        let (wanted, found) = match self {
            Self::IdOrName(wanted) => {
                let by_id = find(wanted, |snapshot| &snapshot.id);
                let found = by_id.or_else(|| find(wanted, |snapshot| &snapshot.name));
                (wanted, found)
            }
            Self::Name(wanted) => (wanted, find(wanted, |snapshot| &snapshot.name)),
        };
        found.ok_or_else(|| file.invalid(Mistake::NoSuchSnapshot(wanted.to_owned())))
    }
}

/// Number of the entry that `selector` means: an identifier before a name, as qemu-img looks.
fn position(file: &ImageFile, entries: &[table::Entry], selector: &str) -> Result<usize> {
    Selection::IdOrName(selector).position(file, entries)
}

/// The snapshot table and the L1 tables that it names: metadata that belongs to nobody else.
pub(crate) fn structures(file: &ImageFile, header: &Header) -> Result<Vec<Structure>> {
    let geometry = &header.geometry;
    let structure = |name, offset, bytes| Structure {
        name,
        offset,
        clusters: geometry.clusters_for(bytes),
        counted: true,
    };
    let entries = table::read(file.storage(), file.name(), header)?;
    let bytes = entries.iter().map(|entry| to_u64(entry.bytes.len())).sum();
    let mut found = vec![structure("snapshot table", header.snapshots_offset, bytes)];
    for entry in &entries {
        let snapshot = &entry.snapshot;
        check_l1(file, geometry, snapshot)?;
        let name = "L1 table of a snapshot";
        found.push(structure(name, snapshot.l1_offset, snapshot.l1_bytes()));
    }
    Ok(found)
}

/// The disk's size in a snapshot, after a check that its L1 table maps all of it.
fn disk_bytes(file: &ImageFile, header: &Header, snapshot: &Snapshot) -> Result<u64> {
    let bytes = snapshot.disk_bytes.unwrap_or(header.disk_bytes);
    let needed = header.geometry.l1_entries_for(bytes);
    if bytes > limits::MAX_DISK_BYTES || needed > u64::from(snapshot.l1_entries) {
        return Err(file.damage(Damage::Place {
            structure: "L1 table of a snapshot",
            offset: snapshot.l1_offset,
            problem: "is too small for the snapshot's disk size",
        }));
    }
    Ok(bytes)
}

fn check_l1(file: &ImageFile, geometry: &Geometry, snapshot: &Snapshot) -> Result<()> {
    let problem = if !geometry.is_aligned(snapshot.l1_offset) {
        "is not cluster aligned"
    } else if snapshot.l1_bytes() > limits::MAX_L1_BYTES {
        "is larger than 32 MiB"
    } else if snapshot.l1_offset.0 >= limits::MAX_HOST_OFFSET {
        "lies where no file ends"
    } else if snapshot.l1_bytes() > 0 && snapshot.l1_offset.0 == 0 {
        "lies on the header"
    } else {
        return Ok(());
    };
    Err(file.damage(Damage::Place {
        structure: "L1 table of a snapshot",
        offset: snapshot.l1_offset,
        problem,
    }))
}

/// The entries of a snapshot's L1 table. What lies beyond the end of the file is zero and costs no
/// reading.
fn read_l1(file: &ImageFile, geometry: &Geometry, snapshot: &Snapshot) -> Result<Vec<u64>> {
    check_l1(file, geometry, snapshot)?;
    let entries = crate::convert::index(snapshot.l1_entries);
    let present = file
        .len()?
        .saturating_sub(snapshot.l1_offset.0)
        .div_ceil(8)
        .min(to_u64(entries));
    let mut table = file.read_table(
        snapshot.l1_offset,
        crate::convert::to_usize(present),
        "read L1 table of a snapshot",
    )?;
    table.resize(entries, 0);
    Ok(table)
}
