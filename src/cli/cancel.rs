//! `walferry cancel`.

use std::process::ExitCode;

use super::finish::end;
use super::options::JobArgs;
use crate::job::state::Event;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
}

/// Gives up before the switch. 0 done.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let done = end(&args.job.job()?, Event::CancelAsked, false).await?;
    for line in done.dropped {
        println!("dropped {line}");
    }
    println!(
        "canceled: the source is as it was found. Tables that were created on the target are still \
         there; drop them before moving to the same database again"
    );
    Ok(ExitCode::SUCCESS)
}
