//! A job of two ways: applications write to both sides, and each stream brings to one what was
//! written on the other.
//!
//! # How it is opened
//! Until the target is level, the job is like any other, and the target is not to be written. Then,
//! in this order: triggers on both sides note what applications delete and refuse TRUNCATE;
//! sequences take every second value, each side its own; the reverse slot is made; the forward
//! stream is level once more. From that moment, which is stored as `armed`, nothing that was
//! written before can be in conflict, and both sides may be written. Every step may be repeated.
//!
//! # What is forgotten
//! `apply::conflict` keeps a row for each transaction that was applied, one for each row that was
//! deleted, and where a column decides one for each value that fell. They are needed until
//! everything that was written on the other side without knowing of it has come here. The keeper
//! notes clocks and positions of both sides, waits until both streams are past them, and once more
//! past what was written meanwhile; then everything older than the first clocks is known to both.
//!
//! # How it ends
//! There is no switch, as clients are on both sides: `finish` takes away what was made, and gives
//! sequences their increments again, past what either side had.

use std::collections::HashMap;
use std::time::Duration;

use super::noting::{self, insist};
use super::pipeline::Task;
use super::run::{JobConfig, Notice, Report, Runner};
use super::state::{Event, Phase, Refused, step};
use super::store::{JobRow, Store};
use super::{Result, check};
use crate::apply::Open;
use crate::apply::conflict::Policy;
use crate::catalog::{self, Sequence};
use crate::cutover::barrier;
use crate::id::{JobName, QualifiedName, Stream, quote_literal};
use crate::lsn::Lsn;
use crate::pg::{self, Config, Session};

/// A commit's place in the log and its time are taken one after the other: no transaction takes
/// longer between the two.
const SLACK: Duration = Duration::from_secs(10);

/// Between the clock and the position that is certainly behind all commits of before.
const SETTLE: Duration = Duration::from_secs(1);

/// Between looks of the keeper.
pub(super) const TURN: Duration = Duration::from_secs(1);

/// Takes the policy that was given, and stores it: from then on conflicts are settled by it, in
/// later runs as well. Where none is given, the stored one goes on: a default must not settle half
/// of a job's conflicts in another way.
pub(super) async fn settle(
    config: &mut JobConfig,
    store: &mut Store,
    source: &mut Session,
    report: &Report,
) -> Result<()> {
    let Some(default) = config.two_way.clone() else { return Ok(()) };
    let job = config.job.to_string();
    let stored = stored(&mut store.session, &config.job).await?;
    let stored: Option<Policy> =
        stored.map(|text| text.parse()).transpose().map_err(super::Error::State)?;
    let policy = config.on_conflict.clone().or_else(|| stored.clone()).unwrap_or(default);
    config.two_way = Some(policy.clone());
    if stored.as_ref() != Some(&policy) {
        let selection = config.options.selection(source).await?;
        check::refuse_unfit(source, &selection, &policy, report).await?;
    }
    noting::settle(config, store, source).await?;
    if stored.as_ref() == Some(&policy) {
        return Ok(());
    }
    if let Some(before) = stored {
        let said = format!("conflicts are settled by {policy} from now on, and were by {before}");
        report(Notice::Said(said));
    }
    let sql = "update walferry.job set on_conflict = $2, updated_at = now() where name = $1";
    store.session.query_params(sql, &[Some(&job), Some(&policy.to_string())]).await?;
    Ok(())
}

impl Runner {
    /// Opens the target to writers, unless it is open; nothing in a job of one way.
    pub(super) async fn open_two_way(&mut self) -> Result<()> {
        if self.config.two_way.is_none() {
            return Ok(());
        }
        self.gate.set(Open::Everything);
        if !self.row().await?.armed {
            self.say(Notice::Said("opening the target to writers".to_string()));
            noting::begin(&self.config, &mut self.store, &self.selection).await?;
            let sides = (&self.config.source, &self.config.target);
            let ours = |owner: Option<&QualifiedName>| self.selection.has_sequence(owner);
            disjoin(&self.config.job, sides, ours).await?;
            self.make_reverse(self.config.slot_timeout).await?;
            self.begin_both().await?;
            self.store.set_armed(true).await?;
            self.say(Notice::Said("both sides may be written from now on".to_string()));
        }
        self.keep_two_way().await
    }

    /// Starts what a job of two ways needs beside its forward stream.
    pub(super) async fn keep_two_way(&mut self) -> Result<()> {
        if self.config.two_way.is_none() || !self.row().await?.armed {
            return Ok(());
        }
        self.gate.set(Open::Everything);
        self.follow_reverse_now().await?;
        if self.keeper.is_none() {
            let config = self.config.clone();
            self.keeper = Some(Task(tokio::spawn(async move { keep(config).await })));
        }
        Ok(())
    }

    /// All that committed before a moment is on both sides, and is a rival of nothing.
    async fn begin_both(&mut self) -> Result<()> {
        let mut source = Session::control(&self.config.source).await?;
        let (source_clock, _) = stand(&mut source).await?;
        let (target_clock, _) = stand(&mut self.store.session).await?;
        tokio::time::sleep(SETTLE).await;
        let lsn = barrier::mark(&mut source, "two-way").await?;
        loop {
            let carry = self.forward.as_ref().map(|pipe| pipe.applied.clone());
            let mut carry = carry.ok_or(crate::cutover::Error::StreamStopped)?;
            if barrier::reached(&mut carry, lsn, TURN).await? {
                break;
            }
        }
        let job = &self.config.job;
        know(&mut self.store.session, &job.object(Stream::Forward), &source_clock).await?;
        know(&mut source, &job.object(Stream::Reverse), &target_clock).await
    }

    /// A job of two ways has nothing to switch.
    pub(super) fn refuse_switch(&self, phase: Phase) -> Result<()> {
        if self.config.two_way.is_none() {
            return Ok(());
        }
        let why = "both sides are written already: lead clients to the side that stays, wait until \
                   walferry status shows no lag, and run walferry finish";
        Err(Refused { phase, asked: "cutover", why }.into())
    }
}

/// The phase that a job ends in. One of two ways is finished where it stands.
pub(super) fn ended(row: &JobRow, event: Event) -> Result<Phase> {
    match (row.phase, event) {
        (Phase::Following, Event::FinishAsked) if row.options.two_way => Ok(Phase::Finished),
        (phase, event) => Ok(step(phase, event)?.0),
    }
}

/// Gives sequences twice their increment, and those of the other side the values between those of
/// the live one. Of those whose owner `ours` takes; cycling ones stay as they are.
pub(super) async fn disjoin(
    job: &JobName,
    (live, other): (&Config, &Config),
    ours: impl Fn(Option<&QualifiedName>) -> bool,
) -> Result<()> {
    let mut live = Session::control(live).await?;
    let mut dest = Session::control(other).await?;
    let there: HashMap<QualifiedName, Sequence> =
        catalog::sequences(&mut dest).await?.into_iter().map(|s| (s.name.clone(), s)).collect();
    for sequence in catalog::sequences(&mut live).await? {
        let name = &sequence.name;
        let ours = ours(sequence.owner.as_ref()) && !sequence.cycle;
        let Some(other) = there.get(name).filter(|_| ours) else { continue };
        let increment = stretch(&mut live, job, name, sequence.increment).await?;
        stretch(&mut dest, job, name, other.increment).await?;
        let quoted = name.quoted();
        // All that was handed out with the old increment is not beyond what it says now.
        let sql = format!("select last_value from {quoted}");
        let last: i64 = live.query_one(&sql, &[]).await?.parse(0)?;
        let drawn: i64 = dest.query_one(&sql, &[]).await?.parse(0)?;
        let next = between(last, drawn, increment);
        let literal = quote_literal(&quoted);
        let set = format!("select pg_catalog.setval({literal}::regclass, {next}, false)");
        dest.query_one(&set, &[]).await?;
    }
    Ok(())
}

/// The first value that the live side, which goes on from `last` by twos of increments, never has,
/// past what the other has `drawn`.
fn between(last: i64, drawn: i64, increment: i64) -> i64 {
    let step = increment.saturating_mul(2);
    let next = last.saturating_add(increment);
    let further = drawn.saturating_sub(next);
    match further == 0 || (further > 0) == (step > 0) {
        true => {
            let steps = further.checked_div(step).unwrap_or(0).saturating_add(1);
            next.saturating_add(steps.saturating_mul(step))
        }
        false => next,
    }
}

/// Doubles the increment, unless that is done; gives the one that it had.
async fn stretch(
    session: &mut Session,
    job: &JobName,
    name: &QualifiedName,
    increment: i64,
) -> Result<i64> {
    let kept = "select increment from walferry.two_way_sequence \
         where job = $1 and schema = $2 and name = $3";
    let params = [Some(job.as_str()), Some(&*name.schema), Some(&*name.name)];
    if let Some(row) = session.query_opt(kept, &params).await? {
        return Ok(row.parse(0)?);
    }
    let sql = format!(
        "begin; insert into walferry.two_way_sequence (job, schema, name, increment) \
         values ({}, {}, {}, {increment}); alter sequence {} increment by {}; commit",
        quote_literal(job.as_str()),
        quote_literal(&name.schema),
        quote_literal(&name.name),
        name.quoted(),
        increment.saturating_mul(2),
    );
    insist(session, &sql).await?;
    Ok(increment)
}

/// Where a side's stretched sequences stand.
async fn stood(session: &mut Session, job: &JobName) -> Result<HashMap<QualifiedName, i64>> {
    let mut stood = HashMap::new();
    for (name, _) in stretched(session, job).await? {
        let sql = format!("select last_value from {}", name.quoted());
        let last = session.query_one(&sql, &[]).await?.parse(0)?;
        stood.insert(name, last);
    }
    Ok(stood)
}

/// Takes from both sides, as far as they are there, what only a job of two ways makes.
pub(super) async fn part(
    source: Option<&mut Session>,
    target: &mut Session,
    job: &JobName,
) -> Result<()> {
    let Some(source) = source else { return remove(target, job, &HashMap::new()).await };
    let (here, there) = (stood(source, job).await?, stood(target, job).await?);
    remove(source, job, &there).await?;
    remove(target, job, &here).await
}

async fn stretched(session: &mut Session, job: &JobName) -> Result<Vec<(QualifiedName, i64)>> {
    let there = "select pg_catalog.to_regclass('walferry.two_way_sequence') is not null";
    if !session.query_one(there, &[]).await?.bool(0)? {
        return Ok(Vec::new());
    }
    let sql = "select schema, name, increment from walferry.two_way_sequence where job = $1 \
         and pg_catalog.to_regclass(pg_catalog.format('%I.%I', schema, name)) is not null";
    let rows = session.query_params(sql, &[Some(job.as_str())]).await?;
    rows.iter()
        .map(|row| Ok((QualifiedName::new(row.str(0)?, row.str(1)?), row.parse(2)?)))
        .collect()
}

/// Takes from a side what only a job of two ways makes: triggers, and the stretch of sequences,
/// which go on past what the other side had. Harmless if there is nothing.
pub(super) async fn remove(
    session: &mut Session,
    job: &JobName,
    other: &HashMap<QualifiedName, i64>,
) -> Result<()> {
    for (name, increment) in stretched(session, job).await? {
        let quoted = name.quoted();
        let further = if increment > 0 { "greatest" } else { "least" };
        let past = other.get(&name).map_or("last_value".to_string(), i64::to_string);
        let literal = quote_literal(&quoted);
        // Nobody takes a value between the two.
        let sql = format!(
            "begin; alter sequence {quoted} increment by {increment}; \
             select pg_catalog.setval({literal}::regclass, \
                 {further}(last_value, {past}), true) from {quoted}; \
             delete from walferry.two_way_sequence where job = {} and schema = {} and name = {}; \
             commit",
            quote_literal(job.as_str()),
            quote_literal(&name.schema),
            quote_literal(&name.name),
        );
        insist(session, &sql).await?;
    }
    noting::remove(session, job).await
}

/// How many conflicts a stream has on record on the side that it writes.
pub(super) async fn conflicts(session: &mut Session, stream: &str) -> Result<i64> {
    let there = "select pg_catalog.to_regclass('walferry.conflict') is not null";
    if !session.query_one(there, &[]).await?.bool(0)? {
        return Ok(0);
    }
    let sql = "select count(*) from walferry.conflict where stream = $1";
    Ok(session.query_one(sql, &[Some(stream)]).await?.parse(0)?)
}

/// What settles a job's conflicts, as on the command line. Of a home that an older walferry made
/// as well.
pub(super) async fn stored(session: &mut Session, job: &JobName) -> Result<Option<String>> {
    let sql = "select pg_catalog.to_jsonb(j) ->> 'on_conflict' from walferry.job j where name = $1";
    let row = session.query_opt(sql, &[Some(job.as_str())]).await?;
    Ok(row.map(|row| row.opt(0).map(|text| text.map(str::to_string))).transpose()?.flatten())
}

/// By `schema.table`, the changes of a stream that lost a conflict.
pub(super) async fn lost(session: &mut Session, stream: &str) -> Result<HashMap<String, i64>> {
    let there = "select pg_catalog.to_regclass('walferry.stream_lost') is not null";
    if !session.query_one(there, &[]).await?.bool(0)? {
        return Ok(HashMap::new());
    }
    let sql = "select schema || '.' || name, changes from walferry.stream_lost where stream = $1";
    let rows = session.query_params(sql, &[Some(stream)]).await?;
    rows.iter().map(|row| Ok((row.string(0)?, row.parse(1)?))).collect()
}

/// A side's clock and the end of its log.
async fn stand(session: &mut Session) -> pg::Result<(String, Lsn)> {
    let sql = "select pg_catalog.clock_timestamp(), pg_catalog.pg_current_wal_insert_lsn()";
    let row = session.query_one(sql, &[]).await?;
    Ok((row.string(0)?, row.lsn(1)?))
}

/// What committed before `clock` on the side that `stream` reads is known to this one.
async fn know(session: &mut Session, stream: &str, clock: &str) -> Result<()> {
    let sql = "insert into walferry.two_way as w (stream, seen_before) \
         values ($1, $2::timestamptz) on conflict (stream) do update \
         set seen_before = greatest(w.seen_before, excluded.seen_before)";
    session.query_params(sql, &[Some(stream), Some(clock)]).await?;
    Ok(())
}

/// Forgets what is not needed any more, for as long as it is not dropped. A broken session is no
/// reason to stop: it only forgets later.
async fn keep(config: JobConfig) {
    loop {
        if let Err(error) = forget_known(&config).await {
            tracing::info!(%error, "nothing forgotten of what both sides know");
        }
        tokio::time::sleep(TURN).await;
    }
}

/// One round: see the essay.
async fn forget_known(config: &JobConfig) -> Result<()> {
    let mut source = Session::control(&config.source).await?;
    let mut target = Session::control(&config.target).await?;
    let forward = config.job.object(Stream::Forward);
    let reverse = config.job.object(Stream::Reverse);
    let mut clocks = None;
    for _ in 0..2 {
        let (source_clock, source_lsn) = stand(&mut source).await?;
        let (target_clock, target_lsn) = stand(&mut target).await?;
        clocks.get_or_insert((source_clock, target_clock));
        while !(passed(&mut target, &forward, source_lsn).await?
            && passed(&mut source, &reverse, target_lsn).await?)
        {
            tokio::time::sleep(TURN).await;
        }
    }
    let Some((source_clock, target_clock)) = clocks else { return Ok(()) };
    let slack = format!("{} s", SLACK.as_secs());
    for (session, stream, read, written) in [
        (&mut target, &forward, &source_clock, &target_clock),
        (&mut source, &reverse, &target_clock, &source_clock),
    ] {
        let before = "select ($1::timestamptz - $2::text::interval)::text";
        let read = session.query_one(before, &[Some(read), Some(&slack)]).await?.string(0)?;
        let written = session.query_one(before, &[Some(written), Some(&slack)]).await?.string(0)?;
        know(session, stream, &read).await?;
        let sql = "delete from walferry.two_way_applied where stream = $1 \
             and commit_time < $2::timestamptz and at < $3::timestamptz - interval '10 s'";
        session.query_params(sql, &[Some(stream), Some(&read), Some(&written)]).await?;
        let sql = "delete from walferry.two_way_deleted \
             where pg_catalog.pg_xact_commit_timestamp(xmin) < $1::timestamptz";
        session.query_params(sql, &[Some(&written)]).await?;
        // Of versions older than commit times are kept none is a rival.
        let sql = "delete from walferry.two_way_left where coalesce( \
             pg_catalog.pg_xact_commit_timestamp(xid) < $1::timestamptz, true)";
        session.query_params(sql, &[Some(&written)]).await?;
    }
    Ok(())
}

async fn passed(session: &mut Session, stream: &str, lsn: Lsn) -> Result<bool> {
    let sql = "select end_lsn >= $2::pg_lsn from walferry.progress where stream = $1";
    let row = session.query_opt(sql, &[Some(stream), Some(&*lsn.to_string())]).await?;
    row.map_or(Ok(false), |row| Ok(row.bool(0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_draws_what_the_other_never_does_and_nothing_twice() {
        // A copy that has drawn nothing, one that was ahead, and sequences that count down.
        assert_eq!(between(100, 1, 1), 101);
        assert_eq!(between(100, 101, 1), 103);
        assert_eq!(between(100, 250, 1), 251);
        assert_eq!(between(100, 251, 1), 253);
        assert_eq!(between(-100, -1, -5), -105);
        assert_eq!(between(-100, -105, -5), -115);
        assert_eq!(between(-100, -110, -5), -115);
    }
}
