//! Every image that a crash could leave: sound but for leaks, flushed data there, no dirty block
//! missed.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{add_bitmap, assert_covers, built, granularity, open_bytes, read_all, writing};
use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{CrashImage, CrashOptions, CrashStorage};
use tidemark_qcow2::chain::{Descent, Identity, ImageUuid, Reading, Scheme};
use tidemark_qcow2::{CreateOptions, Error, Image, proof};

/// Something to tell the new record by.
const DESCENT: Descent = Descent {
    image: ImageUuid([7; 16]),
    checkpoint: Identity([9; 16]),
};

/// A write session on a recording storage, with what a guest knows of it.
struct Session {
    storage: CrashStorage,
    image: Option<Image>,
    base: Vec<u8>,
    /// Content after each operation; the first is that of the start.
    contents: Vec<Vec<u8>>,
}

/// Labels in the log: operation `n` begins at `2n`, its flush is acknowledged at `2n + 1`.
fn begins(operation: usize) -> u64 {
    u64::try_from(operation).unwrap() * 2
}

impl Session {
    fn open(bytes: Vec<u8>) -> Self {
        let base = read_all(&open_bytes(bytes.clone(), common::reading()).unwrap());
        let storage = CrashStorage::new(bytes);
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        Self {
            storage,
            image: Some(image),
            contents: vec![base.clone()],
            base,
        }
    }

    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    fn operate(&mut self, work: impl FnOnce(&Image, &mut Vec<u8>)) {
        let mut content = self.contents.last().unwrap().clone();
        self.storage.note(begins(self.contents.len()));
        work(self.image.as_ref().unwrap(), &mut content);
        self.contents.push(content);
    }

    fn write(&mut self, offset: usize, len: usize, byte: u8) {
        self.operate(|image, content| {
            content[offset..offset + len].fill(byte);
            image
                .write(&vec![byte; len], u64::try_from(offset).unwrap())
                .unwrap();
        });
    }

    fn zero(&mut self, offset: usize, len: usize, discard: bool) {
        self.operate(|image, content| {
            let (at, bytes) = (u64::try_from(offset).unwrap(), u64::try_from(len).unwrap());
            if discard {
                image.discard(at, bytes).unwrap();
            } else {
                image.write_zeroes(at, bytes).unwrap();
            }
            image.read(&mut content[offset..offset + len], at).unwrap();
        });
    }

    fn flush(&mut self) {
        self.image().flush().unwrap();
        self.storage.note(begins(self.contents.len() - 1) + 1);
    }

    fn close(&mut self) {
        self.image.take().unwrap().close().unwrap();
        self.storage.note(begins(self.contents.len() - 1) + 1);
    }

    /// Checks every crash image; returns points and images.
    fn sweep(&self, sample: usize, check: impl Fn(&Image, &CrashImage, &[u8])) -> (usize, usize) {
        let log = self.storage.log();
        let qemu = oracle::available();
        let mut images = 0;
        for crash in log.images(CrashOptions::default()) {
            let what = format!("crash image {images}: {}", crash.description);
            let notes = log.notes_before(crash.position);
            let acknowledged = notes.iter().filter(|note| **note % 2 == 1).max().copied();
            let flushed = usize::try_from(acknowledged.unwrap_or(1) / 2).unwrap();
            let begun = notes.iter().filter(|note| **note % 2 == 0).max().copied();
            let begun = usize::try_from(begun.unwrap_or(0) / 2).unwrap();
            let image = open_bytes(crash.bytes.clone(), writing())
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            let report = image.check().unwrap();
            let harm = (report.check_errors, report.corruptions);
            assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
            let content = read_all(&image);
            self.check_content(&content, flushed, begun, &what);
            check(&image, &crash, &content);
            if qemu && images % sample == 0 {
                check_with_qemu(&crash.bytes, &content);
            }
            images += 1;
        }
        (log.points(), images)
    }

    /// Flushed bytes are there; others are old or new, never anything else.
    fn check_content(&self, content: &[u8], flushed: usize, begun: usize, what: &str) {
        let possible = &self.contents[flushed..=begun.max(flushed).min(self.contents.len() - 1)];
        if possible.iter().any(|known| known == content) {
            return;
        }
        for (at, byte) in content.iter().enumerate() {
            assert!(
                possible.iter().any(|known| known[at] == *byte),
                "{what}: byte {at:#x} is {byte:#x} after flush {flushed} of {begun}"
            );
        }
    }
}

fn check_with_qemu(bytes: &[u8], content: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crash.qcow2");
    std::fs::write(&path, bytes).unwrap();
    qemu_img::check(&path).assert_at_worst_leaks();
    assert!(
        qemu_img::convert_to_raw(&path) == content,
        "QEMU reads other bytes"
    );
}

/// Both readers find the bitmap consistent, recording and a superset of what changed since `base`.
fn check_bitmap(image: &Image, crash: &CrashImage, base: &[u8], content: &[u8], name: &str) {
    let what = &crash.description;
    let bits = image
        .load_bitmap(name)
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_covers(&bits, base, content, what);
    let stored = image_bits::bitmap(&crash.bytes, name).unwrap().unwrap();
    assert!(
        stored.auto && !stored.in_use,
        "{what}: the bitmap no longer records"
    );
    for range in bits.dirty_ranges() {
        assert!(stored.covers(range), "{what}: the readers disagree");
    }
}

fn base_image(cluster_bits: u32, refcount_bits: u32, size: u64) -> Vec<u8> {
    let options = CreateOptions {
        cluster_bits,
        refcount_bits,
        ..CreateOptions::new(size)
    };
    built(&options, |image| {
        image.write(&vec![0xaa; 200_000], 10_000).unwrap();
        image.write_zeroes(100_000, 40_000).unwrap();
        image.write(&vec![0xbb; 9_000], size - 9_000).unwrap();
        add_bitmap(image, "b", 4096.max(size >> 12));
    })
}

fn write_session(cluster_bits: u32, refcount_bits: u32, sample: usize) -> (usize, usize) {
    let size = 12 << 20;
    let mut session = Session::open(base_image(cluster_bits, refcount_bits, size));
    session.write(12_345, 30_000, 1);
    session.write(300_000, 5_000, 2);
    session.flush();
    session.write(14_000, 100, 3);
    session.write(5 << 20, 70_000, 4);
    session.zero(130_000, 90_000, false);
    session.flush();
    session.write((5 << 20) + 300, 4_000, 5);
    session.zero(5 << 20, 50_000, true);
    session.image().narrow_idle_regions().unwrap();
    session.write(9 << 20, 3_000, 6);
    session.image().narrow_idle_regions().unwrap();
    session.write(10_000, 80_000, 7);
    session.flush();
    session.write(5 << 20, 20_000, 8);
    session.close();
    let base = session.base.clone();
    session.sweep(sample, |image, crash, content| {
        check_bitmap(image, crash, &base, content, "b")
    })
}

#[test]
fn every_crash_of_a_write_session_leaves_a_sound_image() {
    let mut total = (0, 0);
    for (cluster_bits, refcount_bits) in [(9, 64), (12, 1), (16, 16)] {
        let (points, images) = write_session(cluster_bits, refcount_bits, 25);
        println!("clusters 2^{cluster_bits}: {points} crash points, {images} images");
        total = (total.0 + points, total.1 + images);
    }
    println!("in all {} crash points, {} images", total.0, total.1);
    assert!(
        total.0 >= 100 && total.1 >= 200,
        "the sweep shrank: {total:?}"
    );
}

#[test]
fn every_crash_of_a_freeze_leaves_the_old_or_the_new_bitmaps() {
    let mut session = Session::open(base_image(16, 16, 12 << 20));
    session.write(20_000, 1_000, 1);
    session.flush();
    session.operate(|image, _| {
        image
            .update(|update| {
                let old = update.load("b")?;
                let mut new = update.blank(granularity(65536))?;
                proof::plant(update.image(), &mut new)?;
                update.put("b", old, false)?;
                update.put("c", new, true)?;
                let mut record = proof::fresh_record(Scheme::Intervals).unwrap();
                record.descents = vec![DESCENT];
                update.set_record(Some(record));
                Ok::<_, Error>(())
            })
            .unwrap();
    });
    session.write(6 << 20, 1_000, 2);
    session.flush();
    session.close();
    let base = session.base.clone();
    let frozen_content = session.contents[2].clone();
    let (points, images) = session.sweep(10, |image, crash, content| {
        let infos = image.bitmaps().unwrap();
        let what = &crash.description;
        match infos
            .iter()
            .map(|info| (info.name.as_str(), info.auto))
            .collect::<Vec<_>>()[..]
        {
            [("b", true)] => {
                assert_eq!(image.chain(), Reading::Absent, "{what}");
                check_bitmap(image, crash, &base, content, "b");
            }
            [("b", false), ("c", true)] => {
                let chain = image.chain();
                let whole = matches!(&chain, Reading::Current(r) if r.descents == [DESCENT]);
                assert!(whole, "{what}: {chain:?}");
                assert_covers(
                    &image.load_bitmap("b").unwrap(),
                    &base,
                    &frozen_content,
                    what,
                );
                check_bitmap(image, crash, &frozen_content, content, "c");
            }
            ref other => panic!("{what}: a state between the two: {other:?}"),
        }
    });
    println!("{points} crash points, {images} images");
    assert!(
        points >= 20 && images >= 40,
        "the sweep shrank: {points} {images}"
    );
}

#[test]
fn writing_goes_on_after_any_crash() {
    let size = 12 << 20;
    let mut session = Session::open(base_image(12, 16, size));
    session.write(12_345, 30_000, 1);
    session.write(5 << 20, 70_000, 4);
    session.flush();
    session.zero(5 << 20, 50_000, true);
    session.write(14_000, 100, 3);
    session.close();
    let base = session.base.clone();
    let (_, images) = session.sweep(1_000, |_, crash, content| {
        let storage = CrashStorage::new(crash.bytes.clone());
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        let mut expected = content.to_vec();
        image.write(&[9; 50_000], 7 << 20).unwrap();
        expected[7 << 20..(7 << 20) + 50_000].fill(9);
        image.close().unwrap();
        let bytes = storage.to_bytes();
        let image = open_bytes(bytes, common::reading()).unwrap();
        assert!(read_all(&image) == expected, "{}", crash.description);
        assert_covers(
            &image.load_bitmap("b").unwrap(),
            &base,
            &expected,
            &crash.description,
        );
    });
    assert!(images >= 50, "the sweep shrank: {images}");
}
