//! `walferry cancel`.

use std::process::ExitCode;

use super::finish::show;
use super::options::JobArgs;
use super::print;
use crate::job::cleanup::Ending;
use crate::job::ending::end;
use crate::job::state::Event;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// The source does not exist any more: clean up the target only
    #[arg(long)]
    source_is_gone: bool,
}

/// Gives up before the switch. 0 done.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let source_is_gone = args.source_is_gone;
    let ending = Ending { event: Event::CancelAsked, keep_history: false, source_is_gone };
    let done = end(&args.job.job()?, ending, &print::sayings()).await?;
    show(&done);
    println!(
        "canceled: the source {}. Tables that were created on the target are still \
         there; drop them before moving to the same database again",
        if source_is_gone { "was left alone" } else { "is as it was found" }
    );
    Ok(ExitCode::SUCCESS)
}
