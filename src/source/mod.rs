//! The reading end of a stream: the slot, what it publishes, its snapshots, and the reader.
//!
//! "Source" here is the source of *this stream*: for the reverse stream it is the server that the
//! job calls target. A stream comes into being in this order, because each step fixes what the
//! next one relies on:
//!
//! 1. [`publication::ensure`]: decoding looks at the catalogs as of each change, so the publication
//!    comes before the slot.
//! 2. [`slot::create`]: the slot keeps WAL from its consistent point on, and exports the snapshot
//!    that sees everything before it. It may wait for open transactions; it says for whom, and can
//!    be given up without a trace.
//! 3. The copy reads under that snapshot, or later under one of [`snapshot::export`].
//! 4. [`Stream::open`] checks that server and slot are still the recorded ones and not beyond what
//!    the target has ([`continuity`], law 4), then starts the stream at the target's progress.
//! 5. [`Stream::run`] decodes, filters, and pushes items until told to stop.
//!
//! Where the replication protocol does not reach, [`Pull`] takes the part of [`Stream`], by SQL
//! functions over an ordinary connection; [`Reader`] is either.
//!
//! The reader has one rule above all (law 1): the slot is told the durable position that the
//! applier published, and nothing else. A keepalive becomes an idle item, travels through the
//! buffer behind everything received before it, and comes back as a durable position once the
//! applier has passed it. So the slot moves on while only unpublished tables change (etl#429), and
//! never past a transaction that is still somewhere between here and the target's disk
//! (pgcopydb#1033):
//!
//! ```text
//! server     commit 0/100     keepalive 0/180
//! reader      push chunk        push Idle 0/180      feedback: durable 0/100   durable 0/180
//! applier                 apply, flush 0/100 ───────────┘  pass Idle 0/180 ───────┘
//! ```
//!
//! A long backlog is read by SQL before the stream begins, which costs the source a sixth: see
//! `bulk`.
//!
//! Feedback goes out on time whatever the buffer does (law 11): while a push waits for room, the
//! reader does not read, but goes on telling the server where it is, so a slow target costs no
//! wal_sender_timeout (bdr#233). A source that says nothing is asked for a sign of life, then given
//! up (go-pq-cdc#20).
//!
//! What survives a crash: the slot with its confirmed position, and the publication, both on the
//! server. What was read and not yet durable comes again. A walsender that a dead runner left
//! behind is taken from the slot by [`slot::free`].
//!
//! Transactions that the server sends in progress, where it is asked to, are kept aside until they
//! end (`streamed`). Prepared ones come at their PREPARE where that is asked for, and at their
//! commit otherwise.

mod bulk;
pub mod choice;
pub mod continuity;
mod count;
mod describe;
mod error;
mod fetch;
mod followed;
mod hand;
mod intake;
mod link;
mod marker;
pub mod nudge;
mod options;
mod order;
mod pace;
mod peek;
pub mod publication;
mod pull;
mod reader;
mod rows;
pub mod slot;
pub mod snapshot;
mod stream;
mod streamed;

pub use continuity::{Recorded, System, check_continuity, identify, identify_by_sql};
pub use count::{Counters, TableCount};
pub use error::Error;
pub use followed::{Followed, Relative};
pub use options::{BulkOptions, End, Positions, StreamOptions};
pub use order::{Order, Place};
pub use pull::Pull;
pub use reader::{Reader, Transport, UnknownTransport};
pub use slot::{Blocker, CreateOptions, HeldSlot, SlotStatus};
pub use snapshot::{ExportedSnapshot, begin_with_snapshot};
pub use stream::Stream;

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;
