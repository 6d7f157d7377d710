//! `--heartbeat`: something of ours in the source's log now and then, and how long it takes to the
//! target.
//!
//! A slot of an idle database does not need it to move on: keepalives say how far the log is, and
//! pass through the stream like changes do. What they cannot say is whether the way is open: while
//! nothing comes, a source at rest and a network that swallows everything look alike. A heartbeat
//! is missed when it does not arrive, and so is the measure of lag while nobody writes.
//!
//! One beat: read where the log ends, commit something beyond that, and wait until the target has
//! applied that far. So it needs not be shown by the decoder, and a user's own statement will do as
//! well. What is committed is a logical message where the decoder shows those, else a row of the
//! job's canary table, which is in the stream already.
//!
//! <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::pipeline::Task;
use super::reading::Reading;
use super::run::{JobConfig, Runner};
use super::state::Phase;
use super::{Error, Result};
use crate::apply::Applied;
use crate::decode::Plugin;
use crate::id::{QualifiedName, Stream};
use crate::lsn::Lsn;
use crate::pg::{Config, Session};

/// Beats that have not arrived and are remembered; what is sent beyond is not measured.
const OUTSTANDING_MAX: usize = 1000;

/// `--heartbeat` and what goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeartbeatOptions {
    /// Time between two beats.
    pub interval: Duration,
    /// `--heartbeat-sql`: what is run on the source for each, in place of what is ours.
    pub sql: Option<String>,
}

/// Beats that are sent for as long as this lives.
#[derive(Debug)]
pub(super) struct Heartbeat {
    beats: Arc<Mutex<Beats>>,
    _task: Task<()>,
}

/// Beats on their way.
#[derive(Debug, Default)]
struct Beats {
    /// Oldest first: where the log stood, once that is known, and when it was sent.
    sent: VecDeque<(Option<Lsn>, Instant)>,
    /// How long the last one took.
    took: Option<Duration>,
}

impl Beats {
    /// All beats up to the last one below `applied_lsn` have arrived. One that could not be sent
    /// goes with a later one that could.
    fn arrived(&mut self, applied_lsn: Lsn, now: Instant) {
        let there = |(lsn, _): &(Option<Lsn>, Instant)| lsn.is_some_and(|lsn| applied_lsn >= lsn);
        let Some(last) = self.sent.iter().rposition(there) else { return };
        if let Some((_, sent)) = self.sent.drain(..=last).next_back() {
            self.took = Some(now.saturating_duration_since(sent));
        }
    }

    /// How far the target is behind: as long as the last beat took, or as the oldest that has not
    /// arrived has been under way. `None` before the first.
    fn lag(&self, now: Instant) -> Option<Duration> {
        let waiting = self.sent.front().map(|(_, sent)| now.saturating_duration_since(*sent));
        waiting.max(self.took)
    }
}

impl Heartbeat {
    /// Begins to send; the first beat goes out at once. Does not wait for a connection.
    fn start(
        source: Config,
        options: HeartbeatOptions,
        sql: String,
        mut applied: watch::Receiver<Applied>,
    ) -> Heartbeat {
        let beats = Arc::new(Mutex::new(Beats::default()));
        let shared = beats.clone();
        let task = tokio::spawn(async move {
            let mut session = None;
            let mut turn = tokio::time::interval(options.interval);
            turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = turn.tick() => beat(&shared, &source, &sql, &mut session).await,
                    changed = applied.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        let applied_lsn = applied.borrow_and_update().applied_lsn;
                        lock(&shared).arrived(applied_lsn, Instant::now());
                    }
                }
            }
        });
        Heartbeat { beats, _task: Task(task) }
    }

    /// Seconds that the target is behind; `None` before the first beat.
    pub fn lag_seconds(&self) -> Option<f64> {
        lock(&self.beats).lag(Instant::now()).map(|lag| lag.as_secs_f64())
    }
}

fn lock(beats: &Mutex<Beats>) -> std::sync::MutexGuard<'_, Beats> {
    beats.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends one. A source that cannot be reached is asked again with the next.
async fn beat(beats: &Mutex<Beats>, source: &Config, sql: &str, session: &mut Option<Session>) {
    {
        let mut beats = lock(beats);
        if beats.sent.len() < OUTSTANDING_MAX {
            beats.sent.push_back((None, Instant::now()));
        }
    }
    match send(source, sql, session).await {
        Ok(lsn) => {
            if let Some((sent, _)) = lock(beats).sent.back_mut() {
                *sent = Some(lsn);
            }
        }
        Err(error) => {
            tracing::warn!(%error, "a heartbeat could not be sent");
            *session = None;
        }
    }
}

/// Commits something beyond the position that it gives.
async fn send(source: &Config, sql: &str, session: &mut Option<Session>) -> Result<Lsn> {
    let open = match session {
        Some(open) => open,
        None => session.insert(Session::control(source).await?),
    };
    let row = open.query_one("select pg_catalog.pg_current_wal_insert_lsn()", &[]).await?;
    open.query(sql).await?;
    Ok(row.lsn(0)?)
}

/// What each beat runs on the source.
async fn choose(
    session: &mut Session,
    options: &HeartbeatOptions,
    reading: &Reading,
    canary: &QualifiedName,
) -> Result<String> {
    if let Some(sql) = &options.sql {
        return Ok(sql.clone());
    }
    let asked = "select coalesce((select pg_catalog.bool_or( \
             pg_catalog.has_function_privilege(oid, 'execute')) \
           from pg_catalog.pg_proc where proname = 'pg_logical_emit_message' \
           and pronamespace = 'pg_catalog'::pg_catalog.regnamespace), false), \
         exists (select from pg_catalog.pg_class c \
           join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
           where n.nspname = $1 and c.relname = $2 \
           and pg_catalog.has_schema_privilege(n.oid, 'usage') \
           and pg_catalog.has_table_privilege(c.oid, 'insert') \
           and pg_catalog.has_table_privilege(c.oid, 'update')), current_user";
    let row = session.query_one(asked, &[Some(&canary.schema), Some(&canary.name)]).await?;
    let (may_emit, has_table) = (row.bool(0)?, row.bool(1)?);
    let shown = reading.plugin()? != Plugin::Pgoutput || session.major_version() >= 14;
    match (may_emit, has_table) {
        // Not shown, its commit is: as an empty transaction, or by the position after it.
        (true, has_table) if shown || !has_table => Ok(MESSAGE.to_string()),
        (_, true) => Ok(format!(
            "insert into {} values ('heartbeat', pg_catalog.clock_timestamp()::text) \
             on conflict (leg) do update set token = excluded.token",
            canary.quoted()
        )),
        _ => Err(Error::NoHeartbeat { role: row.string(2)? }),
    }
}

const MESSAGE: &str = "select pg_catalog.pg_logical_emit_message(true, 'walferry_heartbeat', \
     pg_catalog.clock_timestamp()::text)";

impl Runner {
    /// Lets the source's heart beat while the forward stream flows, if that is asked for.
    ///
    /// Error: the role may neither send a message nor write a row (`NoHeartbeat`).
    pub(super) async fn keep_heartbeat(&mut self, phase: Phase) -> Result<()> {
        let flows = matches!(
            phase,
            Phase::CatchingUp | Phase::Following | Phase::Split | Phase::RolledBack
        );
        let (Some(options), Some(pipe)) = (self.config.heartbeat.clone(), &self.forward) else {
            self.heartbeat = None;
            return Ok(());
        };
        if !flows || self.heartbeat.is_some() {
            self.heartbeat = self.heartbeat.take().filter(|_| flows);
            return Ok(());
        }
        let applied = pipe.applied.clone();
        let reading = self.reading(Stream::Forward).await?;
        let JobConfig { source, job, .. } = &self.config;
        let mut session = Session::control(source).await?;
        let sql = choose(&mut session, &options, &reading, &job.canary()).await?;
        tracing::info!(sql, interval = ?options.interval, "heartbeat");
        self.heartbeat = Some(Heartbeat::start(source.clone(), options, sql, applied));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_what_the_last_beat_took_or_the_oldest_has_been_waiting() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let lag = |beats: &Beats, seconds| beats.lag(at(seconds)).map(|lag| lag.as_secs());
        let mut beats = Beats::default();
        assert_eq!(lag(&beats, 5), None);
        beats.sent.extend([(Some(Lsn(10)), at(0)), (None, at(10)), (Some(Lsn(30)), at(20))]);
        assert_eq!(lag(&beats, 25), Some(25));
        beats.arrived(Lsn(9), at(25));
        assert_eq!(lag(&beats, 25), Some(25));
        beats.arrived(Lsn(10), at(25));
        // The second could not be sent, and is what is missing now.
        assert_eq!((lag(&beats, 26), beats.took), (Some(25), Some(Duration::from_secs(25))));
        beats.arrived(Lsn(40), at(23));
        assert_eq!(lag(&beats, 90), Some(3));
    }
}
