//! What we write QEMU reads, and the other way round: by contents, bit by bit, in turns, after
//! crashes, and with what neither of us knows.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod bits;
mod crashes;
mod data;
mod every_shape;
mod foreign;
mod foreign_programs;
mod in_use;
mod locks;
mod losses;
mod sessions;

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tidemark_fixtures::image_bits;
use tidemark_fixtures::ops::fill;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_qcow2::{Bitmap, Image};

/// A folder of this test's own with one image in it.
struct Desk {
    folder: TempDir,
    path: PathBuf,
}

impl Desk {
    fn new() -> Self {
        // In memory where possible: durability is not what these tests are about.
        let folder = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        let path = folder.path().join("image.qcow2");
        Self { folder, path }
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    /// Opens the image here, hands it to `work` and closes it cleanly.
    fn session<R>(&self, work: impl FnOnce(&Image) -> R) -> R {
        let image = common::open_file(&self.path, common::writing());
        let answer = work(&image);
        image.close().unwrap();
        answer
    }

    /// Opens the image here without write access.
    fn look<R>(&self, work: impl FnOnce(&Image) -> R) -> R {
        work(&common::open_file(&self.path, common::reading()))
    }

    fn assert_clean(&self) {
        qemu_img::check(&self.path).assert_clean();
    }
}

fn to_u64(value: usize) -> u64 {
    u64::try_from(value).unwrap()
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

/// What QEMU calls the SHA-256 of a bitmap: serialized bits, padded to eight bytes.
fn sha256(bits: &Bitmap) -> String {
    let shape = bits.shape();
    let mut page = vec![0; usize::try_from(shape.page_bytes()).unwrap()];
    let mut serialized = Vec::new();
    for number in 0..shape.pages() {
        bits.write_page(number, &mut page);
        serialized.extend_from_slice(&page);
    }
    let len = to_usize(shape.bits().div_ceil(8));
    assert!(
        serialized[len..].iter().all(|&byte| byte == 0),
        "bits past the disk's end"
    );
    serialized.truncate(len);
    serialized.resize(len.next_multiple_of(8), 0);
    image_bits::sha256_hex(&serialized)
}

/// The runs of a bitmap as an NBD client gets them.
fn extents(bits: &Bitmap) -> Vec<(u64, u64, bool)> {
    bits.runs()
        .map(|(range, dirty)| (range.start, range.end - range.start, dirty))
        .collect()
}

/// A range within a disk of `size` bytes: small or large, aligned or not.
fn range(random: &mut Random, size: u64) -> (u64, u64) {
    let align = [1, 512, 4096, 65536][to_usize(random.within(0..4))];
    let offset = random.within(0..size) / align * align;
    let longest = [700, 20_000, 300_000][to_usize(random.within(0..3))];
    let len = random.within(1..longest).next_multiple_of(align);
    (offset, len.min(size - offset))
}

/// Random writes, zeroes, discards and flushes, done to the image and to the model.
fn operate(image: &Image, model: &mut [u8], random: &mut Random, count: usize) {
    for _ in 0..count {
        let (offset, len) = range(random, to_u64(model.len()));
        let place = to_usize(offset)..to_usize(offset + len);
        match random.within(0..10) {
            0..=5 => {
                let data = fill(random.next_u64(), len);
                image.write(&data, offset).unwrap();
                model[place].copy_from_slice(&data);
            }
            6 | 7 => {
                image.write_zeroes(offset, len).unwrap();
                model[place].fill(0);
            }
            8 => {
                image.discard(offset, len).unwrap();
                let mut now = vec![0; to_usize(len)];
                image.read(&mut now, offset).unwrap();
                let fine = now
                    .iter()
                    .zip(&model[place.clone()])
                    .all(|(new, old)| *new == 0 || new == old);
                assert!(
                    fine,
                    "a discarded range holds neither zeros nor what it held"
                );
                model[place].copy_from_slice(&now);
            }
            _ => image.flush().unwrap(),
        }
    }
}

/// Random writes by `qemu-io` in one session.
fn qemu_operates(path: &Path, model: &mut [u8], random: &mut Random, count: usize) {
    let mut commands = Vec::new();
    for _ in 0..count {
        let (offset, len) = range(random, to_u64(model.len()));
        let place = to_usize(offset)..to_usize(offset + len);
        if random.one_in(4) {
            commands.push(format!("write -z {offset} {len}"));
            model[place].fill(0);
        } else {
            let byte = u8::try_from(random.within(1..256)).unwrap();
            commands.push(format!("write -P {byte} {offset} {len}"));
            model[place].fill(byte);
        }
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu_io::commands(path, &commands);
}

/// Panics unless both readers see `model`.
fn assert_content(desk: &Desk, model: &[u8], what: &str) {
    assert!(
        qemu_img::convert_to_raw(&desk.path) == model,
        "{what}: QEMU reads other bytes"
    );
    assert!(
        desk.look(common::read_all) == model,
        "{what}: we read other bytes"
    );
}

/// Panics unless both readers find the bitmap recording, equal, and a superset of the change.
fn assert_records(desk: &Desk, name: &str, old: &[u8], new: &[u8], what: &str) {
    let bits = desk.look(|image| {
        let info = image
            .bitmaps()
            .unwrap()
            .into_iter()
            .find(|info| info.name == name);
        let info = info.unwrap_or_else(|| panic!("{what}: no bitmap {name}"));
        assert!(info.auto && !info.in_use, "{what}: {name} does not record");
        image.load_bitmap(name).unwrap()
    });
    common::assert_covers(&bits, old, new, what);
    let stored = image_bits::bitmap(&desk.bytes(), name).unwrap().unwrap();
    assert_eq!(
        stored.sha256(),
        sha256(&bits),
        "{what}: the readers of {name} disagree"
    );
}
