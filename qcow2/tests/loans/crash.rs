//! A crash while a backup holds the bitmap: at every point the bitmap says at least what was lent and
//! what was written since, until the outcome is durable.

use tidemark_fixtures::storage::{CrashOptions, CrashStorage};
use tidemark_qcow2::BitmapMode;

use super::common::{assert_covers, open_bytes, read_all, writing};
use super::{BEFORE, DURING, bits_of, image, write_all};

const LENT: u64 = 1;
const ENDED: u64 = 2;

#[test]
fn every_crash_during_a_loan_misses_nothing() {
    let (mut points, mut images) = (0, 0);
    for mode in [BitmapMode::OnSuccess, BitmapMode::Always] {
        for success in [true, false] {
            let base = CrashStorage::new(Vec::new());
            image(&base).close().unwrap();
            let storage = CrashStorage::new(base.to_bytes());
            let image = tidemark_qcow2::Image::open(Box::new(storage.clone()), writing()).unwrap();
            let at_loan = read_all(&image);
            let before = bits_of(&image, &BEFORE);
            let loan = image.lend_bitmap("b", mode).unwrap();
            storage.note(LENT);
            write_all(&image, &DURING[..1], 2);
            image.flush().unwrap();
            write_all(&image, &DURING[1..], 3);
            let mut uncopied = before.clone();
            uncopied.clear_inward(0..1 << 20).unwrap();
            match success {
                true => loan.succeed().unwrap(),
                false => loan.fail(&uncopied).unwrap(),
            }
            storage.note(ENDED);
            write_all(&image, &[(2 << 20, 3_000)], 4);
            image.close().unwrap();
            let log = storage.log();
            points += log.points();
            for crash in log.images(CrashOptions::default()) {
                let what = format!("{mode:?}, success {success}, {}", crash.description);
                let found = open_bytes(crash.bytes, writing()).unwrap();
                let bits = found.load_bitmap("b").unwrap();
                assert!(!found.bitmaps().unwrap()[0].in_use, "{what}");
                assert_covers(&bits, &at_loan, &read_all(&found), &what);
                let ended = log.last_note_before(crash.flushed_through) == Some(ENDED);
                let left = match (success, mode, ended) {
                    (false, BitmapMode::OnSuccess, _) => bits.contains(&before),
                    (false, _, true) => bits.contains(&uncopied),
                    // Either it ended, and only what was written since is left, or it did not.
                    _ => {
                        bits.contains(&before) || log.last_note_before(crash.position) >= Some(LENT)
                    }
                };
                assert!(left, "{what}: what was not copied is forgotten");
                images += 1;
            }
        }
    }
    println!("{points} points, {images} images");
    assert!(
        points >= 100 && images >= 280,
        "{points} points, {images} images"
    );
}
