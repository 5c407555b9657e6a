//! Files that an image names: nothing is opened but what the gate lets through, and nothing is
//! guessed.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use tidemark_fixtures::builder::{Cluster, Extension, ImageBuilder};
use tidemark_qcow2::{
    BackingReference, Error, Feature, FileStorage, Gate, Image, MemoryStorage, NoFiles,
    OpenOptions, PlainFiles, Sharing, Storage,
};

use crate::probe::{PATIENCE, guarded};

fn overlay(name: &[u8], format: &str) -> Vec<u8> {
    let builder = ImageBuilder::new(256 << 10).cluster_bits(12);
    let builder = builder.cluster(1, Cluster::Data(vec![0x11; 4096]));
    let builder = match format {
        "" => builder,
        format => builder.extension(Extension::backing_format(format)),
    };
    ImageBuilder {
        backing_name: Some(name.to_vec()),
        ..builder
    }
    .build()
    .bytes
}

fn open(path: &Path, gate: impl Gate + 'static) -> Result<Image, Error> {
    let storage = FileStorage::open(path, false, Sharing::Exclusive).unwrap();
    Image::open(Box::new(storage), OpenOptions::reading(Arc::new(gate)))
}

fn refusal(result: Result<Image, Error>) -> String {
    let error = result.expect_err("it must be refused");
    match error.feature() {
        Some(Feature::Backing { reason, .. }) => reason.clone(),
        _ => panic!("another refusal: {error}"),
    }
}

/// Lets the same image through for ever and counts how often it is asked.
#[derive(Clone, Debug)]
struct Endless {
    bytes: Vec<u8>,
    asked: Arc<AtomicUsize>,
}

impl Gate for Endless {
    fn open(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(MemoryStorage::from_bytes(self.bytes.clone())))
    }
}

const NAMES: &[&[u8]] = &[
    b"/etc/passwd",
    b"../../../etc/passwd",
    b"/dev/zero",
    b"fifo",
    b".",
    b"self.qcow2",
    b"missing",
    b"json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
    b"nbd://192.0.2.1:10809/disk",
    b"fd:0",
    b"file:/etc/passwd",
    b"base\0.raw",
    b"\xff\xfe",
];

#[test]
fn without_a_gate_no_name_opens_anything() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("self.qcow2");
    for name in NAMES {
        for format in ["raw", "qcow2", "", "vmdk"] {
            let bytes = overlay(name, format);
            std::fs::write(&path, &bytes).unwrap();
            refusal(open(&path, NoFiles));
            let storage = FileStorage::open(&path, true, Sharing::Exclusive).unwrap();
            let unbacked = Image::open_unbacked(Box::new(storage), true).unwrap();
            let mut buffer = [0; 4096];
            unbacked.read(&mut buffer, 4096).unwrap();
            assert_eq!(buffer, [0x11; 4096]);
            assert!(
                unbacked.read(&mut buffer, 0).is_err(),
                "the backing file would show"
            );
            unbacked.close().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
    }
}

#[test]
fn what_is_no_plain_file_is_refused_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("self.qcow2");
    let fifo = std::process::Command::new("mkfifo")
        .arg(folder.path().join("fifo"))
        .status();
    assert!(fifo.unwrap().success());
    symlink("/dev/zero", folder.path().join("link")).unwrap();
    let below = PlainFiles {
        below: vec![folder.path().to_owned()],
        ..PlainFiles::default()
    };
    let link: &[u8] = b"link";
    for name in NAMES[2..].iter().chain([&link]) {
        for format in ["raw", "qcow2", ""] {
            std::fs::write(&path, overlay(name, format)).unwrap();
            for gate in [PlainFiles::default(), below.clone()] {
                let reason = match guarded(|| open(&path, gate)).unwrap() {
                    // Readers share: as raw the image shows its own bytes, and ends.
                    Ok(image) if *name == b"self.qcow2" && format == "raw" => {
                        image.read(&mut [0; 4096], 0).unwrap();
                        "opens".to_owned()
                    }
                    result => refusal(result),
                };
                println!("{} as {format:?}: {reason}", String::from_utf8_lossy(name));
            }
        }
    }
    for format in ["raw", "qcow2"] {
        std::fs::write(&path, overlay(b"self.qcow2", format)).unwrap();
        let storage = FileStorage::open(&path, true, Sharing::Exclusive).unwrap();
        let gate = Arc::new(PlainFiles::default());
        refusal(Image::open(Box::new(storage), OpenOptions::writing(gate)));
    }
    std::fs::write(&path, overlay(b"/etc/hostname", "raw")).unwrap();
    assert!(refusal(open(&path, below)).contains("outside"));
}

#[test]
fn cycles_and_endless_chains_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    std::fs::write(file("a"), overlay(b"b", "qcow2")).unwrap();
    std::fs::write(file("b"), overlay(b"a", "qcow2")).unwrap();
    let shared = PlainFiles {
        sharing: Sharing::ForceShare,
        ..PlainFiles::default()
    };
    for gate in [PlainFiles::default(), shared] {
        let started = Instant::now();
        assert!(open(&file("a"), gate).is_err());
        assert!(started.elapsed() < PATIENCE);
    }
    let gate = Endless {
        bytes: overlay(b"again", "qcow2"),
        asked: Arc::default(),
    };
    refusal(open(&file("a"), gate.clone()));
    let asked = gate.asked.load(Ordering::Relaxed);
    assert!((2..200).contains(&asked), "asked {asked} times");
}

#[test]
fn a_declared_format_wins_and_an_undeclared_one_is_not_guessed() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| -> PathBuf { folder.path().join(name) };
    // A raw disk whose guest wrote a qcow2 header that names a host file.
    let mut trap = overlay(b"/etc/passwd", "raw");
    trap.resize(256 << 10, 0x22);
    std::fs::write(file("trap"), &trap).unwrap();
    std::fs::write(file("raw"), overlay(b"trap", "raw")).unwrap();
    let image = open(&file("raw"), PlainFiles::default()).unwrap();
    let mut content = vec![0; 256 << 10];
    image.read(&mut content, 0).unwrap();
    let mut expected = trap.clone();
    expected[4096..8192].fill(0x11);
    assert!(content == expected, "the raw disk shows as it is");
    std::fs::write(file("unsaid"), overlay(b"trap", "")).unwrap();
    assert!(refusal(open(&file("unsaid"), PlainFiles::default())).contains("not guessed"));
    std::fs::write(file("vmdk"), overlay(b"trap", "vmdk")).unwrap();
    assert!(refusal(open(&file("vmdk"), PlainFiles::default())).contains("not supported"));
}

#[test]
fn a_shorter_layer_reads_zero_behind_its_end_and_a_longer_one_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    for (len, format) in [(10_000, "raw"), (1 << 20, "raw"), (0, "raw")] {
        std::fs::write(file("base"), vec![0x33; len]).unwrap();
        std::fs::write(file("top"), overlay(b"base", format)).unwrap();
        let image = open(&file("top"), PlainFiles::default()).unwrap();
        let mut content = vec![0xFF; 256 << 10];
        image.read(&mut content, 0).unwrap();
        let mut expected = vec![0x33; len.min(256 << 10)];
        expected.resize(256 << 10, 0);
        expected[4096..8192].fill(0x11);
        assert!(content == expected, "a layer of {len} bytes");
        assert!(image.read(&mut content[..1], 256 << 10).is_err());
    }
}
