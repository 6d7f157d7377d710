//! How even a cluster is.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::Weigh;
use crate::cluster::model::{Cluster, Group};

/// What one node holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeWeight {
    /// The node.
    pub node: String,
    /// How many groups.
    pub groups: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Rows, estimated.
    pub rows: u64,
    /// Rows read and written since statistics were reset.
    pub load: u64,
}

impl NodeWeight {
    fn weight(&self, by: Weigh) -> u64 {
        match by {
            Weigh::Size => self.bytes,
            Weigh::Count => self.groups,
            Weigh::Load => self.load,
        }
    }
}

/// All nodes, and how far from even those are that are to be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Balance {
    /// In the cluster's order, all nodes.
    pub nodes: Vec<NodeWeight>,
    /// The mean weight of the nodes that are compared.
    pub mean: f64,
    /// The heaviest of them.
    pub most: u64,
    /// The lightest.
    pub least: u64,
    /// The larger of most - mean and mean - least, as a fraction of the mean: 0 is even.
    pub deviation: f64,
}

impl Balance {
    /// Weighs every node; `compared` are those that count for mean, most and least. `place` tells
    /// the node of the group at this place in the cluster's list.
    pub fn of(
        cluster: &Cluster,
        by: Weigh,
        compared: &BTreeSet<&str>,
        place: impl Fn(usize, &Group) -> String,
    ) -> Balance {
        let mut held: BTreeMap<String, NodeWeight> = BTreeMap::new();
        for (index, group) in cluster.groups.iter().enumerate() {
            let node = held.entry(place(index, group)).or_default();
            node.groups += 1;
            node.bytes = node.bytes.saturating_add(group.bytes());
            node.rows = node.rows.saturating_add(group.rows());
            node.load = node.load.saturating_add(group.load());
        }
        let nodes: Vec<NodeWeight> = cluster
            .nodes
            .iter()
            .map(|node| NodeWeight {
                node: node.name.clone(),
                ..held.remove(&node.name).unwrap_or_default()
            })
            .collect();
        let weights: Vec<u64> = nodes
            .iter()
            .filter(|node| compared.contains(node.node.as_str()))
            .map(|node| node.weight(by))
            .collect();
        let most = weights.iter().copied().max().unwrap_or_default();
        let least = weights.iter().copied().min().unwrap_or_default();
        let sum: f64 = weights.iter().map(|weight| *weight as f64).sum();
        let mean = sum / weights.len().max(1) as f64;
        let far = (most as f64 - mean).max(mean - least as f64);
        let deviation = if mean > 0.0 { far / mean } else { 0.0 };
        Balance { nodes, mean, most, least, deviation }
    }
}
