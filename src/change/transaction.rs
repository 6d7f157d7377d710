//! Changes, and the transactions that order them.

use std::sync::Arc;

use bytes::Bytes;

use super::{Relation, Row};
use crate::clock::PgTimestamp;
use crate::lsn::Lsn;

/// The old row of an UPDATE or DELETE, as far as the WAL has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OldRow {
    /// The replica identity's columns hold values, all others are NULL.
    Key(Row),
    /// Every column (REPLICA IDENTITY FULL).
    Full(Row),
}

impl OldRow {
    /// The row, whichever kind it is.
    pub fn row(&self) -> &Row {
        match self {
            OldRow::Key(row) | OldRow::Full(row) => row,
        }
    }
}

/// One change, in the order in which its transaction made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new row.
    Insert {
        /// The table's description in force.
        relation: Arc<Relation>,
        /// The row; generated columns may be missing from the relation.
        new: Row,
    },
    /// A changed row.
    Update {
        /// The table's description in force.
        relation: Arc<Relation>,
        /// Present when the key changed, or under REPLICA IDENTITY FULL; otherwise `new` holds the
        /// key.
        old: Option<OldRow>,
        /// The row afterwards; may hold unchanged TOAST values.
        new: Row,
    },
    /// A row gone.
    Delete {
        /// The table's description in force.
        relation: Arc<Relation>,
        /// What identifies it.
        old: OldRow,
    },
    /// Tables emptied by one statement, cascaded ones listed.
    Truncate {
        /// All of them.
        relations: Vec<Arc<Relation>>,
        /// The statement said CASCADE.
        cascade: bool,
        /// The statement said RESTART IDENTITY.
        restart_identity: bool,
    },
    /// `pg_logical_emit_message`.
    Message {
        /// Part of the transaction, or written at once.
        transactional: bool,
        /// Where the message stands in the WAL.
        lsn: Lsn,
        /// Namespace chosen by the writer.
        prefix: String,
        /// The writer's bytes.
        content: Bytes,
    },
}

impl Change {
    /// The tables it touches; none for a message.
    pub fn relations(&self) -> &[Arc<Relation>] {
        match self {
            Change::Insert { relation, .. }
            | Change::Update { relation, .. }
            | Change::Delete { relation, .. } => std::slice::from_ref(relation),
            Change::Truncate { relations, .. } => relations,
            Change::Message { .. } => &[],
        }
    }

    /// True for a TRUNCATE that restarts sequences.
    pub fn restarts(&self) -> bool {
        matches!(self, Change::Truncate { restart_identity: true, .. })
    }

    /// About how much memory the change holds, in bytes: payload and bookkeeping.
    pub fn bytes(&self) -> usize {
        let payload = match self {
            Change::Insert { new, .. } => new.as_bytes().len(),
            Change::Update { old, new, .. } => {
                new.as_bytes().len() + old.as_ref().map_or(0, |o| o.row().as_bytes().len())
            }
            Change::Delete { old, .. } => old.row().as_bytes().len(),
            Change::Truncate { relations, .. } => relations.len() * 8,
            Change::Message { content, .. } => content.len(),
        };
        payload + std::mem::size_of::<Change>()
    }
}

/// What is known when a transaction's first change arrives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begin {
    /// The top-level transaction's 32-bit id on the source.
    pub xid: u32,
    /// Start of the commit record. A transaction is already applied if this is below the stored
    /// progress, as progress is an end position and commit records do not overlap.
    ///
    /// test_decoding never tells it. There it is the last byte of the commit record, which compares
    /// with every end position as its start does; and in a transaction of several chunks, which
    /// begin to arrive before the commit is known, a position that it is certainly not below: the
    /// end of the transaction before it, or the position that the stream was asked to start at.
    pub commit_lsn: Lsn,
    /// When the source committed it; PostgreSQL's epoch in a transaction of several chunks from
    /// test_decoding. [`Commit::commit_time`] is always right.
    pub commit_time: PgTimestamp,
    /// Name of the replication origin it was tagged with on the source, if any.
    pub origin: Option<String>,
    /// What its end is.
    pub ending: Ending,
}

/// How a transaction ends, with its global identifier where it has one. Of a prepared transaction
/// two travel: its changes, which end with PREPARE TRANSACTION, and later one without changes, for
/// what became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ending {
    /// COMMIT.
    #[default]
    Commit,
    /// PREPARE TRANSACTION; positions and time are those of its record.
    Prepare(String),
    /// COMMIT PREPARED of the transaction with the same xid.
    CommitPrepared(String),
    /// ROLLBACK PREPARED of it; its record ends at [`Commit::end_lsn`], the start is not known.
    RollbackPrepared(String),
}

impl Ending {
    /// The identifier given to PREPARE TRANSACTION.
    pub fn gid(&self) -> Option<&str> {
        match self {
            Ending::Commit => None,
            Ending::Prepare(gid) | Ending::CommitPrepared(gid) | Ending::RollbackPrepared(gid) => {
                Some(gid)
            }
        }
    }
}

/// A transaction's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Start of the commit record; from test_decoding its last byte.
    pub commit_lsn: Lsn,
    /// First byte after the commit record: what progress becomes, and what the slot is told.
    pub end_lsn: Lsn,
    /// When the source committed it.
    pub commit_time: PgTimestamp,
}

/// A piece of one transaction. Chunks of different transactions never interleave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Repeated in every chunk of the transaction.
    pub begin: Arc<Begin>,
    /// 0 for a transaction's first chunk, then 1, 2, ...
    pub number: u32,
    /// In order; may be empty.
    pub changes: Vec<Change>,
    /// Set in the last chunk only.
    pub commit: Option<Commit>,
    /// Sum of [`Change::bytes`] over `changes`.
    pub bytes: usize,
}

/// What flows from source to applier, in log order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// Part of a transaction.
    Chunk(Chunk),
    /// The source has nothing more to send below this position: everything before it has been
    /// received. Comes from keepalives, between transactions only.
    Idle {
        /// Exclusive: all commits below it came before this item.
        lsn: Lsn,
    },
}

impl Item {
    /// Bytes the item counts for in a bounded queue; never 0.
    pub fn bytes(&self) -> usize {
        match self {
            Item::Chunk(chunk) => chunk.bytes + std::mem::size_of::<Chunk>(),
            Item::Idle { .. } => std::mem::size_of::<Item>(),
        }
    }
}
