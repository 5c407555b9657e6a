//! Many checkpoints, deep chains, many disks, large disks: time grows as the number does.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{create, domain_with, media, spec, write};
use tidemark_bitmap::Granularity;
use tidemark_checkpoint::{
    CreateFlags, CreateSpec, DeleteFlags, Descriptor, Disk, Domain, DomainOptions, ListFlags,
    ListOptions, Store,
};
use tidemark_qcow2::chain::{
    ChainRecord, CheckpointEntry, Health, Identity, ImageUuid, Proof, Scheme,
};
use tidemark_qcow2::{CreateOptions, Image, MemoryStorage, OpenOptions, proof};

/// The best of three: a busy machine only ever makes it slower.
fn timed(mut work: impl FnMut()) -> Duration {
    let once = |work: &mut dyn FnMut()| {
        let begin = Instant::now();
        work();
        begin.elapsed()
    };
    (0..3).map(|_| once(&mut work)).min().unwrap()
}

/// Four times as many may take eight times as long, on a busy machine; sixteen would be quadratic.
fn assert_linear(what: &str, few: Duration, many: Duration) {
    println!("{what}: {few:?}, four times as many {many:?}");
    let floor = Duration::from_millis(20);
    assert!(many < few.max(floor) * 10, "{what}: {few:?} and {many:?}");
}

/// A chain of descriptors, each the parent of the next.
fn described(folder: &std::path::Path, count: usize) -> Domain {
    for number in 0..count {
        let descriptor = Descriptor {
            name: format!("n{number:05}"),
            created: Some(1),
            parent: number.checked_sub(1).map(|parent| format!("n{parent:05}")),
            ..Descriptor::default()
        };
        let path = folder.join(format!("n{number:05}.xml"));
        std::fs::write(path, descriptor.to_xml()).unwrap();
    }
    let options = DomainOptions {
        store: Some(Store::new(folder)),
        ..DomainOptions::default()
    };
    domain_with(&media(1), options)
}

#[test]
fn ten_thousand_descriptors_in_one_chain_are_listed_in_linear_time() {
    let mut times = Vec::new();
    for count in [2500, 10_000] {
        let folder = tempfile::tempdir().unwrap();
        let domain = described(folder.path(), count);
        times.push(timed(|| {
            let all = domain.list(ListOptions::default()).unwrap().checkpoints;
            assert_eq!(all.len(), count);
        }));
        let walk = domain.checkpoints(ListFlags::TOPOLOGICAL).unwrap();
        assert_eq!(walk[count - 1].name(), format!("n{:05}", count - 1));
        assert_eq!(domain.checkpoints(ListFlags::LEAVES).unwrap().len(), 1);
        let below = domain
            .lookup("n00001")
            .unwrap()
            .children(ListFlags::DESCENDANTS);
        assert_eq!(below.unwrap().len(), count - 2);
        if count == 2500 {
            domain.delete("n00000", DeleteFlags::CHILDREN).unwrap();
            assert!(domain.checkpoints(ListFlags::NONE).unwrap().is_empty());
        }
    }
    assert_linear("descriptors", times[0], times[1]);
}

/// An image that holds `count` checkpoints, written in one update: taking them one by one is the
/// same and only slower.
fn recorded(count: usize, scheme: Scheme) -> Domain {
    let options = CreateOptions {
        cluster_bits: 21,
        ..CreateOptions::new(1 << 30)
    };
    let storage = Box::new(MemoryStorage::new());
    let image = Image::create(storage, &options, OpenOptions::default()).unwrap();
    let mut record = ChainRecord::new(ImageUuid([1; 16]), scheme);
    let identity = |number: usize| {
        let mut bytes = [7; 16];
        bytes[..8].copy_from_slice(&u64::try_from(number).unwrap().to_be_bytes());
        Identity(bytes)
    };
    image
        .update(|update| {
            for number in 0..count {
                let name = format!("n{number:05}");
                let mut bits = update.blank(Granularity::from_bytes(1 << 21).unwrap())?;
                // All ones: the engine stores no page for it.
                bits.mark(0..1 << 30).unwrap();
                let newest = number + 1 == count;
                let records = newest || scheme == Scheme::Cumulative;
                record.checkpoints.push(CheckpointEntry {
                    identity: identity(number),
                    name: name.clone(),
                    parent: number.checked_sub(1).map(identity),
                    created: Some(1),
                    disk_bytes: Some(1 << 30),
                    granularity: bits.shape().granularity(),
                    health: Health::Ok,
                    proof: match records {
                        true => Proof::Recording(tidemark_qcow2::chain::RecordingProof {
                            count: 512,
                            smallest_disk_bytes: 1 << 30,
                            planted: vec![0],
                            witnesses: Vec::new(),
                        }),
                        false => Proof::Frozen(proof::frozen(&bits)),
                    },
                    anchor: None,
                });
                update.put(&name, bits, records)?;
            }
            record.current = record.checkpoints.last().map(|entry| entry.identity);
            update.set_record(Some(record));
            Ok::<(), tidemark_qcow2::Error>(())
        })
        .unwrap();
    let disk = Disk {
        name: "vda".to_owned(),
        image: Arc::new(image),
    };
    Domain::new(vec![disk], DomainOptions::default()).unwrap()
}

#[test]
fn thousands_of_checkpoints_in_one_image_are_listed_and_rebuilt_in_linear_time() {
    let mut lists = Vec::new();
    let mut rebuilds = Vec::new();
    for count in [500, 2000] {
        let domain = recorded(count, Scheme::Intervals);
        lists.push(timed(|| {
            assert_eq!(
                domain
                    .list(ListOptions::default())
                    .unwrap()
                    .checkpoints
                    .len(),
                count
            );
        }));
        rebuilds.push(timed(|| {
            let rebuilt = domain.rebuild(false).unwrap();
            assert_eq!(
                (rebuilt.checkpoints.len(), rebuilt.problems.len()),
                (count, 0)
            );
        }));
        domain.delete("n00100", DeleteFlags::NONE).unwrap();
        create(&domain, "one-more");
        assert!(common::since(&domain, "n00000", "vda").is_ok());
    }
    assert_linear("list", lists[0], lists[1]);
    assert_linear("rebuild", rebuilds[0], rebuilds[1]);
}

#[test]
fn bitmaps_without_a_record_are_ordered_in_linear_time() {
    let mut times = Vec::new();
    for count in [200, 800] {
        let domain = recorded(count, Scheme::Cumulative);
        let image = &domain.disks()[0].image;
        image
            .update(|update| {
                update.set_record(None);
                Ok::<(), tidemark_qcow2::Error>(())
            })
            .unwrap();
        times.push(timed(|| {
            let rebuilt = domain.rebuild(false).unwrap();
            assert_eq!(rebuilt.checkpoints.len(), count);
        }));
    }
    assert_linear("inference", times[0], times[1]);
}

#[test]
fn a_domain_of_a_hundred_disks_takes_checkpoints_on_all_of_them() {
    let options = |number: usize| {
        let create = CreateOptions::new(1 << 20);
        let storage = Box::new(MemoryStorage::new());
        let image = Image::create(storage, &create, OpenOptions::default()).unwrap();
        Disk {
            name: format!("disk{number:03}"),
            image: Arc::new(image),
        }
    };
    let domain = Domain::new((0..100).map(options).collect(), DomainOptions::default()).unwrap();
    for name in ["a", "b", "c"] {
        create(&domain, name);
        write(&domain, "disk050", 70_000, 100, 1);
    }
    domain.delete("b", DeleteFlags::NONE).unwrap();
    let listing = domain
        .list(ListOptions {
            sizes: true,
            judge: true,
            ..Default::default()
        })
        .unwrap();
    assert_eq!(listing.problems, []);
    assert!(
        listing
            .checkpoints
            .iter()
            .all(|info| info.disks.len() == 100)
    );
    assert_eq!(domain.verify().unwrap(), []);
    println!("100 disks");
}

/// The measurement of the contract: a hundred checkpoints on a disk of 16 TiB.
#[test]
fn a_hundred_checkpoints_on_16_tib_are_rebuilt_at_once() {
    const TIB: u64 = 1 << 40;
    let storage = Box::new(MemoryStorage::new());
    let options = CreateOptions::new(16 * TIB);
    let image = Image::create(storage, &options, OpenOptions::default()).unwrap();
    let disk = Disk {
        name: "vda".to_owned(),
        image: Arc::new(image),
    };
    let domain = Domain::new(vec![disk], DomainOptions::default()).unwrap();
    let image = &domain.disks()[0].image;
    for number in 0..100_u64 {
        let wanted = CreateSpec {
            name: Some(format!("n{number:03}")),
            granularity: Granularity::from_bytes(1 << 16),
            ..spec("")
        };
        domain.create(&wanted, CreateFlags::NONE).unwrap();
        for place in 0..4 {
            image
                .write(&[1; 4096], number * (100 << 20) + place * 4 * TIB)
                .unwrap();
        }
    }
    let with_record = timed(|| assert_eq!(domain.rebuild(false).unwrap().checkpoints.len(), 100));
    domain.set_scheme(Scheme::Cumulative).unwrap();
    image
        .update(|update| {
            update.set_record(None);
            Ok::<(), tidemark_qcow2::Error>(())
        })
        .unwrap();
    let by_inclusion = timed(|| {
        let rebuilt = domain.rebuild(false).unwrap();
        assert_eq!(rebuilt.checkpoints.len(), 100);
        assert_eq!(rebuilt.checkpoints[99].parent.as_deref(), Some("n098"));
    });
    println!(
        "100 checkpoints on 16 TiB: {with_record:?} with the record, {by_inclusion:?} by inclusion"
    );
    assert!(with_record < Duration::from_secs(20) && by_inclusion < Duration::from_secs(40));
}
