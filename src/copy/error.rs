//! What can go wrong with a copy.

use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::pg;

/// Errors of this room.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A server, or the way to it.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// The exported snapshot cannot be had any more. Come with a fresh one, and call again: tables
    /// that are done stay done.
    #[error("snapshot {name} is gone ({detail}): copying goes on under a fresh one")]
    SnapshotLost {
        /// Its name.
        name: String,
        /// What the server said.
        detail: String,
    },
    /// A target table has rows that this job did not put there.
    #[error(
        "table {table} on the target already has rows, and this job did not copy them: empty it \
         there (\"truncate only {}\") or leave it out with --exclude {table}", table.quoted()
    )]
    NotEmpty {
        /// Which table.
        table: QualifiedName,
    },
    /// A table is unlogged where it is read, and not where it is written.
    #[error(
        "table {table} is unlogged on the live side and logged on the other: what is copied to it \
         now would come back through the stream. Make them alike (ALTER TABLE {0} SET UNLOGGED, or \
         SET LOGGED and a new job), or use --unlogged leave", table.quoted()
    )]
    Persistence {
        /// Which table.
        table: QualifiedName,
    },
    /// A table, or a column of it, is not there.
    #[error(
        "table {table} on the target {what}: create it as it is on the source, or leave it out \
         with --exclude {table}"
    )]
    Missing {
        /// Which table.
        table: QualifiedName,
        /// What is missing.
        what: String,
    },
    /// Triggers or foreign keys would fire, and the role may not stop them.
    #[error(
        "table {table} on the target has triggers or foreign keys, and the role may not set \
         session_replication_role: \"grant set on parameter session_replication_role to {role}\" \
         (PostgreSQL 15 and later, as superuser), or \"alter table {} disable trigger user\" and \
         drop its foreign keys until the copy is done", table.quoted()
    )]
    Triggers {
        /// Which table.
        table: QualifiedName,
        /// Our role.
        role: String,
    },
    /// The target did not take a row.
    #[error("table {table}: {error}{}; {}", context(error), advice(error))]
    Refused {
        /// Which table.
        table: QualifiedName,
        /// What the target said.
        error: Box<pg::Error>,
    },
    /// The source did not give a row.
    #[error("table {table}: {error}{}", context(error))]
    Unreadable {
        /// Which table.
        table: QualifiedName,
        /// What the source said.
        error: Box<pg::Error>,
    },
    /// The source's table was rewritten or truncated after the snapshot was taken, or between two
    /// parts of it. All other tables are done.
    #[error(
        "table {table} was rewritten or truncated on the source while it was to be copied: it is \
         copied again under a fresh snapshot"
    )]
    Rewritten {
        /// Which table.
        table: QualifiedName,
    },
    /// A mask is not for its column.
    #[error("the job's map: {0}")]
    Mask(String),
    /// An invariant of ours does not hold.
    #[error("{0}; this is a bug of walferry, please report it")]
    Bug(String),
}

/// `; COPY t, line 3, column b: "x"`: the server's only word on which row it was.
fn context(error: &pg::Error) -> String {
    let context = error.server().and_then(|e| e.context.as_deref());
    context.map_or(String::new(), |context| format!("; {context}"))
}

fn advice(error: &pg::Error) -> &'static str {
    match error.code() {
        Some("53100") => "make room on the target's disk, then run again: it goes on from here",
        Some(code) if code.starts_with("23") => {
            "mend the row on the source or drop the constraint on the target, then run again"
        }
        Some("22021" | "22P05") => {
            "the row does not fit the target's encoding: mend it on the source, or make the \
             target with the source's encoding, then run again"
        }
        Some("42501") => "grant the target's role INSERT on the table, then run again",
        _ => "mend the row on the source or the table on the target, then run again",
    }
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pg(error) => error.fault(),
            Error::Refused { error, .. } | Error::Unreadable { error, .. } => error.fault(),
            Error::SnapshotLost { .. } | Error::Rewritten { .. } => Fault::Retry,
            Error::NotEmpty { .. }
            | Error::Persistence { .. }
            | Error::Missing { .. }
            | Error::Mask(_)
            | Error::Triggers { .. } => Fault::Stop,
            Error::Bug(_) => Fault::Bug,
        }
    }
}
