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

/// QEMU leaves bits past the disk's end, up to the next 64-bit word; nobody counts them.
#[test]
fn bits_past_the_end_and_entries_of_all_ones_are_read_alike() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut daemon = QemuStorageDaemon::spawn();
    let mut cases = 0;
    for granules in [1_u64, 7, 8, 16, 63, 64, 65, 100, 4095, 4096, 4097, 5000] {
        let size = granules * 4096 - 512;
        let pages = usize::try_from(granules.div_ceil(8 * 512)).unwrap();
        let fills: [(&str, Vec<Chunk>); 3] = [
            ("ones", vec![Chunk::Ones; pages]),
            ("tail", vec![Chunk::Bits(vec![0xff; 512]); pages]),
            (
                "mixed",
                (0..pages)
                    .map(|page| match page % 2 {
                        0 => Chunk::Bits([[0x81; 64], [0xff; 64]].concat().repeat(4)),
                        _ => Chunk::Ones,
                    })
                    .collect(),
            ),
        ];
        let mut builder = ImageBuilder::new(size).cluster_bits(9);
        for (name, table) in fills {
            builder = builder.bitmap(Drawn::new(name, 12).table(table));
        }
        let desk = Desk::new();
        std::fs::write(&desk.path, builder.build().bytes).unwrap();
        let compare = |daemon: &mut QemuStorageDaemon, what: &str| {
            let node = daemon.open_read_only(&desk.path);
            desk.look(|image| {
                for name in ["ones", "tail", "mixed"] {
                    let bits = image.load_bitmap(name).unwrap();
                    let theirs = daemon.bitmap(&node, name).unwrap()["count"]
                        .as_u64()
                        .unwrap();
                    assert_eq!(
                        theirs,
                        bits.count() * 4096,
                        "{granules} granules, {name}, {what}"
                    );
                    assert!(name == "mixed" || bits.count() == granules);
                    assert!(bits.dirty_ranges().all(|range| range.end <= size));
                }
            });
            daemon.close(&node);
            3
        };
        cases += compare(&mut daemon, "as it was made");
        // Rewritten by QEMU, then by us.
        let node = daemon.open_image(&desk.path);
        daemon.close(&node);
        cases += compare(&mut daemon, "rewritten by QEMU");
        desk.session(|image| {
            image
                .update::<_, Error>(|update| {
                    for name in ["ones", "tail", "mixed"] {
                        let bits = update.load(name)?;
                        update.put(name, bits, true)?;
                    }
                    Ok(())
                })
                .unwrap();
        });
        cases += compare(&mut daemon, "rewritten by us");
        for stored in image_bits::bitmaps(&desk.bytes()).unwrap() {
            let dirty = stored
                .bits
                .iter()
                .map(|byte| u64::from(byte.count_ones()))
                .sum::<u64>();
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

/// Names of every length, and of bytes that are no text: kept, told apart, changed and removed.
#[test]
fn names_of_any_bytes_and_length_are_kept_by_both() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut names: Vec<Vec<u8>> = (1..=64).map(|len| vec![b'a'; len]).collect();
    names.extend([127, 128, 255, 256, 511, 512, 1000, 1022, 1023].map(|len| vec![b'n'; len]));
    names.extend(
        ["\u{e9}t\u{e9}", "\u{65e5}\u{672c}", "a\tb", "\\xff"].map(|name| name.as_bytes().to_vec()),
    );
    let no_text: Vec<Vec<u8>> = vec![
        b"\xff".to_vec(),
        b"\xff\xfe".to_vec(),
        b"caf\xe9".to_vec(),
        b"\xe6\x97".to_vec(),
        b"back\\slash\x80".to_vec(),
        [vec![b'x'; 1022], vec![0xc3]].concat(),
    ];
    // The builder takes text; bytes that are none are put in afterwards.
    let stand_in = |number: usize, len: usize| format!("{number:~<len$}");
    let mut builder = ImageBuilder::new(1 << 20).cluster_bits(12);
    for name in &names {
        builder = builder.bitmap(Drawn::new(std::str::from_utf8(name).unwrap(), 16));
    }
    for (number, name) in no_text.iter().enumerate() {
        builder = builder.bitmap(
            Drawn::new(&stand_in(number, name.len()), 16)
                .table(vec![Chunk::Bits(vec![1 << number])]),
        );
    }
    let mut bytes = builder.build().bytes;
    for (number, name) in no_text.iter().enumerate() {
        let wanted = stand_in(number, name.len()).into_bytes();
        let entry = [
            &u16::try_from(name.len()).unwrap().to_be_bytes()[..],
            &[0; 4],
            &wanted,
        ]
        .concat();
        let at = bytes
            .windows(entry.len())
            .position(|window| window == entry)
            .unwrap();
        bytes[at + 6..at + 6 + name.len()].copy_from_slice(name);
    }
    names.extend(no_text.iter().cloned());
    let desk = Desk::new();
    std::fs::write(&desk.path, bytes).unwrap();
    desk.assert_clean();
    let stored = |desk: &Desk| -> Vec<Vec<u8>> {
        let mut stored: Vec<_> = image_bits::bitmaps(&desk.bytes())
            .unwrap()
            .into_iter()
            .map(|each| each.name)
            .collect();
        stored.sort_unstable();
        stored
    };
    let mut sorted = names.clone();
    sorted.sort_unstable();
    assert_eq!(stored(&desk), sorted);
    let texts = desk.look(|image| {
        let infos = image.bitmaps().unwrap();
        let texts: Vec<String> = infos.into_iter().map(|info| info.name).collect();
        for text in &texts {
            image
                .load_bitmap(text)
                .unwrap_or_else(|error| panic!("{text}: {error}"));
        }
        texts
    });
    // "\\xff" is a name of its own here, so that the first of no text is not reached by its own.
    for (number, text) in texts.iter().rev().take(5).rev().enumerate() {
        let bits = desk.look(|image| image.load_bitmap(text).unwrap());
        assert!(
            bits.test(to_u64(number + 1) << 16) && bits.count() == 1,
            "{text}"
        );
    }
    // Each of them changed by us and kept by QEMU, then removed by QEMU and by us.
    for text in &texts[names.len() - 5..] {
        desk.session(|image| {
            image
                .update(|update| update.set_recording(text, false))
                .unwrap()
        });
        desk.session(|image| {
            image
                .update::<_, Error>(|update| {
                    let bits = update.load(text)?;
                    update.put(text, bits, true)
                })
                .unwrap();
        });
    }
    assert_eq!(stored(&desk), sorted);
    qemu_img::ok(&[
        "amend",
        "-o",
        "lazy_refcounts=on",
        desk.path.to_str().unwrap(),
    ]);
    qemu_img::ok(&[
        "amend",
        "-o",
        "lazy_refcounts=off",
        desk.path.to_str().unwrap(),
    ]);
    assert_eq!(stored(&desk), sorted, "after QEMU wrote them all");
    desk.assert_clean();
    let mut command = Command::new("qemu-img");
    command
        .args(["bitmap", "--remove"])
        .arg(&desk.path)
        .arg(OsStr::from_bytes(b"caf\xe9"));
    assert!(command.status().unwrap().success());
    desk.session(|image| image.update(|update| update.remove("\\xe6\\x97")).unwrap());
    sorted.retain(|name| name != b"caf\xe9" && name != b"\xe6\x97");
    assert_eq!(stored(&desk), sorted);
    desk.assert_clean();
    println!("{} names, {} of them no text", names.len(), no_text.len());
    assert!(names.len() >= 80);
}

/// Every refusal leaves the file as it was.
#[test]
fn what_cannot_be_is_refused_before_the_first_byte() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let put = |name: &'static str, bytes: u64| {
        move |update: &mut tidemark_qcow2::Update<'_>| -> Result<(), Error> {
            let bits = update.blank(granularity(bytes))?;
            update.put(name, bits, true)
        }
    };
    let (mut refusals, tib) = (0, 1_u64 << 40);
    let mut refuse = |options: &CreateOptions, name: &'static str, bytes: u64, what: &str| {
        let desk = Desk::new();
        create_file(&desk.path, options).close().unwrap();
        let before = desk.bytes();
        let image = open_file(&desk.path, writing());
        let error = image.update(put(name, bytes)).unwrap_err();
        image.close().unwrap();
        assert!(
            desk.bytes() == before,
            "{what}: refused, and something was written"
        );
        refusals += 1;
        error
    };
    let plain = CreateOptions::new(1 << 20);
    for name in ["", "a\0b"] {
        let error = refuse(&plain, name, 65536, "name");
        assert!(
            matches!(error.mistake(), Some(Mistake::BitmapName(_))),
            "{error}"
        );
    }
    let long: &'static str = Box::leak("n".repeat(1024).into_boxed_str());
    let error = refuse(&plain, long, 65536, "1,024 bytes");
    assert!(
        matches!(error.mistake(), Some(Mistake::BitmapName(1024))),
        "{error}"
    );
    let error = refuse(&CreateOptions::new(0), "b", 65536, "a disk of no bytes");
    assert!(error.mistake().is_some(), "{error}");
    let old = CreateOptions {
        version: 2,
        ..CreateOptions::new(1 << 20)
    };
    let error = refuse(&old, "b", 65536, "version 2");
    assert!(
        matches!(error.feature(), Some(Feature::BitmapsInVersion2)),
        "{error}"
    );
    let error = refuse(
        &CreateOptions::new(2 * tib + 512),
        "b",
        512,
        "more than 512 MiB of bits",
    );
    assert!(
        matches!(error.mistake(), Some(Mistake::Bitmap(_))),
        "{error}"
    );

    // One sector less is the limit, for QEMU too; and a disk does not grow past it.
    let desk = Desk::new();
    let image = create_file(&desk.path, &CreateOptions::new(2 * tib));
    add_bitmap(&image, "b", 512);
    image.write(&[1; 512], 2 * tib - 512).unwrap();
    image.close().unwrap();
    let before = desk.bytes();
    let image = open_file(&desk.path, writing());
    let error = image
        .resize(2 * tib + 512, tidemark_qcow2::Shrink::Refused)
        .unwrap_err();
    image.close().unwrap();
    assert!(
        matches!(error.mistake(), Some(Mistake::BitmapTooFine { .. })),
        "{error}"
    );
    assert!(
        desk.bytes() == before,
        "a disk that does not grow was changed"
    );
    refusals += 1;
    let info = qemu_img::info(&desk.path);
    assert_eq!(
        info["format-specific"]["data"]["bitmaps"][0]["granularity"],
        512
    );
    desk.assert_clean();
    println!("{refusals} refusals");
    assert!(refusals >= 7);
}
