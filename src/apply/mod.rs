//! Writes a stream's changes to its target: whole source transactions, in commit order, exactly
//! once, tagged with a replication origin.
//!
//! # Steps
//! 1. [`Applier::connect`] opens a session (triggers and foreign keys off by
//!    `session_replication_role`, COMMIT not waiting for its flush), claims the stream's progress
//!    and reads it.
//! 2. [`Applier::run`] takes what the feed has without waiting and makes a batch of it: small when
//!    the source is quiet, so that a change is on the target after one round trip, large when it is
//!    busy. `batch` decides, and cannot do I/O.
//! 3. `admit` decides and counts what of it is written. `writer` makes one request of that: BEGIN,
//!    the changes, progress with the counts beside it, COMMIT; one Sync. Once a second counts are
//!    entered in their table (`count`), and now and then the target is asked where its log stands.
//!    A full batch is sent behind the one that is under way (`flight`).
//! 4. The answers are held against the request: every statement met the rows it had to, COMMIT said
//!    COMMIT. Positions go out by a watch channel.
//!
//! `prepared` carries two-phase commit, where progress cannot be in the transaction of the rows.
//! Batches grow under a backlog for as long as the target is quick with them: `growth`.
//!
//! `routing` and `target` know the tables, `progress` where the position is kept, `durable` what a
//! crash of the target can take back, `standby` what its standbys say of that, `count` law 10's
//! books.
//!
//! # Two orders
//! Row order (`rows`; SQL by `shape` and `statement`) is a prepared statement a change, as the
//! source made them. Set order (`sets`; SQL by `setwise`, parameters by `encode`, rows of a COPY by
//! `lines`) writes what becomes of each row in the end, folded by `plan`, as one DELETE, UPDATE and
//! INSERT or COPY a table. A reader sees no difference, as a batch is one transaction in both. What
//! only row order does right (a trigger that fires, a column that SET cannot write) is written in
//! row order from the start; what the target refuses as a set is rolled back and written in row
//! order, and counted.
//!
//! # A row that is not there
//! An UPDATE that meets no row means that source and target differ, and must roll the batch back;
//! but COMMIT is already on its way in the same request. So each UPDATE and DELETE is wrapped in a
//! WITH whose count is cast to an error on the server when it is not what it must be. The rejected
//! alternative, to look at the counts before sending COMMIT, costs a second round trip a batch.
//!
//! # What survives a crash
//! Progress commits with the rows, so after any crash of either side [`Applier::progress`] is
//! exactly what is on the target, and transactions before it are skipped whole when they come again
//! (law 3). A transaction larger than a batch is written chunk by chunk inside one open target
//! transaction; cut off, it is rolled back by the server and comes again from its first chunk.
//! Positions of quiet times ([`Item::Idle`]) are not written to the target: a restart may see the
//! slot ahead of progress, with nothing of interest between.
//!
//! # Timeline
//! ```text
//! feed       T1 T2 T3 | T4 (large) ... chunk chunk commit | Idle
//! target     [T1 T2 T3]  [T4 ...........................]
//! applied_lsn         T3                              T4   idle
//! durable_lsn      (flush) T3                    (flush) T4 idle   <- what the slot may be told
//! ```
//!
//! `parking` keeps the changes of tables that cannot be written for now, `release` writes them when
//! they can. `altered` brings source tables that were altered and target tables together; `carried`
//! runs DDL that the source has captured. `sent` counts how batches went, `tuning` has sizes and
//! switches.
//!
//! `conflict` is the other way to write: to a target that applications write to as well.
//!
//! `lanes` is the second session that writes under a backlog, `claims` tells what may be written
//! there before the batch under way has landed; `landing` sends batches and takes their answers.
//!
//! [`Item::Idle`]: crate::change::Item::Idle

mod admit;
pub mod altered;
mod batch;
mod carried;
mod claims;
pub mod conflict;
mod count;
mod durable;
mod encode;
mod error;
mod flight;
mod folded;
mod gate;
mod growth;
mod image;
mod landing;
mod lanes;
mod lines;
mod native;
pub mod parked;
mod parking;
mod plan;
mod prepared;
mod progress;
mod release;
mod request;
mod routing;
mod rows;
mod run;
mod sent;
mod sets;
mod setwise;
mod shape;
mod standby;
mod statement;
mod target;
mod tuning;
mod writer;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

pub use count::BOOKS;
pub use error::{Culprit, Error, Result};
pub use gate::{Gate, Open};
pub use growth::Limits;
pub use parking::{OnRowError, Reason};
pub use progress::{ProgressKind, begin_at, durable_progress, forget, told_progress};
pub use tuning::{Mode, Tuning};

use altered::{Alter, Known};
use batch::Batcher;
use conflict::Settler;
use durable::Durable;
use growth::Growth;
use progress::Progress;
use writer::Writer;

use crate::change::{AllRead, Snapshot};
use crate::clock::PgTimestamp;
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::pg::{self, Config, Pipeline, Purpose, Session};

/// Makes the tables that applying writes beside the rows. May be run again and again. A schema
/// that is there is used as it is: `if not exists` would ask for CREATE on the database even then.
pub const DDL: &str = "do $$ begin if pg_catalog.to_regnamespace('walferry') is null then \
     create schema walferry; end if; end $$; \
     create table if not exists walferry.progress (\
     stream text primary key, end_lsn pg_lsn not null, counts text); \
     do $$ begin if not exists (select from pg_catalog.pg_attribute where attname = 'counts' \
     and attrelid = 'walferry.progress'::regclass and not attisdropped) then \
     alter table walferry.progress add column counts text; end if; end $$; \
     create table if not exists walferry.stream_table (\
     stream text, schema text, name text, decoded bigint not null, applied bigint not null, \
     filtered bigint not null, quarantined bigint not null, primary key (stream, schema, name)); \
     create table if not exists walferry.stream_fallback (\
     stream text primary key, batches bigint not null); \
     create table if not exists walferry.prepared (\
     stream text, xid bigint, primary key (stream, xid)); \
     create table if not exists walferry.parked (\
     stream text, schema text, name text, reason text not null, from_xid bigint not null, \
     from_ordinal bigint not null, from_lsn pg_lsn not null, begun boolean not null, \
     error text not null, awaited text, asked boolean not null default false, \
     since timestamptz not null default pg_catalog.clock_timestamp(), \
     primary key (stream, schema, name)); \
     create table if not exists walferry.parked_relation (\
     stream text, id text, description text not null, primary key (stream, id)); \
     create table if not exists walferry.parked_change (\
     id bigint generated always as identity primary key, stream text not null, \
     schema text not null, name text not null, relation text not null, xid bigint not null, \
     commit_lsn pg_lsn not null, ordinal bigint not null, operation text not null, \
     old_full boolean, old bytea, new bytea, error text); \
     create index if not exists parked_change_table \
     on walferry.parked_change (stream, schema, name, id); \
     create table if not exists walferry.source_table (\
     stream text, schema text, name text, columns text not null, \
     primary key (stream, schema, name)); \
     create table if not exists walferry.altered (\
     id bigint generated always as identity primary key, stream text not null, \
     schema text not null, name text not null, sql text not null, \
     at timestamptz not null default pg_catalog.clock_timestamp());";

/// Logical messages whose prefix starts with this are handed to [`Options::on_message`].
pub const MESSAGE_PREFIX: &str = "walferry";

/// Source transactions that are settled before positions are told.
const SETTLED_AT_ONCE: usize = 64;

/// Tells whether a table's changes are written.
pub type TableFilter = Arc<dyn Fn(&QualifiedName) -> bool + Send + Sync>;

/// Called for each message after its transaction is committed on the target. Must not block.
pub type MessageHook = Arc<dyn Fn(&Message) + Send + Sync>;

/// A logical message that came with the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Namespace chosen by the writer.
    pub prefix: String,
    /// The writer's bytes.
    pub content: Bytes,
    /// Where it stands in the source's log.
    pub lsn: Lsn,
}

/// How to apply one stream.
#[derive(Clone)]
pub struct Options {
    /// Name of the origin, of the progress row, and of the stream in `walferry.stream_table`.
    pub stream: String,
    /// Where progress is kept. Must not change during the life of a stream.
    pub progress: ProgressKind,
    /// Sets `session_replication_role = replica`, so that ordinary triggers, rules and foreign keys
    /// do not act. False only for roles that may not, whose triggers are disabled otherwise.
    pub replica_role: bool,
    /// Tables whose changes are written; those of others are counted as filtered. `None`: all.
    pub tables: Option<TableFilter>,
    /// What the copy read: changes of transactions that a table's snapshot sees are filtered.
    /// The position is one that every transaction the snapshot sees had committed before: beyond it
    /// the snapshot is not asked, as ids come round again.
    pub visibility: HashMap<QualifiedName, (Snapshot, Lsn)>,
    /// Changes of tables that it does not let through are filtered. Asked for every change.
    pub gate: Option<Arc<Gate>>,
    /// Takes messages with [`MESSAGE_PREFIX`]. At least once each: a crash may repeat one.
    pub on_message: Option<MessageHook>,
    /// How long to wait for an origin that a predecessor's backend still holds. The server notices
    /// a peer that is gone within about 25 s, see [`Applier::connect`].
    pub busy_wait: Duration,
    /// Sizes and switches.
    pub tuning: Tuning,
    /// What becomes of a row that the target refuses.
    pub on_row_error: OnRowError,
    /// Who says what becomes of tables that were altered; `None`: what does not fit is an error.
    pub alter: Option<Arc<dyn Alter>>,
    /// Applications write to the target as well.
    pub two_way: Option<conflict::TwoWay>,
    /// Tables of the target that are likely to be written: it is asked about them while the stream
    /// begins, and not when their first changes wait for it.
    pub expected: Vec<QualifiedName>,
    /// Whether the reader has anything left to do, where there is one that tells.
    pub all_read: AllRead,
}

impl Options {
    /// Everything of the stream, tagged with an origin.
    pub fn new(stream: impl Into<String>) -> Self {
        Options {
            stream: stream.into(),
            progress: ProgressKind::Origin,
            replica_role: true,
            tables: None,
            visibility: HashMap::new(),
            gate: None,
            on_message: None,
            busy_wait: Duration::from_secs(40),
            tuning: Tuning::default(),
            on_row_error: OnRowError::default(),
            alter: None,
            two_way: None,
            expected: Vec::new(),
            all_read: AllRead::default(),
        }
    }
}

/// How far the stream is applied. All positions are in the source's log.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Applied {
    /// Exclusive: everything that commits below it is on the target, committed.
    pub applied_lsn: Lsn,
    /// Exclusive: and no crash of the target can take it back. What the slot may be told.
    pub durable_lsn: Lsn,
    /// `applied_lsn` when a TRUNCATE ... RESTART IDENTITY was last seen to be committed, or may
    /// have been unseen before [`Applier::connect`]. Whoever read `applied_lsn` and then set the
    /// target's sequences has to do so again, if this is not below what was read.
    pub restarted_lsn: Lsn,
    /// End of the last transaction written; not moved by idleness.
    pub last_end_lsn: Lsn,
    /// When the source committed that transaction; `None` before the first of this run.
    pub commit_time: Option<PgTimestamp>,
    /// Source transactions written since [`Applier::connect`].
    pub transactions: u64,
    /// Row changes written since [`Applier::connect`], those of an open transaction included.
    pub rows: u64,
    /// Batches since [`Applier::connect`] that the target refused in set order, and took in row
    /// order.
    pub fallbacks: u64,
    /// Batches since [`Applier::connect`] that were begun in one session while another had the one
    /// before them.
    pub ahead: u64,
    /// The hold position that is in force: everything below it is durable, and nothing at or above
    /// it is applied before the hold is taken back, unless `last_end_lsn` says that it was already.
    pub held: Option<Lsn>,
}

/// Applies one stream to one target.
pub struct Applier {
    session: Session,
    progress: Progress,
    /// End of the last transaction recorded on the target.
    progress_lsn: Lsn,
    /// When progress was last recorded for idleness alone.
    recorded_at: Instant,
    writer: Writer,
    batcher: Batcher,
    growth: Growth,
    /// When the target was done with the last batch.
    landed_at: Instant,
    in_flight_max: usize,
    eager: bool,
    flush_after: Duration,
    /// What was under way has been canceled, for a shutdown.
    canceled: bool,
    durable: Durable,
    /// When the target was last made to flush its log.
    flushed_at: Instant,
    applied: Applied,
    /// The transaction under way restarts sequences of the target.
    restarting: bool,
    /// One that is over may have done so since that was last told.
    restarted: bool,
    on_message: Option<MessageHook>,
    on_row_error: OnRowError,
    alter: Option<Arc<dyn Alter>>,
    /// Descriptions of the source's tables; empty where nobody asks.
    known: Known,
    /// When parked tables were looked at last.
    parked_at: Instant,
    /// Where applications write to the target as well, who settles conflicts.
    settler: Option<Settler>,
    /// Tables that the target is asked about when the stream begins.
    expected: Vec<QualifiedName>,
}

impl Applier {
    /// Opens a session on the target and claims the stream's progress. [`DDL`] must have been run.
    ///
    /// The session asks the server to notice within about 25 s when this process or the network is
    /// gone, so that the claim is free again for a successor.
    pub async fn connect(config: &Config, mut options: Options) -> Result<Applier> {
        if options.two_way.is_some() {
            // They are written one by one, and somebody waits to hear how far. What is rolled back
            // must not wait among counts.
            let limits = &mut options.tuning.limits;
            limits.transactions = limits.transactions.min(SETTLED_AT_ONCE);
            options.tuning.counters_interval = Duration::ZERO;
        }
        let config = match &config.application_name {
            Some(_) => config.clone(),
            None => config.clone().with_application_name("walferry apply"),
        };
        let mut session = Session::connect(&config, Purpose::Sql).await?;
        let progress = Progress::of(&options.stream, options.progress);
        let settings = Settings::of(&options);
        let claimed = settings.set_up(&mut session, progress.claiming()).await?;
        progress.claim(&mut session, claimed, options.busy_wait).await?;
        let (progress_lsn, durable) = progress.open(&mut session).await?;
        let writer = Writer::new(&config, &mut session, &options).await?;
        let known = match &options.alter {
            Some(_) => altered::known(&mut session, &options.stream).await?,
            None => Known::new(),
        };
        let settler = match options.two_way {
            Some(two_way) => Some(Settler::open(&mut session, two_way, &options.stream).await?),
            None => None,
        };
        Ok(Applier {
            session,
            progress,
            progress_lsn,
            recorded_at: Instant::now(),
            writer,
            batcher: Batcher::new(progress_lsn, options.tuning.limits),
            growth: Growth::new(options.tuning.limits, options.tuning.limits_max),
            landed_at: Instant::now(),
            in_flight_max: options.tuning.in_flight_max.max(1),
            eager: options.tuning.eager,
            flush_after: options.tuning.flush_after,
            canceled: false,
            flushed_at: Instant::now(),
            applied: Applied {
                applied_lsn: progress_lsn,
                durable_lsn: durable.durable_lsn(),
                last_end_lsn: progress_lsn,
                ..Applied::default()
            },
            restarting: false,
            restarted: true,
            on_message: options.on_message,
            on_row_error: options.on_row_error,
            alter: options.alter,
            known,
            parked_at: Instant::now(),
            durable,
            settler,
            expected: options.expected,
        })
    }

    /// Exclusive: every source transaction that commits below it is on the target. `0/0` before the
    /// first. Read from the target when connecting, and moved by each batch.
    pub fn progress(&self) -> Lsn {
        self.progress_lsn
    }
}

/// How a session that writes is set up.
#[derive(Clone, Copy, Debug)]
struct Settings {
    replica_role: bool,
    async_commit: bool,
}

impl Settings {
    fn of(options: &Options) -> Settings {
        let Options { replica_role, tuning, .. } = options;
        Settings { replica_role: *replica_role, async_commit: tuning.async_commit }
    }

    /// Sets it up, and with that, as a target may be far away, tries to claim progress: gives what
    /// came of that.
    async fn set_up(self, session: &mut Session, claiming: Pipeline) -> Result<pg::Result<()>> {
        let mut settings = Pipeline::new();
        // The seal of a fence lets this session through by the one or the other.
        settings.once(match self.replica_role {
            true => "set session_replication_role = replica",
            false => "set walferry.applying = 'on'",
        });
        // An index is used wherever there is one, even if the planner saw the table when it was
        // small; the cost that this adds to scans must not start the JIT compiler. Sets are joined
        // to a table by its index, row by row, for the same reason.
        let jit = (session.major_version() >= 11).then_some("jit");
        let planner = ["enable_seqscan", "enable_hashjoin", "enable_mergejoin"];
        for name in planner.into_iter().chain(jit) {
            settings.once(&format!("set {name} = off"));
        }
        if self.async_commit {
            settings.once("set synchronous_commit = off");
        }
        let [set, claimed] = session.exchange_each([settings, claiming]).await?;
        if let Err(error) = set {
            // The others are everybody's to set.
            let grant = if session.major_version() >= 15 {
                |role: &str| format!("grant set on parameter session_replication_role to {role}")
            } else {
                |role: &str| format!("alter role {role} superuser")
            };
            return Err(refused(session, error, "set session_replication_role", grant).await);
        }
        session.pass_unknown_bytes().await?;
        Ok(claimed.map(|_| ()))
    }
}

/// A refusal for lack of rights (42501) with the SQL that grants them; any other error as it is.
async fn refused(
    session: &mut Session,
    error: pg::Error,
    what: &'static str,
    grant: impl Fn(&str) -> String,
) -> Error {
    if error.code() != Some("42501") {
        return error.into();
    }
    let asked = session.query_one("select current_user, pg_catalog.quote_ident(current_user)", &[]);
    let (role, quoted) = match asked.await {
        Ok(row) => (row.string(0).unwrap_or_default(), row.string(1).unwrap_or_default()),
        Err(_) => ("of the target".to_string(), "<role>".to_string()),
    };
    Error::Denied { role, what, sql: grant(&quoted), source: Box::new(error) }
}
