//! Traps that other engines fell into and that no other file has a test for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use tidemark_fixtures::builder::{Cluster, Extension, ImageBuilder};
use tidemark_fixtures::image_bits;
use tidemark_fixtures::ops::fill;
use tidemark_fixtures::storage::{CrashOptions, CrashStorage, EventKind};
use tidemark_qcow2::check::{Repair, repair};
use tidemark_qcow2::{
    BackingReference, CreateOptions, Error, Gate, Granularity, Image, MemoryStorage, OpenOptions,
    Storage,
};

use crate::probe::{PATIENCE, Watched};

const CLUSTER: u64 = 4096;
const AUTOCLEAR: usize = 88;

fn writing() -> OpenOptions {
    OpenOptions {
        writable: true,
        ..OpenOptions::default()
    }
}

/// A disk of 4 MiB in clusters of 4 KiB, with data in the first three.
fn disk() -> ImageBuilder {
    let builder = ImageBuilder::new(4 << 20).cluster_bits(12);
    (0..3).fold(builder, |builder, number| {
        builder.cluster(number, Cluster::Data(fill(number, CLUSTER)))
    })
}

/// Lets one file through, always the same bytes, and counts how often it is asked.
#[derive(Clone, Debug, Default)]
struct Only {
    bytes: Vec<u8>,
    asked: Arc<AtomicUsize>,
}

impl Gate for Only {
    fn open(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(MemoryStorage::from_bytes(self.bytes.clone())))
    }
}

fn read(image: &Image, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    image.read(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn a_refusal_leaves_autoclear_bits_alone() {
    let odd = |incompatible| ImageBuilder {
        incompatible,
        autoclear: Some(!3),
        ..disk()
    };
    let truncated = odd(0).build().bytes[..5000].to_vec();
    let unknown = odd(1 << 9).build().bytes;
    let corrupt = odd(2).build().bytes;
    let no_refcounts = {
        let mut image = odd(0).build();
        image.set("header.refcount_table_clusters", 0);
        image.bytes
    };
    for bytes in [truncated, unknown, corrupt, no_refcounts] {
        let watched = Watched::new(bytes.clone());
        let opened = Image::open(Box::new(watched.clone()), writing());
        if let Ok(image) = opened {
            assert!(image.write(&[1; 512], 3 * CLUSTER).is_err());
            let _ = image.close();
        }
        assert!(watched.to_bytes() == bytes, "a refusal changed the file");
    }
}

#[test]
fn autoclear_bits_that_are_not_understood_are_durably_gone_before_data() {
    let image = ImageBuilder {
        autoclear: Some(1 << 5 | 1 << 33),
        ..disk()
    }
    .build();
    let data = image.place("data[1]").offset;
    let storage = CrashStorage::new(image.bytes);
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    image.write(&[7; 512], CLUSTER).unwrap();
    drop(image);
    let log = storage.log();
    let position = |wanted: u64| {
        log.events().iter().position(|event| match event.kind {
            EventKind::Write { offset, len } => (offset..offset + len).contains(&wanted),
            _ => false,
        })
    };
    let (header, data) = (position(88).unwrap(), position(data).unwrap());
    let between = &log.events()[header.min(data)..data];
    assert!(
        between.iter().any(|event| event.kind == EventKind::Flush),
        "header in event {header}, data in event {data}"
    );
    assert_eq!(storage.to_bytes()[AUTOCLEAR..AUTOCLEAR + 8], [0; 8]);
}

#[test]
fn bits_are_numbered_from_the_least_significant() {
    let storage = CrashStorage::new(Vec::new());
    let options = CreateOptions::new(1 << 20);
    let image = Image::create(Box::new(storage.clone()), &options, writing()).unwrap();
    image
        .update::<_, Error>(|update| {
            let mut bits = update.blank(Granularity::from_bytes(4096).unwrap())?;
            bits.mark(0..1).unwrap();
            bits.mark(9 * 4096..9 * 4096 + 1).unwrap();
            update.put("b", bits, false)
        })
        .unwrap();
    image.close().unwrap();
    let stored = &image_bits::bitmaps(&storage.to_bytes()).unwrap()[0];
    assert_eq!(stored.bits[..2], [0b0000_0001, 0b0000_0010]);
}

#[test]
fn a_freed_cluster_is_never_punched_after_it_was_reused() {
    let storage = CrashStorage::new(disk().build().bytes);
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    for round in 0..4 {
        image.discard(0, 3 * CLUSTER).unwrap();
        image.flush().unwrap();
        // On other guest clusters, so that the freed host clusters go to somebody else.
        for number in 0..3 {
            let cluster = 10 + 3 * round + number;
            image
                .write(&fill(cluster, CLUSTER), cluster * CLUSTER)
                .unwrap();
        }
        for number in 0..3 {
            image
                .write(&fill(number, CLUSTER), number * CLUSTER)
                .unwrap();
        }
        image.flush().unwrap();
    }
    for cluster in (0..3).chain(10..22) {
        let bytes = read(&image, cluster * CLUSTER, 4096);
        assert!(bytes == fill(cluster, CLUSTER), "cluster {cluster}");
    }
    image.close().unwrap();
    let content = image_bits::guest_content(&storage.to_bytes()).unwrap();
    assert!(content[10 * 4096..11 * 4096] == fill(10, CLUSTER));
    let events = storage.log().events().to_vec();
    let punched = |kind: &EventKind| match *kind {
        EventKind::Discard { offset, len } => Some(offset..offset + len),
        _ => None,
    };
    // The sweep over the log: a punch must not follow the write that gave its place away, unless a
    // flush, which alone lets clusters go, stands between.
    for (number, event) in events.iter().enumerate() {
        let Some(hole) = punched(&event.kind) else {
            continue;
        };
        let since = events[..number].iter().rev();
        let reused = since
            .take_while(|event| event.kind != EventKind::Flush)
            .any(|event| match event.kind {
                EventKind::Write { offset, len } => offset < hole.end && hole.start < offset + len,
                _ => false,
            });
        assert!(!reused, "event {number} punches what was just written");
    }
}

#[test]
fn a_shared_mapping_table_is_replaced_before_it_is_let_go() {
    let mut image = disk().build();
    let table = image.host_cluster("l2[0]");
    image.set_refcount(table, 2);
    image.set("l1[0]", image.get("l1[0]") & !(1 << 63));
    let storage = CrashStorage::new(image.bytes);
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    image.write(&fill(9, CLUSTER), 9 * CLUSTER).unwrap();
    image.flush().unwrap();
    image.write(&fill(8, CLUSTER), 8 * CLUSTER).unwrap();
    image.close().unwrap();
    let log = storage.log();
    let mut images = 0;
    for crash in log.images(CrashOptions::default()) {
        let storage = MemoryStorage::from_bytes(crash.bytes);
        let image = Image::open(Box::new(storage), OpenOptions::default()).unwrap();
        let report = image.check().unwrap();
        let harm = (report.check_errors, report.corruptions);
        assert_eq!(harm, (0, 0), "{}: {:?}", crash.description, report.findings);
        for number in 0..3 {
            assert!(read(&image, number * CLUSTER, 4096) == fill(number, CLUSTER));
        }
        images += 1;
    }
    println!("{images} crash images");
    assert!(images >= 10, "the sweep shrank: {images}");
}

/// An overlay of `base`, its first three clusters allocated.
fn overlay(version: u32) -> ImageBuilder {
    let builder = disk().backing("base");
    let builder = builder.extension(Extension::backing_format("raw"));
    match version {
        2 => builder.version_2(),
        _ => builder,
    }
}

#[test]
fn a_discard_never_shows_the_backing_file() {
    let gate = Only {
        bytes: vec![0xBB; 4 << 20],
        ..Only::default()
    };
    for version in [2, 3] {
        let storage = CrashStorage::new(overlay(version).build().bytes);
        let options = OpenOptions::writing(Arc::new(gate.clone()));
        let image = Image::open(Box::new(storage), options).unwrap();
        assert_eq!(read(&image, 5 * CLUSTER, 1), [0xBB]);
        for (offset, len) in [(0, 512), (CLUSTER + 100, 2000), (0, 3 * CLUSTER)] {
            let before = read(&image, 0, 3 * 4096);
            image.discard(offset, len).unwrap();
            image.flush().unwrap();
            for (old, new) in before.iter().zip(read(&image, 0, 3 * 4096)) {
                assert!(new == 0 || new == *old, "{new:#x} shows, was {old:#x}");
            }
        }
        // What was never allocated keeps its meaning or becomes zero.
        image.discard(5 * CLUSTER, CLUSTER).unwrap();
        let bytes = read(&image, 5 * CLUSTER, 4096);
        assert!(bytes == [0xBB; 4096] || bytes == [0; 4096]);
    }
}

#[test]
fn a_version_2_overlay_keeps_its_declared_backing_format() {
    let gate = || Arc::new(Only::default());
    let options = CreateOptions {
        version: 2,
        refcount_bits: 16,
        backing: Some(BackingReference {
            name: b"base".to_vec(),
            format: "raw".to_owned(),
        }),
        ..CreateOptions::new(4 << 20)
    };
    let created = CrashStorage::new(Vec::new());
    let open = OpenOptions::writing(gate());
    let image = Image::create(Box::new(created.clone()), &options, open).unwrap();
    image.write(&[1; 4096], 0).unwrap();
    image.close().unwrap();
    for bytes in [created.to_bytes(), overlay(2).build().bytes] {
        let storage = CrashStorage::new(bytes);
        let open = OpenOptions::writing(gate());
        let image = Image::open(Box::new(storage.clone()), open).unwrap();
        assert_eq!(image.header().geometry.version, 2);
        assert_eq!(image.backing().unwrap().format, "raw");
        image.write(&[2; 4096], 1 << 20).unwrap();
        image.close().unwrap();
        let again = Image::open(Box::new(storage), OpenOptions::writing(gate())).unwrap();
        assert_eq!(again.backing().unwrap().format, "raw");
    }
}

/// Every layer names another one, ten thousand of them.
#[test]
fn a_chain_of_ten_thousand_layers_is_refused_early() {
    let layer = disk()
        .backing("next")
        .extension(Extension::backing_format("qcow2"))
        .build()
        .bytes;
    let gate = Only {
        bytes: layer.clone(),
        ..Only::default()
    };
    let started = Instant::now();
    let options = OpenOptions::reading(Arc::new(gate.clone()));
    let refused: Result<Image, Error> =
        Image::open(Box::new(MemoryStorage::from_bytes(layer)), options);
    assert!(refused.is_err_and(|error| error.feature().is_some()));
    let asked = gate.asked.load(Ordering::Relaxed);
    assert!((2..1000).contains(&asked), "asked {asked} times");
    assert!(started.elapsed() < PATIENCE);
}

#[test]
fn rebuilt_refcounts_have_the_size_of_the_file_and_not_of_the_disk() {
    let data = Cluster::Data(fill(1, 65_536));
    let mut image = ImageBuilder::new(64 << 40).cluster(5, data).build();
    image.set("refcount_table[0]", 0);
    let watched = Watched::new(image.bytes.clone());
    let started = Instant::now();
    let report = repair(Box::new(watched.clone()), Repair::All).unwrap();
    assert!(report.check.is_clean(), "{:?}", report.check.findings);
    assert!(started.elapsed() < PATIENCE);
    let grown = watched.to_bytes().len() - image.bytes.len();
    println!("a disk of 64 TiB: the file grew by {grown} bytes");
    assert!(grown <= 1 << 20, "the file grew by {grown} bytes");
}
