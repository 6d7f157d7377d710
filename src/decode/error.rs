//! What can be wrong with the bytes or the order of a stream.

use crate::change::RowError;
use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::lsn::Lsn;

/// A message that cannot be decoded. `lsn` is where the stream said it stands.
///
/// None of these mends itself: the same bytes come again from the same slot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The bytes end before the message does.
    #[error(
        "pgoutput message '{message}' at {lsn} ends too early; if it does so again on a new \
         connection, report it with the server's version"
    )]
    Truncated {
        /// First byte of the message.
        message: char,
        /// Where.
        lsn: Lsn,
    },
    /// The message ends before the bytes do.
    #[error(
        "pgoutput message '{message}' at {lsn} has {bytes} bytes more than its format; \
         report it with the server's version"
    )]
    Trailing {
        /// First byte of the message.
        message: char,
        /// Where.
        lsn: Lsn,
        /// How many.
        bytes: usize,
    },
    /// A first byte that no protocol version up to 4 has.
    #[error(
        "pgoutput message of unknown kind {kind:#04x} at {lsn}; \
         check that the slot's plugin is pgoutput"
    )]
    UnknownMessage {
        /// The byte.
        kind: u8,
        /// Where.
        lsn: Lsn,
    },
    /// A field holds a value that the protocol does not have.
    #[error(
        "pgoutput message '{message}' at {lsn}: {field} is {value:#04x}; \
         report it with the server's version"
    )]
    Field {
        /// First byte of the message.
        message: char,
        /// Where.
        lsn: Lsn,
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: u8,
    },
    /// A name is not UTF-8, though the session asked for it.
    #[error(
        "pgoutput message '{message}' at {lsn} has a name that is not UTF-8; rename the object, \
         as a SQL_ASCII database does not convert names"
    )]
    NotUtf8 {
        /// First byte of the message.
        message: char,
        /// Where.
        lsn: Lsn,
    },
    /// A change of a table that was not described on this connection.
    #[error(
        "pgoutput message '{message}' at {lsn} names relation {oid}, which the stream has not \
         described (find it with: select {oid}::regclass)"
    )]
    UnknownRelation {
        /// First byte of the message.
        message: char,
        /// Where.
        lsn: Lsn,
        /// `pg_class.oid` on the source.
        oid: u32,
    },
    /// A row does not fit its table's description.
    #[error(
        "a row of {relation} at {lsn} has {row_columns} columns where its description has \
         {relation_columns}; report it with the server's version"
    )]
    ColumnCount {
        /// The table.
        relation: QualifiedName,
        /// Where.
        lsn: Lsn,
        /// Columns in the row.
        row_columns: usize,
        /// Columns in the description.
        relation_columns: usize,
    },
    /// A row's bytes are no row.
    #[error("a row of {relation} at {lsn}: {source}; report it with the server's version")]
    Row {
        /// The table.
        relation: QualifiedName,
        /// Where.
        lsn: Lsn,
        /// What is wrong with it.
        source: RowError,
    },
    /// A message of wal2json does not read.
    #[error(
        "wal2json message at {lsn}: byte {at} is not {what}; report it with the plugin's version"
    )]
    Json {
        /// Where.
        lsn: Lsn,
        /// What was expected.
        what: &'static str,
        /// In the message, counted from 0.
        at: usize,
    },
    /// A message of wal2json before 2.5, which does not tell a bytea from a text.
    #[error(
        "{relation} at {lsn}: the server's wal2json is older than 2.5, which tells no column's \
         type, so that one altered between text and bytea would be misread; install 2.5 or newer \
         on the server and run again, or end this job with walferry cancel and start it anew with \
         --decoder test_decoding"
    )]
    NoTypes {
        /// The table.
        relation: QualifiedName,
        /// Where.
        lsn: Lsn,
    },
    /// A message larger than any that a server can send.
    #[error("message at {lsn} has {bytes} bytes, more than the {most} that PostgreSQL can make")]
    TooLong {
        /// Where.
        lsn: Lsn,
        /// How many.
        bytes: usize,
        /// How many are possible.
        most: usize,
    },
    /// A name is not UTF-8.
    #[error(
        "a message at {lsn} has a name that is not UTF-8; rename the object, \
         or read the slot with pg_logical_slot_peek_changes, which converts"
    )]
    NameNotUtf8 {
        /// Where.
        lsn: Lsn,
    },
    /// wal2json wrote null for a number that may be NaN or an infinity.
    #[error(
        "{relation} at {lsn}: column \"{column}\" is null, NaN or an infinity, which wal2json \
         before 2.6 writes alike; install 2.6, or use --decoder test_decoding"
    )]
    LostNumber {
        /// The table.
        relation: QualifiedName,
        /// The column.
        column: String,
        /// Where.
        lsn: Lsn,
    },
    /// A row fits neither the catalog nor itself.
    #[error("a row of {relation} at {lsn} has columns twice or out of order; report it")]
    Unfitting {
        /// The table.
        relation: QualifiedName,
        /// Where.
        lsn: Lsn,
    },
    /// The plugin says that it left out a change.
    #[error(
        "wal2json has left out a change of table {table} (\"{notice}\"), and the target will never \
         have it: give the table an identity, by a primary key or with \"ALTER TABLE {table} \
         REPLICA IDENTITY FULL;\", then end this job with walferry cancel and start it anew, which \
         copies the table again"
    )]
    Dropped {
        /// The table, quoted as in SQL where that is known.
        table: String,
        /// The server's WARNING.
        notice: String,
    },
    /// Text that test_decoding does not write.
    #[error(
        "the message at {lsn} is not test_decoding's: {expected} was expected {left} bytes before \
         its end; check the slot's plugin, and report it with the server's version"
    )]
    Text {
        /// Where.
        lsn: Lsn,
        /// What should have come.
        expected: &'static str,
        /// How much of the message was left.
        left: usize,
    },
    /// A row that fits neither the table nor what can be guessed of how the table was.
    #[error(
        "a change of {relation} at {lsn} does not fit the table's columns or replica identity, \
         which changed after it was written; set them back (ALTER TABLE {relation} REPLICA \
         IDENTITY ..., RENAME COLUMN ...) until the stream has passed that position"
    )]
    Reshaped {
        /// The table.
        relation: QualifiedName,
        /// Where.
        lsn: Lsn,
    },
    /// A DELETE or UPDATE that does not say of which row.
    #[error(
        "a change of {relation} at {lsn} carries no row, as the table has no replica identity: \
         leave the table out, or give it a primary key or ALTER TABLE {relation} REPLICA IDENTITY \
         FULL and copy it again"
    )]
    NoRow {
        /// The table.
        relation: QualifiedName,
        /// Where.
        lsn: Lsn,
    },
    /// COMMIT names another transaction than the open one.
    #[error(
        "COMMIT of transaction {xid} at {lsn} does not end the open one; report it with the \
         server's version"
    )]
    OtherCommit {
        /// The transaction.
        xid: u32,
        /// Where.
        lsn: Lsn,
    },
    /// A message where the protocol does not allow it.
    #[error("{event} {place}, after position {after}; report it with the server's version")]
    OutOfPlace {
        /// Which message.
        event: &'static str,
        /// Where it should not have been.
        place: &'static str,
        /// End of the last transaction.
        after: Lsn,
    },
    /// Transactions come in commit order; this one did not.
    #[error(
        "the commit at {commit_lsn} (end {end_lsn}) comes after position {after}; the stream is \
         not in commit order, or not of one server"
    )]
    Disorder {
        /// Start of the commit record.
        commit_lsn: Lsn,
        /// Its end.
        end_lsn: Lsn,
        /// What the stream had reached.
        after: Lsn,
    },
    /// A transaction's COMMIT is not the one its BEGIN promised.
    #[error(
        "transaction {xid} began for the commit record at {begin_lsn} and ended with {commit_lsn}; \
         report it with the server's version"
    )]
    WrongCommit {
        /// The transaction.
        xid: u32,
        /// What BEGIN said.
        begin_lsn: Lsn,
        /// What COMMIT said.
        commit_lsn: Lsn,
    },
    /// In-progress streaming or two-phase decoding, which the reader never asks for.
    #[error(
        "{event} came in the stream, but neither streaming of transactions in progress nor \
         two-phase decoding was asked for; a slot made with two_phase cannot be used, make it again"
    )]
    NotAskedFor {
        /// Which message.
        event: &'static str,
    },
    /// Messages of a transaction that is sent in progress, out of their order.
    #[error(
        "transaction {xid}, sent while in progress, {what}; run with --streaming off, and report \
         it with the server's version"
    )]
    OddStream {
        /// The top-level transaction.
        xid: u32,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            // A slot made by someone else with two_phase brings these.
            Error::NotAskedFor { .. } => Fault::Stop,
            // The server describes before it sends; if it seems not to have, we forgot.
            Error::UnknownRelation { .. } | Error::WrongCommit { .. } => Fault::Bug,
            Error::OddStream { .. } => Fault::Bug,
            _ => Fault::Stop,
        }
    }
}
