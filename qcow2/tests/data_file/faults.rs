//! Every call to the image and to the data file fails once: the error surfaces, flushed bytes stay.

use tidemark_fixtures::oracle;
use tidemark_fixtures::storage::{CallKind, CrashStorage, Fault, FaultyStorage};
use tidemark_qcow2::{Image, Result};

use crate::common::{add_bitmap, assert_covers, read_all};
use crate::{SHAPES, Shape, assert_qemu_reads, beside, open};

const SIZE: usize = 3 << 20;

/// Bytes of both files of a disk with some data and a bitmap.
fn base(shape: Shape) -> (Vec<u8>, Vec<u8>) {
    let (storage, data) = (CrashStorage::new(Vec::new()), CrashStorage::new(Vec::new()));
    let options = shape.options(u64::try_from(SIZE).unwrap());
    let image = Image::create(Box::new(storage.clone()), &options, beside(data.clone()));
    let image = image.unwrap();
    image.write(&vec![0xaa; 200_000], 10_000).unwrap();
    add_bitmap(&image, "b", 65536);
    image.close().unwrap();
    (storage.to_bytes(), data.to_bytes())
}

/// What a guest knows at the end.
#[derive(Default)]
struct Knowledge {
    /// Every content that was ever asked for, since the last good flush.
    possible: Vec<Vec<u8>>,
    errors: usize,
}

impl Knowledge {
    fn see(&mut self, result: Result<()>, after: &dyn Fn(&mut Vec<u8>)) {
        let mut content = self.possible.last().unwrap().clone();
        after(&mut content);
        self.possible.push(content);
        if result.is_err() {
            self.errors += 1;
            // Old or new, for ever.
            let before = self.possible[self.possible.len() - 2].clone();
            self.possible.push(before);
        }
    }
}

fn session(image: Result<Image>, start: &[u8]) -> Knowledge {
    let mut known = Knowledge {
        possible: vec![start.to_vec()],
        errors: 0,
    };
    let image = match image {
        Ok(image) => image,
        Err(_) => {
            known.errors += 1;
            return known;
        }
    };
    let write = |known: &mut Knowledge, offset: usize, len: usize, byte: u8| {
        let result = image.write(&vec![byte; len], u64::try_from(offset).unwrap());
        known.see(result, &|content| content[offset..offset + len].fill(byte));
    };
    write(&mut known, 12_345, 30_000, 1);
    write(&mut known, 700_000, 5_000, 2);
    let mut flushed = image.flush().is_ok();
    known.errors += usize::from(!flushed);
    if flushed && known.errors == 0 {
        known.possible.drain(..known.possible.len() - 1);
    }
    let zeroed = image.write_zeroes(65_536, 65_536);
    known.see(zeroed, &|content| content[65_536..131_072].fill(0));
    let discarded = image.discard(131_072, 65_536);
    known.see(discarded, &|content| content[131_072..196_608].fill(0));
    write(&mut known, 140_000, 1_000, 3);
    flushed = image.flush().is_ok();
    known.errors += usize::from(!flushed);
    write(&mut known, 2 << 20, 20_000, 4);
    known.errors += usize::from(image.close().is_err());
    known
}

fn sweep(shape: Shape, kinds: &'static [CallKind], outside: bool) -> usize {
    let (image_bytes, data_bytes) = base(shape);
    let start = {
        let image = open(
            CrashStorage::new(image_bytes.clone()),
            CrashStorage::new(data_bytes.clone()),
        );
        read_all(&image.unwrap())
    };
    let mut calls = 0;
    for at in 0.. {
        let below = [
            CrashStorage::new(image_bytes.clone()),
            CrashStorage::new(data_bytes.clone()),
        ];
        let [storage, data] = below.clone().map(FaultyStorage::new);
        let broken = if outside { &data } else { &storage };
        broken.arm(Fault::once(kinds, at));
        let known = session(open(storage.clone(), data.clone()), &start);
        if broken.fired() == 0 {
            break;
        }
        calls += 1;
        let what = format!("{shape:?}, outside {outside}, call {at} of {kinds:?}");
        let excused = kinds.contains(&CallKind::Discard);
        assert!(known.errors > 0 || excused, "{what}: swallowed");
        let [image_after, data_after] = below.map(|storage| storage.to_bytes());
        let data = CrashStorage::new(data_after.clone());
        let image = open(CrashStorage::new(image_after.clone()), data).unwrap();
        let report = image.check().unwrap();
        let harm = (report.check_errors, report.corruptions);
        assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
        let content = read_all(&image);
        for (place, byte) in content.iter().enumerate() {
            let told = known.possible.iter().any(|content| content[place] == *byte);
            assert!(told, "{what}: byte {place:#x} is {byte:#x}");
        }
        assert_covers(&image.load_bitmap("b").unwrap(), &start, &content, &what);
        if shape.raw {
            assert!(data_after == content, "{what}: the file is not the disk");
        }
        if oracle::available() && at % 16 == 3 {
            assert_qemu_reads(&image_after, &data_after, &content, &what);
        }
    }
    calls
}

#[test]
fn every_failed_call_to_either_file_surfaces_and_leaves_a_sound_disk() {
    let mut runs = 0;
    for shape in SHAPES {
        for outside in [false, true] {
            for kinds in [
                &[CallKind::Read][..],
                &[CallKind::Write],
                &[CallKind::WriteZeroes],
                &[CallKind::Discard],
                &[CallKind::Flush],
            ] {
                runs += sweep(shape, kinds, outside);
            }
        }
    }
    println!("{runs} faults");
    assert!(runs >= 100, "the sweep shrank: {runs}");
}
