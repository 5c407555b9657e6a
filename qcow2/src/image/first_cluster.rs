//! The first cluster: header, extensions, backing name - and the one write that commits.
//!
//! Everything structural (disk size, L1, refcount table, snapshots, bitmap directory, autoclear
//! bits, active slot of the chain record) changes by **one write of the first 512 bytes**. For
//! that the bitmaps extension and the head of the chain record stand directly behind the header.
//!
//! Invariants:
//! - A commit writes first what the present sector 0 does not refer to, flushes, then writes
//!   sector 0, and flushes. Torn anywhere, the image is the old one or the new one.
//! - Other extensions, unknown header fields and the backing name are kept byte for byte.
//! - A layout of somebody else (QEMU rewrites the whole cluster in its own order) is first
//!   *bridged*: the same content goes behind everything that is referred to, the chain extension
//!   spanning the old content; from there the canonical layout can be written.
//!
//! Canonical layout: header, bitmaps, chain (head inside sector 0, two slots from byte 512),
//! other extensions, end marker, backing name. With clusters under 2 KiB the chain has one slot,
//! inside sector 0.

use std::ops::Range;

use super::file::ImageFile;
use crate::convert::to_u64;
use crate::error::{Feature, FormatError, Result};
use crate::format::bitmap::{BitmapsExtension, EXTENSION_BYTES};
use crate::format::chain::{self, ChainRecord, Detail, Head, Reading};
use crate::format::extension::{self, Extension, HEAD_BYTES};
use crate::format::header::{Header, V3_LENGTH, autoclear};
use crate::units::HostOffset;

/// What the medium writes as a whole.
pub(crate) const SECTOR: usize = 512;
/// Bytes of the feature name table that QEMU writes into clusters over 4 KiB.
const FEATURE_TABLE_SPAN: usize = 392;
/// Bytes of the longest backing format that QEMU accepts, as an extension.
const BACKING_FORMAT_SPAN: usize = 24;
/// Bytes of the longest backing name.
const MAX_BACKING_NAME: usize = 1023;
/// Largest slot; the slot offsets of the head end at 512 KiB.
const MAX_SLOT: usize = 128 << 10;

/// What a commit makes true.
#[derive(Clone, Debug)]
pub(crate) struct Content {
    pub(crate) header: Header,
    pub(crate) bitmaps: Option<BitmapsExtension>,
    pub(crate) record: Option<ChainRecord>,
}

/// The first cluster as it is on disk.
#[derive(Debug)]
pub(crate) struct FirstCluster {
    content: Content,
    reading: Reading,
    generation: u32,
    /// Extensions that are neither bitmaps nor chain, in order.
    others: Vec<Extension>,
    backing_name: Vec<u8>,
    bytes: Vec<u8>,
}

impl FirstCluster {
    /// Parses the cluster. The bitmaps extension is only looked at when its autoclear bit is set:
    /// without it everything it says is stale.
    pub(crate) fn parse(bytes: Vec<u8>) -> std::result::Result<Self, FormatError> {
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
        let mut reading = Reading::Absent;
        let mut generation = 0;
        let mut others = Vec::new();
        for entry in list {
            match entry.kind {
                extension::BITMAPS if trusted => {
                    bitmaps = Some(BitmapsExtension::decode(
                        &entry.data,
                        entry.data_offset,
                        &header.geometry,
                    )?);
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
        let content = Content {
            header,
            bitmaps,
            record,
        };
        Ok(Self {
            content,
            reading,
            generation,
            others,
            backing_name,
            bytes,
        })
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
        &self.others
    }

    pub(crate) fn backing_name(&self) -> &[u8] {
        &self.backing_name
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
        if next.bitmaps.is_some() {
            self.others.retain(|entry| entry.kind != extension::BITMAPS);
        }
        if next.record.is_some() {
            self.others.retain(|entry| entry.kind != extension::CHAIN);
        }
        let name_offset = Header::from_bytes(&self.bytes)
            .map_or(next.header.backing_name_offset, |header| {
                header.backing_name_offset
            });
        self.content = next;
        self.content.header.backing_name_offset = name_offset;
        self.generation = self.generation.wrapping_add(1);
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
    fn referenced(&self) -> Vec<Range<usize>> {
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
        ranges.push(name..name + self.backing_name.len());
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
            || self.backing_name.is_empty() != (next.header.backing_name_offset == 0)
        {
            return None;
        }
        let (list, _) = extension::parse(&old, &out).ok()?;
        let find = |kind| list.iter().filter(move |entry| entry.kind == kind);
        let mut header = next.header.clone();
        header.backing_name_offset = old.backing_name_offset;
        header.write(&mut out[..SECTOR]);
        let mut bitmaps = find(extension::BITMAPS);
        match (bitmaps.next(), bitmaps.next(), &next.bitmaps) {
            (None, _, None) => {}
            // A stale extension stays where it is as long as nothing replaces it.
            (Some(_), None, None) if self.content.bitmaps.is_none() => {}
            (Some(_), None, Some(new)) if self.content.bitmaps.as_ref() == Some(new) => {}
            (Some(entry), None, Some(new)) if entry.data_offset + EXTENSION_BYTES <= SECTOR => {
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
        let generation = self.generation.wrapping_add(1);
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

/// Whether the chain extension holds something that we cannot rewrite and must not drop.
fn is_opaque(reading: &Reading) -> bool {
    matches!(reading, Reading::Stale(_) | Reading::Damaged)
}

/// The slot with as much detail as fits into `capacity` bytes.
fn fitting_slot(record: &ChainRecord, generation: u32, capacity: usize) -> Option<Vec<u8>> {
    [Detail::Full, Detail::WithTimes, Detail::Required]
        .into_iter()
        .map(|detail| record.encode_slot(generation, detail))
        .find(|slot| slot.len() <= capacity)
}

/// Where everything goes in the cluster.
#[derive(Debug)]
struct Layout {
    /// End of the chain extension's data; `None` without that extension.
    chain_end: Option<usize>,
    /// Slots of the chain, absolute.
    slots: [usize; 2],
    active: usize,
    slot: Vec<u8>,
    /// End of everything.
    end: usize,
}

impl Layout {
    fn canonical(cluster: &FirstCluster, next: &Content) -> std::result::Result<Self, Feature> {
        let size = next.header.geometry.cluster_len();
        let data_start = chain_data_start(next);
        let rest = rest_len(cluster, next);
        let Some(record) = &next.record else {
            let end = data_start - HEAD_BYTES + rest;
            return Self {
                chain_end: None,
                slots: [0; 2],
                active: 0,
                slot: Vec::new(),
                end,
            }
            .checked(size, "the header extensions");
        };
        let generation = cluster.generation.wrapping_add(1);
        let required = record.encode_slot(generation, Detail::Required).len();
        let present = cluster.content.record.as_ref();
        let grows = present
            .is_none_or(|old| old.encode_slot(generation, Detail::Required).len() < required);
        let mut capacity = slot_capacity(cluster, next, Reserve::ForOthers);
        if required > capacity && !grows {
            // Others took what was kept for them: what is there already may stay.
            capacity = slot_capacity(cluster, next, Reserve::Nothing);
        }
        let no_room = Feature::NoRoomInFirstCluster {
            what: "the chain record",
            needed: required,
            available: capacity,
        };
        let slot = fitting_slot(record, generation, capacity).ok_or(no_room)?;
        if size < 4 * SECTOR {
            let at = data_start + chain::HEAD_BYTES;
            let chain_end = at + slot.len().next_multiple_of(8);
            let end = chain_end + rest;
            let layout = Self {
                chain_end: Some(chain_end),
                slots: [at; 2],
                active: 0,
                slot,
                end,
            };
            return layout.checked(SECTOR.min(size), "the chain record");
        }
        let slots = [SECTOR, SECTOR + capacity];
        let chain_end = SECTOR + 2 * capacity;
        let end = chain_end + rest;
        Self {
            chain_end: Some(chain_end),
            slots,
            active: 0,
            slot,
            end,
        }
        .checked(size, "the chain record")
    }

    /// Everything behind what the present cluster refers to and behind `goal_end`.
    fn bridge(
        cluster: &FirstCluster,
        next: &Content,
        goal_end: usize,
    ) -> std::result::Result<Self, Feature> {
        let size = next.header.geometry.cluster_len();
        let used = cluster
            .referenced()
            .iter()
            .map(|range| range.end)
            .max()
            .unwrap_or(0);
        let start = used.max(goal_end).max(SECTOR).next_multiple_of(8);
        let generation = cluster.generation.wrapping_add(1);
        let slot = match &next.record {
            None => Vec::new(),
            Some(record) => {
                let available = size.saturating_sub(start + rest_len(cluster, next));
                let needed = record.encode_slot(generation, Detail::Required).len();
                let what = "a safe change of the header's layout";
                fitting_slot(record, generation, available).ok_or(
                    Feature::NoRoomInFirstCluster {
                        what,
                        needed,
                        available,
                    },
                )?
            }
        };
        let chain_end = start + slot.len().next_multiple_of(8);
        let end = chain_end + rest_len(cluster, next);
        Self {
            chain_end: Some(chain_end),
            slots: [start; 2],
            active: 0,
            slot,
            end,
        }
        .checked(size, "a safe change of the header's layout")
    }

    fn checked(self, available: usize, what: &'static str) -> std::result::Result<Self, Feature> {
        if self.end > available
            || self
                .slots
                .iter()
                .any(|&slot| slot / 8 > usize::from(u16::MAX))
        {
            return Err(Feature::NoRoomInFirstCluster {
                what,
                needed: self.end,
                available,
            });
        }
        Ok(self)
    }

    /// The cluster in this layout; what the layout does not place stays as in `base`.
    fn render(&self, cluster: &FirstCluster, next: &Content, base: &[u8]) -> Vec<u8> {
        let mut front = vec![0; next.header.length];
        if let Some(bitmaps) = &next.bitmaps {
            extension::write_head(extension::BITMAPS, EXTENSION_BYTES, &mut front);
            front.extend_from_slice(&bitmaps.encode());
        }
        if let Some(chain_end) = self.chain_end {
            let start = front.len() + HEAD_BYTES;
            extension::write_head(extension::CHAIN, chain_end - start, &mut front);
            let head = Head {
                active: next.record.is_some().then_some(self.active),
                slots: self.slots.map(|slot| slot - start),
                generation: cluster.generation.wrapping_add(1),
            };
            front.extend_from_slice(&head.encode());
        }
        let mut tail = Vec::new();
        for entry in kept(cluster, next) {
            entry.write(&mut tail);
        }
        extension::write_head(extension::END, 0, &mut tail);
        let tail_start = self.chain_end.unwrap_or(front.len());
        let name_start = tail_start + tail.len();
        tail.extend_from_slice(&cluster.backing_name);

        let mut out = base.to_vec();
        out.resize(next.header.geometry.cluster_len(), 0);
        out[..SECTOR].fill(0);
        out[..front.len()].copy_from_slice(&front);
        let slot_at = self.slots[self.active];
        out[slot_at..slot_at + self.slot.len()].copy_from_slice(&self.slot);
        out[tail_start..tail_start + tail.len()].copy_from_slice(&tail);
        let mut header = next.header.clone();
        if !cluster.backing_name.is_empty() {
            header.backing_name_offset = to_u64(name_start);
        }
        header.write(&mut out);
        out
    }
}

/// Offset of the chain extension's data in our layouts.
fn chain_data_start(next: &Content) -> usize {
    let bitmaps = if next.bitmaps.is_some() {
        extension::span(EXTENSION_BYTES)
    } else {
        0
    };
    next.header.length + bitmaps + HEAD_BYTES
}

/// Other extensions that stay: a stale copy of what is now written goes.
fn kept<'a>(cluster: &'a FirstCluster, next: &Content) -> impl Iterator<Item = &'a Extension> {
    let (bitmaps, record) = (next.bitmaps.is_some(), next.record.is_some());
    cluster.others.iter().filter(move |entry| match entry.kind {
        extension::BITMAPS => !bitmaps,
        extension::CHAIN => !record,
        _ => true,
    })
}

/// Bytes of other extensions, end marker and backing name.
fn rest_len(cluster: &FirstCluster, next: &Content) -> usize {
    let others: usize = kept(cluster, next).map(Extension::span).sum();
    others + HEAD_BYTES + cluster.backing_name.len()
}

/// What a layout leaves free.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reserve {
    /// Room for what QEMU may add, and for a longer backing name.
    ForOthers,
    Nothing,
}

/// Bytes that one slot may take so that QEMU can still rewrite the cluster in its own order, with
/// a longer backing name, and so that its layout can still be bridged back to ours.
fn slot_capacity(cluster: &FirstCluster, next: &Content, reserve: Reserve) -> usize {
    let size = next.header.geometry.cluster_len();
    let free = |used: usize| size.saturating_sub(used);
    let mut rest = rest_len(cluster, next);
    if reserve == Reserve::ForOthers {
        rest += foreign_slack(cluster, next);
    }
    if size < 4 * SECTOR {
        // One slot inside sector 0; half of what is left stays for a backing name.
        let left = SECTOR.saturating_sub(chain_data_start(next) + chain::HEAD_BYTES + rest);
        let share = if reserve == Reserve::ForOthers { 2 } else { 1 };
        return (left / share) & !7;
    }
    if reserve == Reserve::ForOthers {
        let longest = MAX_BACKING_NAME.saturating_sub(cluster.backing_name.len());
        rest += if size > 4096 {
            longest
        } else {
            longest.min(free(SECTOR + 2 * rest) / 7)
        };
    }
    // QEMU's layout holds the extension of two slots and all the rest once; the bridge adds the
    // rest and one slot behind it.
    let used = SECTOR + next.header.length + 2 * rest;
    ((free(used) / 3) & !7).min(MAX_SLOT)
}

/// What QEMU adds when it rewrites the cluster, as far as it is not there yet.
fn foreign_slack(cluster: &FirstCluster, next: &Content) -> usize {
    let missing = |kind| !cluster.others.iter().any(|entry| entry.kind == kind);
    let mut slack = V3_LENGTH.saturating_sub(next.header.length);
    if next.header.geometry.cluster_len() > 4096 && missing(extension::FEATURE_NAMES) {
        slack += FEATURE_TABLE_SPAN;
    }
    if next.bitmaps.is_none() {
        slack += extension::span(EXTENSION_BYTES);
    }
    if missing(extension::BACKING_FORMAT) {
        slack += BACKING_FORMAT_SPAN;
    }
    slack
}
