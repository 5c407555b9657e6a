//! Chains of one to eight layers, raw and qcow2, longer and shorter than what is below, read by us
//! and by QEMU byte for byte; and how far a chain is followed.

use std::path::Path;
use std::sync::{Arc, Mutex};

use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{
    BackingReference, Below, CreateOptions, Error, Feature, FileStorage, Gate, Image,
    MemoryStorage, OpenOptions, Sharing, Storage,
};

use crate::common::{alone, create_file, open_file, read_all, reading, writing};
use crate::stack::{Folder, Layer, cases};

/// Reads pieces anywhere, to any byte, and compares them with the whole.
fn read_anywhere(image: &Image, whole: &[u8], random: &mut Random) {
    let size = u64::try_from(whole.len()).unwrap();
    for _ in 0..40 {
        let start = random.within(0..size);
        let len = random.within(0..(size - start).min(200_000) + 1);
        let mut piece = vec![0xee; usize::try_from(len).unwrap()];
        image.read(&mut piece, start).unwrap();
        let at = usize::try_from(start).unwrap();
        assert!(piece == whole[at..at + piece.len()], "{start}, {len} bytes");
    }
}

#[test]
fn chains_of_qemu_read_byte_for_byte_at_every_depth() {
    require_qemu!();
    let _alone = alone();
    let rounds = cases(24).div_ceil(8);
    let mut chains = 0;
    for depth in 1..=8 {
        for round in 0..rounds {
            let seed = 5000 + round * 10 + u64::try_from(depth).unwrap();
            let mut folder = Folder::new(seed);
            let mut layers = folder.chain("layer", depth);
            if layers.last().unwrap().format == "raw" {
                let below = layers.last().cloned();
                layers.push(folder.layer("top", below.as_ref()));
            }
            let path = folder.path(&layers.last().unwrap().name);
            let expected = qemu_img::convert_to_raw(&path);
            let image = open_file(&path, reading());
            assert!(read_all(&image) == expected, "{layers:?}");
            read_anywhere(&image, &expected, &mut folder.random);
            let files: Vec<&Path> = image.layer_names().into_iter().map(Path::new).collect();
            let names = files.iter().map(|file| file.file_name().unwrap());
            assert!(names.eq(layers.iter().rev().map(|layer| layer.name.as_str())));
            // Written through the top, the layers below stay.
            drop(image);
            let below: Vec<Vec<u8>> = below_files(&folder, &layers);
            let image = open_file(&path, writing());
            image.write(&[0x5e; 3000], image.size() / 2).unwrap();
            let expected = read_all(&image);
            image.close().unwrap();
            assert!(qemu_img::convert_to_raw(&path) == expected);
            assert!(below_files(&folder, &layers) == below);
            chains += 1;
        }
    }
    println!("{chains} chains");
    assert!(chains >= 8);
}

fn below_files(folder: &Folder, layers: &[Layer]) -> Vec<Vec<u8>> {
    let below = &layers[..layers.len() - 1];
    let read = |layer: &Layer| std::fs::read(folder.path(&layer.name)).unwrap();
    below.iter().map(read).collect()
}

#[test]
fn chains_of_ours_read_the_same_in_qemu() {
    require_qemu!();
    let _alone = alone();
    let mut chains = 0;
    for depth in 1..=8_u64 {
        let folder = tempfile::tempdir().unwrap();
        let mut random = Random::stream(13, depth);
        let mut below: Option<BackingReference> = None;
        for number in 0..=depth {
            let name = format!("layer{number}");
            let path = folder.path().join(&name);
            let size = random.within(1 << 11..1 << 12) * 512;
            if number == 0 && depth.is_multiple_of(2) {
                std::fs::write(&path, vec![0x11; usize::try_from(size).unwrap()]).unwrap();
                below = Some(reference(&name, "raw"));
                continue;
            }
            let extended_l2 = random.one_in(3);
            let options = CreateOptions {
                cluster_bits: if extended_l2 {
                    16
                } else {
                    [9, 12, 16, 21][at(&mut random, 4)]
                },
                extended_l2,
                version: if !extended_l2 && random.one_in(4) {
                    2
                } else {
                    3
                },
                backing: below.clone(),
                ..CreateOptions::new(size)
            };
            let image = create_file(&path, &options);
            for _ in 0..4 {
                let start = random.within(0..size);
                let len = random.within(1..size - start + 1).min(100_000);
                let byte = u8::try_from(random.within(1..250)).unwrap();
                match random.within(0..4) {
                    0 => image.write_zeroes(start, len).unwrap(),
                    1 => image.discard(start, len).unwrap(),
                    _ => {
                        let data = vec![byte; usize::try_from(len).unwrap()];
                        image.write(&data, start).unwrap();
                    }
                }
            }
            let content = read_all(&image);
            image.close().unwrap();
            assert!(
                qemu_img::convert_to_raw(&path) == content,
                "{name} of {depth}"
            );
            qemu_img::check(&path).assert_clean();
            below = Some(reference(&name, "qcow2"));
            chains += 1;
        }
    }
    println!("{chains} chains");
    assert!(chains >= 36);
}

fn at(random: &mut Random, count: u64) -> usize {
    usize::try_from(random.within(0..count)).unwrap()
}

fn reference(name: &str, format: &str) -> BackingReference {
    BackingReference {
        name: name.as_bytes().to_vec(),
        format: format.to_owned(),
    }
}

/// A relative name starts at the folder of the image that says it, not at that of the top.
#[test]
fn relative_names_start_at_the_image_that_says_them() {
    require_qemu!();
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    for name in ["a/b", "c"] {
        std::fs::create_dir_all(file(name)).unwrap();
    }
    std::fs::write(file("a/base"), vec![0x21; 1 << 20]).unwrap();
    let over = |name: &str, below: &str, format: &str| {
        let options = CreateOptions {
            backing: Some(reference(below, format)),
            ..CreateOptions::new(1 << 20)
        };
        create_file(&file(name), &options).close().unwrap();
    };
    over("a/b/middle", "../base", "raw");
    over("c/top", "../a/b/middle", "qcow2");
    qemu_io::commands(&file("c/top"), &["write -P 7 100k 5k"]);
    // Through a link the name starts where the link lies, as in QEMU.
    std::os::unix::fs::symlink(file("c/top"), file("c/link")).unwrap();
    for name in ["c/top", "c/link"] {
        let image = open_file(&file(name), reading());
        assert!(read_all(&image) == qemu_img::convert_to_raw(&file(name)));
        assert!(
            image.layer_names()[2].ends_with("a/b/../base"),
            "{:?}",
            image.layer_names()
        );
    }
    std::os::unix::fs::symlink(file("c/top"), file("link")).unwrap();
    assert!(crate::common::try_open_file(&file("link"), reading()).is_err());
    assert!(!qemu_img::run(&["info", "--backing-chain", file("link").to_str().unwrap()]).success());
}

/// As many layers as are followed can be read, written and checked; one more is refused by name.
#[test]
fn a_chain_is_followed_to_its_limit_and_no_further() {
    let _alone = alone();
    let bottom = crate::common::built(&CreateOptions::new(1 << 20), |image| {
        image.write(&[0x77; 9000], 50_000).unwrap();
    });
    let options = CreateOptions {
        backing: Some(reference("next", "qcow2")),
        ..CreateOptions::new(1 << 20)
    };
    let storage = CrashStorage::new(Vec::new());
    let gate = Counted {
        left: Mutex::new(1),
        overlay: Vec::new(),
        bottom: bottom.clone(),
    };
    let open = OpenOptions::writing(Arc::new(gate));
    let image = Image::create(Box::new(storage.clone()), &options, open).unwrap();
    image.close().unwrap();
    let overlay = storage.to_bytes();
    let open = |layers: usize| {
        let gate = Counted {
            left: Mutex::new(layers - 1),
            overlay: overlay.clone(),
            bottom: bottom.clone(),
        };
        let open = OpenOptions::writing(Arc::new(gate));
        Image::open(Box::new(CrashStorage::new(overlay.clone())), open)
    };
    for layers in [2, 8, 64, 128] {
        let image = open(layers).unwrap_or_else(|error| panic!("{layers}: {error}"));
        assert_eq!(image.layer_names().len(), layers);
        let mut buffer = [0; 10];
        image.read(&mut buffer, 50_000).unwrap();
        assert_eq!(buffer, [0x77; 10]);
        let depth = image.map(50_000, 10).unwrap()[0].depth;
        assert_eq!(usize::try_from(depth).unwrap(), layers - 1);
        image.write(&[1; 100], 60_000).unwrap();
        image.close().unwrap();
    }
    for layers in [129, 1000] {
        let error = open(layers).unwrap_err();
        let Error::Unsupported {
            feature: Feature::Backing { reason, .. },
            ..
        } = error
        else {
            panic!("{error}")
        };
        assert!(reason.contains("too long"), "{reason}");
    }
}

/// Overlays, so many of them, and then what stands alone.
#[derive(Debug)]
struct Counted {
    left: Mutex<usize>,
    overlay: Vec<u8>,
    bottom: Vec<u8>,
}

impl Gate for Counted {
    fn open(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        let mut left = self.left.lock().unwrap();
        *left -= 1;
        let bytes = if *left == 0 {
            &self.bottom
        } else {
            &self.overlay
        };
        Ok(Box::new(MemoryStorage::from_bytes(bytes.clone())))
    }
}

/// Rings of one to three images, opened at each of them, to read and to write.
#[test]
fn a_ring_of_images_is_refused_and_stays_as_it_is() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut asked = 0;
    for count in 1..=3_usize {
        let name = |number: usize| format!("ring{count}-{}", number % count);
        for number in 0..count {
            let path = folder.path().join(name(number));
            create_file(&path, &CreateOptions::new(1 << 20))
                .close()
                .unwrap();
            let next = reference(&name(number + 1), "qcow2");
            let image = crate::common::try_open_file(&path, writing()).unwrap();
            image.set_backing(Some(&next), Below::Unknown).unwrap();
        }
        for number in 0..count {
            let path = folder.path().join(name(number));
            let before = std::fs::read(&path).unwrap();
            for options in [reading(), writing()] {
                let error = crate::common::try_open_file(&path, options).unwrap_err();
                println!("{error}");
                asked += 1;
            }
            assert!(std::fs::read(&path).unwrap() == before);
            let storage = FileStorage::open(&path, true, Sharing::Exclusive);
            // Broken up again by its name alone.
            let image = Image::open_unbacked(Box::new(storage.unwrap()), true).unwrap();
            image.set_backing(None, Below::Unknown).unwrap();
            assert!(crate::common::try_open_file(&path, reading()).is_ok());
            let image = open_file(&path, writing());
            let next = reference(&name(number + 1), "qcow2");
            image.set_backing(Some(&next), Below::Unknown).unwrap();
        }
    }
    println!("{asked} openings of rings");
    assert_eq!(asked, 12);
}
