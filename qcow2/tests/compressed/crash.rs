//! Every image that a crash among compressed writes could leave.

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{CrashOptions, CrashStorage};
use tidemark_qcow2::{CompressionType, CreateOptions, Image};

use crate::common::{add_bitmap, assert_covers, built, open_bytes, read_all, reading, writing};
use crate::{noise, text, to_u64, to_usize};

/// Content of the disk after each operation, the first that of the start.
struct Session {
    storage: CrashStorage,
    image: Image,
    contents: Vec<Vec<u8>>,
}

impl Session {
    fn open(bytes: Vec<u8>) -> Self {
        let base = read_all(&open_bytes(bytes.clone(), reading()).unwrap());
        let storage = CrashStorage::new(bytes);
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        Self {
            storage,
            image,
            contents: vec![base],
        }
    }

    /// Labels in the log: operation `n` begins at `2n`, its flush is acknowledged at `2n + 1`.
    fn note(&self, label: usize) {
        self.storage.note(to_u64(label));
    }

    fn operate(&mut self, offset: usize, data: &[u8], work: impl FnOnce(&Image, u64, &[u8])) {
        let mut content = self.contents.last().unwrap().clone();
        self.note(2 * self.contents.len());
        work(&self.image, to_u64(offset), data);
        content[offset..offset + data.len()].copy_from_slice(data);
        self.contents.push(content);
    }

    fn compressed(&mut self, offset: usize, data: &[u8]) {
        self.operate(offset, data, |image, at, data| {
            image.write_compressed(data, at).unwrap();
        });
    }

    fn plain(&mut self, offset: usize, data: &[u8]) {
        self.operate(offset, data, |image, at, data| {
            image.write(data, at).unwrap()
        });
    }

    fn discard(&mut self, offset: usize, len: usize) {
        self.operate(offset, &vec![0; len], |image, at, data| {
            image.discard(at, to_u64(data.len())).unwrap();
        });
    }

    fn flush(&self) {
        self.image.flush().unwrap();
        self.note(2 * (self.contents.len() - 1) + 1);
    }
}

fn session(kind: CompressionType, cluster_bits: u32, refcount_bits: u32) -> (usize, usize) {
    let size = 2 << 20;
    let cluster = 1 << cluster_bits;
    let options = CreateOptions {
        cluster_bits,
        refcount_bits,
        compression_type: kind,
        ..CreateOptions::new(to_u64(size))
    };
    let base = built(&options, |image| {
        image.write_compressed(&text(1, 12 * cluster), 0).unwrap();
        image
            .write(&noise(2, 3 * cluster), to_u64(20 * cluster))
            .unwrap();
        add_bitmap(image, "b", 4096);
    });
    let mut session = Session::open(base);
    // New ones, one that does not shrink among them.
    let mixed = [text(3, 2 * cluster), noise(4, cluster), text(5, cluster)].concat();
    session.compressed(30 * cluster, &mixed);
    session.flush();
    // Behind flushed data in the same host cluster.
    session.compressed(14 * cluster, &text(6, 2 * cluster));
    session.compressed(2 * cluster, &text(7, 3 * cluster));
    session.flush();
    // Parts of old ones, whose neighbours stay.
    session.plain(cluster / 2, &noise(8, cluster));
    session.discard(5 * cluster, 3 * cluster);
    session.compressed(20 * cluster, &text(9, 2 * cluster));
    session.flush();
    session.compressed(5 * cluster, &text(10, 6 * cluster));
    session.plain(14 * cluster + 10, &noise(11, 50));
    session.flush();
    session.compressed(0, &text(12, 16 * cluster));
    session.flush();
    let contents = session.contents;
    session.image.close().unwrap();
    session.storage.note(to_u64(2 * (contents.len() - 1) + 1));
    sweep(&session.storage, &contents)
}

fn sweep(storage: &CrashStorage, contents: &[Vec<u8>]) -> (usize, usize) {
    let log = storage.log();
    let mut images = 0;
    for crash in log.images(CrashOptions::default()) {
        let what = format!("crash image {images}: {}", crash.description);
        let notes = log.notes_before(crash.position);
        let newest = |odd| notes.iter().filter(|note| **note % 2 == odd).max().copied();
        let flushed = to_usize(newest(1).unwrap_or(1) / 2);
        let begun = to_usize(newest(0).unwrap_or(0) / 2);
        let image = open_bytes(crash.bytes.clone(), writing())
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let report = image.check().unwrap();
        let harm = (report.check_errors, report.corruptions);
        assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
        let content = read_all(&image);
        let possible = &contents[flushed..=begun.max(flushed)];
        for (at, byte) in content.iter().enumerate() {
            let known = possible.iter().any(|known| known[at] == *byte);
            assert!(
                known,
                "{what}: byte {at:#x} after flush {flushed} of {begun}"
            );
        }
        let bits = image.load_bitmap("b").unwrap();
        assert_covers(&bits, &contents[0], &content, &what);
        if oracle::available() && images % 40 == 0 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("crash.qcow2");
            std::fs::write(&path, &crash.bytes).unwrap();
            qemu_img::check(&path).assert_at_worst_leaks();
            assert!(qemu_img::convert_to_raw(&path) == content, "{what}");
        }
        images += 1;
    }
    (log.points(), images)
}

#[test]
fn every_crash_among_compressed_writes_leaves_a_sound_image() {
    let mut total = (0, 0);
    for (kind, cluster_bits, refcount_bits) in [
        (CompressionType::Zlib, 12, 16),
        (CompressionType::Zstd, 12, 1),
        (CompressionType::Zstd, 14, 2),
    ] {
        let (points, images) = session(kind, cluster_bits, refcount_bits);
        println!("{kind:?} 2^{cluster_bits}: {points} crash points, {images} images");
        total = (total.0 + points, total.1 + images);
    }
    println!("in all {} crash points, {} images", total.0, total.1);
    assert!(
        total.0 >= 100 && total.1 >= 200,
        "the sweep shrank: {total:?}"
    );
}
