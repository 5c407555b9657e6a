//! Writers of compressed clusters, which share host clusters, beside plain writers, readers and
//! discards.

use crate::common::read_all;
use crate::{CLUSTER, explore, finish, image, sound, spawn};

/// A cluster that shrinks; equally long for every `byte`.
fn cluster(byte: u8) -> [u8; 512] {
    let mut data = [byte; 512];
    data[..4].copy_from_slice(&[byte, 1, 2, 3]);
    data
}

#[test]
fn compressed_and_plain_writers_side_by_side_lose_nothing() {
    explore(|| {
        let (image, _) = image(|image| image.write_compressed(&cluster(9), CLUSTER).unwrap());
        let threads = vec![
            spawn(&image, |image| {
                image.write_compressed(&cluster(4), CLUSTER).unwrap();
                image.write_compressed(&cluster(5), 2 * CLUSTER).unwrap();
                image.flush().unwrap();
            }),
            spawn(&image, |image| {
                image.write_compressed(&cluster(6), 3 * CLUSTER).unwrap();
                image.write(&[7; 100], 3 * CLUSTER + 200).unwrap();
            }),
            spawn(&image, |image| {
                image.write_compressed(&cluster(3), CLUSTER).unwrap();
                image.write(&[8; 100], CLUSTER + 300).unwrap();
                image.discard(20 * CLUSTER, CLUSTER).unwrap();
            }),
        ];
        finish(threads);
        let content = read_all(&image);
        assert_eq!(content[1024..1536], cluster(5));
        let mut both = cluster(6);
        both[200..300].fill(7);
        assert_eq!(content[1536..2048], both);
        // The first writer of the whole cluster came first, between, or last.
        let with_part = |byte| {
            let mut data = cluster(byte);
            data[300..400].fill(8);
            data
        };
        let possible = [with_part(3), with_part(4), cluster(4)];
        let found: [u8; 512] = content[512..1024].try_into().unwrap();
        assert!(possible.contains(&found), "{found:?}");
        image.flush().unwrap();
        sound(&image);
    });
}

#[test]
fn a_reader_never_sees_compressed_data_of_another_cluster() {
    explore(|| {
        let (image, _) = image(|image| {
            for number in 0..2 {
                image
                    .write_compressed(&cluster(1), number * CLUSTER)
                    .unwrap();
            }
        });
        let threads = vec![
            spawn(&image, |image| {
                image.discard(0, 2 * CLUSTER).unwrap();
                image.flush().unwrap();
                // Its data goes where the other's was.
                image.write_compressed(&cluster(2), 20 * CLUSTER).unwrap();
            }),
            spawn(&image, |image| {
                // Parts of clusters: what was expanded is kept.
                for (at, byte) in [(0, 1), (20 * CLUSTER, 2), (0, 1), (20 * CLUSTER, 2)] {
                    let mut seen = [9; 100];
                    image.read(&mut seen, at + 100).unwrap();
                    let seen = &seen[..];
                    assert!(seen == [0; 100] || seen == [byte; 100], "another's data");
                }
            }),
        ];
        finish(threads);
        let content = read_all(&image);
        assert_eq!(content[..1024], [0; 1024]);
        assert_eq!(content[20 * 512..21 * 512], cluster(2));
        image.flush().unwrap();
        sound(&image);
    });
}
