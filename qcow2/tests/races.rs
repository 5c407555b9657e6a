//! Many threads on one image: writers, readers, discards, flushes and freezes side by side.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{add_bitmap, assert_covers, granularity, open_bytes, read_all, reading, writing};
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{CreateOptions, Error, Image, proof};

const SIZE: u64 = 32 << 20;
const WRITERS: u64 = 4;
const LANE: u64 = SIZE / WRITERS;

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

/// One writer works on its own lane of the disk and knows what must be there.
fn writer(image: &Image, lane: u64, steps: usize) -> Vec<u8> {
    let mut random = Random::new(lane + 1);
    let mut known = vec![0; index(LANE)];
    for step in 0..steps {
        let len = 1 + random.next_u64() % 200_000;
        let at = random.next_u64() % (LANE - len);
        let range = index(at)..index(at + len);
        match random.next_u64() % 8 {
            0 => {
                image.write_zeroes(lane * LANE + at, len).unwrap();
                known[range].fill(0);
            }
            1 => {
                image.discard(lane * LANE + at, len).unwrap();
                image.read(&mut known[range], lane * LANE + at).unwrap();
            }
            2 => image.flush().unwrap(),
            3 => image.narrow_idle_regions().unwrap(),
            _ => {
                let byte = u8::try_from(step % 255 + 1).unwrap();
                image
                    .write(&vec![byte; index(len)], lane * LANE + at)
                    .unwrap();
                known[range.clone()].fill(byte);
                let mut back = vec![0; index(len)];
                image.read(&mut back, lane * LANE + at).unwrap();
                assert!(back == known[range], "lane {lane} lost its own write");
            }
        }
    }
    known
}

fn freezes(image: &Image, done: &AtomicBool) -> usize {
    let mut number = 0;
    while !done.load(Ordering::Acquire) && number < 12 {
        image
            .update(|update| {
                let old = format!("c{number}");
                let bits = update.load(&old)?;
                update.put(&old, bits, false)?;
                let mut new = update.blank(granularity(65536))?;
                proof::plant(update.image(), &mut new)?;
                update.put(&format!("c{}", number + 1), new, true)?;
                Ok::<_, Error>(())
            })
            .unwrap();
        number += 1;
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    number
}

#[test]
fn writers_readers_and_freezes_side_by_side_lose_nothing() {
    for cluster_bits in [12, 16] {
        let storage = CrashStorage::new(Vec::new());
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(SIZE)
        };
        let image = Image::create(Box::new(storage.clone()), &options, writing()).unwrap();
        add_bitmap(&image, "c0", 65536);
        let done = AtomicBool::new(false);
        let (content, frozen) = std::thread::scope(|scope| {
            let freezer = scope.spawn(|| freezes(&image, &done));
            let reader = scope.spawn(|| {
                let mut piece = vec![0; 1 << 20];
                let mut random = Random::new(99);
                image.narrow_idle_regions().unwrap();
                while !done.load(Ordering::Acquire) {
                    image
                        .read(&mut piece, random.next_u64() % (SIZE - (1 << 20)))
                        .unwrap();
                }
            });
            let image = &image;
            let writers: Vec<_> = (0..WRITERS)
                .map(|lane| scope.spawn(move || writer(image, lane, 120)))
                .collect();
            let content: Vec<u8> = writers
                .into_iter()
                .flat_map(|writer| writer.join().unwrap())
                .collect();
            done.store(true, Ordering::Release);
            reader.join().unwrap();
            (content, freezer.join().unwrap())
        });
        assert!(read_all(&image) == content);
        image.close().unwrap();
        let bytes = storage.to_bytes();
        let image = open_bytes(bytes.clone(), reading()).unwrap();
        assert!(read_all(&image) == content);
        let mut all = image.load_bitmap("c0").unwrap();
        for number in 1..=frozen {
            all.union_outward(&image.load_bitmap(&format!("c{number}")).unwrap())
                .unwrap();
        }
        assert_covers(
            &all,
            &vec![0; content.len()],
            &content,
            "all intervals together",
        );
        println!(
            "clusters 2^{cluster_bits}: {} writes, {frozen} freezes",
            WRITERS * 120
        );
        if oracle::available() {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("races.qcow2");
            std::fs::write(&path, bytes).unwrap();
            qemu_img::check(&path).assert_clean();
        }
    }
}

#[test]
fn threads_that_write_the_same_clusters_leave_one_of_their_values() {
    let storage = CrashStorage::new(Vec::new());
    let image = Image::create(
        Box::new(storage.clone()),
        &CreateOptions::new(1 << 20),
        writing(),
    )
    .unwrap();
    add_bitmap(&image, "b", 4096);
    std::thread::scope(|scope| {
        for byte in 1..=8 {
            let image = &image;
            scope.spawn(move || {
                for sector in 0..512 {
                    image.write(&[byte; 512], sector * 512).unwrap();
                    if sector % 64 == 0 {
                        image.discard(sector * 512, 65536).unwrap();
                    }
                }
            });
        }
    });
    let content = read_all(&image);
    for sector in content[..512 * 512].chunks(512) {
        assert!(
            sector.iter().all(|byte| *byte == sector[0] && *byte <= 8),
            "a torn sector"
        );
    }
    image.close().unwrap();
    if oracle::available() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("same.qcow2");
        std::fs::write(&path, storage.to_bytes()).unwrap();
        qemu_img::check(&path).assert_clean();
    }
}
