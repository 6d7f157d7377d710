//! A client of whatever runner is alive, and of one of our own where none is.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::client::{Asking, Client};
use super::run::{Notice, Report};
use super::store::{JobRow, Store};
use super::{Error, JobConfig, Phase, Result, Runner, Until, lease};
use crate::clock::Deadline;
use crate::pg::Session;

/// A runner that is alive takes a command at its next turn, and one that hangs takes none.
const TAKE_WAIT: Duration = Duration::from_secs(60);

/// One that has just begun connects its streams first, or undoes a switch that was cut short.
const OWN_TAKE_WAIT: Duration = Duration::from_secs(300);

/// Between two looks at who runs the job.
const RUNNER_LOOK: Duration = Duration::from_secs(1);

/// A way to reach the job's runner.
pub struct Asker {
    config: JobConfig,
    /// The job as it was when this connected.
    pub row: JobRow,
    /// The connection for commands.
    pub client: Client,
    /// Told by a runner of our own, and of what keeps another from its work.
    report: Report,
    own: Option<Own>,
}

struct Own {
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<Phase>>,
}

impl Asker {
    /// Connects. Fails if there is no such job. Starts a runner of our own if none is alive.
    pub async fn connect(config: &JobConfig, report: Report) -> Result<Asker> {
        Self::connect_if(config, report, |_| Ok(())).await
    }

    /// The same, but where `fits` refuses the job as it stands: then no runner is started.
    pub async fn connect_if(
        config: &JobConfig,
        report: Report,
        fits: impl FnOnce(&JobRow) -> Result<()>,
    ) -> Result<Asker> {
        let mut config = config.clone();
        let home = Session::control(&config.target).await?;
        let mut store = Store::new(home, config.job.clone());
        let row = store.load_existing().await?;
        fits(&row)?;
        config.same_map(&row)?;
        // The job knows its tables; these commands need not repeat the options.
        config.options = row.options.clone();
        let mut client = Client::connect(&config.target, &config.job).await?;
        client.tell_of_loss();
        let mut asker = Asker { config, row, client, report, own: None };
        asker.ensure_runner().await?;
        Ok(asker)
    }

    /// The job, with the options it was planned with.
    pub fn config(&self) -> &JobConfig {
        &self.config
    }

    /// True if the runner is ours and will end with us.
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// True if it has just been started.
    async fn ensure_runner(&mut self) -> Result<bool> {
        if let Some(own) = self.own.take_if(|own| own.task.is_finished()) {
            match joined(own.task).await {
                // Another took the lease first, and hears the command as well.
                Ok(_) | Err(Error::Busy { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        // A home database that cannot say has no use for another runner; the next turn asks again.
        let holder = lease::holder(self.client.session(), &self.config.job).await;
        let alive = !matches!(holder, Ok(None));
        if self.own.is_some() || alive {
            return Ok(false);
        }
        let (stop, stopping) = watch::channel(false);
        let (config, report) = (self.config.clone(), self.report.clone());
        let task = tokio::spawn(Runner::run(config, Until::Told, report, stopping));
        self.own = Some(Own { stop, task });
        Ok(true)
    }

    /// Asks and waits for the answer, up to `wait`; a runner that dies meanwhile is replaced by one
    /// of our own. What keeps a runner from its work is said. A command that no runner takes in
    /// time is taken back.
    pub async fn ask(&mut self, verb: &str, args: &Value, wait: Duration) -> Result<Value> {
        let id = self.client.post(verb, args).await?;
        let mut take_wait = if self.is_own() { OWN_TAKE_WAIT } else { TAKE_WAIT };
        let (deadline, mut take) = (Deadline::after(wait), Deadline::after(take_wait));
        let mut look = Deadline::after(RUNNER_LOOK);
        loop {
            match self.client.poll(&id).await? {
                Asking::Done(value) => return Ok(value),
                Asking::Queued if take.passed() && self.client.withdraw(&id).await? => {
                    return Err(self.client.no_answer(verb, take_wait).await);
                }
                _ => {}
            }
            if deadline.passed() {
                return Err(self.client.no_answer(verb, wait).await);
            }
            if look.passed() {
                look = Deadline::after(RUNNER_LOOK);
                if self.ensure_runner().await? {
                    take_wait = OWN_TAKE_WAIT;
                    take = Deadline::after(take_wait);
                } else if self.own.is_none()
                    && let Some(trouble) = self.client.trouble().await
                {
                    (self.report)(Notice::Trouble(trouble));
                }
            }
            self.client.pause().await;
        }
    }

    /// Takes back what was asked last, for a caller that gives up; false if a runner is at it.
    pub async fn withdraw(&mut self) -> bool {
        matches!(self.client.withdraw_last().await, Ok(true))
    }

    /// Ends our own runner, if there is one, at a batch boundary.
    pub async fn close(self) -> Result<()> {
        if let Some(own) = self.own {
            let _ = own.stop.send(true);
            match joined(own.task).await {
                Ok(_) | Err(Error::Interrupted | Error::Busy { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// How a runner ended.
pub(super) async fn joined(task: JoinHandle<Result<Phase>>) -> Result<Phase> {
    task.await.map_err(|e| Error::State(format!("the runner: {e}")))?
}
