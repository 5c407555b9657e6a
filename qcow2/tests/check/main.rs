//! The check finds what is wrong, counts it as `qemu-img check` does, and costs what exists.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod corpus;
mod cost;
mod qemu;

use tidemark_fixtures::builder::{BITMAP_AUTO, BITMAP_IN_USE};
use tidemark_fixtures::builder::{Bitmap, BuiltImage, Chunk, Cluster, ImageBuilder};
use tidemark_qcow2::check::{Finding, Severity, check};
use tidemark_qcow2::units::HostOffset;
use tidemark_qcow2::{
    CheckReport, CreateOptions, FileStorage, Granularity, Image, MemoryStorage, OpenOptions,
    Sharing,
};

use crate::corpus::{COPIED, aim_plain, healthy, zero};

fn report(bytes: &[u8]) -> CheckReport {
    check(Box::new(MemoryStorage::from_bytes(bytes.to_vec()))).unwrap()
}

fn severities(report: &CheckReport, severity: Severity) -> Vec<String> {
    let of = |finding: &&Finding| finding.severity() == severity;
    report
        .findings
        .iter()
        .filter(of)
        .map(Finding::to_string)
        .collect()
}

#[test]
fn findings_are_sentences_that_name_the_place() {
    let mut image = healthy(12, 4).build();
    zero(&mut image, "data[0]");
    image.set_bits("l2[0][1]", 1 << 57);
    image.set("l2[0][9]", 1 << 40 | COPIED);
    let report = report(&image.bytes);
    let at = |name: &str| HostOffset(image.place(name).offset);
    let expected = [
        format!(
            "the L2 entry 0x8200000000003000 at {}: reserved bits are set",
            at("l2[0][1]")
        ),
        "the data cluster at 0x10000000000 of 4096 bytes lies past the end of the file".to_owned(),
        format!(
            "the host cluster at {} has refcount 0 and 1 reference",
            at("data[0]")
        ),
        format!(
            "the L2 entry 0x8000000000002000 at {} has a wrong COPIED flag: refcount not 1",
            at("l2[0][0]")
        ),
    ];
    let found = severities(&report, Severity::Corruption);
    for sentence in expected {
        assert!(
            found.contains(&sentence),
            "{sentence:?} is not among {found:#?}"
        );
    }
    let leak = format!(
        "the host cluster at {} has refcount 1 and 0 references",
        at("data[9]")
    );
    assert_eq!(severities(&report, Severity::Leak), [leak]);
}

#[test]
fn metadata_that_shares_its_cluster_is_corrupt_also_when_the_refcount_agrees() {
    let mut image = healthy(12, 4).build();
    aim_plain(&mut image, "l2[0][0]", "l1");
    image.set_refcount(image.host_cluster("l1"), 2);
    zero(&mut image, "data[0]");
    let report = report(&image.bytes);
    let offset = HostOffset(image.place("l1").offset);
    let overlap = Finding::Overlap {
        structure: "L1 table",
        offset,
        references: 2,
    };
    assert_eq!(
        (&report.findings[..], report.exit_code()),
        (&[overlap][..], 2)
    );
}

#[test]
fn odd_things_that_harm_nothing_are_warnings() {
    type Case = (
        &'static str,
        ImageBuilder,
        fn(&mut BuiltImage),
        &'static str,
    );
    let bitmap = |bytes: Vec<u8>| Bitmap::new("x", 16).table(vec![Chunk::Bits(bytes)]);
    let plain = || ImageBuilder::new(4 << 20).cluster_bits(12);
    let dirty = ImageBuilder {
        incompatible: 3,
        ..plain()
    };
    let alone = ImageBuilder {
        autoclear: Some(1),
        ..plain()
    };
    let in_use = plain().bitmap(Bitmap::new("x", 16).flags(BITMAP_IN_USE | BITMAP_AUTO));
    let cases: [Case; 6] = [
        (
            "tail",
            plain().bitmap(bitmap(vec![0xFF; 9])),
            |_| (),
            "bits past the end",
        ),
        (
            "far tail",
            plain().bitmap(bitmap(far_bit())),
            |_| (),
            "bits past the end",
        ),
        ("in use", in_use, |_| (), "in use"),
        ("bit alone", alone, |_| (), "there is no bitmaps extension"),
        ("dirty", dirty.clone(), |_| (), "not closed cleanly"),
        ("corrupt", dirty, |_| (), "marked corrupt"),
    ];
    for (name, builder, patch, sentence) in cases {
        let mut image = builder.build();
        patch(&mut image);
        let report = report(&image.bytes);
        let found = severities(&report, Severity::Warning);
        assert!(
            report.is_clean() && report.warnings > 0,
            "{name}: {:?}",
            report.findings
        );
        assert!(
            found.iter().any(|text| text.contains(sentence)),
            "{name}: {found:?}"
        );
    }
    let full = report(&plain().bitmap(bitmap(vec![0xFF; 8])).build().bytes);
    assert_eq!((full.warnings, full.exit_code()), (0, 0));
    let mut stale = plain().bitmap(bitmap(vec![1])).build();
    stale.set("header.autoclear_features", 0);
    let stale = report(&stale.bytes);
    assert_eq!((stale.warnings, stale.leaks, stale.exit_code()), (1, 3, 3));
}

fn far_bit() -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[4095] = 0x80;
    bytes
}

#[test]
fn an_image_that_we_wrote_is_clean_while_it_is_open_and_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    let storage = FileStorage::create(&path).unwrap();
    let options = CreateOptions::new(8 << 20);
    let image = Image::create(Box::new(storage), &options, OpenOptions::default()).unwrap();
    image
        .update::<_, tidemark_qcow2::Error>(|update| {
            let bits = update.blank(Granularity::from_bytes(65536).unwrap())?;
            update.put("b0", bits, true)
        })
        .unwrap();
    for round in 0..3 {
        image
            .write(&vec![round + 1; 300_000], 70_000 * u64::from(round))
            .unwrap();
        image.discard(0, 1 << 20).unwrap();
        let report = image.check().unwrap();
        assert_eq!(
            (report.exit_code(), report.warnings),
            (0, 0),
            "{:?}",
            report.findings
        );
    }
    image.close().unwrap();
    let before = std::fs::read(&path).unwrap();
    assert!(report(&before).is_clean());
    let storage = FileStorage::open(&path, false, Sharing::Exclusive);
    assert!(check(Box::new(storage.unwrap())).unwrap().is_clean());
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn findings_are_capped_and_their_counts_are_not() {
    let mut image = healthy(9, 4).build();
    let table: Vec<u8> = (0..64)
        .flat_map(|_| (1_u64 << 40 | COPIED).to_be_bytes())
        .collect();
    image.put("l2[0]", &table);
    let mut bytes = image.bytes.clone();
    bytes.resize(8 << 20, 0);
    let mut all_used = image;
    all_used.bytes = bytes;
    let few = report(&all_used.bytes);
    assert!(few.omitted_findings == 0 && few.corruptions >= 64);
    let mut many = ImageBuilder::new(4 << 20).cluster_bits(9);
    for cluster in 0..4096 {
        many = many.cluster(cluster, Cluster::Entry(1 << 40 | COPIED));
    }
    let many = report(&many.build().bytes);
    // Each entry lies past the end, and none of their refcounts is one.
    assert_eq!((many.corruptions, many.findings.len()), (8192, 1000));
    assert_eq!(many.omitted_findings, 7192);
}
