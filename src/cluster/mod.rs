//! A sharded cluster: its nodes, its shard groups, and plans for moving groups between nodes.
//!
//! Why it exists: whoever grows, drains or replaces nodes of a Citus, plproxy or file-described
//! cluster needs to know what would move, how much of it, and what is gained, before anything does.
//!
//! - `model`: nodes, shards, and groups of co-located shards, as plain data.
//! - `read`: what a cluster is made of, from a Citus coordinator, a plproxy definition or a file.
//! - `plan`: pure; from a cluster and a wish to a list of tasks, each one whole group, with the
//!   balance before and after.
//!
//! - `guard`: what stands in the way of a plan. - `shard`: how shards are reached on their node.
//! - `errand`: what a planned task is as an ordinary job. `state`: where a task may stand, and
//!   `schedule`: which of them may start; both pure.
//!
//! A group is the unit of everything here: it is planned, moved and switched as one, so co-location
//! cannot be broken by a plan. Nothing here writes to any server, so nothing survives a crash.
//!
//! Left out: moving. Tasks are run by the job room.

pub mod errand;
pub mod guard;
pub mod model;
pub mod plan;
pub mod read;
pub mod schedule;
pub mod shard;
pub mod state;

pub use errand::{Errand, Move};
pub use model::{Cluster, Group, Node, Shard};
pub use plan::{Plan, Weigh, Wish, plan};
pub use read::{Address, Found, Layout, layout, read};
pub use state::TaskState;
