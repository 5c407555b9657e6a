//! What the tests of this crate share: opening images in memory and on disk.
#![allow(
    dead_code,
    missing_docs,
    reason = "each test file uses its part of this module"
)]

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tidemark_fixtures::oracle;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{
    CreateOptions, FileStorage, Granularity, Image, MemoryStorage, OpenOptions, PlainFiles, Result,
    Sharing, Storage,
};

/// Lets one test run at a time: a child that another thread starts holds copies of our open files,
/// and so their locks, until it has become QEMU.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    // Asks for QEMU's version the first time: no other test does so while this one has files open.
    oracle::available();
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn granularity(bytes: u64) -> Granularity {
    Granularity::from_bytes(bytes).unwrap()
}

pub(crate) fn writing() -> OpenOptions {
    OpenOptions::writing(Arc::new(PlainFiles::default()))
}

pub(crate) fn reading() -> OpenOptions {
    OpenOptions::reading(Arc::new(PlainFiles::default()))
}

pub(crate) fn create_file(path: &Path, options: &CreateOptions) -> Image {
    let storage = FileStorage::create(path).unwrap();
    Image::create(Box::new(storage), options, writing()).unwrap()
}

pub(crate) fn open_file(path: &Path, options: OpenOptions) -> Image {
    try_open_file(path, options).unwrap()
}

pub(crate) fn try_open_file(path: &Path, options: OpenOptions) -> Result<Image> {
    let storage = FileStorage::open(path, options.writable, Sharing::Exclusive).unwrap();
    Image::open(Box::new(storage), options)
}

pub(crate) fn open_bytes(bytes: Vec<u8>, options: OpenOptions) -> Result<Image> {
    Image::open(Box::new(MemoryStorage::from_bytes(bytes)), options)
}

/// Bytes of a new image after `fill` has worked on it and it was closed.
pub(crate) fn built(options: &CreateOptions, fill: impl FnOnce(&Image)) -> Vec<u8> {
    let storage = CrashStorage::new(Vec::new());
    let image = Image::create(Box::new(storage.clone()), options, writing()).unwrap();
    fill(&image);
    image.close().unwrap();
    storage.to_bytes()
}

/// Adds a clean recording bitmap.
pub(crate) fn add_bitmap(image: &Image, name: &str, granularity_bytes: u64) {
    image
        .update(|update| {
            let bits = update.blank(granularity(granularity_bytes))?;
            update.put(name, bits, true)
        })
        .unwrap();
}

pub(crate) fn read_all(image: &Image) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(image.size()).unwrap()];
    image.read(&mut content, 0).unwrap();
    content
}

/// Panics when a byte differs between `old` and `new` and the bitmap does not say so.
pub(crate) fn assert_covers(bits: &tidemark_qcow2::Bitmap, old: &[u8], new: &[u8], what: &str) {
    let step = usize::try_from(bits.shape().granularity().bytes()).unwrap();
    for start in (0..new.len()).step_by(step) {
        let end = (start + step).min(new.len());
        let same = old.get(start..end) == new.get(start..end);
        assert!(
            same || bits.test(u64::try_from(start).unwrap()),
            "{what}: a change at {start:#x}..{end:#x} was missed"
        );
    }
}

pub(crate) fn boxed(storage: impl Storage + 'static) -> Box<dyn Storage> {
    Box::new(storage)
}
