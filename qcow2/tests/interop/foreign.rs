//! What is not ours survives us: extensions, feature bits, header fields, names, bitmaps.

use std::collections::BTreeMap;

use tidemark_fixtures::builder::{Bitmap, Chunk, Cluster, Extension, ImageBuilder};
use tidemark_fixtures::corrupt::{get_u32, get_u64, set_u64};
use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::chain::{Reading, Scheme};
use tidemark_qcow2::{Damage, Error, Image, proof};

use super::common::{add_bitmap, open_file, read_all, reading, try_open_file, writing};
use super::{Desk, to_u64, to_usize};

const SIZE: u64 = 4 << 20;
const COMPATIBLE: u64 = 1 << 7 | 1 << 40;
const UNKNOWN_AUTOCLEAR: u64 = 1 << 5 | 1 << 33;
const BITMAPS: u32 = 0x2385_2875;
const CHAIN: u32 = 0x5449_4445;

/// What must not change: compatible bits, fields behind byte 112, every foreign extension.
#[derive(Debug, PartialEq)]
struct Foreign {
    compatible: u64,
    fields: Vec<u8>,
    extensions: BTreeMap<u32, Vec<Vec<u8>>>,
}

impl Foreign {
    fn of(bytes: &[u8]) -> Self {
        let length = to_usize(get_u32(bytes, 100).into());
        let mut extensions: BTreeMap<u32, Vec<Vec<u8>>> = BTreeMap::new();
        let mut at = length;
        loop {
            let (kind, len) = (get_u32(bytes, to_u64(at)), get_u32(bytes, to_u64(at) + 4));
            let len = to_usize(len.into());
            match kind {
                0 => break,
                BITMAPS | CHAIN => {}
                _ => extensions
                    .entry(kind)
                    .or_default()
                    .push(bytes[at + 8..at + 8 + len].to_vec()),
            }
            at += 8 + len.next_multiple_of(8);
        }
        let fields = bytes[112..length].to_vec();
        Self {
            compatible: get_u64(bytes, 80),
            fields,
            extensions,
        }
    }
}

/// An image with unknown extensions and feature bits, and a foreign bitmap with odd bits.
fn foreign_image(cluster_bits: u32) -> Vec<u8> {
    let cluster = 1_usize << cluster_bits;
    let mut builder = ImageBuilder::new(SIZE)
        .cluster_bits(cluster_bits)
        .cluster(1, Cluster::Data(vec![0x11; cluster]))
        .extension(Extension::new(0x1122_3344, b"unknown, odd length!!"))
        .extension(Extension::new(0x0bad_cafe, &[0xff; 40]))
        .extension(Extension::feature_names(&[
            (1, 7, b"a bit of ours"),
            (2, 5, b"odd autoclear"),
        ]))
        .extension(Extension::new(0x5566_7788, &[]))
        .bitmap(
            Bitmap::new("foreign", 16)
                .flags(0)
                .table(vec![Chunk::Bits(vec![0xa5, 0x5a, 0, 0x81, 0, 0, 0, 0x7e])]),
        );
    builder.compatible = COMPATIBLE;
    builder.header_length = 128;
    let mut image = builder.build().bytes;
    image[112..128].copy_from_slice(b"fields of others");
    image
}

fn autoclear(desk: &Desk) -> u64 {
    get_u64(&desk.bytes(), 88)
}

#[test]
fn foreign_content_survives() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut steps = 0;
    for cluster_bits in [11, 12, 16, 21] {
        let desk = Desk::new();
        std::fs::write(&desk.path, foreign_image(cluster_bits)).unwrap();
        desk.assert_clean();
        let foreign = Foreign::of(&desk.bytes());
        let sha = image_bits::bitmap(&desk.bytes(), "foreign")
            .unwrap()
            .unwrap()
            .sha256();
        let mut check = |step: &str| {
            let bytes = desk.bytes();
            assert_eq!(Foreign::of(&bytes), foreign, "2^{cluster_bits}: {step}");
            let bitmap = image_bits::bitmap(&bytes, "foreign").unwrap().unwrap();
            assert!(!bitmap.auto && !bitmap.in_use, "2^{cluster_bits}: {step}");
            assert_eq!(bitmap.sha256(), sha, "2^{cluster_bits}: {step}");
            desk.assert_clean();
            steps += 1;
        };
        desk.session(|image| image.write(&[1; 5000], 100_000).unwrap());
        check("a guest write");
        desk.session(|image| add_bitmap(image, "ours", 65536));
        check("a bitmap added");
        desk.session(|image| image.write(&[2; 5000], 200_000).unwrap());
        check("a tracked write");
        desk.session(|image| {
            image
                .update::<_, Error>(|update| {
                    update.set_record(Some(proof::fresh_record(Scheme::Intervals).unwrap()));
                    Ok(())
                })
                .unwrap();
        });
        check("a chain record");
        desk.session(|image| {
            image
                .update(|update| update.set_recording("ours", false))
                .unwrap()
        });
        check("a change in our own layout");
        assert!(matches!(desk.look(Image::chain), Reading::Current(_)));
        desk.session(|image| {
            image
                .update(|update| {
                    update.set_record(None);
                    update.remove("ours")
                })
                .unwrap();
        });
        check("everything of ours removed");
    }
    println!("{steps} rewrites of headers with foreign content");
}

#[test]
fn foreign_content_survives_in_qemus_order_too() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = Desk::new();
    std::fs::write(&desk.path, foreign_image(16)).unwrap();
    desk.session(|image| {
        image
            .update::<_, Error>(|update| {
                update.set_record(Some(proof::fresh_record(Scheme::Intervals).unwrap()));
                Ok(())
            })
            .unwrap();
    });
    for round in 0..4 {
        qemu_io::commands(&desk.path, &["write -P 7 1M 4k"]);
        // QEMU writes its own feature names, and keeps the rest.
        let foreign = Foreign::of(&desk.bytes());
        assert_eq!(foreign.extensions[&0x0bad_cafe], [[0xff; 40]]);
        assert_eq!(foreign.fields, b"fields of others");
        desk.session(|image| add_bitmap(image, &format!("b{round}"), 65536));
        assert_eq!(Foreign::of(&desk.bytes()), foreign, "round {round}");
        desk.assert_clean();
        assert!(matches!(desk.look(Image::chain), Reading::Current(_)));
    }
}

#[test]
fn unknown_autoclear_bits_are_cleared_by_the_first_guest_write_and_not_before() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut cases = 0;
    for (cluster_bits, with_bitmaps) in
        [(9, false), (12, true), (16, true), (16, false), (21, true)]
    {
        let known = u64::from(with_bitmaps);
        let mut bytes = if with_bitmaps {
            foreign_image(cluster_bits)
        } else {
            ImageBuilder::new(SIZE)
                .cluster_bits(cluster_bits)
                .build()
                .bytes
        };
        set_u64(&mut bytes, 88, UNKNOWN_AUTOCLEAR | known);
        let desk = Desk::new();
        std::fs::write(&desk.path, &bytes).unwrap();
        desk.look(read_all);
        assert_eq!(
            autoclear(&desk),
            UNKNOWN_AUTOCLEAR | known,
            "cleared by reading"
        );
        desk.session(|image| image.flush().unwrap());
        assert_eq!(
            autoclear(&desk),
            UNKNOWN_AUTOCLEAR | known,
            "cleared by open and close"
        );
        assert!(desk.bytes() == bytes);
        let image = open_file(&desk.path, writing());
        image.write(&[1; 512], 4096).unwrap();
        assert_eq!(autoclear(&desk), known, "not cleared by the first write");
        image.close().unwrap();
        assert_eq!(autoclear(&desk), known);
        desk.assert_clean();
        cases += 1;
    }
    println!("{cases} images with unknown autoclear bits");
}

/// Without its autoclear bit the extension is stale: its clusters may belong to somebody else.
#[test]
fn a_cleared_autoclear_bit_makes_bitmaps_vanish_for_good() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    for cluster_bits in [12, 16] {
        let mut bytes = foreign_image(cluster_bits);
        set_u64(&mut bytes, 88, 0);
        let desk = Desk::new();
        std::fs::write(&desk.path, &bytes).unwrap();
        desk.look(|image| {
            assert_eq!(image.bitmaps().unwrap(), []);
            assert!(image.load_bitmap("foreign").is_err());
        });
        let old_directory = image_bits::bitmaps(&foreign_image(cluster_bits)).unwrap();
        assert_eq!(old_directory.len(), 1);
        desk.session(|image| image.write(&[9; 40_000], 1 << 20).unwrap());
        assert_eq!(
            autoclear(&desk),
            0,
            "a guest write brought stale bitmaps back"
        );
        assert_eq!(desk.look(|image| image.bitmaps().unwrap()), []);
        qemu_img::check(&desk.path).assert_at_worst_leaks();
        // A new bitmap replaces the stale extension and finds none of the old ones.
        desk.session(|image| add_bitmap(image, "new", 65536));
        let infos = desk.look(|image| image.bitmaps().unwrap());
        assert_eq!(infos.len(), 1);
        assert_eq!(infos[0].name, "new");
        qemu_img::check(&desk.path).assert_at_worst_leaks();
        let info = qemu_img::info(&desk.path);
        assert_eq!(info["format-specific"]["data"]["bitmaps"][0]["name"], "new");
    }
}

/// Clusters that a stale directory names may hold guest data by now: nothing of it is freed.
#[test]
fn clusters_of_stale_bitmaps_are_never_freed() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = Desk::new();
    let builder = ImageBuilder::new(SIZE)
        .bitmap(Bitmap::new("stale", 16).table(vec![Chunk::Bits(vec![0xff; 8])]));
    let built = builder.build();
    let directory = built.get("bitmaps.directory_offset");
    let mut bytes = built.bytes;
    set_u64(&mut bytes, 88, 0);
    std::fs::write(&desk.path, &bytes).unwrap();
    desk.session(|image| {
        image.write(&[3; 200_000], 0).unwrap();
        add_bitmap(image, "new", 65536);
        image.update(|update| update.remove("new")).unwrap();
        image.write(&[4; 200_000], 1 << 20).unwrap();
    });
    let range = to_usize(directory)..to_usize(directory) + 64;
    assert!(
        desk.bytes()[range.clone()] == bytes[range],
        "the old directory was overwritten"
    );
    qemu_img::check(&desk.path).assert_at_worst_leaks();
}

#[test]
fn an_unreadable_directory_refuses_a_writable_open_and_allows_reading() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut cases = 0;
    let built = ImageBuilder::new(SIZE)
        .cluster(2, Cluster::Data(vec![0x33; 65536]))
        .bitmap(Bitmap::new("b", 16))
        .build();
    for (field, value) in [
        ("bitmaps.directory_offset", 1 << 40),
        ("bitmaps.nb_bitmaps", 2),
        ("bitmaps.directory_size", 24),
        ("bitmaps.directory_size", 64),
    ] {
        let mut broken = built.clone();
        broken.set(field, value);
        let desk = Desk::new();
        std::fs::write(&desk.path, &broken.bytes).unwrap();
        let error = try_open_file(&desk.path, writing()).unwrap_err();
        assert!(
            matches!(error, Error::Corrupt { .. }),
            "{field} = {value}: {error}"
        );
        let image = open_file(&desk.path, reading());
        assert!(
            read_all(&image)[2 << 16..3 << 16]
                .iter()
                .all(|&byte| byte == 0x33)
        );
        let damage = image.bitmaps().unwrap_err();
        assert!(
            matches!(
                damage.damage(),
                Some(
                    Damage::BitmapDirectory { .. }
                        | Damage::Truncated { .. }
                        | Damage::Place { .. }
                )
            ),
            "{field} = {value}: {damage}"
        );
        drop(image);
        assert!(desk.bytes() == broken.bytes, "a refused image was changed");
        assert!(!qemu_img::run(&["info", desk.path.to_str().unwrap()]).success());
        cases += 1;
    }
    println!("{cases} unreadable directories");
}
