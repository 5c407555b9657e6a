//! Does everything that can be done with an image, and keeps an eye on what happens meanwhile.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tidemark_qcow2::chain::Reading;
use tidemark_qcow2::check::check;
use tidemark_qcow2::{Error, Image, MemoryStorage, OpenOptions, Storage};

/// Longest time for everything that is done with one image.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of guest data read at most from the start of a disk.
const MOST_READ: u64 = 1 << 30;
const STEP: u64 = 1 << 20;

/// A storage in memory that counts the calls that change it.
#[derive(Clone, Debug)]
pub(crate) struct Watched {
    bytes: Arc<MemoryStorage>,
    changes: Arc<AtomicU64>,
}

impl Watched {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Arc::new(MemoryStorage::from_bytes(bytes)),
            changes: Arc::default(),
        }
    }

    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.bytes.to_bytes()
    }

    fn changed(&self) -> &MemoryStorage {
        self.changes.fetch_add(1, Ordering::Relaxed);
        &self.bytes
    }
}

impl Storage for Watched {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.bytes.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if offset
            .checked_add(u64::try_from(buf.len()).unwrap())
            .is_none_or(|end| end > 1 << 32)
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.changed().write_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.changed().write_zeroes(offset, len)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.changed().discard(offset, len)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.changed().set_len(len)
    }
    fn writable(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        "hostile".to_owned()
    }
}

/// What happened with an image that was opened for reading, or the refusal.
pub(crate) struct Seen {
    pub(crate) opened: Result<(), Error>,
    /// A read failed.
    pub(crate) unreadable: bool,
}

/// Opens for reading and asks for everything. The complaint says what must not have happened.
pub(crate) fn read_everything(bytes: &[u8]) -> Result<Seen, String> {
    let watched = Watched::new(bytes.to_vec());
    let seen = guarded(|| {
        let opened = Image::open(Box::new(watched.clone()), OpenOptions::default());
        let _ = check(Box::new(watched.clone()));
        match opened {
            Err(error) => Seen {
                opened: Err(error),
                unreadable: false,
            },
            Ok(image) => {
                let unreadable = ask(&image);
                image.close().unwrap();
                Seen {
                    opened: Ok(()),
                    unreadable,
                }
            }
        }
    })?;
    match watched.changes() {
        0 => Ok(seen),
        count => Err(format!("reading changed the file {count} times")),
    }
}

/// Opens for writing and closes again; an image that opened is handed to `work` on a copy.
pub(crate) fn write_open(
    bytes: &[u8],
    work: impl FnOnce(&Image),
) -> Result<(Result<(), Error>, Vec<u8>), String> {
    let watched = Watched::new(bytes.to_vec());
    let options = || OpenOptions {
        writable: true,
        repair_dirty: false,
        ..OpenOptions::default()
    };
    let opened = guarded(|| {
        Image::open(Box::new(watched.clone()), options()).map(|image| image.close().unwrap())
    })?;
    if watched.changes() != 0 {
        return Err(format!(
            "opening and closing changed the file {} times",
            watched.changes()
        ));
    }
    if opened.is_ok() {
        guarded(|| {
            let image = Image::open(Box::new(watched.clone()), options()).unwrap();
            work(&image);
            let _ = image.close();
        })?;
    }
    Ok((opened, watched.to_bytes()))
}

/// Runs `work`; a panic or a long time is a complaint.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let started = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(work));
    let time = started.elapsed();
    match result {
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            Err(format!("panic: {}", text.unwrap_or_default()))
        }
        Ok(_) if time > PATIENCE => Err(format!("it took {time:?}")),
        Ok(value) => Ok(value),
    }
}

/// Asks an image for everything it can tell; returns whether a read of guest data failed.
fn ask(image: &Image) -> bool {
    let _ = image.map(0, image.size());
    let _ = image.snapshots();
    let _ = image.check();
    let _ = (image.header(), image.backing(), image.is_marked_corrupt());
    for bitmap in image.bitmaps().unwrap_or_default() {
        if let Ok(bits) = image.load_bitmap(&bitmap.name) {
            let _ = (bits.count(), bits.dirty_ranges().take(1000).count());
        }
    }
    if let Reading::Current(record) | Reading::Stale(record) = image.chain() {
        for entry in &record.checkpoints {
            let _ = image.judge(entry);
        }
    }
    let mut unreadable = false;
    let mut buffer = vec![0; usize::try_from(STEP).unwrap()];
    let mut at = 0;
    while at < image.size().min(MOST_READ) {
        let step = STEP.min(image.size() - at);
        unreadable |= image
            .read(&mut buffer[..usize::try_from(step).unwrap()], at)
            .is_err();
        at += step;
    }
    let last = image.size().saturating_sub(512);
    let _ = image.read(
        &mut buffer[..512.min(usize::try_from(image.size()).unwrap())],
        last,
    );
    unreadable
}

/// Peak memory of this process, bytes.
pub(crate) fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        << 10
}
