//! Bitmaps in memory, and loaded and stored: `cargo bench -p tidemark-benches --bench bitmap`.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use tidemark_benches::{Disk, Numbers, scattered};
use tidemark_bitmap::{Bitmap, SharedBitmap};
use tidemark_qcow2::Error;

const TIB: u64 = 1 << 40;

fn main() {
    divan::main();
}

fn serialized(bitmap: &Bitmap) -> BytesCount {
    BytesCount::new(bitmap.shape().serialized_bytes())
}

/// For comparison: the same bytes copied.
#[divan::bench(args = [10, 50])]
fn memcpy_1tib_4k(bencher: Bencher<'_, '_>, percent: u64) {
    let bytes = scattered(TIB, 4096, percent).shape().serialized_bytes();
    let from = vec![0x5a_u8; usize::try_from(bytes).unwrap_or_default()];
    let mut to = from.clone();
    bencher.counter(BytesCount::new(bytes)).bench_local(|| {
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
    });
}

#[divan::bench(args = [10, 50])]
fn merge_1tib_4k(bencher: Bencher<'_, '_>, percent: u64) {
    let other = scattered(TIB, 4096, percent);
    let mut target = other.clone();
    bencher
        .counter(serialized(&other))
        .bench_local(|| target.union_outward(black_box(&other)));
}

#[divan::bench(args = [10, 50])]
fn merge_4k_into_64k_1tib(bencher: Bencher<'_, '_>, percent: u64) {
    let other = scattered(TIB, 4096, percent);
    let mut target = scattered(TIB, 65536, percent);
    bencher
        .counter(serialized(&other))
        .bench_local(|| target.union_outward(black_box(&other)));
}

#[divan::bench(args = [10, 50])]
fn merge_64k_into_4k_1tib(bencher: Bencher<'_, '_>, percent: u64) {
    let other = scattered(TIB, 65536, percent);
    let mut target = scattered(TIB, 4096, percent);
    let bytes = serialized(&target);
    bencher
        .counter(bytes)
        .bench_local(|| target.union_outward(black_box(&other)));
}

#[divan::bench(args = [10, 50])]
fn count_1tib_4k(bencher: Bencher<'_, '_>, percent: u64) {
    let bitmap = scattered(TIB, 4096, percent);
    bencher
        .counter(serialized(&bitmap))
        .bench_local(|| black_box(&bitmap).count());
}

#[divan::bench(args = [10, 50])]
fn walk_dirty_ranges_1tib_4k(bencher: Bencher<'_, '_>, percent: u64) {
    let bitmap = scattered(TIB, 4096, percent);
    bencher.bench_local(|| black_box(&bitmap).dirty_ranges().count());
}

#[divan::bench]
fn mark_4k_shared(bencher: Bencher<'_, '_>) {
    let shared = SharedBitmap::from_bitmap(&scattered(TIB, 65536, 0));
    let mut numbers = Numbers::new();
    bencher.bench_local(|| {
        let at = numbers.below(TIB / 4096) * 4096;
        shared.mark(at..at + 4096)
    });
}

#[divan::bench(sample_count = 20)]
fn store_1tib_64k_half_set(bencher: Bencher<'_, '_>) {
    let disk = Disk::new(TIB, 0, 1).expect("an image");
    let bits = scattered(TIB, 65536, 50);
    bencher.counter(serialized(&bits)).bench_local(|| {
        disk.image.update(|update| {
            update.put("b0", bits.clone(), false)?;
            Ok::<_, Error>(())
        })
    });
}

#[divan::bench(sample_count = 20)]
fn load_1tib_64k_half_set(bencher: Bencher<'_, '_>) {
    let disk = Disk::new(TIB, 0, 1).expect("an image");
    let bits = scattered(TIB, 65536, 50);
    disk.image
        .update(|update| update.put("b0", bits.clone(), false))
        .expect("the bitmap is stored");
    bencher
        .counter(serialized(&bits))
        .bench_local(|| disk.image.load_bitmap("b0"));
}
