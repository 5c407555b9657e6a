//! The image files of one machine, with a directory of descriptors, closed between calls.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;
use tidemark_bitmap::Bitmap;
use tidemark_checkpoint::{
    CreateFlags, Disk, DiskDelta, Domain, DomainOptions, FullReason, SinceOptions, Store,
};
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::{CreateOptions, FileStorage, Image, OpenOptions, PlainFiles, Sharing};

pub(crate) const SIZE: u64 = 4 << 20;

/// One desk at a time: a process that another test starts inherits, for a moment, the locks on
/// the images that are open here.
static ALONE: Mutex<()> = Mutex::new(());

pub(crate) struct Desk {
    _alone: MutexGuard<'static, ()>,
    folder: TempDir,
    disks: Vec<String>,
}

impl Desk {
    /// Disks of [`SIZE`] bytes that were never written.
    pub(crate) fn new(disks: &[&str]) -> Self {
        Self::with(disks, &CreateOptions::new(SIZE))
    }

    pub(crate) fn with(disks: &[&str], options: &CreateOptions) -> Self {
        let mut desk = Self::empty();
        for disk in disks {
            desk.add(disk, options);
        }
        desk
    }

    pub(crate) fn empty() -> Self {
        Self {
            _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner),
            folder: tempfile::tempdir().unwrap(),
            disks: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, disk: &str, options: &CreateOptions) {
        let storage = FileStorage::create(&self.image(disk)).unwrap();
        Image::create(Box::new(storage), options, writing())
            .unwrap()
            .close()
            .unwrap();
        self.own(disk);
    }

    /// Takes an image that lies there already into the machine.
    pub(crate) fn own(&mut self, disk: &str) {
        self.disks.push(disk.to_owned());
    }

    /// Takes a disk out of the machine; its image stays.
    pub(crate) fn detach(&mut self, disk: &str) {
        self.disks.retain(|other| other != disk);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn image(&self, disk: &str) -> PathBuf {
        self.path(&format!("{disk}.qcow2"))
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.path("store")
    }

    pub(crate) fn bytes(&self) -> Vec<Vec<u8>> {
        let read = |disk: &String| std::fs::read(self.image(disk)).unwrap();
        self.disks.iter().map(read).collect()
    }

    fn open_disk(&self, disk: &str) -> Disk {
        let storage = FileStorage::open(&self.image(disk), true, Sharing::Exclusive).unwrap();
        Disk {
            name: disk.to_owned(),
            image: Arc::new(Image::open(Box::new(storage), writing()).unwrap()),
        }
    }

    pub(crate) fn open(&self) -> Domain {
        let disks = self.disks.iter().map(|disk| self.open_disk(disk)).collect();
        let options = DomainOptions {
            store: Some(Store::new(self.store())),
            ..DomainOptions::default()
        };
        Domain::new(disks, options).unwrap()
    }

    /// Opens the disks, works on them, and closes them.
    pub(crate) fn session<R>(&self, work: impl FnOnce(&Domain) -> R) -> R {
        let domain = self.open();
        let answer = work(&domain);
        close(domain);
        answer
    }

    /// A checkpoint in a session of its own.
    pub(crate) fn checkpoint(&self, name: &str) {
        self.session(|domain| {
            drop(
                domain
                    .create(&crate::common::spec(name), CreateFlags::NONE)
                    .unwrap(),
            )
        });
    }

    /// Writes of ours, in a session of their own.
    pub(crate) fn write(&self, disk: &str, offset: u64, len: usize, value: u8) {
        self.session(|domain| crate::common::write(domain, disk, offset, len, value));
    }

    /// A guest under QEMU.
    pub(crate) fn qemu_writes(&self, disk: &str, commands: &[&str]) {
        qemu_io::commands(&self.image(disk), commands);
    }

    /// The disk as QEMU reads it.
    pub(crate) fn content(&self, disk: &str) -> Vec<u8> {
        qemu_img::convert_to_raw(&self.image(disk))
    }

    pub(crate) fn since(&self, name: &str, disk: &str) -> Result<Bitmap, FullReason> {
        self.session(|domain| since(domain, name, disk))
    }

    /// Law 2: what changed is in the answer, which must be one.
    pub(crate) fn covers(&self, name: &str, disk: &str, before: &[u8], what: &str) -> Bitmap {
        let bits = self
            .since(name, disk)
            .unwrap_or_else(|reason| panic!("{what}: since {name}: {reason}"));
        covers(&bits, before, &self.content(disk), what);
        bits
    }

    pub(crate) fn assert_clean(&self) {
        for disk in &self.disks {
            qemu_img::check(&self.image(disk)).assert_clean();
        }
    }
}

/// Asks one disk.
pub(crate) fn since(domain: &Domain, name: &str, disk: &str) -> Result<Bitmap, FullReason> {
    let changes = domain.changed_since(name, SinceOptions::default()).unwrap();
    let change = changes
        .into_iter()
        .find(|change| change.disk == disk)
        .unwrap();
    match change.delta {
        DiskDelta::Incremental(bits) => Ok(bits),
        DiskDelta::Full { reason } => Err(reason),
    }
}

/// As [`crate::common::assert_superset`], for disks of any two sizes.
pub(crate) fn covers(bits: &Bitmap, before: &[u8], after: &[u8], what: &str) {
    let common = before.len().min(after.len());
    crate::common::assert_superset(bits, &before[..common], &after[..common], what);
    for offset in (common..after.len()).step_by(512) {
        assert!(
            bits.test(u64::try_from(offset).unwrap()),
            "{what}: new bytes at {offset}"
        );
    }
}

pub(crate) fn writing() -> OpenOptions {
    OpenOptions::writing(Arc::new(PlainFiles::default()))
}

pub(crate) fn close(domain: Domain) {
    let disks = domain.disks().to_vec();
    drop(domain);
    for disk in disks {
        Arc::try_unwrap(disk.image).unwrap().close().unwrap();
    }
}

/// A copy of a file, put back later: a roll back by a storage that takes snapshots.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).unwrap();
}
