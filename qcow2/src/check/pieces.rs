//! Ranges that overlap, cut into pieces that do not: what several tables share is read once.

use std::ops::Range;

/// Cuts `ranges` where any of them begins or ends. Each piece comes with the number of ranges that
/// cover it; pieces that none covers are left out.
pub(super) fn pieces(ranges: &[Range<u64>]) -> Vec<(Range<u64>, u64)> {
    let ranges = ranges.iter().filter(|range| !range.is_empty());
    let mut starts: Vec<u64> = ranges.clone().map(|range| range.start).collect();
    let mut ends: Vec<u64> = ranges.map(|range| range.end).collect();
    starts.sort_unstable();
    ends.sort_unstable();
    let mut out = Vec::new();
    let mut starts = starts.into_iter().peekable();
    let (mut from, mut cover) = (0, 0);
    for end in ends {
        while let Some(start) = starts.next_if(|&start| start < end) {
            push(&mut out, from..start, cover);
            (from, cover) = (start, cover + 1);
        }
        push(&mut out, from..end, cover);
        (from, cover) = (end, cover - 1);
    }
    out
}

fn push(out: &mut Vec<(Range<u64>, u64)>, range: Range<u64>, cover: u64) {
    if cover > 0 && !range.is_empty() {
        out.push((range, cover));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "ranges are the data here")]
    fn pieces_cover_what_the_ranges_cover_as_often() {
        assert!(pieces(&[]).is_empty());
        assert!(pieces(&[3..3]).is_empty());
        assert_eq!(pieces(&[2..5]), [(2..5, 1)]);
        assert_eq!(pieces(&[0..4, 2..6]), [(0..2, 1), (2..4, 2), (4..6, 1)]);
        assert_eq!(pieces(&[0..4, 0..4, 8..9]), [(0..4, 2), (8..9, 1)]);
        assert_eq!(pieces(&[4..8, 0..4]), [(0..4, 1), (4..8, 1)]);
        assert_eq!(pieces(&[0..9, 3..5]), [(0..3, 1), (3..5, 2), (5..9, 1)]);
    }
}
