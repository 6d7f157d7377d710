//! One source transaction as one target transaction, each of its rows looked at first.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::greatest;
use super::judge::{Act, Incoming, Kind, Local, Op, Rival, Verdict, judge};
use super::look::{LastWriter, shown};
use super::policy::Rule;
use super::{Settler, unique::Hit};
use crate::apply::admit::{self, Admitted, Step};
use crate::apply::batch::Batch;
use crate::apply::error::{Error, Result};
use crate::apply::flight::has_rows;
use crate::apply::lanes::Lane;
use crate::apply::request::{Request, Role};
use crate::apply::rows::culprit;
use crate::apply::statement::Mapping;
use crate::apply::{Applier, count};
use crate::change::{Begin, Change, Commit, OldRow, Relation};
use crate::clock::PgTimestamp;
use crate::pg::{Pipeline, Session};

/// Rows looked at in one round trip.
const LOOKS_MAX: usize = 500;

/// How often a transaction is written again that lost a race, or a deadlock, with a local one.
const TRIES_MAX: u32 = 20;

/// Notes the transaction under way. The clock is read when all rows are locked and written.
const APPLIED: &str = "insert into walferry.two_way_applied \
     (stream, own_xid, xid, commit_time, at) values ($1::text, \
     pg_catalog.txid_current() % 4294967296, $2::int8, $3::timestamptz, \
     pg_catalog.clock_timestamp()) on conflict (stream, own_xid) do update set \
     xid = excluded.xid, commit_time = excluded.commit_time, at = excluded.at";

/// Prepares what every transaction needs.
pub(super) async fn prepare(session: &mut Session) -> Result<()> {
    let mut pipeline = Pipeline::new();
    pipeline.parse("walferry_two_way_applied", APPLIED, &[]);
    pipeline.parse("walferry_two_way_lost", count::LOST, &[]);
    match session.exchange(pipeline, |_| {}).await {
        Err(error) if matches!(error.code(), Some("3F000" | "42P01" | "42703")) => {
            Err(Error::NoState { ddl: super::DDL, source: Box::new(error) })
        }
        outcome => Ok(outcome?),
    }
}

/// A change of the transaction, and how it is found.
pub(super) struct Candidate<'a> {
    /// Its place among the steps.
    pub at: usize,
    pub change: &'a Change,
    pub relation: Arc<Relation>,
    pub key: Vec<Option<String>>,
    pub op: Op,
    pub incoming: Incoming,
}

/// What is written for a candidate.
pub(super) struct Decided {
    pub verdict: Verdict,
    /// The change as it is written; `None`: not at all.
    pub change: Option<Change>,
    /// Rows in the way, and whether they are deleted.
    hits: Vec<Hit>,
    /// The local row under its own key goes, as it lost to one in the way.
    gives_up: bool,
}

/// The transaction under way.
pub(super) struct Frame<'a> {
    pub part: &'a Batch,
    pub begin: &'a Begin,
    pub admitted: &'a Admitted,
    pub commit_time: PgTimestamp,
    /// Change by change, looking at every unique index.
    careful: bool,
}

impl Applier {
    /// Writes what was taken from the stream, transaction by transaction. Nothing else may be under
    /// way.
    pub(in crate::apply) async fn settle(&mut self, batch: Batch) -> Result<()> {
        let batch = self.meet(batch).await?;
        let Some(mut settler) = self.settler.take() else { return Ok(()) };
        let mut outcome = Ok(());
        for part in parts(batch) {
            outcome = self.settle_part(&mut settler, &part).await;
            if outcome.is_err() {
                break;
            }
        }
        self.settler = Some(settler);
        outcome
    }

    /// One transaction, or a part of a large one, until it succeeds.
    async fn settle_part(&mut self, settler: &mut Settler, part: &Batch) -> Result<()> {
        let whole = part.opens && part.commit.is_some();
        if let (true, false, Some(commit)) = (whole, has_rows(part), part.commit) {
            self.passed(commit.end_lsn);
            return Ok(());
        }
        // A part of a large one cannot be written again.
        let mut careful = !whole;
        for tries in 1.. {
            let error = match self.settle_once(settler, part, careful).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let code = error.code().unwrap_or_default().to_string();
            let passing = matches!(&*code, "23505" | "40P01" | "40001" | "55P03");
            if !whole || !passing || tries > TRIES_MAX {
                return Err(error);
            }
            tracing::debug!(%error, tries, "written again");
            careful |= code == "23505";
            if self.session.in_transaction() {
                self.session.execute("rollback").await?;
            }
            self.writer.abandon();
            self.writer.routes.forget_statements(Lane::Main);
        }
        Ok(())
    }

    async fn settle_once(
        &mut self,
        settler: &mut Settler,
        part: &Batch,
        careful: bool,
    ) -> Result<()> {
        let Some(begin) = part.chunks.first().map(|chunk| chunk.begin.clone()) else {
            return Ok(());
        };
        let commit_time = part.commit.map_or(begin.commit_time, |commit| commit.commit_time);
        if commit_time == PgTimestamp(0) {
            // test_decoding tells it at the end.
            return Err(Error::TwoWayWithoutTime { xid: begin.xid });
        }
        let admitted = admit::admit(&mut self.writer.routes, part)?;
        let frame = Frame { part, begin: &begin, admitted: &admitted, commit_time, careful };
        let mut request = self.opening(&frame);
        let mut lost: Vec<Arc<Relation>> = Vec::new();
        let mut written = 0;
        for group in self.groups(settler, &frame).await? {
            let locals = self.look(settler, &frame, request, &group).await?;
            request = Request::default();
            for (candidate, local) in group.iter().zip(locals) {
                let decided = self.decide(settler, &frame, candidate, local).await?;
                self.put(settler, &frame, candidate, &decided, &mut request)?;
                let loses = decided.verdict.act == Act::Nothing;
                let comes = loses && self.arrive(settler, &frame, candidate, &mut request).await?;
                match comes || decided.change.is_some() {
                    true => written += 1,
                    false => lost.push(candidate.relation.clone()),
                }
            }
        }
        for relation in lost {
            if let Some(route) = self.writer.routes.get_mut(&relation) {
                route.counts.applied = route.counts.applied.saturating_sub(1);
                route.counts.lost += 1;
            }
        }
        self.applied.rows += written;
        match part.commit {
            Some(commit) => self.close(settler, &frame, request, commit).await,
            None => self.ask(&frame, request).await.map(|_| ()),
        }
    }

    /// BEGIN, and the transaction's tag where no origin is one.
    fn opening(&mut self, frame: &Frame<'_>) -> Request {
        let mut request = Request::default();
        self.writer.forget_discarded(&mut request);
        if !frame.part.opens {
            return request;
        }
        request.run("walferry_begin", Role::Aside);
        if self.progress.is_marker() {
            self.progress.mark(&mut request.pipeline);
            request.roles.push(Role::Aside);
        }
        request
    }

    /// What is left to say, and COMMIT.
    async fn close(
        &mut self,
        settler: &Settler,
        frame: &Frame<'_>,
        mut request: Request,
        commit: Commit,
    ) -> Result<()> {
        let lost: Vec<String> = count::lost_params(&self.writer.routes.counts());
        // Nothing of it waits beside progress: what is rolled back would wait there too.
        let entry = self.writer.enter()?;
        if self.writer.count(&mut request.pipeline, &entry) {
            request.roles.push(Role::Aside);
        }
        if !lost.is_empty() {
            let stream = std::iter::once(self.writer.stream.as_bytes());
            let params = stream.chain(lost.iter().map(|p| p.as_bytes())).map(Some);
            request.pipeline.run("walferry_two_way_lost", params);
            request.roles.push(Role::Aside);
        }
        let (pipeline, end_lsn) = (&mut request.pipeline, commit.end_lsn);
        self.progress.record(pipeline, self.progress_lsn, end_lsn, &entry);
        request.roles.push(Role::Progress);
        let params =
            [settler.stream.clone(), frame.begin.xid.to_string(), commit.commit_time.to_sql()];
        let params = params.iter().map(|p| Some(p.as_bytes()));
        request.pipeline.run("walferry_two_way_applied", params);
        request.roles.push(Role::Aside);
        request.run("walferry_commit", Role::Commit);
        request.run("walferry_position", Role::Position);
        let answers = self.ask(frame, request).await?;
        let tag = answers.tags.iter().rev().nth(1).cloned().unwrap_or_default();
        if tag != "COMMIT" {
            return Err(Error::NotCommitted { tag, end_lsn: commit.end_lsn });
        }
        let position = answers.rows.last().and_then(|rows| rows.first());
        let position = position.and_then(|row| row.lsn(0).ok().zip(row.lsn(1).ok()));
        self.progress_lsn = commit.end_lsn;
        self.applied.applied_lsn = commit.end_lsn;
        self.applied.last_end_lsn = commit.end_lsn;
        self.applied.commit_time = Some(commit.commit_time);
        self.applied.transactions += 1;
        self.landed_at = Instant::now();
        self.durable.committed(commit.end_lsn);
        if let Some((insert_lsn, flush_lsn)) = position {
            self.durable.stands(insert_lsn, flush_lsn);
        }
        Ok(())
    }

    /// The transaction's changes in order, cut before a key that was met already, as what it is
    /// then depends on what was written.
    async fn groups<'a>(
        &mut self,
        settler: &mut Settler,
        frame: &Frame<'a>,
    ) -> Result<Vec<Vec<Candidate<'a>>>> {
        let mut groups: Vec<Vec<Candidate<'a>>> = Vec::new();
        let mut met = HashSet::new();
        let most = if frame.careful { 1 } else { LOOKS_MAX };
        for (at, step) in frame.admitted.steps.iter().enumerate() {
            let Some((_, change)) = step.of(frame.part) else { continue };
            if let Step::Truncate(_, _, tables) = step
                && let Some(relation) = tables.first()
            {
                return Err(Error::TwoWayTruncate { table: relation.name.clone() });
            }
            let Some(relation) = change.relations().first().cloned() else { continue };
            let op = match change {
                Change::Insert { .. } => Op::Insert,
                Change::Update { .. } => Op::Update,
                _ => Op::Delete,
            };
            if settler.plan(&relation).is_err() {
                let mapping = self.mapping(&relation)?;
                settler.meet(&mut self.session, &relation, &mapping).await?;
            }
            let plan = settler.plan(&relation)?;
            let (stream, commit_time) = (settler.options.stream, frame.commit_time);
            let incoming = Incoming { rule: plan.rule, stream, commit_time };
            let (key, moved) = plan.keys(change);
            let table = Arc::as_ptr(&relation).addr();
            let keys = std::iter::once(key.clone()).chain(moved);
            let keys: Vec<_> = keys.map(|key| (table, key)).collect();
            let fresh = !keys.iter().any(|key| met.contains(key));
            let open = groups.last().is_some_and(|group| group.len() < most);
            if !fresh || !open {
                met.clear();
                groups.push(Vec::new());
            }
            met.extend(keys);
            let candidate = Candidate { at, change, relation, key, op, incoming };
            if let Some(group) = groups.last_mut() {
                group.push(candidate);
            }
        }
        Ok(groups)
    }

    pub(super) fn mapping(&self, relation: &Arc<Relation>) -> Result<Mapping> {
        let route = self.writer.routes.get(relation);
        let mapping = route.and_then(|route| route.mapping.clone());
        mapping.ok_or_else(|| Error::Broken(format!("{} has no route", relation.name)))
    }

    /// What becomes of one change.
    pub(super) async fn decide(
        &mut self,
        settler: &mut Settler,
        frame: &Frame<'_>,
        candidate: &Candidate<'_>,
        local: Local,
    ) -> Result<Decided> {
        let verdict = judge(candidate.op, local, &candidate.incoming);
        self.refuse(frame, candidate, verdict.rival.and(verdict.conflict))?;
        let change = rewritten(settler, candidate, verdict).await?;
        let mut decided = Decided { verdict, change, hits: Vec::new(), gives_up: false };
        let Some(change) = decided.change.as_ref().filter(|_| frame.careful) else {
            return Ok(decided);
        };
        let mapping = self.mapping(&candidate.relation)?;
        let (table, row) = ((&candidate.relation, &mapping), (&*candidate.key, change));
        let hits = settler.hits(&mut self.session, table, row, &candidate.incoming).await?;
        if hits.is_empty() {
            return Ok(decided);
        }
        self.refuse(frame, candidate, Some(Kind::Unique))?;
        let wins = |hit: &Hit| hit.rival.is_none_or(|rival| candidate.incoming.wins(rival));
        if !hits.iter().all(wins) {
            decided.gives_up = matches!(local, Local::Row(_));
            decided.change = None;
        }
        decided.hits = hits;
        Ok(decided)
    }

    /// Under the policy `error` a conflict stops the stream.
    fn refuse(
        &self,
        frame: &Frame<'_>,
        candidate: &Candidate<'_>,
        conflict: Option<Kind>,
    ) -> Result<()> {
        let Some(kind) = conflict.filter(|_| candidate.incoming.rule == Some(Rule::Error)) else {
            return Ok(());
        };
        let Some(route) = self.writer.routes.get(&candidate.relation) else { return Ok(()) };
        let culprit = culprit(route, frame.begin, candidate.change, 0);
        Err(Error::Conflict { kind: kind.as_str(), culprit: Box::new(culprit) })
    }

    /// Adds what is written for a candidate: records first, as they show the local row.
    pub(super) fn put(
        &mut self,
        settler: &Settler,
        frame: &Frame<'_>,
        candidate: &Candidate<'_>,
        decided: &Decided,
        request: &mut Request,
    ) -> Result<()> {
        let plan = settler.plan(&candidate.relation)?;
        let table = candidate.relation.name.quoted();
        let outcome = if decided.change.is_some() { "applied" } else { "kept" };
        let record = |kind: Kind, rival: Option<Rival>| {
            vec![
                Some(kind.as_str().to_string()),
                Some(outcome.to_string()),
                Some(shown(&candidate.relation, candidate.change)),
                Some(frame.begin.commit_lsn.to_string()),
                Some(frame.begin.xid.to_string()),
                Some(frame.commit_time.to_sql()),
                rival.map(|rival| rival.xid.to_string()),
                rival.map(|rival| rival.commit_time.to_sql()),
            ]
        };
        if let Some(kind) = decided.verdict.conflict {
            let mut params = record(kind, decided.verdict.rival);
            params.extend(candidate.key.iter().cloned());
            request.pipeline.run(&plan.record, bytes(&params));
            request.roles.push(Role::Aside);
        }
        for hit in &decided.hits {
            let (of_hit, key) = plan.at(&table, &hit.ctid);
            let row = format!("select pg_catalog.to_jsonb(t) from only {table} t where {of_hit}");
            let name = "";
            request.pipeline.parse(name, &settler.record_sql(plan, &row), &[]);
            request.pipeline.run(name, bytes(&record(Kind::Unique, hit.rival)));
            request.roles.push(Role::Aside);
            if decided.change.is_some() {
                if plan.scale.is_some() {
                    request.aside(&greatest::forget(&table, &key));
                }
                request.aside(&format!("delete from only {table} t where {of_hit}"));
            }
        }
        let overwrites = decided.change.is_some() && decided.verdict.rival.is_some();
        if plan.scale.is_some() && (overwrites || decided.gives_up) {
            request.pipeline.run(&plan.forget, bytes(&candidate.key));
            request.roles.push(Role::Aside);
        }
        if decided.gives_up {
            let sql = format!("delete from only {table} t where {}", plan.has_key(1));
            request.pipeline.parse("", &sql, &[]);
            request.pipeline.run("", bytes(&candidate.key));
            request.roles.push(Role::Aside);
        }
        if let Some(change) = &decided.change {
            self.writer.row(request, frame.begin, change)?;
            request.roles.push(Role::Step { at: candidate.at, bare: false });
        }
        Ok(())
    }
}

impl Settler {
    /// The last writer, if the change was made without knowing what it wrote.
    pub(super) async fn rival(
        &mut self,
        last: LastWriter,
        commit_time: PgTimestamp,
    ) -> Result<Option<Rival>> {
        let Some(rival) = last.local.filter(|_| !last.ours) else { return Ok(None) };
        Ok(if self.knew(rival, commit_time).await? { None } else { Some(rival) })
    }
}

/// The change as it is written. Values that it lacks are those of a row that is not here.
async fn rewritten(
    settler: &mut Settler,
    candidate: &Candidate<'_>,
    verdict: Verdict,
) -> Result<Option<Change>> {
    let relation = candidate.relation.clone();
    Ok(match (verdict.act, candidate.change) {
        (Act::Nothing, _) => None,
        (Act::Insert, Change::Update { new, .. }) => {
            let new = settler.filled(&relation, new).await?;
            new.map(|new| Change::Insert { relation: relation.clone(), new })
        }
        (Act::Overwrite, Change::Insert { new, .. }) => {
            let full = relation.identity == crate::change::ReplicaIdentity::Full;
            let old = full.then(|| OldRow::Full(new.clone()));
            Some(Change::Update { relation: relation.clone(), old, new: new.clone() })
        }
        (Act::Write, Change::Update { old, new, .. }) if verdict.conflict.is_some() => {
            let new = settler.filled(&relation, new).await?;
            new.map(|new| Change::Update { relation: relation.clone(), old: old.clone(), new })
        }
        (_, change) => Some(change.clone()),
    })
}

pub(super) fn bytes(params: &[Option<String>]) -> impl Iterator<Item = Option<&[u8]>> {
    params.iter().map(|param| param.as_ref().map(|text| text.as_bytes()))
}

/// The transactions of a batch, or the parts of a large one, each by itself.
fn parts(batch: Batch) -> Vec<Batch> {
    let mut parts = Vec::new();
    let (mut chunks, mut opens) = (Vec::new(), batch.opens);
    for chunk in batch.chunks {
        let commit = chunk.commit;
        chunks.push(chunk);
        if commit.is_some() {
            let chunks = std::mem::take(&mut chunks);
            parts.push(Batch { chunks, opens, commit, full: false });
            opens = true;
        }
    }
    if !chunks.is_empty() {
        parts.push(Batch { chunks, opens, commit: None, full: false });
    }
    parts
}
