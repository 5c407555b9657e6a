//! One damage each, and what becomes of it.

use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{Damage, Error, Image};

use crate::common::{add_bitmap, alone, boxed, open_bytes, open_file, read_all, reading, writing};
use crate::image::{COPIED, Tables, by_qemu};

const SIZE: u64 = 1 << 20;
const OPTS: &[(&str, &str)] = &[("cluster_size", "4096")];

fn tables() -> Tables {
    let folder = tempfile::tempdir().unwrap();
    by_qemu(&folder.path().join("image.qcow2"), SIZE, OPTS)
}

fn content(bytes: &[u8]) -> Vec<u8> {
    read_all(&open_bytes(bytes.to_vec(), reading()).unwrap())
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// The way in which QEMU loses data: a bitmap is stored where a refcount is too low.
#[test]
fn bitmaps_never_go_to_a_cluster_of_guest_data_with_refcount_0() {
    require_qemu!();
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    let mut tables = by_qemu(&path, SIZE, OPTS);
    let victims = tables.data_entries();
    for &victim in &victims {
        tables.set_refcount(tables.host(victim), 0);
    }
    std::fs::write(&path, &tables.bytes).unwrap();
    let before = content(&tables.bytes);
    let image = open_file(&path, writing());
    for number in 0..40 {
        add_bitmap(&image, &format!("b{number}"), 4096);
    }
    image.write(&[0xEE; 8192], 40_960).unwrap();
    image.flush().unwrap();
    image
        .update::<_, Error>(|update| update.remove("b3"))
        .unwrap();
    image.close().unwrap();
    let mut wanted = before;
    wanted[40_960..49_152].fill(0xEE);
    assert!(qemu_img::convert_to_raw(&path) == wanted);
    println!("{} clusters were counted zero", victims.len());
    assert!(victims.len() > 100);
}

#[test]
fn a_write_to_one_of_two_guest_clusters_on_one_host_cluster_leaves_the_other() {
    require_qemu!();
    let healthy = tables();
    let entries = healthy.data_entries();
    let mut count = 0;
    for (one, other) in [(0, 1), (0, entries.len() - 1), (entries.len() - 1, 3)] {
        for flags in [(COPIED, COPIED), (COPIED, 0), (0, COPIED)] {
            for first in [true, false] {
                let mut tables = healthy.clone();
                tables.copy_entry(entries[other], entries[one]);
                let bare = |at| tables.entry(at) & !COPIED;
                let (one_entry, other_entry) = (bare(entries[one]), bare(entries[other]));
                tables.set_entry(entries[one], one_entry | flags.0);
                tables.set_entry(entries[other], other_entry | flags.1);
                let mut wanted = content(&tables.bytes);
                let storage = CrashStorage::new(tables.bytes.clone());
                let image = Image::open(boxed(storage.clone()), writing()).unwrap();
                let guest = guest_offset(&tables, entries[if first { one } else { other }]);
                image.write(&[0xAB; 100], guest + 50).unwrap();
                image.flush().unwrap();
                image.discard(guest, 4096).unwrap();
                image.flush().unwrap();
                image.write(&[0xAC; 300], guest + 20).unwrap();
                image.close().unwrap();
                wanted[at(guest)..at(guest + 4096)].fill(0);
                wanted[at(guest + 20)..at(guest + 320)].fill(0xAC);
                assert!(content(&storage.to_bytes()) == wanted);
                count += 1;
            }
        }
    }
    println!("{count} ways to share a cluster");
    assert_eq!(count, 18);
}

/// The image has one L2 table.
fn guest_offset(tables: &Tables, entry: u64) -> u64 {
    let table = entry / tables.cluster() * tables.cluster();
    (entry - table) / 8 * tables.cluster()
}

#[test]
fn a_bitmap_page_on_guest_data_ends_the_writing_by_name() {
    require_qemu!();
    let mut tables = tables();
    let entry = tables.data_entries()[0];
    let (host, cluster) = (tables.host(entry), tables.cluster());
    let pages: Vec<u64> = (0..tables.clusters() * cluster / 8)
        .map(|word| word * 8)
        .filter(|&at| is_page_entry(&tables, at))
        .collect();
    assert_eq!(pages.len(), 1, "the bitmap has one page");
    tables.set_entry(pages[0], host * cluster);
    let storage = CrashStorage::new(tables.bytes.clone());
    let image = Image::open(boxed(storage.clone()), writing()).unwrap();
    let refused = image.write(&[1; 512], SIZE / 2 + 4096).unwrap_err();
    let named = matches!(refused.damage(), Some(Damage::Place { structure, .. }) if *structure == "bitmap page");
    assert!(named, "{refused}");
    image
        .update::<_, Error>(|update| update.remove("b"))
        .unwrap();
    image.close().unwrap();
    assert!(content(&storage.to_bytes()) == content(&tables.bytes));
}

/// Whether the word at `at` is the only entry of the bitmap's table: found from the header.
fn is_page_entry(tables: &Tables, at: u64) -> bool {
    let extension = (104..4096)
        .step_by(8)
        .find(|&offset| tables.entry(offset) >> 32 == 0x2385_2875)
        .unwrap();
    let directory = tables.entry(extension + 24);
    at == tables.entry(directory)
}

#[test]
fn metadata_on_guest_data_ends_the_writing_and_marks_the_image() {
    require_qemu!();
    let healthy = tables();
    let entries = healthy.data_entries();
    let l1 = healthy.entry(40);
    let directory = {
        let extension = (104..4096)
            .step_by(8)
            .find(|&offset| healthy.entry(offset) >> 32 == 0x2385_2875)
            .unwrap();
        healthy.entry(extension + 24)
    };
    let block = healthy.entry(healthy.entry(48));
    let places = [
        ("L1 table", l1),
        ("refcount table", healthy.entry(48)),
        ("refcount block", block),
        ("bitmap directory", directory),
        ("bitmap table", healthy.entry(directory)),
        ("L2 table", entries[0] / 4096 * 4096),
    ];
    for (name, place) in places {
        let mut tables = healthy.clone();
        tables.set_entry(entries[2], place | COPIED);
        let before = content(&tables.bytes);
        let storage = CrashStorage::new(tables.bytes.clone());
        let image = Image::open(boxed(storage.clone()), writing()).unwrap();
        // Not below the damaged entry, and not even in place.
        let refused = image.write(&[1; 512], SIZE - 4096).unwrap_err();
        let overlap = matches!(refused.damage(), Some(Damage::Overlap { .. }));
        assert!(overlap, "{name}: {refused}");
        assert!(refused.to_string().contains(name), "{name}: {refused}");
        image.close().unwrap();
        let after = storage.to_bytes();
        assert!(content(&after) == before, "{name}");
        let image = open_bytes(after, reading()).unwrap();
        assert!(image.is_marked_corrupt(), "{name}");
    }
    println!("{} structures", places.len());
}

/// Many writers at once, the first of which counts for all.
#[test]
fn threads_never_touch_what_is_not_theirs() {
    require_qemu!();
    let healthy = tables();
    let entries = healthy.data_entries();
    for round in 0..6 {
        let mut tables = healthy.clone();
        for pair in entries.chunks(2).skip(round % 3).step_by(3) {
            if let [one, other] = *pair {
                match round % 2 {
                    0 => tables.copy_entry(other, one),
                    _ => tables.set_refcount(tables.host(one), 0),
                }
            }
        }
        let mut wanted = content(&tables.bytes);
        let storage = CrashStorage::new(tables.bytes.clone());
        let image = Image::open(boxed(storage.clone()), writing()).unwrap();
        let threads: u8 = 4;
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let image = &image;
                scope.spawn(move || {
                    for turn in 0..16_u64 {
                        let slot = turn * 4 + u64::from(thread);
                        image.write(&[thread + 1; 2000], slot * 16_384).unwrap();
                        image.discard(slot * 16_384 + 8192, 4096).unwrap();
                        image.flush().unwrap();
                    }
                });
            }
        });
        for slot in 0..64_u64 {
            let (start, thread) = (slot * 16_384, u8::try_from(slot % 4).unwrap());
            wanted[at(start)..at(start + 2000)].fill(thread + 1);
            wanted[at(start + 8192)..at(start + 12_288)].fill(0);
        }
        assert!(read_all(&image) == wanted, "round {round}");
        image.close().unwrap();
        assert!(content(&storage.to_bytes()) == wanted, "round {round}");
    }
}
