//! Lives of ours beside snapshots: compressed clusters, bitmaps, and guests on several threads.

use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::random::Random;
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{CreateOptions, Image};

use crate::common::{self, add_bitmap, alone, assert_covers, read_all};
use crate::life::{Disk, MIB, Place, text};
use crate::turns::{assert_both_read, our_writes};

fn write_compressed(image: &Image, disk: &mut Disk, random: &mut Random, cluster: u64) {
    let clusters = u64::try_from(disk.content.len()).unwrap() / cluster;
    let first = random.within(0..clusters);
    let count = random.within(1..20).min(clusters - first);
    let byte = u8::try_from(random.within(1..255)).unwrap();
    let (offset, len) = (first * cluster, count * cluster);
    let data = vec![byte; usize::try_from(len).unwrap()];
    image.write_compressed(&data, offset).unwrap();
    disk.fill(offset, len, byte);
}

#[test]
fn compressed_clusters_are_shared_with_snapshots() {
    let _alone = alone();
    require_qemu!();
    let mut moments = 0;
    for (seed, cluster_bits, refcount_bits, extended_l2) in [
        (1, 9, 16, false),
        (2, 12, 32, false),
        (3, 16, 16, false),
        (4, 12, 64, false),
        (5, 16, 8, false),
        (6, 14, 16, true),
        (7, 16, 32, true),
    ] {
        let place = Place::new();
        let mut random = Random::new(seed);
        let mut disk = Disk::new(2 * MIB);
        let options = CreateOptions {
            cluster_bits,
            refcount_bits,
            extended_l2,
            ..CreateOptions::new(2 * MIB)
        };
        let image = common::create_file(&place.path, &options);
        for round in 0..4 {
            for _ in 0..4 {
                write_compressed(&image, &mut disk, &mut random, 1 << cluster_bits);
                our_writes(&image, &mut disk, &mut random, 1);
            }
            match round {
                2 => {
                    image.apply_snapshot("s0").unwrap();
                    disk.content = disk.snapshots[0].1.clone();
                }
                3 => {
                    image.delete_snapshot("s0").unwrap();
                    disk.snapshots.remove(0);
                }
                _ => {
                    let name = format!("s{round}");
                    image.create_snapshot(&name).unwrap();
                    disk.take(&name);
                }
            }
            image.flush().unwrap();
            assert!(read_all(&image) == disk.content, "seed {seed}, {round}");
        }
        image.close().unwrap();
        moments += assert_both_read(&place, &disk, &format!("seed {seed}"));
        // And what QEMU deletes.
        for (name, _) in std::mem::take(&mut disk.snapshots) {
            qemu_img::ok(&["snapshot", "-q", "-d", &name, text(&place.path)]);
            moments += assert_both_read(&place, &disk, &format!("seed {seed}"));
        }
    }
    println!("{moments} moments with compressed clusters");
    assert!(moments >= 21, "{moments}");
}

#[test]
fn bitmaps_cover_every_byte_that_applying_changes() {
    let _alone = alone();
    let mut applied = 0;
    for seed in 0..12 {
        let place = Place::new();
        let mut random = Random::new(900 + seed);
        let mut disk = Disk::new(2 * MIB);
        let options = CreateOptions {
            cluster_bits: [9, 12, 16][usize::try_from(seed % 3).unwrap()],
            ..CreateOptions::new(2 * MIB)
        };
        let image = common::create_file(&place.path, &options);
        for number in 0..3 {
            our_writes(&image, &mut disk, &mut random, 4);
            let name = format!("s{number}");
            image.create_snapshot(&name).unwrap();
            disk.take(&name);
        }
        let granularity = [512, 4096, 65536][usize::try_from(seed / 3 % 3).unwrap()];
        add_bitmap(&image, "b", granularity);
        let start = disk.content.clone();
        for _ in 0..3 {
            our_writes(&image, &mut disk, &mut random, 1);
            let number = usize::try_from(random.within(0..3)).unwrap();
            image.apply_snapshot(&disk.snapshots[number].0).unwrap();
            disk.content = disk.snapshots[number].1.clone();
            applied += 1;
        }
        image.close().unwrap();
        let image = place.open();
        let content = read_all(&image);
        assert!(content == disk.content, "seed {seed}");
        let bits = image.load_bitmap("b").unwrap();
        assert_covers(&bits, &start, &content, &format!("seed {seed}"));
        let report = image.check().unwrap();
        assert!(report.is_clean(), "seed {seed}: {:?}", report.findings);
    }
    println!("{applied} snapshots applied beside a bitmap");
    assert!(applied >= 36, "{applied}");
}

#[test]
fn guests_on_many_threads_write_while_snapshots_come_and_go() {
    let _alone = alone();
    let place = Place::new();
    let options = CreateOptions {
        cluster_bits: 12,
        ..CreateOptions::new(4 * MIB)
    };
    let image = common::create_file(&place.path, &options);
    add_bitmap(&image, "b", 65536);
    let content = std::thread::scope(|scope| {
        let guests: Vec<_> = (0..4_u64)
            .map(|guest| {
                let image = &image;
                scope.spawn(move || {
                    let mut random = Random::new(guest);
                    let mut own = vec![0; usize::try_from(MIB).unwrap()];
                    for number in 0..150_u64 {
                        let at = random.within(0..MIB - 9000);
                        let byte = u8::try_from(number + 1).unwrap();
                        let data = vec![byte; usize::try_from(random.within(1..9000)).unwrap()];
                        image.write(&data, guest * MIB + at).unwrap();
                        let at = usize::try_from(at).unwrap();
                        own[at..at + data.len()].copy_from_slice(&data);
                    }
                    own
                })
            })
            .collect();
        for number in 0..6 {
            image.create_snapshot(&format!("s{number}")).unwrap();
            if number % 2 == 1 {
                image.delete_snapshot(&format!("s{}", number - 1)).unwrap();
            }
        }
        let parts = guests.into_iter().map(|guest| guest.join().unwrap());
        parts.collect::<Vec<Vec<u8>>>().concat()
    });
    assert!(read_all(&image) == content);
    image.close().unwrap();
    let image = place.open();
    let report = image.check().unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    assert_eq!(image.snapshots().unwrap().len(), 3);
    assert!(read_all(&image) == content);
    let bits = image.load_bitmap("b").unwrap();
    assert_covers(&bits, &vec![0; content.len()], &content, "threads");
    println!("600 writes beside 9 changes of snapshots");
}
