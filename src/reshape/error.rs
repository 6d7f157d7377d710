//! Why a change cannot be put through the map.

use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::pg;

/// Errors of this room.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source, or the way to it.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// Two tables of the source are one on the target.
    #[error(
        "tables {sources} of the source would both be {target} on the target: begin a new \
         job whose map gives one of them another name, or leave one out with --exclude"
    )]
    Taken {
        /// The name on the target.
        target: QualifiedName,
        /// Both.
        sources: String,
    },
    /// The table was altered, and the map with it makes no sense any more.
    #[error(
        "table {table} has no column {column} any more, which the job's map speaks of: what it \
         became may not go to the target unseen. Rename it back, or begin a new job with another \
         map"
    )]
    Gone {
        /// The table on the source.
        table: QualifiedName,
        /// The column that the section names.
        column: String,
    },
    /// A mask is not for its column's type.
    #[error("the job's map: table {table}: {why}")]
    Mask {
        /// The table on the source.
        table: QualifiedName,
        /// In words.
        why: String,
    },
    /// An expression of the map failed for some row.
    #[error(
        "the job's map: an expression for table {table} fails for a row of the stream: {error}; \
         mend the function that it calls on the source, then run again. An expression itself can \
         be changed in a new job only, as rows are on the target by it already"
    )]
    Refused {
        /// The table on the source.
        table: QualifiedName,
        /// What the source said.
        error: Box<pg::Error>,
    },
    /// The stream does not carry what is needed.
    #[error(
        "the job's map: a change of table {table} does not carry {what}: \"alter table {} replica \
         identity full\" on the source lets later changes carry it; for this one, begin a new job \
         after that", table.quoted()
    )]
    Blind {
        /// The table on the source.
        table: QualifiedName,
        /// What is missing.
        what: String,
    },
    /// Rows of several sources are in one table.
    #[error(
        "TRUNCATE of table {table} came in the stream: it cannot be carried, as rows of other \
         sources are in the target's table as well. Use DELETE on sources that are resharded. \
         Nothing was applied from it on: end this with walferry reshard cancel, empty the targets' \
         tables, and begin again"
    )]
    Truncated {
        /// The table on the source.
        table: QualifiedName,
    },
    /// An invariant of ours does not hold.
    #[error("{0}; this is a bug of walferry, please report it")]
    Broken(String),
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pg(error) => error.fault(),
            Error::Taken { .. }
            | Error::Gone { .. }
            | Error::Mask { .. }
            | Error::Refused { .. }
            | Error::Blind { .. }
            | Error::Truncated { .. } => Fault::Stop,
            Error::Broken(_) => Fault::Bug,
        }
    }
}
