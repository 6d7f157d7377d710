//! Row-exact comparison of two databases, while both are in use.
//!
//! Why it exists: a move is only as good as the proof that nothing was lost, and people will not
//! stop writing for the proof. The caller aligns the two sides (it holds the applier at a position,
//! exports a snapshot on each side of it, and lets the applier go on); this room compares what the
//! two snapshots see.
//!
//! Steps:
//! 1. `family`: tables are paired by name. A partitioned table and its partitions are one family:
//!    they are scanned leaf by leaf, but judged as a whole, because which leaf a row is in may
//!    rightly differ (hash partitions by enum, ranges under another collation).
//! 2. `fingerprint`: one scan of each side computes, in the server, the number of rows and the sum
//!    of their hashes per bucket of the key. Sums do not depend on order (vitess#9715: a changed
//!    collation made an ordered diff report everything), and unlike xor they see duplicates. Being
//!    sums, they add up over leaves and over ctid ranges, so big tables are scanned in parallel.
//! 3. `compare`: buckets that differ are read again as (key hash, key, row hash), sorted by the
//!    servers, and merged as two streams: memory stays the same however much differs.
//!
//! `render` says what a value's text is: the same on PostgreSQL 10 to 18, in any encoding and under
//! any collation. Where both servers are 11 or newer, agree on the encoding and give the same
//! answer to a probe, rows are hashed with hashtextextended() (measured: 1.1 million rows/s on one
//! connection), with md5() otherwise (a quarter of that). Either way a bucket's sum is of 64-bit
//! hashes: the chance that it hides a difference is 1 in 2^64.
//!
//! A snapshot does not outlive its table's file: of a table truncated or rewritten since it shows
//! no rows, and no error. So each scan locks its table and compares the file the snapshot knows
//! with the one there; a table whose file is new is handed back to the caller for new snapshots.
//!
//! "Equal" is what COPY would print, not what `=` says: 1.0 and 1.00 differ, 0 and -0 too.
//!
//! Tables that a map makes others of are read through it on the source, and paired by the names
//! that they have on the target.
//!
//! Rows of several sources that are shared out among several targets are compared by target: those
//! of all sources that go there, with those that are there (`united`).
//!
//! Nothing is written, so nothing survives a crash: run it again. Table locks (ACCESS SHARE) are
//! given back after each scan, although the snapshot's transaction goes on.
//!
//! Left out: repair; values inside types of extensions whose text changed between the two versions
//! (`cube` across 12); sequences (the cutover sets them past every value).

mod compare;
mod family;
mod fingerprint;
mod render;
mod report;
mod run;
mod united;

use std::fmt;
use std::sync::Arc;

use crate::catalog::{Publication, Selection};
use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::map::Map;
use crate::pg::{self, Config};

pub use report::{Difference, DifferenceKind, Report, TableReport};
pub use run::run;
pub use united::run_united;

/// One of the two databases.
#[derive(Clone, Debug)]
pub struct Side {
    /// How to reach it. The role needs SELECT on every table compared.
    pub config: Config,
    /// A snapshot exported in this database whose transaction stays open during the run; `None`
    /// reads live with READ COMMITTED, which is right only where nobody writes.
    pub snapshot: Option<String>,
}

/// What to compare and how hard.
#[derive(Clone)]
pub struct Options {
    /// The side taken for right.
    pub source: Side,
    /// The side that should be equal to it.
    pub target: Side,
    /// Tables taking part: those for which [`Selection::has_rows`].
    pub selection: Selection,
    /// Only these of them (a partitioned table stands for its partitions); `None` for all.
    pub tables: Option<Vec<QualifiedName>>,
    /// The publication that rows come from the source by: what it leaves out is not compared.
    pub publication: Option<Publication>,
    /// What the target has of the source's tables is what this makes of them.
    pub map: Option<Arc<Map>>,
    /// Scans at a time on each side, at least 1: one connection each.
    pub parallelism: usize,
    /// Differing keys listed per table. Counts are exact whatever the limit.
    pub keys_limit: usize,
    /// Compare the values of generated columns too.
    pub generated: bool,
    /// Blocks of one scan, at least 1: a table twice as large is scanned in ctid ranges, several
    /// at a time. From PostgreSQL 14 on only: before, each range would read the whole table.
    pub piece_blocks: u64,
    /// Told of every finished scan.
    pub on_progress: Option<OnProgress>,
}

impl Options {
    /// Everything of both sides: 4 scans at a time of at most about 1 GiB each, 100 keys a table.
    pub fn new(source: Side, target: Side) -> Options {
        Options {
            source,
            target,
            selection: Selection::default(),
            tables: None,
            publication: None,
            map: None,
            parallelism: 4,
            keys_limit: 100,
            generated: false,
            piece_blocks: 65_536,
            on_progress: None,
        }
    }
}

/// Receives progress. Called from several tasks; must not block.
pub type OnProgress = Arc<dyn Fn(&Progress) + Send + Sync>;

/// How far a run is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The table a scan of which has just ended.
    pub table: QualifiedName,
    /// Source rows hashed so far, of all tables.
    pub rows: u64,
    /// Source bytes scanned so far.
    pub bytes: u64,
    /// Source bytes to scan.
    pub bytes_total: u64,
    /// Tables finished, differences listed.
    pub tables: usize,
    /// Tables to compare.
    pub tables_total: usize,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("source", &self.source)
            .field("target", &self.target)
            .field("selection", &self.selection)
            .field("tables", &self.tables)
            .field("parallelism", &self.parallelism)
            .finish_non_exhaustive()
    }
}

/// Which side an error is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Target,
}

impl End {
    fn as_str(self) -> &'static str {
        match self {
            End::Source => "source",
            End::Target => "target",
        }
    }
}

/// Why a comparison could not be made. A difference is never an error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A session could not be had, or a catalog could not be read.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// The exported snapshot is gone.
    #[error(
        "snapshot {snapshot} of the {side} cannot be used (the session that exported it must stay \
         open, in the same database); run verify again: {source}"
    )]
    Snapshot {
        /// `source` or `target`.
        side: &'static str,
        /// The name given.
        snapshot: String,
        /// What the server said.
        source: Box<pg::Error>,
    },
    /// A table could not be read.
    #[error("table {table} cannot be compared on the {side}: {source}{hint}")]
    Table {
        /// The table.
        table: QualifiedName,
        /// `source` or `target`.
        side: &'static str,
        /// What the server said.
        source: Box<pg::Error>,
        /// What to do, starting with "; ", or empty.
        hint: String,
    },
    /// A server gave two answers for one snapshot.
    #[error(
        "table {table}: the fingerprints differ and the rows do not, under one snapshot; a value \
         of it must print differently from one query to the next. Please report its column types"
    )]
    Inconsistent {
        /// The table.
        table: QualifiedName,
    },
    /// New snapshots do not help: the tables are rewritten faster than they are read.
    #[error(
        "truncated or rewritten on either side again and again while it was compared: {}; run \
         verify again when that has ended, everything else was compared",
        .tables.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    Rewritten {
        /// The tables.
        tables: Vec<QualifiedName>,
    },
    /// A mask is not for its column.
    #[error("the job's map: {0}")]
    Mask(String),
    /// A worker task ended without an answer.
    #[error("a comparing task failed: {0}")]
    Task(String),
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pg(error) => error.fault(),
            Error::Table { source, .. } => source.fault(),
            Error::Snapshot { .. } => Fault::Retry,
            Error::Rewritten { .. } | Error::Mask(_) => Fault::Stop,
            Error::Inconsistent { .. } | Error::Task(_) => Fault::Bug,
        }
    }
}

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;
