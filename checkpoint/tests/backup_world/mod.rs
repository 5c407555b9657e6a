//! Image files in a folder of their own, what they must hold, and a directory of backups.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;
use tidemark_checkpoint::backup::{
    self, BackupOptions, DiskReport, Format, Mode, Report, RestoreOptions,
};
use tidemark_checkpoint::{Disk, Domain, DomainOptions};
use tidemark_fixtures::model::DiskModel;
use tidemark_fixtures::ops::Op;
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_qcow2::{
    BackingReference, CreateOptions, FileStorage, Image, OpenOptions, PlainFiles, Sharing,
};

pub(crate) const CLUSTER: u64 = 64 << 10;
pub(crate) const DISK_BYTES: u64 = 40 * CLUSTER;

/// One world at a time: a process that another test starts inherits, for a moment, the locks on
/// the images that are open here.
static ALONE: Mutex<()> = Mutex::new(());

/// The disks of one machine, closed between calls as between runs of a program.
pub(crate) struct World {
    _alone: MutexGuard<'static, ()>,
    folder: TempDir,
    pub(crate) models: BTreeMap<String, DiskModel>,
}

impl World {
    /// One disk, `vda`, that was never written.
    pub(crate) fn new() -> Self {
        let mut world = Self::empty();
        world.add("vda", &CreateOptions::new(DISK_BYTES));
        world
    }

    pub(crate) fn empty() -> Self {
        Self {
            _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner),
            folder: tempfile::tempdir().unwrap(),
            models: BTreeMap::new(),
        }
    }

    pub(crate) fn add(&mut self, name: &str, options: &CreateOptions) {
        let storage = FileStorage::create(&self.image(name)).unwrap();
        Image::create(Box::new(storage), options, writing())
            .unwrap()
            .close()
            .unwrap();
        self.models
            .insert(name.to_owned(), DiskModel::new(options.size));
    }

    /// Adds an overlay over an image that reads as `content`.
    pub(crate) fn add_overlay(&mut self, name: &str, base: &str) {
        let content = self.models[base].content().to_vec();
        let size = self.models[base].size();
        let backing = BackingReference {
            name: format!("{base}.qcow2").into_bytes(),
            format: "qcow2".to_owned(),
        };
        let options = CreateOptions {
            backing: Some(backing),
            ..CreateOptions::new(size)
        };
        self.add(name, &options);
        self.models
            .insert(name.to_owned(), DiskModel::from_content(content));
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn image(&self, disk: &str) -> PathBuf {
        self.path(&format!("{disk}.qcow2"))
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.path("backups")
    }

    /// Opens the disks, works on them, and closes them.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&Domain) -> R) -> R {
        let disks: Vec<Disk> = self.models.keys().map(|name| self.open(name)).collect();
        let domain = Domain::new(disks.clone(), DomainOptions::default()).unwrap();
        let answer = work(&domain);
        drop(domain);
        for disk in disks {
            Arc::try_unwrap(disk.image).unwrap().close().unwrap();
        }
        answer
    }

    fn open(&self, name: &str) -> Disk {
        let storage =
            FileStorage::open(&self.image(name), true, Sharing::Exclusive).expect("nobody has it");
        Disk {
            name: name.to_owned(),
            image: Arc::new(Image::open(Box::new(storage), writing()).unwrap()),
        }
    }

    /// Does operations on one disk and on its model.
    pub(crate) fn run(&mut self, disk: &str, ops: &[Op]) {
        let mut model = self.models[disk].clone();
        self.with(|domain| {
            let image = &domain.disk(disk).unwrap().image;
            for op in ops {
                apply(image, &mut model, op);
            }
        });
        self.models.insert(disk.to_owned(), model);
    }

    pub(crate) fn write(&mut self, disk: &str, offset: u64, len: u64, seed: u64) {
        self.run(disk, &[Op::Write { offset, len, seed }]);
    }

    pub(crate) fn options(&self, checkpoint: Option<&str>, since: Option<&str>) -> BackupOptions {
        BackupOptions {
            to: self.directory(),
            checkpoint: checkpoint.map(ToOwned::to_owned),
            since: since.map(ToOwned::to_owned),
            ..BackupOptions::default()
        }
    }

    pub(crate) fn backup(&self, checkpoint: Option<&str>, since: Option<&str>) -> Report {
        let options = self.options(checkpoint, since);
        self.with(|domain| backup::backup(domain, &options))
            .unwrap()
    }

    /// The disk's content at a point, restored by us.
    pub(crate) fn restored(&self, disk: &str, at: Option<&str>) -> Vec<u8> {
        let scratch = tempfile::tempdir().unwrap();
        let to = scratch.path().join("restored");
        let options = RestoreOptions {
            from: self.directory(),
            disk: disk.to_owned(),
            at: at.map(ToOwned::to_owned),
            to: to.clone(),
            format: Format::Raw,
        };
        backup::restore(&options).unwrap();
        std::fs::read(to).unwrap()
    }

    /// Panics unless a disk's newest backup holds what the model does: restored by us as raw and
    /// as qcow2, and by QEMU alone.
    pub(crate) fn assert_backed_up(&self, disk: &DiskReport) {
        let model = self.models[&disk.disk].content();
        self.assert_restores(disk, None, model);
    }

    pub(crate) fn assert_restores(&self, disk: &DiskReport, at: Option<&str>, model: &[u8]) {
        assert_same(&self.restored(&disk.disk, at), model, "our raw restore");
        let scratch = tempfile::tempdir().unwrap();
        let to = scratch.path().join("restored.qcow2");
        let options = RestoreOptions {
            from: self.directory(),
            disk: disk.disk.clone(),
            at: at.map(ToOwned::to_owned),
            to: to.clone(),
            format: Format::Qcow2,
        };
        backup::restore(&options).unwrap();
        assert_same(&content(&to), model, "our qcow2 restore");
        if oracle::available() {
            qemu_img::check(&to).assert_clean();
            let target = self.directory().join(&disk.path);
            if disk.path.ends_with(".raw") {
                assert_same(&std::fs::read(&target).unwrap(), model, "the raw target");
                return;
            }
            qemu_img::check(&target).assert_clean();
            assert_same(
                &qemu_img::convert_to_raw(&target),
                model,
                "qemu-img convert",
            );
        }
    }

    pub(crate) fn assert_sound(&self) {
        let answer = backup::verify(&self.directory()).unwrap();
        assert_eq!(answer.findings, []);
        assert_eq!(answer.strangers, Vec::<String>::new());
    }
}

pub(crate) fn writing() -> OpenOptions {
    OpenOptions::writing(Arc::new(PlainFiles::default()))
}

/// What an image reads as.
pub(crate) fn content(path: &Path) -> Vec<u8> {
    let storage = FileStorage::open(path, false, Sharing::Exclusive).unwrap();
    let options = OpenOptions::reading(Arc::new(PlainFiles::default()));
    let image = Image::open(Box::new(storage), options).unwrap();
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read(&mut bytes, 0).unwrap();
    bytes
}

pub(crate) fn apply(image: &Image, model: &mut DiskModel, op: &Op) {
    match *op {
        Op::Write { offset, len, seed } => image
            .write(&tidemark_fixtures::ops::fill(seed, len), offset)
            .unwrap(),
        Op::WriteZeroes { offset, len } => image.write_zeroes(offset, len).unwrap(),
        Op::Discard { offset, len } => image.discard(offset, len).unwrap(),
        Op::Flush => image.flush().unwrap(),
        Op::Checkpoint | Op::Reopen => {}
    }
    if let Some(range) = model.apply(op) {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        image.read(&mut bytes, range.start).unwrap();
        model.settle(range, &bytes);
    }
}

pub(crate) fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: the size differs");
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: first byte that differs");
}

pub(crate) fn only(report: &Report) -> &DiskReport {
    assert_eq!(report.disks.len(), 1);
    &report.disks[0]
}

pub(crate) fn assert_full(disk: &DiskReport, reason: Option<&str>) {
    assert_eq!(disk.mode, Mode::Full, "{disk:?}");
    match reason {
        None => assert_eq!(disk.reason, None),
        Some(part) => assert!(
            disk.reason
                .as_deref()
                .is_some_and(|text| text.contains(part)),
            "{disk:?}"
        ),
    }
}

pub(crate) fn assert_incremental(disk: &DiskReport) {
    assert_eq!(
        (disk.mode, &disk.reason),
        (Mode::Incremental, &None),
        "{disk:?}"
    );
}
