//! Bits, both ways: what one side serializes the other reads exactly.

use std::path::Path;

use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{nbd, qemu_img};
use tidemark_fixtures::random::Random;
use tidemark_qcow2::{Bitmap, CreateOptions};

use super::common::{add_bitmap, create_file, granularity};
use super::{Desk, extents, sha256, to_u64, to_usize};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Cluster bits, disk size, granularities. Few sizes divide evenly.
const CASES: [(u32, u64, &[u64]); 9] = [
    (9, MIB + 1536, &[512, 4 * KIB, 64 * KIB, 2 * MIB]),
    (9, 24 * MIB + 512, &[512, 32 * KIB, 2 * GIB]),
    (12, 33 * MIB + 1536, &[512, 8 * KIB, MIB, 512 * MIB]),
    (12, 4 * MIB, &[KIB, 4 * KIB]),
    (16, 5 * GIB + 512, &[512, 4 * KIB, 64 * KIB, MIB, 2 * GIB]),
    (16, 64 * MIB - 512, &[2 * KIB, 64 * KIB, 32 * MIB]),
    (16, 512, &[512, 64 * KIB]),
    (21, 7 * GIB + 2560, &[512, 64 * KIB, 2 * GIB]),
    (21, 3 * MIB, &[512, 16 * KIB, 2 * GIB]),
];

/// Sector-aligned ranges that include the first and the last sector, and one long one.
fn ranges(random: &mut Random, size: u64) -> Vec<(u64, u64)> {
    let sectors = size / 512;
    let mut ranges = vec![(0, 512), (size - 512, 512)];
    for _ in 0..8 {
        let start = random.within(0..sectors);
        let len = random.within(1..200).min(sectors - start);
        ranges.push((start * 512, len * 512));
    }
    let start = random.within(0..sectors / 2 + 1);
    ranges.push((start * 512, (9 * MIB).min(size - start * 512)));
    ranges
}

fn guest_commands(ranges: &[(u64, u64)]) -> Vec<String> {
    let command = |&(offset, len): &(u64, u64)| match len > MIB {
        true => format!("write -z {offset} {len}"),
        false => format!("write -P 17 {offset} {len}"),
    };
    ranges.iter().map(command).collect()
}

#[test]
fn bits_written_by_qemu_are_read_exactly() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut daemon = QemuStorageDaemon::spawn();
    let (mut bitmaps, mut over_nbd) = (0, 0);
    for (case, (cluster_bits, size, granularities)) in CASES.into_iter().enumerate() {
        let desk = Desk::new();
        let cluster = (1_u64 << cluster_bits).to_string();
        qemu_img::create(&desk.path, size, &[("cluster_size", &cluster)]);
        let node = daemon.open_image(&desk.path);
        let mut random = Random::stream(1, to_u64(case));
        for bytes in granularities {
            daemon.bitmap_add(&node, &format!("always-{bytes}"), Some(*bytes));
            daemon.bitmap_add(&node, &format!("first-{bytes}"), Some(*bytes));
        }
        for half in 0..2 {
            let commands = guest_commands(&ranges(&mut random, size));
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            daemon.guest(&node, &commands);
            for bytes in granularities.iter().filter(|_| half == 0) {
                daemon.bitmap_disable(&node, &format!("first-{bytes}"));
                daemon.bitmap_add(&node, &format!("second-{bytes}"), Some(*bytes));
            }
        }
        let names = |kind: &'static str| granularities.iter().map(move |b| format!("{kind}-{b}"));
        let names: Vec<String> = ["always", "first", "second"]
            .into_iter()
            .flat_map(names)
            .collect();
        let expected: Vec<String> = names
            .iter()
            .map(|name| daemon.bitmap_sha256(&node, name))
            .collect();
        daemon.close(&node);
        let raw = (size < GIB).then(|| desk.bytes());
        desk.look(|image| {
            assert_eq!(image.bitmaps().unwrap().len(), names.len());
            for (name, sha) in names.iter().zip(&expected) {
                let bits = image.load_bitmap(name).unwrap();
                assert_eq!(
                    &sha256(&bits),
                    sha,
                    "{name} at clusters of {cluster}, disk {size}"
                );
                if let Some(raw) = &raw {
                    let stored = image_bits::bitmap(raw, name).unwrap().unwrap();
                    assert_eq!(&stored.sha256(), sha, "{name}: the third reader disagrees");
                }
            }
            for info in image.bitmaps().unwrap() {
                assert_eq!(info.auto, !info.name.starts_with("first"), "{}", info.name);
                assert!(!info.in_use);
            }
        });
        over_nbd += compare_over_nbd(&desk, &names, 3);
        bitmaps += names.len();
    }
    println!(
        "{bitmaps} bitmaps in {} images, {over_nbd} over NBD too",
        CASES.len()
    );
    daemon.quit();
}

/// Compares every `step`th bitmap with what an NBD client of QEMU gets; returns how many.
fn compare_over_nbd(desk: &Desk, names: &[String], step: usize) -> usize {
    let sample: Vec<&String> = names.iter().step_by(step).collect();
    for name in &sample {
        let ours = desk.look(|image| extents(&image.load_bitmap(name).unwrap()));
        assert_eq!(
            ours,
            nbd::dirty_extents(&desk.path, name),
            "{name} over NBD"
        );
    }
    sample.len()
}

/// Bits with every kind of page: all zeros, all ones, mixed.
fn patterns(blank: &Bitmap, random: &mut Random) -> Vec<(&'static str, Bitmap)> {
    let size = blank.shape().disk_bytes();
    let mut scattered = blank.clone();
    for (offset, len) in ranges(random, size) {
        scattered.mark(offset..offset + len).unwrap();
    }
    let mut from_middle = blank.clone();
    from_middle.mark(size / 2..size).unwrap();
    vec![
        ("clean", blank.clone()),
        ("full", Bitmap::all_dirty(blank.shape())),
        ("scattered", scattered),
        ("half", from_middle),
    ]
}

#[test]
fn bits_written_here_are_read_exactly_by_qemu() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut daemon = QemuStorageDaemon::spawn();
    let (mut bitmaps, mut over_nbd) = (0, 0);
    for (case, (cluster_bits, size, granularities)) in CASES.into_iter().enumerate() {
        let desk = Desk::new();
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(size)
        };
        let mut random = Random::stream(2, to_u64(case));
        let mut expected = Vec::new();
        let image = create_file(&desk.path, &options);
        image
            .update::<_, tidemark_qcow2::Error>(|update| {
                for bytes in granularities {
                    let blank = update.blank(granularity(*bytes))?;
                    for (kind, bits) in patterns(&blank, &mut random) {
                        for recording in [false, true] {
                            let name = format!("{kind}-{bytes}-{recording}");
                            update.put(&name, bits.clone(), recording)?;
                            expected.push((name, bits.clone(), recording));
                        }
                    }
                }
                Ok(())
            })
            .unwrap();
        for (number, (offset, len)) in ranges(&mut random, size).into_iter().enumerate() {
            image.write(&vec![0x22; to_usize(len)], offset).unwrap();
            if number % 4 == 0 {
                image.flush().unwrap();
            }
            for (_, bits, _) in expected.iter_mut().filter(|(_, _, recording)| *recording) {
                bits.mark(offset..offset + len).unwrap();
            }
        }
        image.close().unwrap();
        let what = format!("clusters 2^{cluster_bits}, disk {size}");
        compare_all(&mut daemon, &desk.path, &expected, &what);
        if size < GIB {
            desk.assert_clean();
        }
        let names: Vec<String> = expected.iter().map(|(name, ..)| name.clone()).collect();
        over_nbd += compare_over_nbd(&desk, &names, 7);
        // QEMU writes all bitmaps anew, in its own way, whenever it opens an image for writing.
        let node = daemon.open_image(&desk.path);
        daemon.close(&node);
        compare_all(
            &mut daemon,
            &desk.path,
            &expected,
            &format!("{what}, rewritten by QEMU"),
        );
        bitmaps += expected.len();
    }
    println!(
        "{bitmaps} bitmaps in {} images, {over_nbd} over NBD too",
        CASES.len()
    );
    daemon.quit();
}

/// Both sides must read exactly the expected bits and flags.
fn compare_all(
    daemon: &mut QemuStorageDaemon,
    path: &Path,
    expected: &[(String, Bitmap, bool)],
    what: &str,
) {
    let node = daemon.open_read_only(path);
    let image = super::common::open_file(path, super::common::reading());
    assert_eq!(image.bitmaps().unwrap().len(), expected.len(), "{what}");
    for (name, bits, recording) in expected {
        let sha = sha256(bits);
        let read = image.load_bitmap(name).unwrap();
        assert_eq!(extents(&read), extents(bits), "{what}: {name} read by us");
        assert_eq!(sha256(&read), sha, "{what}: {name} read by us");
        assert_eq!(
            daemon.bitmap_sha256(&node, name),
            sha,
            "{what}: {name} read by QEMU"
        );
        let info = daemon.bitmap(&node, name).unwrap();
        assert_eq!(info["recording"], *recording, "{what}: {name}");
        assert_eq!(
            info["count"],
            bits.count() * bits.shape().granularity().bytes(),
            "{name}"
        );
    }
    daemon.close(&node);
}

/// One granule at a time: the bit of granule n is bit n % 8 of byte n / 8, for both.
#[test]
fn bit_order_agrees_with_qemu() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let granules = [
        0_u64, 1, 2, 7, 8, 9, 15, 63, 64, 65, 511, 512, 4095, 4096, 4097, 8191,
    ];
    let step = 4 * KIB;
    let size = 32 * MIB;
    let mut daemon = QemuStorageDaemon::spawn();

    let theirs = Desk::new();
    qemu_img::create(&theirs.path, size, &[("cluster_size", "512")]);
    let node = daemon.open_image(&theirs.path);
    for granule in granules {
        let name = format!("g{granule}");
        daemon.bitmap_add(&node, &name, Some(step));
        daemon.guest(
            &node,
            &[&format!("write -P 1 {} 512", granule * step + 512)],
        );
        daemon.bitmap_disable(&node, &name);
    }
    daemon.close(&node);
    let raw = theirs.bytes();

    let ours = Desk::new();
    let image = create_file(
        &ours.path,
        &CreateOptions {
            cluster_bits: 9,
            ..CreateOptions::new(size)
        },
    );
    for granule in granules {
        let name = format!("g{granule}");
        add_bitmap(&image, &name, step);
        image.write(&[1; 512], granule * step + 1024).unwrap();
        image
            .update(|update| update.set_recording(&name, false))
            .unwrap();
    }
    image.close().unwrap();

    for granule in granules {
        let name = format!("g{granule}");
        let only = granule * step..(granule + 1) * step;
        let bits = theirs.look(|image| image.load_bitmap(&name).unwrap());
        assert_eq!(
            bits.dirty_ranges().collect::<Vec<_>>(),
            std::slice::from_ref(&only),
            "QEMU's {name}"
        );
        let stored = image_bits::bitmap(&raw, &name).unwrap().unwrap();
        assert_eq!(
            stored.bits[to_usize(granule / 8)],
            1 << (granule % 8),
            "raw {name}"
        );
        assert_eq!(stored.count(), 1);
        let seen: Vec<_> = nbd::dirty_extents(&ours.path, &name)
            .into_iter()
            .filter(|extent| extent.2)
            .collect();
        assert_eq!(seen, [(only.start, step, true)], "our {name}");
    }
    println!("{} granules, both ways", granules.len());
    daemon.quit();
}

/// Many bitmaps, with names of every kind that QEMU accepts.
#[test]
fn names_of_bitmaps_agree() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut names: Vec<String> = (0..150)
        .map(|number| format!("bitmap {number:x}"))
        .collect();
    names.extend(
        [
            "\u{e9}t\u{e9}",
            "\u{65e5}\u{672c}",
            "a,b=c",
            "\"quoted\"",
            " ",
        ]
        .map(String::from),
    );
    names.push("n".repeat(1023));
    for cluster_bits in [9, 16] {
        let desk = Desk::new();
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(MIB)
        };
        let image = create_file(&desk.path, &options);
        image
            .update::<_, tidemark_qcow2::Error>(|update| {
                for name in &names {
                    let bits = update.blank(granularity(65536))?;
                    update.put(name, bits, false)?;
                }
                Ok(())
            })
            .unwrap();
        image.close().unwrap();
        desk.assert_clean();
        let listed = || -> Vec<String> {
            let info = qemu_img::info(&desk.path);
            let list = info["format-specific"]["data"]["bitmaps"]
                .as_array()
                .unwrap()
                .clone();
            let mut listed: Vec<String> = list
                .iter()
                .map(|each| each["name"].as_str().unwrap().to_owned())
                .collect();
            listed.sort_unstable();
            listed
        };
        let mut sorted = names.clone();
        sorted.sort_unstable();
        assert_eq!(listed(), sorted);
        qemu_img::bitmap_remove(&desk.path, &names[3]);
        qemu_img::bitmap_add(&desk.path, &names[3], Some(512));
        let mut ours: Vec<String> = desk.look(|image| {
            image
                .bitmaps()
                .unwrap()
                .into_iter()
                .map(|info| info.name)
                .collect()
        });
        ours.sort_unstable();
        assert_eq!(ours, sorted, "after QEMU wrote the directory");
    }
    println!("{} names, both ways", names.len());
}
