//! Changes of the whole mapping beside guests: another size, snapshots taken, applied and deleted.

use std::sync::Arc;

use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{Image, MemoryStorage, Mistake, Shrink};

use crate::common::{add_bitmap, assert_covers, open_bytes, read_all, reading, writing};
use crate::{CLUSTER, SIZE, explore, finish, image, sound, spawn};

/// Whether it was done; what lies behind the end by then is refused.
fn done(answer: tidemark_qcow2::Result<()>) -> bool {
    match answer {
        Ok(()) => true,
        Err(error) => {
            let outside = matches!(error.mistake(), Some(Mistake::OutOfRange { .. }));
            assert!(outside, "{error}");
            false
        }
    }
}

/// Closes the image and opens what is on the disk; both are sound and say the same.
fn reopened(image: Arc<Image>, storage: &CrashStorage) -> Image {
    image.flush().unwrap();
    sound(&image);
    let content = read_all(&image);
    Arc::into_inner(image).unwrap().close().unwrap();
    let image = open_bytes(storage.to_bytes(), writing()).unwrap();
    assert!(read_all(&image) == content);
    sound(&image);
    image
}

fn snapshot(storage: &CrashStorage, name: &str) -> Vec<u8> {
    let storage = Box::new(MemoryStorage::from_bytes(storage.to_bytes()));
    read_all(&Image::open_snapshot(storage, reading(), name).unwrap())
}

#[test]
fn guests_stay_inside_a_disk_that_grows_and_shrinks() {
    explore(|| {
        let (image, storage) = image(|image| {
            image.write(&[1; 1024], 0).unwrap();
            image.write(&[2; 512], 60 * CLUSTER).unwrap();
            add_bitmap(image, "b", CLUSTER);
        });
        let start = read_all(&image);
        let threads = vec![
            spawn(&image, |image| {
                image.resize(2 * SIZE, Shrink::Refused).unwrap();
                image.resize(32 * CLUSTER, Shrink::Allowed).unwrap();
            }),
            spawn(&image, |image| {
                image.write(&[3; 512], 0).unwrap();
                done(image.write(&[4; 512], 60 * CLUSTER));
                done(image.write(&[5; 512], 100 * CLUSTER));
            }),
            spawn(&image, |image| {
                let mut seen = [9; 512];
                image.read(&mut seen, 0).unwrap();
                assert!(seen == [1; 512] || seen == [3; 512], "torn");
                if done(image.read(&mut seen, 60 * CLUSTER)) {
                    let whole = [[0; 512], [2; 512], [4; 512]];
                    assert!(whole.contains(&seen), "another cluster's data");
                }
            }),
        ];
        finish(threads);
        let mut expected = vec![0; 32 * 512];
        expected[..512].fill(3);
        expected[512..1024].fill(1);
        let image = reopened(image, &storage);
        assert!(read_all(&image) == expected);
        let bits = image.load_bitmap("b").unwrap();
        assert_covers(&bits, &start, &expected, "resized");
    });
}

#[test]
fn a_snapshot_is_the_disk_of_one_instant() {
    explore(|| {
        let (image, storage) = image(|image| image.write(&[1; 1024], 0).unwrap());
        let threads = vec![
            spawn(&image, |image| {
                image.create_snapshot("s").unwrap();
            }),
            spawn(&image, |image| {
                image.write(&[2; 512], 0).unwrap();
                image.write(&[3; 512], 512).unwrap();
                image.flush().unwrap();
            }),
            spawn(&image, |image| {
                let mut seen = [9; 512];
                image.read(&mut seen, 512).unwrap();
                assert!(seen == [1; 512] || seen == [3; 512], "torn");
            }),
        ];
        finish(threads);
        let image = reopened(image, &storage);
        let content = read_all(&image);
        assert_eq!((content[0], content[512]), (2, 3));
        let taken = snapshot(&storage, "s");
        let instants = [(1, 1), (2, 1), (2, 3)];
        assert!(instants.contains(&(taken[0], taken[512])), "two instants");
    });
}

#[test]
fn writes_are_before_or_after_a_snapshot_is_applied() {
    explore(|| {
        let (image, storage) = image(|image| {
            image.write(&[1; 1024], 0).unwrap();
            image.create_snapshot("s").unwrap();
            image.write(&[9; 512], 0).unwrap();
            add_bitmap(image, "b", CLUSTER);
        });
        let start = read_all(&image);
        let threads = vec![
            spawn(&image, |image| {
                image.apply_snapshot("s").unwrap();
            }),
            spawn(&image, |image| {
                image.write(&[2; 512], 512).unwrap();
                image.flush().unwrap();
                image.write(&[3; 512], 10 * CLUSTER).unwrap();
            }),
            spawn(&image, |image| {
                let extents = image.map(0, SIZE).unwrap();
                let data = extents.iter().take_while(|extent| extent.data);
                let bytes: u64 = data.map(|extent| extent.length).sum();
                assert!(bytes >= 1024, "{extents:?}");
                let mut seen = [8; 512];
                image.read(&mut seen, 0).unwrap();
                assert!(seen == [9; 512] || seen == [1; 512], "torn");
            }),
        ];
        finish(threads);
        let end = read_all(&image);
        let instants = [(1, 1, 0), (1, 1, 3), (1, 2, 3)];
        assert!(instants.contains(&(end[0], end[512], end[10 * 512])));
        let bits = image.load_bitmap("b").unwrap();
        assert_covers(&bits, &start, &end, "applied");
        image.write(&[4; 100], 600).unwrap();
        reopened(image, &storage);
        let taken = snapshot(&storage, "s");
        assert!(taken[..1024] == [1; 1024] && taken[1024..].iter().all(|&byte| byte == 0));
    });
}

#[test]
fn what_a_deleted_snapshot_shared_is_written_and_freed_once() {
    explore(|| {
        let (image, storage) = image(|image| {
            image.write(&[1; 1024], 0).unwrap();
            image.create_snapshot("s").unwrap();
            image.write(&[2; 512], 0).unwrap();
        });
        let threads = vec![
            spawn(&image, |image| {
                image.delete_snapshot("s").unwrap();
            }),
            spawn(&image, |image| {
                image.write(&[3; 100], 600).unwrap();
                image.discard(0, 512).unwrap();
                image.flush().unwrap();
                image.write(&[4; 512], 20 * CLUSTER).unwrap();
            }),
            spawn(&image, |image| {
                let mut seen = [9; 512];
                image.read(&mut seen, 0).unwrap();
                assert!(seen == [2; 512] || seen == [0; 512], "another's data");
            }),
        ];
        finish(threads);
        let image = reopened(image, &storage);
        let content = read_all(&image);
        assert!(content[..512] == [0; 512] && content[600..700] == [3; 100]);
        assert!(content[512..600] == [1; 88] && content[20 * 512] == 4);
        assert!(image.snapshots().unwrap().is_empty());
    });
}
