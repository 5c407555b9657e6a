//! Stacks of layers: random ones on disk made by QEMU, and named ones in memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{BackingReference, Gate, MemoryStorage, Storage};

/// Largest disk of a stack.
pub(crate) const DISK: u64 = 3 << 20;

/// A folder with chains of layers.
pub(crate) struct Folder {
    pub(crate) folder: TempDir,
    pub(crate) random: Random,
}

/// A layer: name in the folder and format.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) name: String,
    pub(crate) format: &'static str,
}

impl Layer {
    pub(crate) fn reference(&self) -> BackingReference {
        BackingReference {
            name: self.name.clone().into_bytes(),
            format: self.format.to_owned(),
        }
    }
}

impl Folder {
    pub(crate) fn new(seed: u64) -> Self {
        // In memory where possible: durability is not what these tests are about.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Self {
            folder: folder.unwrap(),
            random: Random::stream(11, seed),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A chain of `depth` random layers, the base first; only a base may be raw.
    pub(crate) fn chain(&mut self, prefix: &str, depth: usize) -> Vec<Layer> {
        let mut layers: Vec<Layer> = Vec::new();
        for number in 0..depth {
            let raw = number == 0 && self.random.one_in(3);
            let below = layers.last().cloned();
            let name = format!("{prefix}{number}");
            layers.push(match raw {
                true => self.raw(&name),
                false => self.layer(&name, below.as_ref()),
            });
        }
        layers
    }

    fn raw(&mut self, name: &str) -> Layer {
        let size = self.size();
        std::fs::File::create(self.path(name))
            .unwrap()
            .set_len(size)
            .unwrap();
        self.fill(name, "raw", size);
        Layer {
            name: name.to_owned(),
            format: "raw",
        }
    }

    /// A random size, to any sector.
    fn size(&mut self) -> u64 {
        self.random.within(DISK / 3 / 512..DISK / 512) * 512
    }

    /// A random qcow2 layer over another.
    pub(crate) fn layer(&mut self, name: &str, below: Option<&Layer>) -> Layer {
        let size = self.size();
        let pick = |random: &mut Random, from: &[&'static str]| {
            from[usize::try_from(random.within(0..u64::try_from(from.len()).unwrap())).unwrap()]
        };
        let random = &mut self.random;
        let extended = random.one_in(3);
        let cluster = match extended {
            true => pick(random, &["16384", "65536"]),
            false => pick(random, &["512", "4096", "65536", "2097152"]),
        };
        let mut options = vec![("cluster_size", cluster)];
        match (extended, random.one_in(4)) {
            (true, _) => options.push(("extended_l2", "on")),
            (false, true) => options.push(("compat", "0.10")),
            (false, false) => {}
        }
        if let Some(below) = below {
            options.extend([
                ("backing_file", below.name.as_str()),
                ("backing_fmt", below.format),
            ]);
        }
        qemu_img::create(&self.path(name), size, &options);
        self.fill(name, "qcow2", size);
        Layer {
            name: name.to_owned(),
            format: "qcow2",
        }
    }

    /// Random writes, zeros, discards, and in qcow2 some compressed clusters.
    pub(crate) fn fill(&mut self, name: &str, format: &str, size: u64) {
        let mut commands = Vec::new();
        for _ in 0..7 {
            commands.push(self.command(format, size));
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        let path = self.path(name);
        // A compressed write is refused where a cluster has data already.
        qemu_io::run(&["-f", format], &commands, path.to_str().unwrap());
    }

    fn command(&mut self, format: &str, size: u64) -> String {
        let random = &mut self.random;
        let unit = [512, 4096, 65536][usize::try_from(random.within(0..3)).unwrap()];
        let offset = random.within(0..size / unit) * unit;
        let len = (random.within(1..16) * unit).min(size - offset);
        let pattern = random.within(1..8);
        match random.within(0..7) {
            0 => format!("write -z {offset} {len}"),
            1 => format!("write -z -u {offset} {len}"),
            2 => format!("discard {offset} {len}"),
            3 => format!("write -P 0 {offset} {len}"),
            4 if format == "qcow2" => format!("write -c -P {pattern} {offset} {len}"),
            _ => format!("write -P {pattern} {offset} {len}"),
        }
    }
}

/// Lets the layers of a stack in memory through, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Named {
    files: HashMap<String, Vec<u8>>,
}

impl Named {
    pub(crate) fn with(mut self, name: &str, bytes: Vec<u8>) -> Self {
        self.files.insert(name.to_owned(), bytes);
        self
    }
}

impl Gate for Named {
    fn open(&self, reference: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        let name = String::from_utf8_lossy(&reference.name).into_owned();
        match self.files.get(&name) {
            Some(bytes) => Ok(Box::new(MemoryStorage::from_bytes(bytes.clone()))),
            None => Err(format!("{name}: no such layer")),
        }
    }
}

pub(crate) fn copy(folder: &Folder, from: &str, to: &str) -> PathBuf {
    let path = folder.path(to);
    std::fs::copy(folder.path(from), &path).unwrap();
    path
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// How many random cases to run: `TIDEMARK_CASES`, or so many.
pub(crate) fn cases(otherwise: u64) -> u64 {
    let wanted = std::env::var("TIDEMARK_CASES").ok();
    wanted.and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

impl Folder {
    /// The same files in another folder.
    pub(crate) fn copy_all(&self) -> TempDir {
        let other = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let other = other.unwrap();
        for entry in std::fs::read_dir(self.folder.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), other.path().join(entry.file_name())).unwrap();
        }
        other
    }
}

/// Lets files that are written through: each name is one storage, whoever opens it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Live {
    files: HashMap<String, CrashStorage>,
}

impl Live {
    /// The files of another gate, under the same names.
    pub(crate) fn new(gate: Arc<dyn Gate>, names: &[&str]) -> Self {
        let mut live = Self::default();
        for name in names {
            let reference = BackingReference {
                name: name.as_bytes().to_vec(),
                format: "raw".to_owned(),
            };
            let bytes = content_of(&*gate.open(&reference, "").unwrap());
            live = live.with(name, CrashStorage::new(bytes));
        }
        live
    }

    pub(crate) fn with(mut self, name: &str, storage: CrashStorage) -> Self {
        self.files.insert(name.to_owned(), storage);
        self
    }

    fn find(&self, reference: &BackingReference) -> Result<Box<dyn Storage>, String> {
        let name = String::from_utf8_lossy(&reference.name).into_owned();
        let found = self.files.get(&name).cloned();
        found
            .map(|storage| -> Box<dyn Storage> { Box::new(storage) })
            .ok_or_else(|| format!("{name}: no such layer"))
    }
}

impl Gate for Live {
    fn open(&self, reference: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        self.find(reference)
    }

    fn open_for_writing(
        &self,
        reference: &BackingReference,
        _: &str,
    ) -> Result<Box<dyn Storage>, String> {
        self.find(reference)
    }
}

/// All bytes of a file.
pub(crate) fn content_of(file: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    let mut done = 0;
    while done < bytes.len() {
        let at = u64::try_from(done).unwrap();
        done += file.read_at(&mut bytes[done..], at).unwrap();
    }
    bytes
}
