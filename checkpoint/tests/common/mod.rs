//! Disks in memory that can lose power, and domains made of them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(dead_code, reason = "each test file uses its own part")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use tidemark_bitmap::Granularity;
use tidemark_checkpoint::{
    Checkpoint, CreateFlags, CreateSpec, DescribedDisk, Disk, DiskDelta, Domain, DomainOptions,
    FullReason, SinceOptions,
};
use tidemark_qcow2::{CreateOptions, Image, MemoryStorage, OpenOptions, Storage};

/// How many random cases a test runs: `TIDEMARK_CASES`, or `usual`.
pub(crate) fn cases(usual: u64) -> u64 {
    let wanted = std::env::var("TIDEMARK_CASES").ok();
    wanted.and_then(|cases| cases.parse().ok()).unwrap_or(usual)
}

pub(crate) const DISK_BYTES: u64 = 1 << 20;

/// How many more writes a set of media will take before the power fails.
#[derive(Clone, Debug)]
pub(crate) struct Fuse(Arc<AtomicI64>);

impl Fuse {
    pub(crate) fn new() -> Self {
        Self(Arc::new(AtomicI64::new(i64::MAX)))
    }

    pub(crate) fn burn_after(&self, writes: i64) {
        self.0.store(writes, Ordering::SeqCst);
    }

    pub(crate) fn is_burnt(&self) -> bool {
        self.0.load(Ordering::SeqCst) < 0
    }

    fn spend(&self) -> io::Result<()> {
        match self.0.fetch_sub(1, Ordering::SeqCst) {
            1.. => Ok(()),
            _ => Err(io::Error::other("the power failed")),
        }
    }
}

/// The bytes of one image; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Medium {
    bytes: Arc<MemoryStorage>,
    fuse: Fuse,
}

impl Medium {
    pub(crate) fn new(fuse: &Fuse) -> Self {
        let medium = Self {
            bytes: Arc::new(MemoryStorage::new()),
            fuse: fuse.clone(),
        };
        let options = CreateOptions::new(DISK_BYTES);
        Image::create(Box::new(medium.clone()), &options, OpenOptions::default())
            .unwrap()
            .close()
            .unwrap();
        medium
    }

    pub(crate) fn open(&self) -> Arc<Image> {
        let options = OpenOptions {
            writable: true,
            ..OpenOptions::default()
        };
        Arc::new(Image::open(Box::new(self.clone()), options).unwrap())
    }

    pub(crate) fn open_read_only(&self) -> Arc<Image> {
        Arc::new(Image::open(Box::new(self.clone()), OpenOptions::default()).unwrap())
    }

    /// A copy whose bytes are its own, with a fuse of its own.
    pub(crate) fn copy(&self, fuse: &Fuse) -> Self {
        let bytes = MemoryStorage::from_bytes(self.bytes.to_bytes());
        Self {
            bytes: Arc::new(bytes),
            fuse: fuse.clone(),
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.bytes.to_bytes()
    }

    /// What a QEMU that died leaves: every bitmap of the image in use.
    pub(crate) fn mark_bitmaps_in_use(&self) {
        let mut bytes = self.bytes.to_bytes();
        let u32_at = |bytes: &[u8], at: usize| {
            usize::try_from(u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())).unwrap()
        };
        let mut at = u32_at(&bytes, 100);
        while u32_at(&bytes, at) != 0x2385_2875 {
            assert_ne!(u32_at(&bytes, at), 0, "the image has bitmaps");
            at += 8 + u32_at(&bytes, at + 4).next_multiple_of(8);
        }
        let count = u32_at(&bytes, at + 8);
        let mut entry = u32_at(&bytes, at + 28);
        for _ in 0..count {
            bytes[entry + 15] |= 1;
            let name = usize::from(u16::from_be_bytes([bytes[entry + 18], bytes[entry + 19]]));
            let extra = u32_at(&bytes, entry + 20);
            entry += (24 + extra + name).next_multiple_of(8);
        }
        self.bytes.write_at(&bytes, 0).unwrap();
    }
}

impl Storage for Medium {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.bytes.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.fuse.spend()?;
        self.bytes.write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fuse.spend()?;
        self.bytes.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bytes.discard(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.bytes.flush()
    }

    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.fuse.spend()?;
        self.bytes.set_len(len)
    }

    fn writable(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        "medium".to_owned()
    }
}

/// `vda`, `vdb`, ... on the given media.
pub(crate) fn domain(media: &[Medium]) -> Domain {
    domain_with(media, DomainOptions::default())
}

pub(crate) fn domain_with(media: &[Medium], options: DomainOptions) -> Domain {
    let disks = media
        .iter()
        .zip('a'..)
        .map(|(medium, letter)| Disk {
            name: format!("vd{letter}"),
            image: medium.open(),
        })
        .collect();
    Domain::new(disks, options).unwrap()
}

pub(crate) fn media(count: usize) -> Vec<Medium> {
    let fuse = Fuse::new();
    (0..count).map(|_| Medium::new(&fuse)).collect()
}

/// Closes all images of the domain's last handle.
pub(crate) fn close(domain: Domain) {
    let disks = domain.disks().to_vec();
    drop(domain);
    for disk in disks {
        Arc::try_unwrap(disk.image).unwrap().close().unwrap();
    }
}

/// A checkpoint with 4 KiB of disk a bit.
pub(crate) fn spec(name: &str) -> CreateSpec {
    CreateSpec {
        name: Some(name.to_owned()),
        granularity: Granularity::from_bytes(4096),
        ..CreateSpec::default()
    }
}

pub(crate) fn on_disks(name: &str, disks: &[&str]) -> CreateSpec {
    let disk = |name: &&str| DescribedDisk {
        name: (*name).to_owned(),
        bitmap: true,
        ..Default::default()
    };
    CreateSpec {
        disks: Some(disks.iter().map(disk).collect()),
        ..spec(name)
    }
}

pub(crate) fn create(domain: &Domain, name: &str) -> Checkpoint {
    domain.create(&spec(name), CreateFlags::NONE).unwrap()
}

pub(crate) fn names(checkpoints: &[Checkpoint]) -> Vec<&str> {
    checkpoints.iter().map(Checkpoint::name).collect()
}

/// A write that survives a crash.
pub(crate) fn write(domain: &Domain, disk: &str, offset: u64, len: usize, value: u8) {
    let image = &domain.disk(disk).unwrap().image;
    image.write(&vec![value; len], offset).unwrap();
    image.flush().unwrap();
}

/// All bytes of a disk.
pub(crate) fn content(domain: &Domain, disk: &str) -> Vec<u8> {
    let image = &domain.disk(disk).unwrap().image;
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read(&mut bytes, 0).unwrap();
    bytes
}

/// Ranges that changed on a disk since a checkpoint, or why it must be full.
pub(crate) fn since(
    domain: &Domain,
    name: &str,
    disk: &str,
) -> Result<tidemark_bitmap::Bitmap, FullReason> {
    let changes = domain
        .lookup(name)
        .unwrap()
        .changed_since(SinceOptions::default())
        .unwrap();
    let change = changes
        .into_iter()
        .find(|change| change.disk == disk)
        .unwrap();
    match change.delta {
        DiskDelta::Incremental(bits) => Ok(bits),
        DiskDelta::Full { reason } => Err(reason),
    }
}

/// Law 2, by brute force.
pub(crate) fn assert_superset(
    bits: &tidemark_bitmap::Bitmap,
    before: &[u8],
    after: &[u8],
    what: &str,
) {
    const CHUNK: usize = 512;
    for (number, (old, new)) in before.chunks(CHUNK).zip(after.chunks(CHUNK)).enumerate() {
        // No granule is smaller than a chunk.
        let offset = u64::try_from(number * CHUNK).unwrap();
        assert!(
            old == new || bits.test(offset),
            "{what}: bytes at {offset} changed unseen"
        );
    }
}
