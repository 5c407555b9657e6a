//! What only mapping tables can tell, with the reading of those tables beside it: `cargo bench -p
//! tidemark-benches --bench mapping`. Set TMPDIR to a tmpfs to measure the engine and not the disk.

use std::fs::File;
use std::os::unix::fs::FileExt;

use divan::Bencher;
use divan::counter::BytesCount;
use tidemark_benches::Disk;
use tidemark_qcow2::Moment;

const SIZE: u64 = 64 << 30;

fn main() {
    divan::main();
}

/// What changed since a snapshot, each of the 128 tables another one.
#[divan::bench(sample_count = 20)]
fn delta_64g(bencher: Bencher<'_, '_>) {
    let disk = Disk::with_full_tables(SIZE).expect("an image");
    // Opened anew for each: nothing is in memory.
    bencher
        .counter(BytesCount::new(2 * table_bytes(&disk)))
        .with_inputs(|| disk.reader().expect("an image"))
        .bench_local_values(|image| {
            let delta = image.delta(Moment::Snapshot("s"), Moment::Present);
            let delta = delta.expect("the tables are sound");
            assert_eq!(delta.changed.count(), 128);
        });
}

/// For comparison: as many bytes as both moments have tables, read by one thread.
#[divan::bench(sample_count = 20)]
fn pread_tables_64g(bencher: Bencher<'_, '_>) {
    let disk = Disk::with_full_tables(SIZE).expect("an image");
    let file = File::open(disk.folder().join("disk.qcow2")).expect("the image");
    let bytes = 2 * table_bytes(&disk);
    let mut table = vec![0; 64 << 10];
    bencher.counter(BytesCount::new(bytes)).bench_local(|| {
        for at in (0..bytes).step_by(table.len()) {
            file.read_exact_at(&mut table, at)
                .expect("the file is longer");
        }
    });
}

fn table_bytes(disk: &Disk) -> u64 {
    let geometry = disk.image.geometry();
    (SIZE >> geometry.cluster_bits) * 8
}
