//! `walferry cluster`: what a sharded cluster is made of, and plans for moving shards.
//!
//! Every command here reads and changes nothing.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use serde_json::json;

use super::print;
use crate::cluster::guard::{self, Finding};
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
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Nodes, shard groups, sizes, balance
    Show(ByArgs),
    /// Plan: even the nodes, new empty ones included
    Rebalance {
        #[command(flatten)]
        by: ByArgs,
        #[command(flatten)]
        threshold: ThresholdArgs,
    },
    /// Plan: move everything off these nodes
    Drain {
        /// Nodes as `show` names them
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
        #[command(flatten)]
        by: ByArgs,
    },
    /// Plan: move everything from one node to another
    Replace {
        /// The node to be emptied
        old: String,
        /// The node that takes its place
        new: String,
    },
    /// Plan: spread what is on some nodes evenly over others, or move one group
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
    },
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
    #[serde(flatten)]
    plan: &'a Plan,
    /// No finding is an error.
    ready: bool,
    findings: &'a [Finding],
}

/// Shows or plans. 0 done.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let wish = args.command.wish()?;
    let (option, variable) = ("cluster", "WALFERRY_CLUSTER");
    let missing = config::Error::Missing { what: "the cluster", option, variable };
    let address = Address::parse(&args.cluster.ok_or(missing)?)?;
    let found = cluster::read(&address).await?;
    match wish {
        Err(by) => show(&found, by, args.json)?,
        Ok(wish) => {
            let plan = cluster::plan(&found.cluster, &wish)?;
            let age = args.transaction_age.unwrap_or(guard::TRANSACTION_AGE);
            let findings = guard::findings(&found, &plan, age).await?;
            if args.json {
                let ready = ready(&findings);
                print::json(&Planned { plan: &plan, ready, findings: &findings })?;
            } else {
                print_plan(&plan);
                print_findings(&findings);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Command {
    /// What is to be planned; for `show`, by what nodes are compared.
    fn wish(&self) -> Result<Result<Wish, Weigh>, config::Error> {
        let measure =
            |by: &ByArgs, t: &ThresholdArgs| Measure { by: by.by, threshold: t.threshold };
        Ok(Ok(match self {
            Command::Show(by) => return Ok(Err(by.by)),
            Command::Rebalance { by, threshold } => Wish::Rebalance(measure(by, threshold)),
            Command::Drain { nodes, by } => Wish::Drain { nodes: nodes.clone(), by: by.by },
            Command::Replace { old, new } => Wish::Replace { old: old.clone(), new: new.clone() },
            Command::Move { shard: Some(shard), to, .. } => match to.as_slice() {
                [] => Wish::One { shard: *shard, to: None },
                [to] => Wish::One { shard: *shard, to: Some(to.clone()) },
                _ => return Err(value("--to", "one group goes to one node")),
            },
            Command::Move { from, to, by, threshold, .. } => {
                if from.is_empty() || to.is_empty() {
                    return Err(value("--from", "give --from and --to, or --shard"));
                }
                let (from, to) = (from.clone(), to.clone());
                Wish::Spread { from, to, measure: measure(by, threshold) }
            }
        }))
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
    println!("{tasks} tasks, {}; nothing was changed", print::bytes(plan.bytes));
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
