//! What can go wrong while applying, and what to do then.

use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::pg;

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;

/// The change an error is about: enough to find the row on both sides, no value outside its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Culprit {
    /// `INSERT`, `UPDATE`, `DELETE` or `TRUNCATE`.
    pub operation: &'static str,
    /// The table on the target.
    pub table: QualifiedName,
    /// `(id)=(5)`, or what stands in for a key.
    pub key: String,
    /// Start of the source transaction's commit record.
    pub commit_lsn: Lsn,
    /// The source transaction.
    pub xid: u32,
    /// The change's place in it, counted from 0; 0 where nobody asks.
    pub ordinal: u64,
}

impl std::fmt::Display for Culprit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of {} key {} (source transaction {} committed at {})",
            self.operation, self.table, self.key, self.xid, self.commit_lsn
        )
    }
}

/// Why applying stopped. Nothing of the batch concerned is on the target.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The wire, or a statement of our own that the server refused.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// The role lacks a right that applying needs.
    #[error("role \"{role}\" may not {what}: run {sql} ({source})")]
    Denied {
        /// The role of the session.
        role: String,
        /// What it tried.
        what: &'static str,
        /// What gives it the right.
        sql: String,
        /// The server's refusal.
        source: Box<pg::Error>,
    },
    /// The target did not prepare a transaction.
    #[error(
        "the target did not prepare a transaction that the source has prepared: {source}; it takes \
         alter system set max_prepared_transactions to at least the source's, and a restart"
    )]
    PrepareRefused {
        /// The server's words.
        source: Box<pg::Error>,
    },
    /// A prepared transaction cannot be tagged without an origin.
    #[error(
        "a prepared transaction came, and the role on the target may not use replication origins, \
         without which it cannot be told from an application's own: grant them, or start over \
         with --two-phase off"
    )]
    PreparedWithoutOrigin,
    /// Somebody else ended it.
    #[error(
        "the source committed a prepared transaction at {end_lsn} that the target should have as \
         {name} and has not: it was ended there by somebody else; start over with walferry cancel \
         and walferry run"
    )]
    NotPrepared {
        /// Its name on the target.
        name: String,
        /// End of the source's COMMIT PREPARED.
        end_lsn: Lsn,
    },
    /// The schema `walferry` or a table in it is not there.
    #[error("the tables of schema walferry are missing on the target ({source}): run {ddl}")]
    NoState {
        /// What makes them.
        ddl: &'static str,
        /// The server's words.
        source: Box<pg::Error>,
    },
    /// Another session applies under this origin.
    #[error(
        "replication origin \"{origin}\" is in use by the session with pid {pid} after {seconds} s \
         of waiting: stop the other walferry, or run select pg_terminate_backend({pid}) on the \
         target"
    )]
    OriginBusy {
        /// The origin.
        origin: String,
        /// Its holder, as far as the server told.
        pid: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The progress row was moved by somebody else.
    #[error(
        "progress of stream \"{stream}\" was moved by another session: another walferry applies \
         the same stream, or did a moment ago"
    )]
    ProgressMoved {
        /// The stream.
        stream: String,
    },
    /// A table of the stream does not exist on the target.
    #[error(
        "table {table} does not exist on the target: create it there as it is on the source, or \
         leave it out of the job"
    )]
    NoTable {
        /// Its name.
        table: QualifiedName,
    },
    /// What has the table's name on the target cannot be written as a table.
    #[error(
        "{table} is not a table on the target (relkind \"{kind}\"): rename it and create the table"
    )]
    NotATable {
        /// Its name.
        table: QualifiedName,
        /// `pg_class.relkind`.
        kind: String,
    },
    /// The source's table has a column that the target's lacks.
    #[error(
        "column {column} of table {table} does not exist on the target: run alter table {quoted} \
         add column {column} with the type it has on the source"
    )]
    NoColumn {
        /// The table.
        table: QualifiedName,
        /// The table, quoted.
        quoted: String,
        /// The column, quoted.
        column: String,
    },
    /// An UPDATE or DELETE says not which row it means.
    #[error(
        "{culprit} does not identify its row: run alter table {quoted} replica identity full on \
         the source (or using index), then copy the table again"
    )]
    NotIdentified {
        /// The change.
        culprit: Box<Culprit>,
        /// The table, quoted.
        quoted: String,
    },
    /// The statement for one change touched no row, or several.
    #[error(
        "{culprit} met {rows} rows on the target instead of 1: source and target differ; run \
         walferry verify, repair the row, and find out who else writes to the target"
    )]
    RowMissing {
        /// The change.
        culprit: Box<Culprit>,
        /// How many rows it met.
        rows: String,
    },
    /// The target refused a change.
    #[error("{culprit} was refused by the target: {said}; {advice}")]
    Refused {
        /// The change.
        culprit: Box<Culprit>,
        /// The server's message with its SQLSTATE, without other columns' values.
        said: String,
        /// What to do.
        advice: &'static str,
        /// The server's error in full.
        source: Box<pg::Error>,
    },
    /// The source's table was altered, and the target's was not.
    #[error(
        "table {table} was altered on the source: {altered}; run on the target {}, and start again",
        if sql.is_empty() { "what makes it the same" } else { sql }
    )]
    Altered {
        /// Its name.
        table: QualifiedName,
        /// What was altered.
        altered: String,
        /// The SQL.
        sql: String,
    },
    /// A statement that the source captured was not run here.
    #[error(
        "{tag} of the source is not carried: {said}; do the same on the target by hand{}, and \
         start again with --ddl apply,skip={id}",
        if sql.is_empty() { String::new() } else { format!(" ({sql})") }
    )]
    Captured {
        /// Its number.
        id: i64,
        /// Its command tag.
        tag: String,
        /// Why.
        said: String,
        /// The SQL.
        sql: String,
    },
    /// What stood in the way is dealt with, as these words say: the stream begins again.
    #[error("{0}")]
    Again(String),
    /// COMMIT did not answer COMMIT.
    #[error("the target answered COMMIT with \"{tag}\": the batch up to {end_lsn} is not applied")]
    NotCommitted {
        /// The command tag.
        tag: String,
        /// Where the batch ends.
        end_lsn: Lsn,
    },
    /// Law 10 does not hold.
    #[error(
        "changes of {table} do not add up: {decoded} decoded, {applied} applied, {filtered} \
         filtered, {quarantined} quarantined, {lost} lost in conflicts"
    )]
    Conservation {
        /// The table.
        table: QualifiedName,
        /// Changes seen.
        decoded: u64,
        /// Changes written.
        applied: u64,
        /// Changes left out on purpose.
        filtered: u64,
        /// Changes set aside.
        quarantined: u64,
        /// Changes that lost a conflict.
        lost: u64,
    },
    /// A table of a job of two ways has no primary key that the stream identifies rows by.
    #[error(
        "table {table} takes no part in a job of two ways: its rows are not identified by a \
         primary key. Add one on both sides, with REPLICA IDENTITY DEFAULT or FULL, or leave it \
         out with --exclude"
    )]
    TwoWayWithoutKey {
        /// The table.
        table: QualifiedName,
    },
    /// A column's values are to settle conflicts, and do not do so in this table.
    #[error(
        "conflicts of table {table} are not settled by the greater value of its column {column}: \
         {why}. Go on with walferry run --two-way --on-conflict greatest:{column},last-commit, \
         which settles tables without that column, or with another policy"
    )]
    TwoWayColumn {
        /// The table.
        table: QualifiedName,
        /// The column.
        column: String,
        /// What is the matter with it.
        why: &'static str,
    },
    /// A value that settles a conflict is out of line, and stayed as it was.
    #[error(
        "an UPDATE of {table} met what an application wrote on the other side, and leaves its \
         column {column}, which is out of line, as it is: without REPLICA IDENTITY FULL, which \
         check asks for, no stream shows the value that settles it. Give the table that identity \
         on both sides again, end the job with walferry finish and begin it anew"
    )]
    TwoWayUnseen {
        /// The table.
        table: QualifiedName,
        /// The column.
        column: String,
    },
    /// TRUNCATE came through all the same.
    #[error(
        "a TRUNCATE of {table} cannot be held against what applications wrote on the other side: \
         a trigger refuses it, which was dropped or disabled; end the job with walferry finish and \
         begin it anew"
    )]
    TwoWayTruncate {
        /// The first of its tables.
        table: QualifiedName,
    },
    /// The decoder did not tell in time when a transaction committed.
    #[error(
        "transaction {xid} came in parts, and test_decoding tells only at the end when it \
         committed, which settles conflicts: read the side by pgoutput or wal2json"
    )]
    TwoWayWithoutTime {
        /// The transaction.
        xid: u32,
    },
    /// A conflict, where nobody is to settle it.
    #[error(
        "conflict {kind}: {culprit} met what an application wrote on the other side. Go on with \
         walferry run --two-way --on-conflict last-commit, source or target, which settles it and \
         all that come, or mend one of the two rows"
    )]
    Conflict {
        /// Its kind.
        kind: &'static str,
        /// The change that came.
        culprit: Box<Culprit>,
    },
    /// The stream or our own bookkeeping broke a promise.
    #[error("{0}")]
    Broken(String),
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pg(error) => error.fault(),
            Error::ProgressMoved { .. } | Error::Again(_) => Fault::Retry,
            Error::NotCommitted { .. } | Error::Conservation { .. } | Error::Broken(_) => {
                Fault::Bug
            }
            _ => Fault::Stop,
        }
    }
}

impl Error {
    /// The SQLSTATE of the server's refusal, if it is one.
    pub(super) fn code(&self) -> Option<&str> {
        match self {
            Error::Pg(error) => error.code(),
            Error::Refused { source, .. } => source.code(),
            _ => None,
        }
    }

    /// Its table is parked because of it.
    pub(super) fn parked(&self) -> Error {
        Error::Again(format!("{self}; its table is parked, see walferry quarantine list"))
    }

    /// The row that the target refused, where the row is the cause: not rights, not a full disk.
    ///
    /// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
    pub(super) fn refused_row(&self) -> Option<&Culprit> {
        match self {
            Error::RowMissing { culprit, .. } => Some(culprit),
            Error::Refused { culprit, source, .. } => {
                let class = source.code().and_then(|code| code.get(..2));
                // Data, integrity, WITH CHECK OPTION, what a trigger raises; an enum's label that
                // is too new.
                let refused = matches!(class, Some("22" | "23" | "44" | "P0"))
                    || source.code() == Some("55P04");
                refused.then_some(culprit)
            }
            _ => None,
        }
    }
}

/// What to do about a row that the target refused.
pub(super) fn advice(code: &str) -> &'static str {
    match code {
        "23505" | "23P01" => {
            "a conflicting row is on the target: run walferry verify, and find out who else \
             writes to the target"
        }
        "23502" | "23503" | "23514" | "23001" => {
            "the target has a constraint that the source's row does not meet: drop it there, or \
             mend the row on both sides"
        }
        "42501" => "grant the role of the target connection the right to write this table",
        "53100" => "free disk space on the target and start again; nothing is lost",
        "0A000" | "2BP01" => {
            "a table outside the job refers to this one: drop its foreign key on the target, or \
             take the table into the job"
        }
        _ if code.starts_with("22") => {
            "the column's type or encoding differs between source and target: make them equal, \
             and start again"
        }
        _ => "mend the cause on the target and start again; nothing is lost",
    }
}

/// The server's words without its DETAIL, which may show whole rows; that of a unique or exclusion
/// violation shows the key only and is kept.
pub(super) fn said(error: &pg::ServerError) -> String {
    let mut said = format!("{} (SQLSTATE {})", error.message, error.code);
    if let (Some(detail), "23505") = (&error.detail, error.code.as_str()) {
        said.push_str(": ");
        said.push_str(detail);
    }
    said
}
