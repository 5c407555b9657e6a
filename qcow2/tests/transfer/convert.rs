//! What is converted holds the same bytes, in no more room than QEMU needs.

use std::path::Path;

use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::{random::Random, require_qemu};
use tidemark_qcow2::chain::Reading;
use tidemark_qcow2::transfer::{ConvertOptions, Converted, Target, convert};
use tidemark_qcow2::{BackingReference, CreateOptions, FileStorage, Image, Mistake, Storage};

use crate::common::{self, alone, open_file};
use crate::scene::{Scene, allocated, random_commands, silent, source, target};

fn fresh() -> ConvertOptions {
    ConvertOptions {
        target_is_zero: true,
        threads: 3,
        ..ConvertOptions::default()
    }
}

fn new_image(path: &Path, options: &CreateOptions) -> Target {
    Target::image(common::create_file(path, options))
}

fn new_raw(path: &Path, size: u64) -> Target {
    let storage = FileStorage::create(path).unwrap();
    storage.set_len(size).unwrap();
    Target::raw(Box::new(storage)).unwrap()
}

fn run(from: (&Path, &str), to: Target, options: &ConvertOptions) -> Converted {
    convert(&source(from.0, from.1), to, options, &silent).unwrap()
}

fn assert_same(left: (&Path, &str), right: (&Path, &str), what: &str) {
    assert!(qemu_img::compare(left, right), "{what}: contents differ");
}

#[test]
fn a_converted_disk_holds_the_same_bytes_in_as_little_room_as_qemu_needs() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for seed in 0..14 {
        let scene = Scene::new(seed, 1 + usize::try_from(seed % 4).unwrap());
        let top = scene.top();
        let from = (top.path.as_path(), top.format);
        let size = source(from.0, from.1).size();
        let raw = scene.path("ours.raw");
        run(from, new_raw(&raw, size), &fresh());
        assert_same(from, (&raw, "raw"), &scene.name);
        let theirs = scene.path("theirs.raw");
        qemu_img::convert(from.0, from.1, &theirs, "raw", &[]);
        let (ours, qemu) = (allocated(&raw), allocated(&theirs));
        assert!(
            ours <= qemu + 4096,
            "{}: {ours} bytes, QEMU {qemu}",
            scene.name
        );
        let bits = [9, 12, 16, 21][usize::try_from(seed % 4).unwrap()];
        let options = CreateOptions {
            cluster_bits: bits,
            version: if seed % 5 == 0 { 2 } else { 3 },
            ..CreateOptions::new(size)
        };
        let qcow2 = scene.path("ours.qcow2");
        run(from, new_image(&qcow2, &options), &fresh());
        qemu_img::check(&qcow2).assert_clean();
        assert_same(from, (&qcow2, "qcow2"), &scene.name);
        let theirs = scene.path("theirs.qcow2");
        let cluster = format!("cluster_size={}", 1_u64 << bits);
        qemu_img::convert(from.0, from.1, &theirs, "qcow2", &["-o", &cluster]);
        let data = |path| qemu_img::check(path).count("allocated-clusters");
        let (ours, qemu) = (data(&qcow2), data(&theirs));
        assert!(ours <= qemu, "{}: {ours} clusters, QEMU {qemu}", scene.name);
        cases += 2;
    }
    println!("{cases} conversions");
    assert!(cases >= 28);
}

#[test]
fn a_copy_over_a_backing_file_holds_only_what_the_source_holds() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for seed in 100..108 {
        let scene = Scene::new(seed, 2 + usize::try_from(seed % 3).unwrap());
        let top = scene.top();
        let from = (top.path.as_path(), top.format);
        // The new backing file holds what the chain below the source shows.
        let below = &scene.layers[scene.layers.len() - 2];
        let flat = scene.path("flat.qcow2");
        qemu_img::convert(&below.path, below.format, &flat, "qcow2", &[]);
        let size = source(from.0, from.1).size();
        let options = CreateOptions {
            cluster_bits: [9, 12, 16][usize::try_from(seed % 3).unwrap()],
            backing: Some(BackingReference {
                name: b"flat.qcow2".to_vec(),
                format: "qcow2".to_owned(),
            }),
            ..CreateOptions::new(size)
        };
        let copy = scene.path("copy.qcow2");
        let over = ConvertOptions {
            over_backing: true,
            target_is_zero: false,
            ..fresh()
        };
        let converted = run(from, new_image(&copy, &options), &over);
        assert!(converted.data_bytes < size, "{}: all copied", scene.name);
        qemu_img::check(&copy).assert_clean();
        assert_same(from, (&copy, "qcow2"), &scene.name);
        cases += 1;
    }
    println!("{cases} conversions");
    assert!(cases >= 8);
}

#[test]
fn a_copy_into_an_existing_target_replaces_whatever_it_held() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for seed in 200..208 {
        let scene = Scene::new(seed, 2);
        let top = scene.top();
        let from = (top.path.as_path(), top.format);
        let size = source(from.0, from.1).size();
        let format = if seed % 2 == 0 { "qcow2" } else { "raw" };
        let path = scene.path("target");
        if format == "raw" {
            std::fs::write(&path, vec![0x77; usize::try_from(size).unwrap()]).unwrap();
        } else {
            qemu_img::create(&path, size, &[("cluster_size", "4096")]);
            let commands = random_commands(&mut Random::new(seed), size);
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            qemu_io::commands(&path, &commands);
            qemu_img::bitmap_add(&path, "b", None);
        }
        let before = match format {
            "raw" => Vec::new(),
            _ => qemu_img::convert_to_raw(&path),
        };
        let options = ConvertOptions {
            target_is_zero: false,
            ..fresh()
        };
        run(from, target(&path, format), &options);
        assert_same(from, (&path, format), &scene.name);
        if format == "qcow2" {
            qemu_img::check(&path).assert_clean();
            let after = qemu_img::convert_to_raw(&path);
            let image = open_file(&path, common::reading());
            let bits = image.load_bitmap("b").unwrap();
            common::assert_covers(&bits, &before, &after, &scene.name);
        }
        cases += 1;
    }
    println!("{cases} conversions");
    assert!(cases >= 8);
}

#[test]
fn a_full_copy_has_no_holes_and_a_wide_sparse_size_keeps_short_zeros() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let from = folder.path().join("from");
    let mut bytes = vec![0; 4 << 20];
    bytes[1 << 20..2 << 20].fill(5);
    bytes[(1 << 20) + 8192..(1 << 20) + 16_384].fill(0);
    std::fs::write(&from, &bytes).unwrap();
    let mut sizes = Vec::new();
    for sparse in [0, 4096, 65536] {
        let options = ConvertOptions { sparse, ..fresh() };
        let to = folder.path().join("to");
        let converted = run((&from, "raw"), new_raw(&to, 4 << 20), &options);
        assert_eq!(std::fs::read(&to).unwrap(), bytes);
        assert_eq!(converted.zero_bytes, 0);
        sizes.push(converted.data_bytes);
    }
    assert_eq!(sizes, [4 << 20, (1 << 20) - 8192, 1 << 20]);
}

#[test]
fn bitmaps_are_copied_bit_for_bit_across_cluster_sizes() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for (from_bits, to_bits) in [(16, 16), (16, 21), (16, 9), (9, 16), (12, 21)] {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let size = 5_000_192;
        qemu_img::create(
            &from,
            size,
            &[("cluster_size", &(1 << from_bits).to_string())],
        );
        for (name, granularity) in [("fine", 512), ("coarse", 65536), ("frozen", 4096)] {
            qemu_img::bitmap_add(&from, name, Some(granularity));
        }
        qemu_io::commands(&from, &["write -P 1 1M 300k", "write -P 2 4999680 512"]);
        qemu_img::bitmap_disable(&from, "frozen");
        qemu_io::commands(&from, &["write -P 3 10k 30k"]);
        let options = CreateOptions {
            cluster_bits: to_bits,
            ..CreateOptions::new(size)
        };
        let with_bitmaps = ConvertOptions {
            bitmaps: true,
            ..fresh()
        };
        let converted = run((&from, "qcow2"), new_image(&to, &options), &with_bitmaps);
        assert_eq!(converted.bitmaps.len(), 3);
        qemu_img::check(&to).assert_clean();
        let bits = |path: &Path| {
            let mut found = image_bits::bitmaps(&std::fs::read(path).unwrap()).unwrap();
            found.sort_by(|a, b| a.name.cmp(&b.name));
            found
        };
        let (ours, theirs) = (bits(&to), bits(&from));
        assert_eq!(ours.len(), 3);
        for (mine, other) in ours.iter().zip(&theirs) {
            assert_eq!(mine.sha256(), other.sha256(), "{:?}", other.name);
            assert_eq!(mine, other);
            cases += 1;
        }
        let image = open_file(&to, common::reading());
        assert_eq!(image.chain(), Reading::Absent);
    }
    println!("{cases} bitmaps");
    assert!(cases >= 15);
}

#[test]
fn bitmaps_that_cannot_be_copied_are_refused_before_the_first_write() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let golden = tidemark_fixtures::golden::load("in-use");
    std::fs::write(path("from"), &golden).unwrap();
    let from = path("from");
    let with_bitmaps = ConvertOptions {
        bitmaps: true,
        ..fresh()
    };
    let size = source(&from, "qcow2").size();
    let attempt = |to: Target, options: &ConvertOptions| {
        convert(&source(&from, "qcow2"), to, options, &silent)
    };
    let error = attempt(new_raw(&path("raw"), size), &with_bitmaps).unwrap_err();
    assert!(error.mistake().is_some(), "{error}");
    let to = new_image(&path("to"), &CreateOptions::new(size));
    let before = std::fs::read(path("to")).unwrap();
    let error = attempt(to, &with_bitmaps).unwrap_err();
    assert!(
        matches!(error.mistake(), Some(Mistake::BitmapInconsistent(_))),
        "{error}"
    );
    assert_eq!(std::fs::read(path("to")).unwrap(), before);
    let skipping = ConvertOptions {
        skip_broken_bitmaps: true,
        ..with_bitmaps.clone()
    };
    let to = new_image(&path("to"), &CreateOptions::new(size));
    let converted = attempt(to, &skipping).unwrap();
    assert!(!converted.skipped_bitmaps.is_empty());
    let version_2 = CreateOptions {
        version: 2,
        ..CreateOptions::new(size)
    };
    let error = attempt(new_image(&path("old"), &version_2), &skipping).unwrap_err();
    assert!(error.feature().is_some(), "{error}");
    let small = new_image(&path("small"), &CreateOptions::new(size - 512));
    let error = attempt(small, &fresh()).unwrap_err();
    assert!(matches!(
        error.mistake(),
        Some(Mistake::Option { option: "size", .. })
    ));
    let error = convert(
        &source(&path("raw"), "raw"),
        new_image(&path("to"), &CreateOptions::new(size)),
        &with_bitmaps,
        &silent,
    )
    .unwrap_err();
    assert!(error.mistake().is_some(), "{error}");
}

#[test]
fn a_copy_carries_no_chain_record() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    let image: Image = common::create_file(&from, &CreateOptions::new(1 << 20));
    image
        .update(|update| {
            let record =
                tidemark_qcow2::proof::fresh_record(tidemark_qcow2::chain::Scheme::Intervals)
                    .unwrap();
            update.set_record(Some(record));
            Ok::<_, tidemark_qcow2::Error>(())
        })
        .unwrap();
    image.close().unwrap();
    let target = new_image(&to, &CreateOptions::new(1 << 20));
    run((&from, "qcow2"), target, &fresh());
    let chain = |path: &Path| open_file(path, common::reading()).chain();
    assert!(matches!(chain(&from), Reading::Current(_)));
    assert_eq!(chain(&to), Reading::Absent);
}
