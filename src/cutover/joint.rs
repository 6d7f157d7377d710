//! The choreography where rows of several sources go to several targets: one switch of all.
//!
//! The steps are those of one source and one target, each taken on all sides before the next one
//! begins on any: all fences hold before a barrier is read, each stream from a source has reached
//! that source's barrier before anything is sealed, all sources are sealed before routes flip. What
//! fails anywhere before the point of no return is undone everywhere. That point is one commit, in
//! the home database, and what it says holds for every side.
//!
//! ```text
//! gates ─▶ fence each source ─▶ barriers ─▶ drain each stream ─▶ flush ─▶ seal ─▶ switch
//!              (all or none)                seal's triggers,     each     each      │
//!                                           sequences            target   source    ▼
//!                                                                              no return
//! ```
//!
//! Fences are of locks; a source whose writers cannot be stopped in one try has all others let go,
//! so that nobody waits for somebody else's long transaction for longer than that try.
//!
//! Sequences of every target are set past every value that any source hands out.
//!
//! Left out: a way back. Rows of one target come from several sources, and nothing tells which a
//! new one would have to go to.

use std::collections::HashSet;
use std::future::Future;
use std::time::{Duration, Instant};

use futures_util::future::{join_all, try_join_all};
use tokio::sync::watch;

use super::choreography::{Outcome, PONR_WAIT, Step, timed};
use super::fence::{Fence, FenceKind};
use super::seal::Sealing;
use super::sequences::{self, Stood};
use super::{Error, Limits, Result, Rules, barrier, seal, undo};
use crate::apply::Applied;
use crate::catalog;
use crate::clock::{Backoff, Deadline};
use crate::id::{JobName, QualifiedName};
use crate::lsn::Lsn;
use crate::pg::{Config, Session};
use crate::route::{self, Route};

/// How long one side may take to be opened again.
const OPEN_WAIT: Duration = Duration::from_secs(10);

/// A source, and the streams from it.
#[derive(Debug)]
pub struct Leaving {
    /// Where applications write now.
    pub live: Config,
    /// Its tables to fence.
    pub tables: Vec<QualifiedName>,
    /// How far each stream from it is, one for each target.
    pub carries: Vec<watch::Receiver<Applied>>,
}

/// Everything such a switch needs to know.
#[derive(Debug)]
pub struct Joint {
    /// What seals are named after.
    pub job: JobName,
    /// All sources.
    pub sources: Vec<Leaving>,
    /// All targets.
    pub targets: Vec<Config>,
    /// Where clients find the data; those that hold clients first.
    pub routes: Vec<Route>,
    /// What the routes are told.
    pub context: route::Context,
    /// How long it may take.
    pub limits: Limits,
    /// Stop after the gates.
    pub dry_run: bool,
}

/// Where it writes what it does, and commits the point of no return.
pub trait JointJournal {
    /// Before steps that change something.
    fn begin(&mut self, steps: &[&str]) -> impl Future<Output = Result<()>> + Send;
    /// Commits, durably, that applications now belong on the targets, each source's rows from its
    /// barrier on, and for how long writers have been held by then.
    fn point_of_no_return(
        &mut self,
        barriers: &[Lsn],
        held: Duration,
    ) -> impl Future<Output = Result<()>> + Send;
}

/// Sessions that are opened before anybody is held.
struct Ready {
    /// With each source.
    lives: Vec<Session>,
    /// With each target.
    dests: Vec<Session>,
    /// Sequences of each target.
    there: Vec<HashSet<QualifiedName>>,
    /// Where each source's sequences stood.
    stood: Vec<Stood>,
}

/// Runs it. On an error everything has been undone, unless it is [`Error::NotUndone`] or
/// [`Error::Unknown`].
pub async fn run_joint<J: JointJournal>(plan: &mut Joint, journal: &mut J) -> Result<Outcome> {
    plan.routes.sort_by_key(|route| (!route.holds(), matches!(route, Route::Hook(_))));
    let mut steps = Vec::new();
    let ((), step) = timed("gates", gates(plan)).await?;
    steps.push(step);
    if plan.dry_run {
        return Ok(outcome(&[], Duration::ZERO, 0, steps));
    }
    let mut fences = Vec::new();
    match fly(plan, journal, &mut fences, &mut steps).await {
        Ok(outcome) => Ok(outcome),
        Err(unknown @ Error::Unknown { .. }) => Err(unknown),
        Err(cause) => {
            let lowered = join_all(fences.into_iter().zip(&plan.sources).map(lower)).await;
            let undone = undo_joint(&plan.job, &lives(plan), &plan.routes, &plan.context).await;
            match lowered.into_iter().collect::<Result<()>>().and(undone) {
                Ok(()) => Err(cause),
                Err(undo) => {
                    Err(Error::NotUndone { cause: cause.to_string(), undo: undo.to_string() })
                }
            }
        }
    }
}

fn outcome(barriers: &[Lsn], held: Duration, retries: u32, steps: Vec<Step>) -> Outcome {
    let barriers: Vec<String> = barriers.iter().map(Lsn::to_string).collect();
    Outcome {
        switched_lsn: barriers.join(" "),
        fenced_ms: held.as_secs_f64() * 1e3,
        retries,
        steps,
        released: true,
        unreleased: None,
    }
}

fn lives(plan: &Joint) -> Vec<Config> {
    plan.sources.iter().map(|source| source.live.clone()).collect()
}

async fn lower((fence, source): (Fence, &Leaving)) -> Result<()> {
    let lowered = tokio::time::timeout(OPEN_WAIT, fence.abandon(&source.live)).await;
    lowered.map_err(|_| Error::NoAnswer { waited: OPEN_WAIT })?
}

/// Undoes whatever such a switch reached before its point of no return; from stored facts alone, so
/// that another process can do it after a crash. Idempotent.
///
/// # Errors
/// Where a source or a route cannot be reached: all others are undone.
pub async fn undo_joint(
    job: &JobName,
    lives: &[Config],
    routes: &[Route],
    context: &route::Context,
) -> Result<()> {
    let open = |live: &Config| {
        let live = live.clone();
        async move {
            let opened = async {
                let mut session = Session::control(&live).await?;
                seal::hasten(&mut session).await;
                seal::open(&mut session, job, None).await
            };
            let opened = tokio::time::timeout(OPEN_WAIT, opened).await;
            opened.unwrap_or(Err(Error::NoAnswer { waited: OPEN_WAIT }))
        }
    };
    let mut undone: Result<()> = join_all(lives.iter().map(open)).await.into_iter().collect();
    for route in routes.iter().rev() {
        undone = undone.and(route.undo(context).await.map_err(Error::from));
    }
    undone
}

/// Nothing is left prepared, routes answer, and each stream carries a probe within the lag allowed.
async fn gates(plan: &mut Joint) -> Result<()> {
    for route in &plan.routes {
        route.check(&plan.context).await?;
    }
    let max_lag = plan.limits.max_lag;
    let gates = plan.sources.iter_mut().map(|source| async move {
        let mut live = Session::control(&source.live).await?;
        barrier::refuse_left_prepared(&mut live, Some(&source.tables)).await?;
        let probe_lsn = barrier::mark(&mut live, "probe").await?;
        for carry in &mut source.carries {
            if !barrier::reached(carry, probe_lsn, max_lag).await? {
                let applied_lsn = carry.borrow().applied_lsn;
                return Err(Error::Lag { max_lag, probe_lsn, applied_lsn });
            }
        }
        Ok(())
    });
    try_join_all(gates).await.map(|_| ())
}

async fn fly<J: JointJournal>(
    plan: &mut Joint,
    journal: &mut J,
    fences: &mut Vec<Fence>,
    steps: &mut Vec<Step>,
) -> Result<Outcome> {
    let prepare = plan.sources.iter().map(|source| {
        let sealing = Sealing { job: &plan.job, tables: &source.tables, is_group: false };
        Fence::prepare(FenceKind::Lock, &source.live, sealing, plan.limits.max_hold)
    });
    for fence in join_all(prepare).await {
        fences.push(fence?);
    }
    let mut ready = Ready::make(plan).await?;
    journal.begin(&["fence"]).await?;
    let ((held, retries), step) = timed("fence", stop_writers(plan, fences)).await?;
    steps.push(step);
    let limit = plan.limits.max_hold.saturating_sub(held.elapsed());
    let flipping = while_held(plan, journal, (fences, steps), &mut ready, held);
    let barriers = match tokio::time::timeout(limit, flipping).await {
        Ok(barriers) => barriers?,
        Err(_) => {
            let after = steps.last().map_or("", |step| &step.name).to_string();
            let (waited, blockers) = (plan.limits.max_hold, String::new());
            return Err(Error::Held { after, waited, blockers });
        }
    };
    let started = Instant::now();
    let committing = journal.point_of_no_return(&barriers, held.elapsed());
    match tokio::time::timeout(PONR_WAIT, committing).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(Error::Unknown { cause: error.to_string() }),
        Err(_) => {
            return Err(Error::Unknown { cause: format!("no answer within {PONR_WAIT:?}") });
        }
    }
    let ms = started.elapsed().as_secs_f64() * 1e3;
    steps.push(Step { name: "point of no return".to_string(), ms });
    let released = undo::release(&plan.routes, &plan.context, |_| {}).await;
    let unreleased = released.err().map(|error| error.to_string());
    let done = outcome(&barriers, held.elapsed(), retries, std::mem::take(steps));
    Ok(Outcome { released: unreleased.is_none(), unreleased, ..done })
}

impl Ready {
    async fn make(plan: &Joint) -> Result<Ready> {
        let lives = plan.sources.iter().map(|source| Session::control(&source.live));
        let dests = plan.targets.iter().map(Session::control);
        let (mut lives, mut dests) = tokio::try_join!(try_join_all(lives), try_join_all(dests))?;
        let stood = try_join_all(lives.iter_mut().map(Stood::of)).await?;
        let there = try_join_all(dests.iter_mut().map(|dest| async move {
            let sequences = catalog::sequences(dest).await?;
            Ok::<_, Error>(sequences.into_iter().map(|sequence| sequence.name).collect())
        }));
        let there = there.await?;
        Ok(Ready { lives, dests, there, stood })
    }
}

/// Raises all fences or none, again and again until all hold or time is up. Gives the moment from
/// which writers wait, and the number of tries that failed.
async fn stop_writers(plan: &Joint, fences: &mut [Fence]) -> Result<(Instant, u32)> {
    let wait = plan.limits.lock_timeout;
    let deadline = Deadline::after(plan.limits.timeout);
    let mut backoff = Backoff::new(wait * 2, wait * 10);
    let mut retries = 0;
    loop {
        try_join_all(fences.iter_mut().map(|fence| fence.begin(wait))).await?;
        let held = Instant::now();
        let mut blockers = hold_routes(plan, held).await?;
        if blockers.is_none() {
            let raised = join_all(fences.iter_mut().map(|fence| fence.raise(wait))).await;
            let raised = raised.into_iter().collect::<Result<Vec<bool>>>()?;
            if raised.iter().all(|holds| *holds) {
                return Ok((held, retries));
            }
            let up = fences.iter_mut().zip(&raised).filter(|(_, holds)| **holds);
            try_join_all(up.map(|(fence, _)| fence.lower())).await?;
            let down = fences.iter_mut().zip(&raised).find(|(_, holds)| !**holds);
            if let Some((fence, _)) = down.filter(|_| deadline.passed()) {
                blockers = Some(fence.blockers().await?);
            }
        }
        undo::release(&plan.routes, &plan.context, |_| {}).await?;
        retries += 1;
        if deadline.passed() {
            let (waited, blockers) = (plan.limits.timeout, blockers.unwrap_or_default());
            return Err(Error::Fence { waited, blockers });
        }
        tokio::time::sleep(backoff.step().min(deadline.left())).await;
    }
}

/// Gives why a route could not hold its clients in time.
async fn hold_routes(plan: &Joint, held: Instant) -> Result<Option<String>> {
    for route in &plan.routes {
        let left = plan.limits.lock_timeout.saturating_sub(held.elapsed());
        match route.hold(&plan.context, left).await {
            Ok(()) => {}
            Err(busy @ (route::Error::Busy { .. } | route::Error::Held { .. })) => {
                return Ok(Some(busy.to_string()));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// From the barriers to the switch. Gives the barriers, in the order of the sources.
async fn while_held<J: JointJournal>(
    plan: &mut Joint,
    journal: &mut J,
    (fences, steps): (&mut Vec<Fence>, &mut Vec<Step>),
    ready: &mut Ready,
    held: Instant,
) -> Result<Vec<Lsn>> {
    let Ready { lives, dests, there, stood } = ready;
    let marking = try_join_all(lives.iter_mut().map(|live| barrier::mark(live, "barrier")));
    let (barriers, step) = timed("barriers", marking).await?;
    steps.push(step);
    let noting = journal.begin(&["drain", "sequences", "seal", "switch"]);
    let (max_hold, sources) = (plan.limits.max_hold, &mut plan.sources);
    let tables: Vec<Vec<QualifiedName>> = sources.iter().map(|s| s.tables.clone()).collect();
    let drains = sources.iter_mut().zip(&barriers);
    let drains = drains.map(|(source, lsn)| drain(source, *lsn, held, max_hold));
    let draining = timed("drain", try_join_all(drains));
    let looking = async {
        let left = lives.iter_mut().zip(&tables);
        let refuse = left.map(|(live, tables)| barrier::refuse_prepared(live, Some(tables)));
        try_join_all(refuse).await?;
        let past = sequences::past_all(lives, stood, max_hold).await?;
        let setting = dests.iter_mut().zip(&*there).map(|(dest, there)| past.set(dest, there));
        timed("sequences", try_join_all(setting)).await
    };
    let none = Rules::default();
    let sealing = fences.iter_mut().zip(&tables);
    let sealing = try_join_all(sealing.map(|(fence, tables)| fence.prepare_seal(&none, tables)));
    let ready_routes = try_join_all(plan.routes.iter().map(|route| route.ready(&plan.context)));
    let ready_routes = async { Ok(ready_routes.await?) };
    let ((_, drained), (_, set), _, _, ()) =
        tokio::try_join!(draining, looking, sealing, ready_routes, noting)?;
    steps.extend([drained, set]);
    // The point of no return is a commit on one of them.
    let flushing = try_join_all(dests.iter_mut().map(barrier::flush));
    let (_, step) = timed("flush", flushing).await?;
    steps.push(step);
    let sealing = try_join_all(fences.iter_mut().map(Fence::seal));
    let (_, step) = timed("seal", sealing).await?;
    steps.push(step);
    let switching = async {
        for route in &plan.routes {
            route.switch(&plan.context).await?;
        }
        Ok(())
    };
    let ((), step) = timed("switch", switching).await?;
    steps.push(step);
    Ok(barriers)
}

async fn drain(
    source: &mut Leaving,
    barrier_lsn: Lsn,
    held: Instant,
    max_hold: Duration,
) -> Result<()> {
    for carry in &mut source.carries {
        let wait = max_hold.saturating_sub(held.elapsed()).mul_f64(0.95);
        if !barrier::reached(carry, barrier_lsn, wait).await? {
            let applied_lsn = carry.borrow().applied_lsn;
            return Err(Error::Drain { barrier_lsn, applied_lsn, waited: max_hold });
        }
    }
    Ok(())
}
