//! The chain record damaged at every byte, too new, or in contradiction to the directory.

use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::chain::{
    ChainRecord, CheckpointEntry, Health, Identity, Proof, Reading, Scheme,
};
use tidemark_qcow2::check::{Finding, check};
use tidemark_qcow2::{CreateOptions, Error, Granularity, Image, MemoryStorage, OpenOptions, proof};

use crate::probe::{guarded, read_everything, write_open};

const CHAIN: u32 = 0x5449_4445;
const GRANULE: u64 = 4096;

/// A small disk with a frozen and a recording bitmap, both named by a chain record whose two slots
/// are in use.
pub(crate) fn image_with_chain() -> Vec<u8> {
    let storage = CrashStorage::new(Vec::new());
    let options = CreateOptions {
        cluster_bits: 12,
        ..CreateOptions::new(1 << 20)
    };
    let image = Image::create(Box::new(storage.clone()), &options, OpenOptions::default()).unwrap();
    image.write(&[0x11; 9000], 4000).unwrap();
    let granularity = Granularity::from_bytes(GRANULE).unwrap();
    for (name, recording) in [("c0", false), ("c1", true)] {
        image
            .update::<_, Error>(|update| {
                let mut bits = update.blank(granularity)?;
                bits.mark(4000..13_000).unwrap();
                let proof = match recording {
                    true => Proof::Recording(proof::plant(update.image(), &mut bits)?),
                    false => Proof::Frozen(proof::frozen(&bits)),
                };
                update.put(name, bits, recording)?;
                let mut record = update.record().cloned().unwrap_or_else(fresh);
                let parent = record.current;
                let identity = Identity::random().unwrap();
                record.checkpoints.push(CheckpointEntry {
                    identity,
                    name: name.to_owned(),
                    parent,
                    created: Some(1_700_000_000),
                    disk_bytes: Some(1 << 20),
                    granularity,
                    health: Health::Ok,
                    proof,
                    anchor: None,
                });
                record.current = Some(identity);
                update.set_record(Some(record));
                Ok(())
            })
            .unwrap();
    }
    image.close().unwrap();
    storage.to_bytes()
}

fn fresh() -> ChainRecord {
    proof::fresh_record(Scheme::Intervals).unwrap()
}

/// Where the chain extension begins and ends, its head included.
fn extension(bytes: &[u8]) -> std::ops::Range<usize> {
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut at = usize::try_from(number(100)).unwrap();
    loop {
        let len = usize::try_from(number(at + 4)).unwrap();
        let end = at + 8 + len.next_multiple_of(8);
        match number(at) {
            CHAIN => return at..end,
            0 => panic!("the image has no chain record"),
            _ => at = end,
        }
    }
}

fn open(bytes: &[u8]) -> Result<Image, Error> {
    let storage = MemoryStorage::from_bytes(bytes.to_vec());
    Image::open(Box::new(storage), OpenOptions::default())
}

/// What must hold for an image whose chain record was damaged.
fn judge(original: &ChainRecord, bytes: &[u8]) -> Result<(), String> {
    let seen = read_everything(bytes)?;
    if let Err(error) = seen.opened {
        return error.damage().map(|_| ()).ok_or_else(|| error.to_string());
    }
    let image = open(bytes).map_err(|error| error.to_string())?;
    let warned = |finding| image.check().unwrap().findings.contains(&finding);
    let right = match image.chain() {
        Reading::Current(record) => record == *original,
        Reading::Stale(record) => record.checkpoints.len() == 1 && warned(Finding::ChainStale),
        Reading::Damaged => warned(Finding::ChainDamaged),
        Reading::Absent => true,
    };
    if !right {
        return Err(format!("read as {:?}", image.chain()));
    }
    let (opened, after) = write_open(bytes, |image| {
        image.write(&[0x77; 100], 500_000).unwrap();
    })?;
    if opened.is_err() {
        return Ok(());
    }
    let image = open(&after).map_err(|error| error.to_string())?;
    let covered = match image.load_bitmap("c1") {
        Ok(bits) => bits.test(500_000) && bits.test(5000),
        Err(_) => image.bitmaps().is_err_and(|error| error.damage().is_some()),
    };
    // A damaged record is never overwritten by an empty one, and never becomes another's.
    let kept = match image.chain() {
        Reading::Current(record) => record.image == original.image,
        Reading::Stale(record) => record.image == original.image,
        Reading::Damaged | Reading::Absent => true,
    };
    match (covered, kept) {
        (true, true) => Ok(()),
        _ => Err(format!("after a write: covered {covered}, kept {kept}")),
    }
}

#[test]
fn a_chain_record_damaged_at_any_byte_is_the_old_one_or_none() {
    let bytes = image_with_chain();
    let Reading::Current(original) = open(&bytes).unwrap().chain() else {
        panic!("the image has a sound record");
    };
    let (mut complaints, mut count) = (Vec::new(), 0);
    for at in extension(&bytes) {
        for flip in [0xFF, 0x01] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            count += 1;
            if let Err(text) = guarded(|| judge(&original, &damaged)).and_then(|answer| answer) {
                complaints.push(format!("byte {at} ^ {flip:#x}: {text}"));
            }
        }
    }
    println!("{count} damaged records");
    assert!(
        complaints.is_empty(),
        "{}:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
}

#[test]
fn a_chain_record_of_a_later_version_is_kept_and_not_understood() {
    let bytes = image_with_chain();
    let data = extension(&bytes).start + 8;
    let mut later = bytes.clone();
    later[data] = 2;
    let crc = crc32(&later[data..data + 12]);
    later[data + 12..data + 16].copy_from_slice(&crc.to_be_bytes());
    let image = open(&later).unwrap();
    assert_eq!(image.chain(), Reading::Damaged);
    let (opened, after) = write_open(&later, |image| {
        image.write(&[1; 512], 0).unwrap();
        image
            .update::<_, Error>(|update| update.remove("c0"))
            .unwrap();
    })
    .unwrap();
    opened.unwrap();
    let kept = extension(&after);
    assert_eq!(
        &after[kept.start + 8..kept.start + 24],
        &later[data..data + 16]
    );
}

/// CRC-32 bit by bit: a second opinion.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| {
        if crc & 1 == 1 {
            crc >> 1 ^ 0xEDB8_8320
        } else {
            crc >> 1
        }
    };
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc))
    })
}

#[test]
fn a_directory_that_contradicts_the_record_is_named() {
    let bytes = image_with_chain();
    let clean = check(Box::new(MemoryStorage::from_bytes(bytes.clone()))).unwrap();
    assert_eq!(
        (clean.exit_code(), clean.warnings),
        (0, 0),
        "{:?}",
        clean.findings
    );
    // The directory entry of "c1": 24 bytes before its name, flags at 12.
    let entry = (0..bytes.len() / 8)
        .map(|word| word * 8)
        .find(|&at| {
            bytes[at..].starts_with(b"c1\0\0\0\0\0\0") && bytes[at - 8..at - 4] == [1, 12, 0, 2]
        })
        .unwrap()
        - 24;
    let mut disabled = bytes;
    assert_eq!(disabled[entry + 15], 2);
    disabled[entry + 15] = 0;
    let image = open(&disabled).unwrap();
    let report = image.check().unwrap();
    assert_eq!(report.findings, [Finding::DirectoryChanged]);
    let Reading::Current(record) = image.chain() else {
        panic!("the record is untouched")
    };
    let health: Vec<Health> = record
        .checkpoints
        .iter()
        .map(|entry| image.judge(entry).unwrap())
        .collect();
    assert_eq!(health, [Health::Ok, Health::NotRecording]);
}
