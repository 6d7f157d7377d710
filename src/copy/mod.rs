//! The rows: read under one snapshot, written once, by many workers.
//!
//! 1. `prepare`: every table that holds rows becomes parts (big ones are cut by ranges of ctid,
//!    where the source can scan those), stored once in `walferry.table_copy` on the target. The
//!    tables have to be empty at that moment.
//! 2. Each worker has a session on both ends. On the source: one read-only transaction under the
//!    shared snapshot, for as long as the worker lives. On the target: a transaction a part.
//! 3. A part: `COPY ... TO STDOUT` and `COPY ... FROM STDIN`, bytes passed on untouched through a
//!    bounded queue, so that reading and writing overlap. Its row turns `done` in the very
//!    transaction that brought the rows. Small tables share a transaction and a request; a table of
//!    one part is written frozen, in the transaction that emptied it.
//!
//! States of a part: `todo` (set by prepare, and by a reset) -> `done` (with its rows). There is no
//! third: what was begun and not committed left nothing behind.
//!
//! Snapshots. Every part keeps which snapshot it was read under. Parts of one table must share
//! one; so when the copy goes on under a new snapshot, a table of which some parts are done and
//! some are not is emptied and read again whole, and finished tables stay as they are. The
//! [`visibility`] of tables that were not read under the slot's own snapshot tells the applier,
//! transaction by transaction, what they already hold. The same reset happens when the source's
//! table was rewritten between two parts (VACUUM FULL, CLUSTER): ctids then mean other rows.
//!
//! After a crash: the same call goes on with the parts that are not done. A worker that loses a
//! connection opens another and imports the snapshot again; if that is gone (its holder died) the
//! others go on with what they hold, and what is left is told by [`Error::SnapshotLost`], for the
//! caller to come with a fresh one.
//!
//! Timeline: table t has parts 1 to 4, two workers. Parts 1 and 2 are done, the holder and worker A
//! die. Worker B still sees the snapshot and does 3 and 4: t is whole. Had B died as well, the next
//! call, under a fresh snapshot, would empty t and copy four parts, and leave finished tables be.
//!
//! Left out: COPY FREEZE of a table in several parts (it needs the table emptied in the same
//! transaction), origins (the reverse slot is made after the copy, so copied rows cannot come
//! back), key ranges (ctid serves any table).
//!
//! - `parts`: pure; what is copied in which pieces. - `store`: the table of parts. - `format`: text
//!   or binary. - `run`: workers. - `transfer`: what one transaction brings. - `again`: unlogged
//!   tables, once more at a switch. - `refill`: tables that are in doubt. - `progress`: counters.
//!   - `error`.

mod again;
pub mod error;
mod family;
pub mod format;
pub mod parts;
pub mod progress;
pub mod refill;
pub mod run;
pub mod snapshot;
pub mod store;
pub mod transfer;

pub use again::Again;
pub use error::Error;
pub use format::Format;
pub use parts::{PART_BYTES, heap_bytes};
pub use progress::{CopyProgress, ProgressSnapshot, TableProgress};
pub use run::{Freeze, Options, run};
pub use snapshot::{SnapshotSource, export_snapshot};
pub use store::{DDL, visibility, whole};

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;
