//! The steps in their order, timed and journalled.

use std::future::Future;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::watch;

use super::fence::{self, Fence, FenceKind};
use super::{Error, Result, barrier, canary, undo};
use crate::apply::Applied;
use crate::catalog::{self, Selection};
use crate::clock::{Backoff, Deadline};
use crate::id::{JobName, QualifiedName, Stream};
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, Session};
use crate::route::{self, Route};
use crate::schema;

/// Increments added to every sequence: values that a session cached before the fence and uses after
/// the switch must not meet new ones. Gaps in sequences are normal; collisions are not.
const SEQUENCE_MARGIN: u32 = 32;

/// How long a canary may take on each leg.
const CANARY_WAIT: Duration = Duration::from_secs(10);

/// Everything a flip needs to know.
#[derive(Debug)]
pub struct Plan {
    /// Forward: cutover. Reverse: rollback.
    pub flip: Stream,
    /// The job.
    pub job: JobName,
    /// Where applications write now.
    pub live: Config,
    /// Where they will.
    pub dest: Config,
    /// The live side's tables to fence.
    pub tables: Vec<QualifiedName>,
    /// Which tables take part; sequences owned by others do not.
    pub selection: Selection,
    /// What stops writers.
    pub fence: FenceKind,
    /// Where clients find the data.
    pub routes: Vec<Route>,
    /// What the routes are told.
    pub context: route::Context,
    /// Lag allowed at the start.
    pub max_lag: Duration,
    /// Longest wait for locks, and for clients to be held, in one try.
    pub lock_timeout: Duration,
    /// Limit of all tries together.
    pub timeout: Duration,
    /// Longest time writers are held for the drain.
    pub max_hold: Duration,
    /// How far the stream from live to dest is.
    pub carry: watch::Receiver<Applied>,
    /// Stop after the gates.
    pub dry_run: bool,
}

/// Where the choreography writes what it does, and commits the point of no return.
pub trait Journal {
    /// Before a step. Gives a handle for [`Journal::end`].
    fn begin(&mut self, step: &str) -> impl Future<Output = Result<String>> + Send;
    /// After it.
    fn end(&mut self, handle: &str, ms: f64) -> impl Future<Output = Result<()>> + Send;
    /// Commits, durably, that applications now belong on the other side.
    fn point_of_no_return(&mut self) -> impl Future<Output = Result<()>> + Send;
    /// Commits that clients have been let through.
    fn released(&mut self) -> impl Future<Output = Result<()>> + Send;
}

/// A step and its time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// Milliseconds.
    pub ms: f64,
}

/// What a flip did.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The barrier: the live side's end of WAL once writers had stopped. `0/0` for a dry run.
    pub switched_lsn: String,
    /// How long writers were held, in milliseconds: from the first hold of the try that succeeded
    /// to the release of the last.
    pub fenced_ms: f64,
    /// Tries that met an open transaction and let go again.
    pub retries: u32,
    /// All steps.
    pub steps: Vec<Step>,
}

struct Flight<'a, J> {
    plan: &'a mut Plan,
    journal: &'a mut J,
    steps: Vec<Step>,
}

/// Runs the choreography. On an error everything has been undone, unless it is
/// [`Error::NotUndone`].
pub async fn run<J: Journal>(plan: &mut Plan, journal: &mut J) -> Result<Outcome> {
    // Routes that hold clients flip while nobody can pass; a hook may let clients through at once,
    // so nothing that can fail may come after it.
    plan.routes.sort_by_key(|route| !route.holds());
    let mut flight = Flight { plan, journal, steps: Vec::new() };
    flight.gates().await?;
    if flight.plan.dry_run {
        let steps = flight.steps;
        let switched_lsn = Lsn::ZERO.to_string();
        return Ok(Outcome { switched_lsn, fenced_ms: 0.0, retries: 0, steps });
    }
    match flight.fly().await {
        Ok(outcome) => Ok(outcome),
        Err(cause) => {
            let plan = &*flight.plan;
            let undone = undo::undo(&plan.live, plan.fence, &plan.routes, &plan.context).await;
            match undone {
                Ok(()) => Err(cause),
                Err(undo) => {
                    Err(Error::NotUndone { cause: cause.to_string(), undo: undo.to_string() })
                }
            }
        }
    }
}

/// Times a step, journals it, and keeps it for the outcome.
macro_rules! step {
    ($flight:expr, $name:expr, $work:expr) => {{
        let handle = $flight.journal.begin($name).await?;
        let started = Instant::now();
        let outcome = $work;
        let ms = started.elapsed().as_secs_f64() * 1e3;
        $flight.steps.push(Step { name: $name.to_string(), ms });
        if outcome.is_ok() {
            $flight.journal.end(&handle, ms).await?;
        }
        outcome?
    }};
}

impl<J: Journal> Flight<'_, J> {
    async fn gates(&mut self) -> Result<()> {
        step!(self, "check routes", self.check_routes().await);
        step!(self, "canary", {
            let plan = &*self.plan;
            canary::prove(&plan.job, plan.flip, &plan.live, &plan.dest, CANARY_WAIT).await
        });
        step!(self, "lag", {
            let plan = &mut *self.plan;
            let mut session = Session::connect(&plan.live, Purpose::Sql).await?;
            barrier::gate(&mut session, &mut plan.carry, plan.max_lag).await
        });
        Ok(())
    }

    async fn check_routes(&self) -> Result<()> {
        for route in &self.plan.routes {
            route.check(&self.plan.context).await?;
        }
        Ok(())
    }

    async fn fly(&mut self) -> Result<Outcome> {
        // All sessions are opened before anybody is held.
        let mut fence = Fence::prepare(self.plan.fence, &self.plan.live, &self.plan.tables).await?;
        let mut live = Session::connect(&self.plan.live, Purpose::Sql).await?;
        let mut dest = Session::connect(&self.plan.dest, Purpose::Sql).await?;
        let (held, retries) = step!(self, "fence", self.stop_writers(&mut fence).await);
        let barrier_lsn = step!(self, "barrier", barrier::mark(&mut live, "barrier").await);
        step!(self, "drain", self.drain(barrier_lsn, held).await);
        step!(self, "sequences", carry_sequences(&mut live, &mut dest, &self.plan.selection).await);
        step!(self, "seal", {
            match fence.seal().await {
                Ok(()) => fence::open(&mut dest).await,
                Err(error) => Err(error),
            }
        });
        step!(self, "switch", self.switch_routes().await);
        let started = Instant::now();
        self.journal.point_of_no_return().await?;
        let ms = started.elapsed().as_secs_f64() * 1e3;
        self.steps.push(Step { name: "point of no return".to_string(), ms });
        self.release(held).await;
        Ok(Outcome {
            switched_lsn: barrier_lsn.to_string(),
            fenced_ms: held.elapsed().as_secs_f64() * 1e3,
            retries,
            steps: std::mem::take(&mut self.steps),
        })
    }

    /// After the point of no return an error must not undo anything: it is logged, the job stays
    /// marked as not released, and the runner repeats the release until it holds.
    async fn release(&mut self, _held: Instant) {
        let started = Instant::now();
        match undo::release(&self.plan.routes, &self.plan.context).await {
            Ok(()) => {
                let ms = started.elapsed().as_secs_f64() * 1e3;
                self.steps.push(Step { name: "release".to_string(), ms });
                if let Err(error) = self.journal.released().await {
                    tracing::warn!(%error, "clients were released, but it could not be recorded");
                }
            }
            Err(error) => {
                tracing::error!(%error, "switched, but clients could not be released; retrying");
            }
        }
    }

    /// Holds clients and raises the fence, again and again until both hold or time is up. Gives the
    /// moment from which writers wait, and the number of tries that failed.
    async fn stop_writers(&self, fence: &mut Fence) -> Result<(Instant, u32)> {
        let plan = &*self.plan;
        let deadline = Deadline::after(plan.timeout);
        // Between tries the application runs undisturbed for longer than it was held.
        let mut backoff = Backoff::new(plan.lock_timeout * 2, plan.lock_timeout * 10);
        let mut retries = 0;
        loop {
            let held = Instant::now();
            if self.hold_routes().await? && fence.raise(plan.lock_timeout).await? {
                return Ok((held, retries));
            }
            undo::release(&plan.routes, &plan.context).await?;
            retries += 1;
            if deadline.passed() {
                let blockers = fence.blockers().await?;
                return Err(Error::Fence { waited: plan.timeout, blockers });
            }
            tokio::time::sleep(backoff.step().min(deadline.left())).await;
        }
    }

    async fn hold_routes(&self) -> Result<bool> {
        for route in &self.plan.routes {
            match route.hold(&self.plan.context, self.plan.lock_timeout).await {
                Ok(()) => {}
                Err(route::Error::Busy { .. }) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    async fn drain(&mut self, barrier_lsn: Lsn, held: Instant) -> Result<()> {
        let wait = self.plan.max_hold.saturating_sub(held.elapsed());
        if barrier::reached(&mut self.plan.carry, barrier_lsn, wait).await? {
            return Ok(());
        }
        let applied_lsn = self.plan.carry.borrow().applied_lsn;
        Err(Error::Drain { barrier_lsn, applied_lsn, waited: self.plan.max_hold })
    }

    async fn switch_routes(&self) -> Result<()> {
        for route in &self.plan.routes {
            route.switch(&self.plan.context).await?;
        }
        Ok(())
    }
}

/// Sets every sequence of `dest` past what `live` handed out. The commit is synchronous and so
/// makes
/// everything that was applied before it durable too.
///
/// One that should be there and is not is an error; that of a table left out need not be there, but
/// may, as another table may use it.
async fn carry_sequences(
    live: &mut Session,
    dest: &mut Session,
    selection: &Selection,
) -> Result<()> {
    let mut sequences = catalog::sequences(live).await?;
    let there: Vec<QualifiedName> =
        catalog::sequences(dest).await?.into_iter().map(|sequence| sequence.name).collect();
    sequences.retain(|sequence| {
        sequence.owner.as_ref().is_none_or(|table| selection.has_schema(table))
            || there.contains(&sequence.name)
    });
    schema::set_sequences(dest, &sequences, SEQUENCE_MARGIN).await?;
    dest.query("select pg_catalog.pg_logical_emit_message(true, 'walferry', 'flush')").await?;
    Ok(())
}
