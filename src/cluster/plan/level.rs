//! Several parts that are even each by itself, made even in sum as well.
//!
//! Of 32 groups on 3 nodes one node has 10 and the others 11; with many co-location groups it must
//! not be the same node each time. A node that has more in sum has more of some part, and giving
//! one of those away leaves that part as even as it was.

use std::collections::{BTreeMap, BTreeSet};

use super::even::Even;

/// Moves single items between bins whose sums are out of bounds. `most` and `least` are the sums
/// from before; they are never exceeded but by what cannot be divided.
pub(super) fn level(parts: &mut [Even], threshold: f64, most: u64, least: u64) {
    let mut sums: BTreeMap<usize, u64> = BTreeMap::new();
    for (node, weight) in parts.iter().flat_map(Even::weights) {
        *sums.entry(node).or_default() += weight;
    }
    let mean = sums.values().sum::<u64>() as f64 / sums.len().max(1) as f64;
    let high = ((mean * (1.0 + threshold)) as u64).min(most).max(mean.ceil() as u64);
    let low = ((mean * (1.0 - threshold)).ceil() as u64).max(least).min(mean as u64);
    let mut order: BTreeSet<(u64, usize)> = sums.iter().map(|(n, sum)| (*sum, *n)).collect();
    while let (Some((bottom, light)), Some((top, heavy))) =
        (order.first().copied(), order.last().copied())
    {
        let out = top > high || bottom < low;
        if !out || top < bottom + 2 || !parts.iter_mut().any(|part| part.give(heavy, light)) {
            return;
        }
        order.remove(&(top, heavy));
        order.remove(&(bottom, light));
        order.insert((top - 1, heavy));
        order.insert((bottom + 1, light));
    }
}
