//! The command line: one file a command.
//!
//! A command reads options, calls the job room, and prints. Results go to standard output (one JSON
//! document under --json), everything else to standard error, so that scripts can read the one and
//! people the other. Exit codes: 0 done, 1 not (not ready, different, failed), 2 usage.
//!
//! `run` holds the job while it lives. Commands that need the streams (`verify`, `cutover`,
//! `rollback`) ask whatever runner is alive, on any host, through the home database; where none is,
//! they run the job themselves for as long as they need it (`job::ask`).

mod apply;
mod brought;
mod cancel;
mod capture;
mod check;
mod cluster;
mod cutover;
mod demo;
mod failover;
mod finish;
mod lasting;
mod mapping;
mod options;
mod print;
mod quarantine;
mod reads;
mod reshard;
mod rollback;
mod run;
mod slot;
mod status;
mod verify;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Arg, CommandFactory, Parser, Subcommand};

pub use options::JobArgs;

use crate::cluster::read;
use crate::{config, job, pg};

/// walferry moves a live PostgreSQL database between servers while applications write.
#[derive(Debug, Parser)]
#[command(name = "walferry", version, about, max_term_width = 100)]
pub struct Cli {
    /// More about what happens, on standard error; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands, in the order of a move.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Move a database between two throw-away local servers under a live writer, and back
    Demo(demo::Args),
    /// Say what stands in the way, each with the SQL that mends it
    Check(check::Args),
    /// Make slot and publication first, for a copy that you make yourself
    Slot(slot::Args),
    /// Plan, make the schema, copy, catch up and follow; the same command resumes
    Run(run::Args),
    /// The half of run that only reads the source, into a Kafka topic, on a host of its own
    Capture(capture::Args),
    /// The other half: all that run does, applying what capture has read
    Apply(apply::Args),
    /// Show phase, positions, lag and tables
    Status(status::Args),
    /// Compare both sides row by row while they live
    Verify(verify::Args),
    /// List, retry or drop rows that the target refused, and what waits behind them
    Quarantine(quarantine::Args),
    /// Switch applications to the target
    Cutover(cutover::Args),
    /// Switch applications back to the source
    Rollback(rollback::Args),
    /// Drop all that walferry made, on both sides
    Finish(finish::Args),
    /// Give up before the switch, and clean up
    Cancel(cancel::Args),
    /// Show a sharded cluster, and plan moves between its nodes
    Cluster(cluster::Args),
    /// Share the rows of several databases out among several others, and switch all at once
    Reshard(reshard::Args),
}

/// The arguments with the command moved before the options given ahead of it, so that
/// `walferry --source URI run` means the same as `walferry run --source URI`.
pub fn command_first(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let cli = Cli::command();
    let mut at = 1;
    while let Some(text) = arguments.get(at).and_then(|argument| argument.to_str()) {
        if cli.find_subcommand(text).is_some() {
            let command = arguments.remove(at);
            arguments.insert(1, command);
            return arguments;
        }
        let is = |arg: &&Arg| {
            let long = text.strip_prefix("--").is_some_and(|name| arg.get_long() == Some(name));
            let mut letters = text.strip_prefix('-').unwrap_or_default().chars();
            long || (letters.next().is_some_and(|c| arg.get_short() == Some(c))
                && letters.next().is_none())
        };
        let mut known = cli.get_subcommands().flat_map(clap::Command::get_arguments);
        let has_value = known.find(is).is_some_and(|arg| arg.get_action().takes_values());
        if !text.starts_with('-') {
            return arguments;
        }
        at += if has_value { 2 } else { 1 };
    }
    arguments
}

/// Runs the command. Prints its error.
pub async fn run(cli: Cli) -> ExitCode {
    let outcome = match cli.command {
        Command::Demo(args) => demo::run(args).await,
        Command::Check(args) => check::run(args).await,
        Command::Slot(args) => slot::run(args).await,
        Command::Run(args) => run::run(args).await,
        Command::Capture(args) => capture::run(args).await,
        Command::Apply(args) => apply::run(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Verify(args) => verify::run(args).await,
        Command::Quarantine(args) => quarantine::run(args).await,
        Command::Cutover(args) => cutover::run(args).await,
        Command::Rollback(args) => rollback::run(args).await,
        Command::Finish(args) => finish::run(args).await,
        Command::Cancel(args) => cancel::run(args).await,
        Command::Cluster(args) => cluster::run(args).await,
        Command::Reshard(args) => reshard::run(args).await,
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            let text = crate::secret::redact(&format!("{error:#}"));
            eprintln!("walferry: {text}");
            let usage = error.is::<config::Error>()
                || matches!(error.downcast_ref(), Some(pg::Error::Config(_)))
                || matches!(error.downcast_ref(), Some(job::Error::Pattern(_)))
                || matches!(error.downcast_ref(), Some(read::Error::Usage(_)));
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_may_stand_before_the_command() {
        let moved = |line: &str| {
            let words = line.split(' ').map(OsString::from).collect();
            let moved = command_first(words);
            let words: Vec<_> = moved.iter().map(|word| word.to_str().unwrap()).collect();
            words.join(" ")
        };
        assert_eq!(moved("walferry --source run run"), "walferry run --source run");
        assert_eq!(moved("walferry -c f -v check --json"), "walferry check -c f -v --json");
        assert_eq!(moved("walferry --include=a status"), "walferry status --include=a");
        assert_eq!(moved("walferry --version"), "walferry --version");
        assert_eq!(moved("walferry nonsense run"), "walferry nonsense run");
        assert_eq!(moved("walferry run --source x"), "walferry run --source x");
    }
}
