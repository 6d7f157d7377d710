//! The wire: the only room with a PostgreSQL socket.
//!
//! One small session type serves the source's replication stream, the apply pipeline, COPY in both
//! directions, and the control plane (catalogs, DDL, the job's own tables), so that connection
//! strings, TLS, authentication, deadlines and the loss of a server are handled and tested once.
//! Results are text: the questions asked here are the same from PostgreSQL 10 to 18, and text needs
//! no type table. No published client offers replication mode and COPY BOTH, which is why this room
//! exists; the bytes of messages come from postgres-protocol.
//!
//! - `conninfo`, `config`, `choice`, `passfile`: connection strings, PG* variables, password files.
//! - `connect`, `tls`, `auth`: hosts in turn, and the start of a session.
//! - `frame`: messages on a socket. - `session`: simple and extended queries, notifications;
//!   `cancel`: and their end.
//! - `pipeline`: many statements in one round trip. - `copy`: COPY in and out. - `replication`:
//!   the replication commands and the COPY BOTH stream. - `witness`: who is told of statements.
//!
//! Left out on purpose: pools, binary results, statement caches (the applier names its own).

pub mod auth;
mod cancel;
mod choice;
pub mod config;
mod connect;
mod conninfo;
pub mod copy;
pub mod error;
pub mod frame;
pub mod passfile;
pub mod pipeline;
pub mod replication;
pub mod row;
pub mod session;
pub mod socket;
pub mod tls;
pub mod witness;

pub use cancel::CancelHandle;
pub use config::{Config, Host};
pub use copy::{CopyChunk, CopyIn, CopyOut, Filled};
pub use error::{Error, ServerError};
pub use pipeline::{Event, OwnedParam, Param, Pipeline, Reply, now};
pub use replication::{CreatedSlot, ReplicationMessage, SlotKind};
pub use row::Row;
pub use session::{Notification, Purpose, Session};
pub use witness::{Heard, Witness};

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;
