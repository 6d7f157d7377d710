//! One batch in one round trip: BEGIN, rows, counts, progress, COMMIT, where the log stands.
//!
//! # Set order and row order
//! A batch is written as sets where that pays (`sets`), else one statement a change (`rows`). Both
//! come to the same end, but on the way there set order may break what row order does not: a unique
//! or exclusion constraint, for a moment, or a row's way from one partition to another. Then, and
//! whenever the target refuses anything of a set, what was written of the batch is rolled back, and
//! it is written once more in row order. So an error always names a row, not a set, and set order
//! needs no proof that it will do.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::admit::{self, Admitted};
use super::batch::Batch;
use super::count::{self, Books, Counts, Entry};
use super::error::{self, Culprit, Error, Result};
use super::flight::{Flight, has_rows, head, relations};
use super::lanes::{PerLane, Second};
use super::parking::Parks;
use super::prepared::Prepared;
use super::progress::Progress;
use super::request::{Replies, Request, Role};
use super::routing::{Names, Routes};
use super::rows::culprit;
use super::sent::Sent;
use super::statement::GUARD_PREFIX;
use super::{Message, Mode, Options};
use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::pg::{self, Config, Pipeline, Session};

/// Prepared statements kept on the server; beyond that all are dropped and made again as needed.
/// Columns left out of an UPDATE by TOAST, and NULLs under REPLICA IDENTITY FULL, multiply them.
const PREPARED_MAX: usize = 1000;

/// A batch of fewer changes is written in row order: its statements are ready, and a source that is
/// not busy gets the shorter way.
const SET_CHANGES_MIN: usize = 64;

/// A batch that is on the target, or as far as its open transaction goes.
#[derive(Debug)]
pub(super) struct Landed {
    /// Which.
    pub batch: Batch,
    /// Row changes of the batch.
    pub rows: u64,
    /// So many changes, rounded down, for each row that was written; 1 where it was not by sets.
    pub folds: usize,
    /// It has committed a target transaction. Not if it had nothing to write, or if that
    /// transaction is still open.
    pub committed: bool,
    /// After COMMIT: where the target's log stood, and how much of it was flushed. `None` if that
    /// was not asked.
    pub position: Option<(Lsn, Lsn)>,
    /// Set order was refused, and row order taken.
    pub fell_back: bool,
    /// It was begun before the one before it had landed.
    pub ahead: bool,
    /// It may have restarted sequences.
    pub restarts: bool,
    /// Messages of the transactions committed.
    pub messages: Vec<Message>,
    /// When it was sent.
    pub sent_at: Instant,
}

/// Puts batches into statements. Belongs to one session.
pub(super) struct Writer {
    pub(super) stream: String,
    pub(super) mode: Mode,
    /// However few changes there are.
    pub(super) always_sets: bool,
    /// See [`super::Tuning`].
    pub(super) set_rows: usize,
    pub(super) sort_keys: bool,
    pub(super) routes: Routes,
    pub(super) names: PerLane<Names>,
    /// The other session that writes, if there is one.
    pub(super) second: Second,
    /// Of the target transaction under way, to be handed on once it is committed.
    pub(super) messages: Vec<Message>,
    /// Batches sent and not landed, oldest first.
    pub(super) flights: VecDeque<Flight>,
    pub(super) prepared: Prepared,
    pub(super) books: Books,
    pub(super) sent: Sent,
    /// When the target was asked last where its log stands, and how often it is to be.
    asked_at: Instant,
    asked_every: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Rows,
    Sets,
}

impl Writer {
    /// Prepares the statements every batch needs, and asks for what is kept and prepared: one round
    /// trip.
    pub async fn new(config: &Config, session: &mut Session, options: &Options) -> Result<Writer> {
        let pipeline = Writer::preparing();
        let stream = &options.stream;
        let [committed, open] = Prepared::asking(stream);
        let asked = [pipeline, Parks::asking(stream), committed, open];
        let [parsed, parks, committed, open] = session.exchange_each(asked).await?;
        match parsed {
            Err(error) if matches!(error.code(), Some("3F000" | "42P01")) => {
                return Err(Error::NoState { ddl: super::DDL, source: Box::new(error) });
            }
            outcome => outcome?,
        };
        Ok(Writer {
            stream: options.stream.clone(),
            mode: options.tuning.mode,
            always_sets: options.tuning.mode == Mode::Sets,
            set_rows: options.tuning.set_rows,
            sort_keys: options.tuning.sort_keys,
            routes: Routes::open(Parks::told(parks)?, options),
            names: PerLane::default(),
            second: Second::of(config, options),
            messages: Vec::new(),
            flights: VecDeque::new(),
            prepared: Prepared::told(stream, committed, open)?,
            books: Books::new(options.tuning.counters_interval),
            sent: Sent::default(),
            asked_at: Instant::now(),
            asked_every: options.tuning.position_interval,
        })
    }

    /// The statements that every batch needs.
    pub fn preparing() -> Pipeline {
        let mut pipeline = Pipeline::new();
        // Rows that are written late must be seen as those before have left them.
        pipeline.parse("walferry_begin", "begin isolation level read committed", &[]);
        pipeline.parse("walferry_commit", "commit", &[]);
        pipeline.parse("walferry_position", super::standby::POSITION, &[]);
        pipeline.parse("walferry_counts", &count::upsert(), &[]);
        pipeline.parse("walferry_fallback", count::FALLBACK, &[]);
        pipeline
    }

    /// How many batches are under way.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// How many changes are under way.
    pub fn in_flight_steps(&self) -> usize {
        self.flights.iter().map(|flight| flight.admitted.steps.len()).sum()
    }

    /// Bytes of the changes under way.
    pub fn in_flight_bytes(&self) -> usize {
        self.flights.iter().flat_map(|flight| &flight.batch.chunks).map(|chunk| chunk.bytes).sum()
    }

    /// True if the batch needs nothing of the target before it is sent.
    pub fn knows(&self, batch: &Batch) -> bool {
        relations(batch).all(|relation| self.routes.get(relation).is_some())
    }

    /// Asks the target about tables of the batch that are new. Nothing may be under way.
    pub async fn meet(&mut self, session: &mut Session, batch: &Batch) -> Result<()> {
        self.routes.retire();
        self.foresee(session, batch).await?;
        for relation in relations(batch) {
            self.routes.ensure(session, relation).await?;
        }
        self.routes.foresee_no_more();
        Ok(())
    }

    /// Asks about all of them at once, for [`Routes::ensure`] to know.
    pub async fn foresee(&mut self, session: &mut Session, batch: &Batch) -> Result<()> {
        let unknown = relations(batch).filter(|relation| self.routes.is_asked_of(relation));
        let unknown: BTreeSet<&QualifiedName> = unknown.map(|relation| &relation.name).collect();
        let unknown: Vec<QualifiedName> = unknown.into_iter().cloned().collect();
        self.routes.foresee(session, unknown).await
    }

    pub(super) fn draft(&mut self, previous_lsn: Lsn, batch: Batch) -> Result<Flight> {
        let mut admitted = admit::admit(&mut self.routes, &batch)?;
        self.messages.append(&mut admitted.messages);
        if batch.commit.is_some() {
            admitted.messages = std::mem::take(&mut self.messages);
        }
        let there = batch.prepares().is_some_and(|b| self.prepared.state(b.xid).is_some());
        if there {
            admitted.steps.clear();
        }
        let opens = batch.opens && (has_rows(&batch) || batch.prepares().is_some()) && !there;
        let commits = batch.commit.is_some() && (opens || !batch.opens || there);
        let entry = if commits { self.enter()? } else { Entry::Nothing };
        // One that took long is worth to be known durable; of many short ones, one now and then.
        let asks = commits && (batch.full || self.asked_at.elapsed() >= self.asked_every);
        if asks {
            self.asked_at = Instant::now();
        }
        Ok(Flight {
            batch,
            admitted,
            entry,
            previous_lsn,
            opens,
            commits,
            there,
            asks,
            request: Request::default(),
            replies: Replies::default(),
            failure: None,
            sent_at: Instant::now(),
            rest: None,
            ahead: false,
            due: 0,
            claims: None,
        })
    }

    /// Takes the counts of the target transaction under way into the books.
    pub(super) fn enter(&mut self) -> Result<Entry> {
        let counts: Vec<(&QualifiedName, Counts)> = self.routes.counts().into_iter().collect();
        for (table, counts) in &counts {
            counts.check(table)?;
        }
        let entry = self.books.enter(&counts);
        self.routes.reset_counts();
        Ok(entry)
    }

    /// Adds the statement that enters counts in their table, if the entry has some. True if it has.
    pub fn count(&self, pipeline: &mut Pipeline, entry: &Entry) -> bool {
        let Entry::Table { params, .. } = entry else { return false };
        let params = params.iter().map(|p| p.as_bytes());
        let params = std::iter::once(self.stream.as_bytes()).chain(params).map(Some);
        pipeline.run("walferry_counts", params);
        true
    }

    pub(super) fn order(&self, admitted: &Admitted) -> Order {
        let pays = admitted.steps.len() >= SET_CHANGES_MIN || admitted.searches > 1;
        match self.mode {
            _ if admitted.acts => Order::Rows,
            Mode::Rows => Order::Rows,
            Mode::Sets => Order::Sets,
            Mode::Auto if pays => Order::Sets,
            Mode::Auto => Order::Rows,
        }
    }

    /// Everything from BEGIN, if the batch opens and has something to write, to the position, by
    /// the way that an empty request tells.
    pub(super) fn request(
        &mut self,
        progress: &Progress,
        flight: &Flight,
        (order, again): (Order, bool),
        mut request: Request,
    ) -> Result<Request> {
        self.forget_discarded(&mut request);
        let recorded = head(&mut request, progress, &self.prepared, flight)?;
        // Earlier parts of the transaction must outlive a refusal of this one.
        let saves = order == Order::Sets && !flight.batch.opens && !flight.there;
        if saves {
            request.aside("savepoint walferry");
        }
        let steps = &flight.admitted.steps;
        match order {
            Order::Sets => self.sets(&mut request, &flight.batch, steps)?,
            Order::Rows => {
                for (at, step) in steps.iter().enumerate() {
                    self.step(&mut request, &flight.batch, at, step)?;
                }
            }
        }
        if saves {
            request.aside("release savepoint walferry");
        }
        self.park(&mut request, &flight.batch, &flight.admitted);
        self.tail(progress, flight, again, recorded, request.part(true));
        Ok(request)
    }

    /// What ends a request.
    fn tail(
        &self,
        progress: &Progress,
        flight: &Flight,
        again: bool,
        recorded: bool,
        request: &mut Request,
    ) {
        if again {
            request.pipeline.run("walferry_fallback", [Some(self.stream.as_bytes())].into_iter());
            request.roles.push(Role::Aside);
        }
        if let (true, Some(commit)) = (flight.commits, &flight.batch.commit) {
            self.prepared.prepare(request, &flight.batch, flight.there);
            if self.count(&mut request.pipeline, &flight.entry) {
                request.roles.push(Role::Aside);
            }
            if !recorded {
                let (pipeline, previous_lsn) = (&mut request.pipeline, flight.previous_lsn);
                progress.record(pipeline, previous_lsn, commit.end_lsn, &flight.entry);
                request.roles.push(Role::Progress);
            }
            request.run("walferry_commit", Role::Commit);
            if flight.asks {
                request.run("walferry_position", Role::Position);
            }
        }
    }

    /// Drops prepared statements that no route uses, or all of them if there are too many.
    pub(super) fn forget_discarded(&mut self, request: &mut Request) {
        let prepared = self.names.of_mut(request.lane);
        if prepared.prepared > PREPARED_MAX {
            self.routes.forget_statements(request.lane);
        }
        let names = std::mem::take(self.routes.discarded.of_mut(request.lane));
        prepared.prepared = prepared.prepared.saturating_sub(names.len());
        names.iter().for_each(|name| request.pipeline.close(name));
        request.closed = names;
    }

    /// Holds the replies against the request; gives the position after COMMIT.
    pub(super) fn settle(&self, flight: &mut Flight) -> Result<Option<(Lsn, Lsn)>> {
        let replies = std::mem::take(&mut flight.replies);
        match replies.odd(&flight.request.roles) {
            Some(Role::Step { at, .. }) => Err(self.row_missing(flight, at, "0".to_string())),
            Some(_) => Err(Error::Broken("a set was not inserted whole".to_string())),
            None => {
                let end_lsn = flight.batch.commit.map_or(Lsn::ZERO, |c| c.end_lsn);
                replies.settle(&flight.request.roles, end_lsn)
            }
        }
    }

    /// Which statement failed, and what that means.
    pub(super) async fn explain(
        &self,
        session: &mut Session,
        progress: &Progress,
        flight: &Flight,
        error: pg::Error,
    ) -> Error {
        let failed = flight.replies.failed(&flight.request.roles);
        let Some(server) = error.server() else { return error.into() };
        if error.is_closed() || error.fault() == Fault::Retry {
            return error.into();
        }
        if failed == Some(Role::Progress) {
            return progress.explain(session, error).await;
        }
        if failed == Some(Role::Prepare) {
            return Error::PrepareRefused { source: Box::new(error) };
        }
        let Some(Role::Step { at, .. }) = failed else { return error.into() };
        let guard = server.message.split_once(GUARD_PREFIX).filter(|_| server.code == "22P02");
        if let Some((_, rest)) = guard {
            let rows = rest.chars().take_while(char::is_ascii_digit).collect();
            return self.row_missing(flight, at, rows);
        }
        let Some(culprit) = self.culprit(flight, at) else { return error.into() };
        Error::Refused {
            culprit: Box::new(culprit),
            said: error::said(server),
            advice: error::advice(&server.code),
            source: Box::new(error),
        }
    }

    fn row_missing(&self, flight: &Flight, at: usize, rows: String) -> Error {
        match self.culprit(flight, at) {
            Some(culprit) => Error::RowMissing { culprit: Box::new(culprit), rows },
            None => Error::Broken(format!("step {at} met {rows} rows")),
        }
    }

    fn culprit(&self, flight: &Flight, at: usize) -> Option<Culprit> {
        let step = flight.admitted.steps.get(at)?;
        let (chunk, change) = step.of(&flight.batch)?;
        let route = self.routes.get(change.relations().first()?)?;
        Some(culprit(route, &chunk.begin, change, step.ordinal(&flight.admitted)))
    }
}
