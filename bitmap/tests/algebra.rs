//! The laws of sets of bytes, each against a bit-by-bit model.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(
    clippy::single_range_in_vec_init,
    reason = "lists of one range are meant"
)]

mod common;

use common::{bitmap, bits, one_shape, rounded, sectors, two_shapes};
use proptest::prelude::*;
use tidemark_bitmap::{Bitmap, Error, Granularity, Page, Shape};

fn union(a: &Bitmap, b: &Bitmap) -> Bitmap {
    let mut result = a.clone();
    result.union_outward(b).unwrap();
    result
}

fn difference(a: &Bitmap, b: &Bitmap) -> Bitmap {
    let mut result = a.clone();
    result.subtract_inward(b).unwrap();
    result
}

fn intersection(a: &Bitmap, b: &Bitmap) -> Bitmap {
    let mut result = a.clone();
    result.intersect_outward(b).unwrap();
    result
}

proptest! {
    #[test]
    fn marking_and_clearing_agree_with_a_model_of_bits(
        before in bitmap(),
        start in any::<u32>(),
        length in 0..(3_u64 << 20),
        clears in any::<bool>(),
    ) {
        let shape = before.shape();
        let (disk, granule) = (shape.disk_bytes(), shape.granularity().bytes());
        let start = (disk * u64::from(start)) >> 32;
        let range = start..(start + length).min(disk);
        let mut expected = bits(&before);
        for (bit, mut is_set) in expected.iter_mut().enumerate() {
            let first = u64::try_from(bit).unwrap() * granule;
            let end = (first + granule).min(disk);
            if clears && range.start <= first && end <= range.end {
                *is_set = false;
            }
            if !clears && range.start < end && first < range.end {
                *is_set = true;
            }
        }
        let mut after = before;
        if clears {
            after.clear_inward(range).unwrap();
        } else {
            after.mark(range).unwrap();
        }
        prop_assert_eq!(bits(&after), expected);
    }

    #[test]
    fn union_is_commutative((a, b, _) in one_shape()) {
        prop_assert_eq!(union(&a, &b), union(&b, &a));
        prop_assert_eq!(bits(&union(&a, &b)), bits(&a) | bits(&b));
    }

    #[test]
    fn union_is_associative((a, b, c) in one_shape()) {
        prop_assert_eq!(union(&union(&a, &b), &c), union(&a, &union(&b, &c)));
        prop_assert_eq!(bits(&union(&union(&a, &b), &c)), bits(&a) | bits(&b) | bits(&c));
    }

    #[test]
    fn union_and_intersection_are_idempotent(a in bitmap()) {
        prop_assert_eq!(bits(&union(&a, &a)), bits(&a));
        prop_assert_eq!(bits(&intersection(&a, &a)), bits(&a));
    }

    #[test]
    fn intersection_is_commutative((a, b, _) in one_shape()) {
        prop_assert_eq!(intersection(&a, &b), intersection(&b, &a));
        prop_assert_eq!(bits(&intersection(&a, &b)), bits(&a) & bits(&b));
    }

    #[test]
    fn intersection_is_associative((a, b, c) in one_shape()) {
        let expected = bits(&a) & bits(&b) & bits(&c);
        prop_assert_eq!(bits(&intersection(&intersection(&a, &b), &c)), expected.clone());
        prop_assert_eq!(bits(&intersection(&a, &intersection(&b, &c))), expected);
    }

    #[test]
    fn union_and_intersection_absorb_each_other((a, b, _) in one_shape()) {
        prop_assert_eq!(bits(&union(&a, &intersection(&a, &b))), bits(&a));
        prop_assert_eq!(bits(&intersection(&a, &union(&a, &b))), bits(&a));
    }

    #[test]
    fn union_and_intersection_distribute((a, b, c) in one_shape()) {
        let expected = bits(&a) & (bits(&b) | bits(&c));
        prop_assert_eq!(bits(&intersection(&a, &union(&b, &c))), expected.clone());
        let distributed = union(&intersection(&a, &b), &intersection(&a, &c));
        prop_assert_eq!(bits(&distributed), expected);
    }

    #[test]
    fn de_morgan_holds((a, b, _) in one_shape()) {
        let neither = !(bits(&a) | bits(&b));
        prop_assert_eq!(bits(&union(&a, &b).complement()), neither.clone());
        prop_assert_eq!(bits(&intersection(&a.complement(), &b.complement())), neither);
    }

    #[test]
    fn a_complement_of_a_complement_is_the_bitmap(a in bitmap()) {
        prop_assert_eq!(bits(&a.complement()), !bits(&a));
        prop_assert_eq!(a.complement().complement(), a);
    }

    #[test]
    fn a_difference_is_the_intersection_with_the_complement((a, b, _) in one_shape()) {
        prop_assert_eq!(bits(&difference(&a, &b)), bits(&a) & !bits(&b));
        prop_assert_eq!(difference(&a, &b), intersection(&a, &b.complement()));
        prop_assert!(difference(&a, &a).is_clean());
    }

    #[test]
    fn union_outward_is_the_smallest_superset((a, b) in two_shapes()) {
        let result = union(&a, &b);
        let granularity = a.shape().granularity();
        prop_assert_eq!(sectors(&result), sectors(&a) | rounded(&sectors(&b), granularity, true));
        prop_assert!(result.contains(&a) && result.contains(&b));
    }

    #[test]
    fn subtract_inward_clears_only_what_is_wholly_covered((a, b) in two_shapes()) {
        let result = difference(&a, &b);
        let granularity = a.shape().granularity();
        let covered = rounded(&sectors(&b), granularity, false);
        prop_assert_eq!(sectors(&result), sectors(&a) & !covered);
        prop_assert!(union(&result, &b).contains(&a));
    }

    #[test]
    fn intersect_outward_keeps_every_byte_of_both((a, b) in two_shapes()) {
        let result = intersection(&a, &b);
        let granularity = a.shape().granularity();
        prop_assert_eq!(sectors(&result), sectors(&a) & rounded(&sectors(&b), granularity, true));
        prop_assert!((sectors(&a) & sectors(&b) & !sectors(&result)).not_any());
    }

    #[test]
    fn complements_at_another_granularity_round_as_named(
        a in bitmap(),
        granularity in common::granularity(),
    ) {
        let clean = !sectors(&a);
        let inward = a.complement_inward(granularity).unwrap();
        prop_assert_eq!(sectors(&inward), rounded(&clean, granularity, false));
        let outward = a.complement_outward(granularity).unwrap();
        prop_assert_eq!(sectors(&outward), rounded(&clean, granularity, true));
    }

    #[test]
    fn contains_agrees_with_the_bytes((a, b) in two_shapes()) {
        let is_superset = |a: &Bitmap, b: &Bitmap| (sectors(b) & !sectors(a)).not_any();
        prop_assert_eq!(a.contains(&b), is_superset(&a, &b));
        prop_assert_eq!(b.contains(&a), is_superset(&b, &a));
        prop_assert!(a.contains(&a) && union(&a, &b).contains(&b));
    }

    #[test]
    fn equality_is_equality_of_bits((a, b, _) in one_shape(), page_bytes in common::page_bytes()) {
        prop_assert_eq!(a == b, bits(&a) == bits(&b));
        prop_assert_eq!(&a.with_page_bytes(page_bytes).unwrap(), &a);
        let mut spelled_out = a.clone();
        for (index, page) in a.pages().iter().enumerate() {
            let words = match page {
                Page::Zeros => vec![0; a.shape().words_per_page()].into(),
                Page::Ones => vec![u64::MAX; a.shape().words_per_page()].into(),
                Page::Bits(words) => words.clone(),
            };
            spelled_out.set_page(index, Page::Bits(words));
        }
        prop_assert_eq!(&spelled_out, &a);
        prop_assert_eq!(&a, &spelled_out);
        prop_assert_eq!(spelled_out.is_clean(), a.is_clean());
        prop_assert_eq!(spelled_out.count(), a.count());
        prop_assert!(a.contains(&spelled_out) && spelled_out.contains(&a));
    }
}

fn shape(disk: u64, granularity: u64, page_bytes: u32) -> Shape {
    Shape::new(
        disk,
        Granularity::from_bytes(granularity).unwrap(),
        page_bytes,
    )
    .unwrap()
}

#[test]
fn a_range_outside_the_disk_is_an_error_and_marks_nothing() {
    let mut bitmap = Bitmap::new(shape(10_000, 512, 512));
    #[expect(
        clippy::reversed_empty_ranges,
        reason = "a caller's mistake, on purpose"
    )]
    for range in [9_999..10_001, 10_001..10_001, 0..u64::MAX, 5..4] {
        let error = Error::OutOfRange {
            range: range.clone(),
            disk_bytes: 10_000,
        };
        assert_eq!(bitmap.mark(range.clone()), Err(error.clone()));
        assert_eq!(bitmap.clear_inward(range), Err(error));
    }
    assert!(bitmap.is_clean());
    bitmap.mark(10_000..10_000).unwrap();
    bitmap.mark(77..77).unwrap();
    assert!(bitmap.is_clean());
    bitmap.mark(9_999..10_000).unwrap();
    assert_eq!(bitmap.dirty_ranges().collect::<Vec<_>>(), [9_728..10_000]);
    assert_eq!(bitmap.dirty_bytes(), 272);
}

#[test]
fn the_disks_end_completes_its_last_granule() {
    let mut bitmap = Bitmap::all_dirty(shape(70_000, 65_536, 512));
    bitmap.clear_inward(65_536..69_999).unwrap();
    assert_eq!(bitmap.count(), 2);
    bitmap.clear_inward(65_536..70_000).unwrap();
    assert_eq!(bitmap.dirty_ranges().collect::<Vec<_>>(), [0..65_536]);
    bitmap.clear_inward(0..65_535).unwrap();
    assert_eq!(bitmap.count(), 1);
}

#[test]
fn bitmaps_of_disks_of_different_sizes_are_not_combined() {
    let mut a = Bitmap::new(shape(1 << 20, 512, 512));
    let b = Bitmap::all_dirty(shape((1 << 20) + 1, 512, 512));
    let error = Err(Error::SizesDiffer {
        ours: 1 << 20,
        theirs: (1 << 20) + 1,
    });
    assert_eq!(a.union_outward(&b), error);
    assert_eq!(a.subtract_inward(&b), error);
    assert_eq!(a.intersect_outward(&b), error);
    assert!(a.is_clean() && !b.contains(&a) && a != b);
}

#[test]
fn a_disk_of_no_bytes_has_no_bits() {
    let mut empty = Bitmap::all_dirty(shape(0, 65_536, 65_536));
    assert!(empty.pages().is_empty() && empty.is_clean());
    assert_eq!((empty.count(), empty.dirty_bytes()), (0, 0));
    assert_eq!(empty.runs().count(), 0);
    assert_eq!(empty.next_dirty(0, u64::MAX), None);
    assert_eq!(empty.nth_dirty(0), None);
    assert_eq!(empty.canonical_chunks().count(), 0);
    empty.mark(0..0).unwrap();
    assert!(empty.mark(0..1).is_err());
    let other = Bitmap::new(shape(0, 512, 512));
    empty.union_outward(&other).unwrap();
    assert!(empty.contains(&other) && empty.complement().is_clean());
    assert_eq!(empty.resize(100, true).unwrap().dirty_bytes(), 100);
}

#[test]
fn work_on_several_threads_gives_what_one_thread_gives() {
    // 4 MiB of bits in each: beyond the size at which pages are dealt out to threads.
    let fine = shape(16 << 30, 512, 65_536);
    let coarse = shape(16 << 30, 8192, 4096);
    let fill = |shape: Shape, seed: u64| {
        let mut bitmap = Bitmap::new(shape);
        for page in 0..shape.pages() {
            let words = common::noise(seed + u64::try_from(page).unwrap(), shape.words_per_page());
            bitmap.set_page(page, Page::Bits(words));
        }
        bitmap
    };
    let (a, b, c) = (fill(fine, 1), fill(fine, 1_000), fill(coarse, 9));
    let words = |bitmap: &Bitmap| -> Vec<u64> {
        let bytes = common::serialized(bitmap);
        bytes
            .chunks(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect()
    };
    let zip = |a: &Bitmap, b: &Bitmap, op: fn(u64, u64) -> u64| -> Vec<u64> {
        words(a)
            .into_iter()
            .zip(words(b))
            .map(|(a, b)| op(a, b))
            .collect()
    };
    assert_eq!(words(&union(&a, &b)), zip(&a, &b, |a, b| a | b));
    assert_eq!(words(&difference(&a, &b)), zip(&a, &b, |a, b| a & !b));
    assert_eq!(words(&intersection(&a, &b)), zip(&a, &b, |a, b| a & b));
    assert_eq!(words(&a.complement()), zip(&a, &a, |a, _| !a));
    let spread = c.to_finer(fine.granularity()).unwrap();
    assert_eq!(union(&a, &c), union(&a, &spread));
    assert_eq!(difference(&a, &c), difference(&a, &spread));
    assert!(union(&c, &a).contains(&a) && union(&a, &c).contains(&c));
}
