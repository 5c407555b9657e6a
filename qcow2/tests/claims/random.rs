//! Random damage of refcounts, COPIED flags and shared clusters on images that QEMU made, then
//! random changes by us: what nobody wrote to stays, on the disk and in its snapshots.

use tidemark_fixtures::golden;
use tidemark_fixtures::ops::fill;
use tidemark_fixtures::random::Random;
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{Error, Image, MemoryStorage, OpenOptions};

use crate::common::{add_bitmap, boxed, open_bytes, reading, writing};
use crate::image::{Tables, by_qemu};

const SECTOR: u64 = 512;

/// A sector, if it can be read and is known.
type Sector = Option<Vec<u8>>;

fn sectors(image: &Image) -> Vec<Sector> {
    (0..image.size() / SECTOR)
        .map(|number| {
            let mut bytes = vec![0; 512];
            let read = image.read(&mut bytes, number * SECTOR);
            read.ok().map(|()| bytes)
        })
        .collect()
}

/// The disk of each snapshot.
fn snapshots(bytes: &[u8], names: &[String]) -> Vec<Option<Vec<Sector>>> {
    let open = |name: &String| {
        let storage = boxed(MemoryStorage::from_bytes(bytes.to_vec()));
        Image::open_snapshot(storage, OpenOptions::default(), name).ok()
    };
    names
        .iter()
        .map(|name| open(name).as_ref().map(sectors))
        .collect()
}

/// The disk as it must be, sector by sector; `None` where anything goes.
struct Model(Vec<Sector>);

impl Model {
    fn part(&mut self, first: u64, count: u64) -> &mut [Sector] {
        let first = usize::try_from(first).unwrap();
        &mut self.0[first..first + usize::try_from(count).unwrap()]
    }

    fn forget(&mut self, first: u64, count: u64) {
        self.part(first, count).fill(None);
    }

    fn write(&mut self, first: u64, data: &[u8]) {
        let count = u64::try_from(data.len()).unwrap() / SECTOR;
        for (sector, data) in self.part(first, count).iter_mut().zip(data.chunks(512)) {
            *sector = Some(data.to_vec());
        }
    }

    /// Each sector is as it was or zero; from now on it is what it is.
    fn discard(&mut self, first: u64, now: Vec<Sector>, what: &str) {
        let count = u64::try_from(now.len()).unwrap();
        for (sector, now) in self.part(first, count).iter_mut().zip(now) {
            let zero = now.as_deref() == Some(&[0; 512]);
            assert!(sector.is_none() || zero || *sector == now, "{what}");
            *sector = now;
        }
    }
}

/// One change; a refusal leaves its range unknown and ends the run.
fn step(image: &Image, model: &mut Model, random: &mut Random, what: &str) -> Result<(), Error> {
    let size = image.size() / SECTOR;
    let first = random.within(0..size);
    let most = [1, 9, 300][usize::try_from(random.within(0..3)).unwrap()];
    let count = random.within(1..most + 1).min(size - first);
    let (offset, len) = (first * SECTOR, count * SECTOR);
    let answer = match random.within(0..12) {
        0 => image.flush(),
        1 => remove_bitmaps(image),
        2 if image.geometry().version == 3 => {
            add_bitmap_named(image, &format!("n{}", random.next_u64()))
        }
        3 | 4 => image.discard(offset, len).map(|()| {
            let now = (first..first + count).map(|number| {
                let mut bytes = vec![0; 512];
                let read = image.read(&mut bytes, number * SECTOR);
                read.ok().map(|()| bytes)
            });
            model.discard(first, now.collect(), what);
        }),
        5 => image
            .write_zeroes(offset, len)
            .map(|()| model.write(first, &vec![0; usize::try_from(len).unwrap()])),
        _ => {
            let data = fill(random.next_u64(), len);
            image
                .write(&data, offset)
                .map(|()| model.write(first, &data))
        }
    };
    if answer.is_err() {
        model.forget(first, count);
    }
    answer
}

fn remove_bitmaps(image: &Image) -> Result<(), Error> {
    for bitmap in image.bitmaps()? {
        image.update::<_, Error>(|update| update.remove(&bitmap.name))?;
    }
    Ok(())
}

fn add_bitmap_named(image: &Image, name: &str) -> Result<(), Error> {
    image.update(|update| {
        let bits = update.blank(crate::common::granularity(4096))?;
        update.put(name, bits, true)
    })
}

/// What became of one damaged image.
#[derive(Debug, Default)]
struct Tally {
    runs: u64,
    steps: u64,
    refused: u64,
    damaged: u64,
}

fn run(name: &str, healthy: &Tables, seed: u64, tally: &mut Tally) {
    let mut random = Random::stream(seed, 17);
    let mut tables = healthy.clone();
    let damages: Vec<String> = (0..random.within(1..5))
        .map(|_| tables.damage(&mut random))
        .collect();
    let what = format!("{name}, {damages:?}, seed {seed}");
    let Ok(image) = open_bytes(tables.bytes.clone(), reading()) else {
        return;
    };
    let names: Vec<String> = image
        .snapshots()
        .unwrap_or_default()
        .into_iter()
        .map(|snapshot| snapshot.name)
        .collect();
    let mut model = Model(sectors(&image));
    tally.damaged += u64::from(!image.check().unwrap().is_clean());
    let before = snapshots(&tables.bytes, &names);
    let mut storage = CrashStorage::new(tables.bytes);
    tally.runs += 1;
    for _ in 0..3 {
        let Ok(image) = Image::open(boxed(storage.clone()), writing()) else {
            tally.refused += 1;
            break;
        };
        for _ in 0..random.within(1..9) {
            tally.steps += 1;
            if let Err(error) = step(&image, &mut model, &mut random, &what) {
                let typed = matches!(error, Error::Corrupt { .. } | Error::Unsupported { .. });
                assert!(typed, "{what}: {error}");
                tally.refused += 1;
                break;
            }
        }
        let _ = image.close();
        storage = CrashStorage::new(storage.to_bytes());
    }
    let bytes = storage.to_bytes();
    let image = open_bytes(bytes.clone(), reading()).unwrap();
    for (number, (wanted, is)) in model.0.iter().zip(sectors(&image)).enumerate() {
        let same = wanted.is_none() || *wanted == is;
        assert!(same, "{what}: sector {number} is another one");
    }
    for (name, (old, new)) in names
        .iter()
        .zip(before.iter().zip(snapshots(&bytes, &names)))
    {
        let (Some(old), Some(new)) = (old, new) else {
            continue;
        };
        let lost = old.iter().zip(&new).position(|(old, new)| {
            // What could not be read may be anything.
            old.is_some() && old != new
        });
        assert_eq!(lost, None, "{what}: snapshot {name} changed");
    }
}

#[test]
fn no_byte_changes_that_nobody_wrote_to() {
    let cases: u64 = std::env::var("TIDEMARK_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(24);
    let mut tally = Tally::default();
    let mut images: Vec<(String, Tables)> = golden::names()
        .filter(|name| *name != "overlay")
        .map(|name| (name.to_owned(), Tables::new(golden::load(name))))
        .collect();
    if tidemark_fixtures::oracle::available() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.qcow2");
        for opts in [
            &[("cluster_size", "4096"), ("refcount_bits", "2")][..],
            &[("cluster_size", "16384"), ("extended_l2", "on")],
        ] {
            images.push((format!("{opts:?}"), by_qemu(&path, 1 << 20, opts)));
        }
    }
    for (name, tables) in &images {
        for seed in 0..cases {
            run(name, tables, seed, &mut tally);
        }
    }
    println!("{} images: {tally:?}", images.len());
    assert!(tally.damaged > cases * 6 && tally.steps > cases * 50);
    assert!(tally.refused < tally.runs / 2, "most runs go through");
}

#[test]
fn an_undamaged_image_of_qemu_is_written_as_before() {
    require_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    let tables = by_qemu(&path, 1 << 20, &[("cluster_size", "4096")]);
    let length = tables.bytes.len();
    let storage = CrashStorage::new(tables.bytes);
    let image = Image::open(boxed(storage.clone()), writing()).unwrap();
    image.discard(0, 1 << 19).unwrap();
    image.flush().unwrap();
    image.write(&fill(1, 1 << 18), 0).unwrap();
    add_bitmap(&image, "more", 65536);
    image.close().unwrap();
    assert!(
        storage.to_bytes().len() <= length + 8192,
        "freed clusters are used again"
    );
}
