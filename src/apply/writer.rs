//! One batch in one round trip: BEGIN, rows, counters, progress, COMMIT, where the log stands.
//!
//! # Set order and row order
//! A batch is written as sets where that pays (`sets`), else one statement a change (`rows`). Both
//! come to the same end, but on the way there set order may break what row order does not: a unique
//! or exclusion constraint, for a moment, or a row's way from one partition to another. Then, and
//! whenever the target refuses anything of a set, what was written of the batch is rolled back, and
//! it is written once more in row order. So an error always names a row, not a set, and set order
//! needs no proof that it will do.

use super::admit::{self, Admitted, relations};
use super::batch::Batch;
use super::count::{self, Counts};
use super::error::{self, Culprit, Error, Result};
use super::progress::Progress;
use super::request::{Replies, Request, Role};
use super::routing::{Names, Routes};
use super::rows::culprit;
use super::statement::GUARD_PREFIX;
use super::{Message, Mode, Options};
use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::pg::{self, Pipeline, Session};

/// Prepared statements kept on the server; beyond that all are dropped and made again as needed.
/// Columns left out of an UPDATE by TOAST, and NULLs under REPLICA IDENTITY FULL, multiply them.
const PREPARED_MAX: usize = 1000;

/// A batch of fewer changes is written in row order: its statements are ready, and a source that is
/// not busy gets the shorter way.
const SET_CHANGES_MIN: usize = 64;

/// What a written batch came to.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Row changes of the batch, each of which is on the target.
    pub rows: u64,
    /// After COMMIT: where the target's log stood, and how much of it was flushed. `None` if the
    /// batch had nothing to write, or its transaction is still open.
    pub position: Option<(Lsn, Lsn)>,
    /// Set order was refused, and row order taken.
    pub fell_back: bool,
}

/// Puts batches into statements. Belongs to one session.
pub(super) struct Writer {
    stream: String,
    mode: Mode,
    /// However few changes there are.
    pub(super) always_sets: bool,
    pub(super) routes: Routes,
    pub(super) names: Names,
    /// Of the target transaction under way, to be handed on once it is committed.
    messages: Vec<Message>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Rows,
    Sets,
}

/// A batch with all that is decided before it is written.
struct Draft<'a> {
    batch: &'a Batch,
    admitted: Admitted,
    /// Parameters of the counters' statement, if there is anything to count.
    counts: Option<Vec<String>>,
    previous_lsn: Lsn,
    /// The target transaction begins, and ends, with this batch.
    opens: bool,
    commits: bool,
}

impl Writer {
    /// Prepares the statements every batch needs.
    pub async fn new(session: &mut Session, options: &Options) -> Result<Writer> {
        let mut pipeline = Pipeline::new();
        pipeline.parse("walferry_begin", "begin", &[]);
        pipeline.parse("walferry_commit", "commit", &[]);
        pipeline.parse("walferry_position", super::POSITION, &[]);
        pipeline.parse("walferry_counts", count::UPSERT, &[]);
        pipeline.parse("walferry_fallback", count::FALLBACK, &[]);
        match session.exchange(pipeline, |_| {}).await {
            Err(error) if matches!(error.code(), Some("3F000" | "42P01")) => {
                return Err(Error::NoState { ddl: super::DDL, source: Box::new(error) });
            }
            outcome => outcome?,
        }
        Ok(Writer {
            stream: options.stream.clone(),
            mode: options.mode,
            always_sets: options.mode == Mode::Sets,
            routes: Routes::new(options),
            names: Names::default(),
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
        let draft = self.draft(previous_lsn, batch)?;
        let order = self.order(&draft.admitted);
        let mut request = self.request(progress, &draft, order, false)?;
        let mut replies = Replies::default();
        let outcome = exchange(session, &mut request, &mut replies).await;
        let written = match outcome {
            Err(error) if order == Order::Sets && falls_back(&error, &replies, &request.roles) => {
                tracing::debug!(%error, "set order refused, trying row order");
                self.roll_back(session, &draft).await?;
                request = self.request(progress, &draft, Order::Rows, true)?;
                replies = Replies::default();
                let outcome = exchange(session, &mut request, &mut replies).await;
                self.settle(session, progress, &draft, &request, replies, outcome).await?
            }
            outcome => {
                self.settle(session, progress, &draft, &request, replies, outcome).await?
            }
        };
        let rows = draft.admitted.steps.len() as u64;
        let fell_back = request.fallback;
        Ok(Written { rows, position: written, fell_back })
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

    fn draft<'a>(&mut self, previous_lsn: Lsn, batch: &'a Batch) -> Result<Draft<'a>> {
        let mut admitted = admit::admit(&mut self.routes, batch)?;
        self.messages.append(&mut admitted.messages);
        let opens = batch.opens && has_rows(batch);
        let commits = batch.commit.is_some() && (opens || !batch.opens);
        let counts = if commits { self.counts()? } else { None };
        Ok(Draft { batch, admitted, counts, previous_lsn, opens, commits })
    }

    /// Takes the books of the target transaction under way.
    fn counts(&mut self) -> Result<Option<Vec<String>>> {
        let counts: Vec<(&QualifiedName, Counts)> = self.routes.counts().into_iter().collect();
        for (table, counts) in &counts {
            counts.check(table)?;
        }
        let params = (!counts.is_empty()).then(|| count::upsert_params(&counts));
        self.routes.iter_mut().for_each(|r| r.counts = Counts::default());
        Ok(params)
    }

    fn order(&self, admitted: &Admitted) -> Order {
        let pays = admitted.steps.len() >= SET_CHANGES_MIN || admitted.searches > 1;
        match self.mode {
            _ if admitted.acts => Order::Rows,
            Mode::Rows => Order::Rows,
            Mode::Sets => Order::Sets,
            Mode::Auto if pays => Order::Sets,
            Mode::Auto => Order::Rows,
        }
    }

    /// Everything from BEGIN, if the batch opens and has something to write, to the position.
    fn request(
        &mut self,
        progress: &Progress,
        draft: &Draft<'_>,
        order: Order,
        fallback: bool,
    ) -> Result<Request> {
        let mut request = Request { fallback, ..Request::default() };
        self.forget_discarded(&mut request.pipeline);
        if draft.opens {
            request.run("walferry_begin", Role::Aside);
        }
        // Earlier parts of the transaction must outlive a refusal of this one.
        let saves = order == Order::Sets && !draft.batch.opens;
        if saves {
            request.aside("savepoint walferry");
        }
        let steps = &draft.admitted.steps;
        match order {
            Order::Sets => self.sets(&mut request, draft.batch, steps)?,
            Order::Rows => {
                for (at, step) in steps.iter().enumerate() {
                    self.step(&mut request, draft.batch, at, step)?;
                }
            }
        }
        if saves {
            request.aside("release savepoint walferry");
        }
        if fallback {
            request.pipeline.run("walferry_fallback", [Some(self.stream.as_bytes())].into_iter());
            request.roles.push(Role::Aside);
        }
        if let (true, Some(commit)) = (draft.commits, &draft.batch.commit) {
            if let Some(counts) = &draft.counts {
                let counts = counts.iter().map(|p| p.as_bytes());
                let params = std::iter::once(self.stream.as_bytes()).chain(counts).map(Some);
                request.pipeline.run("walferry_counts", params);
                request.roles.push(Role::Aside);
            }
            progress.record(&mut request.pipeline, draft.previous_lsn, commit);
            request.roles.push(Role::Progress);
            request.run("walferry_commit", Role::Commit);
            request.run("walferry_position", Role::Position);
        }
        Ok(request)
    }

    /// Undoes what the batch wrote, up to where it began. Statements that were to be prepared after
    /// the one that failed are not there, so all are made again.
    async fn roll_back(&mut self, session: &mut Session, draft: &Draft<'_>) -> Result<()> {
        self.routes.forget_statements();
        let sql = match draft.batch.opens {
            true => "rollback",
            false => "rollback to savepoint walferry",
        };
        session.execute(sql).await?;
        Ok(())
    }

    /// Drops prepared statements that no route uses, or all of them if there are too many.
    fn forget_discarded(&mut self, pipeline: &mut Pipeline) {
        if self.names.prepared > PREPARED_MAX {
            self.routes.forget_statements();
        }
        let names = std::mem::take(&mut self.routes.discarded);
        self.names.prepared = self.names.prepared.saturating_sub(names.len());
        names.iter().for_each(|name| pipeline.close(name));
    }

    /// Holds the replies against the request; gives the position after COMMIT.
    async fn settle(
        &self,
        session: &mut Session,
        progress: &Progress,
        draft: &Draft<'_>,
        request: &Request,
        replies: Replies,
        outcome: pg::Result<()>,
    ) -> Result<Option<(Lsn, Lsn)>> {
        if let Err(error) = outcome {
            let failed = replies.failed(&request.roles);
            return Err(self.explain(session, progress, draft, failed, error).await);
        }
        match replies.odd(&request.roles) {
            Some(Role::Step { at, .. }) => Err(self.row_missing(draft, at, "0".to_string())),
            Some(_) => Err(Error::Broken("a set was not inserted whole".to_string())),
            None => {
                let end_lsn = draft.batch.commit.map_or(Lsn::ZERO, |c| c.end_lsn);
                replies.settle(&request.roles, end_lsn)
            }
        }
    }

    /// Which statement failed, and what that means.
    async fn explain(
        &self,
        session: &mut Session,
        progress: &Progress,
        draft: &Draft<'_>,
        failed: Option<Role>,
        error: pg::Error,
    ) -> Error {
        let Some(server) = error.server() else { return error.into() };
        if error.is_closed() || error.fault() == Fault::Retry {
            return error.into();
        }
        if failed == Some(Role::Progress) {
            return progress.explain(session, error).await;
        }
        let Some(Role::Step { at, .. }) = failed else { return error.into() };
        let guard = server.message.split_once(GUARD_PREFIX).filter(|_| server.code == "22P02");
        if let Some((_, rest)) = guard {
            let rows = rest.chars().take_while(char::is_ascii_digit).collect();
            return self.row_missing(draft, at, rows);
        }
        let Some(culprit) = self.culprit(draft, at) else { return error.into() };
        Error::Refused {
            culprit: Box::new(culprit),
            said: error::said(server),
            advice: error::advice(&server.code),
            source: Box::new(error),
        }
    }

    fn row_missing(&self, draft: &Draft<'_>, at: usize, rows: String) -> Error {
        match self.culprit(draft, at) {
            Some(culprit) => Error::RowMissing { culprit: Box::new(culprit), rows },
            None => Error::Broken(format!("step {at} met {rows} rows")),
        }
    }

    fn culprit(&self, draft: &Draft<'_>, at: usize) -> Option<Culprit> {
        let (chunk, change) = draft.admitted.steps.get(at)?.of(draft.batch)?;
        let route = self.routes.get(relations(change).next()?)?;
        Some(culprit(route, &chunk.begin, change))
    }
}

/// A target transaction is worth its while for row changes, filtered ones included as they are
/// counted, and for one that goes on in the next batch. Empty transactions and messages only move
/// the position.
fn has_rows(batch: &Batch) -> bool {
    let mut changes = batch.chunks.iter().flat_map(|c| &c.changes);
    batch.commit.is_none() || changes.any(|c| relations(c).next().is_some())
}

/// Whether row order may succeed where this refused set order: not where the connection is the
/// cause, or somebody who cancels, or what is not a change of the batch.
fn falls_back(error: &pg::Error, replies: &Replies, roles: &[Role]) -> bool {
    let answered = error.server().is_some_and(|e| e.code != "57014");
    let of_batch = matches!(
        replies.failed(roles),
        Some(Role::Set { .. } | Role::Step { .. } | Role::Aside)
    );
    answered && of_batch && !error.is_closed() && error.fault() != Fault::Retry
}

async fn exchange(
    session: &mut Session,
    request: &mut Request,
    replies: &mut Replies,
) -> pg::Result<()> {
    let pipeline = std::mem::take(&mut request.pipeline);
    if pipeline.is_empty() {
        return Ok(());
    }
    session.exchange(pipeline, |reply| replies.take(&request.roles, reply)).await
}
