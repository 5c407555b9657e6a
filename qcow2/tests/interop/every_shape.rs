//! Every granularity at every cluster size, names of any bytes, and the limits.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use tidemark_fixtures::builder::{Bitmap as Drawn, Chunk, ImageBuilder};
use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::random::Random;
use tidemark_qcow2::{Bitmap, CreateOptions, Error, Feature, Mistake};

use super::common::{add_bitmap, create_file, granularity, open_file, writing};
use super::{Desk, extents, sha256, to_u64};

/// A size that no granularity above a sector divides.
const SIZE: u64 = (5 << 29) + 7 * 512;

fn ranges(random: &mut Random) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, 512), (SIZE - 512, 512), (64 << 20, 9 << 20)];
    for _ in 0..6 {
        let offset = random.within(0..SIZE / 512 - 2000) * 512;
        ranges.push((offset, random.within(1..2000) * 512));
    }
    ranges
}

/// Marks of ours read by QEMU, then marks of QEMU in the same bitmaps read by us.
#[test]
fn every_granularity_works_at_every_cluster_size() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut daemon = QemuStorageDaemon::spawn();
    let mut cases = 0;
    for cluster_bits in 9..=21 {
        let mut random = Random::stream(31, cluster_bits.into());
        let desk = Desk::new();
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(SIZE)
        };
        let image = create_file(&desk.path, &options);
        let mut expected: Vec<(String, Bitmap)> = Vec::new();
        image
            .update::<_, Error>(|update| {
                for bits in 9..=31_u32 {
                    let mut bitmap = update.blank(granularity(1 << bits))?;
                    for (offset, len) in ranges(&mut random) {
                        bitmap.mark(offset..offset + len).unwrap();
                    }
                    let name = format!("g{bits}");
                    update.put(&name, bitmap.clone(), true)?;
                    expected.push((name, bitmap));
                }
                Ok(())
            })
            .unwrap();
        image.close().unwrap();
        desk.assert_clean();
        let node = daemon.open_image(&desk.path);
        for (name, bitmap) in &expected {
            let what = format!("{name} at clusters 2^{cluster_bits}, by us");
            assert_eq!(daemon.bitmap_sha256(&node, name), sha256(bitmap), "{what}");
            cases += 1;
        }
        let written = ranges(&mut random);
        let commands: Vec<String> = written
            .iter()
            .map(|(offset, len)| format!("write -z {offset} {len}"))
            .collect();
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        daemon.guest(&node, &commands);
        let theirs: Vec<String> = expected
            .iter()
            .map(|(name, _)| daemon.bitmap_sha256(&node, name))
            .collect();
        daemon.close(&node);
        desk.look(|image| {
            for ((name, bitmap), theirs) in expected.iter_mut().zip(theirs) {
                let what = format!("{name} at clusters 2^{cluster_bits}, by QEMU");
                for (offset, len) in &written {
                    bitmap.mark(*offset..offset + len).unwrap();
                }
                let found = image.load_bitmap(name).unwrap();
                assert_eq!(sha256(&found), theirs, "{what}");
                assert_eq!(extents(&found), extents(bitmap), "{what}");
                cases += 1;
            }
        });
    }
    daemon.quit();
    println!("{cases} bitmaps, half written by each");
    assert_eq!(cases, 13 * 23 * 2);
}

const KINDS: [&str; 3] = ["ones", "tail", "mixed"];

/// An image with entries of all ones, and with bits past the end of the disk.
fn with_tails(granules: u64) -> Vec<u8> {
    let pages = usize::try_from(granules.div_ceil(8 * 512)).unwrap();
    let mixed = |page| match page % 2 {
        0 => Chunk::Bits([[0x81; 64], [0xff; 64]].concat().repeat(4)),
        _ => Chunk::Ones,
    };
    let fills: [Vec<Chunk>; 3] = [
        vec![Chunk::Ones; pages],
        vec![Chunk::Bits(vec![0xff; 512]); pages],
        (0..pages).map(mixed).collect(),
    ];
    let mut builder = ImageBuilder::new(granules * 4096 - 512).cluster_bits(9);
    for (name, table) in KINDS.into_iter().zip(fills) {
        builder = builder.bitmap(Drawn::new(name, 12).table(table));
    }
    builder.build().bytes
}

/// Counts by both; returns how many bitmaps were compared.
fn compare_tails(desk: &Desk, daemon: &mut QemuStorageDaemon, granules: u64, what: &str) -> usize {
    let node = daemon.open_read_only(&desk.path);
    desk.look(|image| {
        for name in KINDS {
            let bits = image.load_bitmap(name).unwrap();
            let theirs = daemon.bitmap(&node, name).unwrap();
            let what = format!("{granules} granules, {name}, {what}");
            assert_eq!(theirs["count"], bits.count() * 4096, "{what}");
            assert!(name == "mixed" || bits.count() == granules, "{what}");
            assert!(bits.dirty_ranges().all(|range| range.end <= image.size()));
        }
    });
    daemon.close(&node);
    KINDS.len()
}

/// QEMU leaves bits past the disk's end, up to the next 64-bit word; nobody counts them.
#[test]
fn bits_past_the_end_and_entries_of_all_ones_are_read_alike() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut daemon = QemuStorageDaemon::spawn();
    let mut cases = 0;
    for granules in [1, 7, 8, 16, 63, 64, 65, 100, 4095, 4096, 4097, 5000] {
        let desk = Desk::new();
        std::fs::write(&desk.path, with_tails(granules)).unwrap();
        cases += compare_tails(&desk, &mut daemon, granules, "as it was made");
        let node = daemon.open_image(&desk.path);
        daemon.close(&node);
        cases += compare_tails(&desk, &mut daemon, granules, "rewritten by QEMU");
        desk.session(|image| {
            image
                .update::<_, Error>(|update| {
                    for name in KINDS {
                        let bits = update.load(name)?;
                        update.put(name, bits, true)?;
                    }
                    Ok(())
                })
                .unwrap();
        });
        cases += compare_tails(&desk, &mut daemon, granules, "rewritten by us");
        for stored in image_bits::bitmaps(&desk.bytes()).unwrap() {
            let ones = |byte: &u8| u64::from(byte.count_ones());
            let dirty: u64 = stored.bits.iter().map(ones).sum();
            assert_eq!(
                dirty,
                stored.count(),
                "we left bits past the end of the disk"
            );
        }
        desk.assert_clean();
    }
    daemon.quit();
    println!("{cases} bitmaps compared");
    assert_eq!(cases, 12 * 3 * 3);
}

const NO_TEXT: [&[u8]; 5] = [
    b"\xff",
    b"\xff\xfe",
    b"caf\xe9",
    b"\xe6\x97",
    b"back\\slash\x80",
];

/// Bitmaps of these names; those of no text have one bit each, after the number of the name.
fn image_with_names(names: &[Vec<u8>], no_text: &[&[u8]]) -> Vec<u8> {
    // The builder takes text; bytes that are none are put in afterwards.
    let stand_in = |number: usize, len: usize| format!("{number:~<len$}");
    let mut builder = ImageBuilder::new(1 << 20).cluster_bits(12);
    for name in names {
        builder = builder.bitmap(Drawn::new(std::str::from_utf8(name).unwrap(), 16));
    }
    for (number, name) in no_text.iter().enumerate() {
        let bits = vec![Chunk::Bits(vec![1 << number])];
        builder = builder.bitmap(Drawn::new(&stand_in(number, name.len()), 16).table(bits));
    }
    let mut bytes = builder.build().bytes;
    for (number, name) in no_text.iter().enumerate() {
        let wanted = stand_in(number, name.len()).into_bytes();
        let len = u16::try_from(name.len()).unwrap().to_be_bytes();
        let entry = [&len[..], &[0; 4], &wanted].concat();
        let at = bytes
            .windows(entry.len())
            .position(|window| window == entry);
        let at = at.unwrap() + 6;
        bytes[at..at + name.len()].copy_from_slice(name);
    }
    bytes
}

/// The names on disk, sorted.
fn stored_names(desk: &Desk) -> Vec<Vec<u8>> {
    let bitmaps = image_bits::bitmaps(&desk.bytes()).unwrap();
    let mut names: Vec<_> = bitmaps.into_iter().map(|each| each.name).collect();
    names.sort_unstable();
    names
}

/// Names of every length, and of bytes that are no text: kept, told apart, changed and removed.
#[test]
fn names_of_any_bytes_and_length_are_kept_by_both() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut names: Vec<Vec<u8>> = (1..=64).map(|len| vec![b'a'; len]).collect();
    names.extend([127, 128, 255, 256, 511, 512, 1000, 1022, 1023].map(|len| vec![b'n'; len]));
    let texts = ["\u{e9}t\u{e9}", "\u{65e5}\u{672c}", "a\tb", "\\xff"];
    names.extend(texts.map(|name| name.as_bytes().to_vec()));
    let long = [vec![b'x'; 1022], vec![0xc3]].concat();
    let no_text: Vec<&[u8]> = NO_TEXT.into_iter().chain([&long[..]]).collect();
    let desk = Desk::new();
    std::fs::write(&desk.path, image_with_names(&names, &no_text)).unwrap();
    desk.assert_clean();
    names.extend(no_text.iter().map(|name| name.to_vec()));
    let mut sorted = names.clone();
    sorted.sort_unstable();
    assert_eq!(stored_names(&desk), sorted);
    let texts: Vec<String> = desk.look(|image| {
        let infos = image.bitmaps().unwrap();
        infos.into_iter().map(|info| info.name).collect()
    });
    // "\\xff" is a name of its own here, so that the first of no text is not reached by its own.
    for (number, text) in texts[names.len() - 5..].iter().enumerate() {
        let bits = desk.look(|image| image.load_bitmap(text).unwrap());
        assert!(
            bits.test(to_u64(number + 1) << 16) && bits.count() == 1,
            "{text}"
        );
        let change = |recording| {
            desk.session(|image| {
                image
                    .update::<_, Error>(|update| {
                        let mut bits = update.load(text)?;
                        bits.mark(0..1).unwrap();
                        update.put(text, bits, recording)
                    })
                    .unwrap();
            });
        };
        change(false);
        change(true);
    }
    assert_eq!(stored_names(&desk), sorted, "after we changed them");
    let path = desk.path.to_str().unwrap();
    qemu_img::ok(&["amend", "-o", "lazy_refcounts=on", path]);
    qemu_img::ok(&["amend", "-o", "lazy_refcounts=off", path]);
    assert_eq!(stored_names(&desk), sorted, "after QEMU wrote them all");
    desk.assert_clean();
    let mut command = Command::new("qemu-img");
    command
        .args(["bitmap", "--remove", path])
        .arg(OsStr::from_bytes(b"caf\xe9"));
    assert!(command.status().unwrap().success());
    desk.session(|image| image.update(|update| update.remove("\\xe6\\x97")).unwrap());
    sorted.retain(|name| name != b"caf\xe9" && name != b"\xe6\x97");
    assert_eq!(stored_names(&desk), sorted);
    desk.assert_clean();
    println!("{} names, {} of them no text", names.len(), no_text.len());
    assert!(names.len() >= 80);
}

/// Tries to add a bitmap, which must fail and leave the file as it was.
fn refuse(options: &CreateOptions, name: &str, bytes: u64) -> Error {
    let desk = Desk::new();
    create_file(&desk.path, options).close().unwrap();
    let before = desk.bytes();
    let image = open_file(&desk.path, writing());
    let put = |update: &mut tidemark_qcow2::Update<'_>| {
        let bits = update.blank(granularity(bytes))?;
        update.put(name, bits, true)
    };
    let error: Error = image.update(put).unwrap_err();
    image.close().unwrap();
    assert!(desk.bytes() == before, "refused, and something was written");
    error
}

#[test]
fn what_cannot_be_is_refused_before_the_first_byte() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let plain = CreateOptions::new(1 << 20);
    let long = "n".repeat(1024);
    for name in ["", "a\0b", &long] {
        let error = refuse(&plain, name, 65536);
        assert!(
            matches!(error.mistake(), Some(Mistake::BitmapName(_))),
            "{error}"
        );
    }
    let error = refuse(&CreateOptions::new(0), "b", 65536);
    assert!(error.mistake().is_some(), "{error}");
    let old = CreateOptions {
        version: 2,
        ..plain.clone()
    };
    let error = refuse(&old, "b", 65536);
    assert!(
        matches!(error.feature(), Some(Feature::BitmapsInVersion2)),
        "{error}"
    );
    let error = refuse(&CreateOptions::new((2 << 40) + 512), "b", 512);
    assert!(
        matches!(error.mistake(), Some(Mistake::Bitmap(_))),
        "{error}"
    );
    println!("6 refusals");
}

/// A sector less than what is refused is the limit, for QEMU too; and a disk does not grow past it.
#[test]
fn a_bitmap_of_512_mib_is_the_limit_for_both() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let size = 2_u64 << 40;
    let desk = Desk::new();
    let image = create_file(&desk.path, &CreateOptions::new(size));
    add_bitmap(&image, "b", 512);
    image.write(&[1; 512], size - 512).unwrap();
    image.close().unwrap();
    let before = desk.bytes();
    let image = open_file(&desk.path, writing());
    let error = image.resize(size + 512, tidemark_qcow2::Shrink::Refused);
    let error = error.unwrap_err();
    image.close().unwrap();
    assert!(
        matches!(error.mistake(), Some(Mistake::BitmapTooFine { .. })),
        "{error}"
    );
    assert!(
        desk.bytes() == before,
        "a disk that does not grow was changed"
    );
    let info = qemu_img::info(&desk.path);
    assert_eq!(
        info["format-specific"]["data"]["bitmaps"][0]["granularity"],
        512
    );
    desk.assert_clean();
}
