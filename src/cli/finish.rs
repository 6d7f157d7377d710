//! `walferry finish`, and what it shares with cancel.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::options::JobArgs;
use crate::clock::Deadline;
use crate::job::cleanup::{CleanedUp, Ending, clean_up};
use crate::job::client::Client;
use crate::job::lease::{self, Lease};
use crate::job::state::Event;
use crate::job::store::Store;
use crate::job::{self, JobConfig};
use crate::pg::Session;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Keep schema walferry on the target, with the job's history
    #[arg(long)]
    keep_history: bool,
    /// The source does not exist any more: clean up the target only
    #[arg(long)]
    source_is_gone: bool,
}

/// Drops all that walferry made. 0 done.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (keep_history, source_is_gone) = (args.keep_history, args.source_is_gone);
    let ending = Ending { event: Event::FinishAsked, keep_history, source_is_gone };
    let done = end(&args.job.job()?, ending).await?;
    show(&done);
    let side = if source_is_gone { "on the target" } else { "on either side" };
    let but = if keep_history { " but the history in schema walferry on the target" } else { "" };
    println!("finished: nothing of walferry is left {side}{but}");
    Ok(ExitCode::SUCCESS)
}

/// What was dropped, and what is left to do.
pub fn show(done: &CleanedUp) {
    for line in &done.dropped {
        println!("dropped {line}");
    }
    if let Some(line) = &done.recycled {
        println!("moved {line}");
    }
    for line in &done.left {
        eprintln!("clients may still be held by {line}");
    }
}

/// Stops the runner that is alive, takes the lease, and cleans up.
pub async fn end(config: &JobConfig, ending: Ending) -> anyhow::Result<CleanedUp> {
    let home = Session::control(&config.target).await?;
    let mut store = Store::new(home, config.job.clone());
    let row = store.load_existing().await?;
    // Refused before the runner is disturbed.
    let ended = matches!(row.phase, job::Phase::Finished | job::Phase::Canceled);
    if !ended {
        job::state::step(row.phase, ending.event).map_err(job::Error::from)?;
    }
    let lease = take_lease(config).await?;
    Ok(clean_up(config, ending, &lease).await?)
}

async fn take_lease(config: &JobConfig) -> anyhow::Result<Lease> {
    let mut named = config.clone();
    named.target = named.target.with_application_name(&lease::application_name(&config.job));
    let deadline = Deadline::after(Duration::from_secs(60));
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
                eprintln!("stopping the runner");
                asked = Some(client.post("stop", &json!({})).await?);
            }
        }
        if deadline.passed() {
            let pid = lease::holder(client.session(), &config.job).await?.unwrap_or_default();
            return Err(job::Error::Busy { job: config.job.to_string(), pid }.into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
