//! The job's own tables, in schema `walferry` of the home database (the target), and the few on the
//! source that the way back needs.
//!
//! State is in tables and not in files, so that status can be read by SQL from anywhere, a new host
//! can take over, and a switch commits together with its journal.

use serde::{Deserialize, Serialize};

use super::Result;
use super::ability::Abilities;
pub use super::ddl::DDL_BOTH;
use super::ddl::DDL_HOME;
use super::error::Error;
use super::failover::record_timeline;
use super::groups::Group;
pub use super::options::JobOptions;
use super::owners::Owners;
use super::place::Place;
pub use super::positions::StreamRow;
use super::reading::Readings;
use super::reads::ReadRecord;
use super::state::Phase;
use crate::id::{JobName, Stream};
use crate::lsn::Lsn;
use crate::pg::{self, Pipeline, Row, Session};

/// A row of `walferry.job`.
#[derive(Clone, Debug)]
pub struct JobRow {
    /// Where the job stands.
    pub phase: Phase,
    /// What stopped it, if something did.
    pub error: Option<String>,
    /// `pg_control_system()` identifier of the source when the job was made.
    pub source_system: Option<String>,
    /// The same of the target.
    pub target_system: Option<String>,
    /// Where the source was, without secrets.
    pub source: String,
    /// Where the target was, without secrets.
    pub target: String,
    /// The options the job was planned with.
    pub options: JobOptions,
    /// The slot's consistent point, once it exists.
    pub slot_lsn: Option<Lsn>,
    /// The reverse slot, publication and origin exist.
    pub armed: bool,
    /// The cutover or rollback under way, or the last one.
    pub flip: Option<FlipRecord>,
    /// Readers that were led to the target, or are on their way.
    pub reads: Option<ReadRecord>,
    /// Where the job's changes wait, if not in memory.
    pub spool: Option<Place>,
    /// The timelines that the streams have gone on with, where a standby took over.
    pub timelines: Timelines,
    /// What the roles could do when the job was made, which decides how each side is written.
    pub abilities: Abilities,
}

/// By stream, the timeline of the side that it reads; `None` where it is that of the slot's making.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timelines {
    /// Of the source; set by whoever reads the slot, once all it has in hand is from before the
    /// fork.
    pub forward: Option<u32>,
    /// Of the target, likewise.
    pub reverse: Option<u32>,
    /// Of the source; set once all that the copy has seen is from before the fork.
    pub copied: Option<u32>,
}

/// What a flip needs to be undone or finished by another process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlipRecord {
    /// The phase it began in, and goes back to when it is undone.
    #[serde(default)]
    pub from: String,
    /// Tells attempts apart in the journal.
    pub attempt: String,
    /// `forward` (cutover) or `reverse` (rollback).
    pub flip: String,
    /// `lock`, `read-only` or `none`.
    pub fence: String,
    /// Routes as given on the command line, without passwords.
    pub routes: Vec<String>,
    /// Those of them that a person has given up.
    #[serde(default)]
    pub skipped: Vec<String>,
    /// Routes of earlier flips that are not among these: what they kept on disk goes with the job.
    #[serde(default)]
    pub earlier_routes: Vec<String>,
    /// Clients were let through after the point of no return.
    pub released: bool,
    /// The barrier, once the point of no return is passed.
    #[serde(default)]
    pub switched_lsn: Option<String>,
    /// How long writers had been held by then, in milliseconds.
    #[serde(default)]
    pub fenced_ms: Option<f64>,
    /// Materialized views are still to be refreshed on the side that became live.
    #[serde(default)]
    pub refresh_due: bool,
    /// The tables that it is about, where those are not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Group>,
}

impl FlipRecord {
    /// The routes that are not given up.
    pub fn waiting(&self) -> Vec<String> {
        let waits = |route: &&String| !self.skipped.contains(route);
        self.routes.iter().filter(waits).cloned().collect()
    }
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JournalLine {
    /// Name of the step.
    pub step: String,
    /// How long it took; `None` for one that was begun and not ended.
    pub ms: Option<f64>,
}

/// The job's tables, through one session with the home database.
#[derive(Debug)]
pub struct Store {
    /// The session; callers may use it for their own statements between calls.
    pub session: Session,
    job: JobName,
    /// As they were last read or written.
    pub(super) known_owners: Option<Owners>,
    /// What [`Store::holding`] has read.
    held: Option<(JobRow, Readings)>,
}

impl Store {
    /// Wraps a session with the home database. Makes nothing.
    pub fn new(session: Session, job: JobName) -> Store {
        Store { session, job, known_owners: None, held: None }
    }

    /// The job's name.
    pub fn job(&self) -> &JobName {
        &self.job
    }

    /// Makes schema and tables where they are missing. `more` is DDL of the rooms below.
    pub async fn ensure(&mut self, more: &[&str]) -> Result<()> {
        let canary = crate::cutover::canary::ddl(&self.job);
        ensure(&mut self.session, &[&[DDL_BOTH, &canary, DDL_HOME], more].concat()).await
    }

    /// True if the job's tables exist here.
    pub async fn exists(&mut self) -> Result<bool> {
        let row = self
            .session
            .query_one("select pg_catalog.to_regclass('walferry.job') is not null", &[])
            .await?;
        Ok(row.bool(0)?)
    }

    /// Reads the job's row once, for all who ask until something is stored or
    /// [`Store::forget`]: for a runner that begins. It has the lease, and nobody else stores
    /// anything before its streams run and it takes commands. The home may be far away, and is
    /// asked a dozen times by then; so it is where this is not to be done `ahead`.
    pub async fn holding(session: Session, job: JobName, ahead: bool) -> Result<Store> {
        let mut store = Store::new(session, job);
        if !ahead {
            return Ok(store);
        }
        let asked = [LOAD, Readings::LOAD].map(|sql| {
            let mut pipeline = Pipeline::new();
            pipeline.ask(sql, &[Some(store.job.as_str())]);
            pipeline
        });
        let [row, readings] = store.session.exchange_each(asked).await?;
        if let (Some(row), Ok(readings)) = (loaded(row)?, readings) {
            store.held = Some((row, Readings::read(readings.first())?));
        }
        Ok(store)
    }

    /// See [`record_timeline`]; what is held of the row is forgotten.
    pub async fn record_timeline(&mut self, what: &str, timeline: u32) -> Result<()> {
        record_timeline(&mut self.session, &self.job, what, timeline).await?;
        self.forget();
        Ok(())
    }

    /// From here on the row is read anew.
    pub fn forget(&mut self) {
        self.held = None;
    }

    /// What is held of how the streams are read.
    pub(super) fn held_readings(&self) -> Option<&Readings> {
        self.held.as_ref().map(|(_, readings)| readings)
    }

    /// The job's row, `None` where there is no such job or no tables.
    pub async fn load(&mut self) -> Result<Option<JobRow>> {
        if let Some((row, _)) = &self.held {
            return Ok(Some(row.clone()));
        }
        loaded(self.session.query_params(LOAD, &[Some(self.job.as_str())]).await)
    }

    /// The job's row; an error that names job and server where there is none.
    pub async fn load_existing(&mut self) -> Result<JobRow> {
        match self.load().await? {
            Some(row) => Ok(row),
            None => Err(self.no_job().await),
        }
    }

    /// The error for a job that is not here, which names those that are.
    pub async fn no_job(&mut self) -> Error {
        let sql = "select string_agg(pg_catalog.quote_ident(name), ', ' order by name) \
                   from walferry.job";
        let named = self.session.query_one(sql, &[]).await;
        let others = named.ok().and_then(|row| row.opt(0).ok().flatten().map(str::to_string));
        let (job, peer) = (self.job.to_string(), self.session.peer().to_string());
        Error::NoJob { job, peer, others: others.unwrap_or_default() }
    }

    /// Writes a new job down, in phase planned. Harmless if it exists.
    pub async fn create(
        &mut self,
        (source, target): (&str, &str),
        systems: (&str, &str),
        options: &JobOptions,
        abilities: Abilities,
    ) -> Result<()> {
        self.forget();
        let (options, abilities) = (json(options)?, json(&abilities)?);
        self.session
            .query_params(
                "insert into walferry.job (name, phase, source, target, source_system, \
                 target_system, options, abilities) \
                 values ($1, 'planned', $2, $3, $4, $5, $6::jsonb, $7::jsonb) \
                 on conflict (name) do nothing",
                &[
                    Some(self.job.as_str()),
                    Some(source),
                    Some(target),
                    Some(systems.0),
                    Some(systems.1),
                    Some(&options),
                    Some(&abilities),
                ],
            )
            .await?;
        Ok(())
    }

    /// Sets one column of the job's row to a text value.
    async fn set(&mut self, column: &str, value: Option<&str>) -> Result<()> {
        self.forget();
        let sql =
            format!("update walferry.job set {column} = $2, updated_at = now() where name = $1");
        self.session.query_params(&sql, &[Some(self.job.as_str()), value]).await?;
        Ok(())
    }

    /// Stores the phase and forgets the error.
    pub async fn set_phase(&mut self, phase: Phase) -> Result<()> {
        self.forget();
        self.session
            .query_params(
                "update walferry.job set phase = $2, error = null, updated_at = now() \
                 where name = $1",
                &[Some(self.job.as_str()), Some(&phase.to_string())],
            )
            .await?;
        Ok(())
    }

    /// What stopped the last run is either mended or about to be said again.
    pub async fn forget_error(&mut self) -> Result<()> {
        match self.load_existing().await?.error {
            Some(_) => self.set_error(None).await,
            None => Ok(()),
        }
    }

    /// Stores what stopped the job, `None` to forget it.
    pub async fn set_error(&mut self, error: Option<&str>) -> Result<()> {
        self.set("error", error).await
    }

    /// Stores which server a stream's slot was made on, and on which timeline.
    pub async fn set_system(&mut self, stream: Stream, system: &str) -> Result<()> {
        self.forget();
        let column = match stream {
            Stream::Forward => "source_system",
            Stream::Reverse => "target_system",
        };
        let sql = format!(
            "update walferry.job set {column} = $2, timelines = timelines - $3::text \
             where name = $1"
        );
        let stream = stream.to_string();
        let params = [Some(self.job.as_str()), Some(system), Some(&*stream)];
        self.session.query_params(&sql, &params).await?;
        Ok(())
    }

    /// Stores the slot's consistent point.
    pub async fn set_slot_lsn(&mut self, lsn: Lsn) -> Result<()> {
        self.set("slot_lsn", Some(&lsn.to_string())).await
    }

    /// Stores whether the way back is armed.
    pub async fn set_armed(&mut self, armed: bool) -> Result<()> {
        self.set("armed", Some(if armed { "true" } else { "false" })).await
    }

    /// Stores where the job's changes wait.
    pub async fn set_spool(&mut self, place: Option<&Place>) -> Result<()> {
        let place = place.map(json).transpose()?;
        self.set("spool", place.as_deref()).await
    }

    /// Stores the flip under way.
    pub async fn set_flip(&mut self, flip: &FlipRecord) -> Result<()> {
        let flip = json(flip)?;
        self.set("flip", Some(&flip)).await
    }

    /// Stores where readers are, with a line in the journal: one commit.
    pub async fn set_reads(
        &mut self,
        attempt: &str,
        step: &str,
        reads: Option<&ReadRecord>,
    ) -> Result<()> {
        self.forget();
        let reads = reads.map(json).transpose()?;
        self.session
            .query_params(
                "with noted as (insert into walferry.journal (job, attempt, flip, step, ms) \
                 values ($1, $3, 'reads', $4, 0)) \
                 update walferry.job set reads = $2::jsonb, updated_at = now() where name = $1",
                &[Some(self.job.as_str()), reads.as_deref(), Some(attempt), Some(step)],
            )
            .await?;
        Ok(())
    }

    /// Stores which routes were given up, unless another flip has begun since.
    pub async fn set_skipped(&mut self, flip: &FlipRecord) -> Result<()> {
        self.forget();
        self.session
            .query_params(
                "update walferry.job set flip = pg_catalog.jsonb_set(flip, '{skipped}', $2::jsonb) \
                 where name = $1 and flip ->> 'attempt' = $3",
                &[Some(self.job.as_str()), Some(&json(&flip.skipped)?), Some(&flip.attempt)],
            )
            .await?;
        Ok(())
    }

    /// Stores the phase and the flip together, where a flip begins.
    ///
    /// Committed synchronously: all that the target applied before is durable when this returns.
    pub async fn set_phase_and_flip(&mut self, phase: Phase, flip: &FlipRecord) -> Result<()> {
        self.forget();
        let flip = json(flip)?;
        self.session
            .query_params(
                "update walferry.job set phase = $2, flip = $3::jsonb, error = null, \
                 updated_at = now() where name = $1",
                &[Some(self.job.as_str()), Some(&phase.to_string()), Some(&flip)],
            )
            .await?;
        Ok(())
    }

    /// Keeps the dump, so that a resume builds the same schema.
    pub async fn save_dump(&mut self, pre: &str, post: &str) -> Result<()> {
        self.session
            .query_params(
                "insert into walferry.schema_dump values ($1, $2, $3) on conflict (job) \
                 do update set pre = excluded.pre, post = excluded.post",
                &[Some(self.job.as_str()), Some(pre), Some(post)],
            )
            .await?;
        Ok(())
    }

    /// The kept dump: pre-data and post-data.
    pub async fn load_dump(&mut self) -> Result<Option<(String, String)>> {
        let row = self
            .session
            .query_opt(
                "select pre, post from walferry.schema_dump where job = $1",
                &[Some(self.job.as_str())],
            )
            .await?;
        Ok(match row {
            Some(row) => Some((row.string(0)?, row.string(1)?)),
            None => None,
        })
    }
}

/// Held by whoever makes a job's tables, until what shows that the schema is in use is there: no
/// other's clean-up drops it meanwhile.
pub(super) const BESIDE: &str = "pg_catalog.pg_advisory_lock_shared(7823, 1)";

/// Ends that.
pub(super) const NOT_BESIDE: &str = "pg_catalog.pg_advisory_unlock_shared(7823, 1)";

/// True if nobody does, until the transaction's end. Never waited for by those who hold it on
/// another database, as they may wait for each other's.
pub(super) const TRY_ALONE: &str = "pg_catalog.pg_try_advisory_xact_lock(7823, 1)";

/// Runs idempotent DDL quietly, one statement list after another, under a lock of our own so that
/// two processes starting together do not trip over `if not exists`.
pub async fn ensure(session: &mut Session, ddl: &[&str]) -> Result<()> {
    let mut sql = String::from(
        "begin; set local client_min_messages = error; \
         select pg_catalog.pg_advisory_xact_lock(7823, 0);",
    );
    for text in ddl {
        sql.push_str(text.trim_end().trim_end_matches(';'));
        sql.push_str(";\n");
    }
    sql.push_str("commit");
    let outcome = session.execute(&sql).await;
    if outcome.is_err() && session.in_transaction() {
        session.execute("rollback").await?;
    }
    outcome?;
    Ok(())
}

/// A job's row.
const LOAD: &str = "select phase, error, source_system, target_system, source, target, options, \
     slot_lsn, armed, flip, abilities, spool, reads, \
     coalesce(pg_catalog.to_jsonb(j) ->> 'timelines', '{}') \
     from walferry.job j where name = $1";

/// What [`LOAD`] gave.
fn loaded(rows: pg::Result<Vec<Row>>) -> Result<Option<JobRow>> {
    match rows {
        Ok(rows) => rows.first().map(read_job).transpose(),
        // No such table, or no such schema.
        Err(error) if matches!(error.code(), Some("42P01" | "3F000")) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read_job(row: &Row) -> Result<JobRow> {
    let text = |i| row.opt(i).map(|v| v.map(str::to_string));
    let flip = row.opt(9)?.map(serde_json::from_str).transpose();
    let spool = row.opt(11)?.map(serde_json::from_str).transpose();
    let reads = row.opt(12)?.map(serde_json::from_str).transpose();
    Ok(JobRow {
        phase: row.str(0)?.parse().map_err(Error::State)?,
        error: text(1)?,
        source_system: text(2)?,
        target_system: text(3)?,
        source: row.string(4)?,
        target: row.string(5)?,
        options: serde_json::from_str(row.str(6)?)
            .map_err(|e| Error::State(format!("walferry.job.options: {e}")))?,
        slot_lsn: row.parse_opt(7)?,
        armed: row.bool(8)?,
        flip: flip.map_err(|e| Error::State(format!("walferry.job.flip: {e}")))?,
        reads: reads.map_err(|e| Error::State(format!("walferry.job.reads: {e}")))?,
        spool: spool.map_err(|e| Error::State(format!("walferry.job.spool: {e}")))?,
        timelines: serde_json::from_str(row.str(13)?)
            .map_err(|e| Error::State(format!("walferry.job.timelines: {e}")))?,
        abilities: serde_json::from_str(row.str(10)?)
            .map_err(|e| Error::State(format!("walferry.job.abilities: {e}")))?,
    })
}

pub(super) fn json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::State(e.to_string()))
}
