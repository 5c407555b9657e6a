//! Around the record: the head, and slots with their generation and CRC.

use byteorder::{BigEndian, ByteOrder};

use super::fields::Reader;
use super::{ChainRecord, Detail};
use crate::convert::{index, low_byte, to_u16, to_u32, to_u64};

/// Bytes of the head.
pub const HEAD_BYTES: usize = 16;
/// Version of the layout.
const VERSION: u8 = 1;
const NO_SLOT: u8 = 255;
/// Bytes of a slot around its record: length, generation, CRC.
const SLOT_FRAME_BYTES: usize = 12;

impl ChainRecord {
    /// Whole slot of this record: frame, record, CRC.
    pub fn encode_slot(&self, generation: u32, detail: Detail) -> Vec<u8> {
        let mut out = vec![0; 8];
        BigEndian::write_u32(&mut out[4..8], generation);
        self.write(&mut out, detail);
        let length = to_u32(to_u64(out.len() + 4));
        BigEndian::write_u32(&mut out[..4], length);
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_be_bytes());
        out
    }

    /// Decodes the slot at the start of `bytes`; `None` unless frame, CRC and record are sound.
    pub fn decode_slot(bytes: &[u8]) -> Option<(u32, Self)> {
        let length = index(BigEndian::read_u32(bytes.get(..4)?));
        let slot = bytes.get(..length).filter(|_| length >= SLOT_FRAME_BYTES)?;
        let (body, crc) = slot.split_at_checked(length - 4)?;
        if crc32fast::hash(body).to_be_bytes() != crc {
            return None;
        }
        let mut reader = Reader(body.get(8..)?);
        let record = Self::read(&mut reader)?;
        reader
            .0
            .is_empty()
            .then_some((BigEndian::read_u32(body.get(4..8)?), record))
    }
}

/// The head: which slot is active and where the slots are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Active slot, 0 or 1; `None` when the extension holds no record.
    pub active: Option<usize>,
    /// Offset of each slot from the start of the extension's data; multiples of 8.
    pub slots: [usize; 2],
    /// Generation of the active slot.
    pub generation: u32,
}

impl Head {
    /// The head's bytes.
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut out = [0; HEAD_BYTES];
        out[0] = VERSION;
        out[1] = self.active.map_or(NO_SLOT, |slot| low_byte(to_u64(slot)));
        BigEndian::write_u16(&mut out[2..4], to_u16(self.slots[0] / 8));
        BigEndian::write_u16(&mut out[4..6], to_u16(self.slots[1] / 8));
        BigEndian::write_u32(&mut out[8..12], self.generation);
        let crc = crc32fast::hash(&out[..12]);
        BigEndian::write_u32(&mut out[12..], crc);
        out
    }

    /// Decodes the head at the start of the extension's data; `None` when it is not ours to
    /// understand.
    pub fn decode(data: &[u8]) -> Option<Self> {
        let head: &[u8; HEAD_BYTES] = data.first_chunk()?;
        let sound = BigEndian::read_u32(&head[12..]) == crc32fast::hash(&head[..12]);
        if head[0] != VERSION || !sound {
            return None;
        }
        Some(Self {
            active: (head[1] < 2).then_some(usize::from(head[1])),
            slots: [
                usize::from(BigEndian::read_u16(&head[2..4])) * 8,
                usize::from(BigEndian::read_u16(&head[4..6])) * 8,
            ],
            generation: BigEndian::read_u32(&head[8..12]),
        })
    }
}

/// What the extension says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// No record.
    Absent,
    /// The record of the active slot.
    Current(ChainRecord),
    /// The active slot is damaged; this is the older one. Only what its proofs confirm may be used.
    Stale(ChainRecord),
    /// There is something, and nothing of it can be read.
    Damaged,
}

/// Reads the record from the extension's data.
pub fn read(data: &[u8]) -> Reading {
    let Some(head) = Head::decode(data) else {
        return Reading::Damaged;
    };
    let Some(active) = head.active else {
        return Reading::Absent;
    };
    let slot = |number: usize| ChainRecord::decode_slot(data.get(*head.slots.get(number)?..)?);
    match (slot(active), slot(1 - active)) {
        (Some((generation, record)), _) if generation == head.generation => {
            Reading::Current(record)
        }
        (_, Some((_, record))) => Reading::Stale(record),
        _ => Reading::Damaged,
    }
}
