//! Slots of a row that hold no token.

use std::ops::Range;

/// The slots of a row that hold no token: sorted, disjoint, not empty ranges. Nothing attends to
/// them, and they take no position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holes(Vec<Range<usize>>);

impl Holes {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Slots in all holes.
    pub fn slots(&self) -> usize {
        self.0.iter().map(ExactSizeIterator::len).sum()
    }

    pub fn ranges(&self) -> &[Range<usize>] {
        &self.0
    }

    /// The slots of a range that hold tokens.
    pub fn tokens(&self, slots: Range<usize>) -> Vec<Range<usize>> {
        let mut start = slots.start;
        let mut runs = Vec::new();
        let end = slots.end..slots.end;
        for hole in self.0.iter().chain([&end]) {
            let run = start..hole.start.min(slots.end);
            if !run.is_empty() {
                runs.push(run);
            }
            start = start.max(hole.end);
        }
        runs
    }

    /// Adds a hole above the others.
    pub fn push(&mut self, hole: Range<usize>) {
        match self.0.last_mut() {
            _ if hole.is_empty() => {}
            Some(last) if last.end == hole.start => last.end = hole.end,
            _ => self.0.push(hole),
        }
    }

    /// Drops what is at or above `len`.
    pub fn clip(&mut self, len: usize) {
        self.0.retain_mut(|hole| {
            hole.end = hole.end.min(len);
            hole.start < hole.end
        });
    }

    /// The slot of the first of the last `tokens` tokens before slot `end`; of the first token where
    /// there are fewer.
    pub fn start_of_last(&self, tokens: usize, end: usize) -> usize {
        let (mut tokens, mut end) = (tokens, end);
        for hole in self.0.iter().rev() {
            let above = end - hole.end.min(end);
            if above >= tokens {
                break;
            }
            if hole.start == 0 {
                return hole.end.min(end);
            }
            tokens -= above;
            end = end.min(hole.start);
        }
        end.saturating_sub(tokens)
    }

    /// The slot after the row's first `tokens` tokens.
    pub fn end_of(&self, tokens: usize) -> usize {
        let mut end = tokens;
        for hole in &self.0 {
            if hole.start >= end {
                break;
            }
            end += hole.len();
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holes(ranges: &[Range<usize>]) -> Holes {
        let mut holes = Holes::default();
        ranges.iter().for_each(|range| holes.push(range.clone()));
        holes
    }

    #[test]
    fn the_end_of_tokens_is_after_the_holes_before_it() {
        let some = holes(&[0..2, 3..4]);
        for (tokens, end) in [(0, 0), (1, 3), (2, 5)] {
            assert_eq!(some.end_of(tokens), end);
        }
        assert_eq!(holes(&[]).end_of(3), 3);
    }

    #[test]
    fn the_start_of_the_last_tokens_is_before_the_holes_among_them() {
        let some = holes(&[0..2, 5..8]);
        for (tokens, end, start) in [
            (1, 10, 9),
            (2, 10, 8),
            (3, 10, 4),
            (5, 10, 2),
            (6, 10, 2),
            (1, 8, 4),
            (1, 7, 4),
            (2, 4, 2),
            (3, 4, 2),
            (1, 2, 2),
        ] {
            assert_eq!(
                some.start_of_last(tokens, end),
                start,
                "{tokens} before {end}"
            );
        }
        assert_eq!(holes(&[]).start_of_last(3, 5), 2);
    }

    #[test]
    fn tokens_are_between_holes() {
        let some = holes(&[0..2, 5..8]);
        for (slots, expected) in [
            (0..10, &[(2, 5), (8, 10)][..]),
            (3..8, &[(3, 5)]),
            (6..9, &[(8, 9)]),
            (5..8, &[]),
        ] {
            let runs = some.tokens(slots).into_iter();
            let runs: Vec<_> = runs.map(|run| (run.start, run.end)).collect();
            assert_eq!(runs, expected);
        }
        assert_eq!(holes(&[]).tokens(1..3).first(), Some(&(1..3)));
    }

    #[test]
    fn holes_merge_and_clip() {
        let mut holes = holes(&[0..2, 2..2, 2..3, 5..8]);
        assert_eq!(holes.ranges(), [0..3, 5..8]);
        holes.clip(6);
        assert_eq!(holes.ranges(), [0..3, 5..6]);
        assert_eq!(holes.slots(), 4);
        holes.clip(5);
        assert_eq!(holes.ranges().len(), 1);
    }
}
