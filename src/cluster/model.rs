//! Nodes, shards and groups, as plain data.

use serde::Serialize;

/// A server (with its database) that holds shards, or may.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// `host:port`, or the name that the cluster's file gives; unique in the cluster.
    pub name: String,
    /// Shards may be moved here: active, primary, and not marked as to be emptied.
    pub takes_shards: bool,
}

/// One shard of one table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shard {
    /// The cluster's number for it; unique in the cluster.
    pub id: u64,
    /// The table it is a part of, for people.
    pub table: String,
    /// Size on disk with indexes and TOAST, in bytes.
    pub bytes: u64,
    /// Rows, as its node estimates them.
    pub rows: u64,
    /// Rows read and written there since its node's statistics were reset.
    pub load: u64,
}

/// Co-located shards: they are on one node, and stay together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    /// The co-location group that its tables belong to; 0 where the cluster has none.
    pub colocation: u32,
    /// Where it is: a node's name.
    pub node: String,
    /// At least one, in the order of their tables.
    pub shards: Vec<Shard>,
}

impl Group {
    /// What names the group: the least number of its shards.
    pub fn id(&self) -> u64 {
        self.shards.iter().map(|shard| shard.id).min().unwrap_or_default()
    }

    /// Size on disk of all its shards, in bytes.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().fold(0, |sum, shard| sum.saturating_add(shard.bytes))
    }

    /// Rows of all its shards.
    pub fn rows(&self) -> u64 {
        self.shards.iter().fold(0, |sum, shard| sum.saturating_add(shard.rows))
    }

    /// Load of all its shards.
    pub fn load(&self) -> u64 {
        self.shards.iter().fold(0, |sum, shard| sum.saturating_add(shard.load))
    }
}

/// All nodes and all groups that can be moved between them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cluster {
    /// In a fixed order: of their names.
    pub nodes: Vec<Node>,
    /// In a fixed order: of their ids.
    pub groups: Vec<Group>,
}

impl Cluster {
    /// Puts nodes and groups in order, so that equal clusters give equal plans.
    pub fn new(mut nodes: Vec<Node>, mut groups: Vec<Group>) -> Cluster {
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        groups.sort_by_key(Group::id);
        Cluster { nodes, groups }
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }
}
