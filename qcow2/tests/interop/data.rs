//! Guest data, both ways.

use tidemark_fixtures::golden;
use tidemark_fixtures::ops::fill;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_qcow2::{BackingReference, CreateOptions, Error, Image};

use super::common::{add_bitmap, create_file, open_file, read_all, try_open_file, writing};
use super::{Desk, assert_content, operate, qemu_operates, to_u64, to_usize};

/// What lies below an image: nothing, or a file of a format and size.
type Below = Option<(&'static str, u64)>;

const SIZE: u64 = (5 << 20) + 512;
const SHORTER: u64 = (3 << 20) + 1536;
const LONGER: u64 = 7 << 20;

/// Writes the backing file and returns what the overlay shows before any write.
fn lay_below(desk: &Desk, below: Below) -> (Option<BackingReference>, Vec<u8>) {
    let mut content = vec![0; to_usize(SIZE)];
    let Some((format, size)) = below else {
        return (None, content);
    };
    let name = format!("base.{format}");
    let path = desk.beside(&name);
    let mut data = fill(7, size);
    data[100_000..700_000].fill(0);
    if format == "raw" {
        std::fs::write(&path, &data).unwrap();
    } else {
        let raw = desk.beside("base-content");
        std::fs::write(&raw, &data).unwrap();
        qemu_img::convert(&raw, "raw", &path, "qcow2", &["-o", "cluster_size=4096"]);
    }
    let shown = data.len().min(content.len());
    content[..shown].copy_from_slice(&data[..shown]);
    let reference = BackingReference {
        name: name.into_bytes(),
        format: format.to_owned(),
    };
    (Some(reference), content)
}

/// Alternates between us and QEMU on one new image and compares after each.
fn try_case(options: &mut CreateOptions, below: Below, seed: u64) {
    let what = format!(
        "version {}, clusters 2^{}, {}-bit refcounts, over {below:?}",
        options.version, options.cluster_bits, options.refcount_bits
    );
    let desk = Desk::new();
    let mut random = Random::new(seed);
    let (backing, mut model) = lay_below(&desk, below);
    options.backing = backing;
    let image = create_file(&desk.path, options);
    operate(&image, &mut model, &mut random, 12);
    image.close().unwrap();
    desk.assert_clean();
    assert_content(&desk, &model, &what);
    qemu_operates(&desk.path, &mut model, &mut random, 6);
    desk.session(|image| {
        assert!(
            read_all(image) == model,
            "{what}: we read QEMU's writes wrongly"
        );
        operate(image, &mut model, &mut random, 12);
        assert!(
            read_all(image) == model,
            "{what}: we read our own writes wrongly"
        );
    });
    desk.assert_clean();
    assert_content(&desk, &model, &what);
}

#[test]
fn guest_data_of_every_shape_of_image_is_the_same_for_qemu() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let belows: [Below; 5] = [
        None,
        Some(("qcow2", SHORTER)),
        Some(("qcow2", LONGER)),
        Some(("raw", SHORTER)),
        Some(("raw", LONGER)),
    ];
    let mut cases = 0;
    let mut run = |version, cluster_bits, refcount_bits, below| {
        cases += 1;
        let mut options = CreateOptions {
            version,
            cluster_bits,
            refcount_bits,
            ..CreateOptions::new(SIZE)
        };
        try_case(&mut options, below, cases);
    };
    for cluster_bits in [9, 12, 16, 21] {
        for (number, below) in belows.into_iter().enumerate() {
            run(2, cluster_bits, 16, below);
            run(3, cluster_bits, 1 << (number + 2), below);
        }
        for refcount_bits in [1, 2] {
            run(3, cluster_bits, refcount_bits, None);
        }
    }
    println!("{cases} shapes of image");
}

#[test]
fn every_cluster_size_works_for_both() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    for cluster_bits in 9..=21 {
        let mut options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(SIZE)
        };
        try_case(&mut options, None, cluster_bits.into());
    }
    println!("13 cluster sizes");
}

#[test]
fn images_created_by_qemu_take_our_writes() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut cases = 0;
    for (compat, cluster, extra) in [
        ("0.10", "65536", None),
        ("0.10", "512", None),
        ("1.1", "512", Some(("refcount_bits", "8"))),
        ("1.1", "65536", Some(("preallocation", "metadata"))),
        ("1.1", "4096", Some(("preallocation", "full"))),
        ("1.1", "65536", Some(("lazy_refcounts", "on"))),
        ("1.1", "2097152", Some(("refcount_bits", "1"))),
        ("1.1", "65536", Some(("compression_type", "zstd"))),
    ] {
        let desk = Desk::new();
        let mut options = vec![("compat", compat), ("cluster_size", cluster)];
        options.extend(extra);
        qemu_img::create(&desk.path, SIZE, &options);
        let what = format!("{options:?}");
        let mut model = vec![0; to_usize(SIZE)];
        let mut random = Random::stream(3, cases);
        qemu_operates(&desk.path, &mut model, &mut random, 5);
        desk.session(|image| operate(image, &mut model, &mut random, 12));
        desk.assert_clean();
        assert_content(&desk, &model, &what);
        qemu_operates(&desk.path, &mut model, &mut random, 5);
        desk.assert_clean();
        assert_content(&desk, &model, &what);
        cases += 1;
    }
    println!("{cases} kinds of image made by QEMU");
}

/// The refcount table moves while the header is in QEMU's order and its cluster nearly full.
#[test]
fn refcounts_outgrow_their_table_in_any_layout() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut cases = 0;
    for (cluster_bits, refcount_bits, name) in [
        (9, 64, "base"),
        (9, 64, &*format!("{}base", "./".repeat(140))),
        (9, 16, "base"),
    ] {
        let desk = Desk::new();
        let content = fill(9, SIZE);
        std::fs::write(desk.beside("base"), &content).unwrap();
        let backing = BackingReference {
            name: b"base".to_vec(),
            format: "raw".to_owned(),
        };
        let options = CreateOptions {
            cluster_bits,
            refcount_bits,
            backing: Some(backing),
            ..CreateOptions::new(SIZE)
        };
        let image = create_file(&desk.path, &options);
        add_bitmap(&image, "b", 65536);
        image.close().unwrap();
        qemu_img::rebase_unsafe(&desk.path, name, "raw");
        let mut model = content.clone();
        desk.session(|image| {
            for (number, chunk) in model.chunks_mut(100_000).enumerate() {
                let data = fill(to_u64(number), to_u64(chunk.len()));
                image.write(&data, to_u64(number * 100_000)).unwrap();
                chunk.copy_from_slice(&data);
            }
        });
        desk.assert_clean();
        assert_content(&desk, &model, name);
        super::assert_records(&desk, "b", &content, &model, name);
        qemu_operates(&desk.path, &mut model, &mut Random::new(1), 4);
        desk.assert_clean();
        assert_content(&desk, &model, name);
        cases += 1;
    }
    println!("{cases} tables outgrown");
}

/// Opens for writing, looks at everything, flushes and closes.
fn open_and_close(image: Image) {
    let infos = image.bitmaps().unwrap();
    for info in infos.iter().filter(|info| !info.in_use) {
        image.load_bitmap(&info.name).unwrap();
    }
    let mut first = [0; 512];
    match image.read(&mut first, 0) {
        Ok(()) | Err(Error::Unsupported { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    image.flush().unwrap();
    image.close().unwrap();
}

#[test]
fn open_and_close_without_a_write_leaves_every_byte() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let (mut opened, mut refused) = (0, 0);
    let mut judge = |desk: &Desk, what: &str| {
        let before = desk.bytes();
        match try_open_file(&desk.path, writing()) {
            Ok(image) => {
                opened += 1;
                open_and_close(image);
            }
            Err(Error::Unsupported { .. }) => refused += 1,
            Err(error) => panic!("{what}: {error}"),
        }
        assert!(desk.bytes() == before, "{what}: a byte changed");
    };
    for name in golden::names() {
        let desk = Desk::new();
        std::fs::write(&desk.path, golden::load(name)).unwrap();
        std::fs::write(desk.beside("base.qcow2"), golden::load("base")).unwrap();
        judge(&desk, name);
    }
    for cluster_bits in [9, 12, 16, 21] {
        let desk = Desk::new();
        let cluster = (1_u64 << cluster_bits).to_string();
        qemu_img::create(&desk.path, 4 << 20, &[("cluster_size", &cluster)]);
        qemu_img::bitmap_add(&desk.path, "recording", None);
        qemu_img::bitmap_add(&desk.path, "frozen", Some(512));
        qemu_io::commands(&desk.path, &["write -P 3 100k 300k"]);
        qemu_img::bitmap_disable(&desk.path, "frozen");
        judge(&desk, &format!("QEMU's image with clusters of {cluster}"));

        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(4 << 20)
        };
        let desk = Desk::new();
        let image = create_file(&desk.path, &options);
        add_bitmap(&image, "b", 65536);
        image.write(&[1; 70_000], 3000).unwrap();
        image.close().unwrap();
        judge(&desk, &format!("our image with clusters of {cluster}"));
        // Neither does a session that only failed to write.
        let image = open_file(&desk.path, writing());
        let before = desk.bytes();
        image.write(&[1; 512], 4 << 20).unwrap_err();
        image
            .update(|update| update.remove("no such bitmap"))
            .unwrap_err();
        image.close().unwrap();
        assert!(desk.bytes() == before, "a refused write left a trace");
        assert_eq!(
            to_u64(before.len()),
            std::fs::metadata(&desk.path).unwrap().len()
        );
    }
    println!("{opened} images opened for writing, {refused} refused");
    assert!(opened >= 16, "too few images can be opened for writing");
}
