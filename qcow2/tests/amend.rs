//! Amend: other refcount widths, versions and switches, beside QEMU, through crashes and failures.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::path::Path;

use tidemark_fixtures::oracle::{self, qemu_img, qemu_io};
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::{CallKind, CrashOptions, CrashStorage, Fault, FaultyStorage};
use tidemark_qcow2::check::{Amend, amend};
use tidemark_qcow2::{
    CreateOptions, Damage, Error, Feature, FileStorage, Image, MemoryStorage, Mistake, Sharing,
};

use common::{add_bitmap, alone, built, open_bytes, open_file, read_all, reading, writing};

const SIZE: u64 = (6 << 20) + 512;

fn width(bits: u32) -> Amend {
    Amend {
        refcount_bits: Some(bits),
        ..Amend::default()
    }
}

fn amend_file(path: &Path, change: &Amend) -> tidemark_qcow2::Result<bool> {
    let storage = FileStorage::open(path, true, Sharing::Exclusive).unwrap();
    amend(Box::new(storage), change)
}

/// An image with data, zeros, compressed clusters, bitmaps and, where they can be counted,
/// snapshots; made by QEMU.
fn made_by_qemu(path: &Path, cluster: &str, bits: u32) {
    let bits_text = bits.to_string();
    let options = [("cluster_size", cluster), ("refcount_bits", &bits_text)];
    qemu_img::create(path, SIZE, &options);
    qemu_img::bitmap_add(path, "records", None);
    qemu_img::bitmap_add(path, "rests", Some(32_768));
    qemu_img::bitmap_disable(path, "rests");
    // Two in one host cluster, where its refcount can say so.
    let compressed = format!("write -c -P 3 4M {cluster}");
    let lines = [
        "write -P 1 0 700k",
        "write -P 2 3000000 5000",
        &compressed,
        &compressed.replace("4M", "5M"),
        "write -z 1M 128k",
        "discard 64k 64k",
    ];
    // The disk ends inside the second one of 2 MiB.
    let lines = lines.iter().filter(|line| !line.ends_with("5M 2M"));
    qemu_io::commands(path, &lines.copied().collect::<Vec<_>>());
    if bits > 1 {
        qemu_img::ok(&["snapshot", "-c", "then", path.to_str().unwrap()]);
        qemu_io::commands(path, &["write -P 5 100k 64k"]);
    }
}

/// Both bitmaps, as they are.
fn bitmaps(path: &Path) -> Vec<(String, bool, tidemark_qcow2::Bitmap)> {
    let image = open_file(path, reading());
    let infos = image.bitmaps().unwrap();
    infos
        .into_iter()
        .map(|info| {
            let bits = image.load_bitmap(&info.name).unwrap();
            (info.name, info.auto, bits)
        })
        .collect()
}

/// Whether QEMU can.
fn amended_by_qemu(path: &Path, bits: u32) -> bool {
    let option = format!("refcount_bits={bits}");
    let name = path.to_str().unwrap();
    qemu_img::run(&["amend", "-f", "qcow2", "-o", &option, name]).status == Some(0)
}

#[test]
fn every_width_becomes_every_other_as_in_qemu() {
    require_qemu!();
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let [path, theirs] = ["ours", "theirs"].map(|name| folder.path().join(name));
    let (mut changed, mut refused) = (0, 0);
    for cluster in ["512", "4k", "64k", "2M"] {
        for from in [1, 8, 16, 64] {
            made_by_qemu(&path, cluster, from);
            let (content, bits) = (qemu_img::convert_to_raw(&path), bitmaps(&path));
            let start = std::fs::read(&path).unwrap();
            for to in [1, 2, 8, 16, 64] {
                let what = format!("clusters of {cluster}, {from} to {to} bits");
                std::fs::write(&path, &start).unwrap();
                std::fs::write(&theirs, &start).unwrap();
                // QEMU takes minutes where one refcount block counts very many clusters.
                let beside = ["512", "4k"].contains(&cluster);
                let qemu = beside.then(|| amended_by_qemu(&theirs, to));
                match amend_file(&path, &width(to)) {
                    Ok(did) => {
                        assert_ne!(qemu, Some(false), "{what}: only ours can");
                        assert_eq!(did, from != to, "{what}");
                        changed += usize::from(did);
                    }
                    Err(error) => {
                        let limit = matches!(
                            error,
                            Error::Unsupported {
                                feature: Feature::Limit { .. },
                                ..
                            }
                        );
                        assert!(limit && qemu != Some(true), "{what}: {error}");
                        assert!(
                            std::fs::read(&path).unwrap() == start,
                            "{what}: refused and written"
                        );
                        refused += 1;
                        continue;
                    }
                }
                qemu_img::check(&path).assert_clean();
                let told = |path: &Path| qemu_img::info(path)["format-specific"]["data"].clone();
                assert_eq!(told(&path)["refcount-bits"], to, "{what}");
                if beside {
                    assert_eq!(told(&path), told(&theirs), "{what}");
                }
                assert!(qemu_img::convert_to_raw(&path) == content, "{what}");
                assert!(bitmaps(&path) == bits, "{what}: bitmaps");
                let image = open_file(&path, writing());
                image.write(&[9; 300_000], 2_000_000).unwrap();
                image.close().unwrap();
                qemu_img::check(&path).assert_clean();
            }
        }
    }
    println!("{changed} widths changed, {refused} refused by both");
    assert!(changed >= 40 && refused >= 10, "{changed}, {refused}");
}

#[test]
fn version_2_becomes_version_3() {
    require_qemu!();
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old");
    let mut images = 0;
    for cluster in ["512", "4k", "64k", "2M"] {
        for bits in [None, Some(16), Some(32)] {
            qemu_img::create(
                &path,
                SIZE,
                &[("compat", "0.10"), ("cluster_size", cluster)],
            );
            qemu_io::commands(&path, &["write -P 1 0 700k", "write -c -P 3 4M 2M"]);
            qemu_img::ok(&["snapshot", "-c", "then", path.to_str().unwrap()]);
            qemu_io::commands(&path, &["write -P 2 300k 100k"]);
            let content = qemu_img::convert_to_raw(&path);
            let change = Amend {
                version: Some(3),
                refcount_bits: bits,
                lazy_refcounts: Some(true),
                ..Amend::default()
            };
            assert!(amend_file(&path, &change).unwrap());
            assert!(!amend_file(&path, &change).unwrap(), "done once, done");
            qemu_img::check(&path).assert_clean();
            assert!(qemu_img::convert_to_raw(&path) == content);
            let data = &qemu_img::info(&path)["format-specific"]["data"];
            assert_eq!(data["compat"], "1.1");
            assert_eq!(data["lazy-refcounts"], true);
            assert_eq!(data["refcount-bits"], bits.unwrap_or(16));
            // What only version 3 can hold.
            qemu_img::bitmap_add(&path, "new", None);
            let image = open_file(&path, writing());
            image.write_zeroes(1 << 20, 2 << 20).unwrap();
            image.close().unwrap();
            qemu_img::check(&path).assert_clean();
            images += 1;
        }
    }
    println!("{images} images");
}

#[test]
fn a_raw_data_file_may_become_an_ordinary_one() {
    require_qemu!();
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let [path, data] = ["disk", "data"].map(|name| folder.path().join(name));
    let options = [
        ("data_file", data.to_str().unwrap()),
        ("data_file_raw", "on"),
    ];
    qemu_img::create(&path, SIZE, &options);
    qemu_io::commands(&path, &["write -P 1 0 700k"]);
    let content = qemu_img::convert_to_raw(&path);
    let raw = |raw| Amend {
        data_file_raw: Some(raw),
        ..width(8)
    };
    assert!(amend_file(&path, &raw(false)).unwrap());
    assert!(matches!(
        amend_file(&path, &raw(true)),
        Err(Error::Invalid {
            mistake: Mistake::Option {
                option: "data_file_raw",
                ..
            },
            ..
        })
    ));
    let told = &qemu_img::info(&path)["format-specific"]["data"];
    assert_eq!(
        (&told["data-file-raw"], &told["refcount-bits"]),
        (&false.into(), &8.into())
    );
    assert!(qemu_img::convert_to_raw(&path) == content);
    qemu_img::check(&path).assert_clean();
}

/// An image of ours with two bitmaps, one of them recording.
fn start(cluster_bits: u32, version: u32) -> Vec<u8> {
    let options = CreateOptions {
        cluster_bits,
        version,
        ..CreateOptions::new(1 << 20)
    };
    built(&options, |image| {
        image.write(&vec![0xaa; 150_000], 10_000).unwrap();
        if version > 2 {
            add_bitmap(image, "records", 4096);
            add_bitmap(image, "rests", 65_536);
            image
                .update(|update| update.set_recording("rests", false))
                .unwrap();
        }
        image.write(&[0xbb; 60_000], 900_000).unwrap();
    })
}

/// What is asked of an image of either version.
fn change(version: u32, bits: u32) -> Amend {
    Amend {
        version: Some(3),
        lazy_refcounts: Some(version == 2),
        ..width(bits)
    }
}

/// Disk and bitmaps of an image that must be sound.
fn state(bytes: Vec<u8>, what: &str) -> (Vec<u8>, Vec<tidemark_qcow2::Bitmap>) {
    let image = open_bytes(bytes, reading()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let report = image.check().unwrap();
    let harm = (report.check_errors, report.corruptions);
    assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
    let infos = image.bitmaps().unwrap();
    let load = |name: &str| image.load_bitmap(name).unwrap();
    (
        read_all(&image),
        infos.iter().map(|info| load(&info.name)).collect(),
    )
}

const CASES: [(u32, u32, u32); 6] = [
    (9, 3, 64),
    (12, 3, 1),
    (16, 3, 8),
    (9, 2, 16),
    (12, 2, 32),
    (16, 2, 64),
];

#[test]
fn a_crash_anywhere_leaves_the_old_image_or_the_new_one() {
    let _alone = alone();
    let (mut points, mut images) = (0, 0);
    for (cluster_bits, version, bits) in CASES {
        let bytes = start(cluster_bits, version);
        let before = state(bytes.clone(), "the start");
        let storage = CrashStorage::new(bytes);
        assert!(amend(Box::new(storage.clone()), &change(version, bits)).unwrap());
        let log = storage.log();
        points += log.points();
        for crash in log.images(CrashOptions::default()) {
            let what = format!("2^{cluster_bits}, {bits} bits: {}", crash.description);
            assert!(state(crash.bytes.clone(), &what) == before, "{what}");
            if oracle::available() && images % 7 == 0 {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("crash");
                std::fs::write(&path, &crash.bytes).unwrap();
                qemu_img::check(&path).assert_at_worst_leaks();
                assert!(qemu_img::convert_to_raw(&path) == before.0, "{what}: QEMU");
            }
            let again = MemoryStorage::from_bytes(crash.bytes);
            amend(Box::new(again), &change(version, bits))
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            images += 1;
        }
    }
    println!("{points} crash points, {images} images");
    assert!(
        points >= 30 && images >= 60,
        "the sweep shrank: {points} {images}"
    );
}

#[test]
fn a_call_that_fails_leaves_the_old_image_or_the_new_one() {
    let mut runs = 0;
    for (cluster_bits, version, bits) in CASES {
        let bytes = start(cluster_bits, version);
        let before = state(bytes.clone(), "the start");
        let clean = FaultyStorage::new(CrashStorage::new(bytes.clone()));
        amend(Box::new(clean.clone()), &change(version, bits)).unwrap();
        for kinds in [CallKind::CHANGES, &[CallKind::Read], &[CallKind::Len]] {
            for at in 0..clean.calls_of(kinds) {
                let kept = CrashStorage::new(bytes.clone());
                let storage = FaultyStorage::new(kept.clone());
                storage.arm(Fault::once(kinds, at));
                let asked = amend(Box::new(storage), &change(version, bits));
                let what = format!("2^{cluster_bits}, {kinds:?} {at}: {asked:?}");
                assert!(state(kept.to_bytes(), &what) == before, "{what}");
                runs += 1;
            }
        }
    }
    println!("{runs} calls failed");
    assert!(runs >= 100, "{runs}");
}

/// The refusal of a change, before anything was written.
fn refusal(bytes: &[u8], change: &Amend) -> Error {
    let storage = CrashStorage::new(bytes.to_vec());
    let error = amend(Box::new(storage.clone()), change).unwrap_err();
    assert!(storage.to_bytes() == bytes, "{error}: written");
    error
}

#[test]
fn what_cannot_be_is_refused_before_the_first_write() {
    let option = |error: &Error| match error {
        Error::Invalid {
            mistake: Mistake::Option { option, .. },
            ..
        } => *option,
        other => panic!("{other}"),
    };
    let (old, new) = (start(12, 2), start(12, 3));
    let version = |version| Amend {
        version: Some(version),
        ..Amend::default()
    };
    let lazy = Amend {
        lazy_refcounts: Some(true),
        ..Amend::default()
    };
    assert_eq!(option(&refusal(&new, &version(2))), "compat");
    assert_eq!(option(&refusal(&new, &version(4))), "compat");
    assert_eq!(option(&refusal(&old, &lazy)), "lazy_refcounts");
    assert_eq!(option(&refusal(&old, &width(8))), "refcount_bits");
    for bits in [0, 3, 128] {
        assert_eq!(option(&refusal(&new, &width(bits))), "refcount_bits");
    }
}

#[test]
fn an_image_that_is_not_sound_or_cannot_be_written_is_refused() {
    let new = start(12, 3);
    // Byte 79 of the header holds the dirty bit and the corrupt bit.
    for (mark, bits) in [("dirty", 1), ("corrupt", 2)] {
        let mut marked = new.clone();
        marked[79] |= bits;
        match refusal(&marked, &width(8)) {
            Error::Unsupported {
                feature: Feature::Dirty,
                ..
            } => assert_eq!(mark, "dirty"),
            Error::Corrupt {
                damage: Damage::MarkedCorrupt,
                ..
            } => assert_eq!(mark, "corrupt"),
            other => panic!("{mark}: {other}"),
        }
    }
    // A refcount that is too low.
    let mut damaged = new.clone();
    let table = u64::from_be_bytes(damaged[48..56].try_into().unwrap());
    let at = usize::try_from(table).unwrap();
    let block = u64::from_be_bytes(damaged[at..at + 8].try_into().unwrap());
    let count = usize::try_from(block).unwrap() + 2 * 10;
    damaged[count..count + 2].fill(0);
    let damage = refusal(&damaged, &width(8));
    assert!(
        matches!(
            damage,
            Error::Invalid {
                mistake: Mistake::Damaged,
                ..
            }
        ),
        "{damage}"
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, &new).unwrap();
    let _alone = alone();
    let read_only = FileStorage::open(&path, false, Sharing::Exclusive).unwrap();
    let error = amend(Box::new(read_only), &width(8)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Invalid {
                mistake: Mistake::ReadOnly,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn an_image_is_used_as_before_once_it_is_amended() {
    let _alone = alone();
    for (cluster_bits, version, bits) in CASES {
        let storage = CrashStorage::new(start(cluster_bits, version));
        amend(Box::new(storage.clone()), &change(version, bits)).unwrap();
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        image.write(&[7; 200_000], 300_000).unwrap();
        image.discard(0, 64 << 10).unwrap();
        image.flush().unwrap();
        image.close().unwrap();
        state(storage.to_bytes(), "after use");
    }
}
