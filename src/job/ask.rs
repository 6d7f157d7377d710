//! A client of whatever runner is alive, and of one of our own where none is.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::client::Client;
use super::run::Report;
use super::store::{JobRow, Store};
use super::{Error, JobConfig, Phase, Result, Runner, Until, lease};
use crate::clock::Deadline;
use crate::pg::Session;

/// A way to reach the job's runner.
pub struct Asker {
    config: JobConfig,
    /// The job as it was when this connected.
    pub row: JobRow,
    /// The connection for commands.
    pub client: Client,
    /// Told by a runner of our own.
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
        let mut config = config.clone();
        let home = Session::control(&config.target).await?;
        let mut store = Store::new(home, config.job.clone());
        let row = store.load_existing().await?;
        // The job knows its tables; these commands need not repeat the options.
        config.options = row.options.clone();
        let client = Client::connect(&config.target, &config.job).await?;
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

    async fn ensure_runner(&mut self) -> Result<()> {
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
        if self.own.is_none() && !alive {
            let (stop, stopping) = watch::channel(false);
            let (config, report) = (self.config.clone(), self.report.clone());
            let task = tokio::spawn(Runner::run(config, Until::Told, report, stopping));
            self.own = Some(Own { stop, task });
        }
        Ok(())
    }

    /// Asks and waits for the answer, up to `wait`; a runner that dies meanwhile is replaced.
    pub async fn ask(&mut self, verb: &str, args: &Value, wait: Duration) -> Result<Value> {
        let id = self.client.post(verb, args).await?;
        let deadline = Deadline::after(wait);
        let mut turns = 0_u32;
        loop {
            if let Some(result) = self.client.poll(&id).await? {
                return Ok(result);
            }
            if deadline.passed() {
                return Err(Error::NoAnswer { verb: verb.to_string(), wait });
            }
            turns += 1;
            if turns.is_multiple_of(40) {
                self.ensure_runner().await?;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
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
