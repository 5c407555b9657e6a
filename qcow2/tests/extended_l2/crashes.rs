//! Every image that a crash among writes to subclusters could leave, and every call that fails.

use tidemark_fixtures::ops::fill;
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::storage::{CallKind, CrashOptions, CrashStorage, Fault, FaultyStorage};
use tidemark_qcow2::Image;

use crate::common::{
    add_bitmap, alone, assert_covers, boxed, built, open_bytes, read_all, reading, writing,
};
use crate::{options, to_u64, to_usize};

const CLUSTER: usize = 16 << 10;
const PART: usize = CLUSTER / 32;
const SIZE: usize = 24 * CLUSTER;

/// One change of the disk.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(usize, usize),
    Compressed(usize, usize),
    Zero(usize, usize),
    Discard(usize, usize),
    Flush,
}

/// New subclusters beside old ones, zeros over data and data over zeros, in one cluster and over
/// several, and the same with a compressed one.
const STEPS: [Step; 22] = [
    Step::Write(CLUSTER + 3 * PART, PART),
    Step::Write(CLUSTER + 9 * PART + 100, 3 * PART),
    Step::Flush,
    Step::Zero(CLUSTER + 3 * PART, 2 * PART),
    Step::Write(CLUSTER + 4 * PART, PART / 2),
    Step::Flush,
    Step::Write(CLUSTER + 3 * PART, PART),
    Step::Zero(2 * PART, 2 * CLUSTER),
    Step::Flush,
    Step::Write(PART, CLUSTER),
    Step::Discard(5 * CLUSTER + PART, 4 * PART),
    Step::Write(5 * CLUSTER + 2 * PART, 2 * PART),
    Step::Flush,
    Step::Zero(8 * CLUSTER + 7 * PART, 5 * PART),
    Step::Discard(9 * CLUSTER + PART, 2 * PART),
    Step::Flush,
    Step::Compressed(12 * CLUSTER, 2 * CLUSTER),
    Step::Flush,
    Step::Zero(12 * CLUSTER + 16 * PART, CLUSTER),
    Step::Write(13 * CLUSTER + 20 * PART, 30),
    Step::Discard(14 * CLUSTER, 8 * CLUSTER),
    Step::Flush,
];

fn compressible(seed: u64, len: usize) -> Vec<u8> {
    fill(seed, 64).into_iter().cycle().take(len).collect()
}

/// What the disk holds at first: whole clusters, parts of clusters, compressed ones.
fn base() -> Vec<u8> {
    built(&options(14, to_u64(SIZE)), |image| {
        image.write(&fill(1, to_u64(2 * CLUSTER)), 0).unwrap();
        let at = to_u64(5 * CLUSTER);
        image.write(&fill(2, to_u64(6 * PART)), at).unwrap();
        let at = to_u64(8 * CLUSTER);
        let data = compressible(3, 2 * CLUSTER);
        image.write_compressed(&data, at).unwrap();
        add_bitmap(image, "b", 512);
    })
}

/// Does one step, and says what the disk holds then.
fn run(image: &Image, number: usize, content: &[u8]) -> tidemark_qcow2::Result<Vec<u8>> {
    let mut next = content.to_vec();
    let seed = to_u64(number) + 10;
    match STEPS[number] {
        Step::Write(at, len) => {
            let data = fill(seed, to_u64(len));
            image.write(&data, to_u64(at))?;
            next[at..at + len].copy_from_slice(&data);
        }
        Step::Compressed(at, len) => {
            let data = compressible(seed, len);
            image.write_compressed(&data, to_u64(at))?;
            next[at..at + len].copy_from_slice(&data);
        }
        Step::Zero(at, len) => {
            image.write_zeroes(to_u64(at), to_u64(len))?;
            next[at..at + len].fill(0);
        }
        Step::Discard(at, len) => {
            image.discard(to_u64(at), to_u64(len))?;
            image.read(&mut next[at..at + len], to_u64(at))?;
        }
        Step::Flush => image.flush()?,
    }
    Ok(next)
}

fn check_image(bytes: Vec<u8>, possible: &[Vec<u8>], first: &[u8], what: &str) -> Vec<u8> {
    let image = open_bytes(bytes, writing()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let report = image.check().unwrap();
    let harm = (report.check_errors, report.corruptions);
    assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
    let content = read_all(&image);
    for (at, byte) in content.iter().enumerate() {
        let known = possible.iter().any(|known| known[at] == *byte);
        assert!(known, "{what}: byte {at:#x} is what it never was");
    }
    let bits = image.load_bitmap("b").unwrap();
    assert_covers(&bits, first, &content, what);
    content
}

#[test]
fn every_crash_among_writes_to_subclusters_leaves_a_sound_image() {
    let _alone = alone();
    let base = base();
    let mut contents = vec![read_all(&open_bytes(base.clone(), reading()).unwrap())];
    let storage = CrashStorage::new(base);
    let image = Image::open(boxed(storage.clone()), writing()).unwrap();
    for (number, step) in STEPS.iter().enumerate() {
        // Step n begins at note 2n; a flush says at 2n + 1 that contents[n] is durable.
        storage.note(to_u64(2 * contents.len()));
        let next = run(&image, number, contents.last().unwrap()).unwrap();
        if matches!(step, Step::Flush) {
            storage.note(to_u64(2 * (contents.len() - 1) + 1));
        } else {
            contents.push(next);
        }
    }
    image.close().unwrap();
    let log = storage.log();
    let mut images = 0;
    for crash in log.images(CrashOptions::default()) {
        let what = format!("crash image {images}: {}", crash.description);
        let notes = log.notes_before(crash.position);
        let newest = |odd| notes.iter().filter(|note| **note % 2 == odd).max().copied();
        let flushed = to_usize(newest(1).unwrap_or(1) / 2);
        let begun = to_usize(newest(0).unwrap_or(0) / 2).min(contents.len() - 1);
        let possible = &contents[flushed..=begun.max(flushed)];
        let content = check_image(crash.bytes.clone(), possible, &contents[0], &what);
        if oracle::available() && images % 40 == 0 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("crash.qcow2");
            std::fs::write(&path, &crash.bytes).unwrap();
            qemu_img::check(&path).assert_at_worst_leaks();
            assert!(qemu_img::convert_to_raw(&path) == content, "{what}");
        }
        images += 1;
    }
    println!("{} points, {images} images", log.points());
    assert!(log.points() >= 70 && images >= 180, "the sweep shrank");
}

#[test]
fn every_failed_call_among_writes_to_subclusters_leaves_a_sound_image() {
    const KINDS: &[CallKind] = &[CallKind::Write, CallKind::Flush, CallKind::Read];
    let base = base();
    let first = read_all(&open_bytes(base.clone(), reading()).unwrap());
    let mut faults = 0;
    for at in 0.. {
        let storage = CrashStorage::new(base.clone());
        let faulty = FaultyStorage::new(storage.clone());
        let image = Image::open(boxed(faulty.clone()), writing()).unwrap();
        faulty.arm(Fault::once(KINDS, at));
        let mut possible = vec![first.clone()];
        let mut content = first.clone();
        let mut failed = false;
        for number in 0..STEPS.len() {
            match run(&image, number, &content) {
                Ok(next) => content = next,
                Err(_) => {
                    failed = true;
                    // Any part of the step may have happened: what it writes is possible too.
                    faulty.disarm();
                    if let Ok(next) = run(&image, number, &content) {
                        content = next;
                    }
                }
            }
            possible.push(content.clone());
        }
        let fired = faulty.fired() > 0;
        drop(image);
        if !fired {
            break;
        }
        // A read that fails in the background of a flush may surface later, but never silently.
        assert!(
            failed || faults > 0 || at < 4,
            "call {at} failed and nobody said so"
        );
        check_image(
            storage.to_bytes(),
            &possible,
            &first,
            &format!("call {at} failed"),
        );
        faults += 1;
    }
    println!("{faults} faults");
    assert!(faults >= 45, "the sweep shrank: {faults}");
}

#[test]
fn threads_that_share_clusters_keep_their_subclusters() {
    let storage = CrashStorage::new(Vec::new());
    let image = Image::create(
        boxed(storage.clone()),
        &options(14, to_u64(SIZE)),
        writing(),
    );
    let image = image.unwrap();
    add_bitmap(&image, "b", 512);
    let writers = 4;
    std::thread::scope(|scope| {
        for writer in 0..writers {
            let image = &image;
            scope.spawn(move || {
                let mut random = Random::new(to_u64(writer) + 1);
                for _ in 0..300 {
                    // Each writer has every fourth subcluster of the whole disk.
                    let number = to_usize(random.within(0..to_u64(SIZE / PART / writers)));
                    let at = to_u64((number * writers + writer) * PART);
                    match random.within(0..4) {
                        0 => image.write_zeroes(at, to_u64(PART)).unwrap(),
                        1 => image.discard(at, to_u64(PART)).unwrap(),
                        _ => image
                            .write(&[u8::try_from(writer + 1).unwrap(); PART], at)
                            .unwrap(),
                    }
                    let mut back = [0; PART];
                    image.read(&mut back, at).unwrap();
                    let own = u8::try_from(writer + 1).unwrap();
                    assert!(back.iter().all(|byte| *byte == 0 || *byte == own));
                }
            });
        }
    });
    let content = read_all(&image);
    for (number, part) in content.chunks(PART).enumerate() {
        let own = u8::try_from(number % writers + 1).unwrap();
        assert!(
            part.iter()
                .all(|byte| *byte == part[0] && (*byte == 0 || *byte == own))
        );
    }
    image.close().unwrap();
    check_image(
        storage.to_bytes(),
        std::slice::from_ref(&content),
        &vec![0; SIZE],
        "after the threads",
    );
    println!("{} writes", writers * 300);
}
