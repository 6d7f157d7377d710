//! `walferry finish`, and what it shares with cancel.

use std::process::ExitCode;

use serde::Serialize;

use super::options::JobArgs;
use super::print;
use crate::job::cleanup::{CleanedUp, Ending};
use crate::job::ending::end;
use crate::job::state::Event;
use crate::{job, pg};

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
    /// End a job whose tables are on both sides: each stays with those who write to it, and its
    /// copy on the other side, which goes stale, may be written again
    #[arg(long, conflicts_with = "source_is_gone")]
    split: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Drops all that walferry made. 0 done.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (keep_history, source_is_gone) = (args.keep_history, args.source_is_gone);
    let event = if args.split { Event::FinishSplitAsked } else { Event::FinishAsked };
    let ending = Ending { event, keep_history, source_is_gone };
    let config = args.job.job()?;
    let done = end(&config, ending, &print::sayings()).await.map_err(hint)?;
    let side = if source_is_gone { "on the target" } else { "on either side" };
    let but = if keep_history { " but the history in schema walferry on the target" } else { "" };
    let said = format!("finished: nothing of walferry is left {side}{but}");
    let (job, cleaned) = (config.job.as_str(), Ended::sides(!source_is_gone, true));
    show(&Ended { job, state: "finished", cleaned, done: &done }, &said, args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// A job that is no more, as `--json` prints it.
#[derive(Serialize)]
pub struct Ended<'a> {
    /// Its name.
    pub job: &'a str,
    /// `finished` or `canceled`.
    pub state: &'static str,
    /// The sides on which nothing of it is left.
    pub cleaned: Vec<&'static str>,
    /// What that took, and what is left to do.
    #[serde(flatten)]
    pub done: &'a CleanedUp,
}

impl Ended<'_> {
    /// For `cleaned`.
    pub fn sides(source: bool, target: bool) -> Vec<&'static str> {
        let sides = [("source", source), ("target", target)];
        sides.into_iter().filter(|(_, cleaned)| *cleaned).map(|(side, _)| side).collect()
    }
}

/// What was dropped, what is left to do, and the end in a sentence.
pub fn show(ended: &Ended<'_>, said: &str, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return print::json(ended);
    }
    for line in &ended.done.dropped {
        println!("dropped {line}");
    }
    if let Some(line) = &ended.done.recycled {
        println!("moved {line}");
    }
    for line in &ended.done.left {
        eprintln!("{line}");
    }
    println!("{said}");
    Ok(())
}

/// A server that cannot be reached may be gone for good.
pub fn hint(error: job::Error) -> anyhow::Error {
    let job::Error::Pg(pg::Error::Connect { peer, transient: true, .. }) = &error else {
        return error.into();
    };
    let hint = match peer.split_whitespace().find(|word| matches!(*word, "source" | "target")) {
        Some("source") => "where the source is gone for good, --source-is-gone cleans the target",
        Some(_) => {
            "where the target is gone for good, walferry cancel --target-is-gone cleans the source"
        }
        None => return error.into(),
    };
    anyhow::anyhow!("{error}; {hint}")
}
