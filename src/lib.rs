//! walferry moves a live PostgreSQL database from a source to a target while applications write.
//!
//! The rooms, in floor order. A room imports only from the floors below its own; rooms of floor 3
//! never import each other. `tests/tidy.rs` holds both.

// Floor 0: words. No I/O, no async.
pub mod clock;
pub mod fault;
pub mod id;
pub mod limit;
pub mod lsn;
pub mod secret;

// Floor 1: the wire, and changes as plain data.
pub mod change;
pub mod pg;

// Floor 2: pure decoding, and what servers and clusters say of themselves.
pub mod catalog;
pub mod cluster;
pub mod decode;
pub mod map;

// Floor 3: stages. They never import each other.
pub mod apply;
pub mod buffer;
pub mod copy;
pub mod large;
pub mod reshape;
pub mod route;
pub mod schema;
pub mod source;
pub mod verify;

// Floor 4: the one choreography.
pub mod cutover;

// Floor 5: the job.
pub mod job;

// Floor 6: edges.
pub mod cli;
pub mod config;
pub mod demo;
