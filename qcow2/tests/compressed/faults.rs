//! Every call to the storage fails once while compressed clusters are written.

use std::ops::Range;

use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{CallKind, CrashStorage, Errno, Fault, FaultyStorage};
use tidemark_qcow2::{CompressionType, CreateOptions, Image};

use crate::common::{add_bitmap, assert_covers, built, open_bytes, read_all, reading, writing};
use crate::{noise, text, to_u64, to_usize};

const CLUSTER: usize = 4096;
const SIZE: usize = 1 << 20;

fn base_image(refcount_bits: u32) -> Vec<u8> {
    let options = CreateOptions {
        cluster_bits: 12,
        refcount_bits,
        compression_type: CompressionType::Zstd,
        ..CreateOptions::new(to_u64(SIZE))
    };
    built(&options, |image| {
        image.write_compressed(&text(1, 12 * CLUSTER), 0).unwrap();
        add_bitmap(image, "b", 4096);
    })
}

/// What a guest knows after a session that errors may have cut short.
struct Knowledge {
    /// Content as of the last flush that succeeded.
    flushed: Vec<u8>,
    /// Content if everything was done.
    content: Vec<u8>,
    /// Bytes that were changed since that flush, or by a change that failed.
    open: Vec<Range<usize>>,
    unsure: Vec<Range<usize>>,
    errors: usize,
}

impl Knowledge {
    fn change(
        &mut self,
        at: usize,
        data: &[u8],
        work: impl FnOnce(u64) -> tidemark_qcow2::Result<()>,
    ) {
        let range = at..at + data.len();
        if work(to_u64(at)).is_ok() {
            self.content[range.clone()].copy_from_slice(data);
            self.open.push(range);
        } else {
            self.errors += 1;
            self.unsure.push(range);
        }
    }

    fn flush(&mut self, image: &Image) {
        if image.flush().is_ok() {
            self.flushed.clone_from(&self.content);
            self.open.clear();
        } else {
            self.errors += 1;
        }
    }
}

fn session(storage: FaultyStorage, start: &[u8]) -> Knowledge {
    let mut known = Knowledge {
        flushed: start.to_vec(),
        content: start.to_vec(),
        open: Vec::new(),
        unsure: Vec::new(),
        errors: 0,
    };
    let Ok(image) = Image::open(Box::new(storage), writing()) else {
        known.errors += 1;
        return known;
    };
    let compressed = |known: &mut Knowledge, at: usize, data: Vec<u8>| {
        known.change(at * CLUSTER, &data, |at| image.write_compressed(&data, at));
    };
    compressed(
        &mut known,
        20,
        [text(2, 9 * CLUSTER), noise(3, CLUSTER)].concat(),
    );
    compressed(&mut known, 3, text(4, 2 * CLUSTER));
    known.flush(&image);
    let data = noise(5, 100);
    known.change(7 * CLUSTER + 50, &data, |at| image.write(&data, at));
    let zeros = vec![0; 2 * CLUSTER];
    known.change(20 * CLUSTER, &zeros, |at| {
        image.write_zeroes(at, to_u64(2 * CLUSTER))
    });
    compressed(&mut known, 40, text(6, 5 * CLUSTER));
    known.flush(&image);
    compressed(&mut known, 0, text(7, 4 * CLUSTER));
    known.flush(&image);
    known.errors += usize::from(image.close().is_err());
    known
}

fn check(bytes: Vec<u8>, known: &Knowledge, start: &[u8], what: &str, qemu: bool) {
    let image = open_bytes(bytes.clone(), reading()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let report = image.check().unwrap();
    let harm = (report.check_errors, report.corruptions);
    assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
    let content = read_all(&image);
    let changed = || known.open.iter().chain(&known.unsure);
    for (at, byte) in content.iter().enumerate() {
        let fine = *byte == known.flushed[at] || changed().any(|range| range.contains(&at));
        assert!(fine, "{what}: flushed byte {at:#x} is gone");
    }
    let bits = image.load_bitmap("b").unwrap();
    assert_covers(&bits, start, &content, what);
    if qemu {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fault.qcow2");
        std::fs::write(&path, bytes).unwrap();
        qemu_img::check(&path).assert_at_worst_leaks();
        assert!(qemu_img::convert_to_raw(&path) == content, "{what}");
    }
}

/// Fails every call of `kinds` once; returns the number of runs.
fn sweep(bits: u32, kinds: &'static [CallKind], shape: impl Fn(Fault) -> Fault) -> u64 {
    let base = base_image(bits);
    let start = read_all(&open_bytes(base.clone(), reading()).unwrap());
    let clean = FaultyStorage::new(CrashStorage::new(base.clone()));
    assert_eq!(session(clean.clone(), &start).errors, 0);
    let calls = clean.calls_of(kinds);
    for at in 0..calls {
        let below = CrashStorage::new(base.clone());
        let storage = FaultyStorage::new(below.clone());
        let fault = shape(Fault::once(kinds, at));
        // Giving space back is advice, and a page of a bitmap that finds no space becomes ones.
        let excused = kinds.contains(&CallKind::Discard) || matches!(fault.errno, Errno::NoSpace);
        storage.arm(fault);
        let known = session(storage.clone(), &start);
        let what = format!("call {at} of {kinds:?}");
        let heard = known.errors > 0 || excused || storage.fired() == 0;
        assert!(heard, "{what}: swallowed");
        let qemu = oracle::available() && at % 9 == 0;
        check(below.to_bytes(), &known, &start, &what, qemu);
    }
    calls
}

#[test]
fn every_failed_call_among_compressed_writes_surfaces_and_leaves_a_sound_image() {
    let mut runs = 0;
    for bits in [1, 16] {
        for kinds in [
            &[CallKind::Read][..],
            &[CallKind::Write],
            &[CallKind::Flush],
            &[CallKind::Discard],
            &[CallKind::Len, CallKind::SetLen],
        ] {
            runs += sweep(bits, kinds, |fault| fault);
        }
        let full = |fault: Fault| fault.with_errno(Errno::NoSpace);
        runs += sweep(bits, &[CallKind::Write], full);
        runs += sweep(bits, &[CallKind::Write], |fault| fault.with_short(512));
    }
    println!("{runs} faults");
    assert!(runs >= 140, "the sweep shrank: {runs}");
}

#[test]
fn a_failed_compressed_write_gives_its_room_back() {
    let base = base_image(4);
    let below = CrashStorage::new(base);
    let storage = FaultyStorage::new(below.clone());
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    let before = read_all(&image);
    // The first write marks a region; the others only write data.
    image
        .write_compressed(&text(2, CLUSTER), to_u64(50 * CLUSTER))
        .unwrap();
    image.flush().unwrap();
    for number in 0..5 {
        storage.arm(Fault::once(&[CallKind::Write], 0));
        let data = text(number, 6 * CLUSTER);
        assert!(image.write_compressed(&data, 0).is_err());
        assert_eq!(storage.fired(), 1);
    }
    assert!(read_all(&image)[..6 * CLUSTER] == before[..6 * CLUSTER]);
    image.close().unwrap();
    let report = open_bytes(below.to_bytes(), reading())
        .unwrap()
        .check()
        .unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    assert!(to_usize(report.image_end_offset) <= below.to_bytes().len() + CLUSTER);
}
