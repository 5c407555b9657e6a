//! Counting, looking up and walking over runs, each against a bit-by-bit model.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[expect(dead_code, reason = "the helpers serve several test files")]
mod common;

use common::{Model, SECTOR, bitmap, bits, index, sectors};
use proptest::prelude::*;

proptest! {
    #[test]
    fn counts_agree_with_the_model(a in bitmap()) {
        let shape = a.shape();
        let model = bits(&a);
        prop_assert_eq!(index(a.count()), model.count_ones());
        prop_assert_eq!(a.is_clean(), model.not_any());
        let dirty: u64 = model
            .iter_ones()
            .map(|bit| {
                let start = u64::try_from(bit).unwrap() * shape.granularity().bytes();
                shape.granularity().bytes().min(shape.disk_bytes() - start)
            })
            .sum();
        prop_assert_eq!(a.dirty_bytes(), dirty);
        prop_assert_eq!(a.dirty_ranges().map(|range| range.end - range.start).sum::<u64>(), dirty);
    }

    #[test]
    fn runs_cover_the_disk_and_alternate(a in bitmap()) {
        let mut at = 0;
        let mut before = None;
        let mut model = Model::new();
        for (range, is_dirty) in a.runs() {
            prop_assert_eq!(range.start, at);
            prop_assert!(range.start < range.end);
            prop_assert_ne!(before, Some(is_dirty));
            (at, before) = (range.end, Some(is_dirty));
            model.resize(index(range.end.div_ceil(SECTOR)), is_dirty);
        }
        prop_assert_eq!(at, a.shape().disk_bytes());
        prop_assert_eq!(model, sectors(&a));
        let dirty: Vec<_> = a.runs().filter(|run| run.1).map(|run| run.0).collect();
        prop_assert_eq!(a.dirty_ranges().collect::<Vec<_>>(), dirty);
    }

    #[test]
    fn next_dirty_is_the_first_run_clipped_to_the_window(
        a in bitmap(),
        from in 0..(8_u64 << 20),
        length in 0..(4_u64 << 20),
    ) {
        let end = from + length;
        let expected = a
            .dirty_ranges()
            .map(|run| run.start.max(from)..run.end.min(end))
            .find(|run| !run.is_empty());
        prop_assert_eq!(a.next_dirty(from, end), expected);
    }

    #[test]
    fn nth_dirty_lists_the_set_bits_in_order(a in bitmap(), n in any::<u32>()) {
        let granule = a.shape().granularity().bytes();
        let n = (a.count() * u64::from(n)) >> 32;
        let bit = bits(&a).iter_ones().nth(index(n));
        let offset = bit.map(|bit| u64::try_from(bit).unwrap() * granule);
        prop_assert_eq!(a.nth_dirty(n), offset);
        prop_assert_eq!(a.nth_dirty(a.count()), None);
    }

    #[test]
    fn test_agrees_with_the_model(a in bitmap()) {
        for (sector, is_dirty) in sectors(&a).iter().by_vals().enumerate() {
            prop_assert_eq!(a.test(u64::try_from(sector).unwrap() * SECTOR), is_dirty);
        }
        prop_assert!(!a.test(a.shape().disk_bytes()) && !a.test(u64::MAX));
    }
}
