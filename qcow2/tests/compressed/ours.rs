//! Images whose compressed clusters we wrote, and what becomes of them.

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_qcow2::{CompressionType, CreateOptions, Extent, Image, Mistake};

use crate::common::{add_bitmap, assert_covers, built, open_bytes, read_all, reading, writing};
use crate::{KINDS, disk, noise, text, to_u64, to_usize};

/// Checks an image by ourselves and by QEMU, and its content by both.
pub(crate) fn assert_sound(bytes: Vec<u8>, content: &[u8], what: &str) -> u64 {
    let image = open_bytes(bytes.clone(), reading()).unwrap();
    assert!(read_all(&image) == content, "{what}: we read other bytes");
    let report = image.check().unwrap();
    assert!(report.is_clean(), "{what}: {:?}", report.findings);
    if oracle::available() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ours.qcow2");
        std::fs::write(&path, bytes).unwrap();
        let check = qemu_img::check(&path);
        check.assert_clean();
        let compressed = check.count("compressed-clusters");
        assert_eq!(compressed, report.compressed_clusters, "{what}");
        assert!(
            qemu_img::convert_to_raw(&path) == content,
            "{what}: QEMU reads other bytes"
        );
    }
    report.compressed_clusters
}

fn options(
    kind: CompressionType,
    cluster_bits: u32,
    refcount_bits: u32,
    size: usize,
) -> CreateOptions {
    CreateOptions {
        compression_type: kind,
        cluster_bits,
        refcount_bits,
        ..CreateOptions::new(to_u64(size))
    }
}

#[test]
fn every_cluster_size_and_refcount_width_that_we_compress_qemu_reads() {
    let mut cases = 0;
    let mut run = |kind, cluster_bits, refcount_bits| {
        // The end of the disk cuts a cluster.
        let content = disk(
            u64::from(cluster_bits),
            (600_usize << 10) + (3_usize << cluster_bits) - 512,
        );
        let options = options(kind, cluster_bits, refcount_bits, content.len());
        let bytes = built(&options, |image| {
            let piece = (64 << 10).max(1 << cluster_bits);
            for (number, piece) in content.chunks(piece).enumerate() {
                let at = to_u64(number * (64 << 10).max(1 << cluster_bits));
                image.write_compressed(piece, at).unwrap();
            }
            assert!(read_all(image) == content);
        });
        let what = format!("{kind:?} 2^{cluster_bits} refcounts {refcount_bits}");
        let stored = bytes.len();
        let compressed = assert_sound(bytes, &content, &what);
        assert!(compressed > 0, "{what}");
        // Clusters that share none with each other save nothing.
        if refcount_bits > 2 && (12..=16).contains(&cluster_bits) {
            assert!(stored < content.len() * 3 / 4, "{what}: {stored}");
        }
        cases += 1;
    };
    for kind in KINDS {
        for cluster_bits in 9..=21 {
            run(kind, cluster_bits, 16);
        }
        for refcount_bits in [1, 2, 4, 8, 32, 64] {
            run(kind, 12, refcount_bits);
            run(kind, 16, refcount_bits);
        }
    }
    println!("{cases} kinds of compressed image made by us");
    assert!(cases >= 50);
}

/// The host clusters of every guest cluster, as the map shows them: compressed ones by kind only.
fn kinds(image: &Image) -> Vec<(bool, bool)> {
    let extents = image.map(0, image.size()).unwrap();
    let of = |extent: &Extent| (extent.compressed, extent.data);
    extents.iter().map(of).collect()
}

#[test]
fn clusters_are_packed_and_each_one_frees_only_its_own_part() {
    for (kind, refcount_bits) in KINDS
        .into_iter()
        .flat_map(|kind| [(kind, 1), (kind, 2), (kind, 16)])
    {
        let cluster = 65_536;
        let mut content = text(5, 40 * cluster);
        let bytes = built(&options(kind, 16, refcount_bits, content.len()), |image| {
            image.write_compressed(&content, 0).unwrap();
            assert_eq!(kinds(image), [(true, true)]);
            image.flush().unwrap();
            // Every third one goes, in four ways; its neighbours share its host clusters.
            for number in (0..40).step_by(3) {
                let range = number * cluster..(number + 1) * cluster;
                let (at, len) = (to_u64(range.start), to_u64(cluster));
                match number % 4 {
                    0 => {
                        content[range.start + 7..range.start + 5007].fill(0xc1);
                        image.write(&[0xc1; 5000], at + 7).unwrap();
                    }
                    1 => {
                        content[range].fill(0);
                        image.write_zeroes(at, len).unwrap();
                    }
                    2 => {
                        content[range].fill(0);
                        image.discard(at, len).unwrap();
                    }
                    _ => {
                        content[range.clone()].copy_from_slice(&text(99, cluster));
                        image.write_compressed(&content[range], at).unwrap();
                    }
                }
                if number % 2 == 0 {
                    image.flush().unwrap();
                }
            }
            assert!(read_all(image) == content);
        });
        assert_sound(
            bytes,
            &content,
            &format!("{kind:?} refcounts {refcount_bits}"),
        );
    }
}

#[test]
fn what_does_not_shrink_is_stored_as_it_is() {
    for kind in KINDS {
        let content = noise(3, 1 << 20);
        let bytes = built(&options(kind, 16, 16, content.len()), |image| {
            image.write_compressed(&content, 0).unwrap();
        });
        assert_eq!(assert_sound(bytes, &content, "noise"), 0);
    }
}

#[test]
fn bitmaps_hold_every_compressed_write() {
    let size = 8 << 20;
    let mut content = vec![0; size];
    let bytes = built(&options(CompressionType::Zstd, 16, 16, size), |image| {
        image.write(&text(1, 200_000), 3 << 20).unwrap();
        add_bitmap(image, "b", 65_536);
        for at in [0, 3 << 20, 5 << 20] {
            image.write_compressed(&text(7, 128 << 10), at).unwrap();
        }
        content = read_all(image);
    });
    let before = {
        let mut before = vec![0; size];
        before[3 << 20..][..200_000].copy_from_slice(&text(1, 200_000));
        before
    };
    let image = open_bytes(bytes.clone(), reading()).unwrap();
    let bits = image.load_bitmap("b").unwrap();
    assert_covers(&bits, &before, &content, "compressed writes");
    assert_eq!(bits.count(), 6);
    assert_sound(bytes, &content, "with a bitmap");
}

#[test]
fn only_whole_clusters_inside_the_disk_are_taken() {
    let bytes = built(&options(CompressionType::Zlib, 16, 16, 200_192), |_| {});
    let image = open_bytes(bytes.clone(), writing()).unwrap();
    let mistake = |data: usize, at: u64| {
        let error = image.write_compressed(&vec![1; data], at).unwrap_err();
        error.mistake().unwrap().clone()
    };
    let cut = |offset, end| Mistake::NotWholeClusters {
        offset,
        end,
        cluster: 65_536,
    };
    assert_eq!(mistake(65_536, 512), cut(512, 66_048));
    assert_eq!(mistake(512, 0), cut(0, 512));
    assert_eq!(mistake(70_000, 0), cut(0, 70_000));
    assert!(matches!(
        mistake(65_536, 196_608),
        Mistake::OutOfRange { .. }
    ));
    image.write_compressed(&[], 0).unwrap();
    image.write_compressed(&[2; 3584], 196_608).unwrap();
    let other = built(&options(CompressionType::Zstd, 16, 16, 65_536), |_| {});
    let other = open_bytes(other, reading()).unwrap();
    let packed = other.packer(None).pack(&[1; 65_536]);
    assert!(
        image
            .write_packed(&packed, 0)
            .unwrap_err()
            .mistake()
            .is_some()
    );
    let read_only = open_bytes(bytes, reading()).unwrap();
    let refused = read_only.write_compressed(&[1; 65_536], 0).unwrap_err();
    assert_eq!(refused.mistake(), Some(&Mistake::ReadOnly));
}

#[test]
fn the_compression_type_survives_every_change_of_the_header() {
    let size = 4 << 20;
    let mut content = text(8, size);
    let mut bytes = built(&options(CompressionType::Zstd, 16, 16, size), |image| {
        image.write_compressed(&content, 0).unwrap();
    });
    let made_by = |bytes: &[u8]| {
        let image = open_bytes(bytes.to_vec(), reading()).unwrap();
        assert_eq!(image.compression_type(), CompressionType::Zstd);
        assert_eq!(image.header().incompatible & 8, 8);
    };
    made_by(&bytes);
    for round in 0..4 {
        let storage = tidemark_fixtures::storage::CrashStorage::new(bytes);
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        add_bitmap(&image, &format!("b{round}"), 65_536);
        let fresh = text(round, 65_536);
        content[to_usize(round) << 16..][..65_536].copy_from_slice(&fresh);
        image.write_compressed(&fresh, round << 16).unwrap();
        image.close().unwrap();
        bytes = storage.to_bytes();
        made_by(&bytes);
    }
    assert_sound(bytes, &content, "zstd");
}
