//! The fields of a record, one behind the other, without padding.

use tidemark_bitmap::Granularity;

use super::{
    AnchorProof, ChainRecord, CheckpointEntry, Descent, Detail, FrozenProof, Health, Identity,
    ImageUuid, Intent, IntentKind, Proof, RecordingProof, Scheme,
};
use crate::convert::{low_byte, to_u16, to_u64};

/// Checkpoints of one record; more could not be addressed by name in reasonable time.
const MAX_CHECKPOINTS: usize = 65_535;

impl ChainRecord {
    pub(super) fn write(&self, out: &mut Vec<u8>, detail: Detail) {
        out.extend_from_slice(&self.image.0);
        out.push(match self.scheme {
            Scheme::Intervals => 0,
            Scheme::Cumulative => 1,
        });
        let flags = u8::from(self.current.is_some()) | (u8::from(self.intent.is_some()) << 1);
        out.push(flags);
        out.extend_from_slice(&self.directory_digest.to_be_bytes());
        if let Some(current) = self.current {
            out.extend_from_slice(&current.0);
        }
        if let Some(intent) = &self.intent {
            intent.write(out);
        }
        out.push(low_byte(to_u64(self.decisions.len())));
        for decision in &self.decisions {
            out.extend_from_slice(&decision.0);
        }
        out.push(low_byte(to_u64(self.descents.len())));
        for descent in &self.descents {
            out.extend_from_slice(&descent.image.0);
            out.extend_from_slice(&descent.checkpoint.0);
        }
        out.extend_from_slice(&to_u16(self.checkpoints.len().min(MAX_CHECKPOINTS)).to_be_bytes());
        for entry in &self.checkpoints {
            entry.write(out, detail);
        }
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let image = ImageUuid(reader.array()?);
        let scheme = match reader.byte()? {
            0 => Scheme::Intervals,
            1 => Scheme::Cumulative,
            _ => return None,
        };
        let flags = reader.byte()?;
        let directory_digest = u32::from_be_bytes(reader.array()?);
        let current = if flags & 1 != 0 {
            Some(Identity(reader.array()?))
        } else {
            None
        };
        let intent = if flags & 2 != 0 {
            Some(Intent::read(reader)?)
        } else {
            None
        };
        let decisions = (0..reader.byte()?)
            .map(|_| Some(Identity(reader.array()?)))
            .collect::<Option<_>>()?;
        let descents = (0..reader.byte()?)
            .map(|_| {
                let image = ImageUuid(reader.array()?);
                Some(Descent {
                    image,
                    checkpoint: Identity(reader.array()?),
                })
            })
            .collect::<Option<_>>()?;
        let count = u16::from_be_bytes(reader.array()?);
        let checkpoints = (0..count)
            .map(|_| CheckpointEntry::read(reader))
            .collect::<Option<_>>()?;
        Some(Self {
            image,
            scheme,
            current,
            intent,
            decisions,
            descents,
            directory_digest,
            checkpoints,
        })
    }
}

impl Intent {
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.push(match self.kind {
            IntentKind::Create => 0,
            IntentKind::Backup => 1,
        });
        out.extend_from_slice(&self.transaction.0);
        out.extend_from_slice(&self.checkpoint.0);
        out.extend_from_slice(&self.decider_image.0);
        write_text(&self.decider, out);
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let kind = match reader.byte()? {
            0 => IntentKind::Create,
            1 => IntentKind::Backup,
            _ => return None,
        };
        Some(Self {
            kind,
            transaction: Identity(reader.array()?),
            checkpoint: Identity(reader.array()?),
            decider_image: ImageUuid(reader.array()?),
            decider: reader.text()?,
        })
    }
}

const HAS_PARENT: u8 = 1;
const HAS_TIME: u8 = 1 << 1;
const HAS_SIZE: u8 = 1 << 2;
const IS_FROZEN: u8 = 1 << 3;
const IS_RECORDING: u8 = 1 << 4;
const IS_ANCHORED: u8 = 1 << 5;

impl CheckpointEntry {
    /// Entry: identity (16) · name length (1) and name · flags (1) · health (1) · granularity bits
    /// (1) · [parent (16)] · [created (8)] · [disk bytes (8)] · [anchor: seconds (4), nanoseconds
    /// (4), checksum (4)] · proof: frozen checksum (4) and count
    /// (8), or recording count (8), smallest disk (8), planted and witnesses, each a length (1)
    /// and byte offsets (8 each).
    pub(super) fn write(&self, out: &mut Vec<u8>, detail: Detail) {
        let times = detail >= Detail::WithTimes;
        out.extend_from_slice(&self.identity.0);
        write_text(&self.name, out);
        let mut flags = 0;
        let created = self.created.filter(|_| times);
        let disk_bytes = self.disk_bytes.filter(|_| times);
        for (present, flag) in [
            (self.parent.is_some(), HAS_PARENT),
            (created.is_some(), HAS_TIME),
            (disk_bytes.is_some(), HAS_SIZE),
            (matches!(self.proof, Proof::Frozen(_)), IS_FROZEN),
            (matches!(self.proof, Proof::Recording(_)), IS_RECORDING),
            (self.anchor.is_some(), IS_ANCHORED),
        ] {
            flags |= if present { flag } else { 0 };
        }
        out.extend_from_slice(&[flags, self.health.code(), self.granularity.bits()]);
        if let Some(parent) = self.parent {
            out.extend_from_slice(&parent.0);
        }
        for number in created.iter().chain(&disk_bytes) {
            out.extend_from_slice(&number.to_be_bytes());
        }
        if let Some(anchor) = &self.anchor {
            for number in [anchor.seconds, anchor.nanoseconds, anchor.l1_checksum] {
                out.extend_from_slice(&number.to_be_bytes());
            }
        }
        match &self.proof {
            Proof::None => {}
            Proof::Frozen(proof) => {
                out.extend_from_slice(&proof.checksum.to_be_bytes());
                out.extend_from_slice(&proof.count.to_be_bytes());
            }
            Proof::Recording(proof) => {
                out.extend_from_slice(&proof.count.to_be_bytes());
                out.extend_from_slice(&proof.smallest_disk_bytes.to_be_bytes());
                write_offsets(&proof.planted, out);
                let full = detail >= Detail::Full;
                write_offsets(if full { &proof.witnesses } else { &[] }, out);
            }
        }
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let identity = Identity(reader.array()?);
        let name = reader.text()?;
        let flags = reader.byte()?;
        let health = *Health::ALL.get(usize::from(reader.byte()?))?;
        let granularity = Granularity::from_bits(reader.byte()?)?;
        let has = |flag| flags & flag != 0;
        let parent = if has(HAS_PARENT) {
            Some(Identity(reader.array()?))
        } else {
            None
        };
        let created = if has(HAS_TIME) {
            Some(reader.number()?)
        } else {
            None
        };
        let disk_bytes = if has(HAS_SIZE) {
            Some(reader.number()?)
        } else {
            None
        };
        let anchor = if has(IS_ANCHORED) {
            Some(AnchorProof {
                seconds: u32::from_be_bytes(reader.array()?),
                nanoseconds: u32::from_be_bytes(reader.array()?),
                l1_checksum: u32::from_be_bytes(reader.array()?),
            })
        } else {
            None
        };
        let proof = if has(IS_FROZEN) {
            let checksum = u32::from_be_bytes(reader.array()?);
            Proof::Frozen(FrozenProof {
                checksum,
                count: reader.number()?,
            })
        } else if has(IS_RECORDING) {
            Proof::Recording(RecordingProof {
                count: reader.number()?,
                smallest_disk_bytes: reader.number()?,
                planted: reader.offsets()?,
                witnesses: reader.offsets()?,
            })
        } else {
            Proof::None
        };
        Some(Self {
            identity,
            name,
            parent,
            created,
            disk_bytes,
            granularity,
            health,
            proof,
            anchor,
        })
    }
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    let length = text.len().min(usize::from(u8::MAX));
    out.push(low_byte(to_u64(length)));
    out.extend_from_slice(&text.as_bytes()[..length]);
}

fn write_offsets(offsets: &[u64], out: &mut Vec<u8>) {
    let offsets = &offsets[..offsets.len().min(usize::from(u8::MAX))];
    out.push(low_byte(to_u64(offsets.len())));
    for offset in offsets {
        out.extend_from_slice(&offset.to_be_bytes());
    }
}

/// Takes fields off the front of a record.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn number(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn text(&mut self) -> Option<String> {
        let length = usize::from(self.byte()?);
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).ok()
    }

    fn offsets(&mut self) -> Option<Vec<u64>> {
        (0..self.byte()?).map(|_| self.number()).collect()
    }
}
