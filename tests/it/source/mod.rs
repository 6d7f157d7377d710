//! Tests of slots, publications, snapshots and the stream against real servers.

pub mod contract;
mod flow;
mod publication;
mod pull;
pub mod rig;
mod slot;
mod snapshot;
