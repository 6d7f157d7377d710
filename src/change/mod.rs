//! What came out of the source's write-ahead log, as plain data: no I/O, no decoder's habits.
//!
//! Every decoder gives these, every buffer keeps them, every applier takes them. A transaction
//! travels as one or more [`Chunk`]s, so that one of any size passes through fixed memory; a small
//! one, the usual case, is a single chunk with `commit` set.

pub mod backlog;
pub mod captured;
pub mod feed;
pub mod relation;
pub mod row;
pub mod sink;
pub mod spill;
pub mod transaction;
pub mod visibility;

pub use backlog::AllRead;
pub use captured::Captured;
pub use feed::Feed;
pub use relation::{Column, KnownColumn, Relation, ReplicaIdentity};
pub use row::{Row, RowBuilder, RowError, Value};
pub use sink::{Sink, SinkClosed};
pub use spill::{Spill, SpillFile};
pub use transaction::{Begin, Change, Chunk, Commit, Ending, Item, OldRow};
pub use visibility::Snapshot;
