//! What we write QEMU reads, and the other way round: contents, mapping, check.

use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::{golden, require_qemu};
use tidemark_qcow2::BackingReference;

use super::common::{create_file, open_bytes, open_file, read_all, reading, writing};
use super::{Desk, Run, fill, map_of, operate, options, qemu_map, qemu_operates, to_usize};

const SIZE: u64 = (5 << 20) + 512;

/// What lies below an image: nothing, or a file of a format and size.
type Below = Option<(&'static str, u64)>;

/// Writes the backing file and returns what the overlay shows before any write.
fn lay_below(desk: &Desk, below: Below) -> (Option<BackingReference>, Vec<u8>) {
    let mut content = vec![0; to_usize(SIZE)];
    let Some((format, size)) = below else {
        return (None, content);
    };
    let name = format!("base.{format}");
    let mut data = fill(7, size);
    data[100_000..700_000].fill(0);
    let raw = desk.beside("base.raw");
    std::fs::write(&raw, &data).unwrap();
    if format == "qcow2" {
        let extended = ["-o", "cluster_size=16k,extended_l2=on"];
        qemu_img::convert(&raw, "raw", &desk.beside(&name), "qcow2", &extended);
    }
    let shown = data.len().min(content.len());
    content[..shown].copy_from_slice(&data[..shown]);
    let reference = BackingReference {
        name: name.into_bytes(),
        format: format.to_owned(),
    };
    (Some(reference), content)
}

#[test]
fn data_and_mapping_are_the_same_for_both_in_turns() {
    require_qemu!();
    let _turn = super::common::alone();
    let belows: [Below; 4] = [
        None,
        Some(("qcow2", 7 << 20)),
        Some(("qcow2", (3 << 20) + 1536)),
        Some(("raw", 7 << 20)),
    ];
    let mut cases = 0;
    for cluster_bits in [14, 16, 18, 21] {
        for below in belows {
            let what = format!("clusters 2^{cluster_bits} over {below:?}");
            let desk = Desk::new();
            let mut random = Random::stream(11, cases);
            let (backing, mut model) = lay_below(&desk, below);
            let mut options = options(cluster_bits, SIZE);
            options.backing = backing;
            let image = create_file(&desk.path, &options);
            operate(&image, &mut model, &mut random, 16);
            image.close().unwrap();
            desk.assert_same(&model, &what);
            for _ in 0..2 {
                qemu_operates(&desk.path, &mut model, &mut random, 1 << cluster_bits);
                desk.assert_same(&model, &what);
                desk.session(|image| {
                    assert!(read_all(image) == model, "{what}: QEMU's writes");
                    operate(image, &mut model, &mut random, 16);
                    assert!(read_all(image) == model, "{what}: our own writes");
                });
                desk.assert_same(&model, &what);
            }
            cases += 1;
        }
    }
    println!("{cases} shapes of image");
    assert!(cases >= 16, "too few shapes");
}

/// Images that QEMU made in every way that it has, by the commands that made them.
#[test]
fn images_made_by_qemu_are_read_mapped_and_written() {
    require_qemu!();
    let _turn = super::common::alone();
    let mut cases = 0;
    for cluster in ["16k", "64k", "2M"] {
        for preallocation in ["off", "metadata", "falloc", "full"] {
            let desk = Desk::new();
            let what = format!("clusters of {cluster}, preallocation={preallocation}");
            let extended = [
                ("extended_l2", "on"),
                ("cluster_size", cluster),
                ("preallocation", preallocation),
            ];
            qemu_img::create(&desk.path, SIZE, &extended);
            let script = [
                "write -P 1 0 4k",
                "write -P 2 70k 3k",
                "write -z 64k 2k",
                "write -P 3 1M 300k",
                "write -z 1030k 100k",
                "write -z -u 1200k 128k",
                "discard 1M 64k",
                "write -P 4 4M 1M",
                "discard 4M 1M",
                "write -P 5 5120k 512",
            ];
            qemu_io::commands(&desk.path, &script);
            let mut model = qemu_img::convert_to_raw(&desk.path);
            desk.assert_same(&model, &what);
            let mut random = Random::stream(5, cases);
            desk.session(|image| operate(image, &mut model, &mut random, 16));
            desk.assert_same(&model, &what);
            cases += 1;
        }
    }
    println!("{cases} images made by QEMU");
    assert!(cases >= 12, "too few images");
}

#[test]
fn the_golden_image_reads_as_qemu_said() {
    let image = open_bytes(golden::load("extended-l2"), reading()).unwrap();
    let facts = golden::facts("extended-l2");
    let content = read_all(&image);
    assert_eq!(
        tidemark_fixtures::image_bits::sha256_hex(&content),
        facts.guest_sha256
    );
    assert!(image.check().unwrap().is_clean());
}

/// A whole chain: the runs of every layer are told apart subcluster by subcluster.
#[test]
fn a_chain_of_subclusters_maps_as_in_qemu() {
    require_qemu!();
    let _turn = super::common::alone();
    let desk = Desk::new();
    let extended = [("extended_l2", "on")];
    let base = desk.beside("base.qcow2");
    qemu_img::create(&base, 1 << 20, &extended);
    qemu_io::commands(&base, &["write -P 1 0 512k"]);
    let middle = desk.beside("middle.qcow2");
    let name = base.display().to_string();
    let over = |below: &str| {
        [
            ("extended_l2", "on".to_owned()),
            ("backing_file", below.to_owned()),
            ("backing_fmt", "qcow2".to_owned()),
        ]
    };
    let create = |path: &std::path::Path, below: &str| {
        let options = over(below);
        let options: Vec<_> = options.iter().map(|(k, v)| (*k, v.as_str())).collect();
        qemu_img::create(path, 1 << 20, &options);
    };
    create(&middle, &name);
    qemu_io::commands(
        &middle,
        &["write -P 2 2k 6k", "write -z 12k 8k", "write -P 3 500k 40k"],
    );
    create(&desk.path, &middle.display().to_string());
    qemu_io::commands(&desk.path, &["write -P 4 4k 2k", "write -z 508k 10k"]);
    let theirs = qemu_map(&desk.path);
    let image = open_file(&desk.path, reading());
    assert_eq!(map_of(&image), theirs);
    let depths: std::collections::BTreeSet<u64> = theirs.iter().map(|run: &Run| run.2).collect();
    assert_eq!(depths.len(), 3, "all layers show");
    println!("{} runs", theirs.len());
}

/// Four kilobytes into a cluster of 64 write four kilobytes, also over a backing file.
#[test]
fn a_small_write_fills_only_the_subclusters_that_it_touches() {
    let desk = Desk::new();
    std::fs::write(desk.beside("base.raw"), fill(3, 1 << 20)).unwrap();
    let mut options = options(16, 1 << 20);
    options.backing = Some(BackingReference {
        name: b"base.raw".to_vec(),
        format: "raw".to_owned(),
    });
    create_file(&desk.path, &options).close().unwrap();
    let storage = tidemark_fixtures::storage::CrashStorage::new(std::fs::read(&desk.path).unwrap());
    let base = tidemark_qcow2::Image::open_unbacked(Box::new(storage.clone()), true).unwrap();
    // Aligned writes need nothing from below: it is not even open.
    base.write(&[1; 4096], 8192).unwrap();
    base.write(&[2; 4096], 16384).unwrap();
    base.write_zeroes(4096, 2048).unwrap();
    base.close().unwrap();
    std::fs::write(&desk.path, storage.to_bytes()).unwrap();
    let image = open_file(&desk.path, reading());
    let layers: Vec<(u64, u64, u64)> = image
        .map(0, 65536)
        .unwrap()
        .iter()
        .map(|extent| (extent.start, extent.length, extent.depth))
        .collect();
    let expected = [
        (0, 4096, 1),
        (4096, 2048, 0),
        (6144, 2048, 1),
        (8192, 4096, 0),
        (12288, 4096, 1),
        (16384, 4096, 0),
        (20480, 45056, 1),
    ];
    assert_eq!(layers, expected);
    drop(image);
    let _ = writing();
}
