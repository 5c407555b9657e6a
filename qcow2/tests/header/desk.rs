//! Images with a backing name and a record of wanted sizes.

use std::path::PathBuf;

use tempfile::TempDir;
use tidemark_fixtures::random::Random;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::chain::{
    ChainRecord, CheckpointEntry, FrozenProof, Health, Identity, ImageUuid, Proof, Reading,
    RecordingProof, Scheme,
};
use tidemark_qcow2::{
    BackingReference, CreateOptions, Error, Feature, FileStorage, Image, MemoryStorage, Sharing,
};

use crate::common::{self, granularity};

pub(crate) const SIZE: u64 = 1 << 20;
pub(crate) const SECTOR: usize = 512;
pub(crate) const BITMAPS: u32 = 0x2385_2875;
pub(crate) const CHAIN: u32 = 0x5449_4445;

/// Granularity of the bitmap `b`: one coarse bit where a record has only room for one position.
pub(crate) fn granule(cluster_bits: u32) -> u64 {
    if cluster_bits < 11 { SIZE } else { 65536 }
}

/// A folder with a raw file that backs the image, and the image.
pub(crate) struct Desk {
    pub(crate) _folder: TempDir,
    pub(crate) path: PathBuf,
}

/// A relative name of the backing file with `len` bytes.
pub(crate) fn backing_name(len: usize) -> String {
    let dots = "./".repeat((len - 4) / 2);
    let name = if len.is_multiple_of(2) {
        format!("{dots}base")
    } else {
        format!("{dots}/base")
    };
    assert_eq!(name.len(), len);
    name
}

impl Desk {
    pub(crate) fn new() -> Self {
        // In memory where possible: durability is not what these tests are about.
        let folder = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        std::fs::write(folder.path().join("base"), vec![0x5a; 100_000]).unwrap();
        let path = folder.path().join("image.qcow2");
        Self {
            _folder: folder,
            path,
        }
    }

    pub(crate) fn put(bytes: &[u8]) -> Self {
        let desk = Self::new();
        std::fs::write(&desk.path, bytes).unwrap();
        desk
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    pub(crate) fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    pub(crate) fn open(&self) -> Image {
        common::open_file(&self.path, common::writing())
    }

    pub(crate) fn chain(&self) -> Reading {
        let storage = FileStorage::open(&self.path, false, Sharing::Exclusive).unwrap();
        Image::open_unbacked(Box::new(storage), false)
            .unwrap()
            .chain()
    }
}

/// A new image with one bitmap `b`, and a backing file whose name has `name_len` bytes (0: none).
/// `None` when the name does not fit, or its place cannot be changed safely.
pub(crate) fn fresh(cluster_bits: u32, name_len: usize) -> Option<Vec<u8>> {
    let desk = Desk::new();
    let backing = (name_len > 0).then(|| BackingReference {
        name: backing_name(name_len).into_bytes(),
        format: "raw".to_owned(),
    });
    let options = CreateOptions {
        cluster_bits,
        backing,
        ..CreateOptions::new(SIZE)
    };
    let storage = FileStorage::create(&desk.path).unwrap();
    let image = match Image::create(Box::new(storage), &options, common::writing()) {
        Ok(image) => image,
        Err(Error::Invalid { .. }) => return None,
        Err(error) => panic!("{error}"),
    };
    image.write(&[0x11; 3000], 70_000).unwrap();
    image.flush().unwrap();
    let added = image.update(|update| {
        let bits = update.blank(granularity(granule(cluster_bits)))?;
        update.put("b", bits, true)
    });
    image.close().unwrap();
    match added {
        Ok(()) => Some(desk.bytes()),
        Err(Error::Unsupported {
            feature: Feature::NoRoomInFirstCluster { .. },
            ..
        }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// A record of `count` checkpoints, the last of which is the recording bitmap `b`.
pub(crate) fn record_of(count: usize, image: &Image, random: &mut Random) -> ChainRecord {
    let mut identity = || {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&random.next_u64().to_be_bytes());
        bytes[8..].copy_from_slice(&random.next_u64().to_be_bytes());
        bytes
    };
    let mut record = ChainRecord::new(ImageUuid(identity()), Scheme::Intervals);
    for number in 1..=count {
        let newest = number == count;
        let proof = if newest {
            Proof::Recording(planted(granule(image.geometry().cluster_bits)))
        } else {
            let checksum = 0x1234_0000 + u32::try_from(number).unwrap();
            Proof::Frozen(FrozenProof { checksum, count: 7 })
        };
        record.checkpoints.push(CheckpointEntry {
            identity: Identity(identity()),
            name: if newest {
                "b".to_owned()
            } else {
                format!("c{number:04}")
            },
            parent: record.current,
            created: Some(1_700_000_000),
            disk_bytes: Some(SIZE),
            granularity: granularity(granule(image.geometry().cluster_bits)),
            health: Health::Ok,
            proof,
            anchor: None,
        });
        record.current = record.checkpoints.last().map(|entry| entry.identity);
    }
    record
}

/// The proof of a bitmap with as many planted bits as we ever plant.
pub(crate) fn planted(granule: u64) -> RecordingProof {
    let planted: Vec<u64> = (0..SIZE / granule)
        .map(|bit| bit * granule)
        .take(16)
        .collect();
    RecordingProof {
        count: u64::try_from(planted.len()).unwrap(),
        smallest_disk_bytes: SIZE,
        planted,
        witnesses: Vec::new(),
    }
}

/// Publishes a record of `count` checkpoints and the bits that it says are planted.
pub(crate) fn publish(image: &Image, count: usize) -> Result<(), Error> {
    image.update(|update| {
        let record = record_of(count, update.image(), &mut Random::new(9));
        let mut bits = update.load("b")?;
        for entry in &record.checkpoints {
            if let Proof::Recording(proof) = &entry.proof {
                for &offset in &proof.planted {
                    bits.mark(offset..offset + 1)
                        .map_err(tidemark_qcow2::Mistake::Bitmap)
                        .unwrap();
                }
            }
        }
        update.put("b", bits, true)?;
        update.set_record(Some(record));
        Ok(())
    })
}

pub(crate) fn unbacked(bytes: &[u8]) -> Image {
    let storage = MemoryStorage::from_bytes(bytes.to_vec());
    Image::open_unbacked(Box::new(storage), true).unwrap()
}

/// Whether `count` checkpoints fit; when not, the refusal must be typed and nothing written.
pub(crate) fn fits(bytes: &[u8], count: usize) -> bool {
    let storage = CrashStorage::new(bytes.to_vec());
    let image = Image::open_unbacked(Box::new(storage.clone()), true).unwrap();
    match publish(&image, count) {
        Ok(()) => true,
        Err(Error::Unsupported {
            feature: Feature::NoRoomInFirstCluster { .. },
            ..
        }) => {
            let log = storage.log();
            let writes = log
                .events()
                .iter()
                .filter(|event| event.is_change())
                .count();
            assert_eq!(
                writes, 0,
                "something was written before the refusal of {count}"
            );
            false
        }
        Err(error) => panic!("{count} checkpoints: {error}"),
    }
}

/// The largest number of checkpoints that fit, 0 when not even one does.
pub(crate) fn most(bytes: &[u8]) -> usize {
    if !fits(bytes, 1) {
        return 0;
    }
    let mut low = 1;
    let mut high = 2;
    while fits(bytes, high) {
        (low, high) = (high, high * 2);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(bytes, middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

/// Bytes by which a backing name must be able to grow beside our record.
pub(crate) fn growth(cluster_bits: u32, name_len: usize) -> usize {
    let promised = match cluster_bits {
        9 | 10 => 8,
        11 => 192,
        12 => 480,
        _ => 1023,
    };
    promised.min(1023 - name_len)
}
