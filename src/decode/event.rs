//! What one message of a decoder says.

use std::sync::Arc;

use crate::change::{Begin, Change, Commit, Relation};
use crate::clock::PgTimestamp;
use crate::id::QualifiedName;
use crate::lsn::Lsn;

/// A transaction's steps of two-phase commit, as far as messages share fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The prepared transaction's id.
    pub xid: u32,
    /// Its global identifier, as given to PREPARE TRANSACTION.
    pub gid: String,
    /// Start of the record: the PREPARE, or the COMMIT PREPARED.
    pub lsn: Lsn,
    /// First byte after that record.
    pub end_lsn: Lsn,
    /// When.
    pub time: PgTimestamp,
}

/// What a decoder of textual output makes of one message.
///
/// wal2json and test_decoding describe a row by its columns' names and types and leave out what is
/// NULL or unchanged, so the table's full list of columns and its identity come from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The message says this.
    Event(Event),
    /// An event that was held back until this message showed that it is complete (wal2json writes
    /// a TRUNCATE of several tables as several messages). Give the same message again for its own.
    Before(Event),
    /// The message changes this table, which the decoder does not know, or no longer as it knew it.
    /// It remembers nothing of the message: describe the table, or tell the decoder to ignore it,
    /// then give the message again.
    Describe(QualifiedName),
    /// The message says nothing that anybody needs.
    Nothing,
}

/// One message, decoded.
///
/// `xid` of a change is set only between `StreamStart` and `StreamStop`, where it names the
/// (sub)transaction that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A committed transaction starts; its origin is not known yet.
    Begin(Begin),
    /// A committed transaction starts, and where and when it committed is told only at its end.
    Start {
        /// The top-level transaction.
        xid: u32,
        /// Its first record: the commit record does not start before this.
        first_lsn: Lsn,
    },
    /// The open transaction was replicated from elsewhere.
    Origin {
        /// Commit position on the origin.
        lsn: Lsn,
        /// Name of the origin on the source.
        name: String,
    },
    /// The open transaction was replicated from elsewhere, by an origin whose name the server does
    /// not know (any more): an empty message in place of `Origin`.
    UnknownOrigin,
    /// A table's description; already remembered by the decoder.
    Relation(Arc<Relation>),
    /// A type's name; nothing needs it, as values travel as text.
    Type {
        /// `pg_type.oid` on the source.
        oid: u32,
        /// Its schema.
        schema: String,
        /// Its name.
        name: String,
    },
    /// A change.
    Change {
        /// The (sub)transaction, in a streamed one only.
        xid: Option<u32>,
        /// What changed.
        change: Change,
    },
    /// The open transaction is complete.
    Commit(Commit),
    /// A part of a transaction in progress follows.
    StreamStart {
        /// The top-level transaction.
        xid: u32,
        /// True for its first part.
        first: bool,
    },
    /// The part is over.
    StreamStop,
    /// A streamed transaction committed.
    StreamCommit {
        /// The top-level transaction.
        xid: u32,
        /// Its commit.
        commit: Commit,
    },
    /// A streamed (sub)transaction was rolled back.
    StreamAbort {
        /// The top-level transaction.
        xid: u32,
        /// What was rolled back; equal to `xid` for all of it.
        subxid: u32,
        /// Where and when, under `streaming 'parallel'` only.
        at: Option<(Lsn, PgTimestamp)>,
    },
    /// A prepared transaction's changes follow.
    BeginPrepare(Prepared),
    /// They are complete.
    Prepare(Prepared),
    /// COMMIT PREPARED.
    CommitPrepared(Prepared),
    /// ROLLBACK PREPARED; `lsn` is the end of the PREPARE record.
    RollbackPrepared(Prepared),
    /// A streamed transaction was prepared.
    StreamPrepare(Prepared),
}
