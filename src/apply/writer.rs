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
use super::flight::{Flight, deliver, falls_back, has_rows, head, relations};
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
use crate::pg::{self, Pipeline, Session};

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
    /// It has committed a target transaction. Not if it had nothing to write, or if that
    /// transaction is still open.
    pub committed: bool,
    /// After COMMIT: where the target's log stood, and how much of it was flushed. `None` if that
    /// was not asked.
    pub position: Option<(Lsn, Lsn)>,
    /// Set order was refused, and row order taken.
    pub fell_back: bool,
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
    pub(super) names: Names,
    /// Of the target transaction under way, to be handed on once it is committed.
    messages: Vec<Message>,
    /// Batches sent and not landed, oldest first.
    flights: VecDeque<Flight>,
    pub(super) prepared: Prepared,
    pub(super) books: Books,
    pub(super) sent: Sent,
    /// When the target was asked last where its log stands, and how often it is to be.
    asked_at: Instant,
    asked_every: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Rows,
    Sets,
}

impl Writer {
    /// Prepares the statements every batch needs, and asks for what is kept and prepared: one round
    /// trip.
    pub async fn new(session: &mut Session, options: &Options) -> Result<Writer> {
        let mut pipeline = Pipeline::new();
        pipeline.parse("walferry_begin", "begin", &[]);
        pipeline.parse("walferry_commit", "commit", &[]);
        pipeline.parse("walferry_position", super::standby::POSITION, &[]);
        pipeline.parse("walferry_counts", &count::upsert(), &[]);
        pipeline.parse("walferry_fallback", count::FALLBACK, &[]);
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
            names: Names::default(),
            messages: Vec::new(),
            flights: VecDeque::new(),
            prepared: Prepared::told(stream, committed, open)?,
            books: Books::new(options.tuning.counters_interval),
            sent: Sent::default(),
            asked_at: Instant::now(),
            asked_every: options.tuning.position_interval,
        })
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

    /// Sends a batch whose tables are known; it lands by [`Writer::land`]. `progress_lsn` is the
    /// progress recorded by what has landed. After an error the session must not be used for
    /// another batch.
    ///
    /// A batch may be sent behind others that are under way. If one of those fails, the server
    /// refuses all behind it: the transaction is aborted, or progress is not what they expect.
    pub async fn launch(
        &mut self,
        session: &mut Session,
        progress: &Progress,
        progress_lsn: Lsn,
        batch: Batch,
    ) -> Result<()> {
        let ends = |f: &Flight| f.batch.commit.filter(|_| f.commits).map(|c| c.end_lsn);
        let previous_lsn = self.flights.iter().rev().find_map(ends).unwrap_or(progress_lsn);
        let behind = self.in_flight() > 0;
        let mut flight = self.draft(previous_lsn, batch)?;
        let order = self.order(&flight.admitted);
        self.sent.count(&flight.batch, behind, order == Order::Sets);
        flight.request = self.request(progress, &flight, order, false)?;
        self.send(session, flight).await
    }

    /// Waits for the oldest batch under way; `None` if there is none. After an error nothing of it
    /// or of those behind it is committed, unless that cannot be known, and the session must not be
    /// used for another batch.
    pub async fn land(
        &mut self,
        session: &mut Session,
        progress: &Progress,
    ) -> Result<Option<Landed>> {
        let Some(mut flight) = self.arrival(session).await? else { return Ok(None) };
        let mut fell_back = false;
        if let Some(error) = flight.failure.take() {
            self.drain(session).await?;
            if !falls_back(&error, &flight) {
                return Err(self.explain(session, progress, &flight, error).await);
            }
            tracing::debug!(%error, "set order refused, trying row order");
            fell_back = true;
            flight = self.again_in_row_order(session, progress, flight).await?;
        }
        let rows = flight.admitted.steps.len() as u64;
        let position = self.settle(&mut flight)?;
        self.prepared.landed(&flight.batch);
        let messages =
            if flight.batch.commit.is_some() { flight.admitted.messages } else { Vec::new() };
        let (committed, sent_at) = (flight.commits, flight.sent_at);
        let batch = flight.batch;
        Ok(Some(Landed { batch, rows, committed, position, fell_back, messages, sent_at }))
    }

    /// Waits for whatever is under way and forgets it.
    pub async fn drain(&mut self, session: &mut Session) -> Result<()> {
        while self.flights.iter().any(|f| !f.over) {
            let event = session.next_event().await?;
            deliver(&mut self.flights, event);
        }
        Ok(())
    }

    /// Waits until the oldest batch under way is over. Cancel-safe.
    pub async fn arrived(&mut self, session: &mut Session) -> Result<()> {
        while self.flights.front().is_some_and(|f| !f.over) {
            let event = session.next_event().await?;
            deliver(&mut self.flights, event);
        }
        Ok(())
    }

    async fn arrival(&mut self, session: &mut Session) -> Result<Option<Flight>> {
        self.arrived(session).await?;
        Ok(self.flights.pop_front())
    }

    async fn send(&mut self, session: &mut Session, mut flight: Flight) -> Result<()> {
        let pipeline = std::mem::take(&mut flight.request.pipeline);
        flight.over = pipeline.is_empty();
        (flight.replies, flight.failure) = (Replies::default(), None);
        let over = flight.over;
        self.flights.push_back(flight);
        if !over {
            session.post(pipeline, |event| deliver(&mut self.flights, event)).await?;
        }
        Ok(())
    }

    /// Undoes what the batch wrote, up to where it began, and writes it in row order; then sends
    /// those behind it once more, which the server has refused.
    async fn again_in_row_order(
        &mut self,
        session: &mut Session,
        progress: &Progress,
        mut flight: Flight,
    ) -> Result<Flight> {
        let mut behind = std::mem::take(&mut self.flights);
        for flight in std::iter::once(&mut flight).chain(&mut behind) {
            self.routes.discarded.append(&mut flight.request.closed);
        }
        // Statements that were to be prepared after the one that failed are not there.
        self.routes.forget_statements();
        let sql = match flight.batch.opens {
            true => "rollback",
            false => "rollback to savepoint walferry",
        };
        session.execute(sql).await?;
        flight.request = self.request(progress, &flight, Order::Rows, true)?;
        self.send(session, flight).await?;
        let flight = self.arrival(session).await?;
        let Some(mut flight) = flight else {
            return Err(Error::Broken("a batch sent again was lost".to_string()));
        };
        if let Some(error) = flight.failure.take() {
            return Err(self.explain(session, progress, &flight, error).await);
        }
        for mut flight in behind {
            let order = self.order(&flight.admitted);
            flight.request = self.request(progress, &flight, order, false)?;
            self.send(session, flight).await?;
        }
        Ok(flight)
    }

    /// The target transaction under way is rolled back; nothing may be under way.
    pub fn abandon(&mut self) {
        self.flights.clear();
        self.messages.clear();
        self.routes.reset_counts();
    }

    fn draft(&mut self, previous_lsn: Lsn, batch: Batch) -> Result<Flight> {
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
            over: false,
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
        flight: &Flight,
        order: Order,
        again: bool,
    ) -> Result<Request> {
        let mut request = Request::default();
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
        if again {
            request.pipeline.run("walferry_fallback", [Some(self.stream.as_bytes())].into_iter());
            request.roles.push(Role::Aside);
        }
        if let (true, Some(commit)) = (flight.commits, &flight.batch.commit) {
            self.prepared.prepare(&mut request, &flight.batch, flight.there);
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
        Ok(request)
    }

    /// Drops prepared statements that no route uses, or all of them if there are too many.
    pub(super) fn forget_discarded(&mut self, request: &mut Request) {
        if self.names.prepared > PREPARED_MAX {
            self.routes.forget_statements();
        }
        let names = std::mem::take(&mut self.routes.discarded);
        self.names.prepared = self.names.prepared.saturating_sub(names.len());
        names.iter().for_each(|name| request.pipeline.close(name));
        request.closed = names;
    }

    /// Holds the replies against the request; gives the position after COMMIT.
    fn settle(&self, flight: &mut Flight) -> Result<Option<(Lsn, Lsn)>> {
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
    async fn explain(
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
