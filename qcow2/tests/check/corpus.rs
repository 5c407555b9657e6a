//! Healthy images, and damages that each break one thing.

use tidemark_fixtures::builder::{Bitmap, BuiltImage, Chunk, Cluster, ImageBuilder};

pub(crate) const COPIED: u64 = 1 << 63;

/// A disk with data, a zero cluster, a reserved one, compressed data and two bitmaps.
pub(crate) fn healthy(cluster_bits: u32, refcount_order: u32) -> ImageBuilder {
    let size = 1 << cluster_bits;
    let data = |byte| Cluster::Data(vec![byte; size]);
    let bits = Chunk::Bits(vec![0x0F; 8]);
    ImageBuilder::new(24 << cluster_bits)
        .cluster_bits(cluster_bits)
        .refcount_order(refcount_order)
        .cluster(0, data(1))
        .cluster(1, data(2))
        .cluster(4, Cluster::Zero)
        .cluster(5, Cluster::ZeroAllocated(vec![7; size]))
        .cluster(6, Cluster::Compressed(vec![8; size]))
        .cluster(9, data(3))
        .bitmap(Bitmap::new("a", 9).table(vec![bits]))
        .bitmap(Bitmap::new("b", 16).flags(0))
}

pub(crate) type Damage = (&'static str, fn(&mut BuiltImage));

pub(crate) const DAMAGES: &[Damage] = &[
    ("healthy", |_| ()),
    ("leak", |i| i.put("l2[0][9]", &[0; 8])),
    ("refcount 0 of data", |i| zero(i, "data[0]")),
    ("refcount 0 of a compressed cluster", |i| zero(i, "data[6]")),
    ("refcount 0 of an L2 table", |i| zero(i, "l2[0]")),
    ("refcount 0 of the L1 table", |i| zero(i, "l1")),
    ("refcount 0 of the header", |i| i.set_refcount(0, 0)),
    ("refcount 0 of the refcount table", |i| {
        zero(i, "refcount_table")
    }),
    ("refcount 0 of a refcount block", |i| {
        zero(i, "refcount_block[0]")
    }),
    ("refcount 0 of the bitmap directory", |i| {
        zero(i, "bitmap_directory")
    }),
    ("refcount 0 of a bitmap table", |i| {
        zero(i, "bitmap[1].table")
    }),
    ("refcount 0 of a bitmap page", |i| {
        zero(i, "bitmap[0].data[0]")
    }),
    ("COPIED missing in L1", |i| {
        i.set("l1[0]", i.get("l1[0]") & !COPIED)
    }),
    ("COPIED missing in L2", |i| {
        i.set("l2[0][0]", i.get("l2[0][0]") & !COPIED)
    }),
    ("COPIED on a compressed cluster", |i| {
        i.set_bits("l2[0][6]", COPIED)
    }),
    ("shared data cluster", |i| aim(i, "l2[0][1]", "data[0]")),
    ("L2 entry past the end", |i| {
        i.set("l2[0][0]", 1 << 40 | COPIED)
    }),
    ("L1 entry past the end", |i| {
        i.set("l1[0]", 1 << 40 | COPIED)
    }),
    ("L2 entry at the end of the file", |i| {
        i.set("l2[0][0]", i.len() | COPIED)
    }),
    ("reserved bit of L1", |i| i.set_bits("l1[0]", 1 << 57)),
    ("reserved bit of L2", |i| i.set_bits("l2[0][0]", 1 << 57)),
    ("reserved bit of the refcount table", |i| {
        i.set_bits("refcount_table[0]", 1)
    }),
    ("refcount block missing", |i| i.set("refcount_table[0]", 0)),
    ("refcount block past the end", |i| {
        i.set("refcount_table[0]", 1 << 40)
    }),
    ("refcount block on data", |i| {
        aim_plain(i, "refcount_table[0]", "data[1]")
    }),
    ("data on the L1 table", |i| aim(i, "l2[0][0]", "l1")),
    ("compressed data on the header", |i| {
        i.set("l2[0][0]", COPIED | 1 << 62)
    }),
    ("bitmap page on data", |i| {
        aim_plain(i, "bitmap[0].table[0]", "data[1]")
    }),
    ("bitmap page past the end", |i| {
        i.set("bitmap[0].table[0]", 1 << 40)
    }),
    ("bitmaps unknown to a writer", |i| {
        i.set("header.autoclear_features", 0)
    }),
];

/// Damages that need refcounts above one.
pub(crate) const WIDE_DAMAGES: &[Damage] = &[
    ("refcount too high", |i| {
        i.set_refcount(i.host_cluster("data[0]"), 2)
    }),
    ("refcount too high, COPIED clear", |i| {
        i.set_refcount(i.host_cluster("data[0]"), 2);
        i.set("l2[0][0]", i.get("l2[0][0]") & !COPIED);
    }),
    ("shared cluster, counted twice, COPIED set", |i| {
        aim(i, "l2[0][1]", "data[0]");
        i.set_refcount(i.host_cluster("data[0]"), 2);
    }),
    ("shared cluster, counted twice, COPIED clear", |i| {
        aim_plain(i, "l2[0][1]", "data[0]");
        aim_plain(i, "l2[0][0]", "data[0]");
        i.set_refcount(i.host_cluster("data[0]"), 2);
    }),
    ("refcount of metadata too high", |i| {
        i.set_refcount(i.host_cluster("l1"), 3)
    }),
    ("one reference too few", |i| {
        aim_plain(i, "l2[0][1]", "data[0]");
        aim_plain(i, "l2[0][9]", "data[0]");
        i.set_refcount(i.host_cluster("data[0]"), 2);
    }),
];

pub(crate) fn zero(image: &mut BuiltImage, name: &str) {
    image.set_refcount(image.host_cluster(name), 0);
}

pub(crate) fn aim(image: &mut BuiltImage, entry: &str, target: &str) {
    image.set(entry, image.place(target).offset | COPIED);
}

pub(crate) fn aim_plain(image: &mut BuiltImage, entry: &str, target: &str) {
    image.set(entry, image.place(target).offset);
}

pub(crate) fn damaged(
    builder: &ImageBuilder,
    name: &str,
    damages: &[Damage],
) -> Vec<(String, Vec<u8>)> {
    let image = builder.build();
    let damage = |(damage, patch): &Damage| {
        let mut image = image.clone();
        patch(&mut image);
        (format!("{name}: {damage}"), image.bytes)
    };
    damages.iter().map(damage).collect()
}
