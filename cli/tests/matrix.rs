//! `info`, `map`, `measure` and `check` beside qemu-img, key by key, on a matrix of images that
//! qemu-img made: versions x cluster sizes x refcount widths x features.
//!
//! What differs on purpose is named here and nowhere else: `info` has one key more (`tidemark`);
//! `map` and `measure` do not look at holes of a qcow2 file ([`common::comparable_map`]).

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::os::unix::fs::FileExt;

use common::{Place, assert_same, comparable_map, without};
use serde_json::Value;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 6 * MIB + 512;

/// What an image has beside its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Feature {
    Plain,
    Lazy,
    Zlib,
    Zstd,
    ExtendedL2,
    Snapshots,
    Bitmaps,
    Backing,
    RawBacking,
    DataFile,
    RawDataFile,
    Preallocated,
    Empty,
}

const FEATURES: [Feature; 13] = [
    Feature::Plain,
    Feature::Lazy,
    Feature::Zlib,
    Feature::Zstd,
    Feature::ExtendedL2,
    Feature::Snapshots,
    Feature::Bitmaps,
    Feature::Backing,
    Feature::RawBacking,
    Feature::DataFile,
    Feature::RawDataFile,
    Feature::Preallocated,
    Feature::Empty,
];

/// One image of the matrix.
#[derive(Clone, Copy, Debug)]
struct Shape {
    version: u32,
    cluster_bits: u32,
    refcount_bits: u32,
    feature: Feature,
}

impl Shape {
    /// Whether the format and QEMU have such an image.
    fn exists(self) -> bool {
        match self.feature {
            Feature::Lazy | Feature::Zstd | Feature::Bitmaps => self.version == 3,
            Feature::DataFile | Feature::RawDataFile => self.version == 3,
            Feature::ExtendedL2 => self.version == 3 && self.cluster_bits >= 14,
            Feature::Snapshots => self.refcount_bits > 1,
            _ => true,
        }
    }

    fn options(self, place: &Place) -> Vec<(&'static str, String)> {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut options = vec![
            ("compat", compat.to_owned()),
            ("cluster_size", (1_u64 << self.cluster_bits).to_string()),
            ("refcount_bits", self.refcount_bits.to_string()),
        ];
        // QEMU looks for a relative name where it runs, not where the image is.
        let outside = place.path("outside").display().to_string();
        let mut add = |key, value: &str| options.push((key, value.to_owned()));
        match self.feature {
            Feature::Lazy => add("lazy_refcounts", "on"),
            Feature::Zstd => add("compression_type", "zstd"),
            Feature::ExtendedL2 => add("extended_l2", "on"),
            Feature::DataFile => add("data_file", &outside),
            Feature::RawDataFile => {
                add("data_file", &outside);
                add("data_file_raw", "on");
            }
            Feature::Preallocated => add("preallocation", "metadata"),
            Feature::Backing => {
                add("backing_file", "below");
                add("backing_fmt", "qcow2");
            }
            Feature::RawBacking => {
                add("backing_file", "raw");
                add("backing_fmt", "raw");
            }
            _ => {}
        }
        options
    }

    /// Makes the image called `disk` with qemu-img and qemu-io.
    fn build(self, place: &Place) {
        for name in ["disk", "outside"] {
            let _ = std::fs::remove_file(place.path(name));
        }
        let options: Vec<String> = self
            .options(place)
            .into_iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let size = SIZE.to_string();
        let line = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options.join(","),
            "disk",
            &size,
        ];
        assert_eq!(place.qemu_img(&line).0, 0, "{self:?}");
        match self.feature {
            Feature::Empty => return,
            Feature::Bitmaps => {
                qemu_img::bitmap_add(&place.path("disk"), "one", None);
                qemu_img::bitmap_add(&place.path("disk"), "two", Some(32_768));
                qemu_img::bitmap_disable(&place.path("disk"), "two");
            }
            _ => {}
        }
        place.write("disk", &["write 0 300k", "write 1000000 5000"]);
        match self.feature {
            Feature::Zlib | Feature::Zstd => {
                let cluster = 1_u64 << self.cluster_bits;
                let at = (2 * MIB).next_multiple_of(cluster);
                place.write("disk", &[&format!("write -c -P 3 {at} {cluster}")]);
            }
            Feature::Snapshots => {
                assert_eq!(place.qemu_img(&["snapshot", "-c", "first", "disk"]).0, 0);
                place.write("disk", &["write 100k 64k", "write 4M 64k"]);
                assert_eq!(place.qemu_img(&["snapshot", "-c", "second", "disk"]).0, 0);
            }
            _ => {}
        }
        if self.version == 3 {
            place.write("disk", &["write -z 3M 128k", "discard 64k 64k"]);
        }
        place.write("disk", &["write 5000000 3000"]);
    }
}

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for (version, cluster_bits, refcount_bits) in [
        (2, 9, 16),
        (2, 16, 16),
        (2, 21, 16),
        (3, 9, 1),
        (3, 12, 64),
        (3, 14, 8),
        (3, 16, 1),
        (3, 16, 16),
        (3, 16, 64),
        (3, 21, 2),
    ] {
        shapes.extend(FEATURES.map(|feature| Shape {
            version,
            cluster_bits,
            refcount_bits,
            feature,
        }));
    }
    shapes.retain(|shape| shape.exists());
    shapes
}

fn compare(place: &Place, shape: Shape) {
    let what = format!("{shape:?}");
    let theirs = |args: &[&str]| place.qemu_img(args);

    let (code, info) = theirs(&["info", "-f", "qcow2", "--output=json", "disk"]);
    assert_eq!(code, 0, "{what}");
    let ours = place.json("info disk");
    assert_same(&format!("info {what}"), &without(ours, "tidemark"), &info);

    let (code, map) = theirs(&["map", "-f", "qcow2", "--output=json", "disk"]);
    assert_eq!(code, 0, "{what}");
    let ours = place.json("map disk");
    assert_same(&format!("map {what}"), &ours, &comparable_map(&map));

    // Where QEMU suspects preallocation, it looks for holes.
    let holes = has_holes(&map);
    assert!(holes || shape.feature != Feature::Preallocated, "{what}");
    compare_measures(place, shape, holes);

    let (code, check) = theirs(&["check", "-f", "qcow2", "--output=json", "disk"]);
    let ours = place.run("check disk --output json");
    assert_eq!(ours.code, code, "check {what}: {ours:?}");
    assert_same(
        &format!("check {what}"),
        &without(ours.json(), "tidemark"),
        &check,
    );
}

/// Whether a map of qemu-img shows allocated clusters in holes of the file.
fn has_holes(map: &Value) -> bool {
    let entries = map.as_array().unwrap();
    entries
        .iter()
        .any(|entry| entry["data"] == true && entry["zero"] == true)
}

fn compare_measures(place: &Place, shape: Shape, holes: bool) {
    for target in ["qcow2", "raw"] {
        let what = format!("measure -O {target} {shape:?}");
        let words = [
            "measure",
            "-f",
            "qcow2",
            "-O",
            target,
            "--output=json",
            "disk",
        ];
        let (code, theirs) = place.qemu_img(&words);
        assert_eq!(code, 0, "{what}");
        let mut ours = place.json(&format!("measure -O {target} disk"));
        if holes {
            let bytes = |answer: &Value| answer["required"].as_u64().unwrap();
            assert!(bytes(&ours) >= bytes(&theirs), "{what}");
            ours["required"] = theirs["required"].clone();
        }
        assert_same(&what, &ours, &theirs);
    }
}

#[test]
fn every_image_of_the_matrix_is_described_as_qemu_img_does() {
    require_qemu!();
    let place = Place::new();
    place.create("below", 4 * MIB, &[]);
    place.write("below", &["write 128k 2M"]);
    let raw = std::fs::File::create(place.path("raw")).unwrap();
    raw.set_len(2 * MIB).unwrap();
    raw.write_all_at(&[7; 300_000], 700_000).unwrap();
    let shapes = shapes();
    for &shape in &shapes {
        shape.build(&place);
        compare(&place, shape);
    }
    println!("{} images, 5 answers each", shapes.len());
    assert!(shapes.len() >= 100, "the matrix shrank: {}", shapes.len());
}
