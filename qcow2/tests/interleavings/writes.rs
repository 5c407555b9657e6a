//! Writers, readers and discards of plain clusters.

use crate::common::read_all;
use crate::{CLUSTER, explore, finish, image, sound, spawn};

#[test]
fn writers_of_parts_of_one_new_cluster_lose_nothing() {
    explore(|| {
        let (image, _) = image(|_| ());
        let threads = (0..3)
            .map(|part: u8| {
                spawn(&image, move |image| {
                    let at = CLUSTER + u64::from(part) * 100;
                    image.write(&[part + 1; 100], at).unwrap();
                })
            })
            .collect();
        finish(threads);
        let content = read_all(&image);
        for part in 0..3_u8 {
            let at = 512 + usize::from(part) * 100;
            assert_eq!(content[at..at + 100], [part + 1; 100]);
        }
        sound(&image);
    });
}

#[test]
fn a_reader_never_sees_the_data_of_a_cluster_that_was_given_away() {
    explore(|| {
        let (image, _) = image(|image| image.write(&[1; 1024], 0).unwrap());
        let threads = vec![
            spawn(&image, |image| {
                image.discard(0, 1024).unwrap();
                image.flush().unwrap();
                image.write(&[2; 1024], 8 * CLUSTER).unwrap();
            }),
            spawn(&image, |image| {
                for _ in 0..2 {
                    let mut seen = [9; 1024];
                    image.read(&mut seen, 0).unwrap();
                    assert!(seen.iter().all(|byte| *byte < 2), "another cluster's data");
                }
            }),
        ];
        finish(threads);
        assert_eq!(read_all(&image)[..1024], [0; 1024]);
        sound(&image);
    });
}
