//! Taking back what tasks began, leading one back after its switch, and ending ways back.
//!
//! Each of these may be cut short and given again. What a task made on its target goes with its own
//! job, which remembers that it was made; a database that was made for it goes last.

use std::sync::Arc;
use std::time::Duration;

use super::database;
use super::run::{Said, Tell, take_lease};
use super::setup::{Ready, Setup};
use super::store::{Change, ClusterJob, ClusterStore, TaskRow};
use crate::clock::Deadline;
use crate::cluster::TaskState;
use crate::id::Stream;
use crate::job::ask::Asker;
use crate::job::cleanup::{Ending, clean_up};
use crate::job::run::Report;
use crate::job::state::Event;
use crate::job::store::Store;
use crate::job::{Error, Notice, Phase, Result, Runner, Until, ending};
use crate::pg::Session;

/// How long a runner that is alive may take to see that the job is canceled, and to stop.
const STOP_WAIT: Duration = Duration::from_secs(90);

/// How long a switch that was cut short may take to be undone.
const UNDO_WAIT: Duration = Duration::from_secs(120);

/// How long a rollback may take beyond its own limits: arming, materialized views.
const PREPARATION: Duration = Duration::from_secs(3600);

/// Whether a task's source can still be cleaned up on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It can.
    None,
    /// It does not exist any more, and its slots with it.
    Source,
}

/// Puts tasks back to init, everything that they made taken away: those named, or all in error.
/// Gives the tasks. A runner that is alive goes on with them.
///
/// # Errors
/// Where a task cannot be cleaned up after; those before it have been.
pub async fn reset(
    setup: &Setup,
    job: &ClusterJob,
    tasks: Option<&[u32]>,
    gone: Gone,
    tell: &Tell,
) -> Result<Vec<u32>> {
    let mut store = ClusterStore::open(&setup.home).await?;
    let in_error = |row: &TaskRow| row.state == TaskState::Error;
    let mut done = Vec::new();
    for row in chosen(job, tasks, in_error)? {
        if !matches!(row.state, TaskState::Error | TaskState::Canceled) {
            return Err(Error::TaskState {
                task: row.task,
                state: row.state.to_string(),
                asked: "reset",
                why: "only a task in error or canceled is put back to init; cancel the job, or let \
                      it run",
            });
        }
        take_back(setup, job, row, gone, tell).await?;
        let change = Change { to: TaskState::Init, detail: "reset" };
        store.change(job.job, row.task, change).await?;
        done.push(row.task);
    }
    store.set_canceled(job.job, false).await?;
    Ok(done)
}

/// Cancels a job: its runner is stopped, what its tasks made is taken away, and clients stay where
/// they are. Completed tasks stay so. Gives the tasks that were canceled.
///
/// # Errors
/// As [`reset`]; the job stays marked, and no run begins.
pub async fn cancel(setup: &Setup, job: &ClusterJob, gone: Gone, tell: &Tell) -> Result<Vec<u32>> {
    let mut store = ClusterStore::open(&setup.home).await?;
    store.set_canceled(job.job, true).await?;
    let deadline = Deadline::after(STOP_WAIT);
    let lease = loop {
        match take_lease(&setup.home, job.job).await {
            Err(Error::ClusterBusy { .. }) if !deadline.passed() => {}
            lease => break lease?,
        }
    };
    // As the runner left them.
    let tasks = store.tasks(job.job).await?;
    let mut done = Vec::new();
    for row in tasks.iter().filter(|row| !matches!(row.state, TaskState::Completed)) {
        if row.state != TaskState::Canceled {
            take_back(setup, job, row, gone, tell).await?;
            let change = Change { to: TaskState::Canceled, detail: "canceled" };
            store.change(job.job, row.task, change).await?;
            done.push(row.task);
        }
    }
    drop(lease);
    Ok(done)
}

/// Leads clients of completed tasks back to their sources, with everything written since. Gives the
/// tasks, each with the milliseconds that writers were held.
///
/// # Errors
/// Where one cannot be led back; its clients stay on the target.
pub async fn rollback(
    setup: &Setup,
    job: &ClusterJob,
    tasks: &[u32],
    tell: &Tell,
) -> Result<Vec<(u32, f64)>> {
    let mut store = ClusterStore::open(&setup.home).await?;
    let mut done = Vec::new();
    for row in chosen(job, Some(tasks), |_| false)? {
        if !row.way_back {
            return Err(Error::TaskState {
                task: row.task,
                state: row.state.to_string(),
                asked: "rollback",
                why: "it leads back what was completed and not finished",
            });
        }
        let ready = setup.ready(row, &job.routers)?;
        let mut asker = Asker::connect(&ready.config, report_of(row.task, tell)).await?;
        let last = asker.row.flip.as_ref().map(|flip| flip.waiting()).unwrap_or_default();
        let request = setup.flip.request(Stream::Reverse, last);
        let request = serde_json::to_value(&request).map_err(|e| Error::State(e.to_string()))?;
        let wait = setup.flip.limits.together().saturating_add(PREPARATION);
        let outcome = asker.ask("flip", &request, wait).await;
        let closed = asker.close().await;
        let held_ms = outcome?.pointer("/fenced_ms").and_then(serde_json::Value::as_f64);
        let held_ms = held_ms.unwrap_or_default();
        let detail = format!("rolled back; writers were held for {held_ms:.1} ms");
        let change = Change { to: TaskState::Canceled, detail: &detail };
        store.change(job.job, row.task, change).await?;
        store.set(job.job, row.task, "phase", Some("rolled_back")).await?;
        done.push((row.task, held_ms));
        closed?;
    }
    Ok(done)
}

/// Ends the ways back of tasks, those named or all: slots, publications and whatever else walferry
/// made on both nodes. Gives the tasks.
///
/// # Errors
/// Where one cannot be ended; those before it have been.
pub async fn finish(
    setup: &Setup,
    job: &ClusterJob,
    tasks: Option<&[u32]>,
    tell: &Tell,
) -> Result<Vec<u32>> {
    let mut store = ClusterStore::open(&setup.home).await?;
    let mut done = Vec::new();
    // One that was rolled back has its slots as well.
    let has_ways = |row: &TaskRow| row.way_back || row.phase.as_deref() == Some("rolled_back");
    for row in chosen(job, tasks, has_ways)? {
        if !has_ways(row) {
            return Err(Error::TaskState {
                task: row.task,
                state: row.state.to_string(),
                asked: "finish",
                why: "it ends the way back of what was completed",
            });
        }
        let ready = setup.ready(row, &job.routers)?;
        let ending =
            Ending { event: Event::FinishAsked, keep_history: false, source_is_gone: false };
        match ending::end(&ready.config, ending, &report_of(row.task, tell)).await {
            // It was ended already, and only that was not written down.
            Ok(_) | Err(Error::NoJob { .. }) => {}
            Err(error) => return Err(error),
        }
        store.set(job.job, row.task, "way_back", Some("false")).await?;
        store.set(job.job, row.task, "phase", Some("finished")).await?;
        done.push(row.task);
    }
    Ok(done)
}

/// The tasks named, or those meant where none are.
fn chosen<'a>(
    job: &'a ClusterJob,
    tasks: Option<&[u32]>,
    meant: impl Fn(&TaskRow) -> bool,
) -> Result<Vec<&'a TaskRow>> {
    let Some(tasks) = tasks else {
        return Ok(job.tasks.iter().filter(|row| meant(row)).collect());
    };
    let find = |task: &u32| {
        let row = job.tasks.iter().find(|row| row.task == *task);
        row.ok_or(Error::NoTask { job: job.job, task: *task })
    };
    tasks.iter().map(find).collect()
}

fn report_of(task: u32, tell: &Tell) -> Report {
    let tell = tell.clone();
    Arc::new(move |notice| {
        if let Notice::Said(line) = notice {
            tell(Said::Task(task, line));
        }
    })
}

/// Takes away all that a task made, on both nodes. Harmless where nothing is left.
async fn take_back(
    setup: &Setup,
    job: &ClusterJob,
    row: &TaskRow,
    gone: Gone,
    tell: &Tell,
) -> Result<()> {
    let ready = setup.ready(row, &job.routers)?;
    let own = ready.moved.own_database;
    if own && !database::exists(&ready.config.target).await? {
        return Ok(());
    }
    let report = report_of(row.task, tell);
    let mut store =
        Store::new(Session::control(&ready.config.target).await?, ready.config.job.clone());
    if let Some(own_job) = store.load().await? {
        if own_job.phase == Phase::CuttingOver {
            undo_flip(&ready, &report).await?;
        }
        let lease = ending::take_lease(&ready.config, &report).await?;
        if store.load_existing().await?.phase == Phase::Switched {
            return Err(Error::TaskState {
                task: row.task,
                state: row.state.to_string(),
                asked: "this",
                why: "its clients are on the target already: run the job, which writes that down, \
                      and then roll the task back",
            });
        }
        let source_is_gone = gone == Gone::Source;
        let ending = Ending { event: Event::CancelAsked, keep_history: false, source_is_gone };
        clean_up(&ready.config, ending, &lease).await?;
    }
    drop(store);
    if row.made_database {
        tell(Said::Task(row.task, format!("dropping database {}", ready.config.target.dbname)));
        database::drop(&ready.config.target).await?;
    } else if own && row.phase.is_some() {
        tell(Said::Task(
            row.task,
            format!(
                "database {} was there before and stays: empty it before the task runs again",
                ready.config.target.dbname
            ),
        ));
    }
    Ok(())
}

/// A switch that was cut short is undone by a run.
async fn undo_flip(ready: &Ready, report: &Report) -> Result<()> {
    let (stop, stopping) = tokio::sync::watch::channel(false);
    let config = ready.config.clone();
    let running = Runner::run(config, Until::Following, report.clone(), stopping);
    match tokio::time::timeout(UNDO_WAIT, running).await {
        Ok(undone) => undone.map(|_| ()),
        Err(_) => {
            let _ = stop.send(true);
            let verb = "undo of a cutover that was cut short".to_string();
            Err(Error::NoAnswer { verb, wait: UNDO_WAIT, pid: String::new() })
        }
    }
}
