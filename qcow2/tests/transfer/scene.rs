//! Backing chains that QEMU made: random layers over one another, of different sizes and formats.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_qcow2::transfer::{Source, Target};
use tidemark_qcow2::{FileStorage, Sharing};

use crate::common::{self, open_file};

/// Largest disk of a scene.
const DISK: u64 = 6 << 20;

/// A chain in a folder; the base first.
pub(crate) struct Scene {
    pub(crate) folder: TempDir,
    pub(crate) layers: Vec<Layer>,
    pub(crate) name: String,
}

pub(crate) struct Layer {
    pub(crate) path: PathBuf,
    pub(crate) format: &'static str,
}

impl Scene {
    /// A chain of `depth` layers with random content.
    pub(crate) fn new(seed: u64, depth: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut random = Random::stream(7, seed);
        let mut scene = Self {
            folder,
            layers: Vec::new(),
            name: format!("scene {seed} of {depth} layers"),
        };
        for _ in 0..depth {
            scene.add_layer(&mut random);
        }
        scene
    }

    fn add_layer(&mut self, random: &mut Random) {
        let number = self.layers.len();
        let raw = number == 0 && random.one_in(3);
        let format = if raw { "raw" } else { "qcow2" };
        let name = format!("layer{number}.{format}");
        let path = self.path(&name);
        // Larger or smaller than what is below, to any sector.
        let size = random.within(DISK / 2 / 512..DISK / 512) * 512;
        if raw {
            let file = std::fs::File::create(&path).unwrap();
            file.set_len(size).unwrap();
        } else {
            let cluster = ["512", "4096", "65536", "2097152"];
            let cluster = cluster[usize::try_from(random.within(0..4)).unwrap()];
            let compat = if random.one_in(4) { "0.10" } else { "1.1" };
            let mut options = vec![("cluster_size", cluster), ("compat", compat)];
            let below = self.layers.last().map(|layer| {
                let name = layer.path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, layer.format)
            });
            if let Some((name, format)) = &below {
                options.extend([("backing_file", name.as_str()), ("backing_fmt", format)]);
            }
            qemu_img::create(&path, size, &options);
        }
        let commands = random_commands(random, size);
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu_io::run(&["-f", format], &commands, path.to_str().unwrap());
        self.layers.push(Layer { path, format });
    }

    /// A file of this scene.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The layer that the guest sees.
    pub(crate) fn top(&self) -> &Layer {
        self.layers.last().unwrap()
    }
}

/// Writes, zeros and discards, some of them whole, some cut.
pub(crate) fn random_commands(random: &mut Random, size: u64) -> Vec<String> {
    let mut commands = Vec::new();
    for _ in 0..8 {
        let unit = [512, 4096, 65536][usize::try_from(random.within(0..3)).unwrap()];
        let offset = random.within(0..size / unit.min(size)) * unit;
        let len = (random.within(1..16) * unit).min(size - offset);
        let pattern = random.within(1..255);
        commands.push(match random.within(0..6) {
            0 => format!("write -z {offset} {len}"),
            1 => format!("write -z -u {offset} {len}"),
            2 => format!("discard {offset} {len}"),
            // Zeros that only reading finds.
            3 => format!("write -P 0 {offset} {len}"),
            _ => format!("write -P {pattern} {offset} {len}"),
        });
    }
    commands
}

/// Opens a disk with its chain.
pub(crate) fn source(path: &Path, format: &str) -> Source {
    if format == "raw" {
        let storage = FileStorage::open(path, false, Sharing::Exclusive).unwrap();
        return Source::raw(Box::new(storage)).unwrap();
    }
    Source::image(open_file(path, common::reading()))
}

/// Opens an existing disk for writing.
pub(crate) fn target(path: &Path, format: &str) -> Target {
    if format == "raw" {
        let storage = FileStorage::open(path, true, Sharing::Exclusive).unwrap();
        return Target::raw(Box::new(storage)).unwrap();
    }
    Target::image(open_file(path, common::writing()))
}

/// A progress that nobody looks at.
pub(crate) fn silent(_done: u64, _total: u64) {}

/// Bytes that a file takes on its file system.
pub(crate) fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}
