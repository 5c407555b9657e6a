//! Why a bitmap is believed: checksum of a frozen one, witnesses of a recording one.

use tidemark_bitmap::Bitmap;

use super::BitmapInfo;
use crate::error::{Error, Mistake, Result};
use crate::format::chain::{
    ChainRecord, CheckpointEntry, FrozenProof, Health, ImageUuid, Proof, RecordingProof, Scheme,
};
use crate::image::Image;

/// Bits planted when a recording bitmap is published, at most.
const PLANTED: usize = 16;
/// Bytes of disk that planted bits may cover, beyond the one that is always planted.
const PLANTED_BYTES: u64 = 1 << 20;
/// Planted bits and witnesses together.
const WITNESSES: usize = 64;
/// Positions tried for one planted bit before a position with data is taken.
const TRIES: usize = 4;

/// CRC-32 of the canonical content: for each non-zero 4,096-byte chunk of the serialized,
/// tail-masked bits, its index (u64, big endian) and its bytes. Independent of cluster size, of the
/// representation of pages and of a disk that grew since.
pub fn checksum(bitmap: &Bitmap) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for (index, chunk) in bitmap.canonical_chunks() {
        hasher.update(&index.to_be_bytes());
        hasher.update(&chunk);
    }
    hasher.finalize()
}

/// The proof of a bitmap that no longer changes.
pub fn frozen(bitmap: &Bitmap) -> FrozenProof {
    FrozenProof {
        checksum: checksum(bitmap),
        count: bitmap.count(),
    }
}

/// Sets up to 16 bits at random positions, preferably where the disk reads as zero, and returns the
/// proof of the recording bitmap. In all they cover at most 1 MiB of disk, but there is at least
/// one.
///
/// # Errors
/// When the system has no random numbers, or a table needed to find zeros is damaged.
pub fn plant(image: &Image, bitmap: &mut Bitmap) -> Result<RecordingProof> {
    let granule = bitmap.shape().granularity().bytes();
    let bits = bitmap.shape().bits();
    let fitting = usize::try_from((PLANTED_BYTES / granule).max(1)).unwrap_or(PLANTED);
    let mut planted = Vec::new();
    for _ in 0..fitting
        .min(PLANTED)
        .min(usize::try_from(bits).unwrap_or(PLANTED))
    {
        let mut offset = 0;
        for _ in 0..TRIES {
            offset = random_below(image, bits)? * granule;
            if image.reads_as_zero(image.geometry().guest_cluster(offset))? {
                break;
            }
        }
        let end = (offset + granule).min(bitmap.shape().disk_bytes());
        bitmap
            .mark(offset..end)
            .map_err(|error| image.file().invalid(Mistake::Bitmap(error)))?;
        planted.push(offset);
    }
    planted.sort_unstable();
    planted.dedup();
    Ok(RecordingProof {
        count: bitmap.count(),
        smallest_disk_bytes: bitmap.shape().disk_bytes(),
        planted,
        witnesses: Vec::new(),
    })
}

/// The proof of a recording bitmap as of now: its planted bits, witnesses drawn anew from its set
/// bits, its count.
///
/// # Errors
/// When the system has no random numbers.
pub fn refresh(image: &Image, bitmap: &Bitmap, old: &RecordingProof) -> Result<RecordingProof> {
    let count = bitmap.count();
    let mut witnesses = Vec::new();
    let wanted = WITNESSES.saturating_sub(old.planted.len());
    for _ in 0..wanted.min(usize::try_from(count).unwrap_or(wanted)) {
        witnesses.extend(bitmap.nth_dirty(random_below(image, count)?));
    }
    witnesses.sort_unstable();
    witnesses.dedup();
    Ok(RecordingProof {
        count,
        smallest_disk_bytes: old.smallest_disk_bytes.min(image.size()),
        planted: old.planted.clone(),
        witnesses,
    })
}

/// CRC-32 over the sorted (name, granularity, auto) of those bitmaps that belong to the chain, as
/// documented with the record. It tells whether somebody else changed the directory.
pub fn directory_digest(
    record: &ChainRecord,
    bitmaps: impl IntoIterator<Item = BitmapInfo>,
) -> u32 {
    let mut rows: Vec<Vec<u8>> = bitmaps
        .into_iter()
        .filter(|info| record.checkpoint_named(&info.name).is_some())
        .map(|info| {
            let mut row = info.name.into_bytes();
            row.extend_from_slice(&[0, info.granularity.bits(), u8::from(info.auto)]);
            row
        })
        .collect();
    rows.sort_unstable();
    crc32fast::hash(&rows.concat())
}

/// A record for an image that has none.
///
/// # Errors
/// When the system has no random numbers.
pub fn fresh_record(scheme: Scheme) -> std::io::Result<ChainRecord> {
    Ok(ChainRecord::new(ImageUuid::random()?, scheme))
}

fn random_below(image: &Image, bound: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes)
        .map_err(std::io::Error::other)
        .map_err(|source| image.file().io(source, "random numbers", 0))?;
    Ok(u64::from_be_bytes(bytes) % bound.max(1))
}

/// Whether a recording bitmap still holds what it once held.
fn recording_health(image: &Image, bitmap: &Bitmap, proof: &RecordingProof) -> Health {
    let smallest = proof.smallest_disk_bytes.min(image.size());
    let mut witnesses = proof
        .planted
        .iter()
        .chain(&proof.witnesses)
        .filter(|&&offset| offset < smallest)
        .peekable();
    if witnesses.peek().is_none() || !witnesses.all(|&offset| bitmap.test(offset)) {
        return Health::Reset;
    }
    // A foreign shrink cut bits, so that the count says nothing any more.
    let shrunk = image.size() < proof.smallest_disk_bytes;
    if !shrunk && bitmap.count() < proof.count {
        return Health::Reset;
    }
    Health::Ok
}

/// What the directory says against an entry, without a look at bits.
fn contradiction(entry: &CheckpointEntry, info: &BitmapInfo) -> Option<Health> {
    let recording = matches!(entry.proof, Proof::Recording(_));
    if info.granularity != entry.granularity {
        let frozen = matches!(entry.proof, Proof::Frozen(_));
        return Some(if frozen {
            Health::Changed
        } else {
            Health::Reset
        });
    }
    (recording && !info.auto).then_some(Health::NotRecording)
}

/// What the proof of an entry says of its bits.
fn prove(image: &Image, entry: &CheckpointEntry, bits: &Bitmap) -> Health {
    match &entry.proof {
        Proof::None => Health::Lost,
        Proof::Frozen(proof) if frozen(bits) == *proof => Health::Ok,
        Proof::Frozen(_) => Health::Changed,
        Proof::Recording(proof) => recording_health(image, bits, proof),
    }
}

/// Takes the proof of an entry from the bits `before` a change of the disk's size to those `after`
/// it. Where the old proof does not hold, the loss is recorded and there is no new one. A recording
/// bitmap whose planted bits were all cut gets new ones.
///
/// # Errors
/// As [`plant`].
pub(crate) fn resize(
    image: &Image,
    entry: &mut CheckpointEntry,
    info: &BitmapInfo,
    before: &Bitmap,
    after: &mut Bitmap,
) -> Result<()> {
    let found = contradiction(entry, info).unwrap_or_else(|| prove(image, entry, before));
    if found != Health::Ok {
        if entry.health.is_usable() {
            entry.health = found;
        }
        return Ok(());
    }
    match &mut entry.proof {
        Proof::None => {}
        Proof::Frozen(proof) => *proof = frozen(after),
        Proof::Recording(proof) => {
            let size = after.shape().disk_bytes();
            let smallest = proof
                .smallest_disk_bytes
                .min(before.shape().disk_bytes())
                .min(size);
            proof.planted.retain(|&offset| offset < smallest);
            proof.witnesses.retain(|&offset| offset < smallest);
            if proof.planted.is_empty() {
                proof.planted = plant(image, after)?.planted;
            }
            // All that is left was seen just now, so that this is the smallest size from here on.
            proof.smallest_disk_bytes = size;
            proof.count = after.count();
        }
    }
    Ok(())
}

impl Image {
    /// What the directory and the bits say of a checkpoint's bitmap. A loss that the entry records
    /// stays a loss whatever bits are there now.
    ///
    /// # Errors
    /// I/O, or a directory that cannot be read. A bitmap whose own structures are damaged is
    /// [`Health::Lost`].
    pub fn judge(&self, entry: &CheckpointEntry) -> Result<Health> {
        if !matches!(
            entry.health,
            Health::Ok | Health::Recovered | Health::SizeDiffers
        ) {
            return Ok(entry.health);
        }
        let found = self
            .directory()
            .look_up(self.file(), &entry.name)?
            .map(BitmapInfo::from);
        let Some(info) = found else {
            return Ok(Health::Missing);
        };
        if info.in_use {
            return Ok(Health::Inconsistent);
        }
        if let Some(health) = contradiction(entry, &info) {
            return Ok(health);
        }
        let bitmap = match self.load_bitmap(&entry.name) {
            Ok(bitmap) => bitmap,
            Err(Error::Corrupt { .. }) => return Ok(Health::Lost),
            Err(error) => return Err(error),
        };
        let proved = prove(self, entry, &bitmap);
        let resized = entry.disk_bytes.is_some_and(|bytes| bytes != self.size());
        Ok(match proved {
            Health::Ok if resized => Health::SizeDiffers,
            Health::Ok => entry.health,
            other => other,
        })
    }

    /// The judgement of every recording bitmap of the chain that lost bits since it was proved.
    pub(crate) fn new_losses(&self, record: &ChainRecord) -> Result<Vec<(String, Health)>> {
        let mut losses = Vec::new();
        for entry in &record.checkpoints {
            if !matches!(entry.proof, Proof::Recording(_)) || !entry.health.is_usable() {
                continue;
            }
            let health = self.judge(entry)?;
            if !health.is_usable() {
                losses.push((entry.name.clone(), health));
            }
        }
        Ok(losses)
    }
}
