//! Reads a bitmap directory that need not be sound: every entry that can be understood.
//!
//! The header says twice how long the directory is, by a count and by bytes. An entry counts when
//! either says that there is one more and its own bytes make sense.

use std::collections::HashSet;

use byteorder::{BigEndian, ByteOrder};

use super::Loss;
use crate::check::text;
use crate::convert::{index, to_u64, to_usize};
use crate::error::{Damage, Result};
use crate::format::bitmap::{BitmapsExtension, DirectoryEntry, ENTRY_BYTES};
use crate::format::limits;
use crate::image::Image;
use crate::units::HostOffset;

/// What was found.
pub(super) struct Found {
    /// Where the directory is and how many bytes it claims, if that makes sense.
    pub(super) place: Option<(HostOffset, u64)>,
    /// Entries in their order, with names that no other has.
    pub(super) entries: Vec<DirectoryEntry>,
    pub(super) losses: Vec<Loss>,
    /// Header and directory are not what a sound image has.
    pub(super) damaged: bool,
}

impl Found {
    fn nothing() -> Self {
        Self {
            place: None,
            entries: Vec::new(),
            losses: Vec::new(),
            damaged: false,
        }
    }
}

/// Reads the directory, sound or not.
pub(super) fn read(image: &Image) -> Result<Found> {
    let (sound, broken) = {
        let first = image.first_cluster();
        (first.content().bitmaps, first.broken_bitmaps())
    };
    if let (Some(extension), Ok(entries)) = (sound, image.directory().entries(image.file())) {
        return Ok(Found {
            place: Some((extension.directory_offset, extension.directory_bytes)),
            entries: entries.to_vec(),
            ..Found::nothing()
        });
    }
    match sound.or(broken) {
        Some(extension) => salvage(image, extension),
        None => Ok(Found::nothing()),
    }
}

fn salvage(image: &Image, extension: BitmapsExtension) -> Result<Found> {
    let mut found = Found {
        damaged: true,
        ..Found::nothing()
    };
    let geometry = image.geometry();
    let offset = extension.directory_offset;
    let end = image.file().len()?;
    let problem = if offset == HostOffset::ZERO {
        Some("it would lie on the header")
    } else if !geometry.is_aligned(offset) {
        Some("it is not cluster aligned")
    } else if offset.0 >= end {
        Some("it lies past the end of the file")
    } else {
        None
    };
    if let Some(problem) = problem {
        found.losses.push(Loss::Directory { offset, problem });
        return Ok(found);
    }
    let claimed = extension
        .directory_bytes
        .clamp(1, limits::MAX_BITMAP_DIRECTORY_BYTES);
    // It takes whole clusters: an entry that the header cuts off may be whole.
    let bytes = claimed
        .next_multiple_of(geometry.cluster_bytes())
        .min(end - offset.0);
    let mut buffer = vec![0; to_usize(bytes)];
    image
        .file()
        .read(&mut buffer, offset, "read bitmap directory")?;
    let used = Reader {
        image,
        extension,
        bytes: &buffer,
        found: &mut found,
        names: HashSet::new(),
    }
    .read_all();
    found.place = Some((offset, to_u64(used).max(1)));
    if index(extension.count) != found.entries.len() {
        found.losses.push(Loss::Count {
            declared: extension.count,
            found: found.entries.len(),
        });
    }
    Ok(found)
}

struct Reader<'a> {
    image: &'a Image,
    extension: BitmapsExtension,
    bytes: &'a [u8],
    found: &'a mut Found,
    names: HashSet<Vec<u8>>,
}

impl Reader<'_> {
    /// Reads entry after entry; returns where the last one ends.
    fn read_all(mut self) -> usize {
        let (mut at, mut number) = (0, 0);
        loop {
            let counted = number < index(self.extension.count.min(limits::MAX_BITMAPS));
            let inside = to_u64(at + ENTRY_BYTES) <= self.extension.directory_bytes;
            let rest = self.bytes.get(at..).unwrap_or_default();
            let Some(head) = rest.first_chunk::<ENTRY_BYTES>() else {
                return at;
            };
            if !(counted || inside) || head.iter().all(|&byte| byte == 0) {
                return at;
            }
            match self.read_one(rest, number) {
                Some(span) => at += span,
                None => return at,
            }
            number += 1;
        }
    }

    /// Reads one entry; returns its bytes, if the next one can be found.
    fn read_one(&mut self, rest: &[u8], number: usize) -> Option<usize> {
        let geometry = self.image.geometry();
        match DirectoryEntry::decode(rest, number, &geometry) {
            Ok(entry) => {
                let span = entry.span();
                self.keep(entry, "the name is taken");
                Some(span)
            }
            Err(damage) => {
                if let Some(entry) = self.nameless(rest, number) {
                    self.keep(entry, "it has no name");
                    return Some(ENTRY_BYTES);
                }
                let (name, span) = span(rest);
                let problem = match damage {
                    Damage::BitmapDirectory { problem, .. } => problem.to_owned(),
                    other => other.to_string(),
                };
                self.found.losses.push(Loss::Entry {
                    number,
                    name,
                    problem,
                });
                span
            }
        }
    }

    /// An entry that lacks nothing but a name.
    fn nameless(&self, rest: &[u8], number: usize) -> Option<DirectoryEntry> {
        let mut bytes = rest.first_chunk::<ENTRY_BYTES>()?.to_vec();
        if BigEndian::read_u16(&bytes[18..20]) != 0 {
            return None;
        }
        BigEndian::write_u16(&mut bytes[18..20], 1);
        bytes.extend_from_slice(b"?       ");
        let mut entry = DirectoryEntry::decode(&bytes, number, &self.image.geometry()).ok()?;
        entry.name = Vec::new();
        Some(entry)
    }

    /// Keeps an entry, under another name when its own is taken.
    fn keep(&mut self, mut entry: DirectoryEntry, problem: &'static str) {
        if entry.name.is_empty() || self.names.contains(&entry.name) {
            let from = text(&entry.name);
            let stem = if from.is_empty() {
                "unnamed"
            } else {
                "renamed"
            };
            let names = &self.names;
            let fresh = (1_u64..)
                .map(|number| format!("{stem}-{number}"))
                .find(|name| !names.contains(name.as_bytes()));
            let to = fresh.unwrap_or_default();
            entry.name = to.clone().into_bytes();
            self.found.losses.push(Loss::Renamed { from, to, problem });
        }
        self.names.insert(entry.name.clone());
        self.found.entries.push(entry);
    }
}

/// Name and bytes of an entry that cannot be used.
fn span(rest: &[u8]) -> (String, Option<usize>) {
    let Some(head) = rest.first_chunk::<ENTRY_BYTES>() else {
        return (String::new(), None);
    };
    let name_len = usize::from(BigEndian::read_u16(&head[18..20]));
    let extra_len = index(BigEndian::read_u32(&head[20..24]));
    let start = ENTRY_BYTES + extra_len;
    let name = start
        .checked_add(name_len)
        .and_then(|end| rest.get(start..end));
    let sane = name_len <= limits::MAX_BITMAP_NAME_BYTES + 1 && extra_len <= 1 << 16;
    match name {
        Some(name) if sane => (text(name), Some((start + name_len).next_multiple_of(8))),
        _ => (String::new(), None),
    }
}
