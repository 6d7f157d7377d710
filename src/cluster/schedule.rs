//! Which tasks may start now. Pure.
//!
//! A task loads two nodes, the one it leaves and the one it goes to. Tasks start in their order,
//! except that one whose nodes are taken does not hold up one behind it whose nodes are free: tasks
//! that share nothing never wait for each other.

use std::collections::BTreeMap;

/// The nodes that a task loads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Its number.
    pub task: u32,
    /// The node it leaves.
    pub source: String,
    /// The node it goes to.
    pub target: String,
}

/// How much at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tasks in all.
    pub parallel: usize,
    /// Tasks that one node may take part in, as source or target.
    pub per_node: usize,
}

impl Default for Limits {
    /// As many as nodes allow, each taking part in one.
    fn default() -> Self {
        Limits { parallel: usize::MAX, per_node: 1 }
    }
}

/// Tasks of `waiting` that may start beside those that are `running`, in the order of `waiting`.
pub fn startable(waiting: &[Load], running: &[Load], limits: Limits) -> Vec<u32> {
    let mut loads: BTreeMap<&str, usize> = BTreeMap::new();
    for load in running {
        *loads.entry(&load.source).or_default() += 1;
        *loads.entry(&load.target).or_default() += 1;
    }
    let mut count = running.len();
    let mut starting = Vec::new();
    for load in waiting {
        let room = |node: &str| loads.get(node).is_none_or(|n| *n < limits.per_node.max(1));
        if count < limits.parallel.max(1) && room(&load.source) && room(&load.target) {
            *loads.entry(&load.source).or_default() += 1;
            *loads.entry(&load.target).or_default() += 1;
            count += 1;
            starting.push(load.task);
        }
    }
    starting
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn load(task: u32, source: u8, target: u8) -> Load {
        Load { task, source: format!("n{source}"), target: format!("n{target}") }
    }

    fn loads(tasks: &[(u8, u8)]) -> Vec<Load> {
        (1..).zip(tasks).map(|(task, (source, target))| load(task, *source, *target)).collect()
    }

    #[test]
    fn a_task_whose_nodes_are_free_passes_one_whose_are_not() {
        let waiting = loads(&[(1, 2), (1, 3), (4, 5), (2, 6)]);
        assert_eq!(startable(&waiting, &[], Limits::default()), [1, 3]);
        let running = [load(9, 4, 7)];
        assert_eq!(startable(&waiting, &running, Limits::default()), [1]);
        let two = Limits { per_node: 2, ..Limits::default() };
        assert_eq!(startable(&waiting, &running, two), [1, 2, 3, 4]);
        let three = Limits { parallel: 3, per_node: 2 };
        assert_eq!(startable(&waiting, &running, three), [1, 2]);
    }

    proptest! {
        /// Whatever ends when: the bounds hold, no task waits that could run, and all run once.
        #[test]
        fn bounds_hold_nothing_waits_that_could_run_and_every_task_runs_once(
            pairs in proptest::collection::vec((0_u8..6, 0_u8..6), 0..40),
            parallel in 1_usize..8,
            per_node in 1_usize..4,
            ends in proptest::collection::vec(any::<prop::sample::Index>(), 40),
        ) {
            let pairs: Vec<(u8, u8)> = pairs.into_iter().filter(|(a, b)| a != b).collect();
            let limits = Limits { parallel, per_node };
            let mut waiting = loads(&pairs);
            let mut running: Vec<Load> = Vec::new();
            let mut ran = Vec::new();
            let mut ends = ends.into_iter();
            loop {
                for task in startable(&waiting, &running, limits) {
                    let at = waiting.iter().position(|l| l.task == task).unwrap();
                    running.push(waiting.remove(at));
                    ran.push(task);
                }
                let on = |node: &str| {
                    running.iter().filter(|l| l.source == node || l.target == node).count()
                };
                prop_assert!(running.len() <= parallel);
                for load in &running {
                    prop_assert!(on(&load.source) <= per_node && on(&load.target) <= per_node);
                }
                for load in &waiting {
                    let free = on(&load.source) < per_node && on(&load.target) < per_node;
                    prop_assert!(!free || running.len() == parallel, "{load:?} could run");
                }
                if running.is_empty() {
                    break;
                }
                let index = ends.next().unwrap().index(running.len());
                running.remove(index);
            }
            ran.sort_unstable();
            prop_assert_eq!(ran, (1..=pairs.len() as u32).collect::<Vec<_>>());
        }
    }
}
