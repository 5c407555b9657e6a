//! Names of data files that an attacker chose: nothing is opened but what the gate lets through,
//! and never the image itself or a layer of its chain.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemark_fixtures::builder::{EXTENSION_DATA_FILE, Extension, ImageBuilder};
use tidemark_qcow2::{
    Error, Feature, FileStorage, Gate, Image, NoFiles, OpenOptions, PlainFiles, Sharing,
};

/// An empty disk whose data file has this name; `None` leaves the name out.
fn image_of(name: Option<&[u8]>) -> ImageBuilder {
    let builder = ImageBuilder {
        incompatible: 4,
        ..ImageBuilder::new(256 << 10).cluster_bits(12)
    };
    match name {
        Some(name) => builder.extension(Extension::new(EXTENSION_DATA_FILE, name)),
        None => builder,
    }
}

fn open(path: &Path, gate: impl Gate + 'static, writable: bool) -> Result<Image, Error> {
    let storage = FileStorage::open(path, writable, Sharing::Exclusive).unwrap();
    let options = OpenOptions {
        writable,
        gate: Arc::new(gate),
        ..OpenOptions::default()
    };
    Image::open(Box::new(storage), options)
}

fn refusal(result: Result<Image, Error>, what: &str) -> String {
    let error = result.expect_err(what);
    match error.feature() {
        Some(Feature::DataFile { reason, .. }) => reason.clone(),
        _ => panic!("{what}: another refusal: {error}"),
    }
}

const NAMES: &[&[u8]] = &[
    b"/etc/passwd",
    b"../../../../../../etc/passwd",
    b"secret",
    b"/dev/zero",
    b"/dev/stdin",
    b"fifo",
    b".",
    b"/",
    b"self.qcow2",
    b"./self.qcow2",
    b"link-to-self",
    b"link-to-zero",
    b"missing",
    b"",
    b"json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
    b"nbd://192.0.2.1:10809/disk",
    b"fd:0",
    b"file:/etc/passwd",
    b"data\0.raw",
    b"\xff\xfe",
    b"\x1b[2J\r\n",
];
/// Names that a gate for plain files opens, because whoever chose that gate trusts the image.
const PLAIN: &[&[u8]] = &[b"/etc/passwd", b"../../../../../../etc/passwd", b"secret"];

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("secret"), b"a secret of the host").unwrap();
    let fifo = std::process::Command::new("mkfifo")
        .arg(at("fifo"))
        .status();
    assert!(fifo.unwrap().success());
    symlink("/dev/zero", at("link-to-zero")).unwrap();
    symlink("self.qcow2", at("link-to-self")).unwrap();
    folder
}

#[test]
fn no_name_opens_what_the_gate_does_not_let_through() {
    let folder = folder();
    let path = folder.path().join("self.qcow2");
    let below = PlainFiles {
        below: vec![folder.path().join("allowed")],
        ..PlainFiles::default()
    };
    std::fs::create_dir(folder.path().join("allowed")).unwrap();
    let mut cases = 0;
    for name in NAMES {
        let bytes = image_of(Some(name)).build().bytes;
        let what = String::from_utf8_lossy(name).into_owned();
        std::fs::write(&path, &bytes).unwrap();
        let started = Instant::now();
        for writable in [false, true] {
            refusal(open(&path, NoFiles, writable), &what);
            refusal(open(&path, below.clone(), writable), &what);
            if !PLAIN.contains(name) {
                let reason = refusal(open(&path, PlainFiles::default(), writable), &what);
                println!("{what:?}: {reason}");
            }
            cases += 3;
        }
        assert!(started.elapsed() < Duration::from_secs(2), "{what}: waited");
        assert!(std::fs::read(&path).unwrap() == bytes, "{what}: written");
    }
    let secret = std::fs::read(folder.path().join("secret")).unwrap();
    assert_eq!(secret, b"a secret of the host");
    println!("{cases} opens");
    assert!(cases >= 100);
}

#[test]
fn without_its_data_file_an_image_answers_for_itself_and_hands_out_nothing() {
    let folder = folder();
    let path = folder.path().join("self.qcow2");
    for name in [Some(&b"secret"[..]), Some(b"missing"), None] {
        let bytes = image_of(name).build().bytes;
        std::fs::write(&path, &bytes).unwrap();
        let storage = FileStorage::open(&path, true, Sharing::Exclusive).unwrap();
        let image = Image::open_unbacked(Box::new(storage), true).unwrap();
        assert!(image.check().unwrap().is_clean());
        let expected = name.unwrap_or_default();
        assert_eq!(image.data_file().unwrap().name, expected);
        assert_eq!(image.map(0, image.size()).unwrap().len(), 1);
        let mut buffer = [0; 512];
        for error in [
            image.require_guest_data().unwrap_err(),
            image.read(&mut buffer, 0).unwrap_err(),
            image.write(&[1; 512], 0).unwrap_err(),
            image.write_zeroes(0, 4096).unwrap_err(),
            image.discard(0, 4096).unwrap_err(),
        ] {
            let known = matches!(error.feature(), Some(Feature::DataFile { .. }));
            assert!(known, "{error}");
        }
        crate::common::add_bitmap(&image, "b", 4096);
        assert_eq!(image.load_bitmap("b").unwrap().count(), 0);
        image.close().unwrap();
        let storage = FileStorage::open(&path, true, Sharing::Exclusive).unwrap();
        let image = Image::open_unbacked(Box::new(storage), true).unwrap();
        assert_eq!(image.data_file().unwrap().name, expected);
        assert!(image.check().unwrap().is_clean());
    }
}

#[test]
fn a_data_file_is_never_a_layer_of_the_chain() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("base.raw"), vec![0x33; 256 << 10]).unwrap();
    symlink("base.raw", at("alias")).unwrap();
    std::fs::hard_link(at("base.raw"), at("twin")).unwrap();
    let middle = ImageBuilder::new(256 << 10).cluster_bits(12);
    let middle = middle
        .backing("base.raw")
        .extension(Extension::backing_format("raw"));
    std::fs::write(at("middle.qcow2"), middle.build().bytes).unwrap();
    let mut cases = 0;
    for (backing, format) in [("base.raw", "raw"), ("middle.qcow2", "qcow2")] {
        for name in ["base.raw", "alias", "twin"] {
            let top = image_of(Some(name.as_bytes()))
                .backing(backing)
                .extension(Extension::backing_format(format));
            std::fs::write(at("top.qcow2"), top.build().bytes).unwrap();
            for shared in [Sharing::Exclusive, Sharing::ForceShare] {
                let gate = PlainFiles {
                    sharing: shared,
                    ..PlainFiles::default()
                };
                let reason = refusal(open(&at("top.qcow2"), gate, false), name);
                assert!(reason.contains("chain"), "{reason}");
                cases += 1;
            }
            // For writing the locks say it already.
            refusal(open(&at("top.qcow2"), PlainFiles::default(), true), name);
        }
    }
    println!("{cases} chains");
    assert_eq!(
        std::fs::read(at("base.raw")).unwrap(),
        vec![0x33; 256 << 10]
    );
}

#[test]
fn a_name_that_is_the_new_image_itself_is_refused_before_it_is_emptied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    std::fs::write(&path, b"something that is there").unwrap();
    let storage = FileStorage::open(&path, true, Sharing::ForceShare).unwrap();
    let gate = PlainFiles {
        sharing: Sharing::ForceShare,
        ..PlainFiles::default()
    };
    let mut options = crate::options(1 << 20, false);
    options.data_file.as_mut().unwrap().name = b"disk.qcow2".to_vec();
    let result = Image::create(
        Box::new(storage),
        &options,
        OpenOptions::writing(Arc::new(gate)),
    );
    assert!(refusal(result, "itself").contains("itself"));
    assert_eq!(std::fs::read(&path).unwrap(), b"something that is there");
}
