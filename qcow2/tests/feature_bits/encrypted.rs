//! Encrypted images of QEMU's making: their metadata is ours to read and change, their data is not.

use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;
use tidemark_fixtures::corrupt::{get_u64, set_u16};
use tidemark_fixtures::oracle::{process, qemu_img, qemu_io};
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{
    BackingReference, CreateOptions, Error, Extent, Feature, FileStorage, Image, Sharing,
};

use crate::common::{
    add_bitmap, alone, create_file, open_bytes, open_file, reading, try_open_file, writing,
};

const SIZE: u64 = 4 << 20;
const SECRET: [&str; 2] = ["--object", "secret,id=s,data=password"];

pub(crate) struct Desk {
    _folder: TempDir,
    pub(crate) path: PathBuf,
    pub(crate) method: u32,
}

impl Desk {
    /// An encrypted image with data, zeros, and a bitmap that recorded them.
    pub(crate) fn new(format: &str, cluster_size: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret.qcow2");
        let time = if format == "luks" {
            ",encrypt.iter-time=10"
        } else {
            ""
        };
        let options = format!(
            "encrypt.format={format},encrypt.key-secret=s{time},cluster_size={cluster_size}"
        );
        let name = path.display().to_string();
        let create = ["create", "-q", "-f", "qcow2", "-o", &options, &name, "4M"];
        qemu_img::ok(&[&create[..1], &SECRET, &create[1..]].concat());
        let desk = Self {
            _folder: folder,
            path,
            method: if format == "luks" { 2 } else { 1 },
        };
        desk.qemu_img(&["bitmap", "--add"], &["old"]);
        desk.guest(&[
            "write -P 7 0 200k",
            "write -z 1M 128k",
            "write -P 8 3M 5000",
        ]);
        desk
    }

    /// How QEMU opens it.
    fn options(&self) -> String {
        format!(
            "driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename={}",
            self.path.display()
        )
    }

    pub(crate) fn qemu_img(&self, command: &[&str], rest: &[&str]) -> String {
        let options = self.options();
        let image = ["--image-opts", options.as_str()];
        qemu_img::ok(&[command, &SECRET, &image, rest].concat())
    }

    pub(crate) fn guest(&self, commands: &[&str]) {
        let options = [&SECRET[..], &["--image-opts"]].concat();
        let output = qemu_io::run(&options, commands, &self.options());
        let said = format!("{}{}", output.text(), output.stderr);
        assert!(output.success() && !said.contains("failed"), "{said}");
    }

    fn json(&self, command: &[&str]) -> Value {
        let command = [command, &["--output=json"]].concat();
        serde_json::from_str(&self.qemu_img(&command, &[])).unwrap()
    }

    /// What a guest with the key sees.
    pub(crate) fn content(&self) -> Vec<u8> {
        let raw = self.path.with_extension("raw");
        let raw_name = raw.display().to_string();
        self.qemu_img(&["convert", "-O", "raw"], &[&raw_name]);
        std::fs::read(raw).unwrap()
    }

    /// Our check counts what QEMU's counts, and both are clean.
    pub(crate) fn assert_checks(&self) {
        let theirs = self.json(&["check"]);
        let ours = open_file(&self.path, reading()).check().unwrap();
        let counted = |key: &str| theirs.get(key).and_then(Value::as_u64).unwrap_or(0);
        assert_eq!(
            [
                ours.corruptions,
                ours.leaks,
                ours.check_errors,
                ours.allocated_clusters,
                ours.fragmented_clusters,
                ours.image_end_offset,
            ],
            [
                counted("corruptions"),
                counted("leaks"),
                counted("check-errors"),
                counted("allocated-clusters"),
                counted("fragmented-clusters"),
                counted("image-end-offset"),
            ],
            "{theirs} {:?}",
            ours.findings
        );
        assert!(ours.is_clean());
    }
}

pub(crate) fn is_refusal(error: &Error, method: u32) -> bool {
    matches!(error.feature(), Some(Feature::Encryption(found)) if *found == method)
}

fn as_json(extent: &Extent) -> Value {
    let mut entry = serde_json::json!({
        "start": extent.start,
        "length": extent.length,
        "depth": extent.depth,
        "present": extent.present,
        "zero": extent.zero,
        "data": extent.data,
        "compressed": extent.compressed,
    });
    if let Some(offset) = extent.offset {
        entry["offset"] = offset.into();
    }
    entry
}

pub(crate) const KINDS: &[(&str, &str)] = &[
    ("luks", "4k"),
    ("luks", "64k"),
    ("luks", "2M"),
    ("aes", "512"),
    ("aes", "64k"),
];

#[test]
fn metadata_agrees_with_qemu_and_bitmaps_can_be_changed() {
    require_qemu!();
    let _turn = alone();
    for (format, cluster_size) in KINDS {
        let desk = Desk::new(format, cluster_size);
        let content = desk.content();
        desk.assert_checks();
        let image = open_file(&desk.path, reading());
        assert_eq!(image.header().encryption, desk.method);
        let extents = image.map(0, SIZE).unwrap();
        let ours: Vec<Value> = extents.iter().map(as_json).collect();
        assert_eq!(Value::Array(ours), desk.json(&["map"]));
        let recorded = image.load_bitmap("old").unwrap();
        assert!(recorded.test(0) && recorded.test(3 << 20) && !recorded.test(2 << 20));
        drop(image);

        let storage = FileStorage::open(&desk.path, true, Sharing::Exclusive).unwrap();
        let image = Image::open_unbacked(Box::new(storage), true).unwrap();
        add_bitmap(&image, "new", 4096);
        image
            .update(|update| {
                let bits = update.load("old")?;
                update.put("merged", bits, false)?;
                update.remove("old")
            })
            .unwrap();
        image.close().unwrap();
        desk.assert_checks();
        assert!(desk.content() == content, "{format}: the data is another");
        desk.guest(&["write -P 9 2M 4k"]);
        let image = open_file(&desk.path, reading());
        let recorded = image.load_bitmap("new").unwrap();
        assert!(recorded.test(2 << 20) && !recorded.test(0));
        let merged = image.load_bitmap("merged").unwrap();
        assert!(merged.test(0) && !merged.test(2 << 20));
        drop(image);
        desk.assert_checks();
    }
    println!("{} encrypted images", KINDS.len());
}

#[test]
fn guest_data_is_refused_by_name_and_nothing_changes() {
    require_qemu!();
    let _turn = alone();
    let mut refused = 0;
    for (format, cluster_size) in KINDS {
        let desk = Desk::new(format, cluster_size);
        let bytes = std::fs::read(&desk.path).unwrap();
        let image = open_file(&desk.path, writing());
        let cluster = image.geometry().cluster_len();
        let mut buffer = vec![0x5a; 4096];
        // Data, zeros, and nothing at all: no answer is an answer.
        for offset in [0, 1 << 20, 2 << 20] {
            let read = image.read(&mut buffer, offset).unwrap_err();
            assert!(is_refusal(&read, desk.method), "{read}");
            assert!(buffer.iter().all(|&byte| byte == 0x5a), "a byte came out");
            for error in [
                image.write(&[1; 4096], offset).unwrap_err(),
                image.write_zeroes(offset, 65_536).unwrap_err(),
                image.discard(offset, 65_536).unwrap_err(),
                image.write_compressed(&vec![1; cluster], 0).unwrap_err(),
                image.require_guest_data().unwrap_err(),
            ] {
                assert!(is_refusal(&error, desk.method), "{error}");
                refused += 1;
            }
        }
        image.close().unwrap();
        assert!(std::fs::read(&desk.path).unwrap() == bytes);

        let overlay = desk.path.with_extension("overlay");
        let options = CreateOptions {
            backing: Some(BackingReference {
                name: b"secret.qcow2".to_vec(),
                format: "qcow2".to_owned(),
            }),
            ..CreateOptions::new(SIZE)
        };
        let image = create_file(&overlay, &options);
        assert!(is_refusal(
            &image.require_guest_data().unwrap_err(),
            desk.method
        ));
        assert!(is_refusal(
            &image.read(&mut buffer, 0).unwrap_err(),
            desk.method
        ));
        // A part of a cluster would have to be filled up with what is below.
        let part = image.write(&[1; 100], 0).unwrap_err();
        assert!(is_refusal(&part, desk.method), "{part}");
        refused += 3;
    }
    println!("{refused} refusals");
    assert!(refused >= 80);
}

#[test]
fn the_encryption_header_is_never_given_away() {
    require_qemu!();
    let _turn = alone();
    let desk = Desk::new("luks", "64k");
    let mut bytes = std::fs::read(&desk.path).unwrap();
    let at = bytes
        .windows(8)
        .position(|window| window == [0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16])
        .unwrap();
    let place = get_u64(&bytes, u64::try_from(at).unwrap() + 8);
    assert_eq!(place % 65_536, 0);
    let block = get_u64(&bytes, get_u64(&bytes, 48));
    set_u16(&mut bytes, block + place / 65_536 * 2, 0);
    std::fs::write(&desk.path, &bytes).unwrap();
    let report = open_file(&desk.path, reading()).check().unwrap();
    let theirs = process::run(
        "qemu-img",
        &[
            &["check"][..],
            &SECRET,
            &["--image-opts", &desk.options(), "--output=json"],
        ]
        .concat(),
    );
    assert_eq!(theirs.json()["corruptions"], report.corruptions);
    assert_eq!(report.corruptions, 1, "{:?}", report.findings);
    let image = try_open_file(&desk.path, writing()).unwrap();
    let added = image.update(|update| {
        let bits = update.blank(crate::common::granularity(65_536))?;
        update.put("b", bits, true)
    });
    let error: Error = added.unwrap_err();
    assert!(error.damage().is_some(), "{error}");
    drop(image);
    assert!(std::fs::read(&desk.path).unwrap() == bytes);
    // A pointer that leads out of the file.
    let mut lost = bytes.clone();
    lost.truncate(usize::try_from(place).unwrap());
    let error = open_bytes(lost, writing()).unwrap_err();
    assert!(error.damage().is_some(), "{error}");
}
