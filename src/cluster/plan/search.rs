//! The best of all assignments, for a handful of items.
//!
//! Where a cluster has few groups, moving and exchanging ends in a corner from which only several
//! changes at once lead on. Branch and bound looks at everything that could be better.

/// So many branches are looked at, some milliseconds' worth; what was found by then is good too.
const STEPS_MOST: u32 = 1_000_000;

/// For each weight the place of its bin, if the heaviest bin can be lighter than `most`; stops at
/// `goal`. `weights` come largest first; `bins` are what the bins weigh without them.
pub(super) fn assignment(
    weights: &[u64],
    bins: &[u64],
    most: u64,
    goal: u64,
) -> Option<Vec<usize>> {
    let mut search = Search {
        bins: bins.to_vec(),
        chosen: Vec::with_capacity(weights.len()),
        best: None,
        most,
        goal,
        steps: 0,
    };
    search.go(weights);
    search.best
}

struct Search {
    bins: Vec<u64>,
    chosen: Vec<usize>,
    best: Option<Vec<usize>>,
    most: u64,
    goal: u64,
    steps: u32,
}

impl Search {
    fn go(&mut self, weights: &[u64]) {
        self.steps += 1;
        let Some((weight, rest)) = weights.split_first() else {
            let most = self.bins.iter().copied().max().unwrap_or_default();
            if most < self.most {
                self.most = most;
                self.best = Some(self.chosen.clone());
            }
            return;
        };
        // Of bins that weigh the same it does not matter which.
        let mut tried: Vec<u64> = Vec::new();
        for place in 0..self.bins.len() {
            let Some(before) = self.bins.get(place).copied() else { return };
            let after = before.saturating_add(*weight);
            if after >= self.most || tried.contains(&before) {
                continue;
            }
            if self.steps > STEPS_MOST || self.most <= self.goal {
                return;
            }
            tried.push(before);
            self.set(place, after);
            self.chosen.push(place);
            self.go(rest);
            self.chosen.pop();
            self.set(place, before);
        }
    }

    fn set(&mut self, place: usize, weight: u64) {
        if let Some(bin) = self.bins.get_mut(place) {
            *bin = weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_no_exchange_finds_is_found() {
        // 8 + 7 + 5, 10 + 6 + 4: no single item and no pair leads there from 10 + 8, 7 + 6 + 5 + 4.
        let found = assignment(&[10, 8, 7, 6, 5, 4], &[0, 0], 22, 20).unwrap();
        let of = |bin| [10, 8, 7, 6, 5, 4].iter().zip(&found).filter(move |(_, b)| **b == bin);
        assert_eq!(of(0).map(|(w, _)| w).sum::<i32>(), 20);
        assert_eq!(assignment(&[10, 8, 7, 6, 5, 4], &[0, 0], 20, 20), None, "nothing is better");
        assert_eq!(assignment(&[3, 3], &[5, 0], 8, 0), Some(vec![1, 1]), "what cannot move weighs");
    }
}
