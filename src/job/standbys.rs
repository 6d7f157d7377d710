//! `--standby`: a slot of the job's own on standbys of the source, kept behind the one that is
//! read, so that one of them may be promoted.
//!
//! From 17 on servers keep copies of logical slots on their standbys themselves. On 16 a standby
//! may have logical slots of its own, and so walferry does it:
//!
//! 1. Make a slot of the same name and plugin there. A standby gives it a consistent point only by
//!    records of running transactions, which the primary writes; it is asked for one again and
//!    again until the slot is there.
//! 2. Every few seconds, advance it to what the slot of the primary was told. That is durable
//!    behind us (law 1), so the one on the standby never is beyond what we have. But where it
//!    begins, it is: until we have passed that position it is [`State::Ahead`], and no good yet.
//! 3. After a promotion there is nothing to do. Whoever opens the stream holds what slot it finds
//!    against progress and timeline (`source::continuity`), one of ours or one of the server's.
//!
//! A slot that is valid and begins at or before our progress has all that comes after, whenever and
//! by whomever it was made. So one that is found is taken, the demoted primary's too. One that the
//! server has invalidated (rows that it needs were removed) is made anew, and that is said.
//!
//! Before 16 no standby decodes. There a promotion without loss for us takes whoever copies the
//! slot's files (Patroni does); else it is a loss that is found and read again (`failover`).
//!
//! After a crash the slot is found as it is. What is known of each standby is in
//! `walferry.standby`, for status (`standby_status`).
//!
//! <https://www.postgresql.org/docs/16/logicaldecoding-explanation.html#LOGICALDECODING-REPLICATION-SLOTS>

use std::time::{Duration, Instant};

use serde::Serialize;

use super::Result;
use super::admit::{identifier, system_of};
use super::decoding::make_slot;
use super::lease;
use super::pipeline::Task;
use super::run::{JobConfig, Notice, Report, Runner};
use crate::id::{JobName, Stream, quote_literal};
use crate::lsn::Lsn;
use crate::pg::{Config, Session, SlotKind};
use crate::source::slot::{self, CreateOptions, SlotStatus};

/// The first version whose standbys may have logical slots.
pub const STANDBY_SLOTS: u32 = 16;

/// Between two looks.
const TURN: Duration = Duration::from_secs(1);

/// Advancing decodes again from restart_lsn, which moves four times a minute at most.
const ADVANCE_INTERVAL: Duration = Duration::from_secs(5);

/// What is unchanged is stored again after so long, which shows that somebody looks.
const STORE_INTERVAL: Duration = Duration::from_secs(5);

/// How a standby's slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is there, at or before what ours was told: a promotion loses nothing.
    Ready,
    /// It is there, and begins beyond that.
    Ahead,
    /// It is there, and its primary does not keep the rows that it needs.
    Unheard,
    /// It is being made, or the job has no slot itself.
    Making,
    /// What is there cannot be used, or may not be touched.
    Unfit,
    /// The standby cannot be asked.
    Away,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            State::Ready => "ready",
            State::Ahead => "ahead",
            State::Unheard => "unheard",
            State::Making => "making",
            State::Unfit => "unfit",
            State::Away => "away",
        }
    }
}

/// What one look found.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    state: State,
    slot_lsn: Option<Lsn>,
    /// What to do about it, for people.
    said: String,
}

impl Found {
    fn new(state: State, slot_lsn: Option<Lsn>, said: impl Into<String>) -> Found {
        Found { state, slot_lsn, said: said.into() }
    }
}

/// Looks after the slots for as long as this lives.
pub(super) struct Standbys {
    _tasks: Vec<Task<()>>,
}

impl Runner {
    /// Begins to look after slots on standbys, once. Does not wait for a connection.
    pub(super) fn keep_standbys(&mut self) {
        let config = &self.config;
        if self.standbys.is_some() || config.standbys.is_empty() {
            return;
        }
        let tasks = config.standbys.iter().map(|standby| {
            let tender = Tender::new(config, standby, self.report.clone());
            Task(tokio::spawn(tender.tend()))
        });
        self.standbys = Some(Standbys { _tasks: tasks.collect() });
    }
}

/// One standby's.
struct Tender {
    job: JobName,
    slot: String,
    place: String,
    source: Config,
    standby: Config,
    home: Config,
    wait: Duration,
    report: Report,
    on_source: Option<Session>,
    on_standby: Option<Session>,
    at_home: Option<Session>,
    /// The system that the standby must be a copy of is asked of the source once a session.
    system: Option<String>,
    advanced: Option<Instant>,
    /// Why the slot before this one was dropped.
    lost: Option<String>,
    stored: Option<(Found, Instant)>,
}

impl Tender {
    fn new(config: &JobConfig, standby: &Config, report: Report) -> Tender {
        let name = lease::application_name(&config.job);
        Tender {
            job: config.job.clone(),
            slot: config.job.object(Stream::Forward),
            place: place(standby),
            source: config.source.clone(),
            standby: standby.clone().labelled("standby").with_application_name(&name),
            home: config.target.clone(),
            wait: config.slot_timeout,
            report,
            on_source: None,
            on_standby: None,
            at_home: None,
            system: None,
            advanced: None,
            lost: None,
            stored: None,
        }
    }

    async fn tend(mut self) {
        loop {
            let found = match self.turn().await {
                Ok(found) => found,
                Err(error) => {
                    self.on_standby = None;
                    let said = format!("{error}; it is tried again");
                    Some(Found::new(State::Away, None, said))
                }
            };
            if let Some(found) = found
                && let Err(error) = self.keep(found).await
            {
                tracing::debug!(%error, "a standby's state could not be stored");
                self.at_home = None;
            }
            tokio::time::sleep(TURN).await;
        }
    }

    /// `None` while nothing can be known, as the source does not answer: that is the stream's to
    /// say. Errors are the standby's.
    async fn turn(&mut self) -> Result<Option<Found>> {
        let ours = match self.ours().await {
            Ok(Some(ours)) => ours,
            Ok(None) => {
                let said = "the job has no slot yet";
                return Ok(Some(Found::new(State::Making, None, said)));
            }
            Err(error) => {
                tracing::debug!(%error, "the source was not asked for its slot");
                self.on_source = None;
                return Ok(None);
            }
        };
        let standby = opened(&mut self.on_standby, &self.standby).await?;
        if let Some(said) = unfit(standby, self.system.as_deref(), &ours).await? {
            // Another of several hosts may be the standby by the next look.
            self.on_standby = None;
            return Ok(Some(Found::new(State::Unfit, None, said)));
        }
        let Some(theirs) = slot::status(standby, &self.slot).await? else {
            self.say(format!("making slot {} on standby {}", self.slot, self.place));
            let found = Found::new(State::Making, None, self.with_loss("its slot is being made"));
            self.keep(found).await?;
            let lsn = self.make(&ours.plugin).await?;
            return Ok(Some(self.ahead(lsn)));
        };
        if let Some(said) = foreign(&theirs, &ours) {
            return Ok(Some(Found::new(State::Unfit, theirs.confirmed_flush_lsn, said)));
        }
        if let Some(reason) = theirs.lost_reason() {
            let lost = format!(
                "its slot was invalidated ({reason}) and is made anew: let the standby have \
                 hot_standby_feedback = on, a slot of the source in primary_slot_name, and no \
                 limit in max_slot_wal_keep_size"
            );
            slot::drop(standby, &self.slot).await?;
            self.lost = Some(lost);
            return Ok(Some(Found::new(State::Making, None, self.with_loss("its slot is gone"))));
        }
        self.follow(&ours, &theirs).await.map(Some)
    }

    /// The slot that is read.
    async fn ours(&mut self) -> Result<Option<SlotStatus>> {
        if self.on_source.is_none() {
            self.system = None;
        }
        let source = opened(&mut self.on_source, &self.source).await?;
        if self.system.is_none() {
            self.system = Some(system_of(source).await?);
        }
        Ok(slot::status(source, &self.slot).await?)
    }

    /// Brings a standby's slot up to what ours was told, or to what the standby has of that.
    async fn follow(&mut self, ours: &SlotStatus, theirs: &SlotStatus) -> Result<Found> {
        let told_lsn = ours.confirmed_flush_lsn.unwrap_or(Lsn::ZERO);
        let lsn = theirs.confirmed_flush_lsn.unwrap_or(Lsn::ZERO);
        if lsn > told_lsn {
            return Ok(self.ahead(lsn));
        }
        if !self.heard().await? {
            return Ok(Found::new(State::Unheard, Some(lsn), self.with_loss(UNHEARD)));
        }
        let due = self.advanced.is_none_or(|at| at.elapsed() >= ADVANCE_INTERVAL);
        let standby = opened(&mut self.on_standby, &self.standby).await?;
        if !due || lsn == told_lsn {
            return Ok(Found::new(State::Ready, Some(lsn), self.with_loss("")));
        }
        // Where it has been promoted since, the slot is the stream's: the function is not called.
        let sql = format!(
            "select (select end_lsn from pg_catalog.pg_replication_slot_advance( \
                 {}, least({}::pg_lsn, r.lsn))) \
             from (select pg_catalog.pg_last_wal_replay_lsn() as lsn) r \
             where pg_catalog.pg_is_in_recovery() and r.lsn > {}",
            quote_literal(&self.slot),
            quote_literal(&told_lsn.to_string()),
            quote_literal(&lsn.to_string())
        );
        let row = standby.query_opt(&sql, &[]).await?;
        self.advanced = Some(Instant::now());
        let lsn = row.map(|row| row.parse_opt(0)).transpose()?.flatten().unwrap_or(lsn);
        Ok(Found::new(State::Ready, Some(lsn), self.with_loss("")))
    }

    /// Whether the source keeps the catalog rows that the standby's slot needs, for a standby that
    /// told it so: in the slot that feeds one, or in its walsender. Who may not see walsenders, and
    /// finds no such slot, believes it.
    async fn heard(&mut self) -> Result<bool> {
        let standby = opened(&mut self.on_standby, &self.standby).await?;
        let sql = "select catalog_xmin from pg_catalog.pg_replication_slots where slot_name = $1 \
             and catalog_xmin is not null and pg_catalog.pg_is_in_recovery()";
        let Some(row) = standby.query_opt(sql, &[Some(&self.slot)]).await? else {
            return Ok(true);
        };
        let xmin = row.string(0)?;
        let asking = async {
            let source = opened(&mut self.on_source, &self.source).await?;
            let sql = "select coalesce(pg_catalog.bool_or( \
                   pg_catalog.age(h.xmin) >= pg_catalog.age($1::xid)), false) \
                 or not pg_catalog.pg_has_role('pg_read_all_stats', 'usage') \
                 from (select s.catalog_xmin as xmin from pg_catalog.pg_replication_slots s \
                   where s.slot_type = 'physical' and s.catalog_xmin is not null union all \
                   select r.backend_xmin from pg_catalog.pg_stat_replication r \
                   where r.backend_xmin is not null and not exists (select \
                     from pg_catalog.pg_replication_slots s \
                     where s.active_pid = r.pid and s.slot_type = 'logical')) h";
            Result::Ok(source.query_one(sql, &[Some(&xmin)]).await?.bool(0)?)
        };
        match asking.await {
            Ok(heard) => Ok(heard),
            Err(error) => {
                tracing::debug!(%error, "the source was not asked what it keeps");
                self.on_source = None;
                Ok(true)
            }
        }
    }

    fn ahead(&self, lsn: Lsn) -> Found {
        let said = format!("it can take over once the target has all up to {lsn}");
        Found::new(State::Ahead, Some(lsn), self.with_loss(&said))
    }

    /// What was lost before is not forgotten with the next look: it tells that a setting lacks.
    fn with_loss(&self, said: &str) -> String {
        let lost = self.lost.as_deref().unwrap_or_default();
        if said.is_empty() || lost.is_empty() {
            return format!("{said}{lost}");
        }
        format!("{said}; {lost}")
    }

    /// Makes the slot, while the primary logs what it waits for.
    async fn make(&mut self, plugin: &str) -> Result<Lsn> {
        let options = CreateOptions {
            name: self.slot.clone(),
            plugin: plugin.to_string(),
            kind: SlotKind::Permanent,
            wait: self.wait,
        };
        make_slot(&self.standby, &self.source, &options, |_| {}).await
    }

    /// Tells what is new, and stores it.
    async fn keep(&mut self, found: Found) -> Result<()> {
        let before = self.stored.as_ref().map(|(before, _)| (before.state, &before.said));
        if before != Some((found.state, &found.said)) {
            let and = if found.said.is_empty() { "" } else { ": " };
            let state = found.state.as_str();
            self.say(format!("standby {} is {state}{and}{}", self.place, found.said));
        }
        if let Some((before, at)) = &self.stored
            && (before.state, &before.said) == (found.state, &found.said)
            && at.elapsed() < STORE_INTERVAL
        {
            return Ok(());
        }
        let home = opened(&mut self.at_home, &self.home).await?;
        let sql = "insert into walferry.standby (job, standby, state, slot_lsn, said) \
             values ($1, $2, $3, $4, nullif($5, '')) on conflict (job, standby) do update \
             set state = excluded.state, slot_lsn = excluded.slot_lsn, said = excluded.said, \
             looked_at = clock_timestamp()";
        let lsn = found.slot_lsn.map(|lsn| lsn.to_string());
        let values = [
            Some(self.job.as_str()),
            Some(&*self.place),
            Some(found.state.as_str()),
            lsn.as_deref(),
            Some(&*found.said),
        ];
        self.stored = Some((found.clone(), Instant::now()));
        home.query_params(sql, &values).await?;
        Ok(())
    }

    fn say(&self, text: String) {
        (self.report)(Notice::Said(text));
    }
}

async fn opened<'a>(session: &'a mut Option<Session>, config: &Config) -> Result<&'a mut Session> {
    Ok(match session {
        Some(open) => open,
        None => session.insert(Session::control(config).await?),
    })
}

/// Where a standby is, without secrets.
pub(super) fn place(standby: &Config) -> String {
    let named = standby.clone().labelled("");
    let hosts: Vec<String> = named.hosts.iter().map(|host| named.peer(host)).collect();
    hosts.join(",")
}

/// Why no slot is made on this server, if so.
async fn unfit(
    standby: &mut Session,
    system: Option<&str>,
    ours: &SlotStatus,
) -> Result<Option<String>> {
    let recovers = standby.query_one("select pg_catalog.pg_is_in_recovery()", &[]).await?;
    if !recovers.bool(0)? {
        let said = "it is a primary: give --standby the standbys of now";
        return Ok(Some(said.to_string()));
    }
    if standby.major_version() < STANDBY_SLOTS {
        return Ok(Some(too_old(standby.major_version())));
    }
    let found = system_of(standby).await?;
    if system.is_some_and(|system| identifier(system) != identifier(&found)) {
        return Ok(Some("it is a standby of another server than the source".to_string()));
    }
    Ok(ours.failover.then(|| SYNCHRONIZED.to_string()))
}

/// How a slot comes to be invalidated.
const UNHEARD: &str = "the source has not heard what rows its slot needs, and may remove them: on \
     the standby, hot_standby_feedback = on, and wal_receiver_status_interval not 0 (it is told \
     once in that time)";

/// A slot for failover is the server's to copy, and slots of that name on standbys stop it.
pub(super) const SYNCHRONIZED: &str = "the source's slot is one that the servers keep copies of \
     themselves: leave --standby out, or begin with --failover off";

/// What is said of a standby that cannot hold the slot.
pub(super) fn too_old(major: u32) -> String {
    format!(
        "standbys of release {major} can have no logical slots, {STANDBY_SLOTS} is the first: \
         after a failover what is lost is found, and walferry run --after-failover refill goes on"
    )
}

/// Why the slot of our name on a standby is not ours, or not ours to touch.
fn foreign(theirs: &SlotStatus, ours: &SlotStatus) -> Option<String> {
    let drop = format!("select pg_drop_replication_slot({});", quote_literal(&theirs.name));
    if theirs.plugin != ours.plugin || theirs.database != ours.database {
        return Some(format!(
            "it has a slot {} of plugin \"{}\" and database \"{}\", which is another one; if \
             nobody needs it, there: {drop}",
            theirs.name, theirs.plugin, theirs.database
        ));
    }
    if theirs.failover || theirs.temporary {
        return Some(SYNCHRONIZED.to_string());
    }
    let pid = theirs.active_pid?;
    Some(format!("process {pid} there reads slot {}: end it", theirs.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::continuity::tests::status;

    #[test]
    fn a_slot_of_another_kind_or_in_use_is_left_alone() {
        assert_eq!(foreign(&status(), &status()), None);
        let said = |theirs: SlotStatus| foreign(&theirs, &status()).unwrap();
        let other = said(SlotStatus { plugin: "wal2json".to_string(), ..status() });
        assert!(other.contains("wal2json") && other.contains("pg_drop_replication_slot('s')"));
        assert!(said(SlotStatus { database: "x".to_string(), ..status() }).contains("\"x\""));
        assert_eq!(said(SlotStatus { failover: true, ..status() }), SYNCHRONIZED);
        assert_eq!(said(SlotStatus { temporary: true, ..status() }), SYNCHRONIZED);
        assert!(said(SlotStatus { active_pid: Some(7), ..status() }).contains("process 7"));
    }
}
