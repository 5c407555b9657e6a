//! Stored bytes that do not hold one cluster: what a reader and a writer get, and what QEMU says.

use tidemark_fixtures::hostile::{
    COMPRESSED_CLUSTER, Category, Content, HostileImage, compressed_content, hostile_images,
};
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{Damage, Image};

use crate::common::{open_bytes, reading, writing};

const AT: u64 = COMPRESSED_CLUSTER * 4096;

fn images() -> impl Iterator<Item = HostileImage> {
    let data = |image: &HostileImage| image.category == Category::Data;
    // Clusters of 4 KiB: all but the one about a wide window.
    hostile_images()
        .into_iter()
        .filter(data)
        .filter(|image| !image.name.contains("looks back"))
}

/// Whether `qemu-img convert` reads the whole disk.
fn qemu_reads(bytes: &[u8]) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("hostile"), dir.path().join("raw"));
    std::fs::write(&path, bytes).unwrap();
    let (path, raw) = (path.to_str().unwrap(), raw.to_str().unwrap());
    let output = qemu_img::run(&["convert", "-f", "qcow2", "-O", "raw", path, raw]);
    output.status == Some(0)
}

#[test]
fn stored_bytes_that_hold_a_cluster_are_read_and_others_named() {
    let mut cases = 0;
    for hostile in images() {
        let what = &hostile.name;
        let image = open_bytes(hostile.bytes.clone(), reading()).unwrap();
        let mut whole = vec![0; 4096];
        let read = image.read(&mut whole, AT);
        match (&read, hostile.expect.content) {
            (Ok(()), Content::Reads | Content::Either) => {
                assert!(whole == compressed_content(), "{what}: other bytes");
                let mut piece = [0; 100];
                image.read(&mut piece, AT + 2000).unwrap();
                assert!(piece == compressed_content()[2000..2100], "{what}");
            }
            (Err(error), Content::Fails | Content::Either) => {
                let damage = error.damage().unwrap();
                let named = matches!(damage, Damage::Compressed { cluster, offset, .. }
                    if *cluster == COMPRESSED_CLUSTER && offset.0 >= 4096);
                assert!(named, "{what}: {damage}");
                println!("{what}: {damage}");
            }
            (read, expected) => panic!("{what}: {read:?}, not {expected:?}"),
        }
        if oracle::available() && hostile.expect.content != Content::Either {
            assert_eq!(qemu_reads(&hostile.bytes), read.is_ok(), "{what}: QEMU");
        }
        cases += 1;
    }
    println!("{cases} ways to store a cluster");
    assert!(cases >= 33);
}

#[test]
fn damaged_compressed_data_is_replaced_whole_and_never_in_part() {
    let mut cases = 0;
    for hostile in images() {
        let what = &hostile.name;
        let storage = CrashStorage::new(hostile.bytes.clone());
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        let mut cluster = vec![0; 4096];
        let readable = image.read(&mut cluster, AT).is_ok();
        let part = image.write(&[0x55; 10], AT + 100);
        assert_eq!(part.is_ok(), readable, "{what}: {part:?}");
        cluster[100..110].fill(0x55);
        if !readable {
            cluster = vec![0x56; 4096];
            image.write(&cluster, AT).unwrap();
        }
        image.close().unwrap();
        let image = open_bytes(storage.to_bytes(), reading()).unwrap();
        let mut back = vec![0; 4096];
        image.read(&mut back, AT).unwrap();
        assert!(back == cluster, "{what}");
        let report = image.check().unwrap();
        assert!(report.is_clean(), "{what}: {:?}", report.findings);
        cases += 1;
    }
    println!("{cases} damaged clusters replaced");
}

#[test]
fn a_stream_that_looks_back_20_000_bytes_is_read() {
    let wide = hostile_images()
        .into_iter()
        .find(|image| image.name.contains("looks back"))
        .unwrap();
    let image = open_bytes(wide.bytes.clone(), reading()).unwrap();
    let mut cluster = vec![0; 65_536];
    image.read(&mut cluster, 3 << 16).unwrap();
    assert!(cluster[..20_000] == cluster[20_000..40_000]);
    assert!(!oracle::available() || qemu_reads(&wide.bytes));
}
