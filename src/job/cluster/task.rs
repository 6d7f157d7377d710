//! One task, from wherever it stands to where clients are on its target; then its way back, for as
//! long as the runner of the cluster's job lives.
//!
//! The task's own runner does the work, as `walferry run` would have it; this one looks on, and
//! asks it for the cutover as `walferry cutover` would. Either of them may be killed at any time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, watch};

use super::setup::{Ready, Setup};
use super::store::{ClusterStore, TaskRow};
use super::watch::View;
use super::{database, shape};
use crate::catalog;
use crate::clock::Deadline;
use crate::cluster::guard;
use crate::cluster::read::siblings;
use crate::fault::{Fault, Faulty, Level};
use crate::id::{QualifiedName, Stream};
use crate::job::ask::joined;
use crate::job::cleanup::Ending;
use crate::job::client::Client;
use crate::job::run::Report;
use crate::job::state::Event;
use crate::job::store::Store;
use crate::job::{Error, FlipRequest, Notice, Phase, Result, Runner, Until, comparing, ending};
use crate::pg::Session;

/// How often it is looked how far the task's own job is.
const TURN: Duration = Duration::from_millis(250);

/// So many turns pass between two looks at the tables' shape.
const SHAPE_TURNS: u32 = 8;

/// How long another runner of the task's own job is waited for: as long as a server may take to
/// notice that the one before is cut off.
const BUSY_WAIT: Duration = Duration::from_secs(60);

/// How long nodes that were never reached are tried.
const FIRST_TRY: Duration = Duration::from_secs(10);

/// Between tries of a cutover, and of a task's own job that another process has.
const AGAIN: Duration = Duration::from_secs(3);

/// Both sides are lined up for the comparison within this time, long transactions included.
const VERIFY_WAIT: Duration = Duration::from_secs(600);

/// How long arming the way back may take before writers are held.
const PREPARATION: Duration = Duration::from_secs(3600);

/// What a task tells the runner of the cluster's job.
#[derive(Debug)]
pub(super) enum Told {
    /// A line for people.
    Line(String),
    /// Clients are on the target.
    Switched {
        /// How long writers were held, where that is known.
        held_ms: Option<f64>,
    },
    /// Its way back is no more: finished.
    Finished,
}

/// A task and all that it is run with.
pub(super) struct Task {
    pub job: i64,
    pub row: TaskRow,
    pub setup: Arc<Setup>,
    pub ready: Ready,
    /// End its way back as soon as it is switched.
    pub finish: bool,
    pub view: Arc<View>,
    pub tell: mpsc::UnboundedSender<(u32, Told)>,
    pub stop: watch::Receiver<bool>,
}

impl Task {
    /// Runs it until it is stopped or fails. A task that was stopped is no failure.
    pub(super) async fn run(mut self) -> Result<()> {
        let switched = self.row.state == crate::cluster::TaskState::Completed;
        if !switched {
            let mut stop = self.stop.clone();
            tokio::select! {
                prepared = self.prepare_patiently() => prepared?,
                _ = stop.wait_for(|stop| *stop) => return Ok(()),
            }
        }
        let deadline = Deadline::after(BUSY_WAIT);
        loop {
            match self.run_once(switched).await {
                Err(error @ Error::Busy { .. }) if !deadline.passed() && !*self.stop.borrow() => {
                    self.view.note(&error.to_string());
                    tokio::time::sleep(AGAIN).await;
                }
                Err(Error::Interrupted) => return Ok(()),
                outcome => return outcome,
            }
        }
    }

    fn tell(&self, told: Told) {
        // The runner of the cluster's job is gone only together with us.
        let _ = self.tell.send((self.row.task, told));
    }

    fn line(&self, text: impl Into<String>) {
        self.tell(Told::Line(text.into()));
    }

    /// A node that is away for a moment is waited for; for longer, and its name may be wrong.
    async fn prepare_patiently(&mut self) -> Result<()> {
        let deadline = Deadline::after(FIRST_TRY);
        loop {
            match self.prepare().await {
                Err(error) if error.fault() == Fault::Retry && !deadline.passed() => {
                    self.view.note(&error.to_string());
                    tokio::time::sleep(TURN).await;
                }
                prepared => return prepared,
            }
        }
    }

    /// What stands in the way, the database on the target, and what the tables look like. Done
    /// before anything else is made, and repeated by a run that comes later.
    async fn prepare(&mut self) -> Result<()> {
        if self.row.phase.is_none() {
            self.refuse_rivals().await?;
            self.refuse_newcomers().await?;
            self.guard().await?;
        }
        let moved = &self.ready.moved;
        if moved.own_database && !database::exists(&moved.target).await? {
            let statement = database::statement(&moved.source).await?;
            self.line(format!("making database {}", moved.target.dbname));
            // Written down first: what is not there can be dropped, but what is must be known.
            self.store().await?.set(self.job, self.row.task, "made_database", Some("true")).await?;
            database::make(&moved.target, &statement).await?;
        }
        if self.row.shape.is_none() {
            let shape = self.shape().await?;
            let text = shape.to_string();
            self.store().await?.set(self.job, self.row.task, "shape", Some(&text)).await?;
            self.row.shape = Some(shape);
        }
        Ok(())
    }

    /// Two moves of one group would both switch it, each to another node. This task says that it is
    /// running before it looks, so of two that begin at once at least one sees the other.
    async fn refuse_rivals(&self) -> Result<()> {
        let rivals = self.store().await?.rivals(self.job, self.row.task).await?;
        match rivals.is_empty() {
            true => Ok(()),
            false => Err(Error::TaskRivals { rivals }),
        }
    }

    async fn store(&self) -> Result<ClusterStore> {
        ClusterStore::open(&self.setup.home).await
    }

    async fn shape(&self) -> Result<Value> {
        shape::take(&self.ready.config.source, &self.ready.config.options).await
    }

    /// Long transactions on both nodes, settings of both, and what identifies the source's rows.
    async fn guard(&self) -> Result<()> {
        let errand = &self.row.errand;
        let relations: BTreeMap<QualifiedName, String> =
            errand.names().into_iter().zip(errand.tables.iter().cloned()).collect();
        let mut found = Vec::new();
        for (node, config, shards) in [
            (&errand.source, &self.ready.moved.source, Some(&relations)),
            (&errand.target, &self.ready.moved.target, None),
        ] {
            // The target's database may be still to be made.
            let beside = database::beside(config);
            let own = self.ready.moved.own_database && shards.is_none();
            let config = if own { &beside } else { config };
            found.extend(guard::on_node(node, config, shards, self.setup.allowed).await?);
        }
        let errors = found.into_iter().filter(|finding| finding.level == Level::Error);
        let said: Vec<String> = errors
            .map(|f| {
                let fix = f.fix.map(|fix| format!(" ({fix})")).unwrap_or_default();
                format!("{} on {} {}{fix}", f.object, f.node, f.message)
            })
            .collect();
        match said.is_empty() {
            true => Ok(()),
            false => Err(Error::NotReady(said.join("; "))),
        }
    }

    /// Runs the task's own job, and leads it to the switch unless that was made.
    async fn run_once(&self, switched: bool) -> Result<()> {
        let (stop, stopping) = watch::channel(false);
        let (view, tell, task) = (self.view.clone(), self.tell.clone(), self.row.task);
        let report: Report = Arc::new(move |notice: Notice| {
            if let Some(line) = view.notice(notice) {
                let _ = tell.send((task, Told::Line(line)));
            }
        });
        let config = self.ready.config.clone();
        let mut running = tokio::spawn(Runner::run(config, Until::Told, report, stopping));
        let mut stopped = self.stop.clone();
        let outcome = tokio::select! {
            ended = &mut running => {
                let phase = ended.map_err(|e| Error::State(format!("the runner: {e}")))??;
                return self.ended_elsewhere(phase, switched);
            }
            led = self.lead_patiently(switched) => led,
            _ = stopped.wait_for(|stop| *stop) => Err(Error::Interrupted),
        };
        if outcome.is_ok() && !self.finish {
            // The old side is kept current until somebody says that this is enough.
            let ended = tokio::select! {
                ended = &mut running => Some(ended),
                _ = stopped.wait_for(|stop| *stop) => None,
            };
            if let Some(ended) = ended {
                let phase = ended.map_err(|e| Error::State(format!("the runner: {e}")))??;
                return self.ended_elsewhere(phase, true);
            }
        }
        let _ = stop.send(true);
        match joined(running).await {
            Ok(_) | Err(Error::Interrupted) => {}
            // Why it was stopped says more.
            Err(error) if outcome.is_err() => tracing::debug!(%error, "while stopping"),
            Err(error) => return Err(error),
        }
        outcome?;
        if self.finish && !*self.stop.borrow() {
            self.end_way_back().await?;
        }
        Ok(())
    }

    /// Somebody has ended the task's own job.
    fn ended_elsewhere(&self, phase: Phase, switched: bool) -> Result<()> {
        match phase {
            Phase::Finished => {
                self.tell(Told::Finished);
                Ok(())
            }
            _ if switched => Ok(()),
            _ => Err(Error::State(format!(
                "its own job {} was ended or led back by another command (phase {phase})",
                self.row.name
            ))),
        }
    }

    async fn end_way_back(&self) -> Result<()> {
        let ending =
            Ending { event: Event::FinishAsked, keep_history: false, source_is_gone: false };
        let quiet: Report = Arc::new(|_| {});
        ending::end(&self.ready.config, ending, &quiet).await?;
        self.tell(Told::Finished);
        Ok(())
    }

    /// A server that is away is waited for, as the task's own runner does, which ends if there is
    /// nothing to wait for.
    async fn lead_patiently(&self, switched: bool) -> Result<()> {
        loop {
            match self.lead(switched).await {
                Err(error) if error.fault() == Fault::Retry => {
                    self.view.note(&error.to_string());
                    tokio::time::sleep(AGAIN).await;
                }
                led => return led,
            }
        }
    }

    /// Waits until the target is level, and has clients switched to it.
    async fn lead(&self, switched: bool) -> Result<()> {
        let mut home: Option<Store> = None;
        for turn in 0_u32.. {
            match self.phase(&mut home).await? {
                Some(Phase::Switched) => {
                    if !switched {
                        self.tell(Told::Switched { held_ms: None });
                    }
                    return Ok(());
                }
                Some(Phase::Following) => {
                    let held_ms = self.switch().await?;
                    self.tell(Told::Switched { held_ms });
                    return Ok(());
                }
                // A way back that was taken: clients are on the source again, and stay there.
                Some(Phase::RolledBack) if switched => return Ok(()),
                Some(phase @ Phase::RolledBack) => return self.ended_elsewhere(phase, false),
                Some(phase) => self.view.phase(phase),
                None => {}
            }
            if !switched && turn % SHAPE_TURNS == SHAPE_TURNS - 1 {
                self.refuse_changes().await?;
            }
            tokio::time::sleep(TURN).await;
        }
        Ok(())
    }

    /// The phase of the task's own job; none before it is there, or while its home is away.
    async fn phase(&self, home: &mut Option<Store>) -> Result<Option<Phase>> {
        let mut store = match home.take() {
            Some(store) => store,
            None => match Session::control(&self.ready.config.target).await {
                Ok(session) => Store::new(session, self.ready.config.job.clone()),
                // Its own runner has more patience, and says what is wrong.
                Err(error) if error.fault() == Fault::Retry => return Ok(None),
                Err(error) => return Err(error.into()),
            },
        };
        match store.load().await {
            Ok(row) => {
                *home = Some(store);
                Ok(row.map(|row| row.phase))
            }
            Err(error) if error.fault() == Fault::Retry => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What is co-located with the task's shards and was not when it was planned: no reset gives
    /// the task those, only another plan does.
    async fn refuse_newcomers(&self) -> Result<()> {
        let tables = siblings(&self.setup.address, &self.row.errand).await?;
        match tables.is_empty() {
            true => Ok(()),
            false => Err(Error::TaskGrew(tables)),
        }
    }

    /// DDL on the task's tables, and tables that came to it.
    async fn refuse_changes(&self) -> Result<()> {
        self.refuse_newcomers().await?;
        let Some(kept) = &self.row.shape else { return Ok(()) };
        let changes = shape::changes(kept, &self.shape().await?);
        match changes.is_empty() {
            true => Ok(()),
            false => Err(Error::TaskChanged { changes }),
        }
    }

    /// Compares, and cuts over; a cutover that could not be made is tried again. Gives how long
    /// writers were held, in milliseconds.
    async fn switch(&self) -> Result<Option<f64>> {
        let mut client = Client::connect(&self.ready.config.target, &self.ready.config.job).await?;
        if self.setup.verify {
            self.refuse_changes().await?;
            self.view.note("comparing");
            let report = comparing::compare(&mut client, &self.ready.config, VERIFY_WAIT).await?;
            if !report.equal {
                let tables = report.tables.iter().filter(|table| !table.equal);
                let tables = tables.map(|t| format!("{} rows of {}", t.differing, t.name));
                return Err(Error::TaskDiffers { tables: tables.collect() });
            }
            let rows: u64 = report.tables.iter().map(|table| table.rows).sum();
            self.line(format!("{rows} rows compared, equal"));
        }
        for left in (0..self.setup.flip.tries.max(1)).rev() {
            // Marked before they are looked at: what is altered after the look has another mark.
            let mark = self.mark().await?;
            self.refuse_changes().await?;
            self.view.note("cutting over");
            match self.cut_over(&mut client, mark).await {
                Ok(held_ms) => return Ok(held_ms),
                Err(Error::Remote(said)) if left > 0 => {
                    self.view.note(&said);
                    self.line(format!("not switched, trying again: {said}"));
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return Err(error),
            }
            // An answer that was lost may have been that it is done.
            if self.phase(&mut None).await? == Some(Phase::Switched) {
                return Ok(None);
            }
        }
        Ok(None)
    }

    async fn mark(&self) -> Result<String> {
        let mut session = Session::control(&self.ready.config.source).await?;
        let selection = self.ready.config.options.selection(&mut session).await?;
        let tables = catalog::tables(&mut session, &selection).await?;
        let names: Vec<QualifiedName> = tables.into_iter().map(|table| table.name).collect();
        Ok(catalog::mark(&mut session, &names).await?)
    }

    async fn cut_over(&self, client: &mut Client, mark: String) -> Result<Option<f64>> {
        let flip = &self.setup.flip;
        let request = flip.request(Stream::Forward, self.ready.routes.clone());
        let request = FlipRequest { mark: Some(mark), ..request };
        let request = serde_json::to_value(&request).map_err(|e| Error::State(e.to_string()))?;
        let wait = flip.limits.together().saturating_add(PREPARATION);
        let outcome = client.ask("flip", &request, wait).await?;
        if outcome.pointer("/released") == Some(&Value::Bool(false)) {
            let why = outcome.pointer("/unreleased").and_then(Value::as_str).unwrap_or_default();
            self.line(format!("switched, but clients are not let through on every route: {why}"));
        }
        Ok(outcome.pointer("/fenced_ms").and_then(Value::as_f64))
    }
}
