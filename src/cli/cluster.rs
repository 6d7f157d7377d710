//! `walferry cluster`: what a sharded cluster is made of, plans for moving shards, and the jobs
//! that such plans become.
//!
//! Planning changes nothing but that the plan is stored, as a job with a number, in the cluster's
//! home; with --dry-run not even that.

mod jobs;
mod recycle;
mod run;

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use serde_json::json;

use super::print;
use crate::cluster::guard::{self, Allowed, Finding, WithoutIdentity};
use crate::cluster::plan::{Balance, Measure};
use crate::cluster::{self, Address, Found, Plan, Weigh, Wish};
use crate::config::{self, parse_duration};
use crate::fault::Level;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The cluster: citus:URI of the coordinator, plproxy:URI,CLUSTER[,HOST:PORT...] (a proxy
    /// database, the name of its plproxy server, and servers that are new), or file:PATH
    #[arg(
        long,
        value_name = "KIND:...",
        env = "WALFERRY_CLUSTER",
        hide_env_values = true,
        global = true
    )]
    cluster: Option<String>,
    /// Print the result as JSON
    #[arg(long, global = true)]
    json: bool,
    /// Report transactions that have been open for longer, on any node [default: 30min]
    #[arg(long, value_name = "TIME", value_parser = parse_duration, global = true)]
    transaction_age: Option<Duration>,
    /// Tables without a replica identity: refuse, or insert-only, which moves them and lets UPDATE
    /// and DELETE on them fail meanwhile [default: refuse]
    #[arg(long, value_name = "WHAT", value_parser = str::parse::<WithoutIdentity>, global = true)]
    without_identity: Option<WithoutIdentity>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Nodes, shard groups, sizes, balance
    Show(ByArgs),
    /// Plan a job: even the nodes, new empty ones included
    Rebalance {
        #[command(flatten)]
        by: ByArgs,
        #[command(flatten)]
        threshold: ThresholdArgs,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Plan a job: move everything off these nodes
    Drain {
        /// Nodes as `show` names them
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
        #[command(flatten)]
        by: ByArgs,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Plan a job: move everything from one node to another
    Replace {
        /// The node to be emptied
        old: String,
        /// The node that takes its place
        new: String,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Plan a job: spread what is on some nodes evenly over others, or move one group
    Move {
        /// Nodes whose groups move
        #[arg(long, value_name = "NODE,...", value_delimiter = ',')]
        from: Vec<String>,
        /// Nodes that they go to; may be among those of --from
        #[arg(long, value_name = "NODE,...", value_delimiter = ',')]
        to: Vec<String>,
        /// Only the group of this shard
        #[arg(long, value_name = "ID", conflicts_with = "from")]
        shard: Option<u64>,
        #[command(flatten)]
        by: ByArgs,
        #[command(flatten)]
        threshold: ThresholdArgs,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// All jobs of the cluster
    Jobs,
    /// One job: its tasks, their states, sizes, times, errors and history
    Job(jobs::JobArgs),
    /// Run a job, or go on with one whose runner is gone
    Run(Box<run::Args>),
    /// Stop a job and take back what its tasks began; completed ones stay
    Cancel(run::CancelArgs),
    /// Take back what tasks in error began, and have them run again
    Reset(run::ResetArgs),
    /// Every statement sent to every node, with time and outcome
    Log(jobs::LogArgs),
    /// Lead clients of completed tasks back to the old nodes
    Rollback(run::TaskArgs),
    /// End the way back of completed tasks, and drop all that walferry made for them
    Finish(run::TaskArgs),
    /// Old shards that are kept on their nodes
    #[command(subcommand)]
    Recycle(recycle::Command),
}

#[derive(Clone, Copy, Debug, clap::Args)]
struct StoreArgs {
    /// Print the plan and do not store it as a job
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, clap::Args)]
struct ByArgs {
    /// What is to be even: size, count (of each co-location group), or load (rows read and
    /// written since statistics were reset)
    #[arg(long, value_name = "WHAT", default_value = "size", value_parser = str::parse::<Weigh>)]
    by: Weigh,
}

#[derive(Clone, Copy, Debug, clap::Args)]
struct ThresholdArgs {
    /// A node within this fraction of the mean is even enough
    #[arg(long, value_name = "FRACTION", default_value = "0.1", value_parser = fraction)]
    threshold: f64,
}

fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..1.0).contains(&value) => Ok(value),
        _ => Err("is not a fraction from 0 to below 1, such as 0.1".to_string()),
    }
}

/// A plan as `--json` prints it.
#[derive(Serialize)]
struct Planned<'a> {
    /// Its number, if it was stored.
    job: Option<i64>,
    #[serde(flatten)]
    plan: &'a Plan,
    /// No finding is an error.
    ready: bool,
    findings: &'a [Finding],
}

/// Shows, plans, or runs. 0 done, 1 not.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let message = "is missing: give it, or set WALFERRY_CLUSTER".to_string();
    let missing = config::Error::Value { option: "--cluster", message };
    // A mistake in the wish is told before anything is read.
    let wish = args.command.wish()?;
    let address = Address::parse(&args.cluster.ok_or(missing)?)?;
    let allowed = Allowed {
        transaction_age: args.transaction_age.unwrap_or(guard::TRANSACTION_AGE),
        without_identity: args.without_identity.unwrap_or_default(),
    };
    let json = args.json;
    match args.command {
        Command::Jobs => jobs::list(&address, json).await,
        Command::Job(job) => jobs::show(&address, job.job, json).await,
        Command::Log(args) => jobs::log(&address, args, json).await,
        Command::Run(args) => run::run(address, *args, allowed, json).await,
        Command::Cancel(args) => run::cancel(address, args, json).await,
        Command::Reset(args) => run::reset(address, args, json).await,
        Command::Rollback(args) => run::rollback(address, args, json).await,
        Command::Finish(args) => run::finish(address, args, json).await,
        Command::Recycle(command) => recycle::run(address, command, json).await,
        _ => {
            let found = cluster::read(&address).await?;
            match wish {
                Wanted::Show(by) => show(&found, by, json)?,
                Wanted::Plan(wish, store) => {
                    plan(&address, &found, &wish, store, allowed, json).await?
                }
                Wanted::Other => {}
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn plan(
    address: &Address,
    found: &Found,
    wish: &Wish,
    store: StoreArgs,
    allowed: Allowed,
    as_json: bool,
) -> anyhow::Result<()> {
    let plan = cluster::plan(&found.cluster, wish)?;
    let findings = guard::findings(found, wish, &plan, allowed).await?;
    let stored = match store.dry_run || plan.tasks.is_empty() {
        true => Ok(None),
        false => jobs::store(address, found, wish, &plan).await,
    };
    let job = stored.as_ref().ok().copied().flatten();
    if as_json {
        let ready = ready(&findings);
        print::json(&Planned { job, plan: &plan, ready, findings: &findings })?;
    } else {
        print_plan(&plan);
        print_findings(&findings);
        match job {
            Some(job) => println!("stored as job {job}: walferry cluster run {job}"),
            None => println!("not stored"),
        }
    }
    stored.map(|_| ())
}

/// What a command wants to know of the cluster.
enum Wanted {
    Show(Weigh),
    Plan(Wish, StoreArgs),
    /// Nothing: it is about a job.
    Other,
}

impl Command {
    /// What is to be planned; for `show`, by what nodes are compared.
    fn wish(&self) -> Result<Wanted, config::Error> {
        let measure =
            |by: &ByArgs, t: &ThresholdArgs| Measure { by: by.by, threshold: t.threshold };
        let (wish, store) = match self {
            Command::Show(by) => return Ok(Wanted::Show(by.by)),
            Command::Rebalance { by, threshold, store } => {
                (Wish::Rebalance(measure(by, threshold)), store)
            }
            Command::Drain { nodes, by, store } => {
                (Wish::Drain { nodes: nodes.clone(), by: by.by }, store)
            }
            Command::Replace { old, new, store } => {
                (Wish::Replace { old: old.clone(), new: new.clone() }, store)
            }
            Command::Move { shard: Some(shard), to, store, .. } => match to.as_slice() {
                [] => (Wish::One { shard: *shard, to: None }, store),
                [to] => (Wish::One { shard: *shard, to: Some(to.clone()) }, store),
                _ => return Err(value("--to", "one group goes to one node")),
            },
            Command::Move { from, to, by, threshold, store, .. } => {
                if from.is_empty() || to.is_empty() {
                    return Err(value("--from", "give --from and --to, or --shard"));
                }
                let (from, to) = (from.clone(), to.clone());
                (Wish::Spread { from, to, measure: measure(by, threshold) }, store)
            }
            _ => return Ok(Wanted::Other),
        };
        Ok(Wanted::Plan(wish, *store))
    }
}

fn value(option: &'static str, message: &str) -> config::Error {
    config::Error::Value { option, message: message.to_string() }
}

fn show(found: &Found, by: Weigh, as_json: bool) -> anyhow::Result<()> {
    let takers = found.cluster.nodes.iter().filter(|n| n.takes_shards).map(|n| n.name.as_str());
    let takers = takers.collect();
    let balance = Balance::of(&found.cluster, by, &takers, |_, group| group.node.clone());
    if as_json {
        return print::json(&json!({
            "kind": found.kind,
            "nodes": found.cluster.nodes,
            "groups": found.cluster.groups,
            "fixed": found.fixed,
            "by": by,
            "balance": balance,
        }));
    }
    println!("{}", found.kind);
    let width = width(balance.nodes.iter().map(|n| n.node.as_str()));
    println!("{:width$} {:>8} {:>10} {:>14} {:>16}", "node", "groups", "bytes", "rows", "load");
    for (weight, node) in balance.nodes.iter().zip(&found.cluster.nodes) {
        let note = if node.takes_shards { "" } else { "  takes no shards" };
        println!(
            "{:width$} {:>8} {:>10} {:>14} {:>16}{note}",
            weight.node,
            weight.groups,
            print::bytes(weight.bytes),
            print::count(weight.rows),
            print::count(weight.load)
        );
    }
    println!("{} from the mean by {}", percent(balance.deviation), word(by));
    for fixed in &found.fixed {
        println!("{} stays ({}): {}", fixed.table, fixed.kind, fixed.reason);
    }
    Ok(())
}

fn print_plan(plan: &Plan) {
    let width = width(plan.before.nodes.iter().map(|n| n.node.as_str()));
    for task in &plan.tasks {
        let shards: Vec<String> = task.shards.iter().map(u64::to_string).collect();
        println!(
            "task {:<4} {:width$} -> {:width$} {:>10}  shards {} of {}",
            task.task,
            task.source,
            task.target,
            print::bytes(task.bytes),
            shards.join(", "),
            task.tables.join(", ")
        );
    }
    if !plan.tasks.is_empty() {
        println!();
    }
    println!("{:width$} {:>20} {:>24}", "node", "before", "after");
    for (before, after) in plan.before.nodes.iter().zip(&plan.after.nodes) {
        let held = |groups: u64, bytes| format!("{groups} groups, {}", print::bytes(bytes));
        let (was, will) = (held(before.groups, before.bytes), held(after.groups, after.bytes));
        println!("{:width$} {was:>20} {will:>24}", before.node);
    }
    let (before, after) = (percent(plan.before.deviation), percent(plan.after.deviation));
    println!("from the mean by {}: {before} before, {after} after", word(plan.by));
    let tasks = plan.tasks.len();
    println!("{tasks} tasks, {}; nothing was moved", print::bytes(plan.bytes));
}

fn ready(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.level != Level::Error)
}

fn print_findings(findings: &[Finding]) {
    for finding in findings {
        let level = match finding.level {
            Level::Error => "error",
            Level::Warning => "warning",
            Level::Info => "info",
        };
        let at = if finding.node.is_empty() { "" } else { " on " };
        let (node, object) = (&finding.node, &finding.object);
        println!("{level:>8}  {object}{at}{node}: {}", finding.message);
        if let Some(fix) = &finding.fix {
            println!("{:>10}{fix}", "");
        }
    }
    println!("{}", if ready(findings) { "ready" } else { "not ready" });
}

fn width<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    names.map(|name| name.chars().count()).max().unwrap_or_default().max(4)
}

fn percent(fraction: f64) -> String {
    format!("{:.1} %", fraction * 100.0)
}

fn word(by: Weigh) -> &'static str {
    match by {
        Weigh::Size => "size",
        Weigh::Count => "count",
        Weigh::Load => "load",
    }
}
