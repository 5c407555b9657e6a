//! Random lives of a disk that is written, zeroed, grown and shrunk, against a vector of bytes.

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{CreateOptions, Image, Shrink};

use crate::common::{add_bitmap, alone, built, read_all, reading, writing};

const LARGEST: u64 = 3 << 20;

fn at(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

/// A disk, what it should hold, and which bytes changed since its bitmaps began.
struct Life {
    image: Image,
    content: Vec<u8>,
    changed: Vec<bool>,
}

impl Life {
    fn step(&mut self, random: &mut Random) {
        let size = self.image.size();
        let start = random.within(0..size);
        let len = random.within(1..(size - start).min(150_000) + 1);
        let range = at(start)..at(start + len);
        match random.within(0..8) {
            0..4 => {
                let byte = u8::try_from(random.within(1..256)).unwrap();
                self.image.write(&vec![byte; at(len)], start).unwrap();
                self.content[range.clone()].fill(byte);
                self.changed[range].fill(true);
            }
            4 => {
                self.image.write_zeroes(start, len).unwrap();
                // What reads as zero already is no change.
                for byte in range {
                    self.changed[byte] |= self.content[byte] != 0;
                    self.content[byte] = 0;
                }
            }
            5 => self.image.flush().unwrap(),
            _ => {
                let new = random.within(1..LARGEST / 512) * 512;
                self.image.resize(new, Shrink::Allowed).unwrap();
                self.content.resize(at(new), 0);
                self.changed.resize(at(new), true);
            }
        }
    }

    /// The recording bitmap says every change; the frozen one says nothing more than it did.
    fn check(&self, what: &str) {
        assert_eq!(
            self.image.size(),
            u64::try_from(self.content.len()).unwrap()
        );
        assert!(read_all(&self.image) == self.content, "{what}: content");
        let Ok(recording) = self.image.load_bitmap("recording") else {
            return;
        };
        for (byte, changed) in self.changed.iter().enumerate().step_by(512) {
            let byte = u64::try_from(byte).unwrap();
            assert!(!changed || recording.test(byte), "{what}: missed at {byte}");
        }
        let frozen = self.image.load_bitmap("frozen").unwrap();
        let end = self.image.size();
        for range in frozen.dirty_ranges() {
            assert!(
                range.start < 65_536 && range.end <= end,
                "{what}: {range:?}"
            );
        }
    }
}

fn live(options: &CreateOptions, random: &mut Random, what: &str) -> usize {
    let base = built(options, |image| {
        image.write(&[9; 3000], 0).unwrap();
        if options.version == 2 {
            return;
        }
        add_bitmap(image, "recording", 4096);
        let mark = |update: &mut tidemark_qcow2::Update<'_>| {
            let mut bits = update.blank(crate::common::granularity(512))?;
            bits.mark(0..65_536).unwrap();
            update.put("frozen", bits, false)
        };
        image.update(mark).unwrap();
    });
    let storage = CrashStorage::new(base);
    let open = |options| Image::open(Box::new(storage.clone()), options).unwrap();
    let mut life = Life {
        image: open(writing()),
        content: vec![0; at(options.size)],
        changed: vec![false; at(options.size)],
    };
    life.content[..3000].fill(9);
    let mut steps = 0;
    for _ in 0..random.within(4..9) {
        for _ in 0..random.within(1..7) {
            life.step(random);
            life.check(what);
            steps += 1;
        }
        life.image.close().unwrap();
        life.image = open(writing());
        life.check(what);
    }
    life.image.close().unwrap();
    let report = Image::open(Box::new(storage.clone()), reading())
        .unwrap()
        .check()
        .unwrap();
    assert_eq!(
        (report.check_errors, report.corruptions, report.leaks),
        (0, 0, 0),
        "{what}: {:?}",
        report.findings
    );
    if oracle::available() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, storage.to_bytes()).unwrap();
        qemu_img::check(&path).assert_clean();
        assert!(
            qemu_img::convert_to_raw(&path) == life.content,
            "{what}: QEMU reads other bytes"
        );
    }
    steps
}

#[test]
fn a_disk_of_any_geometry_lives_through_growing_and_shrinking() {
    let _alone = alone();
    let cases = std::env::var("TIDEMARK_CASES").ok();
    let rounds: u64 = cases.and_then(|n| n.parse().ok()).unwrap_or(4);
    let (mut lives, mut steps) = (0, 0);
    for round in 0..rounds {
        for (cluster_bits, refcount_bits, version, extended_l2) in [
            (9, 16, 3, false),
            (9, 1, 3, false),
            (12, 64, 3, false),
            (12, 16, 2, false),
            (14, 16, 3, true),
            (16, 16, 3, false),
            (16, 16, 2, false),
            (18, 8, 3, true),
            (21, 2, 3, false),
        ] {
            let mut random = Random::stream(round, cluster_bits.into());
            let options = CreateOptions {
                cluster_bits,
                refcount_bits,
                version,
                extended_l2,
                ..CreateOptions::new(random.within(128..LARGEST / 512) * 512)
            };
            steps += live(
                &options,
                &mut random,
                &format!("{options:?}, round {round}"),
            );
            lives += 1;
        }
    }
    println!("{lives} lives, {steps} steps");
    assert!(
        lives >= 36 && steps >= 300,
        "the test shrank: {lives}, {steps}"
    );
}
