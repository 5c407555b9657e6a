//! Extended L2 entries: subclusters read, written, zeroed and discarded, both ways with QEMU, over
//! crashes and faults, from many threads, and with bitmaps that record beside.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod crashes;
mod qemu;

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tidemark_fixtures::ops::fill;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_qcow2::{CreateOptions, Image};

use self::common::{open_file, read_all, reading, writing};

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

    /// Opens the image here, hands it to `work` and closes it cleanly.
    fn session<R>(&self, work: impl FnOnce(&Image) -> R) -> R {
        let image = open_file(&self.path, writing());
        let answer = work(&image);
        image.close().unwrap();
        answer
    }

    /// Panics unless both readers see `model`, map it alike, and find the image clean.
    fn assert_same(&self, model: &[u8], what: &str) {
        qemu_img::check(&self.path).assert_clean();
        let image = open_file(&self.path, reading());
        assert!(read_all(&image) == model, "{what}: we read other bytes");
        let theirs = qemu_img::convert_to_raw(&self.path);
        assert!(theirs == model, "{what}: QEMU reads other bytes");
        assert!(image.check().unwrap().is_clean(), "{what}");
        let (ours, theirs) = (map_of(&image), qemu_map(&self.path));
        let difference = ours
            .iter()
            .zip(&theirs)
            .find(|(ours, theirs)| ours != theirs);
        assert!(ours == theirs, "{what}: the maps differ: {difference:?}");
    }
}

fn options(cluster_bits: u32, size: u64) -> CreateOptions {
    CreateOptions {
        cluster_bits,
        extended_l2: true,
        ..CreateOptions::new(size)
    }
}

/// Start, length, depth, present, zero, data, compressed, offset.
type Run = (u64, u64, u64, [bool; 4], Option<u64>);

fn map_of(image: &Image) -> Vec<Run> {
    let run = |extent: tidemark_qcow2::Extent| {
        let flags = [extent.present, extent.zero, extent.data, extent.compressed];
        (
            extent.start,
            extent.length,
            extent.depth,
            flags,
            extent.offset,
        )
    };
    let extents = image.map(0, image.size()).unwrap();
    extents.into_iter().map(run).collect()
}

fn qemu_map(path: &Path) -> Vec<Run> {
    let map = qemu_img::map(path);
    let mut runs: Vec<Run> = Vec::new();
    for extent in map.as_array().unwrap() {
        let number = |key: &str| extent[key].as_u64().unwrap();
        let flag = |key: &str| extent[key].as_bool().unwrap();
        // QEMU calls data zero where it happens to ask the file for holes.
        let zero = flag("zero") && !flag("data");
        let run = (
            number("start"),
            number("length"),
            number("depth"),
            [flag("present"), zero, flag("data"), flag("compressed")],
            extent["offset"].as_u64(),
        );
        match runs.last_mut() {
            Some(last) if continues(last, &run) => last.1 += run.1,
            _ => runs.push(run),
        }
    }
    runs
}

fn continues(one: &Run, next: &Run) -> bool {
    let offset = one.4.map(|offset| offset + one.1);
    (one.2, one.3, offset) == (next.2, next.3, next.4)
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

fn to_u64(value: usize) -> u64 {
    u64::try_from(value).unwrap()
}

/// A range within a disk of `size` bytes, aligned to bytes, sectors, subclusters or clusters.
fn range(random: &mut Random, size: u64, cluster: u64) -> (u64, u64) {
    let align = [1, 512, cluster / 32, cluster / 32, cluster][to_usize(random.within(0..5))];
    let offset = random.within(0..size) / align * align;
    let longest = [700, cluster / 8, 3 * cluster][to_usize(random.within(0..3))];
    let len = random.within(1..longest).next_multiple_of(align);
    (offset, len.min(size - offset))
}

/// Random writes, zeroes, discards and flushes, done to the image and to the model.
fn operate(image: &Image, model: &mut [u8], random: &mut Random, count: usize) {
    for _ in 0..count {
        let (offset, len) = range(
            random,
            to_u64(model.len()),
            image.geometry().cluster_bytes(),
        );
        let place = to_usize(offset)..to_usize(offset + len);
        match random.within(0..11) {
            10 => {
                let cluster = to_usize(image.geometry().cluster_bytes());
                let start = place.start / cluster * cluster;
                let end = (start + cluster).min(model.len());
                let data: Vec<u8> = fill(random.next_u64(), 32)
                    .into_iter()
                    .cycle()
                    .take(end - start)
                    .collect();
                image.write_compressed(&data, to_u64(start)).unwrap();
                model[start..end].copy_from_slice(&data);
            }
            0..=4 => {
                let data = fill(random.next_u64(), len);
                image.write(&data, offset).unwrap();
                model[place].copy_from_slice(&data);
            }
            5 | 6 => {
                image.write_zeroes(offset, len).unwrap();
                model[place].fill(0);
            }
            7 | 8 => {
                image.discard(offset, len).unwrap();
                let mut now = vec![0; to_usize(len)];
                image.read(&mut now, offset).unwrap();
                let pairs = now.iter().zip(&model[place.clone()]);
                let fine = pairs.clone().all(|(new, old)| *new == 0 || new == old);
                assert!(fine, "a discarded range shows what it never held");
                model[place].copy_from_slice(&now);
            }
            _ => image.flush().unwrap(),
        }
    }
}

/// Random writes, zeroes and discards by `qemu-io` in one session.
fn qemu_operates(path: &Path, model: &mut Vec<u8>, random: &mut Random, cluster: u64) {
    let mut commands = Vec::new();
    for _ in 0..8 {
        let (offset, len) = range(random, to_u64(model.len()), cluster);
        let place = to_usize(offset)..to_usize(offset + len);
        match random.within(0..6) {
            0 => {
                commands.push(format!("write -z -u {offset} {len}"));
                model[place].fill(0);
            }
            1 => {
                commands.push(format!("write -z {offset} {len}"));
                model[place].fill(0);
            }
            2 => commands.push(format!("discard {offset} {len}")),
            _ => {
                let byte = u8::try_from(random.within(1..256)).unwrap();
                commands.push(format!("write -P {byte} {offset} {len}"));
                model[place].fill(byte);
            }
        }
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu_io::commands(path, &commands);
    // What a discard leaves is QEMU's to say.
    *model = qemu_img::convert_to_raw(path);
}
