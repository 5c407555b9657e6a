//! The bitmap directory of one image, as it is on disk.

use std::collections::HashMap;

use tidemark_bitmap::{Granularity, Shape};

use super::name;
use crate::convert::{index, to_u32, to_u64, to_usize};
use crate::error::{Damage, Error, Mistake, Result};
use crate::format::bitmap::{self, BitmapsExtension, DirectoryEntry, TableEntry};
use crate::format::extension;
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::image::first_cluster::FirstCluster;
use crate::units::HostOffset;

/// What the directory says of one bitmap; no bit has been read for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name; in one that is not UTF-8, bytes that are no text stand as `\xNN`, backslashes as
    /// `\\`. Calls that take a name take this.
    pub name: String,
    /// Bytes of disk per bit.
    pub granularity: Granularity,
    /// It records every write.
    pub auto: bool,
    /// A writer holds it or died holding it.
    pub in_use: bool,
}

impl From<&DirectoryEntry> for BitmapInfo {
    fn from(entry: &DirectoryEntry) -> Self {
        Self {
            name: name::text(&entry.name),
            granularity: entry.granularity,
            auto: entry.auto,
            in_use: entry.in_use,
        }
    }
}

/// The entries of the directory, or why they cannot be read.
#[derive(Debug)]
pub(crate) struct Directory {
    entries: std::result::Result<Vec<DirectoryEntry>, Error>,
    /// Where each name stands, and the text of each that is none; of two the first.
    by_name: HashMap<Vec<u8>, usize>,
    place: Option<(HostOffset, u64)>,
}

impl Directory {
    /// Reads the directory that the first cluster names.
    pub(crate) fn read(file: &ImageFile, first: &FirstCluster) -> Result<Self> {
        let Some(extension) = first.content().bitmaps else {
            return Ok(Self::new(Vec::new(), None));
        };
        let entries = read_entries(file, &first.header().geometry, &extension)?;
        Ok(Self::new(
            entries,
            Some((extension.directory_offset, extension.directory_bytes)),
        ))
    }

    pub(crate) fn new(entries: Vec<DirectoryEntry>, place: Option<(HostOffset, u64)>) -> Self {
        let mut by_name = HashMap::with_capacity(entries.len());
        for (number, entry) in entries.iter().enumerate() {
            by_name.entry(entry.name.clone()).or_insert(number);
        }
        // After all names as they are: those come first.
        for (number, entry) in entries.iter().enumerate() {
            if std::str::from_utf8(&entry.name).is_err() {
                let text = name::text(&entry.name).into_bytes();
                by_name.entry(text).or_insert(number);
            }
        }
        Self {
            entries: Ok(entries),
            by_name,
            place,
        }
    }

    /// A directory that nobody can read; the reason is given to whoever asks.
    pub(crate) fn unreadable(error: Error) -> Self {
        Self {
            entries: Err(error),
            by_name: HashMap::new(),
            place: None,
        }
    }

    /// The entries in directory order.
    pub(crate) fn entries(&self, file: &ImageFile) -> Result<&[DirectoryEntry]> {
        match &self.entries {
            Ok(entries) => Ok(entries),
            Err(Error::Corrupt { damage, .. }) => Err(file.damage(damage.clone())),
            Err(_) => {
                let structure = "bitmap directory";
                Err(file.damage(Damage::Truncated { structure }))
            }
        }
    }

    /// The entry of one bitmap.
    pub(crate) fn find(&self, file: &ImageFile, name: &str) -> Result<&DirectoryEntry> {
        self.look_up(file, name)?
            .ok_or_else(|| file.invalid(Mistake::NoSuchBitmap(name.to_owned())))
    }

    /// The entry of one bitmap, if there is one.
    pub(crate) fn look_up(&self, file: &ImageFile, name: &str) -> Result<Option<&DirectoryEntry>> {
        let entries = self.entries(file)?;
        let number = self.by_name.get(name.as_bytes());
        Ok(number.and_then(|number| entries.get(*number)))
    }

    /// Offset and bytes of the directory itself.
    pub(crate) fn place(&self) -> Option<(HostOffset, u64)> {
        self.place
    }

    /// Offset and bytes of the directory and of every bitmap table.
    pub(crate) fn places(&self) -> Vec<(HostOffset, u64)> {
        let entries = self.entries.as_deref().unwrap_or_default();
        let tables = entries.iter().map(|entry| {
            (
                entry.table_offset,
                Geometry::entries_bytes(index(entry.table_entries)),
            )
        });
        self.place.into_iter().chain(tables).collect()
    }
}

fn read_entries(
    file: &ImageFile,
    geometry: &Geometry,
    extension: &BitmapsExtension,
) -> Result<Vec<DirectoryEntry>> {
    let start = extension.directory_offset;
    if start.0.saturating_add(extension.directory_bytes) > file.len()? {
        let structure = "bitmap directory";
        return Err(file.damage(Damage::Truncated { structure }));
    }
    let mut bytes = vec![0; to_usize(extension.directory_bytes)];
    file.read(&mut bytes, start, "read bitmap directory")?;
    bitmap::decode_directory(&bytes, extension.count, geometry)
        .map_err(|damage| file.damage(damage))
}

/// What a stale extension names: some writer cleared the bitmaps' autoclear bit, for good or in the
/// middle of opening the image. Its clusters may be somebody else's by now, so that only a proof of
/// the bits makes anything of it. None where there is no such extension or it is not whole.
///
/// # Errors
/// I/O.
pub(crate) fn read_stale(file: &ImageFile, first: &FirstCluster) -> Result<Vec<DirectoryEntry>> {
    let geometry = first.header().geometry;
    let mut found = first
        .others()
        .iter()
        .filter(|entry| entry.kind == extension::BITMAPS);
    // Two of them contradict each other.
    let (Some(entry), None) = (found.next(), found.next()) else {
        return Ok(Vec::new());
    };
    let Ok(extension) = BitmapsExtension::decode(&entry.data, entry.data_offset, &geometry) else {
        return Ok(Vec::new());
    };
    match read_entries(file, &geometry, &extension) {
        Err(Error::Corrupt { .. }) => Ok(Vec::new()),
        answer => answer,
    }
}

/// The shape of a bitmap of this image: one page a cluster.
pub(crate) fn shape(
    file: &ImageFile,
    geometry: &Geometry,
    disk_bytes: u64,
    granularity: Granularity,
) -> Result<Shape> {
    Shape::new(disk_bytes, granularity, to_u32(geometry.cluster_bytes()))
        .map_err(|error| file.invalid(Mistake::Bitmap(error)))
}

/// Reads and checks the table of one bitmap, which must have exactly the entries its shape needs.
pub(crate) fn read_table(
    file: &ImageFile,
    geometry: &Geometry,
    shape: Shape,
    entry: &DirectoryEntry,
) -> Result<Vec<TableEntry>> {
    let place = |problem| {
        file.damage(Damage::Place {
            structure: "bitmap table",
            offset: entry.table_offset,
            problem,
        })
    };
    if index(entry.table_entries) != shape.pages() {
        return Err(place(
            "does not have the entries that the disk's size asks for",
        ));
    }
    let end = file.len()?;
    let mut bytes = vec![0; to_usize(Geometry::entries_bytes(shape.pages()))];
    if entry.table_offset.0.saturating_add(to_u64(bytes.len())) > end {
        return Err(place("lies past the end of the file"));
    }
    file.read(&mut bytes, entry.table_offset, "read bitmap table")?;
    let table = bitmap::decode_table(&bytes, geometry).map_err(|damage| file.damage(damage))?;
    for page in &table {
        // A page past the end would read as "nothing changed": the one answer that loses data.
        if let TableEntry::Cluster(offset) = page
            && offset.0 >= end
        {
            let problem = "lies past the end of the file";
            return Err(file.damage(Damage::Place {
                structure: "bitmap page",
                offset: *offset,
                problem,
            }));
        }
    }
    Ok(table)
}
