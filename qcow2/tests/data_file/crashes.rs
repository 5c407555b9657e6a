//! Crashes that hit image and data file at the same moment, with any part of what neither had
//! flushed.

use tidemark_fixtures::oracle;
use tidemark_fixtures::storage::{CrashOptions, CrashStorage, CrashWorld};
use tidemark_qcow2::Image;

use crate::common::{add_bitmap, assert_covers, read_all};
use crate::{SHAPES, Shape, assert_qemu_reads, beside, open};

const SIZE: usize = 6 << 20;

struct Session {
    world: CrashWorld,
    image: Option<Image>,
    /// Content after each operation; the first is that of the start.
    contents: Vec<Vec<u8>>,
}

impl Session {
    fn start(shape: Shape) -> Self {
        let size = u64::try_from(SIZE).unwrap();
        let options = shape.options(size);
        let (storage, data) = (
            CrashStorage::new(Vec::new()),
            CrashStorage::new(vec![0xee; 9000]),
        );
        let image = Image::create(Box::new(storage.clone()), &options, beside(data.clone()));
        let image = image.unwrap();
        image.write(&vec![0xaa; 200_000], 10_000).unwrap();
        image.write_zeroes(100_000, 40_000).unwrap();
        add_bitmap(&image, "b", 4096);
        let base = read_all(&image);
        image.close().unwrap();
        let world = CrashWorld::new(vec![storage.to_bytes(), data.to_bytes()]);
        let image = open(world.disk(0), world.disk(1)).unwrap();
        Self {
            world,
            image: Some(image),
            contents: vec![base],
        }
    }

    fn operate(&mut self, work: impl FnOnce(&Image, &mut Vec<u8>)) {
        let mut content = self.contents.last().unwrap().clone();
        self.world
            .note(u64::try_from(self.contents.len()).unwrap() * 2);
        work(self.image.as_ref().unwrap(), &mut content);
        self.contents.push(content);
    }

    fn write(&mut self, offset: usize, len: usize, byte: u8) {
        self.operate(|image, content| {
            content[offset..offset + len].fill(byte);
            let at = u64::try_from(offset).unwrap();
            image.write(&vec![byte; len], at).unwrap();
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

    fn acknowledge(&self) {
        let done = u64::try_from(self.contents.len() - 1).unwrap();
        self.world.note(done * 2 + 1);
    }

    fn flush(&mut self) {
        self.image.as_ref().unwrap().flush().unwrap();
        self.acknowledge();
    }

    fn close(&mut self) {
        self.image.take().unwrap().close().unwrap();
        self.acknowledge();
    }

    /// Checks every pair of files that a crash could leave; returns points and pairs.
    fn sweep(&self, raw: bool) -> (usize, usize) {
        let log = self.world.log();
        let mut pairs = 0;
        for crash in log.images(CrashOptions::default()) {
            let what = format!("raw {raw}, pair {pairs}: {}", crash.description);
            let notes = log.notes_before(crash.position);
            let newest = |odd| {
                let of_kind = notes.iter().filter(|note| (**note % 2 == 1) == odd);
                usize::try_from(of_kind.max().copied().unwrap_or(0) / 2).unwrap()
            };
            let (flushed, begun) = (newest(true), newest(false));
            let [image_bytes, data_bytes] = &crash.disks[..] else {
                panic!("two disks")
            };
            let data = CrashStorage::new(data_bytes.clone());
            let image = open(CrashStorage::new(image_bytes.clone()), data)
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            let report = image.check().unwrap();
            let harm = (report.check_errors, report.corruptions);
            assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
            let content = read_all(&image);
            self.check_content(&content, flushed, begun, &what);
            let bits = image.load_bitmap("b").unwrap();
            assert_covers(&bits, &self.contents[0], &content, &what);
            if raw {
                assert!(image.header().has_raw_data_file(), "{what}");
                assert!(data_bytes == &content, "{what}: the file is not the disk");
            }
            // A raw disk is also looked at without its metadata: its bytes are marked too.
            let mut outside = data_bytes.clone();
            outside.resize(SIZE, 0);
            if raw {
                assert_covers(&bits, &self.contents[0], &outside, &what);
            }
            if oracle::available() && pairs % 60 == 0 {
                assert_qemu_reads(image_bytes, data_bytes, &content, &what);
            }
            pairs += 1;
        }
        (log.points(), pairs)
    }

    /// Flushed bytes are there; others are old or new, never anything else.
    fn check_content(&self, content: &[u8], flushed: usize, begun: usize, what: &str) {
        let last = begun.max(flushed).min(self.contents.len() - 1);
        let possible = &self.contents[flushed..=last];
        for (at, byte) in content.iter().enumerate() {
            assert!(
                possible.iter().any(|known| known[at] == *byte),
                "{what}: byte {at:#x} is {byte:#x} after flush {flushed} of {begun}"
            );
        }
    }
}

#[test]
fn every_crash_of_image_and_data_file_leaves_a_sound_disk() {
    let mut total = (0, 0);
    for shape in SHAPES {
        let mut session = Session::start(shape);
        session.write(12_345, 30_000, 1);
        session.write(300_000, 5_000, 2);
        session.flush();
        session.write(14_000, 100, 3);
        session.write(5 << 20, 70_000, 4);
        session.zero(130_000, 90_000, false);
        session.write(140_000, 3_000, 5);
        session.flush();
        session.zero(5 << 20, 50_000, true);
        session.write((5 << 20) + 300, 4_000, 6);
        session.zero(0, 131_072, true);
        session.write(65_000, 2_000, 7);
        session.flush();
        session.write(3 << 20, 20_000, 8);
        session.close();
        let (points, pairs) = session.sweep(shape.raw);
        println!("{shape:?}: {points} crash points, {pairs} pairs");
        total = (total.0 + points, total.1 + pairs);
    }
    println!(
        "in all {} crash points, {} pairs of files",
        total.0, total.1
    );
    assert!(
        total.0 >= 200 && total.1 >= 600,
        "the sweep shrank: {total:?}"
    );
}
