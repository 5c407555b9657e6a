//! A bitmap while a backup holds it: busy, with a successor, and the outcomes that QEMU has.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod crash;
mod qemu;

use common::{add_bitmap, granularity, open_bytes, writing};
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{
    Bitmap, BitmapMode, CreateOptions, Error, Image, Mistake, OpenOptions, Shrink,
};

const SIZE: u64 = 4 << 20;
const GRANULE: u64 = 4096;

/// What is written before the loan, and during it.
const BEFORE: [(u64, usize); 2] = [(0, 10_000), (1 << 20, 100_000)];
const DURING: [(u64, usize); 2] = [(8_000, 10_000), (3 << 20, 5_000)];

fn bits_of(image: &Image, ranges: &[(u64, usize)]) -> Bitmap {
    let mut bits = image.load_bitmap("b").unwrap();
    bits.clear_all();
    for &(offset, len) in ranges {
        bits.mark(offset..offset + u64::try_from(len).unwrap())
            .unwrap();
    }
    bits
}

fn write_all(image: &Image, ranges: &[(u64, usize)], value: u8) {
    for &(offset, len) in ranges {
        image.write(&vec![value; len], offset).unwrap();
    }
}

fn image(storage: &CrashStorage) -> Image {
    let image = Image::create(
        Box::new(storage.clone()),
        &CreateOptions::new(SIZE),
        writing(),
    )
    .unwrap();
    add_bitmap(&image, "b", GRANULE);
    write_all(&image, &BEFORE, 1);
    image
}

/// The outcome of a loan in words of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Success,
    Failure,
    Dropped,
}

const MODES: [BitmapMode; 3] = [BitmapMode::OnSuccess, BitmapMode::Never, BitmapMode::Always];
const ENDS: [End; 3] = [End::Success, End::Failure, End::Dropped];

/// What is left in the bitmap, by the table of the document.
fn expected(
    mode: BitmapMode,
    end: End,
    lent: &Bitmap,
    since: &Bitmap,
    uncopied: &Bitmap,
) -> Bitmap {
    let mut expected = since.clone();
    let besides = match (mode, end) {
        (BitmapMode::OnSuccess | BitmapMode::Always, End::Success) => return expected,
        (BitmapMode::Always, End::Failure) => uncopied,
        _ => lent,
    };
    expected.union_outward(besides).unwrap();
    expected
}

#[test]
fn every_mode_and_end_leaves_what_the_table_says() {
    let mut cases = 0;
    for mode in MODES {
        for end in ENDS {
            for recording in [true, false] {
                let storage = CrashStorage::new(Vec::new());
                let image = image(&storage);
                if !recording {
                    image
                        .update(|update| update.set_recording("b", false))
                        .unwrap();
                }
                let before = bits_of(&image, &BEFORE);
                let loan = image.lend_bitmap("b", mode).unwrap();
                assert!(*loan.bits() == before);
                write_all(&image, &DURING[..1], 2);
                image.flush().unwrap();
                write_all(&image, &DURING[1..], 3);
                image.write_zeroes(2 << 20, 65536).unwrap();
                let during = [&DURING[..], &[(2 << 20, 65536)]].concat();
                let since = bits_of(&image, if recording { &during } else { &[] });
                let mut uncopied = before.clone();
                uncopied.clear_inward(0..1 << 20).unwrap();
                assert!(
                    image.load_bitmap("b").unwrap().contains(&before),
                    "used up too early"
                );
                match end {
                    End::Success => loan.succeed().unwrap(),
                    End::Failure => loan.fail(&uncopied).unwrap(),
                    End::Dropped => drop(loan),
                }
                let what = format!("{mode:?}, {end:?}, recording {recording}");
                let wanted = expected(mode, end, &before, &since, &uncopied);
                assert!(image.load_bitmap("b").unwrap() == wanted, "{what}");
                assert_eq!(image.bitmaps().unwrap()[0].auto, recording, "{what}");
                // It records again as before, and is busy no longer.
                write_all(&image, &[(3_500_000, 10)], 4);
                image.close().unwrap();
                let again = open_bytes(storage.to_bytes(), writing()).unwrap();
                let found = again.load_bitmap("b").unwrap();
                assert_eq!(found.test(3_500_000), recording, "{what}");
                assert!(found.contains(&wanted), "{what}: after closing");
                again.lend_bitmap("b", mode).unwrap().succeed().unwrap();
                cases += 1;
            }
        }
    }
    println!("{cases} loans");
    assert_eq!(cases, 18);
}

/// Every refusal comes before the first write, and the loan goes on.
#[test]
fn a_busy_bitmap_is_left_alone_by_everybody() {
    let storage = CrashStorage::new(Vec::new());
    let image = image(&storage);
    add_bitmap(&image, "other", GRANULE);
    let loan = image.lend_bitmap("b", BitmapMode::OnSuccess).unwrap();
    let before = storage.to_bytes();
    let is_busy =
        |error: Error| matches!(error.mistake(), Some(Mistake::BitmapBusy(name)) if name == "b");
    assert!(is_busy(
        image.lend_bitmap("b", BitmapMode::Never).unwrap_err()
    ));
    assert!(is_busy(
        image.update(|update| update.remove("b")).unwrap_err()
    ));
    assert!(is_busy(
        image
            .update(|update| update.set_recording("b", false))
            .unwrap_err()
    ));
    let clear = image.update(|update| {
        let bits = update.blank(granularity(GRANULE))?;
        update.put("b", bits, true)
    });
    assert!(is_busy(clear.unwrap_err()));
    assert!(is_busy(
        image.resize(SIZE * 2, Shrink::Refused).unwrap_err()
    ));
    assert!(storage.to_bytes() == before, "a refusal wrote something");
    // Reading it is nobody's harm; others are free.
    image.load_bitmap("b").unwrap();
    image.update(|update| update.remove("other")).unwrap();
    write_all(&image, &DURING, 2);
    loan.succeed().unwrap();
    assert!(image.load_bitmap("b").unwrap() == bits_of(&image, &DURING));
    image.resize(SIZE * 2, Shrink::Refused).unwrap();
    println!("5 refusals");
}

#[test]
fn what_cannot_be_lent_is_refused() {
    let storage = CrashStorage::new(Vec::new());
    let image = image(&storage);
    let missing = image.lend_bitmap("none", BitmapMode::Never).unwrap_err();
    assert!(matches!(missing.mistake(), Some(Mistake::NoSuchBitmap(_))));
    image.close().unwrap();
    let reader = open_bytes(storage.to_bytes(), OpenOptions::default()).unwrap();
    assert!(reader.lend_bitmap("b", BitmapMode::Never).is_err());
}

/// Writers go on while it is lent and given back: each write is in what was lent or in what is left.
#[test]
fn no_write_falls_between_loan_and_successor() {
    const ROUNDS: u64 = 20;
    let storage = CrashStorage::new(Vec::new());
    let image = image(&storage);
    image
        .update::<_, Error>(|update| {
            let bits = update.blank(granularity(GRANULE))?;
            update.put("b", bits, true)
        })
        .unwrap();
    let granules = SIZE / GRANULE;
    let writer = |image: &Image, lane: u64| {
        for step in 0..granules / 4 {
            let granule = (step * 4 + lane) * 7919 % granules;
            image.write(&[1; 512], granule * GRANULE).unwrap();
            if step % 64 == 0 {
                image.flush().unwrap();
            }
        }
    };
    let mut seen = image.load_bitmap("b").unwrap();
    std::thread::scope(|scope| {
        let image = &image;
        for lane in 0..4 {
            scope.spawn(move || writer(image, lane));
        }
        for _ in 0..ROUNDS {
            let loan = image.lend_bitmap("b", BitmapMode::OnSuccess).unwrap();
            seen.union_outward(loan.bits()).unwrap();
            loan.succeed().unwrap();
        }
    });
    seen.union_outward(&image.load_bitmap("b").unwrap())
        .unwrap();
    assert_eq!(seen.count(), granules, "a write was in neither");
    println!("{granules} writes, {ROUNDS} loans");
}
