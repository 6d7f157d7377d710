//! The steps in their order, timed and journalled.

use std::collections::HashMap;
use std::future::Future;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::watch;

use super::fence::{Fence, FenceKind};
use super::held::{Ends, Ready};
use super::seal::Sealing;
use super::sequences::Stood;
use super::{Error, Limits, Rest, Result, Rules, barrier, canary, undo};
use crate::apply::Applied;
use crate::catalog::Selection;
use crate::clock::{Backoff, Deadline};
use crate::id::{JobName, QualifiedName, Stream};
use crate::lsn::Lsn;
use crate::pg::{Config, Session};
use crate::route::{self, Route};

/// How long the home database may take to commit the point of no return. Until it has answered,
/// nobody knows on which side applications belong, and clients are let go on neither.
pub(super) const PONR_WAIT: Duration = Duration::from_secs(10);

/// How long it may take to note how far a flip came that was undone.
const NOTE_WAIT: Duration = Duration::from_secs(1);

/// How long it may take to say who is in the way, while writers are still held.
const BLOCKER_WAIT: Duration = Duration::from_millis(500);

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
    /// A standby of the live side that its log is decoded from.
    pub decoded_at: Option<Config>,
    /// The live side's tables to fence.
    pub tables: Vec<QualifiedName>,
    /// Which tables take part; sequences owned by others do not.
    pub selection: Selection,
    /// Sequences that have other names on the other side: by their names on the live one.
    pub sequences: HashMap<QualifiedName, QualifiedName>,
    /// There is no way back, and so none to be proven.
    pub one_way: bool,
    /// What stops writers.
    pub fence: FenceKind,
    /// Where clients find the data.
    pub routes: Vec<Route>,
    /// What the routes are told.
    pub context: route::Context,
    /// How long it may take.
    pub limits: Limits,
    /// Triggers, rules and foreign keys of either side.
    pub rules: Rules,
    /// What no stream carries.
    pub rest: Rest,
    /// How far the stream from live to dest is.
    pub carry: watch::Receiver<Applied>,
    /// What is kept of parked tables stays behind; else it refuses the flip.
    pub leave_parked: bool,
    /// Stop after the gates.
    pub dry_run: bool,
    /// What [`crate::catalog::mark`] gave of the live side's tables, where DDL since then refuses
    /// the flip.
    pub mark: Option<String>,
    /// True: give up at the next place where that can be undone.
    pub stop: watch::Receiver<bool>,
}

impl Plan {
    /// The tables of a job that is about tables alone, not about all that is in its database.
    fn own_tables(&self) -> Option<&[QualifiedName]> {
        self.selection.tables_only.then_some(&*self.tables)
    }
}

/// Where the choreography writes what it does, and commits the point of no return.
pub trait Journal {
    /// Before steps: writes them down, and how long those took that are `done`. One commit, as
    /// writers may be waiting for it.
    fn begin(&mut self, steps: &[&str], done: &[Step]) -> impl Future<Output = Result<()>> + Send;
    /// After them.
    fn end(&mut self, done: &[Step]) -> impl Future<Output = Result<()>> + Send;
    /// Commits, durably, that applications now belong on the other side, from the barrier on, and
    /// for how long writers have been held by then.
    fn point_of_no_return(
        &mut self,
        barrier_lsn: Lsn,
        held: Duration,
    ) -> impl Future<Output = Result<()>> + Send;
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
    /// Clients were let through on every route. For a dry run: nobody was held.
    pub released: bool,
    /// Why not.
    pub unreleased: Option<String>,
}

/// A flip under way.
pub(super) struct Flight<'a, J> {
    pub(super) plan: &'a mut Plan,
    pub(super) journal: &'a mut J,
    pub(super) steps: Vec<Step>,
    /// Where the live side's sequences stood when the gates were checked.
    pub(super) stood: Option<Stood>,
}

/// Runs the choreography. On an error everything has been undone, unless it is
/// [`Error::NotUndone`] or [`Error::Unknown`].
pub async fn run<J: Journal>(plan: &mut Plan, journal: &mut J) -> Result<Outcome> {
    // Routes that hold clients flip while nobody can pass; a hook may let clients through at once,
    // so nothing that can fail may come after it. Foreign servers flip at the release.
    plan.routes.sort_by_key(|route| (!route.holds(), matches!(route, Route::Hook(_))));
    let mut flight = Flight { plan, journal, steps: Vec::new(), stood: None };
    let ends = flight.gates().await?;
    if flight.plan.dry_run {
        flight.end_steps().await?;
        let steps = flight.steps;
        let switched_lsn = Lsn::ZERO.to_string();
        let (released, unreleased) = (true, None);
        return Ok(Outcome {
            switched_lsn,
            fenced_ms: 0.0,
            retries: 0,
            steps,
            released,
            unreleased,
        });
    }
    let mut fence = None;
    match flight.fly(&mut fence, ends).await {
        Ok(outcome) => Ok(outcome),
        // Only the home database knows now: what it says is done by whoever asks it next.
        Err(unknown @ Error::Unknown { .. }) => Err(unknown),
        Err(cause) => {
            let plan = &*flight.plan;
            let undone =
                undo::withdraw(&plan.live, fence, &plan.routes, &plan.context, &plan.rules).await;
            // For whoever reads the journal to learn how far it came; the job needs it not.
            let noted = tokio::time::timeout(NOTE_WAIT, flight.journal.end(&flight.steps));
            if !matches!(noted.await, Ok(Ok(()))) {
                tracing::debug!("the journal does not say how long the steps took");
            }
            match undone {
                Ok(()) => Err(cause),
                Err(undo) => {
                    Err(Error::NotUndone { cause: cause.to_string(), undo: undo.to_string() })
                }
            }
        }
    }
}

/// Times a step.
pub(super) async fn timed<T>(
    name: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<(T, Step)> {
    let started = Instant::now();
    let outcome = work.await?;
    let ms = started.elapsed().as_secs_f64() * 1e3;
    Ok((outcome, Step { name: name.to_string(), ms }))
}

/// Journals a step, times it, and keeps it for the outcome.
macro_rules! step {
    ($flight:expr, $name:expr, $work:expr) => {{
        $flight.journal.begin(&[$name], &$flight.steps).await?;
        let (outcome, step) = timed($name, async { $work }).await?;
        $flight.steps.push(step);
        outcome
    }};
}

impl<J: Journal> Flight<'_, J> {
    /// Gives the sessions that were asked: what they know of the catalogs by now, they need not
    /// read while writers wait.
    async fn gates(&mut self) -> Result<Ends> {
        let mut ends = Ends::open(self.plan).await?;
        let Ends { live, dest } = &mut ends;
        step!(self, "check routes", self.check_routes(live).await);
        if !self.plan.one_way {
            step!(self, "canary", {
                let plan = &*self.plan;
                canary::prove(&plan.job, plan.flip, live, dest, CANARY_WAIT).await
            });
        }
        step!(self, "lag", {
            let plan = &*self.plan;
            self.stood = Some(Stood::read(live, dest).await?);
            let mut carry = plan.carry.clone();
            let arriving = barrier::gate(live, &mut carry, plan.limits.max_lag);
            tokio::try_join!(arriving, refuse_parked(plan, dest)).map(|_| ())
        });
        Ok(ends)
    }

    async fn check_routes(&self, live: &mut Session) -> Result<()> {
        barrier::refuse_left_prepared(live, self.plan.own_tables()).await?;
        for route in &self.plan.routes {
            route.check(&self.plan.context).await?;
        }
        Ok(())
    }

    async fn end_steps(&mut self) -> Result<()> {
        self.journal.end(&self.steps).await
    }

    async fn fly(&mut self, slot: &mut Option<Fence>, ends: Ends) -> Result<Outcome> {
        let plan = &*self.plan;
        // All sessions are opened before anybody is held.
        let is_group = plan.context.is_group;
        let sealing = Sealing { job: &plan.job, tables: &plan.tables, is_group };
        let max_hold = plan.limits.max_hold;
        let fencing = async {
            let mut fence = Fence::prepare(plan.fence, &plan.live, sealing, max_hold).await?;
            if plan.rest.fences_large_objects() {
                fence.take_large_objects().await?;
            }
            Ok::<_, Error>(fence)
        };
        let (fence, mut ready) = tokio::try_join!(fencing, Ready::make(plan, ends))?;
        let fence = slot.insert(fence);
        let (held, retries) = step!(self, "fence", self.stop_writers(fence).await);
        let limit = max_hold.saturating_sub(held.elapsed());
        // A server that no longer answers must not keep writers waiting either.
        let flipping = self.while_held(fence, &mut ready, held);
        let barrier_lsn = match tokio::time::timeout(limit, flipping).await {
            Ok(outcome) => outcome?,
            Err(_) => return Err(self.held_too_long(fence, &mut ready.live).await),
        };
        let started = Instant::now();
        let committing = self.journal.point_of_no_return(barrier_lsn, held.elapsed());
        match tokio::time::timeout(PONR_WAIT, committing).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(Error::Unknown { cause: error.to_string() }),
            Err(_) => {
                let cause = format!("no answer within {PONR_WAIT:?}");
                return Err(Error::Unknown { cause });
            }
        }
        let ms = started.elapsed().as_secs_f64() * 1e3;
        self.steps.push(Step { name: "point of no return".to_string(), ms });
        let unreleased = self.release().await;
        Ok(Outcome {
            switched_lsn: barrier_lsn.to_string(),
            fenced_ms: held.elapsed().as_secs_f64() * 1e3,
            retries,
            steps: std::mem::take(&mut self.steps),
            released: unreleased.is_none(),
            unreleased,
        })
    }

    /// Says also who keeps the fence's session waiting, as readers do where it drops foreign keys.
    async fn held_too_long(&self, fence: &Fence, live: &mut Session) -> Error {
        let after = self.steps.last().map_or("", |step| &step.name).to_string();
        let asking = tokio::time::timeout(BLOCKER_WAIT, fence.in_the_way(live));
        let blockers = match asking.await {
            Ok(Ok(blockers)) => blockers,
            _ => String::new(),
        };
        Error::Held { after, waited: self.plan.limits.max_hold, blockers }
    }

    /// After the point of no return an error must not undo anything: it is logged, the job stays
    /// marked as not released, and the runner repeats the release until it holds. Gives why it has
    /// to.
    async fn release(&mut self) -> Option<String> {
        let started = Instant::now();
        match undo::release(&self.plan.routes, &self.plan.context, |_| {}).await {
            Ok(()) => {
                let ms = started.elapsed().as_secs_f64() * 1e3;
                let recorded = async {
                    self.end_steps().await?;
                    self.journal.released().await
                };
                let recorded = recorded.await;
                self.steps.push(Step { name: "release".to_string(), ms });
                if let Err(error) = recorded {
                    tracing::warn!(%error, "clients were released, but it could not be recorded");
                }
                None
            }
            Err(error) => {
                tracing::info!(%error, "switched, but clients could not be released; retrying");
                Some(error.to_string())
            }
        }
    }

    /// Holds clients and raises the fence, again and again until both hold or time is up. Gives the
    /// moment from which writers wait, and the number of tries that failed.
    async fn stop_writers(&self, fence: &mut Fence) -> Result<(Instant, u32)> {
        let plan = &*self.plan;
        let Limits { timeout, lock_timeout, .. } = plan.limits;
        let deadline = Deadline::after(timeout);
        // Between tries the application runs undisturbed for longer than it was held.
        let mut backoff = Backoff::new(lock_timeout * 2, lock_timeout * 10);
        let mut retries = 0;
        loop {
            fence.begin(lock_timeout).await?;
            let held = Instant::now();
            let mut busy = self.hold_routes(held).await?;
            if busy.is_none() && fence.raise(lock_timeout).await? {
                return Ok((held, retries));
            }
            undo::release(&plan.routes, &plan.context, |_| {}).await?;
            retries += 1;
            if deadline.passed() {
                // A pooler does not say whom it waits for; the server knows.
                let blockers = match busy.take() {
                    Some(route::Error::Held { blockers, .. }) => blockers,
                    _ => fence.blockers().await?,
                };
                return Err(Error::Fence { waited: timeout, blockers });
            }
            self.pause(backoff.step().min(deadline.left())).await?;
        }
    }

    /// What is left of one try's time for routes. Locks have the same time to themselves: a hook
    /// that takes longer to hold clients would otherwise leave them none in any try.
    fn left(&self, held: Instant) -> Duration {
        self.plan.limits.lock_timeout.saturating_sub(held.elapsed())
    }

    /// Sleeps, unless asked to stop.
    async fn pause(&self, wait: Duration) -> Result<()> {
        let mut stop = self.plan.stop.clone();
        let stopping = async {
            if stop.wait_for(|stop| *stop).await.is_err() {
                // Nobody is left who could ask.
                std::future::pending::<()>().await;
            }
        };
        match tokio::time::timeout(wait, stopping).await {
            Ok(()) => Err(Error::Stopped),
            Err(_) => Ok(()),
        }
    }

    /// Gives why one of them could not hold its clients in time.
    async fn hold_routes(&self, held: Instant) -> Result<Option<route::Error>> {
        for route in &self.plan.routes {
            match route.hold(&self.plan.context, self.left(held)).await {
                Ok(()) => {}
                Err(busy @ (route::Error::Busy { .. } | route::Error::Held { .. })) => {
                    return Ok(Some(busy));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }
}

/// Nothing is kept aside of what has arrived on the other side.
pub(super) async fn refuse_parked(plan: &Plan, dest: &mut Session) -> Result<()> {
    match plan.leave_parked {
        true => Ok(()),
        false => barrier::refuse_parked(dest, &plan.job.object(plan.flip)).await,
    }
}
