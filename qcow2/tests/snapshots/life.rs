//! A disk with snapshots as plain vectors of bytes, and random lives of it.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_qcow2::{Bitmap, Image, MemoryStorage, OpenOptions};

use crate::common;

pub(crate) const MIB: u64 = 1 << 20;

/// What the disk holds, now and in each snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) content: Vec<u8>,
    pub(crate) snapshots: Vec<(String, Vec<u8>)>,
}

impl Disk {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            content: vec![0; usize::try_from(size).unwrap()],
            snapshots: Vec::new(),
        }
    }

    pub(crate) fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        let start = usize::try_from(offset).unwrap();
        self.content[start..start + usize::try_from(len).unwrap()].fill(byte);
    }

    pub(crate) fn take(&mut self, name: &str) {
        self.snapshots.push((name.to_owned(), self.content.clone()));
    }

    pub(crate) fn snapshot(&self, name: &str) -> &[u8] {
        &self
            .snapshots
            .iter()
            .find(|(known, _)| known == name)
            .unwrap()
            .1
    }

    /// A range of any alignment that often covers whole clusters.
    pub(crate) fn range(&self, random: &mut Random) -> (u64, u64) {
        let size = u64::try_from(self.content.len()).unwrap();
        let align = [1, 512, 4096, 65536][usize::try_from(random.within(0..4)).unwrap()];
        let offset = random.within(0..size) / align * align;
        let most = [1_000, 20_000, 300_000][usize::try_from(random.within(0..3)).unwrap()];
        let len = random.within(1..most).next_multiple_of(align);
        (offset, len.min(size - offset))
    }
}

/// A folder with an image in it.
pub(crate) struct Place {
    folder: TempDir,
    pub(crate) path: PathBuf,
}

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        let path = folder.path().join("image.qcow2");
        Self { folder, path }
    }

    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    pub(crate) fn open(&self) -> Image {
        common::open_bytes(self.bytes(), common::reading()).unwrap()
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Opens a snapshot of the image in `bytes`.
pub(crate) fn open_snapshot(bytes: Vec<u8>, options: OpenOptions, name: &str) -> Image {
    let storage = Box::new(MemoryStorage::from_bytes(bytes));
    Image::open_snapshot(storage, options, name).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A few writes by QEMU, mirrored in `disk`.
pub(crate) fn qemu_writes(path: &Path, disk: &mut Disk, random: &mut Random, count: u64) {
    let mut commands = Vec::new();
    for _ in 0..count {
        let (offset, len) = disk.range(random);
        let byte = u8::try_from(random.within(1..255)).unwrap();
        if random.one_in(4) {
            commands.push(format!("write -z {offset} {len}"));
            disk.fill(offset, len, 0);
        } else {
            commands.push(format!("write -P {byte} {offset} {len}"));
            disk.fill(offset, len, byte);
        }
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu_io::commands(path, &commands);
}

/// A life by QEMU alone: `snapshots` snapshots with writes before, between and behind them.
pub(crate) fn qemu_life(
    path: &Path,
    size: u64,
    opts: &[(&str, &str)],
    snapshots: u64,
    seed: u64,
) -> Disk {
    let mut random = Random::new(seed);
    let mut disk = Disk::new(size);
    qemu_img::create(path, size, opts);
    // Two bits count to three: the present and two snapshots.
    let narrow = opts.contains(&("refcount_bits", "2"));
    let snapshots = if narrow { 2.min(snapshots) } else { snapshots };
    for number in 0..snapshots {
        qemu_writes(path, &mut disk, &mut random, 5);
        let name = format!("s{number}");
        qemu_img::ok(&["snapshot", "-q", "-c", &name, text(path)]);
        disk.take(&name);
    }
    qemu_writes(path, &mut disk, &mut random, 5);
    disk
}

/// The widths, cluster sizes and kinds of L2 entries that tests go through, as creation options of qemu-img.
pub(crate) const SHAPES: [&[(&str, &str)]; 9] = [
    &[],
    &[("cluster_size", "512")],
    &[("cluster_size", "4096"), ("refcount_bits", "2")],
    &[("cluster_size", "4096"), ("refcount_bits", "4")],
    &[("refcount_bits", "8")],
    &[("cluster_size", "2097152"), ("refcount_bits", "32")],
    &[("cluster_size", "1024"), ("refcount_bits", "64")],
    &[("extended_l2", "on")],
    &[("cluster_size", "16384"), ("extended_l2", "on")],
];

/// Panics when a cluster-sized piece differs and the bits deny it.
pub(crate) fn assert_covers(bits: &Bitmap, old: &[u8], new: &[u8], what: &str) {
    common::assert_covers(bits, old, new, what);
}
