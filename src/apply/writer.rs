//! One batch in one round trip: BEGIN, rows, counters, progress, COMMIT, where the log stands.

use std::sync::Arc;

use super::batch::Batch;
use super::count::{self, Counts};
use super::error::{self, Culprit, Error, Result};
use super::progress::Progress;
use super::routing::{Prepared, Route, Routes};
use super::shape::{Shape, Unfit, describe_key};
use super::statement::{self, GUARD_PREFIX};
use super::{MESSAGE_PREFIX, Message, Options};
use crate::change::{Begin, Change, Relation, Snapshot};
use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::pg::{self, Pipeline, Reply, Session};

/// Prepared statements kept on the server; beyond that all are dropped and made again as needed.
/// Columns left out of an UPDATE by TOAST, and NULLs under REPLICA IDENTITY FULL, multiply them.
const PREPARED_MAX: usize = 1000;

/// What a written batch came to.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Row statements, each of which touched its row.
    pub rows: u64,
    /// After COMMIT: where the target's log stood, and how much of it was flushed. `None` if the
    /// batch had nothing to write, or its transaction is still open.
    pub position: Option<(Lsn, Lsn)>,
}

/// Puts batches into statements. Belongs to one session.
pub(super) struct Writer {
    stream: String,
    routes: Routes,
    /// Number of prepared statements, and of names given so far.
    prepared: usize,
    named: u64,
    /// Of the target transaction under way, to be handed on once it is committed.
    messages: Vec<Message>,
}

/// What each reply of the exchange will be about.
struct Plan {
    pipeline: Pipeline,
    /// For each row statement, its chunk and change in the batch.
    rows: Vec<(usize, usize)>,
    /// Row statements that are bare INSERTs, by place among `rows`.
    bare: Vec<bool>,
    opens: bool,
    /// Statements before the rows: BEGIN, and what tags the transaction where no origin does.
    head: usize,
    /// Whether progress is recorded before the rows, and not after them.
    records_first: bool,
    /// Whether counters, progress, COMMIT and position follow the rows.
    commits: bool,
    counts: bool,
}

impl Plan {
    fn counts_at(&self) -> usize {
        self.head + self.rows.len()
    }

    fn progress_at(&self) -> usize {
        if self.records_first { 1 } else { self.counts_at() + usize::from(self.counts) }
    }

    fn commit_at(&self) -> usize {
        self.counts_at() + usize::from(self.counts) + usize::from(!self.records_first)
    }

    fn row_of(&self, statement: usize) -> Option<usize> {
        statement.checked_sub(self.head).filter(|row| *row < self.rows.len())
    }
}

/// What came back.
#[derive(Default)]
struct Replies {
    done: usize,
    commit_tag: Option<String>,
    position: Option<pg::Row>,
    /// A bare INSERT whose tag was not `INSERT 0 1`.
    odd: Option<usize>,
}

impl Writer {
    /// Prepares the statements every batch needs.
    pub async fn new(session: &mut Session, options: &Options) -> Result<Writer> {
        let mut pipeline = Pipeline::new();
        pipeline.parse("walferry_begin", "begin", &[]);
        pipeline.parse("walferry_commit", "commit", &[]);
        pipeline.parse("walferry_position", super::POSITION, &[]);
        pipeline.parse("walferry_counts", count::UPSERT, &[]);
        match session.exchange(pipeline, |_| {}).await {
            Err(error) if matches!(error.code(), Some("3F000" | "42P01")) => {
                return Err(Error::NoState { ddl: super::DDL, source: Box::new(error) });
            }
            outcome => outcome?,
        }
        Ok(Writer {
            stream: options.stream.clone(),
            routes: Routes::new(options),
            prepared: 0,
            named: 0,
            messages: Vec::new(),
        })
    }

    /// Writes a batch; on an error the target transaction is not committed, and the session must
    /// not be used for another batch.
    pub async fn write(
        &mut self,
        session: &mut Session,
        progress: &Progress,
        previous_lsn: Lsn,
        batch: &Batch,
    ) -> Result<Written> {
        self.routes.retire();
        for change in batch.chunks.iter().flat_map(|c| &c.changes) {
            for relation in relations(change) {
                self.routes.ensure(session, relation).await?;
            }
        }
        let mut plan = self.plan(progress, previous_lsn, batch)?;
        self.close(&mut plan, progress, previous_lsn, batch)?;
        if plan.pipeline.is_empty() {
            return Ok(Written::default());
        }
        let pipeline = std::mem::take(&mut plan.pipeline);
        let mut replies = Replies::default();
        let outcome = session.exchange(pipeline, |reply| replies.take(&plan, reply)).await;
        if let Err(error) = outcome {
            return Err(self.explain(session, progress, batch, &plan, replies.done, error).await);
        }
        self.settle(batch, &plan, replies)
    }

    /// The target transaction under way is rolled back.
    pub fn abandon(&mut self) {
        self.messages.clear();
        self.routes.iter_mut().for_each(|r| r.counts = Counts::default());
    }

    /// Messages of the transactions committed since the last call.
    pub fn take_messages(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.messages)
    }

    /// BEGIN, if the batch opens and has something to write, and the transaction's tag.
    fn head(&self, plan: &mut Plan, progress: &Progress, previous_lsn: Lsn, batch: &Batch) {
        if !plan.opens {
            return;
        }
        plan.pipeline.run("walferry_begin", std::iter::empty());
        plan.head = 1;
        if progress.is_marker() {
            plan.head = 2;
            plan.records_first = batch.commit.is_some();
            match &batch.commit {
                Some(commit) => progress.record(&mut plan.pipeline, previous_lsn, commit),
                None => progress.mark(&mut plan.pipeline),
            }
        }
    }

    /// The row statements behind their head.
    fn plan(&mut self, progress: &Progress, previous_lsn: Lsn, batch: &Batch) -> Result<Plan> {
        let mut plan = Plan {
            pipeline: Pipeline::new(),
            rows: Vec::new(),
            bare: Vec::new(),
            opens: batch.opens && self.has_rows(batch),
            head: 0,
            records_first: false,
            commits: false,
            counts: false,
        };
        self.forget_discarded(&mut plan.pipeline);
        self.head(&mut plan, progress, previous_lsn, batch);
        for (chunk_at, chunk) in batch.chunks.iter().enumerate() {
            for (change_at, change) in chunk.changes.iter().enumerate() {
                let bare = match change {
                    Change::Message { .. } => {
                        self.keep_message(change);
                        None
                    }
                    Change::Truncate { relations, restart_identity, .. } => {
                        self.truncate(&mut plan, &chunk.begin, relations, *restart_identity)
                    }
                    _ => self.row(&mut plan, &chunk.begin, change)?,
                };
                if let Some(bare) = bare {
                    plan.rows.push((chunk_at, change_at));
                    plan.bare.push(bare);
                }
            }
        }
        Ok(plan)
    }

    /// A target transaction is worth its while for row changes, filtered ones included as they are
    /// counted, and for one that goes on in the next batch. Empty transactions and messages only
    /// move the position.
    fn has_rows(&self, batch: &Batch) -> bool {
        let mut changes = batch.chunks.iter().flat_map(|c| &c.changes);
        batch.commit.is_none() || changes.any(|c| relations(c).next().is_some())
    }

    /// Counters, progress, COMMIT and the question where the log stands.
    fn close(
        &mut self,
        plan: &mut Plan,
        progress: &Progress,
        previous_lsn: Lsn,
        batch: &Batch,
    ) -> Result<()> {
        let Some(commit) = &batch.commit else { return Ok(()) };
        if batch.opens && !plan.opens {
            return Ok(());
        }
        plan.commits = true;
        let counts: Vec<(&QualifiedName, Counts)> = self.routes.counts().into_iter().collect();
        for (table, counts) in &counts {
            counts.check(table)?;
        }
        if !counts.is_empty() {
            plan.counts = true;
            let params = count::upsert_params(&counts);
            let params = std::iter::once(self.stream.as_bytes())
                .chain(params.iter().map(|p| p.as_bytes()))
                .map(Some);
            plan.pipeline.run("walferry_counts", params);
        }
        self.routes.iter_mut().for_each(|r| r.counts = Counts::default());
        if !plan.records_first {
            progress.record(&mut plan.pipeline, previous_lsn, commit);
        }
        plan.pipeline.run("walferry_commit", std::iter::empty());
        plan.pipeline.run("walferry_position", std::iter::empty());
        Ok(())
    }

    fn keep_message(&mut self, change: &Change) {
        if let Change::Message { lsn, prefix, content, .. } = change
            && prefix.starts_with(MESSAGE_PREFIX)
        {
            let (lsn, prefix, content) = (*lsn, prefix.clone(), content.clone());
            self.messages.push(Message { prefix, content, lsn });
        }
    }

    /// Adds the statement of one row change; `None` if it is filtered, else whether it is a bare
    /// INSERT.
    fn row(&mut self, plan: &mut Plan, begin: &Begin, change: &Change) -> Result<Option<bool>> {
        let relation = relations(change).next();
        let shut = relation.is_some_and(|r| self.routes.is_shut(r));
        let Some(route) = relation.and_then(|r| self.routes.get_mut(r)) else {
            return Err(Error::Broken("a change without a route".to_string()));
        };
        if !count(route, begin, shut) {
            return Ok(None);
        }
        let Some(mapping) = &route.mapping else { return Ok(None) };
        let unfit = |unfit| match unfit {
            Unfit::Broken(text) => Error::Broken(text),
            Unfit::NotIdentified => Error::NotIdentified {
                culprit: Box::new(culprit(route, begin, change)),
                quoted: route.relation.name.quoted(),
            },
        };
        let Some(shape) = Shape::new(&route.relation, mapping, change).map_err(unfit)? else {
            return Ok(None);
        };
        if !route.statements.contains_key(&shape.key) {
            let statement = shape.statement(mapping);
            self.named += 1;
            self.prepared += 1;
            let name = format!("walferry_{}", self.named);
            plan.pipeline.parse(&name, &statement.sql, &[]);
            let prepared = Prepared { name, binds: statement.binds };
            route.statements.insert(shape.key.clone(), prepared);
        }
        if let Some(prepared) = route.statements.get(&shape.key) {
            let params = match shape.params(&route.relation, &prepared.binds) {
                Ok(params) => params,
                Err(Unfit::Broken(text)) => return Err(Error::Broken(text)),
                Err(Unfit::NotIdentified) => return Err(Error::Broken(String::new())),
            };
            plan.pipeline.run(&prepared.name, params.into_iter());
        }
        let bare = matches!(change, Change::Insert { .. }) && !mapping.table.counts_inserts;
        Ok(Some(bare))
    }

    /// Adds one TRUNCATE of those tables that are neither outside the job nor newer on the target.
    fn truncate(
        &mut self,
        plan: &mut Plan,
        begin: &Begin,
        relations: &[Arc<Relation>],
        restart_identity: bool,
    ) -> Option<bool> {
        let mut written = Vec::new();
        for relation in relations {
            let shut = self.routes.is_shut(relation);
            let Some(route) = self.routes.get_mut(relation) else { continue };
            if count(route, begin, shut) && !written.contains(&relation) {
                written.push(relation);
            }
        }
        let mappings = written.iter().filter_map(|r| self.routes.get(r)?.mapping.as_ref());
        let tables: Vec<_> = mappings.map(|m| &m.table).collect();
        if tables.is_empty() {
            return None;
        }
        plan.pipeline.once(&statement::truncate(&tables, restart_identity));
        Some(false)
    }

    /// Drops prepared statements that no route uses, or all of them if there are too many.
    fn forget_discarded(&mut self, pipeline: &mut Pipeline) {
        let mut names = std::mem::take(&mut self.routes.discarded);
        if self.prepared > PREPARED_MAX {
            for route in self.routes.iter_mut() {
                names.extend(route.statements.drain().map(|(_, p)| p.name));
            }
        }
        self.prepared = self.prepared.saturating_sub(names.len());
        names.iter().for_each(|name| pipeline.close(name));
    }

    /// Holds the replies against the plan.
    fn settle(&self, batch: &Batch, plan: &Plan, replies: Replies) -> Result<Written> {
        if let Some(row) = replies.odd {
            return Err(self.row_missing(batch, plan, row, "0".to_string()));
        }
        let due = if plan.commits { plan.commit_at() + 2 } else { plan.counts_at() };
        if plan.commits {
            let end_lsn = batch.commit.map_or(Lsn::ZERO, |c| c.end_lsn);
            let tag = replies.commit_tag.unwrap_or_default();
            if tag != "COMMIT" {
                return Err(Error::NotCommitted { tag, end_lsn });
            }
        }
        if replies.done != due {
            let done = replies.done;
            return Err(Error::Broken(format!("{done} replies where {due} are due")));
        }
        let position = match replies.position {
            Some(row) => Some((row.lsn(0)?, row.lsn(1)?)),
            None => None,
        };
        Ok(Written { rows: plan.rows.len() as u64, position })
    }

    /// Which statement failed, and what that means: `done` statements before it were answered.
    async fn explain(
        &self,
        session: &mut Session,
        progress: &Progress,
        batch: &Batch,
        plan: &Plan,
        done: usize,
        error: pg::Error,
    ) -> Error {
        let Some(server) = error.server() else { return error.into() };
        if error.is_closed() || error.fault() == Fault::Retry {
            return error.into();
        }
        if plan.commits && done == plan.progress_at() {
            return progress.explain(session, error).await;
        }
        let Some(row) = plan.row_of(done) else { return error.into() };
        let guard = server.message.split_once(GUARD_PREFIX).filter(|_| server.code == "22P02");
        if let Some((_, rest)) = guard {
            let rows = rest.chars().take_while(char::is_ascii_digit).collect();
            return self.row_missing(batch, plan, row, rows);
        }
        let Some(culprit) = self.culprit(batch, plan, row) else { return error.into() };
        Error::Refused {
            culprit: Box::new(culprit),
            said: error::said(server),
            advice: error::advice(&server.code),
            source: Box::new(error),
        }
    }

    fn row_missing(&self, batch: &Batch, plan: &Plan, row: usize, rows: String) -> Error {
        match self.culprit(batch, plan, row) {
            Some(culprit) => Error::RowMissing { culprit: Box::new(culprit), rows },
            None => Error::Broken(format!("statement {row} met {rows} rows")),
        }
    }

    fn culprit(&self, batch: &Batch, plan: &Plan, row: usize) -> Option<Culprit> {
        let (chunk_at, change_at) = *plan.rows.get(row)?;
        let chunk = batch.chunks.get(chunk_at)?;
        let change = chunk.changes.get(change_at)?;
        let route = self.routes.get(relations(change).next()?)?;
        Some(culprit(route, &chunk.begin, change))
    }
}

impl Replies {
    fn take(&mut self, plan: &Plan, reply: Reply) {
        match reply {
            Reply::Row(row) => {
                if plan.commits && self.done == plan.commit_at() + 1 {
                    self.position = Some(row);
                }
            }
            Reply::Done(tag) => {
                let row = plan.row_of(self.done);
                if let Some(row) = row.filter(|row| plan.bare.get(*row) == Some(&true))
                    && tag != "INSERT 0 1"
                {
                    self.odd = self.odd.or(Some(row));
                }
                if plan.commits && self.done == plan.commit_at() {
                    self.commit_tag = Some(tag);
                }
                self.done += 1;
            }
        }
    }
}

/// Counts a change of the route's table; true if it is to be written.
fn count(route: &mut Route, begin: &Begin, shut: bool) -> bool {
    route.counts.decoded += 1;
    let seen =
        |(snapshot, lsn): &(Snapshot, Lsn)| begin.commit_lsn < *lsn && snapshot.sees(begin.xid);
    let copied = route.copied.as_ref().is_some_and(seen);
    if shut || route.mapping.is_none() || copied {
        route.counts.filtered += 1;
        return false;
    }
    route.counts.applied += 1;
    true
}

/// The tables a change touches.
fn relations(change: &Change) -> impl Iterator<Item = &Arc<Relation>> {
    let (one, many): (Option<&Arc<Relation>>, &[Arc<Relation>]) = match change {
        Change::Insert { relation, .. }
        | Change::Update { relation, .. }
        | Change::Delete { relation, .. } => (Some(relation), &[]),
        Change::Truncate { relations, .. } => (None, relations),
        Change::Message { .. } => (None, &[]),
    };
    one.into_iter().chain(many)
}

fn culprit(route: &Route, begin: &Begin, change: &Change) -> Culprit {
    let operation = match change {
        Change::Insert { .. } => "INSERT",
        Change::Update { .. } => "UPDATE",
        Change::Delete { .. } => "DELETE",
        Change::Truncate { .. } => "TRUNCATE",
        Change::Message { .. } => "MESSAGE",
    };
    let key = match &route.mapping {
        Some(mapping) => describe_key(&route.relation, mapping, change),
        None => "(unknown)".to_string(),
    };
    Culprit {
        operation,
        table: route.relation.name.clone(),
        key,
        commit_lsn: begin.commit_lsn,
        xid: begin.xid,
    }
}
