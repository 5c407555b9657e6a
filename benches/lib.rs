//! Inputs shared by the benchmarks: fixed seeds, so that two runs do the same work.

use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use tidemark_bitmap::{Bitmap, Granularity, Shape};
use tidemark_qcow2::{
    BackingReference, CreateOptions, Error, FileStorage, Image, OpenOptions, PlainFiles, Result,
    Sharing,
};

/// A small pseudo-random generator with a fixed seed (xorshift64*).
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// Numbers that are the same in every run.
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

impl Default for Numbers {
    fn default() -> Self {
        Self::new()
    }
}

/// A bitmap of a disk of `disk_bytes` with about `percent` of its bits set at random.
///
/// # Panics
/// If the granularity is none, or too fine for the disk.
pub fn scattered(disk_bytes: u64, granularity: u64, percent: u64) -> Bitmap {
    let granularity = Granularity::from_bytes(granularity).expect("a power of two");
    let shape = Shape::new(disk_bytes, granularity, 65536).expect("fits into 512 MiB");
    let mut bitmap = Bitmap::new(shape);
    let mut numbers = Numbers::new();
    for _ in 0..shape.bits() * percent / 100 {
        let at = numbers.below(shape.bits()) * granularity.bytes();
        bitmap.mark(at..at + 1).expect("inside the disk");
    }
    bitmap
}

/// An image in a temporary folder, with `bitmaps` recording bitmaps, `filled` bytes of it written.
#[derive(Debug)]
pub struct Disk {
    /// The open image.
    pub image: Image,
    folder: TempDir,
}

impl Disk {
    /// Creates the image; writes it in pieces of 1 MiB.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn new(size: u64, filled: u64, bitmaps: usize) -> Result<Self> {
        let folder = tempfile::tempdir().map_err(io)?;
        let image = created(&folder, "disk.qcow2", &CreateOptions::new(size))?;
        let piece = vec![0x5a; 1 << 20];
        for at in (0..filled).step_by(piece.len()) {
            image.write(&piece, at)?;
        }
        image.flush()?;
        image.update(|update| {
            for number in 0..bitmaps {
                let granularity = Granularity::from_bits(16).unwrap_or(Granularity::DEFAULT);
                let bits = update.blank(granularity)?;
                update.put(&format!("b{number}"), bits, true)?;
            }
            Ok::<_, Error>(())
        })?;
        Ok(Self { image, folder })
    }

    /// An empty image above one of the same size that is all data.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn overlay(size: u64, extended_l2: bool) -> Result<Self> {
        let Self { image, folder } = Self::new(size, size, 0)?;
        image.close()?;
        let options = CreateOptions {
            extended_l2,
            backing: Some(BackingReference {
                name: b"disk.qcow2".to_vec(),
                format: "qcow2".to_owned(),
            }),
            ..CreateOptions::new(size)
        };
        let image = created(&folder, "overlay.qcow2", &options)?;
        Ok(Self { image, folder })
    }

    /// An image whose L2 tables are full, and differ between its snapshot `s` and the present in
    /// one cluster each: compressed clusters take little room.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn with_full_tables(size: u64) -> Result<Self> {
        let disk = Self::new(size, 0, 0)?;
        let packed = disk.image.packer(None).pack(&vec![0x5a; 1 << 20]);
        for at in (0..size).step_by(1 << 20) {
            disk.image.write_packed(&packed, at)?;
        }
        disk.image.create_snapshot("s")?;
        let geometry = disk.image.geometry();
        let table = geometry.l2_entries() << geometry.cluster_bits;
        for at in (0..size).step_by(usize::try_from(table).unwrap_or(usize::MAX)) {
            disk.image.write(&[1; 4096], at)?;
        }
        disk.image.flush()?;
        Ok(disk)
    }

    /// The folder that holds the image.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Opens the image again for reading, beside the open one.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn reader(&self) -> Result<Image> {
        let path = self.folder.path().join("disk.qcow2");
        let storage = FileStorage::open(&path, false, Sharing::ForceShare).map_err(io)?;
        Image::open(Box::new(storage), OpenOptions::default())
    }
}

fn created(folder: &TempDir, name: &str, options: &CreateOptions) -> Result<Image> {
    let storage = FileStorage::create(&folder.path().join(name)).map_err(io)?;
    Image::create(Box::new(storage), options, writing())
}

fn writing() -> OpenOptions {
    OpenOptions::writing(Arc::new(PlainFiles::default()))
}

fn io(source: std::io::Error) -> Error {
    Error::Io {
        image: "bench".to_owned(),
        operation: "prepare",
        offset: 0,
        source,
    }
}
