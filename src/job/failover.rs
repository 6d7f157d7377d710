//! A source that failed over: whether the promoted server goes on where the target stands, and what
//! is done where it does not.
//!
//! A position of the log means the same on a promoted standby up to where its timeline forked off.
//! So all is well if nothing that the target has lies beyond the fork (what was applied, and what
//! the copy's snapshots saw), and if the slot is there and not further than the target: a standby
//! of 17 or newer that synchronizes failover slots has it. The new timeline is then recorded before
//! anything of it is applied, as from there on positions are its own.
//!
//! Otherwise something is lost: changes that no slot gives any more, or transactions that the
//! target has and the source has not. Which, nobody can say but a comparison. With
//! `--after-failover refill` the job goes back to phase `schema`, in the transaction that puts
//! every table in doubt; from there everything is as in a new job: a slot, a snapshot, and under it
//! each table is compared and read again where it differs (`copy::refill`).
//!
//! The same where the target came back without what the slot was told (its own standby was promoted
//! too early), as far as no spool or topic has it.
//!
//! Left out: once applications were switched, the way back is not filled again, as the target's
//! rows are the live ones then; it is refused by name.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;

use super::admit::{make_source_tables_beside, recorded};
use super::opening::Half;
use super::run::{Notice, Runner};
use super::state::{Event, Phase};
use super::{Error, Result};
use crate::catalog::{Table, TableKind};
use crate::copy::refill::{Found, Verdict};
use crate::copy::{SnapshotSource, refill};
use crate::id::{JobName, QualifiedName, Stream};
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, Session, SlotKind};
use crate::source::continuity::{Recorded, System, check_slot, check_system, check_system_by_sql};
use crate::source::{self, Transport, slot};
use crate::{apply, verify};

/// The first version whose standbys keep copies of logical slots.
pub const FAILOVER_SLOTS: u32 = 17;

/// Keys of a table that are named.
const KEYS_NAMED: usize = 3;

/// Whether slots are made such that standbys keep copies of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Failover {
    /// Where the server can.
    #[default]
    Auto,
    /// Or the source is refused.
    On,
    /// Not at all.
    Off,
}

impl Failover {
    /// How a slot of the job is made on a server of this version. One that is to tell of PREPARE is
    /// for failover only where that is asked for: minor releases differ in whether they let both.
    pub fn kind(self, major: u32, two_phase: bool) -> SlotKind {
        match self {
            Failover::Off => SlotKind::Permanent,
            _ if major < FAILOVER_SLOTS => SlotKind::Permanent,
            Failover::Auto if two_phase => SlotKind::Permanent,
            _ => SlotKind::Failover,
        }
    }
}

impl FromStr for Failover {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Failover, String> {
        match text {
            "auto" => Ok(Failover::Auto),
            "on" => Ok(Failover::On),
            "off" => Ok(Failover::Off),
            _ => Err(format!("\"{text}\" is none of auto, on and off")),
        }
    }
}

/// What is done where a side has lost what the stream needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AfterFailover {
    /// The job stops, and says what is lost.
    #[default]
    Stop,
    /// A new slot is made, and what differs is read again.
    Refill,
}

impl FromStr for AfterFailover {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<AfterFailover, String> {
        match text {
            "stop" => Ok(AfterFailover::Stop),
            "refill" => Ok(AfterFailover::Refill),
            _ => Err(format!("\"{text}\" is neither stop nor refill")),
        }
    }
}

/// True for an error that says what is lost, and that trying again does not mend.
pub(super) fn is_loss(error: &Error) -> bool {
    match error {
        Error::Source(error) => error.is_loss(),
        Error::SpoolLost { .. } => true,
        _ => false,
    }
}

/// Records the timeline that a stream, or the copy, goes on with: see [`super::store::Timelines`].
pub(super) async fn record_timeline(
    home: &mut Session,
    job: &JobName,
    what: &str,
    timeline: u32,
) -> Result<()> {
    let sql = "update walferry.job set timelines = timelines || \
         pg_catalog.jsonb_build_object($2::text, $3::int), updated_at = now() where name = $1";
    let timeline = timeline.to_string();
    home.query_params(sql, &[Some(job.as_str()), Some(what), Some(&timeline)]).await?;
    Ok(())
}

impl Runner {
    /// Whether the source has all that the copy has seen, asked before either is relied on. With
    /// `slot_too` the slot is looked at as well; a stream that is about to be opened does so
    /// itself, for all that it and its spool have. `Some`: something was lost, and the job begins
    /// to be filled again.
    pub(super) async fn unbroken(&mut self, slot_too: bool) -> Result<Option<Event>> {
        let row = self.row().await?;
        let fillable = matches!(row.phase, Phase::Copying | Phase::CatchingUp | Phase::Following);
        if self.config.half == Half::Apply || row.slot_lsn.is_none() || !fillable {
            return Ok(None);
        }
        match self.continuity(slot_too).await {
            Ok(()) => Ok(None),
            Err(error) if is_loss(&error) => match self.may_refill().await? {
                true => self.refill(error.to_string()).await.map(Some),
                false => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    async fn continuity(&mut self, slot_too: bool) -> Result<()> {
        let (row, name) = (self.row().await?, self.config.job.object(Stream::Forward));
        let reading = self.reading(Stream::Forward).await?;
        let home = &mut self.store.session;
        let seen_lsn = refill::seen_lsn(home, self.config.job.as_str()).await?;
        let source = &self.config.source;
        let system = row.source_system.as_deref();
        let mut recorded = recorded(source, system, &reading.decoder);
        recorded.timeline = row.timelines.copied.unwrap_or(recorded.timeline);
        let transport = reading.transport()?;
        let found = match check(source, transport, &recorded, seen_lsn).await {
            // A snapshot's position may lie past what was flushed then, and all that it sees does
            // not: on its own timeline a source that has less has lost nothing by that.
            Err(source::Error::Behind { .. }) => {
                check(source, transport, &recorded, Lsn::ZERO).await?
            }
            found => found?,
        };
        if slot_too {
            let progress_lsn = apply::durable_progress(home, &name).await?;
            let mut session = Session::control(self.config.read_at(Stream::Forward)).await?;
            let status = slot::status(&mut session, &name).await?;
            check_slot(&name, status.as_ref(), &recorded, progress_lsn)?;
        }
        // What is copied from here on is of this timeline. A stream records its own, once it has
        // the slot: the old primary may be the one that comes back.
        if row.phase == Phase::Copying && found.timeline != recorded.timeline {
            self.store.record_timeline("copied", found.timeline).await?;
            let said = format!(
                "the source is on timeline {} now, and has all that was copied",
                found.timeline
            );
            self.say(Notice::Said(said));
        }
        Ok(())
    }

    async fn may_refill(&mut self) -> Result<bool> {
        let phase = self.row().await?.phase;
        let fillable = matches!(phase, Phase::Copying | Phase::CatchingUp | Phase::Following);
        // A copy that somebody else made, and a target with changes of its own, are not ours to
        // make equal to the source.
        let ours = !self.config.options.brought && self.config.two_way.is_none();
        Ok(fillable && ours && self.config.after_failover == AfterFailover::Refill)
    }

    /// What stopped the forward stream, if that is a loss and may be mended.
    pub(super) async fn lost_stream(&mut self) -> Result<Option<String>> {
        let lost = self.forward.as_ref().and_then(super::pipeline::Pipe::lost);
        Ok(match lost {
            Some(lost) if self.may_refill().await? => Some(lost),
            _ => None,
        })
    }

    /// Back to phase `schema`, with every table in doubt. A way back that was armed is armed anew
    /// before the next cutover: it would take for an application's what is read again.
    pub(super) async fn refill(&mut self, loss: String) -> Result<Event> {
        self.stop_streams().await;
        self.heartbeat = None;
        self.slot = None;
        self.say(Notice::Said(loss.clone()));
        let said = "making a new slot, and reading again what differs from the source";
        self.say(Notice::Said(said.to_string()));
        // They may be among what is lost.
        let mut source = Session::control(&self.config.source).await?;
        make_source_tables_beside(&self.config, &mut source).await?;
        if self.row().await?.armed {
            let mut target = Session::control(&self.config.target).await?;
            slot::drop(&mut target, &self.config.job.object(Stream::Reverse)).await?;
        }
        let job = self.config.job.clone();
        // A run that begins holds the row as it was.
        self.store.forget();
        let home = &mut self.store.session;
        home.execute("begin").await?;
        refill::begin(home, job.as_str(), &loss).await?;
        let sql = "update walferry.large_object set snapshot_xmin = null, objects = null \
             where job = $1 and side = 'source'";
        home.query_params(sql, &[Some(job.as_str())]).await?;
        let sql = "update walferry.job set phase = $2, slot_lsn = null, armed = false, \
             timelines = '{}', error = null, updated_at = now() where name = $1";
        let phase = Phase::Schema.to_string();
        home.query_params(sql, &[Some(job.as_str()), Some(&phase)]).await?;
        home.execute("commit").await?;
        self.say(Notice::Phase(Phase::Schema));
        Ok(Event::Start)
    }

    /// Compares the tables that are in doubt with the source as `snapshot` sees it, and says what
    /// of them will be read again. Nothing is applied meanwhile.
    pub(super) async fn judge(
        &mut self,
        tables: &[Table],
        snapshot: &SnapshotSource,
    ) -> Result<()> {
        let job = self.config.job.as_str().to_string();
        if !refill::is_due(&mut self.store.session, &job).await? {
            return Ok(());
        }
        self.say(Notice::Said("comparing every table with the source".to_string()));
        let side = |config: &Config, snapshot| verify::Side { config: config.clone(), snapshot };
        let source = side(&self.config.source, Some(snapshot.name().to_string()));
        let mut wanted = verify::Options::new(source, side(&self.config.target, None));
        wanted.selection = self.selection.clone();
        wanted.map = self.config.map.clone();
        wanted.publication = self.store.load_readings().await?.publication;
        wanted.parallelism = self.config.jobs;
        wanted.keys_limit = KEYS_NAMED;
        let report = verify::run(wanted).await?;
        let verdicts = verdicts(tables, &report);
        let (home, source) = (&mut self.store.session, &self.config.source);
        refill::settle(home, source, &job, snapshot, &verdicts).await?;
        for line in told(&report) {
            self.say(Notice::Said(line));
        }
        Ok(())
    }
}

/// The recorded server, with all its history up to `seen_lsn`.
async fn check(
    source: &Config,
    transport: Transport,
    recorded: &Recorded,
    seen_lsn: Lsn,
) -> source::Result<System> {
    match transport {
        Transport::Stream => {
            let mut session = Session::connect(source, Purpose::Replication).await?;
            check_system(&mut session, recorded, seen_lsn).await
        }
        Transport::Pull => {
            let mut session = Session::connect(source, Purpose::Sql).await?;
            check_system_by_sql(&mut session, source, recorded, seen_lsn).await
        }
    }
}

/// By table with rows of its own. One that was rewritten meanwhile, or that the report does not
/// know, is taken for unequal.
fn verdicts(tables: &[Table], report: &verify::Report) -> Vec<Verdict> {
    let named: HashMap<&QualifiedName, &Table> =
        tables.iter().map(|table| (&table.name, table)).collect();
    let known: HashMap<&str, &verify::TableReport> =
        report.tables.iter().map(|table| (table.name.as_str(), table)).collect();
    let mut counted: HashSet<String> = HashSet::new();
    let plain = tables.iter().filter(|table| table.kind == TableKind::Plain);
    plain
        .map(|table| {
            let mut root = table;
            while let Some(parent) = root.partition_of.as_ref().and_then(|name| named.get(name)) {
                root = parent;
            }
            // A comparison pairs tables by their names on the target.
            let root = root.written_name().to_string();
            let Some(found) = known.get(root.as_str()) else {
                return Verdict {
                    table: table.name.clone(),
                    found: Found::Unequal,
                    counts: [0; 3],
                };
            };
            let first = counted.insert(root);
            let counts = match first {
                true => [found.missing, found.extra, found.different],
                false => [0; 3],
            };
            let found = match (found.equal, found.rows_target) {
                (true, _) => Found::Equal(if first { found.rows } else { 0 }),
                (false, 0) => Found::Empty,
                (false, _) => Found::Unequal,
            };
            Verdict { table: table.name.clone(), found, counts }
        })
        .collect()
}

/// What was lost, for people: a line for each table that differs, and one for all.
fn told(report: &verify::Report) -> Vec<String> {
    let mut lines = Vec::new();
    for table in report.tables.iter().filter(|table| !table.equal) {
        let keys: Vec<&str> = table.keys.iter().map(|key| key.key.as_str()).collect();
        let among = if keys.is_empty() { "" } else { ", among them " };
        lines.push(format!(
            "table {}: {} rows were missing on the target, {} it had alone, {} differed{among}{}; \
             it is read again",
            table.name,
            table.missing,
            table.extra,
            table.different,
            keys.join("; ")
        ));
    }
    for table in &report.rewritten {
        lines.push(format!("table {table} was rewritten while it was compared; it is read again"));
    }
    lines.push(format!(
        "{} of {} tables are equal and keep their rows",
        report.tables.iter().filter(|table| table.equal).count(),
        report.tables.len() + report.rewritten.len()
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_for_failover_where_the_server_can_and_nobody_minds() {
        assert_eq!(Failover::Auto.kind(16, false), SlotKind::Permanent);
        assert_eq!(Failover::Auto.kind(17, false), SlotKind::Failover);
        assert_eq!(Failover::On.kind(18, true), SlotKind::Failover);
        assert_eq!(Failover::Off.kind(18, false), SlotKind::Permanent);
    }
}
