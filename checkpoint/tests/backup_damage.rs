//! Backups that rotted: what verify finds, and what restore refuses.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod backup_world;

use std::path::{Path, PathBuf};

use backup_world::{CLUSTER, DISK_BYTES, World, only};
use tidemark_checkpoint::backup::{
    self, BackupOptions, Defect, Error, Format, RestoreOptions, Verification,
};
use tidemark_fixtures::ops::Op;
use tidemark_fixtures::random::Random;

/// A full backup and an increment of `vda`, as checkpoints `a` and `b`.
fn two_points(format: Format) -> World {
    let mut world = World::new();
    world.write("vda", 0, 20 * CLUSTER, 1);
    let options = BackupOptions {
        format,
        ..world.options(Some("a"), None)
    };
    world
        .with(|domain| backup::backup(domain, &options))
        .unwrap();
    let (offset, len) = (12 * CLUSTER, 2 * CLUSTER);
    world.run(
        "vda",
        &[
            Op::Write {
                offset: 3 * CLUSTER,
                len: 100,
                seed: 2,
            },
            Op::Discard { offset, len },
        ],
    );
    world.backup(Some("b"), Some("a"));
    world.assert_sound();
    world
}

fn files(world: &World) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(world.directory()).unwrap();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn flip(path: &Path, bit: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[usize::try_from(bit / 8).unwrap()] ^= 1 << (bit % 8);
    std::fs::write(path, bytes).unwrap();
}

fn verify(world: &World) -> Verification {
    backup::verify(&world.directory()).unwrap()
}

fn restore(world: &World, at: &str) -> Result<Vec<u8>, Error> {
    let to = world.path("restored");
    let options = RestoreOptions {
        from: world.directory(),
        disk: "vda".to_owned(),
        at: Some(at.to_owned()),
        to: to.clone(),
        format: Format::Raw,
    };
    let outcome = backup::restore(&options);
    let left: Vec<_> = std::fs::read_dir(to.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("restored"))
        .collect();
    assert_eq!(!left.is_empty(), outcome.is_ok(), "{left:?}");
    outcome.map(|_| {
        let bytes = std::fs::read(&to).unwrap();
        std::fs::remove_file(to).unwrap();
        bytes
    })
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    for format in [Format::Qcow2, Format::Raw] {
        let world = two_points(format);
        let content = [restore(&world, "a").unwrap(), restore(&world, "b").unwrap()];
        let mut random = Random::new(7);
        for file in files(&world) {
            let bits = std::fs::metadata(&file).unwrap().len() * 8;
            let ends = [0, 8 * 24, bits - 1];
            let inside = (0..12).map(|_| random.within(0..bits)).collect::<Vec<_>>();
            for bit in ends.into_iter().chain(inside) {
                flip(&file, bit);
                let found = verify(&world);
                assert!(!found.is_sound(), "{} bit {bit}", file.display());
                for (at, content) in ["a", "b"].into_iter().zip(&content) {
                    // Wrong bytes are never given back; right ones may be.
                    if let Ok(restored) = restore(&world, at) {
                        assert!(restored == *content, "{} bit {bit}", file.display());
                    }
                }
                flip(&file, bit);
            }
        }
        assert!(verify(&world).is_sound());
    }
}

#[test]
fn a_flipped_bit_of_data_is_found_by_its_place_on_the_disk() {
    let world = two_points(Format::Raw);
    let raw = files(&world)
        .into_iter()
        .find(|file| file.extension().is_some_and(|end| end == "raw"))
        .unwrap();
    flip(&raw, (5 * CLUSTER + 9) * 8);
    let found = verify(&world);
    let [finding] = found.findings.as_slice() else {
        panic!("{found:?}");
    };
    assert_eq!(finding.defect, Defect::Data(5 * CLUSTER..6 * CLUSTER));
    // The increment may hold that block itself: a bit may have been planted there.
    let error = restore(&world, "a").unwrap_err();
    assert!(matches!(error, Error::Damaged(_)), "{error}");
}

#[test]
fn data_where_there_was_none_is_found_in_a_raw_target() {
    let world = two_points(Format::Raw);
    let raw = files(&world)
        .into_iter()
        .find(|file| file.extension().is_some_and(|end| end == "raw"))
        .unwrap();
    flip(&raw, (DISK_BYTES - 1) * 8);
    assert!(!verify(&world).is_sound());
}

#[test]
fn every_missing_file_is_named() {
    let world = two_points(Format::Qcow2);
    for file in files(&world) {
        let name = file.file_name().unwrap().to_str().unwrap();
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        let found = verify(&world);
        // A point whose manifest is gone is gone, but what builds on it tells.
        let last_manifest = name.starts_with("b-") && name.ends_with(".manifest.json");
        assert_eq!(found.is_sound(), last_manifest, "{name}: {found:?}");
        if last_manifest {
            assert_eq!(found.strangers.len(), 2);
        }
        assert!(restore(&world, "b").is_err(), "{name}");
        std::fs::write(&file, bytes).unwrap();
    }
    assert!(verify(&world).is_sound());
}

#[test]
fn a_cut_file_is_found() {
    let world = two_points(Format::Qcow2);
    for file in files(&world) {
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        assert!(!verify(&world).is_sound(), "{}", file.display());
        std::fs::write(&file, bytes).unwrap();
    }
}

#[test]
fn the_targets_of_two_points_cannot_be_exchanged() {
    let mut world = two_points(Format::Qcow2);
    world.write("vda", 0, 1, 9);
    let report = world.backup(Some("c"), Some("b"));
    let c = world.directory().join(&only(&report).path);
    let b = files(&world)
        .into_iter()
        .find(|file| {
            let name = file.file_name().unwrap().to_str().unwrap();
            name.starts_with("b-") && name.ends_with(".qcow2")
        })
        .unwrap();
    std::fs::copy(&c, &b).unwrap();
    assert!(!verify(&world).is_sound());
    assert!(restore(&world, "b").is_err());
}

#[test]
fn what_is_no_directory_of_backups_is_an_error() {
    let world = World::new();
    assert!(backup::verify(&world.path("nowhere")).is_err());
    assert_eq!(
        backup::catalogue(&world.path("nowhere"))
            .unwrap()
            .points()
            .len(),
        0
    );
}

#[test]
fn a_manifest_that_leads_out_of_its_directory_is_refused() {
    let world = two_points(Format::Qcow2);
    let manifest = files(&world)
        .into_iter()
        .find(|file| {
            let name = file.file_name().unwrap().to_str().unwrap();
            name.starts_with("a-") && name.ends_with(".manifest.json")
        })
        .unwrap();
    let text = std::fs::read_to_string(&manifest).unwrap();
    let (key, zeros) = ("\"blake3\": \"", "0".repeat(64));
    let text = text.replace("\"path\": \"a-", "\"path\": \"../a-");
    let at = text.rfind(key).unwrap() + key.len();
    let blank = format!("{}{zeros}{}", &text[..at], &text[at + 64..]);
    let hash = blake3::hash(blank.as_bytes());
    std::fs::write(&manifest, blank.replace(&zeros, hash.to_hex().as_str())).unwrap();
    let found = verify(&world);
    let reason = found.findings[0].to_string();
    assert!(reason.contains("outside its directory"), "{reason}");
}
