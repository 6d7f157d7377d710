//! Reads first: clients that only read are led to the target while writes still go to the source,
//! and back again. The switch of the writes, `flip`, comes later or not at all.
//!
//! Why it exists: a reader proves the target under the application's own load at no risk, and takes
//! that load off the source before writers have to wait for anything. What readers see there is
//! behind by the stream's lag, so they are led only while that is within `--max-lag`.
//!
//! Reads have routes of their own, and nothing is fenced: *check* all of them, *gate* (a probe that
//! is committed where clients write arrives in time, nothing is kept aside), *hold* and *switch*
//! all, then let all go. Any route that fails has all of them led back. The way back is each
//! route's undo.
//!
//! | state | set | after a crash |
//! | --- | --- | --- |
//! | leading | before the first route is held | all are led back |
//! | led | when all have been let go on the target | nothing |
//! | returning | before the first is led back | all are led back |
//! | none | when all are back | |
//!
//! It is in the job's row beside the phase, as it is independent of it: writes may be switched and
//! rolled back while reads stay on the target, which one of the two streams keeps current.
//!
//! A route that does not answer is asked again every few seconds; `run --skip-route` leaves it out.
//! The end of a job that would leave readers on a side that no stream reaches is refused.
//!
//! Left out: keeping those clients from writing. What they wrote on the target would refuse the
//! cutover by name; default_transaction_read_only of their role keeps them from it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::attend::keeps_running;
use super::cleanup::Ending;
use super::client::Asked;
use super::request::context;
use super::run::{JobConfig, Notice, Runner};
use super::state::{Event, Phase};
use super::store::{JobRow, Store};
use super::{Error, Result};
use crate::clock::{Backoff, Deadline};
use crate::cutover::{self, Limits, barrier};
use crate::id::Stream;
use crate::pg::Session;
use crate::route::{self, Route};

/// Between two tries of a route that could not be reached.
const AGAIN: Duration = Duration::from_secs(2);

/// Where readers are on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadState {
    /// To the target.
    Leading,
    /// They are there.
    Led,
    /// Back to the source.
    Returning,
}

/// Routes of readers, and where these are. Stored in `walferry.job.reads`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadRecord {
    /// Tells this attempt from others in the journal.
    pub attempt: String,
    /// Without passwords.
    pub routes: Vec<String>,
    /// How far.
    pub state: ReadState,
}

impl ReadRecord {
    fn is_pending(&self) -> bool {
        self.state != ReadState::Led
    }

    /// The routes for people.
    pub fn shown(&self) -> Vec<String> {
        let shown = |text: &String| Route::parse(text).map_or(text.clone(), |r| r.to_string());
        self.routes.iter().map(shown).collect()
    }
}

/// What is asked of a runner.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReadRequest {
    /// To the target; else back.
    pub there: bool,
    /// Tells this attempt from others in the journal.
    pub attempt: String,
    /// Routes to lead there, without passwords.
    pub routes: Vec<String>,
    /// The passwords, for the runner that was asked alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub letter: Option<String>,
    /// How long it may take, and hold readers in one try.
    #[serde(flatten)]
    pub limits: Limits,
    /// Look, and change nothing.
    pub dry_run: bool,
}

/// What became of it.
#[derive(Clone, Debug, Serialize)]
struct Led {
    /// `source` or `target`.
    reads: &'static str,
    routes: Vec<String>,
    /// How long readers waited, in milliseconds: from the first hold of the try that succeeded.
    held_ms: f64,
}

/// Why readers stay where they are.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The phase.
    #[error(
        "readers can be led while a stream keeps the other side level: in following, switched and \
         rolled_back. The job is in {0}"
    )]
    Phase(Phase),
    /// They are there.
    #[error(
        "readers are on the target already, by {}: walferry rollback --reads leads them back",
        .0.join("; ")
    )]
    Led(Vec<String>),
    /// They are not there.
    #[error("readers are on the source: none were led away by this job")]
    NotLed,
    /// No route.
    #[error("no route of readers is given: add --read-route")]
    NoRoute,
    /// A route that writers take too.
    #[error(
        "{0} would lead readers and writers alike: give readers a route of their own (another \
         pooler or database line, another foreign server)"
    )]
    Shared(String),
    /// Something is half done.
    #[error("readers are being led back, which has not ended: {0}")]
    Pending(String),
    /// A route failed, and so did leading back.
    #[error(
        "readers were not led there ({cause}), and some could not be led back: {undo}. It is tried \
         again every few seconds; `walferry run --skip-route KIND` (KIND is {}) goes on without a \
         route that is gone for good",
        route::KINDS
    )]
    NotBack {
        /// What failed first.
        cause: String,
        /// What failed then.
        undo: String,
    },
    /// The job's end would leave them behind.
    #[error(
        "readers are on the target, by {}, and no stream would reach it any more: walferry \
         rollback --reads first",
        .0.join("; ")
    )]
    WouldGoStale(Vec<String>),
}

/// Routes that nobody writes through, in the order in which they are switched.
fn told(config: &JobConfig, routes: &[String]) -> Result<Vec<Route>> {
    let mut routes = config.secrets.routes(routes)?;
    routes.sort_by_key(|route| (!route.holds(), matches!(route, Route::Hook(_))));
    Ok(routes)
}

/// What their routes are told: undo leads back to the source.
fn read_context(config: &JobConfig) -> route::Context {
    route::Context { reads: true, ..context(config, Stream::Forward) }
}

fn wrong(error: route::Error) -> Error {
    cutover::Error::from(error).into()
}

/// Leads all of them back to the source, whatever was reached. Gives the first error.
async fn lead_back(config: &JobConfig, routes: &[Route]) -> route::Result<()> {
    let (context, mut back) = (read_context(config), Ok(()));
    for route in routes.iter().rev() {
        back = back.and(route.undo(&context).await);
    }
    back
}

/// Refuses writers a route that readers were led by.
pub(super) fn refuse_shared(reads: Option<&ReadRecord>, routes: &[String]) -> Result<()> {
    let shared = reads.and_then(|reads| routes.iter().find(|r| reads.routes.contains(r)));
    match shared {
        Some(text) => {
            let shown = Route::parse(text).map_or_else(|_| text.clone(), |r| r.to_string());
            Err(Refused::Shared(shown).into())
        }
        None => Ok(()),
    }
}

/// Refuses an end of the job after which readers would be where no stream comes.
pub(super) fn refuse_end(row: &JobRow, ending: Ending) -> Result<()> {
    let Some(reads) = &row.reads else { return Ok(()) };
    let writes_are_there = row.phase == Phase::Switched && ending.event == Event::FinishAsked;
    if ending.source_is_gone || (writes_are_there && !reads.is_pending()) {
        return Ok(());
    }
    if reads.is_pending() {
        return Err(Refused::Pending("walferry run ends it".to_string()).into());
    }
    Err(Refused::WouldGoStale(reads.shown()).into())
}

/// What their routes kept for the way back is not needed any more. Gives what a person has to do.
pub(super) async fn forget(
    config: &JobConfig,
    row: &JobRow,
    wait: Duration,
) -> Result<Vec<String>> {
    let Some(reads) = &row.reads else { return Ok(Vec::new()) };
    let (context, mut left) = (read_context(config), Vec::new());
    for route in told(config, &reads.routes)? {
        let forgotten = tokio::time::timeout(wait, route.forget(&context)).await;
        if !matches!(forgotten, Ok(Ok(()))) {
            let by_hand = route.by_hand(&context, true);
            left.push(format!("{route} keeps what was noted there for the way back: {by_hand}"));
        }
    }
    Ok(left)
}

/// Takes routes of readers out that keep them from being led back; `wanted` is a kind or a whole
/// route. Gives what is to be done by hand for each.
pub(super) async fn skip(
    store: &mut Store,
    config: &JobConfig,
    row: &JobRow,
    wanted: &str,
) -> Result<Vec<String>> {
    let Some(mut record) = row.reads.clone().filter(ReadRecord::is_pending) else {
        return Ok(Vec::new());
    };
    let stored = Route::stored(wanted).map(|(stored, _)| stored).unwrap_or_default();
    let (context, mut by_hand) = (read_context(config), Vec::new());
    for text in std::mem::take(&mut record.routes) {
        let route = Route::parse(&text).map_err(wrong)?;
        if route.kind() == wanted || text == stored {
            by_hand.push(format!("{route}: {}", route.by_hand(&context, false)));
        } else {
            record.routes.push(text);
        }
    }
    if !by_hand.is_empty() {
        // What was typed may hold a password.
        let step = format!("skip {}", wanted.split(':').next().unwrap_or_default());
        store.set_reads(&record.attempt, &step, Some(&record)).await?;
    }
    Ok(by_hand)
}

impl Runner {
    /// A command about readers. An error is one that ends the runner.
    pub(super) async fn hear_reads(
        &mut self,
        asked: &Asked,
    ) -> Result<std::result::Result<Value, String>> {
        let request: ReadRequest =
            serde_json::from_value(asked.args.clone()).map_err(|e| Error::State(e.to_string()))?;
        self.take_letter(request.letter.as_deref());
        let _ = self.flying.send_replace(true);
        let led = match request.there {
            true => self.lead_reads(&request).await,
            false => self.return_reads(&request).await,
        };
        let _ = self.flying.send_replace(false);
        match led {
            Ok(led) => Ok(Ok(serde_json::to_value(led).map_err(|e| Error::State(e.to_string()))?)),
            Err(error) if keeps_running(&error) => Ok(Err(error.to_string())),
            Err(error) => Err(error),
        }
    }

    async fn lead_reads(&mut self, request: &ReadRequest) -> Result<Led> {
        let row = self.row().await?;
        if let Some(reads) = &row.reads {
            return Err(Refused::Led(reads.shown()).into());
        }
        if request.routes.is_empty() {
            return Err(Refused::NoRoute.into());
        }
        let writers = row.flip.as_ref().map(|flip| flip.routes.as_slice()).unwrap_or_default();
        let record = ReadRecord {
            attempt: request.attempt.clone(),
            routes: request.routes.clone(),
            state: ReadState::Leading,
        };
        refuse_shared(Some(&record), writers)?;
        let routes = told(&self.config, &request.routes)?;
        if let Some(citus) = routes.iter().find(|route| matches!(route, Route::Citus(_))) {
            return Err(Refused::Shared(citus.to_string()).into());
        }
        self.gate_reads(row.phase, request).await?;
        let context = read_context(&self.config);
        for route in &routes {
            route.check(&context).await.map_err(wrong)?;
        }
        let shown = record.shown();
        if request.dry_run {
            return Ok(Led { reads: "source", routes: shown, held_ms: 0.0 });
        }
        self.store.set_reads(&record.attempt, "lead reads", Some(&record)).await?;
        match self.point_reads(row.phase, &routes, request).await {
            Ok(held) => {
                let record = ReadRecord { state: ReadState::Led, ..record };
                self.store.set_reads(&record.attempt, "reads led", Some(&record)).await?;
                Ok(Led { reads: "target", routes: shown, held_ms: held.as_secs_f64() * 1e3 })
            }
            Err(cause) => match lead_back(&self.config, &routes).await {
                Ok(()) => {
                    self.store.set_reads(&record.attempt, "reads led back", None).await?;
                    Err(cause)
                }
                Err(undo) => {
                    self.reads_due = Some(Deadline::after(AGAIN));
                    let (cause, undo) = (cause.to_string(), undo.to_string());
                    Err(Refused::NotBack { cause, undo }.into())
                }
            },
        }
    }

    async fn return_reads(&mut self, request: &ReadRequest) -> Result<Led> {
        let row = self.row().await?;
        let Some(record) = row.reads else { return Err(Refused::NotLed.into()) };
        let routes = told(&self.config, &record.routes)?;
        if record.is_pending() {
            let why = row.error.unwrap_or_else(|| "it is tried again".to_string());
            return Err(Refused::Pending(why).into());
        }
        self.gate_reads(row.phase, request).await?;
        let shown = record.shown();
        if request.dry_run {
            return Ok(Led { reads: "target", routes: shown, held_ms: 0.0 });
        }
        let record = ReadRecord { state: ReadState::Returning, ..record };
        self.store.set_reads(&record.attempt, "return reads", Some(&record)).await?;
        let held = match self.hold_reads(row.phase, &routes, request).await {
            Ok(held) => held,
            Err(error) => {
                let record = ReadRecord { state: ReadState::Led, ..record };
                self.store.set_reads(&record.attempt, "reads stay", Some(&record)).await?;
                return Err(error);
            }
        };
        if let Err(undo) = lead_back(&self.config, &routes).await {
            self.reads_due = Some(Deadline::after(AGAIN));
            return Err(Refused::Pending(undo.to_string()).into());
        }
        self.store.set_reads(&record.attempt, "reads returned", None).await?;
        let held_ms = held.elapsed().as_secs_f64() * 1e3;
        Ok(Led { reads: "source", routes: shown, held_ms })
    }

    /// Where writes go already there is nothing to wait for. Elsewhere a probe has to arrive in
    /// time, and nothing may be kept aside.
    async fn gate_reads(&mut self, phase: Phase, request: &ReadRequest) -> Result<()> {
        let (live, dest, stream, pipe) = match (phase, request.there) {
            (Phase::Switched, true) | (Phase::Following | Phase::RolledBack, false) => {
                return Ok(());
            }
            (Phase::Switched, false) => {
                (&self.config.target, &self.config.source, Stream::Reverse, &self.reverse)
            }
            (Phase::Following | Phase::RolledBack, true) => {
                (&self.config.source, &self.config.target, Stream::Forward, &self.forward)
            }
            (phase, _) => return Err(Refused::Phase(phase).into()),
        };
        let carry = pipe.as_ref().map(|pipe| pipe.applied.clone());
        let mut carry = carry.ok_or(cutover::Error::StreamStopped)?;
        let (mut live, mut dest) = (Session::control(live).await?, Session::control(dest).await?);
        let max_lag = request.limits.max_lag;
        barrier::gate(&mut live, &mut carry, max_lag).await?;
        barrier::refuse_parked(&mut dest, &self.config.job.object(stream)).await?;
        Ok(())
    }

    /// Holds, switches and lets go. After an error any of them may be anywhere.
    async fn point_reads(
        &mut self,
        phase: Phase,
        routes: &[Route],
        request: &ReadRequest,
    ) -> Result<Duration> {
        let held = self.hold_reads(phase, routes, request).await?;
        let context = read_context(&self.config);
        for route in routes {
            route.switch(&context).await.map_err(wrong)?;
        }
        cutover::release(routes, &context, |_| {}).await?;
        Ok(held.elapsed())
    }

    /// Holds all of them, in short tries: a long query delays us, and nobody waits behind it for
    /// long. Gives the moment from which they wait; on an error nobody does.
    async fn hold_reads(
        &mut self,
        phase: Phase,
        routes: &[Route],
        request: &ReadRequest,
    ) -> Result<Instant> {
        let wait = request.limits.lock_timeout;
        let deadline = Deadline::after(request.limits.timeout);
        let (context, mut backoff) =
            (read_context(&self.config), Backoff::new(wait * 2, wait * 10));
        loop {
            let held = Instant::now();
            let mut holding = Ok(());
            for route in routes {
                holding = route.hold(&context, wait.saturating_sub(held.elapsed())).await;
                if holding.is_err() {
                    break;
                }
            }
            let Err(error) = holding else { return Ok(held) };
            cutover::release(routes, &context, |_| {}).await?;
            let busy = matches!(error, route::Error::Busy { .. });
            if !busy || deadline.passed() || *self.stop.borrow() {
                return Err(wrong(error));
            }
            tokio::time::sleep(backoff.step().min(deadline.left())).await;
            // It may have fallen behind meanwhile.
            self.gate_reads(phase, request).await?;
        }
    }

    /// What was begun and not ended, by a runner that is gone or for a route that did not answer:
    /// readers go back to the source.
    pub(super) async fn settle_reads(&mut self) -> Result<()> {
        if self.reads_due.as_ref().is_none_or(|due| !due.passed()) {
            return Ok(());
        }
        self.reads_due = None;
        let row = self.row().await?;
        let Some(record) = row.reads.filter(ReadRecord::is_pending) else { return Ok(()) };
        let routes = told(&self.config, &record.routes)?;
        let _ = self.flying.send_replace(true);
        let back = lead_back(&self.config, &routes).await;
        let _ = self.flying.send_replace(false);
        match back {
            Ok(()) => {
                self.store.set_reads(&record.attempt, "reads led back", None).await?;
                self.store.set_error(None).await?;
                self.say(Notice::Said("readers are on the source again".to_string()));
            }
            Err(error) => {
                let said = Refused::Pending(error.to_string()).to_string();
                self.say(Notice::Trouble(said.clone()));
                self.store.set_error(Some(&said)).await?;
                self.reads_due = Some(Deadline::after(AGAIN));
            }
        }
        Ok(())
    }
}
