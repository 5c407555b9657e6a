//! Compressed copies: the same bytes in no more room than QEMU takes; a copy that fails says so and
//! leaves its source alone.

use std::path::Path;

use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::{CallKind, CrashStorage, Fault, FaultyStorage};
use tidemark_qcow2::transfer::{ConvertOptions, Source, Target, convert};
use tidemark_qcow2::{CompressionType, CreateOptions, Image, MemoryStorage, OpenOptions};

use crate::common::{self, alone, boxed, open_bytes, open_file, read_all};
use crate::scene::{Scene, random_commands, silent, source};

fn options(target_is_zero: bool) -> ConvertOptions {
    ConvertOptions {
        compress: true,
        target_is_zero,
        threads: 3,
        ..ConvertOptions::default()
    }
}

fn file_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

#[test]
fn a_compressed_copy_holds_the_same_bytes_in_as_little_room_as_qemu_needs() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for seed in 300..312 {
        let scene = Scene::new(seed, 1 + usize::try_from(seed % 3).unwrap());
        let top = scene.top();
        let size = source(&top.path, top.format).size();
        let bits = [9, 12, 16, 21][usize::try_from(seed % 4).unwrap()];
        let zstd = seed % 3 == 1;
        let new = CreateOptions {
            cluster_bits: bits,
            compression_type: if zstd {
                CompressionType::Zstd
            } else {
                CompressionType::Zlib
            },
            ..CreateOptions::new(size)
        };
        let ours = scene.path("ours.qcow2");
        let from = source(&top.path, top.format);
        let target = Target::image(common::create_file(&ours, &new));
        convert(&from, target, &options(true), &silent).unwrap();
        drop(from);
        qemu_img::check(&ours).assert_clean();
        let from = (top.path.as_path(), top.format);
        assert!(qemu_img::compare(from, (&ours, "qcow2")), "{}", scene.name);
        let theirs = scene.path("theirs.qcow2");
        let kind = if zstd { "zstd" } else { "zlib" };
        let line = format!("cluster_size={},compression_type={kind}", 1_u64 << bits);
        qemu_img::convert(from.0, from.1, &theirs, "qcow2", &["-c", "-o", &line]);
        let (ours, qemu) = (file_bytes(&ours), file_bytes(&theirs));
        // A cluster more, and two in a hundred.
        let limit = qemu + qemu / 50 + (1 << bits);
        assert!(ours <= limit, "{}: {ours} bytes, QEMU {qemu}", scene.name);
        cases += 1;
    }
    println!("{cases} compressed conversions");
    assert!(cases >= 12);
}

#[test]
fn a_compressed_copy_into_a_larger_disk_with_bitmaps_marks_what_it_changes() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for seed in 320..326 {
        let scene = Scene::new(seed, 1);
        let top = scene.top();
        let size = source(&top.path, top.format).size();
        let path = scene.path("target");
        let larger = size + 512 * (seed % 3) * 77;
        qemu_img::create(&path, larger, &[("cluster_size", "4096")]);
        let mut random = tidemark_fixtures::random::Random::new(seed);
        let commands = random_commands(&mut random, larger);
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu_io::commands(&path, &commands);
        qemu_img::bitmap_add(&path, "b", None);
        let before = qemu_img::convert_to_raw(&path);
        let target = crate::scene::target(&path, "qcow2");
        let from = source(&top.path, top.format);
        convert(&from, target, &options(false), &silent).unwrap();
        qemu_img::check(&path).assert_clean();
        let after = qemu_img::convert_to_raw(&path);
        let mut expected = before.clone();
        let end = usize::try_from(size).unwrap();
        from.read(&mut expected[..end], 0).unwrap();
        assert!(after == expected, "{}", scene.name);
        let image = open_file(&path, common::reading());
        let bits = image.load_bitmap("b").unwrap();
        common::assert_covers(&bits, &before, &after, &scene.name);
        cases += 1;
    }
    println!("{cases} compressed conversions into something");
    assert!(cases >= 6);
}

#[test]
fn a_copy_that_fails_says_so_and_leaves_the_source_alone() {
    let from = common::built(&CreateOptions::new(2 << 20), |image| {
        let data: Vec<u8> = (0..600_000_u32)
            .map(|at| u8::try_from(at / 7 % 251).unwrap())
            .collect();
        image.write(&data, 70_000).unwrap();
        common::add_bitmap(image, "b", 65536);
    });
    let content = read_all(&open_bytes(from.clone(), OpenOptions::default()).unwrap());
    let mut faults = 0;
    for compress in [false, true] {
        for kind in CallKind::CHANGES {
            for at in 0.. {
                let options = ConvertOptions {
                    compress,
                    bitmaps: true,
                    target_is_zero: true,
                    threads: 2,
                    ..ConvertOptions::default()
                };
                let source_storage = CrashStorage::new(from.clone());
                let source = Image::open(boxed(source_storage.clone()), OpenOptions::default());
                let storage = FaultyStorage::new(MemoryStorage::new());
                let new = CreateOptions::new(2 << 20);
                let target =
                    Image::create(boxed(storage.clone()), &new, OpenOptions::default()).unwrap();
                storage.arm(Fault::once(std::slice::from_ref(kind), at));
                let source = Source::image(source.unwrap());
                let result = convert(&source, Target::image(target), &options, &silent);
                assert_eq!(source_storage.to_bytes(), from, "the source was written");
                if storage.fired() == 0 {
                    result.unwrap();
                    break;
                }
                faults += 1;
                // Not to get space back is no failure.
                if *kind != CallKind::Discard {
                    result.expect_err("the failure was swallowed");
                }
            }
        }
    }
    println!("{faults} faults of a target of {} bytes", content.len());
    assert!(faults >= 12, "the sweep shrank: {faults}");
}
