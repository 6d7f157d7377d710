//! `walferry cancel`.

use std::process::ExitCode;

use super::finish::{Ended, hint, show};
use super::options::JobArgs;
use super::print;
use crate::id::JobName;
use crate::job::cleanup::{CleanedUp, Ending};
use crate::job::ending::end;
use crate::job::state::Event;
use crate::job::store::Store;
use crate::job::{self, JobConfig, remains};
use crate::pg::Session;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// The source does not exist any more: clean up the target only, by the job's name where
    /// nothing else is known of it there
    #[arg(long)]
    source_is_gone: bool,
    /// The target does not exist any more, and the job's state with it: clean up the source only,
    /// by the job's name. After a cutover the source takes writes again, with what had come back:
    /// only where nobody can write to the target
    #[arg(long, conflicts_with = "source_is_gone")]
    target_is_gone: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Gives up before the switch, or where a server is lost. 0 done.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let canceled = |job: &JobName, cleaned: (bool, bool), done: &CleanedUp, said: &str| {
        let cleaned = Ended::sides(cleaned.0, cleaned.1);
        show(&Ended { job: job.as_str(), state: "canceled", cleaned, done }, said, args.json)
    };
    if args.target_is_gone {
        let (job, source, target) = args.job.source_first()?;
        let done = remains::clean_source(&job, &source, target.as_ref()).await?;
        let said = "canceled: nothing of walferry is left on the source; the target was left alone";
        canceled(&job, (true, false), &done, said)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (config, source_is_gone) = (args.job.job()?, args.source_is_gone);
    if source_is_gone && is_unknown(&config).await? {
        let done = remains::clean_target(&config.job, &config.target).await?;
        let said = "canceled: nothing of walferry is left on the target; the source was left alone";
        canceled(&config.job, (false, true), &done, said)?;
        return Ok(ExitCode::SUCCESS);
    }
    let ending = Ending { event: Event::CancelAsked, keep_history: false, source_is_gone };
    let done = end(&config, ending, &print::sayings()).await.map_err(hint)?;
    let source = if source_is_gone { "was left alone" } else { "is as it was found" };
    let but = match done.tables_stay {
        true => {
            ". Tables that were created on the target are still there; drop them before moving to \
             the same database again"
        }
        false => "",
    };
    let said = format!("canceled: the source {source}{but}");
    canceled(&config.job, (!source_is_gone, true), &done, &said)?;
    Ok(ExitCode::SUCCESS)
}

async fn is_unknown(config: &JobConfig) -> job::Result<bool> {
    let home = Session::control(&config.target).await?;
    Ok(Store::new(home, config.job.clone()).load().await?.is_none())
}
