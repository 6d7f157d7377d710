//! The one runner: makes the tables, runs all pairs, and does what commands ask of it.
//!
//! A fault that may mend itself stops the pairs and begins again from what is stored, which is the
//! same as being killed and started again.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::flip::Wanted;
use super::layout::{Layout, Pair};
use super::pairs::Pairs;
use super::store::{Row, Stage, Store};
use super::{Error, Reshard, tables};
use crate::clock::{Backoff, Deadline};
use crate::cutover::{self, Outcome};
use crate::fault::{Fault, Faulty};
use crate::job::lease::{self, Holder, Lease};
use crate::job::pipeline::Task;
use crate::job::{self, Phase, Result};
use crate::pg::Session;

/// Lines for people.
pub type Tell = Arc<dyn Fn(String) + Send + Sync>;

/// Between two looks at requests.
const TURN: Duration = Duration::from_millis(100);

/// So many turns pass between two looks at the pairs' phases.
const LOOK_TURNS: u32 = 10;

/// How long servers that were never reached are tried.
const FIRST_TRY: Duration = Duration::from_secs(10);

/// A stop waits so long for a cutover under way.
const LANDING: Duration = Duration::from_secs(60);

/// Beside `--timeout` and `--max-hold`, what a cutover may take; and between looks for its answer.
const ANSWER_SLACK: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(50);

/// When a run returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// When every pair has been level once.
    Following,
    /// When it is stopped or switched.
    Told,
}

/// What one life leaves to the next.
#[derive(Default)]
struct Left {
    holder: Option<Holder>,
    opened: bool,
}

/// Runs it until `until`, `stop`, its cutover, or an error that a person must mend. Gives the
/// stage it is in then.
pub async fn run(
    reshard: &Reshard,
    until: Until,
    tell: &Tell,
    mut stop: watch::Receiver<bool>,
) -> Result<Stage> {
    let begun = tokio::time::Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
    let mut left = Left::default();
    loop {
        let outcome = session(reshard, until, tell, &stop, &mut left).await;
        match outcome {
            Err(error) if !left.opened && begun.elapsed() > FIRST_TRY => return Err(error),
            Err(error) if error.fault() == Fault::Retry && !*stop.borrow() => {
                tell(format!("trying again: {error}"));
            }
            Err(error) if error.fault() == Fault::Retry => return Err(job::Error::Interrupted),
            Err(error) => {
                store_error(reshard, &error).await;
                return Err(error);
            }
            ended => return ended,
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.step()) => {}
            _ = stop.wait_for(|stop| *stop) => return Err(job::Error::Interrupted),
        }
    }
}

/// For status; what cannot be stored is printed all the same.
async fn store_error(reshard: &Reshard, error: &job::Error) {
    let storing = async {
        let session = Session::control(reshard.home()?).await?;
        Store::new(session, reshard.name.clone()).set_error(Some(&error.to_string())).await
    };
    let harmless =
        matches!(error, job::Error::Busy { .. } | job::Error::Interrupted | job::Error::Ended);
    if !harmless && let Err(error) = storing.await {
        tracing::debug!(%error, "the error could not be stored");
    }
}

async fn session(
    reshard: &Reshard,
    until: Until,
    tell: &Tell,
    stop: &watch::Receiver<bool>,
    left: &mut Left,
) -> Result<Stage> {
    let layout = reshard.layout().await?;
    let all = reshard.pairs(&layout)?;
    let (lease, store) = open(reshard, &all, left.holder.as_ref()).await?;
    left.holder = Some(lease.holder().clone());
    left.opened = true;
    // A session that nobody asks for half a minute is ended by its server.
    let mut keeping = Task(tokio::spawn(keep(lease)));
    tokio::select! {
        worked = work(reshard, until, tell, stop, (store, layout, all)) => worked,
        lost = &mut keeping.0 => Err(lost.unwrap_or(job::Error::LeaseLost)),
    }
}

/// Asks the lease every second until it is lost; gives why.
pub(super) async fn keep(mut lease: Lease) -> job::Error {
    loop {
        if let Err(error) = lease.check().await {
            return error;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// What the holder of the lease does.
async fn work(
    reshard: &Reshard,
    until: Until,
    tell: &Tell,
    stop: &watch::Receiver<bool>,
    (mut store, layout, all): (Store, Layout, Vec<Pair>),
) -> Result<Stage> {
    let row = store.load_existing().await?;
    if clear(reshard, &mut store, &all, row).await? == Stage::Switched {
        return Ok(Stage::Switched);
    }
    store.set_error(None).await?;
    tables::make(reshard, &layout, tell).await?;
    let mut pairs = Pairs::start(all.clone(), tell);
    let (flying, mut landed) = watch::channel(false);
    let mut watched =
        Watched { reshard, store: &mut store, pairs: &mut pairs, layout: &layout, flying };
    let mut stopping = stop.clone();
    let attended = tokio::select! {
        attended = watched.attend(until) => attended,
        () = async {
            let _ = stopping.wait_for(|stop| *stop).await;
            // Writers may be held: a switch under way is made, or undone.
            let _ = tokio::time::timeout(LANDING, landed.wait_for(|flying| !*flying)).await;
        } => Err(job::Error::Interrupted),
    };
    pairs.stop().await;
    let stage = attended?;
    if stage == Stage::Switched {
        let row = store.load_existing().await?;
        reshard.settle(&mut store, &all, row.flip).await?;
    }
    Ok(stage)
}

/// The lease, and the row; what a dead runner's sessions were at has ended then.
async fn open(reshard: &Reshard, pairs: &[Pair], last: Option<&Holder>) -> Result<(Lease, Store)> {
    let home = reshard.named(reshard.home()?);
    let lease = lease::take(&home, &reshard.name, last).await?;
    let mut store = Store::new(Session::control(&home).await?, reshard.name.clone());
    let keep = [lease.process_id(), store.session.process_id()];
    lease::end_predecessors(&mut store.session, &reshard.name, &keep).await?;
    for side in reshard.sources.iter().chain(reshard.targets.iter().skip(1)) {
        let mut session = Session::control(&reshard.named(side)).await?;
        lease::end_predecessors(&mut session, &reshard.name, &[]).await?;
    }
    store.ensure().await?;
    let plan = reshard.digest(pairs);
    store.create(&plan).await?;
    let row = store.load_existing().await?;
    if row.plan != plan {
        let (name, planned) = (reshard.name.to_string(), row.plan);
        return Err(Error::OtherPlan { name, planned }.into());
    }
    Ok((lease, store))
}

/// Ends what a crash left half done. Gives the stage that it is in then.
async fn clear(reshard: &Reshard, store: &mut Store, pairs: &[Pair], row: Row) -> Result<Stage> {
    match row.stage {
        Stage::Running => {}
        Stage::CuttingOver => reshard.undo(store, row.flip).await?,
        Stage::Switched => {
            reshard.settle(store, pairs, row.flip).await?;
            return Ok(Stage::Switched);
        }
    }
    Ok(Stage::Running)
}

/// What a runner looks after once the pairs have begun.
struct Watched<'a> {
    reshard: &'a Reshard,
    store: &'a mut Store,
    pairs: &'a mut Pairs,
    layout: &'a Layout,
    /// A cutover is under way.
    flying: watch::Sender<bool>,
}

impl Watched<'_> {
    /// Looks on, and does what is asked, until there is reason to return.
    async fn attend(&mut self, until: Until) -> Result<Stage> {
        for turn in 0_u32.. {
            self.pairs.refuse_ended().await?;
            let due = until == Until::Following && turn % LOOK_TURNS == 0;
            if due && self.pairs.not_at(self.reshard, Phase::Following).await?.is_empty() {
                return Ok(Stage::Running);
            }
            if let Some(request) = self.store.load_existing().await?.request
                && self.hear(request).await?
            {
                return Ok(Stage::Switched);
            }
            tokio::time::sleep(TURN).await;
        }
        Ok(Stage::Running)
    }

    /// True once it is switched.
    async fn hear(&mut self, request: Value) -> Result<bool> {
        if request.get("stop").is_some() {
            self.store.answer(&Value::Null).await?;
            return Err(job::Error::Ended);
        }
        let wanted: Wanted = serde_json::from_value(request)
            .map_err(|e| job::Error::State(format!("walferry.reshard.request: {e}")))?;
        let _ = self.flying.send_replace(true);
        let flown = self.reshard.fly(self.store, self.pairs, self.layout, &wanted).await;
        let heard = self.answer(&wanted, flown).await;
        let _ = self.flying.send_replace(false);
        heard
    }

    async fn answer(&mut self, wanted: &Wanted, flown: Result<Outcome>) -> Result<bool> {
        let attempt = &wanted.attempt;
        match flown {
            Ok(outcome) => {
                let answer = json!({ "attempt": attempt, "outcome": outcome });
                self.store.answer(&answer).await?;
                Ok(!wanted.dry_run)
            }
            // What is stored says what became of it.
            Err(error @ job::Error::Cutover(cutover::Error::Unknown { .. }))
            | Err(error @ job::Error::Cutover(cutover::Error::NotUndone { .. })) => Err(error),
            Err(error) => {
                let answer = json!({ "attempt": attempt, "error": error.to_string() });
                self.store.answer(&answer).await?;
                Ok(false)
            }
        }
    }
}

/// Asks the runner that is alive, or one of our own, for the cutover; gives its outcome.
pub async fn lead_over(
    reshard: &Reshard,
    wanted: &Wanted,
    tell: &Tell,
    stop: watch::Receiver<bool>,
) -> Result<Value> {
    let mut store = Store::new(Session::control(reshard.home()?).await?, reshard.name.clone());
    let row = store.load_existing().await?;
    if row.stage == Stage::Switched {
        let (name, stage) = (reshard.name.to_string(), row.stage.to_string());
        let why = "walferry reshard finish ends it";
        return Err(Error::Refused { asked: "cutover", name, stage, why }.into());
    }
    let wait = wanted.limits.together().saturating_add(ANSWER_SLACK);
    let deadline = Deadline::after(wait);
    let request = json!(wanted);
    let mut own = None;
    loop {
        store.ask(&request).await?;
        if own.is_none() && lease::holder(&mut store.session, &reshard.name).await?.is_none() {
            let (reshard, tell, stop) = (reshard.clone(), tell.clone(), stop.clone());
            let running = async move { run(&reshard, Until::Told, &tell, stop).await };
            own = Some(tokio::spawn(running));
        }
        tokio::time::sleep(POLL).await;
        let row = store.load_existing().await?;
        if let Some(outcome) = outcome(&row, wanted)? {
            return Ok(outcome);
        }
        if let Some(running) = own.take_if(|running| running.is_finished()) {
            match running.await.map_err(|e| job::Error::State(format!("the runner: {e}")))? {
                // Another took the lease first, and hears it as well.
                Ok(_) | Err(job::Error::Busy { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if deadline.passed() {
            store.forget().await?;
            return Err(Error::Silent { seconds: wait.as_secs() }.into());
        }
    }
}

/// What the cutover did, once every pair knows; `None` while it is under way. A runner that died
/// past the point of no return has told no more than what is stored.
fn outcome(row: &Row, wanted: &Wanted) -> Result<Option<Value>> {
    let answer = row.answer.as_ref().filter(|answer| {
        answer.get("attempt").and_then(Value::as_str) == Some(wanted.attempt.as_str())
    });
    if let Some(error) = answer.and_then(|answer| answer.get("error")) {
        let error = error.as_str().unwrap_or_default().to_string();
        return Err(Error::Answer(error).into());
    }
    let told = answer.and_then(|answer| answer.get("outcome")).cloned();
    match row.stage {
        Stage::Switched => Ok(Reshard::settled(row.flip.clone()).map(|held| told.unwrap_or(held))),
        _ => Ok(told),
    }
}

/// Takes the lease from whoever has it: a runner that is alive is asked to stop.
pub(super) async fn take_lease(reshard: &Reshard, wait: Duration) -> Result<(Lease, Store)> {
    let home = reshard.named(reshard.home()?);
    // Under another name than a runner's, which ends its predecessors.
    let mut store = Store::new(Session::control(reshard.home()?).await?, reshard.name.clone());
    store.load_existing().await?;
    let deadline = Deadline::after(wait);
    loop {
        if let Some(lease) = Lease::try_take(&home, &reshard.name).await? {
            return Ok((lease, store));
        }
        store.ask(&json!({ "stop": true })).await?;
        if deadline.passed() {
            let pid = lease::holder(&mut store.session, &reshard.name).await?.unwrap_or_default();
            return Err(job::Error::Busy { job: reshard.name.to_string(), pid });
        }
        tokio::time::sleep(POLL).await;
    }
}
