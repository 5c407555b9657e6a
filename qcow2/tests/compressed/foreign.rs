//! Images whose compressed clusters QEMU wrote.

use std::path::Path;

use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::{golden, image_bits};

use crate::common::{open_bytes, open_file, read_all, reading, writing};
use crate::{disk, to_u64, to_usize};

/// `qemu-img convert -c` of a raw file.
fn converted(dir: &Path, content: &[u8], options: &str) -> std::path::PathBuf {
    let raw = dir.join("raw");
    std::fs::write(&raw, content).unwrap();
    let path = dir.join("qemu.qcow2");
    qemu_img::convert(&raw, "raw", &path, "qcow2", &["-c", "-o", options]);
    path
}

/// Reads at random places, small and large, and compares each piece.
fn read_around(path: &Path, content: &[u8], seed: u64) {
    let image = open_file(path, reading());
    let mut random = Random::new(seed);
    for _ in 0..60 {
        let start = random.within(0..to_u64(content.len()));
        let most = if random.one_in(3) { 300_000 } else { 3_000 };
        let len = random.within(1..most).min(to_u64(content.len()) - start);
        let mut piece = vec![0xee; to_usize(len)];
        image.read(&mut piece, start).unwrap();
        let start = to_usize(start);
        assert!(
            piece == content[start..start + piece.len()],
            "{start:#x} {len}"
        );
    }
}

#[test]
fn every_kind_of_image_that_qemu_compresses_reads_byte_for_byte() {
    tidemark_fixtures::require_qemu!();
    let _turn = crate::common::alone();
    let mut cases = 0;
    for kind in ["zlib", "zstd"] {
        for cluster_bits in 9..=21 {
            let refcount_bits = 1 << (cluster_bits % 7);
            // The end of the disk cuts a cluster.
            let content = disk(
                cluster_bits,
                (1_usize << 20) + (3_usize << cluster_bits.min(18)) - 512,
            );
            let cluster_size = 1 << cluster_bits;
            let options = format!(
                "compression_type={kind},cluster_size={cluster_size},refcount_bits={refcount_bits}"
            );
            let dir = tempfile::tempdir().unwrap();
            let path = converted(dir.path(), &content, &options);
            let compressed = qemu_img::check(&path).count("compressed-clusters");
            assert!(compressed > 0, "{options}");
            let image = open_file(&path, reading());
            assert!(read_all(&image) == content, "{options}");
            let report = image.check().unwrap();
            assert!(report.is_clean(), "{options}: {:?}", report.findings);
            assert_eq!(report.compressed_clusters, compressed, "{options}");
            drop(image);
            read_around(&path, &content, cluster_bits);
            cases += 1;
        }
    }
    let content = disk(1, 700_000 / 512 * 512);
    let dir = tempfile::tempdir().unwrap();
    let path = converted(dir.path(), &content, "compat=0.10");
    assert!(read_all(&open_file(&path, reading())) == content);
    cases += 1;
    println!("{cases} kinds of compressed image made by QEMU");
    assert!(cases >= 27);
}

#[test]
fn the_stored_compressed_images_of_qemu_read_as_it_said() {
    for name in ["compressed", "zstd"] {
        let image = open_bytes(golden::load(name), reading()).unwrap();
        let facts = golden::facts(name);
        assert_eq!(
            image_bits::sha256_hex(&read_all(&image)),
            facts.guest_sha256,
            "{name}"
        );
        assert!(image.check().unwrap().compressed_clusters > 0);
    }
}

#[test]
fn single_clusters_that_qemu_writes_compressed_are_read_and_overwritten() {
    tidemark_fixtures::require_qemu!();
    let _turn = crate::common::alone();
    let mut cases = 0;
    for (kind, cluster) in [
        ("zlib", 65_536_u64),
        ("zstd", 65_536),
        ("zstd", 4096),
        ("zlib", 512),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu.qcow2");
        let (size, bytes) = (2 << 20, cluster.to_string());
        qemu_img::create(
            &path,
            size,
            &[("cluster_size", &bytes), ("compression_type", kind)],
        );
        let mut content = vec![0; to_usize(size)];
        let mut commands = Vec::new();
        for number in [0, 1, 5, 9, 10, 31] {
            let at = number * cluster;
            commands.push(format!("write -c -P {} {at} {cluster}", number + 1));
            let byte = u8::try_from(number + 1).unwrap();
            content[to_usize(at)..to_usize(at + cluster)].fill(byte);
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu_io::commands(&path, &commands);
        let image = open_file(&path, writing());
        assert!(read_all(&image) == content);
        // A part of one, two whole ones, parts of two neighbours.
        for (start, len, byte) in [
            (cluster / 4, 100, 0x71),
            (5 * cluster, cluster, 0x72),
            (10 * cluster - 50, 100, 0x73),
        ] {
            let range = to_usize(start)..to_usize(start + len);
            content[range.clone()].fill(byte);
            image.write(&content[range], start).unwrap();
        }
        image.discard(31 * cluster, cluster).unwrap();
        content[to_usize(31 * cluster)..to_usize(32 * cluster)].fill(0);
        assert!(read_all(&image) == content);
        image.close().unwrap();
        qemu_img::check(&path).assert_clean();
        assert!(qemu_img::convert_to_raw(&path) == content);
        cases += 1;
    }
    println!("{cases} images that QEMU began");
}
