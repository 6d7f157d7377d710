//! All pairs, run in this process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::layout::Pair;
use super::run::Tell;
use super::{Error, Reshard};
use crate::apply::Applied;
use crate::clock::Deadline;
use crate::job::run::Report;
use crate::job::{self, Notice, Phase, Result, Runner, Until};
use crate::pg::Session;

/// A runner that is told to stop is waited for so long, then dropped, which any of them survives.
const STOP_WAIT: Duration = Duration::from_secs(20);

/// How far the stream of a pair is, once it flows.
type Gauge = Arc<Mutex<Option<watch::Receiver<Applied>>>>;

/// A pair under way.
struct Running {
    pair: Pair,
    gauge: Gauge,
    task: JoinHandle<Result<Phase>>,
}

/// All of them.
pub(super) struct Pairs {
    running: Vec<Running>,
    stop: watch::Sender<bool>,
    /// A session with each target, while it answers.
    homes: Vec<Option<Session>>,
}

impl Pairs {
    pub fn start(pairs: Vec<Pair>, tell: &Tell) -> Pairs {
        let (stop, stopping) = watch::channel(false);
        let targets = pairs.iter().map(|pair| pair.target + 1).max().unwrap_or(0);
        let running = pairs.into_iter().map(|pair| {
            let gauge = Gauge::default();
            let report = report(&pair, gauge.clone(), tell.clone());
            let running = Runner::run(pair.config.clone(), Until::Told, report, stopping.clone());
            Running { pair, gauge, task: tokio::spawn(running) }
        });
        Pairs { running: running.collect(), stop, homes: (0..targets).map(|_| None).collect() }
    }

    /// An error once a pair's runner has ended, whatever the reason.
    pub async fn refuse_ended(&mut self) -> Result<()> {
        let ended = self.running.iter().position(|running| running.task.is_finished());
        let Some(at) = ended else { return Ok(()) };
        let Running { pair, task, .. } = self.running.swap_remove(at);
        let outcome = job::ask::joined(task).await;
        Err(match outcome {
            Ok(phase) => {
                let (job, phase) = (pair.config.job.to_string(), phase.to_string());
                Error::Strayed { job, phase }.into()
            }
            Err(cause) => Error::Pair {
                source_number: pair.source + 1,
                target_number: pair.target + 1,
                cause: Box::new(cause),
            }
            .into(),
        })
    }

    /// The phase of each pair that is not at `due`, by its job's name.
    pub async fn not_at(&mut self, reshard: &Reshard, due: Phase) -> Result<Vec<String>> {
        let mut phases: HashMap<String, String> = HashMap::new();
        for (slot, target) in self.homes.iter_mut().zip(&reshard.targets) {
            let mut session = match slot.take() {
                Some(session) => session,
                None => Session::control(&reshard.named(target)).await?,
            };
            for (name, phase) in phases_on(&mut session, reshard).await? {
                phases.insert(name, phase);
            }
            *slot = Some(session);
        }
        let due = due.to_string();
        let pairs = self.running.iter().map(|running| running.pair.config.job.as_str());
        let phases = pairs.filter_map(|job| match phases.get(job) {
            Some(phase) if *phase == due => None,
            Some(phase) => Some(format!("{job} {phase}")),
            None => Some(format!("{job} not begun")),
        });
        Ok(phases.collect())
    }

    /// How far each stream from a source is; `None` while one does not flow.
    pub fn carries(&self, source: usize) -> Option<Vec<watch::Receiver<Applied>>> {
        let from = self.running.iter().filter(|running| running.pair.source == source);
        let gauges = from
            .map(|running| running.gauge.lock().unwrap_or_else(PoisonError::into_inner).clone());
        gauges.collect()
    }

    /// Waits until every stream flows, one that has just begun anew too.
    pub async fn until_flowing(&self, wait: Duration) {
        let deadline = Deadline::after(wait);
        let flows = |running: &Running| {
            let gauge = running.gauge.lock().unwrap_or_else(PoisonError::into_inner);
            // Its other end goes with the stream.
            gauge.as_ref().is_some_and(|applied| applied.has_changed().is_ok())
        };
        while !self.running.iter().all(flows) && !deadline.passed() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Stops all, at a batch boundary where that does not take long.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        for mut running in self.running {
            match tokio::time::timeout(STOP_WAIT, &mut running.task).await {
                Ok(Ok(Err(error))) => tracing::debug!(%error, "while stopping"),
                Ok(_) => {}
                Err(_) => running.task.abort(),
            }
        }
    }
}

/// Names and phases of the pairs' jobs on a target.
pub(super) async fn phases_on(
    session: &mut Session,
    reshard: &Reshard,
) -> Result<Vec<(String, String)>> {
    let sql = "select name, phase from walferry.job \
         where name ~ ('^' || $1::text || '_[0-9]+_[0-9]+$')";
    let rows = match session.query_params(sql, &[Some(reshard.name.as_str())]).await {
        Err(error) if matches!(error.code(), Some("42P01" | "3F000")) => return Ok(Vec::new()),
        rows => rows?,
    };
    rows.iter().map(|row| Ok((row.string(0)?, row.string(1)?))).collect()
}

/// What a pair says, as lines that name it.
fn report(pair: &Pair, gauge: Gauge, tell: Tell) -> Report {
    let name = format!("source {} to target {}", pair.source + 1, pair.target + 1);
    let last = Mutex::new(String::new());
    Arc::new(move |notice: Notice| {
        let line = match notice {
            Notice::Flows(applied) => {
                *gauge.lock().unwrap_or_else(PoisonError::into_inner) = Some(applied);
                return;
            }
            Notice::Phase(phase) => phase.to_string(),
            Notice::Said(text) => text,
            Notice::Trouble(text) => format!("trying again: {text}"),
            _ => return,
        };
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if *last != line {
            tell(format!("{name}: {line}"));
            *last = line;
        }
    })
}
