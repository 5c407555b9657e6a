//! Damaged bitmap directories, which no tool of QEMU opens any more: what can be kept is kept, and
//! what is lost is named.

use tidemark_fixtures::builder::{
    BITMAP_AUTO, BITMAP_IN_USE, Bitmap, BuiltImage, Chunk, Cluster, ImageBuilder,
};
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_qcow2::check::{Loss, Repair};
use tidemark_qcow2::{Image, MemoryStorage, OpenOptions, Storage};

use crate::{checked, content, repaired};

fn builder() -> ImageBuilder {
    let data = |byte| Cluster::Data(vec![byte; 4096]);
    let bits = Chunk::Bits(vec![0x33; 1024]);
    ImageBuilder::new(4 << 20)
        .cluster_bits(12)
        .cluster(0, data(1))
        .cluster(1, data(2))
        .cluster(600, data(3))
        .bitmap(Bitmap::new("a", 9).table(vec![bits]))
        .bitmap(
            Bitmap::new("b", 16)
                .flags(0)
                .table(vec![Chunk::Bits(vec![0x81, 0x01])]),
        )
}

/// Names of the bitmaps, with bytes that each says changed; nothing for one in use.
fn bitmaps(bytes: &[u8]) -> Vec<(String, Option<u64>)> {
    let storage = MemoryStorage::from_bytes(bytes.to_vec());
    let image = Image::open(Box::new(storage), OpenOptions::default()).unwrap();
    let infos = image.bitmaps().unwrap();
    infos
        .into_iter()
        .map(|info| {
            let granule = info.granularity.bytes();
            let bits = image.load_bitmap(&info.name).ok();
            let dirty = bits.map(|bits| (bits.count() * granule).min(image.size()));
            (info.name, dirty)
        })
        .collect()
}

type Kept = &'static [(&'static str, Option<u64>)];
type Case = (
    &'static str,
    fn(&mut BuiltImage),
    Kept,
    &'static [&'static str],
);

const A: (&str, Option<u64>) = ("a", Some(4096 * 512));
const B: (&str, Option<u64>) = ("b", Some(3 << 16));
const ALL: Option<u64> = Some(4 << 20);

const CASES: &[Case] = &[
    (
        "fewer declared",
        |i| i.set("bitmaps.nb_bitmaps", 1),
        &[A, B],
        &["counts 1 bitmaps"],
    ),
    (
        "more declared",
        |i| i.set("bitmaps.nb_bitmaps", 3),
        &[A, B],
        &["counts 3 bitmaps"],
    ),
    (
        "none declared",
        |i| i.set("bitmaps.nb_bitmaps", 0),
        &[A, B],
        &["counts 0 bitmaps"],
    ),
    (
        "65536 declared",
        |i| i.set("bitmaps.nb_bitmaps", 65536),
        &[A, B],
        &["counts 65536"],
    ),
    (
        "reserved field",
        |i| i.set("bitmaps.reserved", 1),
        &[A, B],
        &[],
    ),
    (
        "no bytes",
        |i| i.set("bitmaps.directory_size", 0),
        &[A, B],
        &[],
    ),
    (
        "8 bytes short",
        |i| i.set("bitmaps.directory_size", 56),
        &[A, B],
        &[],
    ),
    (
        "8 bytes long",
        |i| i.set("bitmaps.directory_size", 72),
        &[A, B],
        &[],
    ),
    (
        "1 byte long",
        |i| i.set("bitmaps.directory_size", 65),
        &[A, B],
        &[],
    ),
    (
        "past 64 MiB",
        |i| i.set("bitmaps.directory_size", 67_107_841),
        &[A, B],
        &[],
    ),
    (
        "at 0",
        |i| i.set("bitmaps.directory_offset", 0),
        &[],
        &["its bitmaps are lost"],
    ),
    (
        "past the end",
        |i| i.set("bitmaps.directory_offset", 1 << 40),
        &[],
        &["its bitmaps are lost"],
    ),
    (
        "unaligned",
        |i| i.set_bits("bitmaps.directory_offset", 8),
        &[],
        &["its bitmaps are lost"],
    ),
    (
        "type 2",
        |i| i.set("bitmap[0].type", 2),
        &[B],
        &["entry 0", "\"a\"", "unknown bitmap type"],
    ),
    (
        "flag 3",
        |i| i.set_bits("bitmap[0].flags", 8),
        &[B],
        &["\"a\"", "unknown flags"],
    ),
    (
        "granularity 63",
        |i| i.set("bitmap[0].granularity_bits", 63),
        &[B],
        &["\"a\"", "granularity"],
    ),
    (
        "granularity larger than the disk",
        |i| i.set("bitmap[0].granularity_bits", 30),
        &[("a", ALL), B],
        &[],
    ),
    (
        "table at 0",
        |i| i.set("bitmap[0].table_offset", 0),
        &[B],
        &["\"a\"", "table is invalid"],
    ),
    (
        "table past the end",
        |i| i.set("bitmap[0].table_offset", 1 << 40),
        &[("a", ALL), B],
        &["bitmap \"a\": 1 of its 1 pages"],
    ),
    (
        "table too long",
        |i| i.set("bitmap[0].table_size", 2),
        &[("a", ALL), B],
        &["bitmap \"a\""],
    ),
    (
        "table on the refcount table",
        |i| aim(i, "bitmap[0].table_offset", "refcount_table"),
        &[("a", ALL), B],
        &["bitmap \"a\""],
    ),
    (
        "table on guest data",
        |i| aim(i, "bitmap[0].table_offset", "data[0]"),
        &[("a", ALL), B],
        &["bitmap \"a\""],
    ),
    (
        "table shared",
        |i| aim(i, "bitmap[0].table_offset", "bitmap[1].table"),
        &[("a", ALL), ("b", ALL)],
        &["bitmap \"a\"", "bitmap \"b\""],
    ),
    (
        "entry reserved bit",
        |i| i.set_bits("bitmap[0].table[0]", 2),
        &[("a", ALL), B],
        &["bitmap \"a\": 1 of its 1 pages"],
    ),
    (
        "entry past the end",
        |i| i.set("bitmap[0].table[0]", 1 << 40),
        &[("a", ALL), B],
        &["bitmap \"a\""],
    ),
    (
        "page on the L1",
        |i| aim(i, "bitmap[0].table[0]", "l1"),
        &[("a", ALL), B],
        &["bitmap \"a\""],
    ),
    (
        "page on guest data",
        |i| aim(i, "bitmap[0].table[0]", "data[0]"),
        &[("a", ALL), B],
        &["bitmap \"a\""],
    ),
    (
        "page shared",
        |i| aim(i, "bitmap[0].table[0]", "bitmap[1].data[0]"),
        &[("a", ALL), ("b", ALL)],
        &["bitmap \"a\"", "bitmap \"b\""],
    ),
];

fn aim(image: &mut BuiltImage, field: &str, target: &str) {
    image.set(field, image.place(target).offset);
}

/// Images that need more than a patch.
fn built() -> Vec<(&'static str, Vec<u8>, Kept, &'static [&'static str])> {
    let named = |name: &str| Bitmap::new(name, 16);
    let image = |bitmaps: Vec<Bitmap>| {
        let builder = ImageBuilder {
            bitmaps,
            ..builder()
        };
        builder.build().bytes
    };
    let tail = Bitmap {
        kind: 0,
        ..named("")
    };
    let extra = Bitmap {
        extra: vec![7; 8],
        ..named("x")
    };
    let broken = named("x")
        .flags(BITMAP_IN_USE | BITMAP_AUTO)
        .table(vec![Chunk::Entry(u64::MAX)]);
    let alone = ImageBuilder {
        autoclear: Some(1),
        bitmaps: Vec::new(),
        ..builder()
    };
    vec![
        (
            "a stale tail without a name",
            image(vec![named("x"), tail]),
            &[("x", Some(0))],
            &["entry 1 of the bitmap directory (\"\") is dropped"],
        ),
        (
            "no name",
            image(vec![named("x"), named("")]),
            &[("x", Some(0)), ("unnamed-1", Some(0))],
            &["is now called \"unnamed-1\""],
        ),
        (
            "two of one name",
            image(vec![named("x"), named("x")]),
            &[("x", Some(0)), ("renamed-1", Some(0))],
            &["is now called \"renamed-1\""],
        ),
        (
            "extra data",
            image(vec![extra, named("y")]),
            &[("y", Some(0))],
            &["\"x\"", "extra data"],
        ),
        (
            "in use, broken",
            image(vec![broken]),
            &[("x", None)],
            &["bitmap \"x\""],
        ),
        ("the bit alone", alone.build().bytes, &[], &[]),
    ]
}

#[test]
fn damaged_directories_open_again_with_everything_that_could_be_kept() {
    let folder = tempfile::tempdir().unwrap();
    let whole = content(&builder().build().bytes);
    let mut images = built();
    for (name, patch, kept, losses) in CASES {
        let mut image = builder().build();
        patch(&mut image);
        images.push((name, image.bytes, kept, losses));
    }
    for (name, bytes, kept, losses) in &images {
        let (report, after) = repaired(bytes, Repair::All);
        let report = report.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(
            report.check.is_clean(),
            "{name}: {:?}",
            report.check.findings
        );
        let text: Vec<String> = report.losses.iter().map(Loss::to_string).collect();
        for sentence in *losses {
            let told = text.iter().any(|loss| loss.contains(sentence));
            assert!(told, "{name}: {sentence:?} is not among {text:?}");
        }
        let found = bitmaps(&after);
        let found: Vec<(&str, Option<u64>)> = found
            .iter()
            .map(|(name, count)| (name.as_str(), *count))
            .collect();
        assert_eq!(&found[..], *kept, "{name}: {text:?}");
        // Some of them cannot even be opened before.
        let known = [content(bytes), whole.clone()];
        let before = known.iter().find(|content| !content.is_empty());
        assert!(
            before == Some(&content(&after)),
            "{name}: the guest's content changed"
        );
        if oracle::available() {
            let path = folder.path().join("image.qcow2");
            std::fs::write(&path, &after).unwrap();
            qemu_img::check(&path).assert_clean();
        }
        let (again, same) = repaired(&after, Repair::All);
        assert!(
            again.unwrap().losses.is_empty() && same == after,
            "{name}: repaired twice"
        );
    }
    println!("{} damaged directories", images.len());
    assert!(images.len() >= 34);
}

#[test]
fn leaks_are_not_freed_while_the_directory_cannot_be_read() {
    let mut image = builder().build();
    image.set("bitmap[0].type", 2);
    image.set("l2[0][1]", 0);
    let (report, after) = repaired(&image.bytes, Repair::Leaks);
    let report = report.unwrap();
    assert_eq!((report.leaks_fixed, report.check.exit_code()), (0, 1));
    assert_eq!(after, image.bytes);
}

#[test]
fn stale_bitmaps_are_dropped_by_name_and_their_clusters_freed() {
    for what in [Repair::Leaks, Repair::All] {
        let mut image = builder().build();
        image.set("header.autoclear_features", 0);
        let (report, after) = repaired(&image.bytes, what);
        let report = report.unwrap();
        let stale = |name: &str| Loss::Stale(name.to_owned());
        assert_eq!(report.losses, [stale("a"), stale("b")]);
        assert_eq!((report.leaks_fixed, report.check.exit_code()), (5, 0));
        assert_eq!(report.check.warnings, 0);
        assert!(checked(&after).unwrap().is_clean());
    }
}

#[test]
fn a_sound_image_is_not_written_to() {
    let bytes = builder().build().bytes;
    for what in [Repair::Leaks, Repair::All] {
        let (report, after) = repaired(&bytes, what);
        let report = report.unwrap();
        assert_eq!((report.leaks_fixed, report.corruptions_fixed), (0, 0));
        assert!(report.losses.is_empty() && after == bytes);
        let reading = MemoryStorage::from_bytes(bytes.clone());
        assert!(reading.writable());
    }
}
