//! The runner of a cluster's job: takes its lease, starts tasks as nodes become free, writes down
//! what becomes of them.
//!
//! A fault that may mend itself (the home restarts, the lease is lost) stops all tasks and begins
//! again, which is the same as being killed and started again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::setup::Setup;
use super::slots;
use super::store::{Change, ClusterStore, TaskRow, lease_name};
use super::task::{Task, Told};
use super::watch::{Overview, View};
use crate::clock::Backoff;
use crate::cluster::TaskState;
use crate::cluster::schedule::{Limits, Load, startable};
use crate::fault::{Fault, Faulty};
use crate::job::lease::{self, Lease};
use crate::job::{Error, Result};
use crate::pg::Config;

/// How often the tables are looked at, and what is seen is stored.
const TURN: Duration = Duration::from_millis(500);

/// How long a home that was never reached is tried.
const FIRST_TRY: Duration = Duration::from_secs(10);

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The job.
    pub job: i64,
    /// Only these of its tasks.
    pub tasks: Option<Vec<u32>>,
    /// How many at once.
    pub limits: Limits,
    /// End each task's way back as soon as it is switched.
    pub finish: bool,
    /// Go on when all tasks are over, and keep the old sides current, until told to stop.
    pub stay: bool,
}

/// What a run tells whoever watches.
#[derive(Clone, Debug)]
pub enum Said {
    /// A line about a task.
    Task(u32, String),
    /// A line about the job.
    Job(String),
    /// How far all is; each turn.
    Progress(Overview, Vec<TaskRow>),
}

/// Receives it; must not block.
pub type Tell = Arc<dyn Fn(Said) + Send + Sync>;

/// What became of a run.
#[derive(Clone, Debug)]
pub struct Ended {
    /// It was told to stop.
    pub stopped: bool,
    /// The tasks that were wanted, as they stand.
    pub tasks: Vec<TaskRow>,
}

/// Runs a job until its tasks are over, `stop`, or an error that a person must mend.
///
/// # Errors
/// Another runner has it ([`Error::ClusterBusy`]); it was canceled; the home cannot be used. A task
/// in error is none of these.
pub async fn run(
    setup: &Arc<Setup>,
    wanted: &Wanted,
    tell: &Tell,
    stop: watch::Receiver<bool>,
) -> Result<Ended> {
    let fresh = || Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
    let (mut backoff, begun, mut opened) = (fresh(), Instant::now(), false);
    loop {
        let started = Instant::now();
        match session(setup, wanted, tell, &stop, &mut opened).await {
            Err(error) if error.fault() == Fault::Retry && !*stop.borrow() => {
                if !opened && begun.elapsed() > FIRST_TRY {
                    return Err(error);
                }
                tell(Said::Job(format!("trying again: {error}")));
            }
            // We had it: another took it while the home was away, and may give it back.
            Err(error @ Error::ClusterBusy { .. }) if opened && !*stop.borrow() => {
                tell(Said::Job(format!("trying again: {error}")));
            }
            outcome => return outcome,
        }
        if started.elapsed() > Duration::from_secs(5) {
            backoff = fresh();
        }
        tokio::time::sleep(backoff.step()).await;
    }
}

/// The job's lease, waiting a little for a predecessor whose end its server has not noticed yet.
pub(super) async fn take_lease(home: &Config, job: i64) -> Result<Lease> {
    let name = lease_name(job);
    for _ in 0..20 {
        if let Some(lease) = Lease::try_take_named(home, &name).await? {
            return Ok(lease);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut store = ClusterStore::open(home).await?;
    let pid = lease::holder_of(&mut store.session, &name).await?;
    Err(Error::ClusterBusy { job, pid: pid.unwrap_or_default() })
}

/// A task that was started.
struct Active {
    load: Load,
    bytes: u64,
    view: Arc<View>,
    /// Clients are on its target, and it loads nothing any more but its way back.
    switched: bool,
}

struct Session<'a> {
    setup: &'a Arc<Setup>,
    wanted: &'a Wanted,
    tell: &'a Tell,
    store: ClusterStore,
    routers: Vec<String>,
    active: BTreeMap<u32, Active>,
    /// Those whose way back has ended in this session: not begun again in it.
    ended: BTreeSet<u32>,
    ends: JoinSet<(u32, Result<()>)>,
    told: mpsc::UnboundedReceiver<(u32, Told)>,
    teller: mpsc::UnboundedSender<(u32, Told)>,
    /// Ends the tasks.
    stop: watch::Sender<bool>,
    begun: Option<(Instant, u64)>,
}

async fn session(
    setup: &Arc<Setup>,
    wanted: &Wanted,
    tell: &Tell,
    stop: &watch::Receiver<bool>,
    opened: &mut bool,
) -> Result<Ended> {
    let home = setup.home.clone().with_application_name("walferry cluster");
    let mut store = ClusterStore::open(&home).await?;
    let job = store.load(wanted.job).await?;
    if job.canceled {
        return Err(Error::ClusterCanceled { job: wanted.job });
    }
    let mut lease = take_lease(&home, wanted.job).await?;
    if !*opened {
        let mut tasks = job.tasks;
        tasks.retain(|row| wanted.tasks.as_ref().is_none_or(|only| only.contains(&row.task)));
        slots::refuse_short(setup, &tasks, wanted.limits, wanted.finish).await?;
    }
    *opened = true;
    let (teller, told) = mpsc::unbounded_channel();
    let mut session = Session {
        setup,
        wanted,
        tell,
        store,
        routers: job.routers,
        active: BTreeMap::new(),
        ended: BTreeSet::new(),
        ends: JoinSet::new(),
        told,
        teller,
        stop: watch::channel(false).0,
        begun: None,
    };
    let outcome = session.work(&mut lease, stop.clone()).await;
    session.stop_tasks().await;
    let written = setup.log.write(&mut session.store.session, wanted.job, true).await;
    let ended = outcome?;
    written.map(|()| ended)
}

impl Session<'_> {
    async fn work(&mut self, lease: &mut Lease, stop: watch::Receiver<bool>) -> Result<Ended> {
        loop {
            if let Some(stopped) = self.turn(&stop).await? {
                self.stop_tasks().await;
                self.hear().await?;
                return Ok(Ended { stopped, tasks: self.wanted_tasks().await? });
            }
            lease.check().await?;
            let mut stopping = stop.clone();
            tokio::select! {
                Some(ended) = self.ends.join_next() => {
                    let (task, outcome) = ended.map_err(|e| Error::State(e.to_string()))?;
                    self.hear().await?;
                    self.end(task, outcome).await?;
                }
                Some((task, told)) = self.told.recv() => self.take(task, told).await?,
                () = tokio::time::sleep(TURN) => {}
                _ = stopping.wait_for(|stop| *stop) => {}
            }
        }
    }

    /// Looks at the tables, starts what may start. `Some` once there is nothing to wait for: true
    /// if it was told to stop.
    async fn turn(&mut self, stop: &watch::Receiver<bool>) -> Result<Option<bool>> {
        if *stop.borrow() {
            return Ok(Some(true));
        }
        if self.store.is_canceled(self.wanted.job).await? {
            return Err(Error::ClusterCanceled { job: self.wanted.job });
        }
        self.save_views().await?;
        self.setup.log.write(&mut self.store.session, self.wanted.job, false).await?;
        let tasks = self.wanted_tasks().await?;
        let overview = Overview::of(&tasks, self.begun);
        self.begun.get_or_insert((Instant::now(), overview.processed_bytes));
        (self.tell)(Said::Progress(overview, tasks.clone()));
        let open = |row: &&TaskRow| !row.state.is_over() && !self.active.contains_key(&row.task);
        let waiting: Vec<&TaskRow> = tasks.iter().filter(open).collect();
        let loads: Vec<Load> = waiting.iter().map(|row| load(row)).collect();
        let busy = self.active.values().filter(|active| !active.switched);
        let busy: Vec<Load> = busy.map(|active| active.load.clone()).collect();
        let starting = startable(&loads, &busy, self.wanted.limits);
        let ending = self.wanted.finish && !self.active.is_empty();
        let at_work = !busy.is_empty() || !waiting.is_empty() || ending;
        for row in tasks.iter().filter(|row| starting.contains(&row.task)) {
            self.start(row).await?;
        }
        // Ways back of tasks that an earlier run switched, beside those of this one.
        if at_work || self.wanted.stay {
            for row in tasks.iter().filter(|row| row.way_back) {
                if !self.active.contains_key(&row.task) && !self.ended.contains(&row.task) {
                    self.spawn(row, true)?;
                }
            }
        }
        Ok((!at_work && !self.wanted.stay).then_some(false))
    }

    async fn wanted_tasks(&mut self) -> Result<Vec<TaskRow>> {
        let mut tasks = self.store.tasks(self.wanted.job).await?;
        if let Some(wanted) = &self.wanted.tasks {
            if let Some(none) = wanted.iter().find(|n| !tasks.iter().any(|row| row.task == **n)) {
                return Err(Error::NoTask { job: self.wanted.job, task: *none });
            }
            tasks.retain(|row| wanted.contains(&row.task));
        }
        Ok(tasks)
    }

    async fn start(&mut self, row: &TaskRow) -> Result<()> {
        let detail = if row.state == TaskState::Running { "resumed" } else { "" };
        let change = Change { to: TaskState::Running, detail };
        if !self.store.change(self.wanted.job, row.task, change).await? {
            // Canceled or reset in this moment; the next turn sees it.
            return Ok(());
        }
        let errand = &row.errand;
        (self.tell)(Said::Task(
            row.task,
            format!("begins: {} to {}", errand.source, errand.target),
        ));
        match self.spawn(row, false) {
            Err(error) if error.fault() != Fault::Retry => self.fail(row.task, &error).await,
            spawned => spawned,
        }
    }

    fn spawn(&mut self, row: &TaskRow, switched: bool) -> Result<()> {
        let view = Arc::new(View::default());
        let task = Task {
            job: self.wanted.job,
            ready: self.setup.ready(row, &self.routers)?,
            row: row.clone(),
            setup: self.setup.clone(),
            finish: self.wanted.finish,
            view: view.clone(),
            tell: self.teller.clone(),
            stop: self.stop.subscribe(),
        };
        let (number, bytes) = (row.task, row.errand.bytes);
        self.ends.spawn(async move { (number, task.run().await) });
        self.active.insert(number, Active { load: load(row), bytes, view, switched });
        Ok(())
    }

    /// What tasks have told and nobody has heard yet.
    async fn hear(&mut self) -> Result<()> {
        while let Ok((task, told)) = self.told.try_recv() {
            self.take(task, told).await?;
        }
        Ok(())
    }

    async fn take(&mut self, task: u32, told: Told) -> Result<()> {
        let job = self.wanted.job;
        match told {
            Told::Line(line) => (self.tell)(Said::Task(task, line)),
            Told::Switched { held_ms } => {
                let held = held_ms.map(|ms| format!("{ms:.1}"));
                let detail = held.as_ref().map_or("clients are on the target".to_string(), |ms| {
                    format!("clients are on the target; writers were held for {ms} ms")
                });
                let change = Change { to: TaskState::Completed, detail: &detail };
                self.store.change(job, task, change).await?;
                self.store.set(job, task, "held_ms", held.as_deref()).await?;
                self.store.set(job, task, "phase", Some("switched")).await?;
                (self.tell)(Said::Task(task, format!("completed: {detail}")));
                if let Some(active) = self.active.get_mut(&task) {
                    active.switched = true;
                }
            }
            Told::Finished => {
                self.store.set(job, task, "way_back", Some("false")).await?;
                self.store.set(job, task, "phase", Some("finished")).await?;
                (self.tell)(Said::Task(task, "finished: its way back is ended".to_string()));
            }
        }
        Ok(())
    }

    /// A task has ended, well or not.
    async fn end(&mut self, task: u32, outcome: Result<()>) -> Result<()> {
        let switched = self.active.remove(&task).is_some_and(|active| active.switched);
        self.ended.insert(task);
        match outcome {
            Ok(()) => Ok(()),
            // Where clients are does not change; what is lost is the way back, until the next run.
            Err(error) if switched => {
                let note = format!("its way back has stopped: {error}");
                self.store.set(self.wanted.job, task, "note", Some(&note)).await?;
                (self.tell)(Said::Task(task, note));
                Ok(())
            }
            Err(error) => self.fail(task, &error).await,
        }
    }

    async fn fail(&mut self, task: u32, error: &Error) -> Result<()> {
        let detail = error.to_string();
        let change = Change { to: TaskState::Error, detail: &detail };
        self.store.change(self.wanted.job, task, change).await?;
        (self.tell)(Said::Task(task, format!("error: {detail}")));
        Ok(())
    }

    async fn save_views(&mut self) -> Result<()> {
        let at_work = self.active.iter().filter(|(_, active)| !active.switched);
        let rows: Vec<Value> =
            at_work.map(|(task, active)| active.view.row(*task, active.bytes)).collect();
        if rows.is_empty() {
            return Ok(());
        }
        self.store.save_views(self.wanted.job, &Value::from(rows)).await
    }

    /// Each of them stops where it can be taken up again; a cutover under way is ended first.
    async fn stop_tasks(&mut self) {
        let _ = self.stop.send_replace(true);
        while let Some(ended) = self.ends.join_next().await {
            if let Ok((task, Err(error))) = ended {
                tracing::debug!(task, %error, "while stopping");
            }
        }
        self.active.clear();
    }
}

fn load(row: &TaskRow) -> Load {
    let (source, target) = (row.errand.source.clone(), row.errand.target.clone());
    Load { task: row.task, source, target }
}
