//! The chain record: parents of checkpoints, kept inside the image.
//!
//! A private header extension ([`super::extension::CHAIN`]) holds a 16-byte head and up to two
//! slots. The head stands in the image's first 512 bytes, so that the one write that changes the
//! bitmap directory also switches the active slot. All integers are big endian.
//!
//! Head, at the start of the extension's data:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | version, 1 |
//! | 1 | active slot, 0 or 1; 255 when there is no record |
//! | 2..4 | offset of slot 0 from the start of the extension's data, in units of 8 bytes |
//! | 4..6 | offset of slot 1, the same |
//! | 6..8 | zero |
//! | 8..12 | generation of the active slot |
//! | 12..16 | CRC-32 of bytes 0 to 11 |
//!
//! Slot:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | bytes of the slot, CRC included |
//! | 4..8 | generation |
//! | 8.. | the record, see [`ChainRecord`] |
//! | last 4 | CRC-32 of everything before |

use byteorder::{BigEndian, ByteOrder};
use tidemark_bitmap::Granularity;

use crate::convert::{index, low_byte, to_u16, to_u32, to_u64};

/// Bytes of the head.
pub const HEAD_BYTES: usize = 16;
/// Version of the layout.
const VERSION: u8 = 1;
const NO_SLOT: u8 = 255;
/// Bytes of a slot around its record: length, generation, CRC.
const SLOT_FRAME_BYTES: usize = 12;
/// Checkpoints of one record; more could not be addressed by name in reasonable time.
const MAX_CHECKPOINTS: usize = 65_535;

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// A new random value.
            ///
            /// # Errors
            /// When the system has no random numbers to give.
            pub fn random() -> std::io::Result<Self> {
                let mut bytes = [0; 16];
                getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
                Ok(Self(bytes))
            }

            /// Parses 32 hexadecimal digits.
            pub fn from_hex(text: &str) -> Option<Self> {
                if text.len() != 32 || !text.is_ascii() {
                    return None;
                }
                let mut bytes = [0; 16];
                for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
                }
                Some(Self(bytes))
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(formatter, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

random_id! {
    /// Identity of an image: a clone or a converted copy gets another.
    ImageUuid
}
random_id! {
    /// Identity of a checkpoint, or of a transaction: names can be taken again, this cannot.
    Identity
}

/// How the bitmaps of a chain share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Each bitmap holds the changes from its checkpoint to the next; only the newest records.
    Intervals,
    /// Each bitmap holds all changes since its checkpoint; all record.
    Cumulative,
}

/// What is known about a checkpoint's bitmap on one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Health {
    /// All proofs hold.
    Ok,
    /// Rewritten from verified bits after a crash of a foreign writer; as good as [`Self::Ok`].
    Recovered,
    /// The disk's size is not that of the record; the new part counts as dirty.
    SizeDiffers,
    /// Consistent, but found by inference, without a record.
    Inferred,
    /// It should record and is disabled.
    NotRecording,
    /// A foreign writer holds it or died holding it.
    Inconsistent,
    /// A frozen bitmap whose content differs from its checksum.
    Changed,
    /// A recording bitmap that lost bits: somebody cleared or re-created it.
    Reset,
    /// The record names a bitmap that the directory does not have.
    Missing,
    /// Its bits are known to be gone, or to have been joined with such.
    Lost,
}

impl Health {
    const ALL: [Self; 10] = [
        Self::Ok,
        Self::Recovered,
        Self::SizeDiffers,
        Self::Inferred,
        Self::NotRecording,
        Self::Inconsistent,
        Self::Changed,
        Self::Reset,
        Self::Missing,
        Self::Lost,
    ];

    /// Whether an incremental backup may be built on it.
    pub const fn is_usable(self) -> bool {
        matches!(self, Self::Ok | Self::Recovered | Self::SizeDiffers)
    }

    /// The spelling used by the command line and in documents.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Recovered => "recovered",
            Self::SizeDiffers => "size-differs",
            Self::Inferred => "inferred",
            Self::NotRecording => "not-recording",
            Self::Inconsistent => "inconsistent",
            Self::Changed => "changed",
            Self::Reset => "reset",
            Self::Missing => "missing",
            Self::Lost => "lost",
        }
    }

    fn code(self) -> u8 {
        let position = Self::ALL.iter().position(|&health| health == self);
        low_byte(to_u64(position.unwrap_or(Self::ALL.len())))
    }
}

/// What must hold for a frozen bitmap to be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrozenProof {
    /// CRC-32 of the canonical content, see [`crate::bitmaps::proof::checksum`].
    pub checksum: u32,
    /// Set bits.
    pub count: u64,
}

/// What must hold for a recording bitmap to be believed: it may only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordingProof {
    /// Set bits at our last clean close; fewer later means that bits were lost.
    pub count: u64,
    /// Smallest disk seen; witnesses beyond it are void.
    pub smallest_disk_bytes: u64,
    /// Byte offsets of the bits set when the bitmap was published.
    pub planted: Vec<u64>,
    /// Byte offsets of further set bits, drawn at our last clean close.
    pub witnesses: Vec<u64>,
}

/// The proof that fits the state of the bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// None: the bitmap is gone, or was adopted without proof.
    None,
    /// The bitmap no longer changes.
    Frozen(FrozenProof),
    /// The bitmap records.
    Recording(RecordingProof),
}

/// One checkpoint on this disk. Its bitmap carries its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointEntry {
    /// Identity, the same on all disks of the domain.
    pub identity: Identity,
    /// Name of the checkpoint and of its bitmap.
    pub name: String,
    /// Identity of the parent; `None` for a root.
    pub parent: Option<Identity>,
    /// Seconds since the epoch; optional.
    pub created: Option<u64>,
    /// Virtual size of the disk at that moment, bytes; optional.
    pub disk_bytes: Option<u64>,
    /// Bytes of disk per bit.
    pub granularity: Granularity,
    /// What was last known; a loss sticks.
    pub health: Health,
    /// What must hold for the bits to be believed.
    pub proof: Proof,
}

/// What an unfinished operation over several disks was going to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IntentKind {
    /// Create a checkpoint; undone when found undecided.
    Create,
    /// Create a checkpoint together with a backup; only resume and cancel end it.
    Backup,
}

/// An operation that this disk is prepared for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intent {
    /// What will be done.
    pub kind: IntentKind,
    /// Identity of the transaction, the same on all its disks.
    pub transaction: Identity,
    /// Identity of the checkpoint that the decision makes real. Its entry is already in the
    /// record, the last in recording order.
    pub checkpoint: Identity,
    /// Name of the disk that holds the decision.
    pub decider: String,
    /// UUID of that disk's image.
    pub decider_image: ImageUuid,
}

/// Where a restored image comes from: backups up to that checkpoint count as its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descent {
    /// UUID of the image that was backed up.
    pub image: ImageUuid,
    /// Last checkpoint restored.
    pub checkpoint: Identity,
}

/// Everything that one image knows of its chain.
///
/// Layout of the record inside a slot: image UUID (16) · scheme (1) · flags (1) · directory
/// digest (4) · \[current (16)\] · \[intent\] · number of decisions (1) and the transactions (16 each) · number of
/// descents (1) and (32 each) · number of checkpoints (2) and their entries in recording order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainRecord {
    /// Identity of the image.
    pub image: ImageUuid,
    /// How the bitmaps share the work.
    pub scheme: Scheme,
    /// The current checkpoint, which is the parent of the next.
    pub current: Option<Identity>,
    /// An operation that is prepared and not committed here.
    pub intent: Option<Intent>,
    /// Transactions that were decided and that other disks may not yet have followed.
    pub decisions: Vec<Identity>,
    /// Where this image comes from.
    pub descents: Vec<Descent>,
    /// CRC-32 over the sorted (name, granularity, auto) of the chain's bitmaps as last written by
    /// us. It only tells that somebody else changed the directory.
    pub directory_digest: u32,
    /// The checkpoints of this disk in recording order, oldest first.
    pub checkpoints: Vec<CheckpointEntry>,
}

/// How much of the optional is written when room is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// Identity, parent, order, checksums, planted witnesses: never dropped.
    Required,
    /// Also creation times and sizes.
    WithTimes,
    /// Everything.
    Full,
}

impl ChainRecord {
    /// An empty record for a new image.
    pub fn new(image: ImageUuid, scheme: Scheme) -> Self {
        Self {
            image,
            scheme,
            current: None,
            intent: None,
            decisions: Vec::new(),
            descents: Vec::new(),
            directory_digest: 0,
            checkpoints: Vec::new(),
        }
    }

    /// The entry of a checkpoint.
    pub fn checkpoint(&self, identity: Identity) -> Option<&CheckpointEntry> {
        self.checkpoints
            .iter()
            .find(|entry| entry.identity == identity)
    }

    /// The entry of a checkpoint, by name.
    pub fn checkpoint_named(&self, name: &str) -> Option<&CheckpointEntry> {
        self.checkpoints.iter().find(|entry| entry.name == name)
    }

    /// The entry of a checkpoint, by name, to change.
    pub fn checkpoint_named_mut(&mut self, name: &str) -> Option<&mut CheckpointEntry> {
        self.checkpoints.iter_mut().find(|entry| entry.name == name)
    }

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

    fn write(&self, out: &mut Vec<u8>, detail: Detail) {
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

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
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
    fn write(&self, out: &mut Vec<u8>) {
        out.push(match self.kind {
            IntentKind::Create => 0,
            IntentKind::Backup => 1,
        });
        out.extend_from_slice(&self.transaction.0);
        out.extend_from_slice(&self.checkpoint.0);
        out.extend_from_slice(&self.decider_image.0);
        write_text(&self.decider, out);
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
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

impl CheckpointEntry {
    /// Entry: identity (16) · name length (1) and name · flags (1) · health (1) · granularity bits
    /// (1) · [parent (16)] · [created (8)] · [disk bytes (8)] · proof: frozen checksum (4) and count
    /// (8), or recording count (8), smallest disk (8), planted and witnesses, each a length (1)
    /// and byte offsets (8 each).
    fn write(&self, out: &mut Vec<u8>, detail: Detail) {
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

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
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
        })
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
struct Reader<'a>(&'a [u8]);

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
