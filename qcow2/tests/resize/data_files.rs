//! A disk whose data lies in an external data file grows and shrinks with that file.

use std::sync::Arc;

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{
    CallKind, CrashOptions, CrashStorage, CrashWorld, Errno, Fault, FaultyStorage,
};
use tidemark_qcow2::{
    BackingReference, CreateOptions, DataFileReference, Gate, Image, OpenOptions, Preallocation,
    Shrink, Storage,
};

use crate::common::{add_bitmap, alone, assert_covers, create_file, open_file, read_all};
use crate::common::{reading, writing};

/// Hands out one storage as the data file, whatever its name.
#[derive(Clone, Debug)]
struct Beside<S>(S);

impl<S: Storage + Clone + 'static> Gate for Beside<S> {
    fn open(&self, _: &BackingReference, _: &str) -> Result<Box<dyn Storage>, String> {
        Err("there is no backing file".to_owned())
    }

    fn open_data(
        &self,
        _: &DataFileReference,
        _: &str,
        _: bool,
    ) -> Result<Box<dyn Storage>, String> {
        Ok(Box::new(self.0.clone()))
    }
}

fn beside(data: impl Storage + Clone + 'static) -> OpenOptions {
    OpenOptions::writing(Arc::new(Beside(data)))
}

fn options(cluster_bits: u32, size: u64, name: &str, raw: bool) -> CreateOptions {
    CreateOptions {
        cluster_bits,
        data_file: Some(DataFileReference {
            name: name.as_bytes().to_vec(),
            raw,
        }),
        ..CreateOptions::new(size)
    }
}

/// Image and data file of a disk with a bitmap; behind its end the data file holds other bytes.
fn base(cluster_bits: u32, size: u64, raw: bool) -> Vec<Vec<u8>> {
    let (storage, data) = (CrashStorage::new(Vec::new()), CrashStorage::new(Vec::new()));
    let options = options(cluster_bits, size, "data", raw);
    let image = Image::create(Box::new(storage.clone()), &options, beside(data.clone())).unwrap();
    image.write(&vec![0xaa; 100_000], 10_000).unwrap();
    image.write(&vec![0xbb; 30_000], size - 30_000).unwrap();
    add_bitmap(&image, "b", 4096);
    image.close().unwrap();
    let mut data = data.to_bytes();
    data.extend_from_slice(&[0xee; 50_000]);
    vec![storage.to_bytes(), data]
}

/// The sizes that a disk goes through, and how what it gains is placed.
type Path = [(u64, Preallocation)];

fn walk(image: &Image, path: &Path, mut seen: impl FnMut(&Image)) -> tidemark_qcow2::Result<()> {
    for &(size, mode) in path {
        match mode {
            Preallocation::Off => image.resize(size, Shrink::Allowed)?,
            mode => image.grow(size, mode)?,
        }
        seen(image);
        image.write(&[4; 5000], size - 5000)?;
        image.flush()?;
        seen(image);
    }
    Ok(())
}

const SIZE: u64 = 300_032;
const PATHS: [&Path; 3] = [
    &[(900_096, Preallocation::Off), (200_192, Preallocation::Off)],
    &[
        (700_416, Preallocation::Metadata),
        (900_096, Preallocation::Full),
    ],
    &[
        (100_352, Preallocation::Off),
        (600_064, Preallocation::Falloc),
    ],
];

fn sweep(cluster_bits: u32, raw: bool, path: &Path) -> (usize, usize) {
    let start = base(cluster_bits, SIZE, raw);
    let world = CrashWorld::new(start.clone());
    let image = Image::open(Box::new(world.disk(0)), beside(world.disk(1))).unwrap();
    let first = read_all(&image);
    let mut states = vec![first.clone()];
    walk(&image, path, |image| {
        states.push(read_all(image));
        world.note(u64::try_from(states.len() - 1).unwrap());
    })
    .unwrap();
    image.close().unwrap();
    let log = world.log();
    let mut pairs = 0;
    for crash in log.images(CrashOptions::default()) {
        let what = format!(
            "2^{cluster_bits} raw {raw}, pair {pairs}: {}",
            crash.description
        );
        let [image_bytes, data_bytes] = &crash.disks[..] else {
            panic!("two disks")
        };
        let data = CrashStorage::new(data_bytes.clone());
        let storage = Box::new(CrashStorage::new(image_bytes.clone()));
        let image =
            Image::open(storage, beside(data)).unwrap_or_else(|error| panic!("{what}: {error}"));
        let report = image.check().unwrap();
        let harm = (report.check_errors, report.corruptions);
        assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
        let content = read_all(&image);
        let sure = log.notes_before(crash.position).into_iter().max();
        let possible: Vec<&Vec<u8>> = states
            .iter()
            .skip(usize::try_from(sure.unwrap_or(0)).unwrap())
            .take(3)
            .collect();
        let fits = possible.iter().any(|state| state.len() == content.len())
            && content.iter().enumerate().all(|(at, byte)| {
                let known = possible.iter().filter(|state| state.len() == content.len());
                known.clone().any(|state| state[at] == *byte)
            });
        assert!(fits, "{what}: neither the old disk nor the new one");
        let bits = image.load_bitmap("b").unwrap();
        assert_covers(&bits, &first, &content, &what);
        if raw {
            let disk = data_bytes.get(..content.len());
            assert!(
                disk == Some(&content[..]),
                "{what}: the file is not the disk"
            );
        }
        pairs += 1;
    }
    (log.points(), pairs)
}

#[test]
fn a_crash_of_image_and_data_file_leaves_the_old_disk_or_the_new_one() {
    let (mut points, mut pairs) = (0, 0);
    for raw in [false, true] {
        for cluster_bits in [9, 12, 16] {
            for path in PATHS {
                let found = sweep(cluster_bits, raw, path);
                points += found.0;
                pairs += found.1;
            }
        }
    }
    println!("{points} points, {pairs} pairs of files");
    assert!(
        points >= 150 && pairs >= 700,
        "the sweep shrank: {points}, {pairs}"
    );
}

#[test]
fn every_failed_call_to_either_file_leaves_the_old_disk_or_the_new_one() {
    let mut runs = 0;
    for (raw, cluster_bits) in [(false, 12), (true, 12), (true, 16)] {
        let start = base(cluster_bits, SIZE, raw);
        for (path, outside) in PATHS.iter().flat_map(|path| [(path, false), (path, true)]) {
            for kinds in [
                &[CallKind::Write, CallKind::WriteZeroes][..],
                &[CallKind::Flush],
                &[CallKind::Len, CallKind::SetLen],
            ] {
                for errno in [Errno::Io, Errno::NoSpace] {
                    runs += fail(&start, raw, path, outside, kinds, errno);
                }
            }
        }
    }
    println!("{runs} faults");
    assert!(runs >= 300, "the sweep shrank: {runs}");
}

/// Each of these calls to one of the two files fails once.
fn fail(
    start: &[Vec<u8>],
    raw: bool,
    path: &Path,
    outside: bool,
    kinds: &'static [CallKind],
    errno: Errno,
) -> usize {
    let session = |fault: Option<Fault>| {
        let below = [0, 1].map(|disk: usize| CrashStorage::new(start[disk].clone()));
        let files = below.clone().map(FaultyStorage::new);
        let faulty = files[usize::from(outside)].clone();
        if let Some(fault) = fault {
            faulty.arm(fault);
        }
        let [image, data] = files;
        let answer = Image::open(Box::new(image), beside(data))
            .and_then(|image| walk(&image, path, |_| {}).and_then(|()| image.close()));
        (answer, below, faulty)
    };
    let (answer, _, clean) = session(None);
    answer.unwrap();
    let calls = clean.calls_of(kinds);
    let step = usize::try_from((calls / 12).max(1)).unwrap();
    let mut runs = 0;
    for at in (0..calls).step_by(step) {
        let what = format!("raw {raw}, outside {outside}, call {at} of {kinds:?}");
        let (answer, below, faulty) = session(Some(Fault::once(kinds, at).with_errno(errno)));
        let fine = answer.is_err() || faulty.fired() == 0 || matches!(errno, Errno::NoSpace);
        assert!(fine, "{what}: swallowed");
        let [image, data] = below;
        let data_bytes = data.to_bytes();
        let image = Image::open(Box::new(image), beside(data)).unwrap();
        let report = image.check().unwrap();
        let harm = (report.check_errors, report.corruptions);
        assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
        let known = |size: u64| size == SIZE || path.iter().any(|step| step.0 == size);
        assert!(known(image.size()), "{what}: {}", image.size());
        let content = read_all(&image);
        assert!(!content.contains(&0xee), "{what}: bytes of somebody else");
        if raw {
            assert_eq!(
                data_bytes.get(..content.len()),
                Some(&content[..]),
                "{what}"
            );
        }
        runs += 1;
    }
    runs
}

#[test]
fn qemu_and_we_resize_one_disk_in_turn() {
    tidemark_fixtures::require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for (raw, cluster_bits) in [(false, 9), (false, 16), (true, 12), (true, 16)] {
        let dir = tempfile::tempdir().unwrap();
        let (path, data) = (dir.path().join("disk"), dir.path().join("data"));
        std::fs::write(&data, b"").unwrap();
        let options = options(cluster_bits, SIZE, data.to_str().unwrap(), raw);
        create_file(&path, &options).close().unwrap();
        let mut expected = vec![0; usize::try_from(SIZE).unwrap()];
        for (turn, size) in [900_096, 400_384, 1 << 20, 512, 200_192, 700_416]
            .into_iter()
            .enumerate()
        {
            let byte = u8::try_from(turn + 1).unwrap();
            let image = open_file(&path, writing());
            image.write(&vec![byte; expected.len()], 0).unwrap();
            expected.fill(byte);
            if turn % 3 != 2 {
                image.resize(size, Shrink::Allowed).unwrap();
            }
            image.close().unwrap();
            if turn % 3 == 2 {
                qemu_img::resize(&path, size);
            } else {
                assert_eq!(std::fs::metadata(&data).unwrap().len(), size);
            }
            expected.resize(usize::try_from(size).unwrap(), 0);
            qemu_img::check(&path).assert_clean();
            assert!(qemu_img::convert_to_raw(&path) == expected, "{turn}: QEMU");
            assert!(read_all(&open_file(&path, reading())) == expected, "{turn}");
            if raw {
                let file = std::fs::read(&data).unwrap();
                assert!(file[..expected.len()] == expected, "{turn}: the data file");
            }
            cases += 1;
        }
    }
    println!("{cases} sizes");
    assert!(cases >= 24 && oracle::available());
}

#[test]
fn a_data_file_that_was_not_opened_keeps_the_disk_as_it_is() {
    let start = base(16, SIZE, false);
    let storage = CrashStorage::new(start[0].clone());
    let image = Image::open_unbacked(Box::new(storage.clone()), true).unwrap();
    for size in [100_352, 900_096] {
        let error = image.resize(size, Shrink::Allowed).unwrap_err();
        assert!(error.feature().is_some(), "{error}");
    }
    drop(image);
    assert_eq!(storage.to_bytes(), start[0]);
}
