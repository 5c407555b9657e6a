//! Every call to the storage fails once, in every way: the error surfaces, the image stays sound.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{
    add_bitmap, assert_covers, built, granularity, open_bytes, read_all, reading, writing,
};
use tidemark_fixtures::oracle::{self, qemu_img};
use tidemark_fixtures::storage::{CallKind, CrashStorage, Errno, Fault, FaultyStorage};
use tidemark_qcow2::{CreateOptions, Image, Result, proof};

const SIZE: u64 = 12 << 20;

fn base_image(cluster_bits: u32) -> Vec<u8> {
    let options = CreateOptions {
        cluster_bits,
        ..CreateOptions::new(SIZE)
    };
    built(&options, |image| {
        image.write(&vec![0xaa; 200_000], 10_000).unwrap();
        add_bitmap(image, "b", 65536);
    })
}

/// What a guest knows after a session that may have been cut short by errors.
#[derive(Default)]
struct Knowledge {
    /// Content as of the last flush that succeeded.
    flushed: Option<Vec<u8>>,
    /// Content if everything was done.
    content: Vec<u8>,
    /// Bytes that were touched since that flush.
    touched: Vec<std::ops::Range<usize>>,
    /// Bytes of changes that failed: old or new for ever.
    unsure: Vec<std::ops::Range<usize>>,
    errors: usize,
    closed: bool,
}

impl Knowledge {
    fn see<T>(&mut self, result: Result<T>) -> bool {
        self.errors += usize::from(result.is_err());
        result.is_ok()
    }

    fn write(&mut self, image: &Image, offset: usize, len: usize, byte: u8) {
        self.touched.push(offset..offset + len);
        let result = image.write(&vec![byte; len], u64::try_from(offset).unwrap());
        if self.see(result) {
            self.content[offset..offset + len].fill(byte);
        } else {
            self.unsure.push(offset..offset + len);
        }
    }

    fn flush(&mut self, image: &Image) {
        let result = image.flush();
        if self.see(result) {
            self.flushed = Some(self.content.clone());
            self.touched.clear();
        }
    }
}

/// One session; everything that can fail may fail.
fn session(storage: FaultyStorage, start: &[u8]) -> Knowledge {
    let mut known = Knowledge {
        content: start.to_vec(),
        ..Knowledge::default()
    };
    known.flushed = Some(start.to_vec());
    let image = match Image::open(Box::new(storage), writing()) {
        Ok(image) => image,
        Err(_) => {
            known.errors += 1;
            return known;
        }
    };
    known.write(&image, 12_345, 30_000, 1);
    known.write(&image, 5 << 20, 70_000, 2);
    known.flush(&image);
    known.touched.push(100_000..200_000);
    let result = image.write_zeroes(100_000, 100_000);
    if known.see(result) {
        known.content[100_000..200_000].fill(0);
    } else {
        known.unsure.push(100_000..200_000);
    }
    known.write(&image, 13_000, 500, 3);
    let result = image.update(|update| {
        let old = update.load("b")?;
        let mut new = update.blank(granularity(65536))?;
        proof::plant(update.image(), &mut new)?;
        update.put("b", old, false)?;
        update.put("c", new, true)
    });
    known.see(result);
    known.write(&image, 9 << 20, 5_000, 4);
    known.flush(&image);
    let result = image.close();
    known.closed = known.see(result);
    known
}

fn check(bytes: Vec<u8>, known: &Knowledge, start: &[u8], what: &str, qemu: bool) {
    let image = open_bytes(bytes.clone(), reading()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let report = image.check().unwrap();
    assert_eq!(
        (report.check_errors, report.corruptions),
        (0, 0),
        "{what}: {:?}",
        report.findings
    );
    let content = read_all(&image);
    if let Some(flushed) = &known.flushed {
        let open = |at: usize| {
            known
                .touched
                .iter()
                .chain(&known.unsure)
                .any(|r| r.contains(&at))
        };
        for (at, byte) in content.iter().enumerate() {
            assert!(
                *byte == flushed[at] || open(at) || *byte == known.content[at],
                "{what}: flushed byte {at:#x} is gone"
            );
        }
    }
    // Whatever bitmaps there are, together they say everything that changed.
    let mut bits = image
        .load_bitmap("b")
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    if let Ok(newer) = image.load_bitmap("c") {
        bits.union_outward(&newer).unwrap();
    }
    assert_covers(&bits, start, &content, what);
    if qemu {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fault.qcow2");
        std::fs::write(&path, bytes).unwrap();
        qemu_img::check(&path).assert_at_worst_leaks();
        assert!(
            qemu_img::convert_to_raw(&path) == content,
            "{what}: QEMU reads other bytes"
        );
    }
}

/// Fails every call of `kinds` once; returns the number of runs.
fn sweep(cluster_bits: u32, kinds: &'static [CallKind], shape: impl Fn(Fault) -> Fault) -> usize {
    let base = base_image(cluster_bits);
    let start = read_all(&open_bytes(base.clone(), reading()).unwrap());
    let clean = FaultyStorage::new(CrashStorage::new(base.clone()));
    assert_eq!(
        session(clean.clone(), &start).errors,
        0,
        "without a fault nothing fails"
    );
    let calls = clean.calls_of(kinds);
    let qemu = oracle::available();
    for at in 0..calls {
        let below = CrashStorage::new(base.clone());
        let storage = FaultyStorage::new(below.clone());
        storage.arm(shape(Fault::once(kinds, at)));
        let known = session(storage.clone(), &start);
        let what = format!("clusters 2^{cluster_bits}, call {at} of {kinds:?}");
        let fault = shape(Fault::once(kinds, at));
        let excused = tolerated(&fault) || storage.fired() == 0;
        assert!(known.errors > 0 || excused, "{what}: swallowed");
        check(below.to_bytes(), &known, &start, &what, qemu && at % 7 == 0);
    }
    usize::try_from(calls).unwrap()
}

/// Giving space back is advice, and a bitmap page that finds no space becomes all ones: neither is
/// a failure.
fn tolerated(fault: &Fault) -> bool {
    fault.kinds.contains(&CallKind::Discard) || matches!(fault.errno, Errno::NoSpace)
}

#[test]
fn every_failed_call_surfaces_and_leaves_a_sound_image() {
    let mut runs = 0;
    for cluster_bits in [9, 16] {
        for kinds in [
            &[CallKind::Read][..],
            &[CallKind::Write],
            &[CallKind::Flush],
            &[CallKind::Discard],
            &[CallKind::Len, CallKind::SetLen],
        ] {
            runs += sweep(cluster_bits, kinds, |fault| fault);
        }
    }
    println!("{runs} faults");
    assert!(runs >= 100, "the sweep shrank: {runs}");
}

#[test]
fn a_full_disk_at_any_write_leaves_a_sound_image() {
    let runs = sweep(16, &[CallKind::Write], |fault| {
        fault.with_errno(Errno::NoSpace)
    }) + sweep(9, &[CallKind::Write], |fault| {
        fault.with_errno(Errno::NoSpace)
    });
    println!("{runs} faults");
    assert!(runs >= 40, "the sweep shrank: {runs}");
}

#[test]
fn a_short_write_anywhere_leaves_a_sound_image() {
    let runs = sweep(16, &[CallKind::Write], |fault| fault.with_short(512));
    println!("{runs} faults");
    assert!(runs >= 20, "the sweep shrank: {runs}");
}

#[test]
fn a_disk_that_stays_broken_from_any_call_on_leaves_a_sound_image() {
    let base = base_image(16);
    let start = read_all(&open_bytes(base.clone(), reading()).unwrap());
    let clean = FaultyStorage::new(CrashStorage::new(base.clone()));
    session(clean.clone(), &start);
    let calls = clean.calls_of(CallKind::CHANGES);
    for at in 0..calls {
        let below = CrashStorage::new(base.clone());
        let storage = FaultyStorage::new(below.clone());
        storage.arm(Fault::forever(CallKind::CHANGES, at));
        let known = session(storage, &start);
        check(
            below.to_bytes(),
            &known,
            &start,
            &format!("broken from change {at} on"),
            false,
        );
    }
    println!("{calls} faults");
    assert!(calls >= 20, "the sweep shrank: {calls}");
}

#[test]
fn after_a_failed_flush_no_write_is_acknowledged_any_more() {
    let base = base_image(16);
    let storage = FaultyStorage::new(CrashStorage::new(base));
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    image.write(&[1; 100], 0).unwrap();
    storage.arm(Fault::flush_once());
    assert!(image.flush().is_err());
    assert!(image.write(&[2; 100], 0).is_err());
    assert!(image.flush().is_err());
    let mut byte = [0];
    image.read(&mut byte, 0).unwrap();
}
