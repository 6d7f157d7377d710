//! From a wish to tasks: which group goes from where to where.
//!
//! Every wish is one question with different bounds: some groups may move, some must (those whose
//! node is to be emptied), and a set of nodes takes them. `even` answers it.
//!
//! By count every co-location group is evened by itself, as its groups are alike: each node gets
//! its share of every table, and (`level`) as many groups in sum. By size and load only the sum
//! counts.

mod balance;
mod even;
mod level;
mod search;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

pub use balance::{Balance, NodeWeight};
use even::{Even, Item};
use level::level;

use super::model::{Cluster, Group};

/// What is to be even between nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weigh {
    /// Bytes on disk.
    #[default]
    Size,
    /// The number of groups, of each co-location group.
    Count,
    /// Rows read and written.
    Load,
}

impl Weigh {
    /// What the group weighs.
    pub fn of(self, group: &Group) -> u64 {
        match self {
            Weigh::Size => group.bytes(),
            Weigh::Count => 1,
            Weigh::Load => group.load(),
        }
    }
}

impl std::str::FromStr for Weigh {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "size" => Ok(Weigh::Size),
            "count" => Ok(Weigh::Count),
            "load" => Ok(Weigh::Load),
            _ => Err(format!("\"{text}\" is not one of size, count, load")),
        }
    }
}

/// How even.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measure {
    /// What is weighed.
    pub by: Weigh,
    /// A node within this fraction of the mean is even enough. Below 0.001 nothing is gained.
    pub threshold: f64,
}

/// What is wanted of a cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Wish {
    /// Even all nodes that take shards; empty those that do not.
    Rebalance(Measure),
    /// Empty these nodes; what is on others stays.
    Drain {
        /// Their names.
        nodes: Vec<String>,
        /// By what the others are filled evenly.
        by: Weigh,
    },
    /// Everything from one node to another.
    Replace {
        /// The node to be emptied.
        old: String,
        /// The node that takes its groups.
        new: String,
    },
    /// What is on some nodes, evenly to others; a node may be in both lists.
    Spread {
        /// Whose groups may move; they must where the node is not in `to`.
        from: Vec<String>,
        /// Where they go.
        to: Vec<String>,
        /// How even.
        measure: Measure,
    },
    /// The group that this shard is in.
    One {
        /// The shard's number.
        shard: u64,
        /// The node it goes to; the lightest by size where none is named.
        to: Option<String>,
    },
}

impl Wish {
    /// The nodes that are to have nothing in the end.
    pub fn emptied(&self) -> Vec<&str> {
        match self {
            Wish::Drain { nodes, .. } => nodes.iter().map(String::as_str).collect(),
            Wish::Replace { old, .. } => vec![old],
            Wish::Spread { from, to, .. } => {
                from.iter().filter(|node| !to.contains(node)).map(String::as_str).collect()
            }
            Wish::Rebalance(_) | Wish::One { .. } => Vec::new(),
        }
    }
}

/// One group's move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Task {
    /// Counted from 1.
    pub task: u32,
    /// Co-location group.
    pub colocation: u32,
    /// The node it leaves.
    pub source: String,
    /// The node it goes to.
    pub target: String,
    /// The tables it is a part of.
    pub tables: Vec<String>,
    /// Its shards.
    pub shards: Vec<u64>,
    /// Bytes on disk.
    pub bytes: u64,
    /// Rows, estimated.
    pub rows: u64,
}

/// What would be done, and what for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// By what nodes are compared.
    pub by: Weigh,
    /// Largest first within each source.
    pub tasks: Vec<Task>,
    /// Bytes of all tasks.
    pub bytes: u64,
    /// As it is.
    pub before: Balance,
    /// As it will be.
    pub after: Balance,
}

/// A wish that cannot be planned.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such node.
    #[error("the cluster has no node \"{name}\"; it has {}", known.join(", "))]
    NoNode {
        /// As given.
        name: String,
        /// All names.
        known: Vec<String>,
    },
    /// The node is given as a target and must not be one.
    #[error(
        "node {0} takes no shards: it is inactive, not a primary, or marked as not to have any (in \
         Citus: select citus_set_node_property('HOST', PORT, 'shouldhaveshards', true))"
    )]
    Closed(String),
    /// Nobody is left to take what has to move.
    #[error("no node is left that could take shards; add one to the cluster first")]
    NoTarget,
    /// Source and target are the same.
    #[error("node {0} is named as source and as target: name two different nodes")]
    Same(String),
    /// No such shard.
    #[error("no shard {0} can be moved: the cluster has none of that number in a movable table")]
    NoShard(u64),
}

/// Plans. Pure, deterministic: equal clusters and wishes give equal plans.
///
/// # Errors
/// Where the wish names what the cluster does not have, or nothing could take what must move.
pub fn plan(cluster: &Cluster, wish: &Wish) -> Result<Plan, Error> {
    let question = Question::of(cluster, wish)?;
    let ends = question.answer(cluster);
    Ok(assemble(cluster, &question, &ends))
}

/// The bounds of a wish.
struct Question<'a> {
    measure: Measure,
    /// Nodes whose groups may move.
    from: BTreeSet<&'a str>,
    /// Nodes they may be on in the end.
    to: BTreeSet<&'a str>,
    /// Only the group with this shard.
    only: Option<u64>,
}

impl<'a> Question<'a> {
    fn of(cluster: &'a Cluster, wish: &'a Wish) -> Result<Question<'a>, Error> {
        let all = || cluster.nodes.iter();
        let takers: BTreeSet<&str> =
            all().filter(|n| n.takes_shards).map(|n| n.name.as_str()).collect();
        let placed = |by| Measure { by, threshold: 0.0 };
        let question = match wish {
            Wish::Rebalance(measure) => {
                let from = all().map(|n| n.name.as_str()).collect();
                Question { measure: *measure, from, to: takers, only: None }
            }
            Wish::Drain { nodes, by } => {
                let from = known(cluster, nodes)?;
                let to = takers.difference(&from).copied().collect();
                Question { measure: placed(*by), from, to, only: None }
            }
            Wish::Replace { old, new } => {
                if old == new {
                    return Err(Error::Same(new.clone()));
                }
                let from = known(cluster, std::slice::from_ref(old))?;
                let to = open(cluster, std::slice::from_ref(new))?;
                Question { measure: placed(Weigh::Size), from, to, only: None }
            }
            Wish::Spread { from, to, measure } => {
                let (from, to) = (known(cluster, from)?, open(cluster, to)?);
                Question { measure: *measure, from, to, only: None }
            }
            Wish::One { shard, to } => Question::one(cluster, *shard, to.as_ref(), takers)?,
        };
        if question.to.is_empty() {
            return Err(Error::NoTarget);
        }
        Ok(question)
    }

    fn one(
        cluster: &'a Cluster,
        shard: u64,
        to: Option<&'a String>,
        mut takers: BTreeSet<&'a str>,
    ) -> Result<Question<'a>, Error> {
        let holds = |group: &&Group| group.shards.iter().any(|s| s.id == shard);
        let group = cluster.groups.iter().find(holds).ok_or(Error::NoShard(shard))?;
        let to = match to {
            Some(name) if *name == group.node => return Err(Error::Same(name.clone())),
            Some(name) => open(cluster, std::slice::from_ref(name))?,
            None => {
                takers.remove(group.node.as_str());
                takers
            }
        };
        let measure = Measure { by: Weigh::Size, threshold: 0.0 };
        let from = BTreeSet::from([group.node.as_str()]);
        Ok(Question { measure, from, to, only: Some(group.id()) })
    }

    fn may_move(&self, group: &Group) -> bool {
        let asked = self.only.is_none_or(|id| id == group.id());
        asked && self.from.contains(group.node.as_str())
    }

    /// Each moved group's new node, by the group's place in the cluster's list.
    fn answer(&self, cluster: &Cluster) -> BTreeMap<usize, String> {
        let number: BTreeMap<&str, usize> =
            cluster.nodes.iter().enumerate().map(|(i, n)| (n.name.as_str(), i)).collect();
        let Measure { by, threshold } = self.measure;
        let mut parts: BTreeMap<u32, Even> = BTreeMap::new();
        for (index, group) in cluster.groups.iter().enumerate() {
            let part = if by == Weigh::Count { group.colocation } else { 0 };
            let even = parts.entry(part).or_insert_with(|| {
                let targets = self.to.iter().filter_map(|name| number.get(name)).copied();
                Even::new(targets, threshold, by == Weigh::Load)
            });
            let home = number.get(group.node.as_str()).copied().unwrap_or(usize::MAX);
            even.add(Item::new(index, home, by.of(group), group.bytes()), self.may_move(group));
        }
        let mut parts: Vec<Even> = parts.into_values().collect();
        parts.iter_mut().for_each(Even::settle);
        if by == Weigh::Count {
            let before = Balance::of(cluster, by, &self.to, |_, group| group.node.clone());
            level(&mut parts, threshold, before.most, before.least);
        }
        let moved = parts.iter().flat_map(Even::moved);
        let end = |(item, node): (Item, usize)| Some((item.group(), cluster.nodes.get(node)?));
        moved.filter_map(end).map(|(group, node)| (group, node.name.clone())).collect()
    }
}

/// The nodes of these names.
fn known<'a>(cluster: &'a Cluster, names: &[String]) -> Result<BTreeSet<&'a str>, Error> {
    let find = |name: &String| {
        cluster.node(name).map(|node| node.name.as_str()).ok_or_else(|| Error::NoNode {
            name: name.clone(),
            known: cluster.nodes.iter().map(|n| n.name.clone()).collect(),
        })
    };
    names.iter().map(find).collect()
}

/// The nodes of these names, all of which take shards.
fn open<'a>(cluster: &'a Cluster, names: &[String]) -> Result<BTreeSet<&'a str>, Error> {
    let found = known(cluster, names)?;
    match found.iter().find(|name| cluster.node(name).is_some_and(|node| !node.takes_shards)) {
        Some(closed) => Err(Error::Closed(closed.to_string())),
        None => Ok(found),
    }
}

fn assemble(cluster: &Cluster, question: &Question<'_>, ends: &BTreeMap<usize, String>) -> Plan {
    let by = question.measure.by;
    let mut moves: Vec<(&Group, &String)> =
        ends.iter().filter_map(|(i, to)| Some((cluster.groups.get(*i)?, to))).collect();
    let order = |group: &Group| (group.node.clone(), std::cmp::Reverse(group.bytes()), group.id());
    moves.sort_by_cached_key(|(group, _)| order(group));
    let task = |(task, (group, to)): (u32, &(&Group, &String))| Task {
        task,
        colocation: group.colocation,
        source: group.node.clone(),
        target: to.to_string(),
        tables: group.shards.iter().map(|s| s.table.clone()).collect(),
        shards: group.shards.iter().map(|s| s.id).collect(),
        bytes: group.bytes(),
        rows: group.rows(),
    };
    let tasks: Vec<Task> = (1..).zip(&moves).map(task).collect();
    let place = |index: usize, group: &Group| ends.get(&index).unwrap_or(&group.node).clone();
    Plan {
        by,
        bytes: tasks.iter().map(|t| t.bytes).sum(),
        before: Balance::of(cluster, by, &question.to, |_, group| group.node.clone()),
        after: Balance::of(cluster, by, &question.to, place),
        tasks,
    }
}
