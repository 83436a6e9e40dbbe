//! Which of a pass's positions each layer computes: those that somebody reads.

use super::{KvLayout, KvPart, PerPart};

/// Tokens beyond its window that a sliding layer still has at any time: how many can be taken back.
pub(crate) const HISTORY: usize = 32;

/// The last positions of a pass that one layer computes something of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Positions whose keys, and whose values, it stores.
    pub stored: PerPart<usize>,
    /// Positions it attends from, and whose hidden states the layer above gets.
    pub queries: usize,
}

impl Reach {
    /// Positions whose hidden states it reads.
    pub fn input(&self) -> usize {
        let stored = self.stored.iter().copied().max();
        self.queries.max(stored.unwrap_or(0))
    }

    /// That of every layer in a pass over `seq` positions, of which the head gets the last `wanted`.
    /// A layer with a window stores no more than it and later passes will read.
    pub fn of_layers(
        layout: &KvLayout,
        window: impl Fn(usize) -> Option<usize>,
        seq: usize,
        wanted: usize,
    ) -> Vec<Self> {
        let later = |layer: usize, part: KvPart| match (layout.stores(part, layer), window(layer)) {
            (false, _) => 0,
            (true, None) => seq,
            (true, Some(window)) => seq.min(window - 1 + HISTORY),
        };
        let mut reach: Vec<Self> = (0..layout.n_layers())
            .map(|layer| Self {
                stored: PerPart::new(|part| later(layer, part)),
                queries: 0,
            })
            .collect();
        let mut above = wanted;
        for layer in (0..layout.n_layers()).rev() {
            reach[layer].queries = above;
            let read = match (above, window(layer)) {
                (0, _) => 0,
                (_, None) => seq,
                (above, Some(window)) => seq.min(above - 1 + window),
            };
            for part in KvPart::BOTH {
                for &source in layout.sources(part, layer) {
                    let stored = &mut reach[source].stored[part];
                    *stored = read.max(*stored);
                }
                if let Some(lower) = layout.layer(layer).part(part).residual() {
                    let own = reach[layer].stored[part];
                    let stored = &mut reach[lower].stored[part];
                    *stored = own.max(*stored);
                }
            }
            above = reach[layer].input();
        }
        reach
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::KvPlan;

    fn inputs(plan: KvPlan, windows: &[Option<usize>], seq: usize, wanted: usize) -> Vec<usize> {
        let kinds: Vec<_> = windows.iter().map(|window| window.unwrap_or(0)).collect();
        let layout = plan.resolve_kinds(&kinds).unwrap();
        let reach = Reach::of_layers(&layout, |layer| windows[layer], seq, wanted);
        reach.iter().map(Reach::input).collect()
    }

    #[test]
    fn above_the_last_store_only_what_is_wanted_is_computed() {
        let plan = KvPlan::Yoco { storage_layers: 2 };
        assert_eq!(inputs(plan.clone(), &[None; 4], 9, 1), [9, 9, 1, 1]);
        assert_eq!(inputs(plan.clone(), &[None; 4], 9, 0), [9, 9, 0, 0]);
        assert_eq!(inputs(plan, &[None; 4], 9, 9), [9; 4]);
        assert_eq!(inputs(KvPlan::Standard, &[None; 3], 9, 1), [9; 3]);
    }

    #[test]
    fn a_window_reaches_back_by_itself_and_its_history() {
        let kept = 4 - 1 + HISTORY;
        let windows = [None, Some(4), Some(4)];
        // The lower window's queries are those whose keys the upper one keeps.
        assert_eq!(
            inputs(KvPlan::Standard, &windows, 900, 1),
            [900, kept + 3, kept]
        );
        assert_eq!(inputs(KvPlan::Standard, &windows, 30, 1), [30; 3]);
    }
}
