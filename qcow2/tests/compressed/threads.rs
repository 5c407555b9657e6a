//! Compressed writes, plain writes, discards and reads side by side.

use std::sync::atomic::{AtomicBool, Ordering};

use tidemark_fixtures::random::Random;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{CompressionType, CreateOptions, Image, Packed, Packer};

use crate::common::{add_bitmap, assert_covers, open_bytes, read_all, reading, writing};
use crate::ours::assert_sound;
use crate::{disk, noise, text, to_u64, to_usize};

const CLUSTER: u64 = 4096;
const LANE: u64 = 4 << 20;
const LANES: u64 = 4;

/// One writer works on its own part of the disk, whose clusters share host clusters with those of
/// the others.
fn writer(image: &Image, lane: u64, steps: u64) -> Vec<u8> {
    let mut random = Random::new(lane + 1);
    let mut known = vec![0; to_usize(LANE)];
    for step in 0..steps {
        let clusters = random.within(1..40);
        let at = random.within(0..LANE / CLUSTER - clusters) * CLUSTER;
        let len = clusters * CLUSTER;
        let range = to_usize(at)..to_usize(at + len);
        match random.next_u64() % 8 {
            0 => {
                image.discard(lane * LANE + at, len).unwrap();
                known[range].fill(0);
            }
            1 => {
                let piece = noise(step, 700);
                known[range.start + 9..][..700].copy_from_slice(&piece);
                image.write(&piece, lane * LANE + at + 9).unwrap();
            }
            2 => image.flush().unwrap(),
            _ => {
                let data = text(lane * 1000 + step, to_usize(len));
                image.write_compressed(&data, lane * LANE + at).unwrap();
                known[range.clone()].copy_from_slice(&data);
                let mut back = vec![0; to_usize(len)];
                image.read(&mut back, lane * LANE + at).unwrap();
                assert!(back == known[range], "lane {lane} lost its own write");
            }
        }
    }
    known
}

#[test]
fn compressed_writers_and_others_side_by_side_lose_nothing() {
    for refcount_bits in [2, 16] {
        let storage = CrashStorage::new(Vec::new());
        let options = CreateOptions {
            cluster_bits: 12,
            refcount_bits,
            compression_type: CompressionType::Zstd,
            ..CreateOptions::new(LANE * LANES)
        };
        let image = Image::create(Box::new(storage.clone()), &options, writing()).unwrap();
        add_bitmap(&image, "b", 4096);
        let done = AtomicBool::new(false);
        let content = std::thread::scope(|scope| {
            let image = &image;
            let reader = scope.spawn(|| {
                let mut random = Random::new(99);
                let mut piece = vec![0; 3000];
                while !done.load(Ordering::Acquire) {
                    let at = random.within(0..LANE * LANES - 3000);
                    image.read(&mut piece, at).unwrap();
                }
            });
            let writers: Vec<_> = (0..LANES)
                .map(|lane| scope.spawn(move || writer(image, lane, 60)))
                .collect();
            let content: Vec<u8> = writers
                .into_iter()
                .flat_map(|writer| writer.join().unwrap())
                .collect();
            done.store(true, Ordering::Release);
            reader.join().unwrap();
            content
        });
        assert!(read_all(&image) == content);
        image.close().unwrap();
        let bytes = storage.to_bytes();
        let bits = open_bytes(bytes.clone(), reading())
            .unwrap()
            .load_bitmap("b")
            .unwrap();
        assert_covers(&bits, &vec![0; content.len()], &content, "four writers");
        let compressed = assert_sound(bytes, &content, "four writers");
        println!("refcounts of {refcount_bits} bits: {compressed} compressed clusters");
        assert!(compressed > 500);
    }
}

#[test]
fn clusters_packed_on_many_threads_and_stored_in_order_make_the_same_image() {
    let content = disk(4, 3 << 20);
    let options = CreateOptions {
        cluster_bits: 14,
        ..CreateOptions::new(to_u64(content.len()))
    };
    let packed_by = |threads: usize| {
        let storage = CrashStorage::new(Vec::new());
        let image = Image::create(Box::new(storage.clone()), &options, writing()).unwrap();
        let packer: Packer = image.packer(Some(9));
        let pieces: Vec<&[u8]> = content.chunks(256 << 10).collect();
        let mut packed: Vec<Packed> = Vec::new();
        std::thread::scope(|scope| {
            for some in pieces.chunks(threads) {
                let running: Vec<_> = some
                    .iter()
                    .map(|piece| scope.spawn(move || packer.pack(piece)))
                    .collect();
                packed.extend(running.into_iter().map(|thread| thread.join().unwrap()));
            }
        });
        let mut at = 0;
        for piece in &packed {
            assert!(piece.stored_bytes() <= piece.guest_bytes());
            image.write_packed(piece, at).unwrap();
            at += piece.guest_bytes();
        }
        image.close().unwrap();
        storage.to_bytes()
    };
    let bytes = packed_by(1);
    assert!(bytes == packed_by(4));
    assert_sound(bytes, &content, "packed elsewhere");
}

#[test]
fn threads_that_compress_the_same_clusters_leave_one_of_their_values() {
    let storage = CrashStorage::new(Vec::new());
    let options = CreateOptions {
        cluster_bits: 12,
        ..CreateOptions::new(1 << 20)
    };
    let image = Image::create(Box::new(storage.clone()), &options, writing()).unwrap();
    std::thread::scope(|scope| {
        for byte in 1..=6 {
            let image = &image;
            scope.spawn(move || {
                for round in 0..40 {
                    let at = round % 8 * 3 * CLUSTER;
                    image.write_compressed(&[byte; 5 * 4096], at).unwrap();
                    if round % 16 == 0 {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    let content = read_all(&image);
    for cluster in content.chunks(4096) {
        let one = cluster[0];
        assert!(cluster.iter().all(|byte| *byte == one) && one <= 6);
    }
    image.close().unwrap();
    assert_sound(storage.to_bytes(), &content, "the same clusters");
}
