//! Rounding has a direction: rescaling, page sizes, resizing and the arithmetic of shapes.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(
    clippy::single_range_in_vec_init,
    reason = "lists of one range are meant"
)]

#[expect(dead_code, reason = "the helpers serve several test files")]
mod common;

use common::{bitmap, bits, disk_bytes, index, rounded, sectors};
use proptest::prelude::*;
use tidemark_bitmap::{Bitmap, Error, Granularity, MAX_SERIALIZED_BYTES, Page, Shape};

fn granularity(bytes: u64) -> Granularity {
    Granularity::from_bytes(bytes).unwrap()
}

proptest! {
    #[test]
    fn rescaling_rounds_as_its_name_says(a in bitmap(), to in common::granularity()) {
        let outward = a.rescale_outward(to).unwrap();
        let inward = a.rescale_inward(to).unwrap();
        prop_assert_eq!(sectors(&outward), rounded(&sectors(&a), to, true));
        prop_assert_eq!(sectors(&inward), rounded(&sectors(&a), to, false));
        prop_assert!(outward.contains(&a) && a.contains(&inward));
    }

    #[test]
    fn a_rescale_in_the_wrong_direction_is_refused(a in bitmap(), to in common::granularity()) {
        let from = a.shape().granularity();
        let (outward, inward) = (a.rescale_outward(to).unwrap(), a.rescale_inward(to).unwrap());
        if to < from {
            prop_assert_eq!(a.to_coarser_superset(to), Err(Error::NotCoarser { from, to }));
            prop_assert_eq!(a.to_coarser_subset(to), Err(Error::NotCoarser { from, to }));
        } else {
            prop_assert_eq!(a.to_coarser_superset(to).unwrap(), outward.clone());
            prop_assert_eq!(a.to_coarser_subset(to).unwrap(), inward);
        }
        if to > from {
            prop_assert_eq!(a.to_finer(to), Err(Error::NotFiner { from, to }));
        } else {
            prop_assert_eq!(a.to_finer(to).unwrap(), outward);
        }
    }

    #[test]
    fn finer_and_back_is_the_bitmap_in_both_directions(a in bitmap(), by in 1..7_u8) {
        let from = a.shape().granularity();
        let Some(to) = Granularity::from_bits(from.bits() - by) else { return Ok(()) };
        let fine = a.to_finer(to).unwrap();
        prop_assert_eq!(sectors(&fine), sectors(&a));
        prop_assert_eq!(&fine.to_coarser_superset(from).unwrap(), &a);
        prop_assert_eq!(&fine.to_coarser_subset(from).unwrap(), &a);
    }

    #[test]
    fn a_subset_is_the_complement_of_the_superset_of_the_complement(
        a in bitmap(),
        to in common::granularity(),
    ) {
        let twin = a.complement().rescale_outward(to).unwrap().complement();
        prop_assert_eq!(a.rescale_inward(to).unwrap(), twin);
    }

    #[test]
    fn another_page_size_keeps_every_bit(a in bitmap(), page_bytes in common::page_bytes()) {
        let b = a.with_page_bytes(page_bytes).unwrap();
        prop_assert_eq!(b.shape().page_bytes(), page_bytes);
        prop_assert_eq!(bits(&b), bits(&a));
    }

    #[test]
    fn a_resize_keeps_old_bits_and_fills_the_growth_as_told(
        a in bitmap(),
        disk in disk_bytes(),
        grown_is_dirty in any::<bool>(),
    ) {
        let old = a.shape();
        let b = a.resize(disk, grown_is_dirty).unwrap();
        prop_assert_eq!(b.shape().disk_bytes(), disk);
        let mut expected = bits(&a);
        expected.resize(index(b.shape().bits()), grown_is_dirty);
        let straddles = old.disk_bytes() % old.granularity().bytes() != 0;
        if grown_is_dirty && straddles && disk > old.disk_bytes() {
            let last = index(old.bits()) - 1;
            expected.set(last, true);
        }
        prop_assert_eq!(bits(&b), expected);
    }

    #[test]
    fn a_shape_counts_bits_and_pages_by_the_definition(
        disk in disk_bytes(),
        granularity in common::granularity(),
        page_bytes in common::page_bytes(),
    ) {
        let shape = Shape::new(disk, granularity, page_bytes).unwrap();
        prop_assert_eq!(shape.bits(), disk.div_ceil(granularity.bytes()));
        prop_assert_eq!(shape.serialized_bytes(), shape.bits().div_ceil(8));
        let pages = shape.serialized_bytes().div_ceil(u64::from(page_bytes));
        prop_assert_eq!(shape.pages(), index(pages));
        let mut end = 0;
        for page in 0..shape.pages() {
            let range = shape.page_range(page);
            prop_assert_eq!(range.start, end);
            prop_assert_eq!(shape.page_of(range.start), page);
            prop_assert_eq!(shape.page_of(range.end - 1), page);
            end = range.end;
        }
        prop_assert_eq!(end, disk);
        prop_assert!(shape.page_of(u64::MAX) >= shape.pages());
    }

    #[test]
    fn a_range_rounds_outward_to_granules(
        a in bitmap(),
        at in any::<u32>(),
        length in 0..99_999_u64,
    ) {
        let disk = a.shape().disk_bytes();
        let start = (disk * u64::from(at)) >> 32;
        let range = start..(start + length).min(disk);
        let mut marked = Bitmap::new(a.shape());
        marked.mark(range.clone()).unwrap();
        let rounded = a.shape().round_outward(range.clone()).unwrap();
        prop_assert_eq!(marked.dirty_ranges().next().unwrap_or(0..0), rounded);
    }
}

#[test]
fn a_shape_refuses_bad_pages_and_bitmaps_beyond_512_mib() {
    let g = Granularity::MIN;
    for page_bytes in [0, 8, 256, 513, 65_535, 4 << 20, u32::MAX] {
        assert_eq!(
            Shape::new(1 << 20, g, page_bytes),
            Err(Error::BadPageSize(page_bytes))
        );
    }
    let largest = MAX_SERIALIZED_BYTES * 8 * 512;
    assert_eq!(Shape::new(largest, g, 2 << 20).unwrap().pages(), 256);
    let too_large = Error::TooLarge {
        serialized_bytes: MAX_SERIALIZED_BYTES + 1,
        limit: MAX_SERIALIZED_BYTES,
    };
    assert_eq!(Shape::new(largest + 1, g, 2 << 20), Err(too_large));
    assert!(Shape::new(u64::MAX, Granularity::MAX, 65_536).is_err());
    let vast = Shape::new(1 << 63, Granularity::MAX, 65_536).unwrap();
    assert_eq!(vast.bits(), 1 << 32);
    assert_eq!(Bitmap::all_dirty(vast).dirty_bytes(), 1 << 63);
}

#[test]
fn a_bitmap_too_fine_for_its_disk_is_refused_not_built() {
    let shape = Shape::new(1 << 50, granularity(1 << 20), 65_536).unwrap();
    let bitmap = Bitmap::new(shape);
    assert!(matches!(
        bitmap.to_finer(Granularity::MIN),
        Err(Error::TooLarge { .. })
    ));
    assert!(matches!(
        bitmap.resize(1 << 60, true),
        Err(Error::TooLarge { .. })
    ));
}

#[test]
fn one_dirty_sector_makes_a_dirty_granule_of_2_gib_and_no_covered_one() {
    let fine = Shape::new(5 << 30, Granularity::MIN, 512).unwrap();
    let mut sectors = Bitmap::new(fine);
    sectors.mark((2 << 30)..(2 << 30) + 1).unwrap();
    let outward = sectors.to_coarser_superset(Granularity::MAX).unwrap();
    assert_eq!(
        outward.dirty_ranges().collect::<Vec<_>>(),
        [(2 << 30)..(4 << 30)]
    );
    assert!(
        sectors
            .to_coarser_subset(Granularity::MAX)
            .unwrap()
            .is_clean()
    );

    // Every sector but one, in pages of bits and in pages of ones.
    let but_one = sectors.complement();
    let inward = but_one.to_coarser_subset(Granularity::MAX).unwrap();
    let expected = [0..(2 << 30), (4 << 30)..(5 << 30)];
    assert_eq!(inward.dirty_ranges().collect::<Vec<_>>(), expected);
    let back = outward.to_finer(Granularity::MIN).unwrap();
    assert_eq!(back.dirty_bytes(), 2 << 30);
    assert!(
        back.pages()
            .iter()
            .all(|page| !matches!(page, Page::Bits(_)))
    );
}

#[test]
fn a_partial_last_granule_is_covered_when_the_bytes_up_to_the_disks_end_are() {
    // Three sectors and two bytes: the last granule of 2 KiB has no more than that.
    let disk = 65_536 + 3 * 512 + 2;
    let mut sectors = Bitmap::new(Shape::new(disk, Granularity::MIN, 512).unwrap());
    sectors.mark(65_536..disk).unwrap();
    let inward = sectors.to_coarser_subset(granularity(2048)).unwrap();
    assert_eq!(inward.dirty_ranges().collect::<Vec<_>>(), [65_536..disk]);
    sectors.clear_inward(disk - 1..disk).unwrap();
    assert_eq!(
        sectors.dirty_bytes(),
        3 * 512 + 2,
        "one byte is not the whole last sector"
    );
    sectors.clear_inward(disk - 2..disk).unwrap();
    assert_eq!(sectors.dirty_bytes(), 3 * 512);
    assert!(
        sectors
            .to_coarser_subset(granularity(2048))
            .unwrap()
            .is_clean()
    );
}

#[test]
fn an_untouched_disk_of_16_tib_costs_pages_not_bits() {
    let shape = Shape::new(16 << 40, Granularity::DEFAULT, 65_536).unwrap();
    let mut bitmap = Bitmap::new(shape);
    bitmap.mark((1 << 40)..(1 << 40) + 1).unwrap();
    let held = |bitmap: &Bitmap| {
        bitmap
            .pages()
            .iter()
            .filter(|page| matches!(page, Page::Bits(_)))
            .count()
    };
    assert_eq!((shape.pages(), held(&bitmap)), (512, 1));
    assert_eq!(held(&bitmap.complement()), 1);
    assert_eq!(
        held(&bitmap.to_coarser_superset(granularity(1 << 20)).unwrap()),
        1
    );
    let grown = bitmap.resize(17 << 40, true).unwrap();
    assert_eq!(held(&grown), 1);
    assert_eq!(grown.dirty_bytes(), (1 << 40) + 65_536);
}
