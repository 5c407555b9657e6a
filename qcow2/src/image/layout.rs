//! Where everything goes in the first cluster, and how large a slot of the chain record may be.
//!
//! The canonical layout is header, bitmaps, chain, other extensions, end marker, backing name. The
//! bridge puts the same content behind everything that the present cluster refers to. A layout is
//! only rendered when it fits, and slots are sized so that QEMU's own layout of the same content,
//! and the bridge behind it, fit as well.

use super::first_cluster::{Content, FirstCluster, SECTOR};
use crate::convert::{to_u32, to_u64};
use crate::error::Feature;
use crate::format::bitmap::EXTENSION_BYTES;
use crate::format::chain::{self, ChainRecord, Detail, Head};
use crate::format::extension::{self, Extension, HEAD_BYTES};
use crate::format::header::V3_LENGTH;

/// Bytes of the feature name table that QEMU writes into clusters over 4 KiB.
const FEATURE_TABLE_SPAN: usize = 392;
/// Bytes of the longest backing format that QEMU accepts, as an extension.
const BACKING_FORMAT_SPAN: usize = 24;
/// Bytes of the longest backing name.
const MAX_BACKING_NAME: usize = 1023;
/// Largest slot; the slot offsets of the head end at 512 KiB.
const MAX_SLOT: usize = 128 << 10;

/// The slot with as much detail as fits into `capacity` bytes.
pub(super) fn fitting_slot(
    record: &ChainRecord,
    generation: u32,
    capacity: usize,
) -> Option<Vec<u8>> {
    [Detail::Full, Detail::WithTimes, Detail::Required]
        .into_iter()
        .map(|detail| record.encode_slot(generation, detail))
        .find(|slot| slot.len() <= capacity)
}

/// Where everything goes in the cluster.
#[derive(Debug)]
pub(super) struct Layout {
    /// End of the chain extension's data; `None` without that extension.
    chain_end: Option<usize>,
    /// Slots of the chain, absolute.
    slots: [usize; 2],
    active: usize,
    slot: Vec<u8>,
    /// End of everything.
    pub(super) end: usize,
}

impl Layout {
    pub(super) fn canonical(
        cluster: &FirstCluster,
        next: &Content,
    ) -> std::result::Result<Self, Feature> {
        let size = next.header.geometry.cluster_len();
        let data_start = chain_data_start(next);
        let rest = rest_len(next);
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
        let generation = cluster.next_generation();
        let required = record.encode_slot(generation, Detail::Required).len();
        let present = cluster.content().record.as_ref();
        let grows = present
            .is_none_or(|old| old.encode_slot(generation, Detail::Required).len() < required);
        let mut capacity = slot_capacity(next, Reserve::ForOthers);
        if required > capacity && !grows {
            // Others took what was kept for them: what is there already may stay.
            capacity = slot_capacity(next, Reserve::Nothing);
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
    pub(super) fn bridge(
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
        let generation = cluster.next_generation();
        let slot = match &next.record {
            None => Vec::new(),
            Some(record) => {
                let available = size.saturating_sub(start + rest_len(next));
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
        let end = chain_end + rest_len(next);
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
    pub(super) fn render(&self, cluster: &FirstCluster, next: &Content, base: &[u8]) -> Vec<u8> {
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
                generation: cluster.next_generation(),
            };
            front.extend_from_slice(&head.encode());
        }
        let mut tail = Vec::new();
        for entry in kept(next) {
            entry.write(&mut tail);
        }
        extension::write_head(extension::END, 0, &mut tail);
        let tail_start = self.chain_end.unwrap_or(front.len());
        let name_start = tail_start + tail.len();
        tail.extend_from_slice(&next.backing_name);

        let mut out = base.to_vec();
        out.resize(next.header.geometry.cluster_len(), 0);
        out[..SECTOR].fill(0);
        out[..front.len()].copy_from_slice(&front);
        let slot_at = self.slots[self.active];
        out[slot_at..slot_at + self.slot.len()].copy_from_slice(&self.slot);
        out[tail_start..tail_start + tail.len()].copy_from_slice(&tail);
        let mut header = next.header.clone();
        header.backing_name_length = to_u32(to_u64(next.backing_name.len()));
        header.backing_name_offset = match header.backing_name_length {
            0 => 0,
            _ => to_u64(name_start),
        };
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
fn kept(next: &Content) -> impl Iterator<Item = &Extension> {
    let (bitmaps, record) = (next.bitmaps.is_some(), next.record.is_some());
    next.others.iter().filter(move |entry| match entry.kind {
        extension::BITMAPS => !bitmaps,
        extension::CHAIN => !record,
        _ => true,
    })
}

/// Bytes of other extensions, end marker and backing name.
fn rest_len(next: &Content) -> usize {
    let others: usize = kept(next).map(Extension::span).sum();
    others + HEAD_BYTES + next.backing_name.len()
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
fn slot_capacity(next: &Content, reserve: Reserve) -> usize {
    let size = next.header.geometry.cluster_len();
    let free = |used: usize| size.saturating_sub(used);
    let mut rest = rest_len(next);
    if reserve == Reserve::ForOthers {
        rest += foreign_slack(next);
    }
    if size < 4 * SECTOR {
        // One slot inside sector 0; half of what is left stays for a backing name.
        let left = SECTOR.saturating_sub(chain_data_start(next) + chain::HEAD_BYTES + rest);
        let share = if reserve == Reserve::ForOthers { 2 } else { 1 };
        return (left / share) & !7;
    }
    if reserve == Reserve::ForOthers {
        let longest = MAX_BACKING_NAME.saturating_sub(next.backing_name.len());
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
fn foreign_slack(next: &Content) -> usize {
    let missing = |kind| !next.others.iter().any(|entry| entry.kind == kind);
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
