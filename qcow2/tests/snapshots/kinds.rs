//! Snapshots over every kind of cluster that QEMU makes: compressed, with subclusters, both; and
//! where there can be none, in an external data file.

use tidemark_fixtures::oracle::{process, qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{Feature, Moment};

use crate::common::{alone, open_file, read_all, writing};
use crate::delta::assert_deltas;
use crate::life::{Disk, MIB, Place, qemu_writes, text};
use crate::turns::{assert_both_read, our_writes};

const COMPRESSED: [&str; 6] = [
    "compression_type=zlib",
    "compression_type=zstd",
    "compression_type=zlib,cluster_size=512",
    "compression_type=zstd,cluster_size=4096,refcount_bits=32",
    "compression_type=zlib,extended_l2=on",
    "compression_type=zstd,extended_l2=on,cluster_size=16384",
];

/// An image that QEMU compressed, of words that repeat.
fn compressed(place: &Place, options: &str, random: &mut Random) -> Disk {
    let mut disk = Disk::new(2 * MIB + 512);
    for _ in 0..12 {
        let (offset, len) = disk.range(random);
        let byte = u8::try_from(random.within(1..255)).unwrap();
        disk.fill(offset, len, byte);
    }
    let raw = place.beside("source");
    std::fs::write(&raw, &disk.content).unwrap();
    qemu_img::convert(&raw, "raw", &place.path, "qcow2", &["-c", "-o", options]);
    disk
}

#[test]
fn snapshots_and_deltas_over_clusters_that_qemu_compressed() {
    let _alone = alone();
    require_qemu!();
    let (mut moments, mut pairs) = (0, 0);
    for (seed, options) in (40..).zip(COMPRESSED) {
        let place = Place::new();
        let mut random = Random::new(seed);
        let mut disk = compressed(&place, options, &mut random);
        let theirs = |disk: &mut Disk, flag: &str, name: &str| {
            qemu_img::ok(&["snapshot", "-q", flag, name, text(&place.path)]);
            if flag == "-c" {
                disk.take(name);
            }
        };
        theirs(&mut disk, "-c", "first");
        qemu_writes(&place.path, &mut disk, &mut random, 4);
        let image = open_file(&place.path, writing());
        image.create_snapshot("second").unwrap();
        disk.take("second");
        our_writes(&image, &mut disk, &mut random, 4);
        image.close().unwrap();
        pairs += assert_deltas(&place.open(), &disk, options);
        moments += assert_both_read(&place, &disk, options);
        theirs(&mut disk, "-a", "first");
        disk.content = disk.snapshot("first").to_vec();
        qemu_writes(&place.path, &mut disk, &mut random, 2);
        let image = open_file(&place.path, writing());
        image.delete_snapshot("first").unwrap();
        disk.snapshots.remove(0);
        our_writes(&image, &mut disk, &mut random, 2);
        image.close().unwrap();
        pairs += assert_deltas(&place.open(), &disk, options);
        moments += assert_both_read(&place, &disk, options);
        theirs(&mut disk, "-d", "second");
        disk.snapshots.clear();
        moments += assert_both_read(&place, &disk, options);
    }
    println!("{moments} moments, {pairs} pairs of them");
    assert!(moments >= 36 && pairs >= 78, "{moments} {pairs}");
}

#[test]
fn a_delta_tells_what_moved_below_extended_entries() {
    let _alone = alone();
    require_qemu!();
    let place = Place::new();
    qemu_img::create(&place.path, 8 * MIB, &[("extended_l2", "on")]);
    let cluster = 65536;
    let subcluster = cluster / 32;
    qemu_io::commands(
        &place.path,
        &[
            "write -P 1 0 1M",
            &format!("write -P 2 2M {subcluster}"),
            &format!("write -P 3 3M {subcluster}"),
        ],
    );
    qemu_img::ok(&["snapshot", "-q", "-c", "old", text(&place.path)]);
    let mut wanted = Vec::new();
    // One subcluster of a whole cluster, beside one that was there, of a new cluster, to zero.
    for command in [
        format!("write -P 4 64k {subcluster}"),
        format!("write -P 5 {} {subcluster}", 2 * MIB + subcluster),
        format!("write -P 6 4M {subcluster}"),
        format!("write -z 3M {subcluster}"),
    ] {
        qemu_io::commands(&place.path, &[&command]);
        let at = match wanted.len() {
            0 => cluster,
            1 => 2 * MIB,
            2 => 4 * MIB,
            _ => 3 * MIB,
        };
        wanted.push(at..at + cluster);
        wanted.sort_by_key(|range| range.start);
        let delta = place.open().delta(Moment::Snapshot("old"), Moment::Present);
        let found: Vec<_> = delta.unwrap().changed.dirty_ranges().collect();
        assert_eq!(found, wanted, "{command}");
    }
    println!("{} changes, each a cluster", wanted.len());
}

#[test]
fn a_disk_with_an_external_data_file_has_no_snapshots() {
    let _alone = alone();
    require_qemu!();
    for raw in ["off", "on"] {
        let place = Place::new();
        let data = place.beside("data");
        let opts = [("data_file", text(&data)), ("data_file_raw", raw)];
        qemu_img::create(&place.path, MIB, &opts);
        qemu_io::commands(&place.path, &["write -P 1 0 64k"]);
        let before = (place.bytes(), std::fs::read(&data).unwrap());
        let theirs = process::run("qemu-img", &["snapshot", "-c", "a", text(&place.path)]);
        assert!(!theirs.success());
        let image = open_file(&place.path, writing());
        let error = image.create_snapshot("a").unwrap_err();
        assert!(matches!(error.feature(), Some(Feature::SnapshotOfDataFile)));
        let mistake = image.apply_snapshot("a").unwrap_err();
        assert!(mistake.mistake().is_some(), "{mistake}");
        assert!(image.delete_snapshot("a").is_err());
        assert!(image.snapshots().unwrap().is_empty());
        let same = image.delta(Moment::Present, Moment::Present).unwrap();
        assert!(same.changed.is_clean());
        assert!(read_all(&image)[..65536] == [1; 65536]);
        image.close().unwrap();
        let after = (place.bytes(), std::fs::read(&data).unwrap());
        assert!(before == after, "a refusal wrote");
    }
    println!("2 kinds of data file refused by both");
}
