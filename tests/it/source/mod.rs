//! Tests of slots, publications, snapshots and the stream against real servers.

mod contract;
mod flow;
mod publication;
mod rig;
mod slot;
mod snapshot;
