//! How far a stream is applied, kept in the same target transaction as the rows (law 2).
//!
//! The truth is a row of `walferry.progress`, updated in the transaction from the very value that
//! was read before: of two appliers at work by mistake, one then fails.
//!
//! Where the role may use replication origins, the session is set up with one as well, but as a tag
//! only: every row carries it, so that nothing comes back on the reverse stream, and only one
//! session can hold it. Its position is not used. From PostgreSQL 16 on a transaction that aborts
//! after `pg_replication_origin_xact_setup` (a COMMIT refused by a deferred constraint, a backend
//! ended between the two) moves the origin all the same, and the batch would be taken for applied.
//!
//! Where it may not, the row itself is the tag: it is written before anything else in every
//! transaction, and whoever reads the written side knows by a first change to `walferry.progress`
//! that the rest is ours. A row is shown by every decoder of every version, as a logical message is
//! not.
//!
//! <https://www.postgresql.org/docs/current/replication-origins.html>

use std::time::Duration;

use super::count::Entry;
use super::durable::Durable;
use super::error::{Error, Result};
use super::standby::POSITION;
use super::statement::GUARD_PREFIX;
use super::{DDL, count, refused};
use crate::clock::Deadline;
use crate::id::{quote_literal, second_origin};
use crate::lsn::Lsn;
use crate::pg::{self, Pipeline, Row, Session};

/// How what is written is told from what applications write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressKind {
    /// By a replication origin of the stream's name.
    Origin,
    /// By its first change, which is to the stream's row of `walferry.progress`: the role may not
    /// use origins.
    Table,
}

/// An open claim on a stream's progress, for as long as the session lives.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    stream: String,
    kind: ProgressKind,
}

/// Name of the prepared statement that records progress.
const RECORD: &str = "walferry_progress";

/// And of the one that changes the counts beside it as well.
const RECORD_COUNTS: &str = "walferry_progress_counts";

/// Name of the prepared statement that marks a transaction whose end is not known yet.
const MARK: &str = "walferry_mark";

/// Takes a replication origin for the session.
const CLAIM: &str = "select pg_catalog.pg_replication_origin_session_setup($1)";

/// How often an origin that is in use is asked for again.
const BUSY_STEP: Duration = Duration::from_millis(50);

impl Progress {
    /// Of a stream; nothing is claimed yet.
    pub fn of(stream: &str, kind: ProgressKind) -> Progress {
        Progress { stream: stream.to_string(), kind }
    }

    /// Asks for the claim, if there is anything to be claimed.
    pub fn claiming(&self) -> Pipeline {
        let mut pipeline = Pipeline::new();
        if self.kind == ProgressKind::Origin {
            pipeline.ask(CLAIM, &[Some(&self.stream)]);
        }
        pipeline
    }

    /// Goes on from what came of [`Progress::claiming`]. An origin that is in use, by a
    /// predecessor's backend that has not noticed its end, is waited for up to `busy_wait`; then an
    /// error names its pid.
    pub async fn claim(
        &self,
        session: &mut Session,
        claimed: pg::Result<()>,
        busy_wait: Duration,
    ) -> Result<()> {
        let name = Some(self.stream.as_str());
        let deadline = Deadline::after(busy_wait);
        let mut claimed = claimed;
        loop {
            let Err(error) = claimed else { return Ok(()) };
            match error.code() {
                // In use.
                Some("55006") if deadline.passed() => {
                    return Err(Error::OriginBusy {
                        origin: self.stream.clone(),
                        pid: pid_of(&error),
                        seconds: busy_wait.as_secs(),
                    });
                }
                Some("55006") => tokio::time::sleep(BUSY_STEP).await,
                // There is none of that name.
                Some("42704") => {
                    match make_origin(session, &self.stream).await {
                        // 42710: made by somebody else just now.
                        Err(error) if error.code() != Some("42710") => {
                            return Err(denied(session, error).await);
                        }
                        _ => {}
                    }
                }
                _ => return Err(denied(session, error).await),
            }
            claimed = session.query_params(CLAIM, &[name]).await.map(|_| ());
        }
    }

    /// Makes the stream's row, at 0/0, if there is none yet, and gives the position up to which
    /// (exclusive) the stream is applied. That much is flushed to the target's disk, if not to that
    /// of a standby that may take over. One round trip.
    pub async fn open(&self, session: &mut Session) -> Result<(Lsn, Durable)> {
        let mut position = Pipeline::new();
        position.once(POSITION);
        let asked = [self.preparing(), self.flushing(), position];
        let [prepared, flushed, position] = session.exchange_each(asked).await?;
        prepared.map_err(no_state)?;
        let lsn = self.flushed(&flushed?)?;
        Ok((lsn, Durable::standing(position?.first(), lsn)?))
    }

    /// Makes the row, if there is none, enters what is counted beside it in its table, and prepares
    /// the statements that write it.
    fn preparing(&self) -> Pipeline {
        let mut pipeline = Pipeline::new();
        let stream = quote_literal(&self.stream);
        pipeline.once("begin");
        pipeline.once(&format!(
            "insert into walferry.progress (stream, end_lsn) values ({stream}, '0/0') \
             on conflict (stream) do nothing"
        ));
        // The row first: it may be the transaction's tag.
        let waiting = format!("where stream = {stream} and counts is not null");
        pipeline.once(&format!("update walferry.progress set end_lsn = end_lsn {waiting}"));
        pipeline.once(&count::enter_waiting(&stream));
        pipeline.once(&format!("update walferry.progress set counts = null {waiting}"));
        pipeline.once("commit");
        self.prepare(&mut pipeline);
        pipeline
    }

    /// Prepares the statements that write the row.
    pub fn prepare(&self, pipeline: &mut Pipeline) {
        // A batch that a predecessor left in the server's socket knows of counts that are entered
        // now, and must fail as it does where progress has moved.
        let counts = (", counts = $4::text", " and (counts is null) = $5::bool");
        for (name, (set, guard)) in [(RECORD, ("", "")), (RECORD_COUNTS, counts)] {
            let sql = format!(
                "with u as (update walferry.progress set end_lsn = $2::pg_lsn{set} \
                 where stream = $1::text and end_lsn = $3::pg_lsn{guard} returning 1) \
                 select case when pg_catalog.count(*) = 1 then 1 \
                 else pg_catalog.concat('{GUARD_PREFIX}', pg_catalog.count(*))::int end from u"
            );
            pipeline.parse(name, &sql, &[]);
        }
        let mark = "update walferry.progress set end_lsn = end_lsn where stream = $1::text";
        pipeline.parse(MARK, mark, &[]);
    }

    /// True if a transaction's first statement has to be to the stream's row.
    pub fn is_marker(&self) -> bool {
        self.kind == ProgressKind::Table
    }

    /// Adds the statement, one, that tags a transaction whose end is in a later batch.
    pub fn mark(&self, pipeline: &mut Pipeline) {
        pipeline.run(MARK, [Some(self.stream.as_bytes())].into_iter());
    }

    /// Adds the statement, one, that moves progress from `previous_lsn` to `end_lsn` when the
    /// target transaction commits, with the counts that `entry` leaves beside it.
    pub fn record(&self, pipeline: &mut Pipeline, previous_lsn: Lsn, end_lsn: Lsn, entry: &Entry) {
        let (end_lsn, previous_lsn) = (end_lsn.to_string(), previous_lsn.to_string());
        let params = [&*self.stream, &*end_lsn, &*previous_lsn].map(|p| Some(p.as_bytes()));
        match entry.beside() {
            None => pipeline.run(RECORD, params.into_iter()),
            Some((waited, counts)) => {
                let is_null = if waited { "f" } else { "t" };
                let more = [counts, Some(is_null)].map(|p| p.map(str::as_bytes));
                pipeline.run(RECORD_COUNTS, params.into_iter().chain(more));
            }
        }
    }

    /// Reads progress and has the target flush its log up to it, so that every commit of this
    /// session, and of its predecessors under the same stream, is durable on return.
    pub async fn flush(&self, session: &mut Session) -> Result<Lsn> {
        let [flushed] = session.exchange_each([self.flushing()]).await?;
        self.flushed(&flushed?)
    }

    /// A commit that waits for its flush, and with it for all before it.
    fn flushing(&self) -> Pipeline {
        let mut pipeline = Pipeline::new();
        pipeline.once("begin");
        pipeline.once("set local synchronous_commit = local");
        let row = "update walferry.progress set end_lsn = end_lsn where stream = $1 \
             returning end_lsn";
        pipeline.ask(row, &[Some(&self.stream)]);
        pipeline.once("commit");
        pipeline
    }

    fn flushed(&self, rows: &[Row]) -> Result<Lsn> {
        let row = rows.first().ok_or_else(|| {
            Error::Broken(format!(
                "the row of stream \"{}\" is gone from walferry.progress",
                self.stream
            ))
        })?;
        Ok(row.lsn(0)?)
    }

    /// The error that a failed [`Progress::record`] stands for.
    pub async fn explain(&self, session: &mut Session, error: pg::Error) -> Error {
        let moved = error.server().is_some_and(|e| e.message.contains(GUARD_PREFIX));
        if moved {
            return Error::ProgressMoved { stream: self.stream.clone() };
        }
        denied(session, error).await
    }
}

async fn make_origin(session: &mut Session, name: &str) -> pg::Result<()> {
    let create = "select pg_catalog.pg_replication_origin_create($1)";
    session.query_params(create, &[Some(name)]).await.map(|_| ())
}

async fn denied(session: &mut Session, error: pg::Error) -> Error {
    let grants = |role: &str| {
        format!(
            "grant execute on function pg_replication_origin_create(text), \
             pg_replication_origin_session_setup(text), \
             pg_replication_origin_session_progress(boolean), \
             pg_replication_origin_xact_setup(pg_lsn, timestamptz) to {role} (as a superuser, in \
             the database that is written to)"
        )
    };
    refused(session, error, "use replication origins", grants).await
}

fn no_state(error: pg::Error) -> Error {
    match error.code() {
        // A column that an earlier version's table has not is made by the same.
        Some("3F000" | "42P01" | "42703") => Error::NoState { ddl: DDL, source: Box::new(error) },
        _ => error.into(),
    }
}

/// The server says "... is already active for PID 123", in its language; the pid comes last.
fn pid_of(error: &pg::Error) -> String {
    let message = error.server().map_or("", |e| e.message.as_str());
    let pid = message.rsplit(|c: char| !c.is_ascii_digit()).find(|part| !part.is_empty());
    pid.unwrap_or("unknown").to_string()
}

/// Sets the progress of a stream whose slot was just made, forgetting what an earlier stream of the
/// same name left (law 4: a new slot never meets old progress). `end_lsn` is the slot's consistent
/// point, exclusive: everything that commits below it is in the snapshot.
pub async fn begin_at(
    session: &mut Session,
    stream: &str,
    kind: ProgressKind,
    end_lsn: Lsn,
) -> Result<()> {
    forget(session, stream).await?;
    if kind == ProgressKind::Origin
        && let Err(error) = make_origin(session, stream).await
    {
        return Err(denied(session, error).await);
    }
    let row = "insert into walferry.progress (stream, end_lsn) values ($1, $2::pg_lsn)";
    session.query_params(row, &[Some(stream), Some(&*end_lsn.to_string())]).await?;
    Ok(())
}

/// The progress of a stream that is not being applied, on the target's own disk on return. Error if
/// it has none.
pub async fn durable_progress(session: &mut Session, stream: &str) -> Result<Lsn> {
    // Of either kind the row is the truth, and the first thing written.
    Progress { stream: stream.to_string(), kind: ProgressKind::Table }.flush(session).await
}

/// The same, and what of it a slot may be told: `0/0` while a standby that the target's commits
/// wait for lacks some of it.
pub async fn told_progress(session: &mut Session, stream: &str) -> Result<(Lsn, Lsn)> {
    let progress_lsn = durable_progress(session, stream).await?;
    let durable = super::standby::beginning(session, progress_lsn).await?;
    Ok((progress_lsn, durable.durable_lsn()))
}

/// Drops a stream's progress and its counters, and rolls back what it has prepared. Harmless if
/// there are none. The stream must not be running.
pub async fn forget(session: &mut Session, stream: &str) -> Result<()> {
    // Asked first: who may not call the function may not call it for no rows either.
    let known = "select 1 from pg_catalog.pg_replication_origin where roname = $1";
    for origin in [stream, &second_origin(stream)] {
        if session.query_opt(known, &[Some(origin)]).await?.is_some() {
            let drop = "select pg_catalog.pg_replication_origin_drop($1)";
            if let Err(error) = session.query_params(drop, &[Some(origin)]).await {
                return Err(denied(session, error).await);
            }
        }
    }
    super::prepared::roll_back_all(session, stream).await?;
    super::parking::forget(session, stream).await?;
    let two_way = ["stream_lost", "two_way", "two_way_applied"];
    let tables = ["progress", "stream_table", "stream_fallback", "prepared"];
    for table in tables.into_iter().chain(two_way) {
        let there = format!("select pg_catalog.to_regclass('walferry.{table}') is not null");
        if session.query_one(&there, &[]).await?.bool(0)? {
            let sql = format!("delete from walferry.{table} where stream = $1");
            session.query_params(&sql, &[Some(stream)]).await?;
        }
    }
    Ok(())
}
