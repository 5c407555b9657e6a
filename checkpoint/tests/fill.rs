//! A lost bitmap computed anew: a superset of what changed since, and of nothing else than blocks that
//! differ or were marked.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod backup_world;

use backup_world::{DISK_BYTES, World, content, writing};
use tidemark_bitmap::{Bitmap, Granularity};
use tidemark_checkpoint::backup::{
    Catalogue, Filled, catalogue, differences, differences_between, fill, fill_from_image,
};
use tidemark_checkpoint::{CreateFlags, CreateSpec, DiskDelta, Domain, SinceOptions};
use tidemark_fixtures::ops::Op;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::random::Random;
use tidemark_qcow2::{CreateOptions, FileStorage, Image, Sharing};

/// Writes, zeroes and discards at random, some of them back to what was there.
fn live(world: &mut World, random: &mut Random, count: u64) {
    for _ in 0..count {
        let size = world.models["vda"].size();
        let offset = random.within(0..size);
        let len = random.within(1..150_000).min(size - offset);
        let seed = random.within(0..3);
        let op = match random.within(0..5) {
            0 => Op::WriteZeroes { offset, len },
            1 => Op::Discard { offset, len },
            _ => Op::Write { offset, len, seed },
        };
        world.run("vda", &[op]);
    }
}

fn checkpoint(world: &World, name: &str) {
    let spec = CreateSpec {
        name: Some(name.to_owned()),
        granularity: Granularity::from_bytes(4096),
        ..CreateSpec::default()
    };
    world
        .with(|domain| domain.create(&spec, CreateFlags::NONE).map(drop))
        .unwrap();
}

/// QEMU writes and dies: the recording bitmap is lost.
fn kill(world: &World, random: &mut Random) {
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&world.image("vda"));
    let offset = random.within(0..DISK_BYTES / 512 - 300) * 512;
    daemon.guest(&node, &[&format!("write -P 200 {offset} 100k"), "flush"]);
    daemon.kill_dash_nine();
}

fn since(domain: &Domain, name: &str) -> Option<Bitmap> {
    let checkpoint = domain.lookup(name).unwrap();
    let changes = checkpoint.changed_since(SinceOptions::default()).unwrap();
    match changes.into_iter().next().unwrap().delta {
        DiskDelta::Incremental(bits) => Some(bits),
        DiskDelta::Full { .. } => None,
    }
}

/// The bytes of the disk that an incremental answer leaves out are those of then.
fn assert_law(bits: &Bitmap, then: &[u8], now: &[u8], what: &str) {
    for (offset, (old, new)) in (0_u64..).zip(then.iter().zip(now)) {
        assert!(
            old == new || bits.test(offset),
            "{what}: byte {offset} changed unseen"
        );
    }
}

/// By the bytes: blocks of 64 KiB that differ.
fn blocks_that_differ(then: &[u8], now: &[u8], like: &Bitmap) -> Bitmap {
    let mut bits = Bitmap::new(like.shape());
    let mut at = 0;
    for (old, new) in then.chunks(65536).zip(now.chunks(65536)) {
        let end = at + u64::try_from(new.len()).unwrap();
        if old != new {
            bits.mark(at..end).unwrap();
        }
        at = end;
    }
    bits
}

fn differs(domain: &Domain, catalogue: &Catalogue, at: &str) -> Bitmap {
    let link = catalogue.find("vda", Some(at)).unwrap();
    let granularity = Granularity::from_bytes(4096).unwrap();
    differences(&domain.disks()[0].image, catalogue, link, granularity).unwrap()
}

fn names(filled: &[Filled]) -> Vec<(&str, &str)> {
    filled
        .iter()
        .map(|row| (row.checkpoint.as_str(), row.compared_with.as_str()))
        .collect()
}

/// A life with a moment after each few changes; those with `!` are backed up. Returns what the disk
/// held at each, and the newest backup.
fn moments<'a>(
    world: &mut World,
    random: &mut Random,
    moments: &[&'a str],
) -> (Vec<(&'a str, Vec<u8>)>, &'a str) {
    let mut held = Vec::new();
    let mut newest: Option<&str> = None;
    for moment in moments {
        let name = moment.trim_end_matches('!');
        held.push((name, world.models["vda"].content().to_vec()));
        if moment.ends_with('!') {
            world.backup(Some(name), newest);
            newest = Some(name);
        } else {
            checkpoint(world, name);
        }
        live(world, random, 5);
    }
    (held, newest.unwrap())
}

/// Makes the data of all backups unreadable; their hashes stay.
fn spoil_targets(world: &World) -> usize {
    let mut spoilt = 0;
    for file in std::fs::read_dir(world.directory()).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|end| end == "qcow2") {
            std::fs::write(&path, b"gone").unwrap();
            spoilt += 1;
        }
    }
    spoilt
}

#[test]
fn a_lost_interval_is_filled_from_the_hashes_of_a_backup() {
    tidemark_fixtures::require_qemu!();
    let (mut cases, mut answers) = (0, 0);
    for (cluster_bits, names_of_moments) in [
        (16, &["a!", "b"][..]),
        (16, &["a!", "b!", "c", "d"]),
        (12, &["a!", "b", "c!", "d"]),
        (14, &["a", "b!", "c"]),
        (21, &["a!", "b!", "c!"]),
    ] {
        let mut random = Random::stream(41, cases);
        let mut world = World::empty();
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(DISK_BYTES + 512)
        };
        world.add("vda", &options);
        live(&mut world, &mut random, 8);
        let (held, newest) = moments(&mut world, &mut random, names_of_moments);
        kill(&world, &mut random);
        let now = content(&world.image("vda"));
        assert!(spoil_targets(&world) > 0);
        let what = format!("clusters 2^{cluster_bits}, {names_of_moments:?}");
        let recording = held.last().unwrap().0;
        world.with(|domain| {
            domain.recover().unwrap();
            assert!(
                held.iter().all(|(name, _)| since(domain, name).is_none()),
                "{what}"
            );
            let backups = catalogue(&world.directory()).unwrap();
            let backed_up = |name: &str| backups.find("vda", Some(name)).is_ok();
            for (name, then) in held.iter().filter(|(name, _)| backed_up(name)) {
                let found = differs(domain, &backups, name);
                assert_law(&found, then, &now, &format!("{what}: compared with {name}"));
                let most = blocks_that_differ(then, &now, &found);
                assert!(
                    most.contains(&found),
                    "{what}: more than the blocks that differ"
                );
                answers += 1;
            }
            let filled = fill(domain, &backups).unwrap();
            assert_eq!(names(&filled), [(recording, newest)], "{what}");
            assert_eq!(fill(domain, &backups).unwrap(), [], "{what}: twice");
            for (name, then) in &held {
                let bits = since(domain, name).unwrap_or_else(|| panic!("{what}: {name} is full"));
                assert_law(&bits, then, &now, &format!("{what}: since {name}"));
                answers += 1;
            }
        });
        cases += 1;
    }
    println!("{cases} lives, {answers} answers");
    assert!(cases == 5 && answers >= 20);
}

#[test]
fn a_lost_interval_is_filled_from_an_image_of_the_past() {
    tidemark_fixtures::require_qemu!();
    let mut cases = 0;
    for cluster_bits in [12, 16, 21] {
        let mut random = Random::stream(42, cases);
        let mut world = World::empty();
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(DISK_BYTES)
        };
        world.add("vda", &options);
        live(&mut world, &mut random, 8);
        checkpoint(&world, "a");
        let at_a = world.models["vda"].content().to_vec();
        let copy = world.path("copy.qcow2");
        std::fs::copy(world.image("vda"), &copy).unwrap();
        live(&mut world, &mut random, 6);
        checkpoint(&world, "b");
        let at_b = world.models["vda"].content().to_vec();
        live(&mut world, &mut random, 6);
        kill(&world, &mut random);
        let now = content(&world.image("vda"));
        let what = format!("clusters 2^{cluster_bits}");
        let storage = FileStorage::open(&copy, false, Sharing::Exclusive).unwrap();
        let reading = tidemark_qcow2::OpenOptions {
            writable: false,
            ..writing()
        };
        let then = Image::open(Box::new(storage), reading).unwrap();
        world.with(|domain| {
            domain.recover().unwrap();
            let image = &domain.disks()[0].image;
            let fine = Granularity::from_bytes(512).unwrap();
            let found = differences_between(image, &then, fine).unwrap();
            for (sector, (old, new)) in (0_u64..).zip(at_a.chunks(512).zip(now.chunks(512))) {
                assert_eq!(
                    found.test(sector * 512),
                    old != new,
                    "{what}: sector {sector}"
                );
            }
            // It holds the moment of `a`, so that it cannot stand for `b` alone.
            assert_eq!(fill_from_image(domain, "vda", "c", &then).unwrap(), []);
            assert!(fill_from_image(domain, "vdb", "a", &then).is_err());
            let filled = fill_from_image(domain, "vda", "a", &then).unwrap();
            assert_eq!(names(&filled), [("b", "a")], "{what}");
            for (name, held) in [("a", &at_a), ("b", &at_b)] {
                let bits = since(domain, name).unwrap();
                assert_law(&bits, held, &now, &format!("{what}: since {name}"));
            }
        });
        cases += 1;
    }
    println!("{cases} lives");
    assert_eq!(cases, 3);
}

/// Of two that are lost, one moment between them fills the later, and one before it the earlier.
#[test]
fn of_two_lost_intervals_both_come_back_with_a_backup_before_each() {
    tidemark_fixtures::require_qemu!();
    let mut cases = 0;
    for between in [true, false] {
        let mut random = Random::stream(43, cases);
        let mut world = World::new();
        live(&mut world, &mut random, 6);
        world.backup(Some("a"), None);
        let at_a = world.models["vda"].content().to_vec();
        live(&mut world, &mut random, 4);
        match between {
            true => drop(world.backup(Some("b"), Some("a"))),
            false => checkpoint(&world, "b"),
        }
        let at_b = world.models["vda"].content().to_vec();
        live(&mut world, &mut random, 4);
        // The frozen one is spoilt by a foreign command, the recording one by a crash.
        tidemark_fixtures::oracle::qemu_img::bitmap_clear(&world.image("vda"), "a");
        kill(&world, &mut random);
        let now = content(&world.image("vda"));
        world.with(|domain| {
            domain.recover().unwrap();
            let filled = fill(domain, &catalogue(&world.directory()).unwrap()).unwrap();
            if between {
                assert_eq!(names(&filled), [("b", "b"), ("a", "a")]);
                for (name, held) in [("a", &at_a), ("b", &at_b)] {
                    assert_law(&since(domain, name).unwrap(), held, &now, name);
                }
            } else {
                assert_eq!(filled, []);
                assert!(since(domain, "a").is_none() && since(domain, "b").is_none());
            }
        });
        cases += 1;
    }
    println!("{cases} lives");
}

/// Hashes that cannot be believed are no ground for an answer.
#[test]
fn damaged_hashes_fill_nothing() {
    tidemark_fixtures::require_qemu!();
    let mut random = Random::stream(44, 0);
    let mut world = World::new();
    live(&mut world, &mut random, 6);
    world.backup(Some("a"), None);
    live(&mut world, &mut random, 4);
    kill(&world, &mut random);
    let hashes = std::fs::read_dir(world.directory())
        .unwrap()
        .map(|file| file.unwrap().path())
        .find(|path| path.extension().is_some_and(|end| end == "hashes"))
        .unwrap();
    let good = std::fs::read(&hashes).unwrap();
    for at in [0, 40, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&hashes, bad).unwrap();
        world.with(|domain| {
            domain.recover().unwrap();
            assert!(fill(domain, &catalogue(&world.directory()).unwrap()).is_err());
            assert!(since(domain, "a").is_none());
        });
    }
    std::fs::write(&hashes, good).unwrap();
    world.with(|domain| {
        let filled = fill(domain, &catalogue(&world.directory()).unwrap()).unwrap();
        assert_eq!(names(&filled), [("a", "a")]);
    });
    println!("4 damages");
}
