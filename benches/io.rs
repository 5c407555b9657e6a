//! Guest I/O in process, with the plain file beside it: `cargo bench -p tidemark-benches --bench
//! io`. Set TMPDIR to a tmpfs to measure the engine and not the disk.

use std::os::unix::fs::FileExt;

use divan::Bencher;
use divan::counter::BytesCount;
use tidemark_benches::{Disk, Numbers};

const SIZE: u64 = 256 << 20;
/// Operations of one measured iteration, so that the clock and a cold cache do not count.
const BATCH: u64 = 1000;

fn main() {
    divan::main();
}

fn pieces(len: u64) -> u64 {
    SIZE / len
}

/// The file system's own speed: the same reads from a plain file.
#[divan::bench(args = [4096, 65536])]
fn pread_random(bencher: Bencher<'_, '_>, len: u64) {
    let file = plain_file();
    let mut buf = vec![0; usize::try_from(len).unwrap_or_default()];
    let mut numbers = Numbers::new();
    bencher
        .counter(BytesCount::new(len * BATCH))
        .bench_local(|| {
            (0..BATCH)
                .try_for_each(|_| file.read_exact_at(&mut buf, numbers.below(pieces(len)) * len))
        });
}

#[divan::bench(args = [4096, 65536])]
fn read_random(bencher: Bencher<'_, '_>, len: u64) {
    let disk = Disk::new(SIZE, SIZE, 0).expect("an image");
    let mut buf = vec![0; usize::try_from(len).unwrap_or_default()];
    let mut numbers = Numbers::new();
    bencher
        .counter(BytesCount::new(len * BATCH))
        .bench_local(|| {
            (0..BATCH).try_for_each(|_| disk.image.read(&mut buf, numbers.below(pieces(len)) * len))
        });
}

#[divan::bench]
fn read_sequential_1m(bencher: Bencher<'_, '_>) {
    let disk = Disk::new(SIZE, SIZE, 0).expect("an image");
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    bencher
        .counter(BytesCount::new(1_u64 << 20))
        .bench_local(|| {
            at = (at + (1 << 20)) % SIZE;
            disk.image.read(&mut buf, at)
        });
}

/// The file system's own speed: the same overwrites of a plain file.
#[divan::bench]
fn pwrite_4k_random(bencher: Bencher<'_, '_>) {
    let file = plain_file();
    let buf = vec![0xa5; 4096];
    let mut numbers = Numbers::new();
    bencher.bench_local(|| {
        (0..BATCH).try_for_each(|_| file.write_all_at(&buf, numbers.below(pieces(4096)) * 4096))
    });
}

#[divan::bench(args = [0, 1, 16])]
fn overwrite_4k_random(bencher: Bencher<'_, '_>, bitmaps: usize) {
    let disk = Disk::new(SIZE, SIZE, bitmaps).expect("an image");
    let buf = vec![0xa5; 4096];
    let mut numbers = Numbers::new();
    bencher.bench_local(|| {
        (0..BATCH).try_for_each(|_| disk.image.write(&buf, numbers.below(pieces(4096)) * 4096))
    });
}

/// 64 MiB written 64 KiB at a time into a new image, and flushed.
#[divan::bench(args = [0, 1, 16], sample_count = 20)]
fn allocate_64k_sequential(bencher: Bencher<'_, '_>, bitmaps: usize) {
    let total = 64_u64 << 20;
    let buf = vec![0xa5; 64 << 10];
    bencher
        .counter(BytesCount::new(total))
        .with_inputs(|| Disk::new(SIZE, 0, bitmaps).expect("an image"))
        .bench_local_values(|disk| {
            for at in (0..total).step_by(buf.len()) {
                disk.image.write(&buf, at).expect("the write succeeds");
            }
            disk.image.flush().expect("the flush succeeds");
            disk
        });
}

/// The file system's own speed: a plain file extended 64 KiB at a time.
#[divan::bench(sample_count = 20)]
fn extend_64k_sequential(bencher: Bencher<'_, '_>) {
    let total = 64_u64 << 20;
    let buf = vec![0xa5; 64 << 10];
    bencher
        .counter(BytesCount::new(total))
        .with_inputs(|| tempfile::tempfile().expect("a file"))
        .bench_local_values(|file| {
            for at in (0..total).step_by(buf.len()) {
                file.write_all_at(&buf, at).expect("the write succeeds");
            }
            file.sync_data().expect("the flush succeeds");
            file
        });
}

/// 4 KiB into every 64 KiB of 64 MiB of a new image, and flushed.
#[divan::bench(args = [0, 1], sample_count = 20)]
fn allocate_4k_in_every_64k(bencher: Bencher<'_, '_>, bitmaps: usize) {
    let buf = vec![0xa5; 4096];
    bencher
        .with_inputs(|| Disk::new(SIZE, 0, bitmaps).expect("an image"))
        .bench_local_values(|disk| {
            for at in (0..64_u64 << 20).step_by(64 << 10) {
                disk.image.write(&buf, at).expect("the write succeeds");
            }
            disk.image.flush().expect("the flush succeeds");
            disk
        });
}

/// The same above a backing file: whole clusters are filled up from it, subclusters are not.
#[divan::bench(args = [false, true], sample_count = 20)]
fn allocate_4k_in_every_64k_above_data(bencher: Bencher<'_, '_>, extended_l2: bool) {
    let buf = vec![0xa5; 4096];
    let total = 64_u64 << 20;
    bencher
        .with_inputs(|| Disk::overlay(total, extended_l2).expect("an image"))
        .bench_local_values(|disk| {
            for at in (0..total).step_by(64 << 10) {
                disk.image.write(&buf, at).expect("the write succeeds");
            }
            disk.image.flush().expect("the flush succeeds");
            disk
        });
}

fn plain_file() -> std::fs::File {
    let file = tempfile::tempfile().expect("a file");
    let piece = vec![0x5a; 1 << 20];
    for at in (0..SIZE).step_by(piece.len()) {
        file.write_all_at(&piece, at)
            .expect("the file can be filled");
    }
    file
}
