//! A batch on its way to the target and back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::admit::Admitted;
use super::batch::Batch;
use super::claims::Claims;
use super::count::Entry;
use super::error::{Error, Result};
use super::lanes::Lane;
use super::prepared::Prepared;
use super::progress::Progress;
use super::request::{Replies, Request, Role};
use crate::change::{Change, Relation};
use crate::fault::{Fault, Faulty};
use crate::lsn::Lsn;
use crate::pg::{self, Event, Pipeline};

/// A batch with all that is decided before it is written, and what came back.
#[derive(Debug)]
pub(super) struct Flight {
    pub batch: Batch,
    pub admitted: Admitted,
    /// What its target transaction does to the books.
    pub entry: Entry,
    /// Progress before it.
    pub previous_lsn: Lsn,
    /// The target transaction begins, and ends, with this batch.
    pub opens: bool,
    pub commits: bool,
    /// It is a prepared transaction that the target has already: only its books are missing.
    pub there: bool,
    /// It asks where the target's log stands.
    pub asks: bool,
    pub request: Request,
    pub replies: Replies,
    pub failure: Option<pg::Error>,
    pub sent_at: Instant,
    /// What of it is still to be sent, once all before it in the other session have landed.
    pub rest: Option<Pipeline>,
    /// Some of it was sent before that.
    pub ahead: bool,
    /// Requests that have been sent and not answered.
    pub due: usize,
    /// What it writes, if that is known.
    pub claims: Option<Arc<Claims>>,
}

impl Flight {
    /// In which session.
    pub fn lane(&self) -> Lane {
        self.request.lane
    }

    /// All has been sent and answered.
    pub fn over(&self) -> bool {
        self.rest.is_none() && self.due == 0
    }

    /// It is to be sent as a whole, after all before it.
    pub fn load(&mut self, request: Request) {
        self.request = request;
        let pipeline = std::mem::take(&mut self.request.pipeline);
        (self.replies, self.failure) = (Replies::default(), None);
        (self.ahead, self.due) = (false, 0);
        self.rest = (!pipeline.is_empty()).then_some(pipeline);
        self.claims = self.request.claims.take().map(Arc::new);
    }

    /// The same, but for a first part that can be sent now, if there is one.
    pub fn load_ahead(&mut self, mut request: Request) -> Option<Pipeline> {
        let Some(mut late) = request.late.take() else {
            self.load(request);
            return None;
        };
        std::mem::swap(&mut request.pipeline, &mut late.pipeline);
        request.roles.append(&mut late.roles);
        self.load(request);
        (self.ahead, self.due) = (true, 1);
        Some(late.pipeline)
    }
}

/// A target transaction is worth its while for row changes, filtered ones included as they are
/// counted, and for one that goes on in the next batch. Empty transactions and messages only move
/// the position.
pub(super) fn has_rows(batch: &Batch) -> bool {
    let mut changes = batch.chunks.iter().flat_map(|c| &c.changes);
    batch.commit.is_none() || changes.any(|c| !c.relations().is_empty())
}

/// Whether row order may succeed where this refused set order: not where the connection is the
/// cause, or somebody who cancels, or what is not a change of the batch.
pub(super) fn falls_back(error: &pg::Error, flight: &Flight) -> bool {
    let roles = &flight.request.roles;
    let answered = error.server().is_some_and(|e| e.code != "57014");
    let of_set = roles.iter().any(|r| matches!(r, Role::Set { .. }))
        && matches!(flight.replies.failed(roles), Some(Role::Set { .. } | Role::Step { .. }));
    answered && of_set && !error.is_closed() && error.fault() != Fault::Retry
}

/// Gives an event of a session to the oldest batch there that waits for one.
pub(super) fn deliver(flights: &mut VecDeque<Flight>, lane: Lane, event: Event) {
    let waiting = flights.iter_mut().find(|f| f.lane() == lane && f.due > 0);
    let Some(flight) = waiting else { return };
    match event {
        Event::Reply(reply) => flight.replies.take(&flight.request.roles, reply),
        Event::Failed(error) => flight.failure = flight.failure.take().or(Some(error)),
        Event::Over => flight.due -= 1,
    }
}

/// Of each change of the batch, in order.
pub(super) fn relations(batch: &Batch) -> impl Iterator<Item = &Arc<Relation>> {
    batch.chunks.iter().flat_map(|c| &c.changes).flat_map(Change::relations)
}

/// BEGIN, if the batch opens and has something to write, and the transaction's tag where no origin
/// is one: true if that is progress itself.
pub(super) fn head(
    request: &mut Request,
    progress: &Progress,
    prepared: &Prepared,
    flight: &Flight,
) -> Result<bool> {
    if !flight.opens {
        return Ok(false);
    }
    request.run("walferry_begin", Role::Aside);
    let begin = flight.batch.prepares();
    begin.into_iter().for_each(|begin| prepared.begin(request, begin));
    match (begin, progress.is_marker()) {
        (_, false) => return Ok(false),
        (Some(_), true) => return Err(Error::PreparedWithoutOrigin),
        (None, true) => {}
    }
    match &flight.batch.commit {
        Some(commit) => {
            let (pipeline, previous_lsn) = (&mut request.pipeline, flight.previous_lsn);
            progress.record(pipeline, previous_lsn, commit.end_lsn, &flight.entry);
            request.roles.push(Role::Progress);
        }
        None => {
            progress.mark(&mut request.pipeline);
            request.roles.push(Role::Aside);
        }
    }
    Ok(flight.batch.commit.is_some())
}
