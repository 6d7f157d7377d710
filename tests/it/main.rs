//! One test binary: every part against real PostgreSQL servers.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod apply;
mod catalog;
mod check;
mod cli;
mod cluster;
mod copy;
mod cutover;
mod ddl;
mod decode;
mod faults;
mod fidelity;
mod heartbeat;
mod input;
mod job;
#[cfg(feature = "kafka")]
mod kafka;
mod large;
mod matrix;
mod newcomers;
mod older;
mod pg;
mod publications;
mod quarantine;
mod readings;
mod regress;
mod rights;
mod route;
mod schema;
mod source;
mod spool;
mod stories;
mod support;
mod support_works;
mod test_decoding;
mod verify;
