//! Lives in which we and QEMU take turns: both write, take, apply and delete snapshots, and both
//! read every moment back.

use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::Image;

use crate::common::{self, alone, read_all};
use crate::life::{Disk, MIB, Place, SHAPES, open_snapshot, qemu_writes, text};

/// Snapshots that refcounts of these creation options can count besides the present.
fn most_snapshots(opts: &[(&str, &str)]) -> usize {
    if opts.contains(&("refcount_bits", "2")) {
        2
    } else {
        4
    }
}

pub(crate) fn our_writes(image: &Image, disk: &mut Disk, random: &mut Random, count: u64) {
    for _ in 0..count {
        let (offset, len) = disk.range(random);
        let byte = u8::try_from(random.within(1..255)).unwrap();
        match random.within(0..8) {
            0 => {
                image.write_zeroes(offset, len).unwrap();
                disk.fill(offset, len, 0);
            }
            1 => {
                image.discard(offset, len).unwrap();
                let start = usize::try_from(offset).unwrap();
                let end = start + usize::try_from(len).unwrap();
                image.read(&mut disk.content[start..end], offset).unwrap();
            }
            _ => {
                let data = vec![byte; usize::try_from(len).unwrap()];
                image.write(&data, offset).unwrap();
                disk.fill(offset, len, byte);
            }
        }
    }
}

/// One thing that can be done to the snapshots of `disk`, by name.
#[derive(Clone, Debug)]
enum Step {
    Take(String),
    Apply(usize),
    Delete(usize),
}

fn step(disk: &Disk, random: &mut Random, number: u64, most: usize) -> Step {
    let count = u64::try_from(disk.snapshots.len()).unwrap();
    let any = |random: &mut Random| usize::try_from(random.within(0..count)).unwrap();
    match random.within(0..4) {
        0 if count > 0 => Step::Apply(any(random)),
        1 if count > 0 => Step::Delete(any(random)),
        _ if disk.snapshots.len() < most => Step::Take(format!("s{number}")),
        _ => Step::Delete(any(random)),
    }
}

fn ours(image: &Image, disk: &mut Disk, step: &Step) {
    match step {
        Step::Take(name) => {
            let info = image.create_snapshot(name).unwrap();
            assert_eq!(&info.name, name);
            disk.take(name);
        }
        Step::Apply(number) => {
            image.apply_snapshot(&disk.snapshots[*number].0).unwrap();
            disk.content = disk.snapshots[*number].1.clone();
        }
        Step::Delete(number) => {
            image
                .delete_snapshot(&disk.snapshots.remove(*number).0)
                .unwrap();
        }
    }
}

fn theirs(place: &Place, disk: &mut Disk, step: &Step) {
    let run = |flag: &str, name: &str| {
        qemu_img::ok(&["snapshot", "-q", flag, name, text(&place.path)]);
    };
    match step {
        Step::Take(name) => {
            run("-c", name);
            disk.take(name);
        }
        Step::Apply(number) => {
            run("-a", &disk.snapshots[*number].0);
            disk.content = disk.snapshots[*number].1.clone();
        }
        Step::Delete(number) => run("-d", &disk.snapshots.remove(*number).0),
    }
}

/// Both readers see every moment as it was, and both checks are clean.
pub(crate) fn assert_both_read(place: &Place, disk: &Disk, what: &str) -> usize {
    qemu_img::check(&place.path).assert_clean();
    let image = place.open();
    let report = image.check().unwrap();
    assert!(report.is_clean(), "{what}: {:?}", report.findings);
    assert!(read_all(&image) == disk.content, "{what}: present");
    assert!(
        qemu_img::convert_to_raw(&place.path) == disk.content,
        "{what}: QEMU reads another present"
    );
    for (name, content) in &disk.snapshots {
        let snapshot = open_snapshot(place.bytes(), common::reading(), name);
        assert!(&read_all(&snapshot) == content, "{what}: {name}");
        let raw = place.beside("raw");
        qemu_img::convert(&place.path, "qcow2", &raw, "raw", &["-l", name]);
        let theirs = std::fs::read(&raw).unwrap();
        // QEMU copies as much as the present disk has.
        let common = theirs.len().min(content.len());
        let same = theirs[..common] == content[..common];
        assert!(same, "{what}: QEMU reads another {name}");
    }
    1 + disk.snapshots.len()
}

#[test]
fn we_and_qemu_take_turns_and_both_read_every_moment() {
    let _alone = alone();
    require_qemu!();
    let cases = std::env::var("TIDEMARK_CASES")
        .ok()
        .and_then(|number| number.parse().ok())
        .unwrap_or(1);
    let (mut moments, mut steps) = (0, 0);
    for (seed, opts) in (100..)
        .zip(SHAPES.iter().cycle())
        .take(cases * SHAPES.len())
    {
        let place = Place::new();
        let mut random = Random::new(seed);
        let mut disk = Disk::new(3 * MIB + 512);
        let most = most_snapshots(opts);
        qemu_img::create(&place.path, 3 * MIB + 512, opts);
        for number in 0..8 {
            if random.one_in(3) {
                qemu_writes(&place.path, &mut disk, &mut random, 4);
                let step = step(&disk, &mut random, 100 + number, most);
                theirs(&place, &mut disk, &step);
            } else {
                let image = common::open_file(&place.path, common::writing());
                our_writes(&image, &mut disk, &mut random, 6);
                for part in 0..2 {
                    let step = step(&disk, &mut random, number * 2 + part, most);
                    ours(&image, &mut disk, &step);
                    our_writes(&image, &mut disk, &mut random, 3);
                    steps += 1;
                }
                assert!(read_all(&image) == disk.content, "{opts:?}: while open");
                image.close().unwrap();
            }
            if number % 2 == 1 {
                let what = format!("seed {seed}, {opts:?}, turn {number}");
                moments += assert_both_read(&place, &disk, &what);
            }
        }
    }
    println!("{steps} steps of ours, {moments} moments read by both");
    assert!(steps >= 60 && moments >= 60, "{steps} {moments}");
}

#[test]
fn refcounts_of_one_bit_cannot_count_a_snapshot() {
    let _alone = alone();
    let options = tidemark_qcow2::CreateOptions {
        refcount_bits: 1,
        ..tidemark_qcow2::CreateOptions::new(MIB)
    };
    let bytes = common::built(&options, |image| image.write(&[1; 5000], 0).unwrap());
    let storage = tidemark_fixtures::storage::CrashStorage::new(bytes.clone());
    let image = Image::open(Box::new(storage.clone()), common::writing()).unwrap();
    assert!(image.create_snapshot("a").unwrap_err().feature().is_some());
    assert!(storage.to_bytes() == bytes, "a refusal wrote");
}

#[test]
fn a_refcount_that_is_full_refuses_before_the_first_write() {
    let _alone = alone();
    let options = tidemark_qcow2::CreateOptions {
        refcount_bits: 2,
        ..tidemark_qcow2::CreateOptions::new(MIB)
    };
    let bytes = common::built(&options, |image| {
        image.write(&[1; 5000], 0).unwrap();
        image.create_snapshot("a").unwrap();
        image.create_snapshot("b").unwrap();
    });
    let storage = tidemark_fixtures::storage::CrashStorage::new(bytes.clone());
    let image = Image::open(Box::new(storage.clone()), common::writing()).unwrap();
    let error = image.create_snapshot("c").unwrap_err();
    assert!(matches!(
        error.feature(),
        Some(tidemark_qcow2::Feature::Limit { .. })
    ));
    assert!(storage.to_bytes() == bytes, "a refusal wrote");
    // With one less there is room again, and applying one needs no room of its own.
    image.apply_snapshot("a").unwrap();
    image.delete_snapshot("a").unwrap();
    image.create_snapshot("c").unwrap();
    image.close().unwrap();
}

#[test]
fn qemu_reads_the_table_that_we_write() {
    let _alone = alone();
    require_qemu!();
    let place = Place::new();
    qemu_img::create(&place.path, MIB, &[]);
    qemu_img::ok(&["snapshot", "-q", "-c", "theirs", text(&place.path)]);
    qemu_io::commands(&place.path, &["write -P 3 0 64k"]);
    let image = common::open_file(&place.path, common::writing());
    let info = image.create_snapshot("ours").unwrap();
    assert_eq!(info.id, "2");
    assert_eq!(image.create_snapshot("").unwrap().id, "3");
    let listed = image.snapshots().unwrap();
    image.close().unwrap();
    let theirs = qemu_img::info(&place.path)["snapshots"].clone();
    let theirs = theirs.as_array().unwrap();
    assert_eq!(theirs.len(), 3);
    assert_eq!(theirs[1]["name"], "ours");
    assert_eq!(theirs[1]["date-sec"], info.seconds);
    assert_eq!(theirs[1]["date-nsec"], info.nanoseconds);
    assert_eq!(listed.len(), 3);
    assert_eq!(theirs[0]["icount"], theirs[1]["icount"]);
    // QEMU counts on from ours.
    qemu_img::ok(&["snapshot", "-q", "-c", "more", text(&place.path)]);
    assert_eq!(place.open().snapshots().unwrap()[3].id, "4");
    qemu_img::check(&place.path).assert_clean();
}
