//! Jobs of many tasks: each task is one group of a sharded cluster, and an ordinary job of this
//! room.
//!
//! A plan of the cluster room is stored in the cluster's home (the coordinator, the proxy database,
//! or the database that a file names), in schema walferry there. Running it is nothing but running
//! ordinary jobs beside each other, within what nodes may bear: check, copy, follow, verify, cut
//! over by the cluster's own route. The ordinary jobs keep their state where they always do, on
//! their targets.
//!
//! - `store`: the tables. `setup`: what a command knows of its cluster, and a task as an ordinary
//!   job. `run`: the lease, and which tasks start when; `task`: one of them; `watch`: what is seen
//!   of it meanwhile. `database`: databases that a task has for itself. `shape`: what its tables
//!   look like, so that a change of them is noticed. `undo`: taking back what a task began. `log`:
//!   every statement that was sent to a node. `slots`: whether nodes have enough of them.
//!
//! What survives a crash: everything. A task says `running` before anything is made of it, and its
//! own job says how far that is; the next runner, on any host, goes on from there. That clients are
//! on the target is first known to the task's own job, so a runner that died in between finds it
//! switched and only writes that down.
//!
//! One runner at a time has a cluster's job: an advisory-lock lease in the home. Should it lose
//! that, it stops its tasks and begins again; until it has, the leases of the tasks' own jobs keep
//! a second runner away from each of them.
//!
//! What was switched keeps its way back for as long as the runner lives, and until `finish`.

mod database;
pub mod log;
pub mod run;
pub mod setup;
mod shape;
mod slots;
pub mod store;
mod task;
pub mod undo;
pub mod watch;

pub use run::{Ended, Said, Tell, Wanted, run};
pub use setup::{Flip, Setup};
pub use store::{ClusterJob, ClusterStore, TaskRow};
pub use watch::Overview;

/// How the error of a task ends that no reset brings back.
pub const PLAN_ANEW: &str = "walferry cluster cancel, and plan a new job";
