//! An image with so many L2 tables that the census waits until it is worth it. The file is sparse.

use std::fs::OpenOptions as Files;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

use crate::common::{add_bitmap, alone, open_file, reading, writing};
use crate::image::COPIED;

const CLUSTER: u64 = 65_536;
const TABLES: u64 = 4200;
/// First cluster of the tables, behind what QEMU puts into a new image.
const FIRST: u64 = 64;
/// First cluster of data.
const DATA: u64 = FIRST + TABLES;
/// Bytes of the disk below one table.
const SPAN: u64 = CLUSTER / 8 * CLUSTER;

struct Large {
    _folder: TempDir,
    path: PathBuf,
    block: u64,
}

impl Large {
    /// An image of which every table exists and maps nothing, and `data` clusters behind them that
    /// the first table maps in order.
    fn new(data: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large.qcow2");
        qemu_img::create(&path, TABLES * SPAN, &[]);
        let block = read(&path, read(&path, 48));
        let large = Self {
            _folder: folder,
            path,
            block,
        };
        let l1 = read(&large.path, 40);
        for number in 0..TABLES {
            let table = (FIRST + number) * CLUSTER;
            large.put(l1 + number * 8, table | COPIED);
        }
        for cluster in FIRST..DATA + data {
            large.set_refcount(cluster, 1);
        }
        for number in 0..data {
            large.map(number, DATA + number);
        }
        let file = Files::new().write(true).open(&large.path).unwrap();
        file.set_len((DATA + data) * CLUSTER).unwrap();
        large
    }

    fn put(&self, at: u64, value: u64) {
        let file = Files::new().write(true).open(&self.path).unwrap();
        file.write_all_at(&value.to_be_bytes(), at).unwrap();
    }

    fn set_refcount(&self, cluster: u64, value: u16) {
        let file = Files::new().write(true).open(&self.path).unwrap();
        let at = self.block + cluster * 2;
        file.write_all_at(&value.to_be_bytes(), at).unwrap();
    }

    /// Maps a guest cluster to a host cluster.
    fn map(&self, guest: u64, host: u64) {
        let table = (FIRST + guest / 8192) * CLUSTER;
        self.put(table + guest % 8192 * 8, (host * CLUSTER) | COPIED);
    }

    fn length(&self) -> u64 {
        std::fs::metadata(&self.path).unwrap().len()
    }

    fn guest(&self, offset: u64) -> [u8; 512] {
        let image = open_file(&self.path, reading());
        let mut bytes = [0; 512];
        image.read(&mut bytes, offset).unwrap();
        bytes
    }
}

fn read(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    let file = std::fs::File::open(path).unwrap();
    file.read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

#[test]
fn without_a_census_new_clusters_come_behind_the_end() {
    require_qemu!();
    let _alone = alone();
    let large = Large::new(4);
    large.set_refcount(DATA + 2, 0);
    let before = large.length();
    let image = open_file(&large.path, writing());
    add_bitmap(&image, "b", 1 << 20);
    for number in 0..8 {
        image.write(&[7; 512], (100 + number) * SPAN).unwrap();
    }
    image.write(&[9; 512], 0).unwrap();
    image.close().unwrap();
    assert!(large.length() > before, "the file grew");
    assert_eq!(large.guest(2 * CLUSTER), [0; 512]);
    assert_eq!(large.guest(0), [9; 512]);
    assert_eq!(large.guest(103 * SPAN), [7; 512]);
}

#[test]
fn without_a_census_two_tables_that_were_written_below_share_nothing() {
    require_qemu!();
    let _alone = alone();
    let large = Large::new(4);
    // The first cluster below table 50 is that of guest cluster 1, below the first table.
    large.map(50 * 8192, DATA + 1);
    let image = open_file(&large.path, writing());
    image.write(&[1; 512], 0).unwrap();
    image.write(&[2; 512], 50 * SPAN).unwrap();
    image.flush().unwrap();
    image.write(&[3; 512], CLUSTER + 512).unwrap();
    image.close().unwrap();
    assert_eq!(large.guest(CLUSTER), [0; 512]);
    assert_eq!(large.guest(CLUSTER + 512), [3; 512]);
    assert_eq!(large.guest(50 * SPAN), [2; 512]);
    assert_eq!(large.guest(50 * SPAN + 512), [0; 512]);
}

#[test]
fn the_census_comes_when_it_gives_back_enough() {
    require_qemu!();
    let _alone = alone();
    let large = Large::new(700);
    large.set_refcount(DATA + 699, 0);
    let image = open_file(&large.path, writing());
    image.write(&[8; 512], 699 * CLUSTER).unwrap();
    image.write(&[4; 512], 0).unwrap();
    image.discard(0, 100 * CLUSTER).unwrap();
    image.flush().unwrap();
    image.write(&[5; 512], 1000 * CLUSTER).unwrap();
    image.flush().unwrap();
    let few = large.length();
    assert!(few > (DATA + 700) * CLUSTER, "100 clusters are too few");
    image.discard(100 * CLUSTER, 590 * CLUSTER).unwrap();
    // The first frees them, the next one counts.
    image.flush().unwrap();
    image.flush().unwrap();
    for number in 0..500 {
        image.write(&[6; 512], (2000 + number) * CLUSTER).unwrap();
    }
    image.flush().unwrap();
    assert_eq!(large.length(), few, "freed clusters are used again");
    image.close().unwrap();
    assert_eq!(large.guest(699 * CLUSTER), [8; 512]);
    assert_eq!(large.guest(2499 * CLUSTER), [6; 512]);
    assert_eq!(large.guest(0), [0; 512]);
    let check = qemu_img::check(&large.path);
    check.assert_clean();
}
