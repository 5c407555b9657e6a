//! Inputs shared by the benchmarks: fixed seeds, so that two runs do the same work.

use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use tidemark_bitmap::{Bitmap, Granularity, Shape};
use tidemark_qcow2::{
    CreateOptions, Error, FileStorage, Image, OpenOptions, PlainFiles, Result, Sharing,
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
        let storage = FileStorage::create(&folder.path().join("disk.qcow2")).map_err(io)?;
        let image = Image::create(Box::new(storage), &CreateOptions::new(size), writing())?;
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
