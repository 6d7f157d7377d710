//! `walferry reshard`: rows of several databases shared out among several others.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Subcommand;
use serde_json::json;
use tokio::sync::watch;

use super::limits::LimitArgs;
use super::options::{JobArgs, learn};
use super::print;
use super::run::{UntilArg, stop_on_signal};
use crate::config::{self, File};
use crate::fault::Level;
use crate::job;
use crate::job::place::Buffer;
use crate::job::reshard::{self, Reshard, Stage, Tell, Until, Wanted};
use crate::map::table_name;
use crate::pg::Config;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file with sources, targets, [[shard]] and reference [default: walferry.toml]
    #[arg(short, long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Its name: part of the names of all slots and publications [default: main]
    #[arg(long, value_name = "NAME", env = "WALFERRY_NAME", global = true)]
    name: Option<String>,
    /// Print the result as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what stands in the way, on every source and target
    Check,
    /// Make the tables on every target, copy, and follow all sources; the same command resumes
    Run(RunArgs),
    /// Show where each pair of source and target stands
    Status,
    /// Switch applications from all sources to all targets, at once. There is no way back
    Cutover(CutoverArgs),
    /// Drop all that walferry made, on all sides, once it is switched
    Finish,
    /// Give up before the switch, and clean up
    Cancel,
}

#[derive(Clone, Debug, clap::Args)]
struct RunArgs {
    /// Return there, for scripts; otherwise run until stopped or switched
    #[arg(long, value_name = "PHASE")]
    until: Option<UntilArg>,
    /// Tables copied at the same time, in each pair [default: 4]
    #[arg(short, long, value_name = "N")]
    jobs: Option<usize>,
}

#[derive(Clone, Debug, clap::Args)]
struct CutoverArgs {
    /// A command that leads clients over: hook:COMMAND; may be given again
    #[arg(long, value_name = "hook:COMMAND")]
    route: Vec<String>,
    #[command(flatten)]
    limits: LimitArgs,
    /// There will be no way back, which is to be said
    #[arg(long)]
    one_way: bool,
    /// Look whether it could be made, and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Runs a command of it. 0 done, 1 not.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let jobs = match &args.command {
        Command::Run(run) => run.jobs,
        _ => None,
    };
    let job = JobArgs {
        config: args.config.clone(),
        name: args.name.clone(),
        jobs,
        ..JobArgs::default()
    };
    let file = job.file()?;
    let reshard = read(&job, file.clone())?;
    let tell: Tell = Arc::new(|line| eprintln!("{line}"));
    match args.command {
        Command::Check => check(&reshard, args.json).await,
        Command::Run(run) => run_all(&reshard, &run, &tell).await,
        Command::Status => status(&reshard, args.json).await,
        Command::Cutover(flip) => cutover(&reshard, &flip, &file, &tell, args.json).await,
        Command::Finish => {
            ended("finished", reshard::finish(&reshard, &tell).await?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Cancel => {
            ended("canceled", reshard::cancel(&reshard, &tell).await?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn wrong(option: &'static str, message: impl Into<String>) -> anyhow::Error {
    config::Error::Value { option, message: message.into() }.into()
}

/// The file as a plan.
fn read(job: &JobArgs, mut file: File) -> anyhow::Result<Reshard> {
    refuse_others(&file)?;
    let (sources, targets) = (uris(&file.sources)?, uris(&file.targets)?);
    let (Some(source), Some(target)) = (sources.first().cloned(), targets.first().cloned()) else {
        let message = "list the URIs of sources and of targets in walferry.toml";
        return Err(wrong("sources, targets", message));
    };
    let reference = file.reference.iter().map(|text| {
        let message = format!("\"{text}\": write schema.table");
        table_name(text).ok_or_else(|| wrong("reference", message))
    });
    let reference = reference.collect::<anyhow::Result<_>>()?;
    let (shards, exclude) = (std::mem::take(&mut file.shard), std::mem::take(&mut file.exclude));
    let base = job.between(file, source, target)?;
    if matches!(base.buffer.kind, Some(Buffer::Kafka(_))) {
        return Err(wrong("--buffer", "kafka is for one source and one target"));
    }
    let name = base.job.clone();
    let reshard = Reshard { name, sources, targets, base, shards, reference, exclude };
    reshard.refuse_nonsense()?;
    Ok(reshard)
}

fn uris(list: &[String]) -> anyhow::Result<Vec<Config>> {
    Ok(list.iter().map(|uri| Config::parse(uri)).collect::<Result<_, _>>()?)
}

/// What pairs of one table cannot be.
fn refuse_others(file: &File) -> anyhow::Result<()> {
    let given = [
        (!file.map.is_empty(), "[[map]]"),
        (file.source.is_some() || file.target.is_some(), "source, target"),
        (!file.include.is_empty(), "include"),
        (!file.schema_only.is_empty(), "schema-only"),
        (file.tables_only, "tables-only"),
        (file.publication.is_some(), "publication"),
        (file.initial_copy.is_some() || file.from_lsn.is_some(), "initial-copy"),
        (file.two_way, "two-way"),
        (file.ddl.is_some(), "ddl"),
        (file.on_row_error.as_deref().is_some_and(|what| what != "stop"), "on-row-error"),
        (file.after_failover.as_deref().is_some_and(|what| what != "stop"), "after-failover"),
    ];
    match given.iter().find(|(given, _)| *given) {
        Some((_, option)) => {
            Err(wrong("walferry.toml", format!("{option} does not go together with [[shard]]")))
        }
        None => Ok(()),
    }
}

async fn check(reshard: &Reshard, as_json: bool) -> anyhow::Result<ExitCode> {
    let found = reshard::check(reshard).await?;
    let ready = found.iter().all(|(_, finding)| finding.level != Level::Error);
    if as_json {
        let list = found.iter().map(|(pair, finding)| json!({ "pair": pair, "finding": finding }));
        print::json(&json!({ "ready": ready, "findings": list.collect::<Vec<_>>() }))?;
    } else {
        for (pair, finding) in &found {
            let level = match finding.level {
                Level::Error => "error",
                Level::Warning => "warning",
                Level::Info => "info",
            };
            println!("{level:>8}  {pair}: {}: {}", finding.object, finding.message);
            for line in finding.fix.iter().flat_map(|fix| fix.lines()) {
                println!("{:>10}{line}", "");
            }
        }
        println!("{}", if ready { "ready" } else { "not ready" });
    }
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn run_all(reshard: &Reshard, args: &RunArgs, tell: &Tell) -> anyhow::Result<ExitCode> {
    let until = match args.until {
        Some(UntilArg::Following) => Until::Following,
        Some(UntilArg::Copied) => {
            return Err(wrong("--until", "of a reshard only following is known"));
        }
        None => Until::Told,
    };
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(stop_on_signal(stop));
    match reshard::run(reshard, until, tell, stopping).await {
        Ok(Stage::Switched) => {
            eprintln!("switched: walferry reshard finish ends it");
            Ok(ExitCode::SUCCESS)
        }
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(job::Error::Ended) => {
            eprintln!("stopped: it is ended by finish or cancel");
            Ok(ExitCode::SUCCESS)
        }
        Err(job::Error::Interrupted) => {
            eprintln!("stopped; the same command goes on from here");
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error.into()),
    }
}

async fn status(reshard: &Reshard, as_json: bool) -> anyhow::Result<ExitCode> {
    let status = reshard::status(reshard).await?;
    if as_json {
        print::json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("reshard  {}", status.name);
    println!("stage    {}", status.stage);
    match &status.runner {
        Some(pid) => println!("runner   backend {pid} on the first target"),
        None => println!("runner   none"),
    }
    if let Some(error) = &status.error {
        println!("error    {error}");
    }
    for pair in &status.pairs {
        let lag = pair.lag_bytes.map_or(String::new(), |bytes| {
            format!(", {} behind", print::bytes(bytes.unsigned_abs()))
        });
        let rows = print::count(pair.copied_rows.unsigned_abs());
        println!("{:<20} {:<12} {rows} rows copied{lag}", pair.job, pair.phase);
        if let Some(error) = &pair.error {
            println!("{:<20} {error}", "");
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn cutover(
    reshard: &Reshard,
    args: &CutoverArgs,
    file: &File,
    tell: &Tell,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    if !args.one_way && !args.dry_run {
        let message = "there is no way back from several targets: say --one-way if that is meant";
        return Err(wrong("--one-way", message));
    }
    let flip = file.cutover.clone();
    let given = if args.route.is_empty() { flip.route } else { args.route.clone() };
    if let Some(other) = given.iter().find(|route| !route.starts_with("hook:")) {
        let kind = other.split(':').next().unwrap_or_default();
        let message = format!(
            "{kind} leads from one server to one other: of a reshard only hook:COMMAND is known"
        );
        return Err(wrong("--route", message));
    }
    let routes = learn(&reshard.base.secrets, "--route", &given)?;
    let wanted = Wanted {
        attempt: format!("{:016x}", fastrand::u64(..)),
        routes,
        limits: args.limits.limits(&file.cutover)?,
        dry_run: args.dry_run,
    };
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(stop_on_signal(stop));
    let outcome = reshard::lead_over(reshard, &wanted, tell, stopping).await?;
    if as_json {
        print::json(&outcome)?;
        return Ok(ExitCode::SUCCESS);
    }
    print::steps(&outcome);
    if args.dry_run {
        println!("ready, and there will be no way back; nothing was changed");
        return Ok(ExitCode::SUCCESS);
    }
    let (from, to) = (reshard.sources.len(), reshard.targets.len());
    println!(
        "switched from {from} sources to {to} targets; writers were held for {:.1} ms",
        print::number(&outcome, "/fenced_ms")
    );
    if wanted.routes.is_empty() {
        eprintln!(
            "no route was given: point applications to the targets now; the sources take no more \
             writes"
        );
    }
    eprintln!("walferry reshard finish drops what walferry made, seals of the sources included");
    Ok(ExitCode::SUCCESS)
}

fn ended(what: &str, ended: reshard::Ended) {
    for line in &ended.dropped {
        println!("dropped {line}");
    }
    for line in &ended.left {
        eprintln!("{line}");
    }
    let but = match ended.tables_stay {
        true => {
            ". Tables that were made on targets are still there, with the rows that came; drop \
             them before resharding to the same databases again"
        }
        false => "",
    };
    println!("{what}: nothing of walferry is left on any side{but}");
}
