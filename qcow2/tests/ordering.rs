//! The rules of docs/ordering.md, one test each and of the same name: on the log of every write
//! and flush, X is durable before Y is written.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::ops::Range;
use std::sync::Arc;

use common::{add_bitmap, granularity, open_bytes, reading, writing};
use tidemark_fixtures::storage::{CrashStorage, CrashWorld, Event, EventKind};
use tidemark_qcow2::chain::Scheme;
use tidemark_qcow2::check::{Repair, repair};
use tidemark_qcow2::transfer::{CommitOptions, RebaseOptions};
use tidemark_qcow2::{
    BackingReference, CreateOptions, DataFileReference, Error, Gate, Image, MemoryStorage,
    OpenOptions, Preallocation, Shrink, Storage, proof, transfer,
};

const CLUSTER: u64 = 65536;
const SIZE: u64 = 64 << 20;

/// A session on a fresh image, and where things are in the image afterwards.
struct Log {
    events: Vec<Event>,
    bytes: Vec<u8>,
}

fn be64(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Log {
    fn record(
        options: &CreateOptions,
        prepare: impl FnOnce(&Image),
        work: impl FnOnce(Image),
    ) -> Self {
        let base = common::built(options, prepare);
        let storage = CrashStorage::new(base);
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        work(image);
        Self {
            events: storage.log().events().to_vec(),
            bytes: storage.to_bytes(),
        }
    }

    /// Numbers of the events that write into `range`.
    fn writes(&self, range: Range<u64>) -> Vec<usize> {
        let hits = |event: &Event| match event.kind {
            EventKind::Write { offset, len } | EventKind::WriteZeroes { offset, len } => {
                offset < range.end && range.start < offset + len
            }
            _ => false,
        };
        (0..self.events.len())
            .filter(|&number| hits(&self.events[number]))
            .collect()
    }

    fn discards(&self, range: Range<u64>) -> Vec<usize> {
        let hits = |event: &Event| match event.kind {
            EventKind::Discard { offset, len } => offset < range.end && range.start < offset + len,
            _ => false,
        };
        (0..self.events.len())
            .filter(|&number| hits(&self.events[number]))
            .collect()
    }

    /// The first write of `earlier` is durable before the first write of `later`.
    fn durable_before(&self, what: &str, earlier: &[usize], later: &[usize]) {
        let first = *earlier
            .first()
            .unwrap_or_else(|| panic!("{what}: never written"));
        let then = *later
            .first()
            .unwrap_or_else(|| panic!("{what}: nothing follows"));
        let flushed = self.events[first..then.max(first)]
            .iter()
            .any(|event| event.kind == EventKind::Flush);
        assert!(
            first < then && flushed,
            "{what}: event {first} is not durable before {then}"
        );
    }

    fn l1(&self) -> u64 {
        be64(&self.bytes, 40)
    }

    fn l2(&self, index: u64) -> u64 {
        be64(&self.bytes, self.l1() + index * 8) & OFFSET
    }

    /// Host offset of a guest cluster below the first L2 table.
    fn data(&self, cluster: u64) -> u64 {
        be64(&self.bytes, self.l2(0) + cluster * 8) & OFFSET
    }

    fn refcount_block(&self, index: u64) -> u64 {
        be64(&self.bytes, be64(&self.bytes, 48) + index * 8) & OFFSET
    }

    /// Host offset of the first bitmap's table.
    fn bitmap_table(&self) -> u64 {
        let at = self
            .bytes
            .windows(4)
            .position(|window| window == [0x23, 0x85, 0x28, 0x75]);
        let directory = be64(&self.bytes, u64::try_from(at.unwrap()).unwrap() + 8 + 16);
        be64(&self.bytes, directory)
    }

    fn bitmap_page(&self) -> u64 {
        be64(&self.bytes, self.bitmap_table()) & OFFSET
    }
}

fn cluster(at: u64) -> Range<u64> {
    at..at + CLUSTER
}

fn entry(at: u64) -> Range<u64> {
    at..at + 8
}

fn options() -> CreateOptions {
    CreateOptions::new(SIZE)
}

/// An image with one allocated cluster, and a recording bitmap whose page has a cluster.
fn tracked(image: &Image) {
    image.write(&[1; 65536], 0).unwrap();
    image
        .update(|update| {
            let mut bits = update.blank(granularity(65536))?;
            bits.mark(SIZE - 1..SIZE).unwrap();
            update.put("b", bits, true)
        })
        .unwrap();
}

fn write_and_crash(image: Image, offset: u64, flush: bool) {
    image.write(&[2; 4096], offset).unwrap();
    if flush {
        image.flush().unwrap();
    }
    drop(image);
}

#[test]
fn mark_precedes_data() {
    let log = Log::record(&options(), tracked, |image| {
        write_and_crash(image, 8192, false)
    });
    let marks = log.writes(cluster(log.bitmap_page()));
    log.durable_before("a mark", &marks, &log.writes(cluster(log.data(0))));
}

#[test]
fn mark_precedes_mapping() {
    let log = Log::record(&options(), tracked, |image| {
        write_and_crash(image, 5 * CLUSTER, true)
    });
    let marks = log.writes(cluster(log.bitmap_page()));
    log.durable_before("a mark", &marks, &log.writes(entry(log.l2(0) + 5 * 8)));
}

#[test]
fn data_precedes_mapping() {
    let log = Log::record(&options(), tracked, |image| {
        write_and_crash(image, 5 * CLUSTER, true)
    });
    let data = log.writes(cluster(log.data(5)));
    log.durable_before("data", &data, &log.writes(entry(log.l2(0) + 5 * 8)));
}

#[test]
fn refcount_precedes_reference() {
    let log = Log::record(&options(), tracked, |image| {
        write_and_crash(image, 5 * CLUSTER, true)
    });
    let count = log.refcount_block(0) + log.data(5) / CLUSTER * 2;
    log.durable_before(
        "a refcount",
        &log.writes(count..count + 2),
        &log.writes(entry(log.l2(0) + 5 * 8)),
    );
}

/// One compressed cluster in an image that begins with another, in the same host cluster.
fn second_compressed_cluster() -> Log {
    Log::record(
        &options(),
        |_| {},
        |image| {
            image.write_compressed(&[1; 65536], 0).unwrap();
            image.flush().unwrap();
            image.write_compressed(&[2; 65536], 5 * CLUSTER).unwrap();
            image.flush().unwrap();
            drop(image);
        },
    )
}

#[test]
fn compressed_data_precedes_mapping() {
    let log = second_compressed_cluster();
    let descriptor = be64(&log.bytes, log.l2(0) + 5 * 8);
    let at = descriptor & ((1 << 54) - 1);
    assert_eq!(descriptor >> 54, 1 << 8, "compressed, in one sector");
    log.durable_before(
        "compressed data",
        &log.writes(at..at + 1),
        &log.writes(entry(log.l2(0) + 5 * 8))[1..],
    );
}

#[test]
fn refcount_of_a_shared_cluster_precedes_another_reference() {
    let log = second_compressed_cluster();
    let descriptor = be64(&log.bytes, log.l2(0) + 5 * 8);
    let host = (descriptor & ((1 << 54) - 1)) / CLUSTER;
    let count = log.refcount_block(0) + host * 2;
    let counted = be64(&log.bytes, count) >> 48;
    assert_eq!(counted, 2, "both lie in one host cluster");
    // The first write of each belongs to the first compressed cluster.
    log.durable_before(
        "the second count",
        &log.writes(count..count + 2)[1..],
        &log.writes(entry(log.l2(0) + 5 * 8))[1..],
    );
}

#[test]
fn refcount_block_precedes_table_entry() {
    // Clusters of 512 bytes and 64-bit counts: a block counts 64 clusters.
    let small = CreateOptions {
        cluster_bits: 9,
        refcount_bits: 64,
        ..CreateOptions::new(1 << 20)
    };
    let log = Log::record(
        &small,
        |_| {},
        |image| {
            image.write(&[1; 40_000], 0).unwrap();
            image.flush().unwrap();
        },
    );
    let table = be64(&log.bytes, 48);
    let block = log.refcount_block(1);
    log.durable_before(
        "a block",
        &log.writes(block..block + 512),
        &log.writes(entry(table + 8)),
    );
}

#[test]
fn refcount_table_precedes_header() {
    let small = CreateOptions {
        cluster_bits: 9,
        refcount_bits: 64,
        ..CreateOptions::new(8 << 20)
    };
    let log = Log::record(
        &small,
        |_| {},
        |image| {
            image.write(&vec![1; 4 << 20], 0).unwrap();
            image.flush().unwrap();
        },
    );
    let table = be64(&log.bytes, 48);
    assert!(table > 4096, "the table moved");
    log.durable_before(
        "the table",
        &log.writes(table..table + 512),
        &log.writes(48..60),
    );
}

#[test]
fn l2_table_precedes_l1_entry() {
    let log = Log::record(
        &options(),
        |_| {},
        |image| write_and_crash(image, 5 * CLUSTER, true),
    );
    let table = log.writes(cluster(log.l2(0)));
    log.durable_before("an L2 table", &table, &log.writes(entry(log.l1())));
}

#[test]
fn reference_goes_before_free() {
    let log = Log::record(&options(), tracked, |image| {
        image.discard(0, CLUSTER).unwrap();
        image.flush().unwrap();
        image.close().unwrap();
    });
    let freed = log.discards(0..u64::MAX);
    let entry_write = log.writes(entry(log.l2(0)));
    log.durable_before("a dropped reference", &entry_write, &freed);
}

#[test]
fn freed_clusters_are_not_reused_before_their_reference_is_durably_gone() {
    let log = Log::record(&options(), tracked, |image| {
        image.discard(0, CLUSTER).unwrap();
        // Without a flush the old cluster may still be referred to on disk.
        image.write(&[7; 65536], 9 * CLUSTER).unwrap();
        image.flush().unwrap();
        drop(image);
    });
    let old = 4 * CLUSTER;
    assert_ne!(log.data(9), old, "the freed cluster was reused at once");
}

#[test]
fn bitmap_page_precedes_table_entry() {
    let log = Log::record(
        &options(),
        |image| {
            image.write(&[1; 65536], 0).unwrap();
            add_bitmap(image, "b", 65536);
        },
        |image| write_and_crash(image, 8192, false),
    );
    let page = log.writes(cluster(log.bitmap_page()));
    let named = log.writes(entry(log.bitmap_table()));
    log.durable_before("a bitmap page", &page, &named);
    log.durable_before("its table entry", &named, &log.writes(cluster(log.data(0))));
}

fn freeze(image: &Image) {
    image
        .update(|update| {
            let mut old = update.load("b")?;
            // A page that is the same would be taken over.
            old.mark(0..update.image().size()).unwrap();
            update.put("b", old, false)?;
            let mut new = update.blank(granularity(65536))?;
            proof::plant(update.image(), &mut new)?;
            update.put("c", new, true)?;
            update.set_record(Some(proof::fresh_record(Scheme::Intervals).unwrap()));
            Ok::<_, Error>(())
        })
        .unwrap();
}

#[test]
fn structures_precede_header() {
    let log = Log::record(&options(), tracked, |image| {
        freeze(&image);
        drop(image);
    });
    let header = log.writes(0..512);
    for (what, place) in [
        ("a table", log.bitmap_table()),
        ("a page", log.bitmap_page()),
    ] {
        log.durable_before(what, &log.writes(cluster(place)), &header);
    }
}

#[test]
fn counts_and_mapping_of_a_snapshot_precede_header() {
    let before = common::built(&options(), |image| image.write(&[7; 65536], 0).unwrap());
    let log = Log::record(
        &options(),
        |image| image.write(&[7; 65536], 0).unwrap(),
        |image| {
            image.create_snapshot("s").unwrap();
            drop(image);
        },
    );
    let present = Log {
        events: Vec::new(),
        bytes: before,
    };
    let header = log.writes(0..512);
    let snapshots = be64(&log.bytes, 64);
    for (what, old, new) in [
        ("the L1 table", present.l1(), log.l1()),
        ("an L2 table", present.l2(0), log.l2(0)),
        (
            "a refcount block",
            present.refcount_block(0),
            log.refcount_block(0),
        ),
        (
            "the refcount table",
            be64(&present.bytes, 48),
            be64(&log.bytes, 48),
        ),
        ("the snapshot's L1 table", 0, be64(&log.bytes, snapshots)),
        ("the snapshot table", 0, snapshots),
    ] {
        assert_ne!(old, new, "{what} was changed in place");
        log.durable_before(what, &log.writes(cluster(new)), &header);
    }
    assert_eq!(header.len(), 1, "one write makes all of it true");
}

#[test]
fn slot_precedes_header_sector() {
    // The second freeze finds the canonical layout: one write of a slot, one of sector 0.
    let log = Log::record(
        &options(),
        |image| {
            tracked(image);
            freeze(image);
        },
        |image| {
            image
                .update(|update| {
                    update.set_record(Some(proof::fresh_record(Scheme::Cumulative).unwrap()));
                    Ok::<_, Error>(())
                })
                .unwrap();
            drop(image);
        },
    );
    log.durable_before("the slot", &log.writes(512..CLUSTER), &log.writes(0..512));
    assert_eq!(log.writes(0..512).len(), 1, "one write commits everything");
    let image = open_bytes(log.bytes.clone(), reading()).unwrap();
    assert!(matches!(
        image.chain(),
        tidemark_qcow2::chain::Reading::Current(_)
    ));
}

#[test]
fn staged_regions_stay_wide_until_the_writers_are_gone() {
    let log = Log::record(&options(), tracked, |image| {
        image.write(&[2; 4096], 8192).unwrap();
        image.flush().unwrap();
        image.flush().unwrap();
        drop(image);
    });
    let image = open_bytes(log.bytes.clone(), reading()).unwrap();
    let dirty = image.load_bitmap("b").unwrap();
    // 4 MiB of region, and the bit that was set before.
    assert_eq!(
        dirty.dirty_bytes(),
        (4 << 20) + CLUSTER,
        "a flush narrows nothing"
    );
}

#[test]
fn idle_regions_become_exact_while_busy_ones_stay_wide() {
    let log = Log::record(&options(), tracked, |image| {
        image.write(&[2; 4096], 8192).unwrap();
        image.write(&[2; 4096], 40 << 20).unwrap();
        image.flush().unwrap();
        image.narrow_idle_regions().unwrap();
        // Busy since the last call: wide on disk. The other region is idle: exact.
        image.write(&[3; 4096], 41 << 20).unwrap();
        image.narrow_idle_regions().unwrap();
        image.flush().unwrap();
        drop(image);
    });
    let image = open_bytes(log.bytes.clone(), reading()).unwrap();
    let dirty = image.load_bitmap("b").unwrap();
    assert_eq!(dirty.dirty_bytes(), CLUSTER + (4 << 20) + CLUSTER);
    assert!(dirty.test(8192) && dirty.test(40 << 20) && dirty.test((44 << 20) - 1));
}

#[test]
fn a_region_that_was_narrowed_is_wide_again_before_it_is_overwritten() {
    let log = Log::record(&options(), tracked, |image| {
        image.write(&[2; 4096], 8192).unwrap();
        image.flush().unwrap();
        image.narrow_idle_regions().unwrap();
        image.narrow_idle_regions().unwrap();
        image.write(&[3; 4096], 20_480).unwrap();
        drop(image);
    });
    let data = log.writes(cluster(log.data(0)));
    let marks = log.writes(cluster(log.bitmap_page()));
    let again = *data.last().unwrap();
    let mark = *marks.iter().rev().find(|&&mark| mark < again).unwrap();
    assert!(mark > data[0], "the second overwrite has a mark of its own");
    log.durable_before("the mark", &[mark], &[again]);
}

/// Hands out one storage as the data file.
#[derive(Clone, Debug)]
struct Beside(CrashStorage);

impl Gate for Beside {
    fn open(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        Err("there is no backing file".to_owned())
    }

    fn open_data(
        &self,
        _: &DataFileReference,
        _: &str,
        _: bool,
    ) -> Result<Box<dyn Storage>, String> {
        Ok(Box::new(self.0.clone()))
    }
}

/// Events of a session on an image (disk 0) with a data file (disk 1), and the image's first bytes.
fn record_beside(raw: bool, work: impl FnOnce(&Image)) -> Vec<Event> {
    let (storage, data) = (CrashStorage::new(Vec::new()), CrashStorage::new(Vec::new()));
    let options = CreateOptions {
        data_file: Some(DataFileReference {
            name: b"data.raw".to_vec(),
            raw,
        }),
        ..CreateOptions::new(SIZE)
    };
    let gate = |data: &CrashStorage| OpenOptions::writing(Arc::new(Beside(data.clone())));
    let image = Image::create(Box::new(storage.clone()), &options, gate(&data)).unwrap();
    image.write(&[1; 4096], 0).unwrap();
    add_bitmap(&image, "b", CLUSTER);
    image.close().unwrap();
    let world = CrashWorld::new(vec![storage.to_bytes(), data.to_bytes()]);
    let image = Image::open(Box::new(world.disk(0)), gate(&world.disk(1))).unwrap();
    work(&image);
    drop(image);
    world.log().events().to_vec()
}

fn position(events: &[Event], what: impl Fn(&Event) -> bool) -> usize {
    events.iter().position(what).expect("it happened")
}

/// A name, whether the data file is raw, and the change.
type Change = (&'static str, bool, fn(&Image));

#[test]
fn mark_is_durable_before_data_outside() {
    let changes: [Change; 5] = [
        ("overwrite", false, |image| {
            image.write(&[2; 512], 0).unwrap()
        }),
        ("new cluster", false, |image| {
            image.write(&[2; 512], 3 << 20).unwrap()
        }),
        ("discard", false, |image| image.discard(0, CLUSTER).unwrap()),
        ("raw zeros", true, |image| {
            image.write_zeroes(0, CLUSTER).unwrap()
        }),
        ("raw discard", true, |image| {
            image.discard(0, CLUSTER).unwrap()
        }),
    ];
    for (name, raw, change) in changes {
        let events = record_beside(raw, change);
        let data = position(&events, |event| event.disk == 1 && event.is_change());
        let flushes: Vec<usize> = (0..data)
            .filter(|&at| events[at].disk == 0 && events[at].kind == EventKind::Flush)
            .collect();
        let mark = position(&events, |event| event.disk == 0 && event.is_change());
        let durable = flushes.iter().any(|&flush| mark < flush);
        assert!(durable, "{name}: event {mark} is not durable before {data}");
    }
}

#[test]
fn data_outside_is_durable_before_its_mapping() {
    let events = record_beside(false, |image| {
        image.write(&[2; 512], 3 << 20).unwrap();
        image.flush().unwrap();
    });
    let data = position(&events, |event| event.disk == 1 && event.is_change());
    let flushed = position(&events, |event| {
        event.disk == 1 && event.kind == EventKind::Flush
    });
    let mapped = events
        .iter()
        .rposition(|event| event.disk == 0 && event.is_change());
    assert!(data < flushed && flushed < mapped.unwrap());
    // What came before the data was its mark; the mapping is the only write behind it.
    let between = &events[data..flushed];
    assert!(
        between
            .iter()
            .all(|event| event.disk == 1 || !event.is_change())
    );
}

#[test]
fn a_raw_data_file_is_mapped_before_it_is_written() {
    // Another program unmapped the cluster: zeros, the mapping, and only then the data.
    let (storage, data) = (CrashStorage::new(Vec::new()), CrashStorage::new(Vec::new()));
    let options = CreateOptions {
        data_file: Some(DataFileReference {
            name: b"data.raw".to_vec(),
            raw: true,
        }),
        ..CreateOptions::new(SIZE)
    };
    let gate = |data: &CrashStorage| OpenOptions::writing(Arc::new(Beside(data.clone())));
    let image = Image::create(Box::new(storage.clone()), &options, gate(&data)).unwrap();
    image.close().unwrap();
    let mut bytes = storage.to_bytes();
    let l2 = be64(&bytes, be64(&bytes, 40)) & OFFSET;
    let entry = usize::try_from(l2 + 8).unwrap();
    bytes[entry..entry + 8].copy_from_slice(&1_u64.to_be_bytes());
    let world = CrashWorld::new(vec![bytes, vec![0x55; usize::try_from(SIZE).unwrap()]]);
    let image = Image::open(Box::new(world.disk(0)), gate(&world.disk(1))).unwrap();
    image.write(&[7; 512], CLUSTER + 512).unwrap();
    let events = world.log().events().to_vec();
    let zeros = position(&events, |event| {
        event.disk == 1 && matches!(event.kind, EventKind::WriteZeroes { .. })
    });
    let mapping = position(&events, |event| {
        matches!(event.kind, EventKind::Write { offset, len }
            if event.disk == 0 && (offset..offset + len).contains(&(l2 + 8)))
    });
    let written = position(&events, |event| {
        event.disk == 1 && matches!(event.kind, EventKind::Write { .. })
    });
    let flushes = |disk, range: Range<usize>| {
        events[range]
            .iter()
            .any(|event| event.disk == disk && event.kind == EventKind::Flush)
    };
    assert!(flushes(1, zeros..mapping), "the zeros are not durable");
    assert!(flushes(0, mapping..written), "the mapping is not durable");
    let mut cluster = vec![0; usize::try_from(CLUSTER).unwrap()];
    image.read(&mut cluster, CLUSTER).unwrap();
    let place = usize::try_from(CLUSTER).unwrap();
    assert!(world.disk(1).to_bytes()[place..2 * place] == cluster[..]);
    assert_eq!((cluster[0], cluster[512]), (0, 7));
}

#[test]
fn a_data_file_grows_before_the_disk_and_is_cut_behind_it() {
    let header =
        |event: &Event| event.disk == 0 && matches!(event.kind, EventKind::Write { offset: 0, .. });
    for raw in [false, true] {
        let events = record_beside(raw, |image| {
            image.resize(SIZE + 512, Shrink::Refused).unwrap();
        });
        let data = position(&events, |event| event.disk == 1 && event.is_change());
        let commit = position(&events, header);
        let flush = |event: &Event| event.disk == 1 && event.kind == EventKind::Flush;
        assert!(events[data..commit].iter().any(flush), "raw {raw}: grown");
        let events = record_beside(raw, |image| {
            image.resize(SIZE - 512, Shrink::Allowed).unwrap();
        });
        let commit = position(&events, header);
        let cut = position(&events, |event| event.disk == 1 && event.is_change());
        let flush = |event: &Event| event.disk == 0 && event.kind == EventKind::Flush;
        assert!(events[commit..cut].iter().any(flush), "raw {raw}: cut");
    }
}

#[test]
fn a_place_is_zeros_before_it_is_mapped() {
    for mode in [Preallocation::Metadata, Preallocation::Full] {
        let log = Log::record(
            &CreateOptions::new(CLUSTER),
            |image| {
                image.write(&[1; 512], 0).unwrap();
                image.flush().unwrap();
                image.discard(0, CLUSTER).unwrap();
            },
            |image| {
                image.grow(2 * CLUSTER, mode).unwrap();
                drop(image);
            },
        );
        let place = log.writes(cluster(log.data(1)));
        let header = log.writes(0..512);
        log.durable_before("zeros", &place, &header);
    }
}

/// Shows two raw disks of one byte each below an image.
#[derive(Clone, Copy, Debug)]
struct Bases;

impl Gate for Bases {
    fn open(&self, reference: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        let byte = u8::try_from(reference.name.len()).unwrap();
        let bytes = vec![byte; usize::try_from(SIZE).unwrap()];
        Ok(Box::new(MemoryStorage::from_bytes(bytes)))
    }
}

fn raw_base(name: &str) -> BackingReference {
    BackingReference {
        name: name.as_bytes().to_vec(),
        format: "raw".to_owned(),
    }
}

#[test]
fn kept_data_precedes_the_new_backing_name() {
    let options = CreateOptions {
        backing: Some(raw_base("a")),
        ..CreateOptions::new(SIZE)
    };
    let open = || OpenOptions::writing(Arc::new(Bases));
    let storage = CrashStorage::new(Vec::new());
    let image = Image::create(Box::new(storage.clone()), &options, open()).unwrap();
    image.close().unwrap();
    let storage = CrashStorage::new(storage.to_bytes());
    let image = Image::open(Box::new(storage.clone()), open()).unwrap();
    let rebase = RebaseOptions {
        gate: Arc::new(Bases),
        threads: 2,
    };
    transfer::rebase(image, Some(&raw_base("bb")), &rebase, &|_, _| {}).unwrap();
    let log = Log {
        events: storage.log().events().to_vec(),
        bytes: storage.to_bytes(),
    };
    let header = log.writes(0..512);
    for cluster_number in [0, SIZE / CLUSTER - 1] {
        let data = log.writes(cluster(log.data(cluster_number)));
        log.durable_before("what the old base showed", &data, &header);
    }
    let mapping = log.writes(entry(log.l1()));
    log.durable_before("the mapping", &mapping, &header);
}

/// One backing file, whoever opens it.
#[derive(Clone, Debug)]
struct Below(CrashStorage);

impl Gate for Below {
    fn open(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        Ok(Box::new(self.0.clone()))
    }

    fn open_for_writing(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        Ok(Box::new(self.0.clone()))
    }
}

#[test]
fn committed_data_and_bitmaps_precede_the_emptied_overlay() {
    let base = common::built(&options(), |image| add_bitmap(image, "b", 65_536));
    let options = CreateOptions {
        backing: Some(BackingReference {
            format: "qcow2".to_owned(),
            ..raw_base("base")
        }),
        ..CreateOptions::new(SIZE)
    };
    let top = CrashStorage::new(Vec::new());
    let gate = Arc::new(Below(CrashStorage::new(base.clone())));
    let image = Image::create(Box::new(top.clone()), &options, OpenOptions::writing(gate));
    let image = image.unwrap();
    add_bitmap(&image, "b", 65_536);
    image.write(&[2; 70_000], 5 * CLUSTER).unwrap();
    image.close().unwrap();
    let world = CrashWorld::new(vec![base, top.to_bytes()]);
    let commit = CommitOptions {
        gate: Arc::new(Below(world.disk(0))),
        threads: 1,
        ..CommitOptions::default()
    };
    transfer::commit(Box::new(world.disk(1)), &commit, &|_, _| {}).unwrap();
    let events = world.log().events().to_vec();
    let header = position(&events, |event| {
        event.disk == 1
            && event.is_change()
            && matches!(event.kind, EventKind::Write { offset: 0, .. })
    });
    let last = events
        .iter()
        .rposition(|event| event.disk == 0 && event.is_change())
        .unwrap();
    assert!(last < header, "the base is still written: {last}, {header}");
    let flushed = events[last..header]
        .iter()
        .any(|event| event.disk == 0 && event.kind == EventKind::Flush);
    assert!(flushed, "what went over is not durable");
    // The data come before the bitmaps, whose directory the base's last header write names.
    let bitmaps = events[..header]
        .iter()
        .rposition(|event| {
            event.disk == 0 && matches!(event.kind, EventKind::Write { offset: 0, .. })
        })
        .unwrap();
    let data = position(&events, |event| {
        event.disk == 0 && matches!(event.kind, EventKind::Write { len, .. } if len >= CLUSTER)
    });
    assert!(data < bitmaps);
}

/// The repair of an image that `damage` has broken, and the length that its file had.
fn mended(damage: impl FnOnce(&Log, &mut Vec<u8>)) -> (Log, u64) {
    let healthy = Log::record(&options(), tracked, |image| image.close().unwrap());
    let mut bytes = healthy.bytes.clone();
    damage(&healthy, &mut bytes);
    let length = u64::try_from(bytes.len()).unwrap();
    let storage = CrashStorage::new(bytes);
    let report = repair(Box::new(storage.clone()), Repair::All).unwrap();
    assert!(report.check.is_clean() && report.corruptions_fixed > 0);
    let log = Log {
        events: storage.log().events().to_vec(),
        bytes: storage.to_bytes(),
    };
    (log, length)
}

fn put64(bytes: &mut [u8], at: u64, value: u64) {
    let at = usize::try_from(at).unwrap();
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

#[test]
fn repaired_structures_precede_header() {
    let (log, length) = mended(|_, bytes| {
        let table = be64(bytes, 48);
        let entry = be64(bytes, table);
        put64(bytes, table, entry | 1);
    });
    let header = log.writes(0..512);
    let table = be64(&log.bytes, 48);
    assert!(table >= length, "the new table lies behind the old end");
    log.durable_before("refcount table", &log.writes(cluster(table)), &header);
    let block = cluster(log.refcount_block(0));
    log.durable_before("refcount block", &log.writes(block), &header);
    let old = log.writes(0..length);
    assert_eq!(
        old.first(),
        header.first(),
        "the old image is written first"
    );
}

#[test]
fn corrected_counts_precede_flags() {
    let mut places = (0, 0);
    let (log, _) = mended(|healthy, bytes| {
        // Two references counted where there is one, and so no COPIED flag.
        let count = healthy.refcount_block(0) + healthy.data(0) / CLUSTER * 2;
        let flag = healthy.l2(0);
        bytes[usize::try_from(count).unwrap() + 1] = 2;
        put64(bytes, flag, healthy.data(0));
        places = (count, flag);
    });
    let (count, flag) = places;
    let counts = log.writes(count..count + 2);
    log.durable_before("count", &counts, &log.writes(entry(flag)));
}
