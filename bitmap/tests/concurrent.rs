//! Marking from many threads at once gives what marking in a row gives.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(
    clippy::single_range_in_vec_init,
    reason = "lists of one range are meant"
)]

#[expect(dead_code, reason = "the helpers serve several test files")]
mod common;

use std::ops::Range;
use std::thread;

use common::{bitmap, serialized};
use proptest::collection::vec;
use proptest::prelude::*;
use tidemark_bitmap::{Bitmap, Error, Granularity, Page, Shape, SharedBitmap};

fn small() -> Shape {
    Shape::new(5_000_000, Granularity::MIN, 512).unwrap()
}

fn range_of(disk: u64, at: u32, length: u64) -> Range<u64> {
    let start = (disk * u64::from(at)) >> 32;
    start..(start + length).min(disk)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn concurrent_marks_equal_sequential_marks(
        before in bitmap(),
        marks in vec((any::<u32>(), 1..300_000_u64), 0..64),
    ) {
        let disk = before.shape().disk_bytes();
        let shared = SharedBitmap::from_bitmap(&before);
        thread::scope(|scope| {
            for worker in 0..4 {
                let (shared, marks) = (&shared, &marks);
                scope.spawn(move || {
                    for (at, length) in marks.iter().skip(worker).step_by(4) {
                        shared.mark(range_of(disk, *at, *length)).unwrap();
                    }
                });
            }
        });
        let mut expected = before;
        for (at, length) in &marks {
            expected.mark(range_of(disk, *at, *length)).unwrap();
        }
        prop_assert_eq!(shared.snapshot(), expected);
    }

    #[test]
    fn a_shared_bitmap_shows_what_it_was_made_from(a in bitmap(), at in any::<u32>()) {
        let shared = SharedBitmap::from_bitmap(&a);
        prop_assert_eq!(shared.loaded_pages().count(), a.pages().len());
        prop_assert!(!shared.bits_marked());
        prop_assert_eq!(&shared.snapshot(), &a);
        let range = range_of(a.shape().disk_bytes(), at, 100_000);
        prop_assert_eq!(shared.test(range.start), a.test(range.start));
        prop_assert_eq!(
            shared.covers(range.clone()),
            range.is_empty() || a.next_dirty(range.start, range.end) == Some(range)
        );
    }

    #[test]
    fn sectors_of_a_page_are_the_serialized_bytes(a in bitmap(), first_word in 0..64_usize) {
        let shared = SharedBitmap::from_bitmap(&a);
        let page_bytes = usize::try_from(a.shape().page_bytes()).unwrap();
        let mut whole = serialized(&a);
        whole.resize(page_bytes * a.pages().len(), 0);
        for (page, expected) in whole.chunks(page_bytes).enumerate() {
            let mut part = vec![0x99; 512 - first_word * 8];
            prop_assert!(shared.copy_page_bytes(page, first_word * 8, &mut part));
            prop_assert_eq!(&part[..], &expected[first_word * 8..512]);
            let mut last = vec![0x99; 512];
            prop_assert!(shared.copy_page_bytes(page, page_bytes - 512, &mut last));
            prop_assert_eq!(&last[..], &expected[page_bytes - 512..]);
        }
    }
}

#[test]
fn threads_that_hammer_the_same_words_lose_no_bit() {
    let shared = SharedBitmap::from_bitmap(&Bitmap::new(small()));
    thread::scope(|scope| {
        for worker in 0..8_u64 {
            let shared = &shared;
            scope.spawn(move || {
                for bit in (worker..small().bits()).step_by(8) {
                    shared.mark(bit * 512..bit * 512 + 1).unwrap();
                }
            });
        }
    });
    assert_eq!(shared.snapshot(), Bitmap::all_dirty(small()));
}

#[test]
fn a_mark_on_a_page_that_is_not_loaded_is_refused_whole() {
    let shared = SharedBitmap::new(small());
    let page = small().bytes_per_page_coverage();
    shared.load_page(0, &Page::Zeros);
    assert_eq!(
        shared.mark(page - 1..page + 1),
        Err(Error::PageNotLoaded(1))
    );
    assert!(!shared.bits_marked() && !shared.test(page - 1));
    assert_eq!(shared.mark(0..0), Ok(()));
    assert_eq!(
        shared.mark(small().disk_bytes()..small().disk_bytes()),
        Ok(())
    );
    assert!(matches!(
        shared.mark(0..5_000_001),
        Err(Error::OutOfRange { .. })
    ));
    assert!(!shared.bits_marked());

    assert_eq!(
        shared.snapshot_page(1).map(|page| page == Page::Zeros),
        None
    );
    assert!(!shared.copy_page_bytes(1, 0, &mut [0; 8]));
    shared.load_page(1, &Page::Zeros);
    shared.mark(page - 1..page + 1).unwrap();
    assert!(shared.bits_marked());
    assert_eq!(shared.loaded_pages().collect::<Vec<_>>(), [0, 1]);
    assert_eq!(
        shared.snapshot().dirty_ranges().collect::<Vec<_>>(),
        [page - 512..page + 512]
    );
}

#[test]
fn a_second_load_adds_bits_and_keeps_marks() {
    let shared = SharedBitmap::new(small());
    let mut words = vec![0; 64].into_boxed_slice();
    words[3] = 0b100;
    shared.load_page(0, &Page::Bits(words));
    shared.mark(0..1).unwrap();
    shared.load_page(0, &Page::Zeros);
    assert!(shared.test(0) && shared.test((3 * 64 + 2) * 512) && !shared.test(512));
    assert_eq!(shared.snapshot().count(), 2);
    shared.load_page(0, &Page::Ones);
    assert_eq!(shared.snapshot_page(0), Some(Page::Ones));
    shared.load_page(0, &Page::Zeros);
    assert!(shared.covers(0..small().bytes_per_page_coverage()));
}

#[test]
fn loads_that_race_with_marks_lose_neither() {
    for round in 0..50 {
        let shared = SharedBitmap::new(small());
        shared.load_page(0, &Page::Zeros);
        let words = common::noise(round, 64);
        thread::scope(|scope| {
            scope.spawn(|| shared.load_page(0, &Page::Bits(words.clone())));
            scope.spawn(|| {
                for bit in 0..2048 {
                    shared.mark(bit * 512..(bit + 1) * 512).unwrap();
                }
            });
        });
        let mut expected = Bitmap::new(small());
        expected.set_page(0, Page::Bits(words));
        expected.mark(0..2048 * 512).unwrap();
        assert_eq!(shared.snapshot(), expected);
    }
}

#[test]
fn bits_past_the_disks_end_are_cut_on_load() {
    let shape = Shape::new(10 * 512, Granularity::MIN, 512).unwrap();
    let shared = SharedBitmap::new(shape);
    let mut words = vec![0; 64].into_boxed_slice();
    words[0] = u64::MAX << 8;
    words[1] = 7;
    shared.load_page(0, &Page::Bits(words));
    assert_eq!(shared.snapshot().count(), 2);
    let mut bytes = [0x44; 16];
    assert!(shared.copy_page_bytes(0, 0, &mut bytes));
    assert_eq!((bytes[1], &bytes[2..]), (0b11, &[0; 14][..]));
    shared.mark(0..8 * 512).unwrap();
    assert_eq!(shared.snapshot_page(0), Some(Page::Ones));
    assert!(!shared.test(10 * 512));
}

#[test]
fn pages_of_zeros_take_no_words_until_they_are_marked() {
    let shape = Shape::new(16 << 40, Granularity::DEFAULT, 65_536).unwrap();
    let shared = SharedBitmap::from_bitmap(&Bitmap::new(shape));
    shared.mark(0..1).unwrap();
    let held = shared
        .snapshot()
        .pages()
        .iter()
        .filter(|page| matches!(page, Page::Bits(_)))
        .count();
    assert_eq!(held, 1);
}
