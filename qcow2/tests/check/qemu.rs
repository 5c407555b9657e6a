//! The check beside `qemu-img check`: same exit code, same counts.

use tidemark_fixtures::builder::{Cluster, ImageBuilder};
use tidemark_fixtures::oracle::qemu_img::{self, CheckResult};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::{golden, require_qemu};
use tidemark_qcow2::check::{Finding, check};
use tidemark_qcow2::{CheckReport, MemoryStorage};

use crate::corpus::{DAMAGES, WIDE_DAMAGES, damaged, healthy};
use crate::report;

/// What both tools count: exit code, corruptions, leaks, allocated, total, compressed and
/// fragmented clusters, end of the image.
type Counts = [u64; 8];

fn ours(report: &CheckReport) -> Counts {
    [
        report.exit_code().into(),
        report.corruptions,
        report.leaks,
        report.allocated_clusters,
        report.total_clusters,
        report.compressed_clusters,
        report.fragmented_clusters,
        report.image_end_offset,
    ]
}

fn theirs(result: &CheckResult) -> Counts {
    [
        u64::try_from(result.exit).unwrap(),
        result.count("corruptions"),
        result.count("leaks"),
        result.count("allocated-clusters"),
        result.count("total-clusters"),
        result.count("compressed-clusters"),
        result.count("fragmented-clusters"),
        result.count("image-end-offset"),
    ]
}

/// Compares one image with QEMU, where QEMU can open it; tells how they differ.
fn difference(name: &str, bytes: &[u8]) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    std::fs::write(&path, bytes).unwrap();
    let qemu = qemu_img::check(&path);
    let report = match check(Box::new(MemoryStorage::from_bytes(bytes.to_vec()))) {
        Ok(report) => report,
        Err(_) if qemu.json.is_null() && qemu.exit == 1 => return None,
        Err(error) => return Some(format!("{name}: {error}, QEMU {:?}", theirs(&qemu))),
    };
    let failed = qemu.json.is_null() && report.exit_code() == 1;
    (!failed && ours(&report) != theirs(&qemu)).then(|| {
        let found: Vec<String> = report.findings.iter().map(Finding::to_string).collect();
        format!(
            "{name}: ours {:?}, QEMU {:?}\n{}\n{}",
            ours(&report),
            theirs(&qemu),
            found.join("\n"),
            qemu.stderr
        )
    })
}

fn compare_all(images: impl IntoIterator<Item = (String, Vec<u8>)>) {
    let (mut count, mut wrong) = (0, Vec::new());
    for (name, bytes) in images {
        count += 1;
        wrong.extend(difference(&name, &bytes));
    }
    assert!(
        wrong.is_empty(),
        "{} of {count}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    println!("{count} images agree with QEMU");
}

#[test]
fn damaged_images_count_as_in_qemu_for_every_refcount_width_and_cluster_size() {
    require_qemu!();
    let mut images = Vec::new();
    for (cluster_bits, orders) in [(9, 0..=6), (12, 4..=4), (16, 0..=6), (21, 4..=4)] {
        for order in orders {
            let name = format!(
                "clusters of 2^{cluster_bits}, refcounts of {} bits",
                1 << order
            );
            let builder = healthy(cluster_bits, order);
            images.extend(damaged(&builder, &name, DAMAGES));
            if order > 0 {
                images.extend(damaged(&builder, &name, WIDE_DAMAGES));
            }
        }
    }
    let old = healthy(16, 4).version_2();
    let old = ImageBuilder {
        bitmaps: Vec::new(),
        clusters: old.clusters.clone(),
        ..old
    };
    let old = old
        .cluster(4, Cluster::Unallocated)
        .cluster(5, Cluster::Unallocated);
    images.extend(damaged(&old, "version 2", &DAMAGES[..9]));
    compare_all(images);
}

#[test]
fn images_made_by_qemu_are_judged_as_by_qemu() {
    require_qemu!();
    // Without its base QEMU cannot open the overlay.
    let skipped = ["overlay"];
    let names = golden::names().filter(|name| !skipped.contains(name));
    compare_all(names.map(|name| (name.to_owned(), golden::load(name))));
    let overlay = report(&golden::load("overlay"));
    assert_eq!(
        i32::from(overlay.exit_code()),
        golden::facts("overlay").check_exit
    );
}

/// Every word of the metadata of images made by QEMU, changed one at a time.
#[test]
fn snapshots_and_compressed_images_with_random_damage_count_as_in_qemu() {
    require_qemu!();
    let mut images = Vec::new();
    for name in [
        "snapshot",
        "compressed",
        "zstd",
        "refcount-64",
        "small-clusters",
    ] {
        let bytes = golden::load(name);
        let words: Vec<usize> = (0..bytes.len() / 8)
            .filter(|word| *word >= 64 && is_pointer(&bytes, word * 8))
            .collect();
        let mut random = Random::new(17);
        for _ in 0..60 {
            let at = words[random_index(&mut random, words.len())] * 8;
            let mut damaged = bytes.clone();
            match random.within(0..4) {
                0 => damaged[at..at + 8].fill(0),
                1 => damaged[at] ^= 0x80,
                2 => damaged[at + 5] ^= 1 << random.within(0..8),
                _ => damaged[at + 2] ^= 0x10,
            }
            images.push((format!("{name} changed at {at}"), damaged));
        }
    }
    compare_all(images);
}

/// Whether a word looks like a table entry that names a cluster of the file.
fn is_pointer(bytes: &[u8], at: usize) -> bool {
    let entry = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let cluster = 1_u64 << bytes[23];
    let offset = entry & 0x00FF_FFFF_FFFF_FE00;
    offset != 0 && offset % cluster == 0 && offset < u64::try_from(bytes.len()).unwrap()
}

fn random_index(random: &mut Random, len: usize) -> usize {
    usize::try_from(random.within(0..u64::try_from(len).unwrap())).unwrap()
}

/// So many tables that they are counted on several threads.
#[test]
fn many_tables_with_random_damage_count_as_in_qemu() {
    require_qemu!();
    let mut builder = ImageBuilder::new(100 * 64 * 512).cluster_bits(9);
    for table in 0..100 {
        for slot in [0, 1, 2, 17, 63] {
            let cluster = match (table + slot) % 29 {
                0 => Cluster::ZeroAllocated(vec![3; 512]),
                1 => Cluster::Zero,
                _ => Cluster::Data(vec![4; 512]),
            };
            builder = builder.cluster(table * 64 + slot, cluster);
        }
    }
    let bytes = builder.build().bytes;
    let words: Vec<usize> = (0..bytes.len() / 8)
        .filter(|word| *word >= 64 && is_pointer(&bytes, word * 8))
        .collect();
    let mut random = Random::new(23);
    let mut images = vec![("healthy".to_owned(), bytes.clone())];
    for number in 0..60 {
        let mut damaged = bytes.clone();
        for _ in 0..number % 3 + 1 {
            let at = words[random_index(&mut random, words.len())] * 8;
            match random.within(0..5) {
                0 => damaged[at..at + 8].fill(0),
                1 => damaged[at] ^= 0x80,
                2 => damaged[at + 5] ^= 1 << random.within(1..8),
                3 => damaged[at + 7] ^= 2,
                _ => damaged[at + 2] ^= 0x10,
            }
        }
        images.push((format!("many tables, damage {number}"), damaged));
    }
    assert!(words.len() > 500);
    compare_all(images);
}
