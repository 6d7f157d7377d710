//! Evening weights between bins, with few bytes moved.
//!
//! 1. What must leave its node is placed, largest first, where there is least.
//! 2. While the heaviest bin is above the mean by more than the threshold, or the lightest below
//!    it, one item goes from the one to the other: the largest that overshoots neither, else the
//!    smallest that still makes the pair more even. Items that are away from home already go first,
//!    as they move anyway.
//! 3. Where no single item helps, two are exchanged, and then, where there are few, all items of a
//!    pair of bins are divided anew, by all sums of either half of them.
//! 4. Where there are few items in all, every assignment is looked at (`search`).
//! 5. What was moved and is not needed for the balance goes home.
//!
//! Every step makes the sum of squares smaller, so the heaviest never becomes heavier nor the
//! lightest lighter, and it ends. A step that gains less than a 2000th of the mean is not taken.
//!
//! Best balance is bin packing, and fewest bytes a knapsack: what is here is within 2 % of the best
//! on clusters of the kinds that the tests generate, not always the best.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::search;

/// Below this a threshold gains nothing that a disk would notice.
const THRESHOLD_LEAST: f64 = 0.001;

/// A step gains at least the mean by this.
const GRAIN: f64 = 2000.0;

/// With how many bins an exchange is tried, and a new division.
const EXCHANGES: usize = 64;
const DIVISIONS: usize = 16;

/// All divisions of so many items are tried: 2^10 sums of either half.
const DIVIDED_MOST: usize = 20;

/// Of so many items and bins, every assignment is looked at, unless this is as near to the bound.
const SEARCHED_MOST: usize = 16;
const SEARCHED_BINS: usize = 8;
const NEAR: f64 = 1.005;

/// Passes over bins with which nothing could be done, as their partners have changed since.
const PASSES: usize = 4;

/// A group as a weight. Ordered by weight, then so that of equals the one of fewest bytes is last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Item {
    weight: u64,
    bytes: Reverse<u64>,
    group: Reverse<usize>,
    home: usize,
}

impl Item {
    pub(super) fn new(group: usize, home: usize, weight: u64, bytes: u64) -> Item {
        Item { weight, bytes: Reverse(bytes), group: Reverse(group), home }
    }

    pub(super) fn group(&self) -> usize {
        self.group.0
    }

    /// Weight a byte, comparable as a whole number.
    fn yield_of_bytes(&self) -> u128 {
        (u128::from(self.weight) << 64) / (u128::from(self.bytes.0) + 1)
    }

    fn least_of(weight: u64) -> Item {
        Item::new(usize::MAX, 0, weight, u64::MAX)
    }

    fn greatest_of(weight: u64) -> Item {
        Item { home: usize::MAX, ..Item::new(0, 0, weight, 0) }
    }
}

/// A node: what it weighs, and which items may leave it.
#[derive(Debug, Default)]
struct Bin {
    weight: u64,
    home: BTreeSet<Item>,
    away: BTreeSet<Item>,
    /// Those at home by what a byte of them weighs, where that differs.
    by_yield: BTreeSet<(u128, Item)>,
}

impl Bin {
    fn key(&self, node: usize) -> (u64, usize) {
        (self.weight, node)
    }

    fn items(&self) -> Vec<Item> {
        let mut items: Vec<Item> = self.home.iter().chain(&self.away).copied().collect();
        items.sort();
        items
    }

    /// The largest that weighs between the two.
    fn largest(&self, least: u64, most: u64) -> Option<Item> {
        if least > most {
            return None;
        }
        let range = || Item::least_of(least)..=Item::greatest_of(most);
        let cheap = || {
            let fits = |(_, item): &&(u128, Item)| (least..=most).contains(&item.weight);
            self.by_yield.iter().rev().take(EXCHANGES).find(fits).map(|(_, item)| *item)
        };
        let away = self.away.range(range()).next_back().copied();
        away.or_else(cheap).or_else(|| self.home.range(range()).next_back().copied())
    }

    /// The smallest that weighs between the two.
    fn smallest(&self, least: u64, most: u64) -> Option<Item> {
        if least > most {
            return None;
        }
        let range = || Item::least_of(least)..=Item::greatest_of(most);
        let found = [self.away.range(range()).next(), self.home.range(range()).next()];
        found.into_iter().flatten().min_by_key(|item| item.weight).copied()
    }
}

/// The question and, once settled, its answer.
#[derive(Debug)]
pub(super) struct Even {
    bins: BTreeMap<usize, Bin>,
    /// All bins, lightest first.
    order: BTreeSet<(u64, usize)>,
    homeless: Vec<Item>,
    threshold: f64,
    by_yield: bool,
    low: u64,
    high: u64,
    grain: u64,
}

impl Even {
    /// Bins for these nodes. `by_yield`: weights are not proportional to bytes, so look for what
    /// weighs most a byte.
    pub(super) fn new(nodes: impl Iterator<Item = usize>, threshold: f64, by_yield: bool) -> Even {
        Even {
            bins: nodes.map(|node| (node, Bin::default())).collect(),
            order: BTreeSet::new(),
            homeless: Vec::new(),
            threshold: threshold.max(THRESHOLD_LEAST),
            by_yield,
            low: 0,
            high: u64::MAX,
            grain: 1,
        }
    }

    /// Adds an item where it is now. One that may not move only weighs.
    pub(super) fn add(&mut self, item: Item, may_move: bool) {
        match self.bins.get_mut(&item.home) {
            Some(bin) => {
                bin.weight = bin.weight.saturating_add(item.weight);
                if may_move {
                    bin.home.insert(item);
                    if self.by_yield {
                        bin.by_yield.insert((item.yield_of_bytes(), item));
                    }
                }
            }
            None if may_move => self.homeless.push(item),
            None => {}
        }
    }

    /// Finds the answer.
    pub(super) fn settle(&mut self) {
        self.order = self.bins.iter().map(|(node, bin)| bin.key(*node)).collect();
        self.place();
        self.bounds();
        for _ in 0..PASSES {
            if !self.pass() {
                break;
            }
        }
        self.search();
        self.send_home();
    }

    /// One item of those of `from`, if that is the heavier; the items weigh the same.
    pub(super) fn give(&mut self, from: usize, to: usize) -> bool {
        let gains = self.weight(from) > self.weight(to) && self.bins.contains_key(&to);
        let item = self.bins.get(&from).filter(|_| gains).and_then(|bin| bin.largest(1, u64::MAX));
        if let Some(item) = item {
            self.carry(item, from, to);
        }
        item.is_some()
    }

    /// Items that are not where they were, each with its node.
    pub(super) fn moved(&self) -> impl Iterator<Item = (Item, usize)> {
        self.bins.iter().flat_map(|(node, bin)| bin.away.iter().map(move |item| (*item, *node)))
    }

    /// What each node weighs now.
    pub(super) fn weights(&self) -> impl Iterator<Item = (usize, u64)> {
        self.bins.iter().map(|(node, bin)| (*node, bin.weight))
    }

    fn place(&mut self) {
        let mut homeless = std::mem::take(&mut self.homeless);
        homeless.sort_by_key(|item| (Reverse(item.weight), item.bytes, Reverse(item.group)));
        for item in homeless {
            if let Some((_, node)) = self.order.first().copied() {
                self.put(item, node);
            }
        }
    }

    fn bounds(&mut self) {
        let sum: f64 = self.bins.values().map(|bin| bin.weight as f64).sum();
        let mean = sum / self.bins.len().max(1) as f64;
        // What cannot be divided further is even: 3 and 4 of 7.
        self.high = ((mean * (1.0 + self.threshold)) as u64).max(mean.ceil() as u64);
        self.low = ((mean * (1.0 - self.threshold)).ceil() as u64).min(mean as u64);
        self.grain = ((mean / GRAIN) as u64).max(1);
    }

    /// One after the other, bins out of bounds; true if something was done.
    fn pass(&mut self) -> bool {
        let (mut top, mut bottom) = (BTreeSet::new(), BTreeSet::new());
        let mut done = false;
        loop {
            let heavy = self.order.iter().rev().find(|(.., node)| !top.contains(node));
            let light = self.order.iter().find(|(.., node)| !bottom.contains(node));
            let (Some(&(most, heavy)), Some(&(least, light))) = (heavy, light) else {
                return done;
            };
            let over = most > self.high;
            if !over && least >= self.low {
                return done;
            }
            if self.shift(heavy, light) {
                done = true;
                continue;
            }
            let node = if over { heavy } else { light };
            if self.exchange(node, over) || self.divide(node, over) {
                done = true;
            } else if over {
                top.insert(node);
            } else {
                bottom.insert(node);
            }
        }
    }

    fn weight(&self, node: usize) -> u64 {
        self.bins.get(&node).map_or(0, |bin| bin.weight)
    }

    /// One item from the heavy bin to the light one.
    fn shift(&mut self, heavy: usize, light: usize) -> bool {
        let (most, least) = (self.weight(heavy), self.weight(light));
        let gap = most.saturating_sub(least);
        let Some(bin) = self.bins.get(&heavy) else { return false };
        let need = most.saturating_sub(self.high).max(self.low.saturating_sub(least));
        let room = self.high.saturating_sub(least).min(most.saturating_sub(self.low));
        let fit = need.min(room);
        let (grain, limit) = (self.grain, gap.saturating_sub(self.grain));
        let found = bin
            .largest(grain, fit.min(limit))
            .or_else(|| bin.smallest(fit.saturating_add(1).max(grain), limit));
        match found {
            Some(item) => self.carry(item, heavy, light),
            None => return false,
        }
        true
    }

    /// Bins to try with `node`: the lightest for a heavy one, the heaviest for a light one.
    fn partners(&self, node: usize, over: bool, count: usize) -> Vec<usize> {
        let other = |(.., partner): &&(u64, usize)| *partner != node;
        let found: Vec<usize> = match over {
            true => self.order.iter().filter(other).take(count).map(|key| key.1).collect(),
            false => self.order.iter().rev().filter(other).take(count).map(|key| key.1).collect(),
        };
        found
    }

    /// Two items, one each way.
    fn exchange(&mut self, node: usize, over: bool) -> bool {
        let mut best: Option<(u64, Item, Item, usize, usize)> = None;
        for partner in self.partners(node, over, EXCHANGES) {
            let (heavy, light) = if over { (node, partner) } else { (partner, node) };
            let gap = self.weight(heavy).saturating_sub(self.weight(light));
            if let Some((gain, down, up)) = self.pair(heavy, light, gap) {
                if best.is_none_or(|(most, ..)| gain > most) {
                    best = Some((gain, down, up, heavy, light));
                }
                if gain >= gap / 4 {
                    break;
                }
            }
        }
        let Some((_, down, up, heavy, light)) = best else { return false };
        self.carry(down, heavy, light);
        self.carry(up, light, heavy);
        true
    }

    /// The pair of items whose exchange evens the two bins best, and what the heavier one loses.
    fn pair(&self, heavy: usize, light: usize, gap: u64) -> Option<(u64, Item, Item)> {
        let (from, to) = (self.bins.get(&heavy)?.items(), self.bins.get(&light)?.items());
        let mut best: Option<(u64, Item, Item)> = None;
        for down in from {
            let wanted = down.weight.saturating_sub(gap / 2);
            let at = to.partition_point(|item| item.weight < wanted);
            let near = [at.checked_sub(1).and_then(|i| to.get(i)), to.get(at)];
            for up in near.into_iter().flatten() {
                let Some(difference) = down.weight.checked_sub(up.weight) else { continue };
                let gain = difference.min(gap.saturating_sub(difference));
                if gain >= self.grain && best.is_none_or(|(most, ..)| gain > most) {
                    best = Some((gain, down, *up));
                }
            }
        }
        best
    }

    /// All items of two bins, divided anew.
    fn divide(&mut self, node: usize, over: bool) -> bool {
        for partner in self.partners(node, over, DIVISIONS) {
            let (heavy, light) = if over { (node, partner) } else { (partner, node) };
            if let Some(stay) = self.division(heavy, light) {
                let items = |bin: Option<&Bin>| bin.map(Bin::items).unwrap_or_default();
                let (from, to) = (items(self.bins.get(&heavy)), items(self.bins.get(&light)));
                for item in from.into_iter().filter(|item| !stay.contains(item)) {
                    self.carry(item, heavy, light);
                }
                for item in to.into_iter().filter(|item| stay.contains(item)) {
                    self.carry(item, light, heavy);
                }
                return true;
            }
        }
        false
    }

    /// The items that the heavy bin should have, if that is a gain.
    fn division(&self, heavy: usize, light: usize) -> Option<BTreeSet<Item>> {
        let (from, to) = (self.bins.get(&heavy)?, self.bins.get(&light)?);
        let items = [from.items(), to.items()].concat();
        if items.len() > DIVIDED_MOST || from.weight <= to.weight {
            return None;
        }
        let fixed = from.weight.saturating_sub(weight_of(&from.items()));
        let both = from.weight.saturating_add(to.weight);
        let wanted = (both / 2).saturating_sub(fixed);
        let (one, two) = items.split_at(items.len() / 2);
        let (one, two) = (sums(one), sums(two));
        let (mut best, mut nearest) = (None, u64::MAX);
        for (sum, chosen) in &one {
            let rest = wanted.saturating_sub(*sum);
            let at = two.partition_point(|(other, _)| *other < rest);
            let near = [at.checked_sub(1).and_then(|i| two.get(i)), two.get(at)];
            for (other, more) in near.into_iter().flatten() {
                let distance = (sum + other).abs_diff(wanted);
                if distance < nearest {
                    nearest = distance;
                    best = Some((sum + other, chosen, more));
                }
            }
        }
        let (sum, chosen, more) = best?;
        let weight = fixed.saturating_add(sum);
        let most = weight.max(both.saturating_sub(weight));
        if most.saturating_add(self.grain) > from.weight {
            return None;
        }
        let picked = |half: &[Item], bits: u32| -> Vec<Item> {
            let is_set = |(bit, _): &(u32, &Item)| bits & (1 << bit) != 0;
            (0..).zip(half).filter(is_set).map(|(_, item)| *item).collect()
        };
        let (first, second) = items.split_at(items.len() / 2);
        Some(picked(first, *chosen).into_iter().chain(picked(second, *more)).collect())
    }

    /// All items anew, if there are few and something better than this exists.
    fn search(&mut self) {
        let most = self.order.last().map_or(0, |key| key.0);
        let mut items: Vec<Item> = self.bins.values().flat_map(Bin::items).collect();
        let few = items.len() <= SEARCHED_MOST && self.bins.len() <= SEARCHED_BINS;
        if most <= self.high || !few {
            return;
        }
        items.sort_by(|a, b| b.cmp(a));
        let nodes: Vec<usize> = self.bins.keys().copied().collect();
        let fixed = |bin: &Bin| bin.weight.saturating_sub(weight_of(&bin.items()));
        let fixed: Vec<u64> = self.bins.values().map(fixed).collect();
        let sum: u64 = self.bins.values().map(|bin| bin.weight).sum();
        let largest = items.first().map_or(0, |item| item.weight);
        let bound = (sum as f64 / nodes.len().max(1) as f64).max(largest as f64);
        let weights: Vec<u64> = items.iter().map(|item| item.weight).collect();
        let goal = (bound * NEAR) as u64;
        let limit = most.saturating_sub(self.grain).saturating_add(1);
        if most <= goal {
            return;
        }
        let Some(places) = search::assignment(&weights, &fixed, limit, goal) else { return };
        let free = fixed.iter().all(|weight| *weight == 0);
        let order = if free { settle_in(&items, &places, &nodes) } else { nodes };
        let held: Vec<(Item, usize)> =
            self.bins.iter().flat_map(|(n, b)| b.items().into_iter().map(|i| (i, *n))).collect();
        let ends: BTreeMap<Item, usize> = items.into_iter().zip(places).collect();
        for (item, from) in held {
            let to = ends.get(&item).and_then(|place| order.get(*place)).copied();
            if let Some(to) = to.filter(|to| *to != from) {
                self.carry(item, from, to);
            }
        }
    }

    /// What was moved for nothing.
    fn send_home(&mut self) {
        let mut moved: Vec<(Item, usize)> = self.moved().collect();
        moved.sort_by_key(|(item, _)| (item.bytes, item.group));
        let most = self.order.last().map_or(0, |key| key.0).min(self.high);
        let least = self.order.first().map_or(0, |key| key.0).max(self.low);
        for (item, node) in moved {
            if !self.bins.contains_key(&item.home) {
                continue;
            }
            let home = self.weight(item.home).saturating_add(item.weight);
            let left = self.weight(node).saturating_sub(item.weight);
            if home <= most && left >= least {
                self.carry(item, node, item.home);
            }
        }
    }

    fn carry(&mut self, item: Item, from: usize, to: usize) {
        if let Some(bin) = self.bins.get_mut(&from) {
            self.order.remove(&bin.key(from));
            bin.home.remove(&item);
            bin.away.remove(&item);
            bin.by_yield.remove(&(item.yield_of_bytes(), item));
            bin.weight = bin.weight.saturating_sub(item.weight);
            self.order.insert(bin.key(from));
        }
        self.put(item, to);
    }

    fn put(&mut self, item: Item, node: usize) {
        let Some(bin) = self.bins.get_mut(&node) else { return };
        self.order.remove(&bin.key(node));
        if item.home == node {
            bin.home.insert(item);
            if self.by_yield {
                bin.by_yield.insert((item.yield_of_bytes(), item));
            }
        } else {
            bin.away.insert(item);
        }
        bin.weight = bin.weight.saturating_add(item.weight);
        self.order.insert(bin.key(node));
    }
}

fn weight_of(items: &[Item]) -> u64 {
    items.iter().fold(0, |sum, item| sum.saturating_add(item.weight))
}

/// The node for each place, so that many bytes stay where they are.
fn settle_in(items: &[Item], places: &[usize], nodes: &[usize]) -> Vec<usize> {
    let mut stays: BTreeMap<(usize, usize), u64> = BTreeMap::new();
    for (item, place) in items.iter().zip(places) {
        *stays.entry((*place, item.home)).or_default() += item.bytes.0;
    }
    let mut by_bytes: Vec<(Reverse<u64>, usize, usize)> =
        stays.into_iter().map(|((place, node), bytes)| (Reverse(bytes), place, node)).collect();
    by_bytes.sort();
    let mut taken: BTreeMap<usize, usize> = BTreeMap::new();
    let mut left: BTreeSet<usize> = nodes.iter().copied().collect();
    for (_, place, node) in by_bytes {
        if !taken.contains_key(&place) && left.remove(&node) {
            taken.insert(place, node);
        }
    }
    let node = |place| taken.get(&place).copied().or_else(|| left.pop_first());
    (0..nodes.len()).filter_map(node).collect()
}

/// All sums of a few items, sorted, each with the set of those in it, a bit an item.
fn sums(items: &[Item]) -> Vec<(u64, u32)> {
    let mut sums = vec![(0u64, 0u32)];
    for (bit, item) in (0..).zip(items) {
        let with = |(sum, set): &(u64, u32)| (sum.saturating_add(item.weight), set | (1 << bit));
        let more: Vec<(u64, u32)> = sums.iter().map(with).collect();
        sums.extend(more);
    }
    sums.sort_unstable();
    sums
}
