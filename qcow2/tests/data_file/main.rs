//! Images whose guest data lies in an external data file, raw or not: read, written, checked,
//! crashed, and named by an attacker.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod crashes;
mod faults;
mod interop;
mod model;
mod names;

use std::path::Path;
use std::sync::Arc;

use tidemark_fixtures::oracle::qemu_img;
use tidemark_qcow2::{
    BackingReference, CreateOptions, DataFileReference, Gate, Image, OpenOptions, Storage,
};

/// Hands out one storage as the data file, whatever its name.
#[derive(Clone, Debug)]
struct Beside<S>(S);

impl<S: Storage + Clone + 'static> Gate for Beside<S> {
    fn open(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        Err("there is no backing file".to_owned())
    }

    fn open_data(
        &self,
        _: &DataFileReference,
        _: &str,
        _: bool,
    ) -> Result<Box<dyn Storage>, String> {
        Ok(Box::new(self.0.clone()))
    }
}

fn beside(storage: impl Storage + Clone + 'static) -> OpenOptions {
    OpenOptions::writing(Arc::new(Beside(storage)))
}

fn open(
    image: impl Storage + 'static,
    data: impl Storage + Clone + 'static,
) -> tidemark_qcow2::Result<Image> {
    Image::open(Box::new(image), beside(data))
}

/// What an image is like.
#[derive(Clone, Copy, Debug)]
struct Shape {
    cluster_bits: u32,
    raw: bool,
    extended_l2: bool,
}

const fn shape(cluster_bits: u32, raw: bool, extended_l2: bool) -> Shape {
    Shape {
        cluster_bits,
        raw,
        extended_l2,
    }
}

/// Those that the sweeps try.
const SHAPES: [Shape; 6] = [
    shape(12, false, false),
    shape(12, true, false),
    shape(16, false, false),
    shape(16, true, false),
    shape(14, false, true),
    shape(14, true, true),
];

impl Shape {
    fn options(self, size: u64) -> CreateOptions {
        CreateOptions {
            cluster_bits: self.cluster_bits,
            extended_l2: self.extended_l2,
            ..options(size, self.raw)
        }
    }
}

fn options(size: u64, raw: bool) -> CreateOptions {
    CreateOptions {
        data_file: Some(DataFileReference {
            name: b"data.raw".to_vec(),
            raw,
        }),
        ..CreateOptions::new(size)
    }
}

/// An image and its data file as QEMU opens them, wherever the image says that the latter is.
fn image_options(image: &Path, data: &Path) -> String {
    format!(
        "driver=qcow2,file.driver=file,file.filename={},data-file.driver=file,data-file.filename={}",
        image.display(),
        data.display()
    )
}

/// Writes both files into a folder; QEMU's check finds at worst leaks, and it reads `content`.
fn assert_qemu_reads(image: &[u8], data: &[u8], content: &[u8], what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let [image_path, data_path, out] =
        ["image", "data.raw", "out"].map(|name| folder.path().join(name));
    std::fs::write(&image_path, image).unwrap();
    std::fs::write(&data_path, data).unwrap();
    let source = image_options(&image_path, &data_path);
    let output = qemu_img::run(&["check", "--image-opts", &source]);
    assert!(
        matches!(output.status, Some(0 | 3)),
        "{what}: {}{}",
        output.text(),
        output.stderr
    );
    let out_name = out.display().to_string();
    qemu_img::ok(&["convert", "--image-opts", "-O", "raw", &source, &out_name]);
    assert!(
        std::fs::read(&out).unwrap() == content,
        "{what}: QEMU reads other bytes"
    );
}
