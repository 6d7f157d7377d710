//! Throw-away servers, a writer, and a comparison that does not use walferry's own: what
//! `walferry demo` shows itself with, and what the tests stand on.
//!
//! - `binaries`: PostgreSQL of any major, from Debian's packages or fetched on request.
//! - `template`, `server`, `guard`: a cluster of one's own that starts in a fraction of a second
//!   and is gone with the process that made it, even if that process is killed.
//! - `kafka`: a broker of one's own, the same way.
//! - `pgbouncer`: a pooler in front of a server. `proxy`: a network that can be cut.
//! - `dataset`, `writer`, `transactions`, `ledger`: a database with every awkward kind of table, an
//!   application that writes to it, and proof of what of its work must be found again.
//! - `compare`: are two databases the same, row by row, by reading all of both.
//!
//! Nothing here survives a crash on purpose: servers die with their maker. The comparison and the
//! ledger trust no part of walferry above `pg`, so they can convict the rest. Left out: anything a
//! move of a real database would need; no other room may import this one except the command line.

pub mod binaries;
pub mod compare;
mod dataset;
pub mod guard;
pub mod kafka;
pub mod ledger;
pub mod pgbouncer;
pub mod proxy;
pub mod server;
mod stalls;
mod standby;
mod template;
pub mod transactions;
pub mod writer;
