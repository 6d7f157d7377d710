//! How a command ends a job that another process may be running: that one is asked to stop first.

use std::time::Duration;

use serde_json::json;

use super::cleanup::{CleanedUp, Ending, clean_up};
use super::client::Client;
use super::lease::{self, Lease};
use super::run::{JobConfig, Notice, Report};
use super::state::Phase;
use super::store::Store;
use super::{Gone, Result, two_way};
use crate::clock::Deadline;
use crate::pg::Session;

/// Stops the runner that is alive, takes the lease, and cleans up.
pub async fn end(config: &JobConfig, ending: Ending, report: &Report) -> Result<CleanedUp> {
    let home = Session::control(&config.target).await?;
    let mut store = Store::new(home, config.job.clone());
    let row = store.load_existing().await?;
    // Refused before the runner is disturbed.
    let ended = matches!(row.phase, Phase::Finished | Phase::Canceled);
    if !ended {
        two_way::ended(&row, ending.event)?;
        super::reads::refuse_end(&row, ending)?;
    }
    let lease = take_lease(config, report).await?;
    clean_up(config, ending, &lease).await
}

/// A runner hears of it within a second or two, and the lease of one whose host is gone ends after
/// half a minute.
const STOP_WAIT: Duration = Duration::from_secs(60);

/// Takes the job's lease, from whoever runs it: that runner is asked to stop, a minute at most.
pub async fn take_lease(config: &JobConfig, report: &Report) -> Result<Lease> {
    let mut named = config.clone();
    named.target = named.target.with_application_name(&lease::application_name(&config.job));
    let deadline = Deadline::after(STOP_WAIT);
    let mut client = Client::connect(&config.target, &config.job).await?;
    let mut asked: Option<String> = None;
    loop {
        if let Some(lease) = Lease::try_take(&named.target, &config.job).await? {
            return Ok(lease);
        }
        match &asked {
            // Read by the runner for as long as it is kept fresh.
            Some(id) => drop(client.poll(id).await?),
            None => {
                report(Notice::Said("stopping the runner".to_string()));
                asked = Some(client.post("stop", &json!({})).await?);
            }
        }
        if deadline.passed() {
            let pid = lease::holder(client.session(), &config.job).await?.unwrap_or_default();
            return Err(Gone::Unstopped { wait: STOP_WAIT, pid }.into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
