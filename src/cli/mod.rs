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
mod help;
mod lasting;
mod limits;
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
mod tuning;
mod verify;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Arg, CommandFactory, Parser, Subcommand};

pub use options::JobArgs;
pub use tuning::take_small_pages;

use crate::cluster::read;
use crate::{config, job, pg};

/// walferry moves a live PostgreSQL database between servers while applications write.
#[derive(Debug, Parser)]
#[command(name = "walferry", version, about, max_term_width = 100, after_help = help::ALL)]
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
    #[command(after_help = help::DEMO)]
    Demo(demo::Args),
    /// Say what stands in the way, each with the SQL that mends it
    #[command(after_help = help::CHECK)]
    Check(check::Args),
    /// Make slot and publication first, for a copy that you make yourself
    #[command(after_help = help::SLOT)]
    Slot(slot::Args),
    /// Plan, make the schema, copy, catch up and follow; the same command resumes
    #[command(after_help = help::RUN)]
    Run(run::Args),
    /// The half of run that only reads the source, into a Kafka topic, on a host of its own
    #[command(after_help = help::CAPTURE)]
    Capture(capture::Args),
    /// The other half: all that run does, applying what capture has read
    #[command(after_help = help::APPLY)]
    Apply(apply::Args),
    /// Show phase, positions, lag and tables
    #[command(after_help = help::STATUS)]
    Status(status::Args),
    /// Compare both sides row by row while they live
    #[command(after_help = help::VERIFY)]
    Verify(verify::Args),
    /// List, retry or drop rows that the target refused, and what waits behind them
    #[command(after_help = help::QUARANTINE)]
    Quarantine(quarantine::Args),
    /// Switch applications to the target
    #[command(after_help = help::CUTOVER)]
    Cutover(cutover::Args),
    /// Switch applications back to the source
    #[command(after_help = help::ROLLBACK)]
    Rollback(rollback::Args),
    /// Drop all that walferry made, on both sides
    #[command(after_help = help::FINISH)]
    Finish(finish::Args),
    /// Give up before the switch, and clean up
    #[command(after_help = help::CANCEL)]
    Cancel(cancel::Args),
    /// Show a sharded cluster, and plan moves between its nodes
    #[command(after_help = help::CLUSTER)]
    Cluster(cluster::Args),
    /// Share the rows of several databases out among several others, and switch all at once
    #[command(after_help = help::RESHARD)]
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
    fn numbers_that_mean_nothing_are_mistakes_of_usage() {
        let is_taken = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        assert!(is_taken("walferry demo --scale 1 --rate 0.5"));
        for bad in ["--scale 0", "--scale -1", "--rate 0", "--rate -5", "--rate NaN", "--rate inf"]
        {
            assert!(!is_taken(&format!("walferry demo {bad}")), "{bad}");
        }
        for bad in ["0x", "-1s", "25d", "99999999999999999999d", "1e3"] {
            assert!(!is_taken(&format!("walferry cutover --timeout {bad}")), "{bad}");
        }
        assert!(!is_taken("walferry run --jobs -1") && !is_taken("walferry run --jobs many"));
        assert!(!is_taken("walferry cutover --groups 0"));
    }

    /// Of a job, which every command takes, and what stands in walferry.toml.
    #[test]
    fn the_readme_has_every_option_of_a_job() {
        let readme = include_str!("../../README.md");
        let cli = Cli::command();
        let of = |name: &str| cli.find_subcommand(name).unwrap().get_arguments();
        let options = of("run").chain(of("cutover")).chain(of("finish")).chain(of("cancel"));
        let options = options.filter_map(Arg::get_long).filter(|name| *name != "help");
        let missing = |name: &&str| {
            !readme.contains(&format!("`--{name}")) && !readme.contains(&format!(" --{name}"))
        };
        assert_eq!(options.filter(missing).collect::<Vec<_>>(), Vec::<&str>::new());
        // The list of keys that is told of an unknown one is serde's.
        for section in ["x = 1", "cutover.x = 1", "tuning.x = 1"] {
            let said = toml::from_str::<config::File>(section).unwrap_err().to_string();
            let keys: Vec<&str> = said.split('`').skip(3).step_by(2).collect();
            assert!(keys.len() > 5, "{said}");
            let missing: Vec<_> = keys.iter().filter(|key| !readme.contains(**key)).collect();
            assert_eq!(missing, Vec::<&&str>::new());
        }
    }

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
