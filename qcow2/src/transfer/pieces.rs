//! A disk cut into pieces that one thread handles at once. Tables are read here, data is not.

use std::ops::Range;

use crate::error::Result;

/// Bytes that one thread reads and writes at once.
pub(super) const PIECE_BYTES: u64 = 1 << 20;
/// Bytes of disk that are mapped at once, at least and at most.
const WINDOW_BYTES: Range<u64> = 128 << 20..64 << 30;
/// Runs in a window below which the next one may be larger.
const FEW_RUNS: usize = 64;

/// What is known of a run of a disk.
pub(super) trait Kind: Copy + PartialEq {
    /// Whether its bytes have to be moved through memory.
    fn moves(self) -> bool;
}

/// A run of a disk, all of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run<K> {
    pub(super) range: Range<u64>,
    pub(super) kind: K,
}

impl<K> Run<K> {
    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Appends a run, joined to the last one where both are of one kind.
pub(super) fn push<K: Kind>(out: &mut Vec<Run<K>>, range: Range<u64>, kind: K) {
    if range.is_empty() {
        return;
    }
    match out.last_mut() {
        Some(last) if last.kind == kind && last.range.end == range.start => {
            last.range.end = range.end;
        }
        _ => out.push(Run { range, kind }),
    }
}

/// Runs that are moved grow to whole blocks of `block` bytes, up to `end`; the others give way.
pub(super) fn whole_blocks<K: Kind>(runs: Vec<Run<K>>, block: u64, end: u64) -> Vec<Run<K>> {
    let mut out: Vec<Run<K>> = Vec::with_capacity(runs.len());
    let mut at = runs.first().map_or(0, |run| run.range.start);
    for run in runs {
        if !run.kind.moves() {
            push(&mut out, run.range.start.max(at)..run.range.end, run.kind);
            at = at.max(run.range.end);
            continue;
        }
        let start = run.range.start / block * block;
        let stop = run.range.end.next_multiple_of(block).min(end);
        while let Some(last) = out.last_mut()
            && !last.kind.moves()
            && last.range.end > start
        {
            at = last.range.start.max(start);
            last.range.end = at;
            if last.range.is_empty() {
                out.pop();
            }
        }
        push(&mut out, start.max(at)..stop, run.kind);
        at = at.max(stop);
    }
    out
}

/// The pieces of a disk in order; `survey` says what is known of a window.
pub(super) struct Pieces<K, S> {
    survey: S,
    at: u64,
    end: u64,
    window: u64,
    piece: u64,
    /// Runs of the present window, the next one last.
    waiting: Vec<Run<K>>,
}

impl<K: Kind, S: FnMut(Range<u64>) -> Result<Vec<Run<K>>>> Pieces<K, S> {
    /// Pieces of `range`, those that are moved cut at multiples of `piece` bytes.
    pub(super) fn new(range: Range<u64>, piece: u64, survey: S) -> Self {
        Self {
            survey,
            at: range.start,
            end: range.end,
            window: WINDOW_BYTES.start,
            piece,
            waiting: Vec::new(),
        }
    }

    fn fill(&mut self) -> Result<()> {
        while self.waiting.is_empty() && self.at < self.end {
            let next = (self.at / self.window + 1) * self.window;
            let window = self.at..next.min(self.end);
            self.at = window.end;
            self.waiting = (self.survey)(window)?;
            if self.waiting.len() <= FEW_RUNS && next.is_multiple_of(2 * self.window) {
                self.window = (2 * self.window).min(WINDOW_BYTES.end);
            } else if self.waiting.len() > FEW_RUNS {
                self.window = WINDOW_BYTES.start;
            }
            self.waiting.reverse();
        }
        Ok(())
    }
}

impl<K: Kind, S: FnMut(Range<u64>) -> Result<Vec<Run<K>>>> Iterator for Pieces<K, S> {
    type Item = Result<Run<K>>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Err(error) = self.fill() {
            self.at = self.end;
            return Some(Err(error));
        }
        let run = self.waiting.last_mut()?;
        let border = (run.range.start / self.piece + 1) * self.piece;
        if !run.kind.moves() || run.range.end <= border {
            return self.waiting.pop().map(Ok);
        }
        let range = run.range.start..border;
        run.range.start = border;
        let kind = run.kind;
        Some(Ok(Run { range, kind }))
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, Pieces, Run, whole_blocks};

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Test {
        Zeros,
        Data,
    }

    impl Kind for Test {
        fn moves(self) -> bool {
            self == Self::Data
        }
    }

    fn run(start: u64, end: u64, kind: Test) -> Run<Test> {
        Run {
            range: start..end,
            kind,
        }
    }

    #[test]
    fn data_grows_to_whole_blocks_and_zeros_give_way() {
        use Test::{Data, Zeros};
        let runs = vec![
            run(0, 10, Zeros),
            run(10, 20, Data),
            run(20, 130, Zeros),
            run(130, 131, Data),
            run(131, 140, Zeros),
            run(140, 150, Data),
            run(150, 410, Zeros),
            run(410, 430, Data),
        ];
        let grown = whole_blocks(runs, 100, 430);
        assert_eq!(
            grown,
            [run(0, 200, Data), run(200, 400, Zeros), run(400, 430, Data)]
        );
    }

    #[test]
    fn pieces_cover_the_range_once_and_in_order() {
        let end = (3 << 30) + 12_345;
        let pieces = Pieces::new(100..end, 1 << 20, |window| {
            let middle = window.start + (window.end - window.start) / 3;
            Ok(vec![
                run(window.start, middle, Test::Zeros),
                run(middle, window.end, Test::Data),
            ])
        });
        let mut at = 100;
        for piece in pieces {
            let piece = piece.unwrap();
            assert_eq!(piece.range.start, at);
            assert!(piece.kind == Test::Zeros || piece.len() <= 1 << 20);
            at = piece.range.end;
        }
        assert_eq!(at, end);
    }
}
