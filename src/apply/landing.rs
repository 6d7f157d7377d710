//! Sending batches, in one session or two, and taking what comes back.
//!
//! Batches land in the order of the stream. What may be sent is at most this: whole batches in the
//! session of the oldest one, as far as those behind it are in the same; and of others what was
//! found to meet nobody (`lanes`).

use std::sync::Arc;
use std::time::Instant;

use super::batch::Batch;
use super::claims::Claims;
use super::error::{Error, Result};
use super::flight::{Flight, deliver, falls_back};
use super::lanes::{AHEAD_STEPS_MIN, Lane, STALL, session_of};
use super::progress::Progress;
use super::request::Request;
use super::run::at;
use super::writer::{Landed, Order, Writer};
use crate::change::Ending;
use crate::lsn::Lsn;
use crate::pg::{self, Session, now};

/// Whether a session's backend waits for a lock.
const WAITS: &str = "select exists (select from pg_catalog.pg_stat_activity \
     where pid = $1::int4 and wait_event_type = 'Lock')";

impl Writer {
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
        let way = self.way(&flight, order, progress).await;
        let request = self.request(progress, &flight, (order, false), way)?;
        self.weigh(&request);
        let first = flight.load_ahead(request);
        self.sent.count(&flight.batch, behind, order == Order::Sets, flight.ahead);
        let lane = flight.lane();
        if self.flights.is_empty() {
            self.second.rest();
        }
        self.flights.push_back(flight);
        if let Some(first) = first {
            session_of(lane, session, &mut self.second)?.submit(first)?;
        }
        self.advance(session).await
    }

    /// An empty request that tells in which session the batch is to be written, and beside what.
    async fn way(&mut self, flight: &Flight, order: Order, progress: &Progress) -> Request {
        let plain = Request::default;
        let batch = &flight.batch;
        let fits = order == Order::Sets
            && flight.opens
            && flight.commits
            && *batch.ending() == Ending::Commit
            && flight.admitted.kept.is_empty()
            && flight.admitted.is_rows_only()
            && (self.always_sets || flight.admitted.steps.len() >= AHEAD_STEPS_MIN);
        if !fits || !self.second.is_thought_of() {
            return plain();
        }
        let claimed = || Request { claims: Some(Claims::default()), ..plain() };
        let Some(last) = self.flights.back() else { return claimed() };
        let lane = last.lane().other();
        let others: Option<Vec<Arc<Claims>>> =
            self.flights.iter().filter(|f| f.lane() != lane).map(|f| f.claims.clone()).collect();
        let is_free = self.flights.iter().all(|f| f.lane() != lane || f.rest.is_none());
        match others {
            Some(others) if is_free && self.second.is_ready(progress, self.always_sets).await => {
                let late = Some(Box::new(Request { lane, ..plain() }));
                Request { lane, others, late, ..claimed() }
            }
            _ => claimed(),
        }
    }

    /// Whether it pays to begin batches ahead.
    fn weigh(&mut self, request: &Request) {
        if let (Some(late), false) = (&request.late, self.always_sets) {
            self.second.learn(request.pipeline.len(), late.pipeline.len());
        }
    }

    /// Sends what may be sent now, as far as it goes without waiting.
    async fn advance(&mut self, session: &mut Session) -> Result<()> {
        let Some(lane) = self.flights.front().map(Flight::lane) else { return Ok(()) };
        let of_first = session_of(lane, session, &mut self.second)?;
        for flight in self.flights.iter_mut().take_while(|f| f.lane() == lane) {
            if let Some(rest) = flight.rest.take() {
                of_first.submit(rest)?;
                flight.due += 1;
            }
        }
        while let Some(event) = now(of_first.next_event()).await {
            deliver(&mut self.flights, lane, event?);
        }
        if let Ok(other) = session_of(lane.other(), session, &mut self.second) {
            while let Some(event) = now(other.next_event()).await {
                deliver(&mut self.flights, lane.other(), event?);
            }
        }
        Ok(())
    }

    /// Waits for the oldest batch under way; `None` if there is none. After an error nothing of it
    /// or of those behind it is committed, unless that cannot be known, and the session must not be
    /// used for another batch.
    pub async fn land(
        &mut self,
        session: &mut Session,
        progress: &Progress,
    ) -> Result<Option<Landed>> {
        let Some(mut flight) = self.first(session, progress).await? else { return Ok(None) };
        let (ahead, mut fell_back) = (flight.ahead, false);
        if let Some(error) = flight.failure.take() {
            let lane = flight.lane();
            self.drain_lane(session, lane).await?;
            if !falls_back(&error, &flight) {
                return Err(self.explain_in(lane, session, progress, &flight, error).await);
            }
            tracing::debug!(%error, "set order refused, trying row order");
            fell_back = true;
            flight = self.again_in_row_order(session, progress, flight).await?;
        }
        self.second.looked_at = Some(Instant::now());
        self.advance(session).await?;
        let steps = flight.admitted.steps.len();
        let (rows, folds) = (steps as u64, steps.checked_div(flight.request.rows).unwrap_or(1));
        let position = self.settle(&mut flight)?;
        self.prepared.landed(&flight.batch);
        let messages =
            if flight.batch.commit.is_some() { flight.admitted.messages } else { Vec::new() };
        let (committed, sent_at) = (flight.commits, flight.sent_at);
        let restarts = flight.admitted.restarts;
        let batch = flight.batch;
        Ok(Some(Landed {
            batch,
            rows,
            folds,
            committed,
            position,
            fell_back,
            ahead,
            restarts,
            messages,
            sent_at,
        }))
    }

    /// Takes the oldest batch once it is over. What it waits for gives way.
    async fn first(
        &mut self,
        session: &mut Session,
        progress: &Progress,
    ) -> Result<Option<Flight>> {
        loop {
            let due = self.looks_at();
            tokio::select! {
                biased;
                arrived = self.arrived(session) => {
                    arrived?;
                    return Ok(self.flights.pop_front());
                }
                () = at(due) => {}
            }
            self.give_way(session, progress).await?;
        }
    }

    /// Waits for whatever has been sent, to be forgotten; the second session is closed, with what
    /// was begun ahead there, which may wait for what the main one has open.
    pub async fn drain(&mut self, session: &mut Session) -> Result<()> {
        let commits = |f: &Flight| f.rest.is_none();
        self.drain_those(session, Lane::Second, commits).await?;
        self.second.leave();
        self.routes.forget_statements(Lane::Second);
        self.drain_lane(session, Lane::Main).await
    }

    async fn drain_lane(&mut self, session: &mut Session, lane: Lane) -> Result<()> {
        self.drain_those(session, lane, |_| true).await
    }

    async fn drain_those(
        &mut self,
        session: &mut Session,
        lane: Lane,
        is_one: impl Fn(&Flight) -> bool,
    ) -> Result<()> {
        while self.flights.iter().any(|f| f.lane() == lane && f.due > 0 && is_one(f)) {
            let event = session_of(lane, session, &mut self.second)?.next_event().await?;
            deliver(&mut self.flights, lane, event);
        }
        Ok(())
    }

    /// Waits until the oldest batch under way is over. Cancel-safe.
    pub async fn arrived(&mut self, session: &mut Session) -> Result<()> {
        while self.flights.front().is_some_and(|f| !f.over()) {
            let (lane, event) = match self.second.session() {
                None => (Lane::Main, session.next_event().await),
                Some(second) => tokio::select! {
                    event = session.next_event() => (Lane::Main, event),
                    event = second.next_event() => (Lane::Second, event),
                },
            };
            deliver(&mut self.flights, lane, event?);
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
        let lane = flight.lane();
        let mut flights = std::mem::take(&mut self.flights);
        let mut behind: Vec<&mut Flight> =
            flights.iter_mut().filter(|f| f.lane() == lane).collect();
        let discarded = self.routes.discarded.of_mut(lane);
        discarded.append(&mut flight.request.closed);
        behind.iter_mut().for_each(|f| discarded.append(&mut f.request.closed));
        // Statements that were to be prepared after the one that failed are not there.
        self.routes.forget_statements(lane);
        let sql = match flight.batch.opens {
            true => "rollback",
            false => "rollback to savepoint walferry",
        };
        session_of(lane, session, &mut self.second)?.execute(sql).await?;
        let plain = Request { lane, ..Request::default() };
        flight.load(self.request(progress, &flight, (Order::Rows, true), plain)?);
        for flight in behind {
            self.reload(progress, flight)?;
        }
        self.flights = flights;
        self.flights.push_front(flight);
        self.second.looked_at = Some(Instant::now());
        self.advance(session).await?;
        let Some(mut flight) = self.first(session, progress).await? else {
            return Err(Error::Broken("a batch sent again was lost".to_string()));
        };
        if let Some(error) = flight.failure.take() {
            return Err(self.explain_in(lane, session, progress, &flight, error).await);
        }
        Ok(flight)
    }

    /// Has a batch of which nothing is left sent again, as a whole and in the same session. What it
    /// writes stays known.
    fn reload(&mut self, progress: &Progress, flight: &mut Flight) -> Result<()> {
        let (order, claims) = (self.order(&flight.admitted), flight.claims.take());
        let plain = Request { lane: flight.lane(), ..Request::default() };
        flight.load(self.request(progress, flight, (order, false), plain)?);
        flight.claims = claims;
        Ok(())
    }

    /// Which statement failed, and what that means. The session is asked, and of no more use.
    async fn explain_in(
        &mut self,
        lane: Lane,
        session: &mut Session,
        progress: &Progress,
        flight: &Flight,
        error: pg::Error,
    ) -> Error {
        let mut second = std::mem::take(&mut self.second);
        match session_of(lane, session, &mut second) {
            Ok(session) => self.explain(session, progress, flight, error).await,
            Err(lost) => lost,
        }
    }

    /// When it is to be seen whether the oldest batch waits for one that was begun ahead.
    pub fn looks_at(&self) -> Option<Instant> {
        let lane = self.flights.front()?.lane();
        let beside = self.flights.iter().any(|f| f.lane() != lane && f.ahead);
        self.second.looked_at.filter(|_| beside).map(|looked_at| looked_at + STALL)
    }

    /// The place of a batch, in the other session than the oldest, that has nothing to do but to
    /// wait for that.
    fn idler(&self) -> Option<usize> {
        let lane = self.flights.front()?.lane();
        self.flights.iter().position(|f| f.lane() != lane && f.ahead && f.due == 0)
    }

    /// Rolls back what was begun ahead, if the oldest batch waits for a lock: it may be held there.
    /// It is sent again behind that.
    pub async fn give_way(&mut self, session: &mut Session, progress: &Progress) -> Result<()> {
        self.second.looked_at = Some(Instant::now());
        let Some(place) = self.idler() else { return Ok(()) };
        let Some(first) = self.flights.front().map(Flight::lane) else { return Ok(()) };
        let pid = session_of(first, session, &mut self.second)?.process_id().to_string();
        let lane = first.other();
        let other = session_of(lane, session, &mut self.second)?;
        // Where it has failed, no question is answered, and it holds nothing.
        let failed = self.flights.get(place).is_some_and(|flight| flight.failure.is_some());
        if failed || !other.query_one(WAITS, &[Some(&pid)]).await?.bool(0)? {
            return Ok(());
        }
        other.execute("rollback").await?;
        let Some(mut flight) = self.flights.remove(place) else { return Ok(()) };
        tracing::debug!("a batch that was begun ahead gives way");
        self.second.repent();
        self.reload(progress, &mut flight)?;
        self.flights.insert(place, flight);
        self.advance(session).await
    }

    /// The target transaction under way is rolled back; nothing may be under way.
    pub fn abandon(&mut self) {
        self.flights.clear();
        self.messages.clear();
        self.routes.reset_counts();
    }
}
