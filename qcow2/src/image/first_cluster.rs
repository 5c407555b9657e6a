//! The first cluster: header, extensions, backing name - and the one write that commits.
//!
//! Everything structural (disk size, L1, refcount table, snapshots, bitmap directory, autoclear
//! bits, active slot of the chain record) changes by **one write of the first 512 bytes**. For
//! that the bitmaps extension and the head of the chain record stand directly behind the header.
//!
//! Invariants:
//! - A commit writes first what the present sector 0 does not refer to, flushes, then writes
//!   sector 0, and flushes. Torn anywhere, the image is the old one or the new one.
//! - Other extensions, unknown header fields and the backing name are kept byte for byte, unless
//!   the commit is about them.
//! - A layout of somebody else (QEMU rewrites the whole cluster in its own order) is first
//!   *bridged*: the same content goes behind everything that is referred to, the chain extension
//!   spanning the old content; from there the canonical layout can be written.
//!
//! Canonical layout: header, bitmaps, chain (head inside sector 0, two slots from byte 512),
//! other extensions, end marker, backing name. With clusters under 2 KiB the chain has one slot,
//! inside sector 0.

use std::ops::Range;

use super::BackingReference;
use super::file::ImageFile;
use super::layout::{Layout, fitting_slot};
use crate::convert::to_u64;
use crate::error::{Feature, FormatError, Result};
use crate::format::bitmap::{BitmapsExtension, EXTENSION_BYTES};
use crate::format::chain::{self, ChainRecord, Head, Reading};
use crate::format::extension::{self, Extension, HEAD_BYTES};
use crate::format::header::{Header, autoclear};
use crate::units::HostOffset;

/// What the medium writes as a whole.
pub(crate) const SECTOR: usize = 512;
/// What a commit makes true.
#[derive(Clone, Debug)]
pub(crate) struct Content {
    pub(crate) header: Header,
    pub(crate) bitmaps: Option<BitmapsExtension>,
    pub(crate) record: Option<ChainRecord>,
    /// Extensions that are neither bitmaps nor chain, in order.
    pub(crate) others: Vec<Extension>,
    /// Name of the backing file; empty without one.
    pub(crate) backing_name: Vec<u8>,
}

/// The first cluster as it is on disk.
#[derive(Debug)]
pub(crate) struct FirstCluster {
    content: Content,
    reading: Reading,
    generation: u32,
    /// A bitmaps extension that breaks the rules; only repair meets one.
    broken: Option<BitmapsExtension>,
    bytes: Vec<u8>,
}

impl Content {
    /// Names another backing file, or none. Its format extension comes first, as QEMU has it.
    pub(crate) fn set_backing(&mut self, backing: Option<&BackingReference>) {
        self.others
            .retain(|entry| entry.kind != extension::BACKING_FORMAT);
        self.backing_name.clear();
        if let Some(backing) = backing {
            let format = Extension {
                kind: extension::BACKING_FORMAT,
                data_offset: 0,
                data: backing.format.clone().into_bytes(),
            };
            self.others.insert(0, format);
            self.backing_name.extend_from_slice(&backing.name);
        }
    }
}

impl FirstCluster {
    /// Parses the cluster. The bitmaps extension is only looked at when its autoclear bit is set:
    /// without it everything it says is stale.
    pub(crate) fn parse(bytes: Vec<u8>) -> std::result::Result<Self, FormatError> {
        Self::parse_with(bytes, false)
    }

    /// As [`parse`](Self::parse), and tolerates a bitmaps extension that breaks the rules.
    pub(crate) fn parse_for_repair(bytes: Vec<u8>) -> std::result::Result<Self, FormatError> {
        Self::parse_with(bytes, true)
    }

    fn parse_with(bytes: Vec<u8>, repair: bool) -> std::result::Result<Self, FormatError> {
        let header = Header::from_bytes(&bytes)?;
        let (list, _) = extension::parse(&header, &bytes)?;
        let name_start = crate::convert::to_usize(header.backing_name_offset);
        let name_end = name_start + crate::convert::index(header.backing_name_length);
        let backing_name = match name_start {
            0 => Vec::new(),
            _ => bytes.get(name_start..name_end).unwrap_or_default().to_vec(),
        };
        let trusted = header.autoclear & autoclear::BITMAPS != 0 && header.geometry.version > 2;
        let mut bitmaps = None;
        let mut broken = None;
        let mut reading = Reading::Absent;
        let mut generation = 0;
        let mut others = Vec::new();
        for entry in list {
            match entry.kind {
                extension::BITMAPS if trusted => {
                    let (data, at) = (&entry.data, entry.data_offset);
                    match BitmapsExtension::decode(data, at, &header.geometry) {
                        Ok(found) => bitmaps = Some(found),
                        Err(_) if repair => broken = Some(BitmapsExtension::decode_broken(data)),
                        Err(damage) => return Err(damage.into()),
                    }
                }
                // Stale: some writer did not keep it up to date. Kept for recovery by proof.
                extension::BITMAPS => others.push(entry),
                extension::CHAIN => {
                    reading = chain::read(&entry.data);
                    generation = Head::decode(&entry.data).map_or(0, |head| head.generation);
                    if is_opaque(&reading) {
                        others.push(entry);
                    }
                }
                _ => others.push(entry),
            }
        }
        let record = match &reading {
            Reading::Current(record) => Some(record.clone()),
            _ => None,
        };
        let broken = broken.filter(|_| bitmaps.is_none());
        let content = Content {
            header,
            bitmaps,
            record,
            others,
            backing_name,
        };
        Ok(Self {
            content,
            reading,
            generation,
            broken,
            bytes,
        })
    }

    /// A bitmaps extension that breaks the rules, in an image opened for repair.
    pub(crate) fn broken_bitmaps(&self) -> Option<BitmapsExtension> {
        self.broken
    }

    /// Lets go of stale bitmaps: the next commit leaves their extension out.
    pub(crate) fn forget_stale_bitmaps(&mut self) {
        let others = &mut self.content.others;
        others.retain(|entry| entry.kind != extension::BITMAPS);
    }

    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    pub(crate) fn header(&self) -> &Header {
        &self.content.header
    }

    pub(crate) fn reading(&self) -> &Reading {
        &self.reading
    }

    pub(crate) fn others(&self) -> &[Extension] {
        &self.content.others
    }

    /// Generation of the slot that the next commit writes.
    pub(super) fn next_generation(&self) -> u32 {
        self.generation.wrapping_add(1)
    }

    pub(crate) fn backing_name(&self) -> &[u8] {
        &self.content.backing_name
    }

    /// Whether [`commit`](Self::commit) of such content finds room; nothing is written.
    ///
    /// # Errors
    /// [`Feature::NoRoomInFirstCluster`].
    pub(crate) fn check_room(&self, file: &ImageFile, next: &Content) -> Result<()> {
        match self.plan(next) {
            Ok(_) => Ok(()),
            Err(feature) => Err(file.unsupported(feature)),
        }
    }

    /// Makes `next` true on disk, all of it or nothing.
    ///
    /// # Errors
    /// [`Feature::NoRoomInFirstCluster`] before anything is written; I/O errors, after which the
    /// disk has the old or the new content.
    pub(crate) fn commit(&mut self, file: &ImageFile, next: Content) -> Result<()> {
        let steps = self
            .plan(&next)
            .map_err(|feature| file.unsupported(feature))?;
        for step in steps {
            self.write_step(file, step)?;
        }
        self.reading = match &next.record {
            Some(record) => Reading::Current(record.clone()),
            None if is_opaque(&self.reading) => self.reading.clone(),
            None => Reading::Absent,
        };
        let (bitmaps, record) = (next.bitmaps.is_some(), next.record.is_some());
        self.content = next;
        self.content.others.retain(|entry| match entry.kind {
            extension::BITMAPS => !bitmaps,
            extension::CHAIN => !record,
            _ => true,
        });
        if let Ok(header) = Header::from_bytes(&self.bytes) {
            self.content.header.backing_name_offset = header.backing_name_offset;
            self.content.header.backing_name_length = header.backing_name_length;
        }
        self.generation = self.next_generation();
        Ok(())
    }

    fn write_step(&mut self, file: &ImageFile, step: Vec<u8>) -> Result<()> {
        let old = &self.bytes;
        let differs = |at: usize| old.get(at..at + SECTOR) != step.get(at..at + SECTOR);
        let behind: Vec<usize> = (SECTOR..step.len())
            .step_by(SECTOR)
            .filter(|&at| differs(at))
            .collect();
        if let (Some(&first), Some(&last)) = (behind.first(), behind.last()) {
            let end = (last + SECTOR).min(step.len());
            file.write(
                &step[first..end],
                HostOffset(to_u64(first)),
                "write header extensions",
            )?;
            file.barrier()?;
        }
        file.write(&step[..SECTOR], HostOffset::ZERO, "write header")?;
        file.barrier()?;
        self.bytes = step;
        Ok(())
    }

    /// The cluster images to be written one after another.
    fn plan(&self, next: &Content) -> std::result::Result<Vec<Vec<u8>>, Feature> {
        if let Some(patched) = self.patch(next) {
            return Ok(vec![patched]);
        }
        let goal = Layout::canonical(self, next)?;
        let goal_bytes = goal.render(self, next, &self.bytes);
        if self.may_become(&goal_bytes) {
            return Ok(vec![goal_bytes]);
        }
        let bridge = Layout::bridge(self, next, goal.end)?;
        let bridge_bytes = bridge.render(self, next, &self.bytes);
        // Over the bridge's bytes: what the bridge refers to must stay until sector 0 changes.
        let goal_bytes = goal.render(self, next, &bridge_bytes);
        Ok(vec![bridge_bytes, goal_bytes])
    }

    /// Byte ranges behind sector 0 that the cluster on disk refers to.
    pub(super) fn referenced(&self) -> Vec<Range<usize>> {
        let mut ranges = Vec::new();
        let Ok(header) = Header::from_bytes(&self.bytes) else {
            return ranges;
        };
        let Ok((list, end)) = extension::parse(&header, &self.bytes) else {
            return ranges;
        };
        for entry in &list {
            let start = entry.data_offset - HEAD_BYTES;
            if entry.kind != extension::CHAIN || is_opaque(&self.reading) {
                ranges.push(start..start + entry.span());
                continue;
            }
            ranges.push(start..entry.data_offset + chain::HEAD_BYTES);
            if let Some(head) = Head::decode(&entry.data)
                && let Some(active) = head.active
            {
                let slot = entry.data_offset + head.slots[active];
                ranges.push(slot..slot + self.slot_len(slot));
            }
        }
        ranges.push(end.saturating_sub(HEAD_BYTES)..end);
        let name = crate::convert::to_usize(header.backing_name_offset);
        ranges.push(name..name + self.backing_name().len());
        ranges
    }

    fn slot_len(&self, at: usize) -> usize {
        let length = self
            .bytes
            .get(at..)
            .and_then(|rest| rest.first_chunk::<4>());
        length.map_or(0, |bytes| crate::convert::index(u32::from_be_bytes(*bytes)))
    }

    fn may_become(&self, next: &[u8]) -> bool {
        self.referenced().iter().all(|range| {
            let range = range.start.max(SECTOR)..range.end.max(SECTOR);
            self.bytes.get(range.clone()) == next.get(range)
        })
    }

    /// The present layout with other values, when all of them stand inside sector 0 (the inactive
    /// slot may stand behind it).
    fn patch(&self, next: &Content) -> Option<Vec<u8>> {
        let mut out = self.bytes.clone();
        let old = Header::from_bytes(&out).ok()?;
        if old.length != next.header.length
            || self.content.backing_name != next.backing_name
            || self.content.others != next.others
        {
            return None;
        }
        let (list, _) = extension::parse(&old, &out).ok()?;
        let find = |kind| list.iter().filter(move |entry| entry.kind == kind);
        let mut header = next.header.clone();
        header.backing_name_offset = old.backing_name_offset;
        header.backing_name_length = old.backing_name_length;
        header.write(&mut out[..SECTOR]);
        let mut bitmaps = find(extension::BITMAPS);
        match (bitmaps.next(), bitmaps.next(), &next.bitmaps) {
            (None, _, None) => {}
            // A stale extension stays where it is as long as nothing replaces it.
            (Some(_), None, None) if self.content.others.iter().any(is_bitmaps) => {}
            (Some(_), None, Some(new)) if self.content.bitmaps.as_ref() == Some(new) => {}
            (Some(entry), None, Some(new))
                if entry.data_offset + EXTENSION_BYTES <= SECTOR
                    && entry.data.len() == EXTENSION_BYTES =>
            {
                out[entry.data_offset..entry.data_offset + EXTENSION_BYTES]
                    .copy_from_slice(&new.encode());
            }
            _ => return None,
        }
        let mut chains = find(extension::CHAIN);
        match (chains.next(), chains.next(), &next.record) {
            (None, _, None) => Some(out),
            (Some(_), None, None) if self.content.record.is_none() => Some(out),
            (Some(entry), None, Some(record)) => {
                self.patch_slot(&mut out, entry, record).then_some(out)
            }
            _ => None,
        }
    }

    fn patch_slot(&self, out: &mut [u8], entry: &Extension, record: &ChainRecord) -> bool {
        if self.content.record.as_ref() == Some(record) {
            return true;
        }
        if entry.data_offset + chain::HEAD_BYTES > SECTOR || is_opaque(&self.reading) {
            return false;
        }
        let Some(old) = Head::decode(&entry.data) else {
            return false;
        };
        let slot = old.active.map_or(0, |active| 1 - active);
        let start = old.slots[slot];
        let compact = old.slots[0] == old.slots[1];
        let limit = match slot {
            0 if !compact => old.slots[1],
            _ => entry.data.len(),
        };
        let generation = self.next_generation();
        let Some(bytes) = fitting_slot(record, generation, limit.saturating_sub(start)) else {
            return false;
        };
        let at = entry.data_offset + start;
        // A lone slot is only safe inside the sector that is written at once.
        if (compact || at < SECTOR) && at + bytes.len() > SECTOR {
            return false;
        }
        out[at..at + bytes.len()].copy_from_slice(&bytes);
        let head = Head {
            active: Some(slot),
            slots: old.slots,
            generation,
        };
        out[entry.data_offset..entry.data_offset + chain::HEAD_BYTES]
            .copy_from_slice(&head.encode());
        true
    }
}

fn is_bitmaps(entry: &Extension) -> bool {
    entry.kind == extension::BITMAPS
}

/// Whether the chain extension holds something that we cannot rewrite and must not drop.
fn is_opaque(reading: &Reading) -> bool {
    matches!(reading, Reading::Stale(_) | Reading::Damaged)
}
