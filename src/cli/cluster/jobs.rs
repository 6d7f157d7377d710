//! `walferry cluster jobs` and `job`: what is stored of a cluster's jobs.

use std::process::ExitCode;

use serde::Serialize;
use serde_json::Value;

use super::{print, width};
use crate::cluster::{self, Address, Errand, Found, Plan, Weigh, Wish};
use crate::job::cluster::store::HistoryLine;
use crate::job::cluster::{ClusterJob, ClusterStore, Overview, TaskRow};
use crate::pg::Config;

/// Which job.
#[derive(Clone, Debug, clap::Args)]
pub struct JobArgs {
    /// The job's number
    #[arg(value_name = "JOB")]
    pub job: i64,
}

/// Where the cluster's jobs are kept.
///
/// # Errors
/// Where a file names no home.
pub fn home_of(layout: &cluster::Layout) -> anyhow::Result<Config> {
    layout.home.clone().ok_or_else(|| {
        anyhow::anyhow!(
            "the cluster's file names no database for its jobs: write home = \"postgres://...\" at \
             its top"
        )
    })
}

/// Stores a plan; gives its number, none where the cluster has no home.
pub async fn store(
    address: &Address,
    found: &Found,
    wish: &Wish,
    plan: &Plan,
) -> anyhow::Result<Option<i64>> {
    let layout = cluster::layout(address).await?;
    let Some(home) = layout.home else {
        eprintln!("the cluster's file names no home, so the plan is only printed");
        return Ok(None);
    };
    let errands: Vec<(u32, Errand)> =
        plan.tasks.iter().map(|task| (task.task, Errand::of(found, task))).collect();
    let mut store = ClusterStore::open(&home).await?;
    let value = serde_json::to_value(plan)?;
    Ok(Some(store.create(&address.shown(), &sentence(wish), &value, &errands).await?))
}

/// The wish as on the command line.
fn sentence(wish: &Wish) -> String {
    let by = |by: &Weigh| super::word(*by);
    match wish {
        Wish::Rebalance(measure) => {
            format!("rebalance --by {} --threshold {}", by(&measure.by), measure.threshold)
        }
        Wish::Drain { nodes, by: weigh } => format!("drain {} --by {}", nodes.join(" "), by(weigh)),
        Wish::Replace { old, new } => format!("replace {old} {new}"),
        Wish::Spread { from, to, measure } => {
            let (from, to) = (from.join(","), to.join(","));
            format!("move --from {from} --to {to} --by {}", by(&measure.by))
        }
        Wish::One { shard, to } => {
            let to = to.as_ref().map(|to| format!(" --to {to}")).unwrap_or_default();
            format!("move --shard {shard}{to}")
        }
    }
}

/// All jobs. 0.
pub async fn list(address: &Address, as_json: bool) -> anyhow::Result<ExitCode> {
    let home = home_of(&cluster::layout(address).await?)?;
    let jobs = ClusterStore::open(&home).await?.jobs().await?;
    if as_json {
        print::json(&jobs)?;
        return Ok(ExitCode::SUCCESS);
    }
    for job in &jobs {
        let all = Overview::of(&job.tasks, None);
        println!(
            "job {:<5} {:<9} {:>4} of {:<4} tasks  {:>9} of {:<9} {:>5.1} %  {}  {}{}",
            job.job,
            job.state,
            all.completed,
            all.tasks,
            print::bytes(all.processed_bytes),
            print::bytes(all.total_bytes),
            all.percent(),
            second(&job.created_at),
            job.wish,
            if job.runner.is_some() { "  (running now)" } else { "" },
        );
    }
    if jobs.is_empty() {
        println!("no jobs; walferry cluster rebalance, drain, replace and move plan some");
    }
    Ok(ExitCode::SUCCESS)
}

/// A job as `--json` prints it.
#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    job: &'a ClusterJob,
    total_bytes: u64,
    processed_bytes: u64,
    history: &'a [HistoryLine],
}

/// One job. 0.
pub async fn show(address: &Address, job: i64, as_json: bool) -> anyhow::Result<ExitCode> {
    let home = home_of(&cluster::layout(address).await?)?;
    let mut store = ClusterStore::open(&home).await?;
    let (job, history) = (store.load(job).await?, store.history(job).await?);
    let all = Overview::of(&job.tasks, None);
    if as_json {
        let (total_bytes, processed_bytes) = (all.total_bytes, all.processed_bytes);
        print::json(&Shown { job: &job, total_bytes, processed_bytes, history: &history })?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("job      {} {} of {}, {}", job.job, job.state, job.cluster, job.wish);
    match &job.runner {
        Some(pid) => println!("runner   alive (backend {pid} on the cluster's home)"),
        None => println!("runner   none; walferry cluster run {} goes on from here", job.job),
    }
    println!("{}", overall(&all));
    tasks(&job.tasks);
    for line in &history {
        let detail = line.detail.as_ref().map(|d| format!(": {d}")).unwrap_or_default();
        println!("  {}  task {} {}{detail}", second(&line.at), line.task, line.state);
    }
    Ok(ExitCode::SUCCESS)
}

/// Which statements.
#[derive(Clone, Debug, clap::Args)]
pub struct LogArgs {
    /// The job's number
    #[arg(value_name = "JOB")]
    job: i64,
    /// Only those of this task
    #[arg(long, value_name = "N")]
    task: Option<u32>,
}

/// Every statement. 0.
pub async fn log(address: &Address, args: LogArgs, as_json: bool) -> anyhow::Result<ExitCode> {
    let home = home_of(&cluster::layout(address).await?)?;
    let mut store = ClusterStore::open(&home).await?;
    store.load(args.job).await?;
    let lines = store.log(args.job, args.task).await?;
    if as_json {
        print::json(&lines)?;
        return Ok(ExitCode::SUCCESS);
    }
    for line in &lines {
        let again = match line.times {
            1 => String::new(),
            times => format!(", {times} times until {}", line.last_at),
        };
        let sql = line.sql.split_whitespace().collect::<Vec<_>>().join(" ");
        println!(
            "{}  task {}  {}  {:.1} ms, {}{again}\n    {sql}",
            line.first_at,
            line.task,
            line.node,
            line.ms,
            line.error.as_deref().unwrap_or("done")
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// How far all is, in a line.
pub fn overall(all: &Overview) -> String {
    let left = all.left.map(|left| format!(", {} left", duration(left.as_secs())));
    format!(
        "{} of {} tasks, {} of {}, {:.1} %{}",
        all.completed,
        all.tasks,
        print::bytes(all.processed_bytes),
        print::bytes(all.total_bytes),
        all.percent(),
        left.unwrap_or_default()
    )
}

/// How far a task is, in a line.
pub fn progress(row: &TaskRow) -> String {
    let (done, bytes) = (row.processed_bytes.min(row.errand.bytes), row.errand.bytes);
    let percent = if bytes == 0 { 0.0 } else { done as f64 / bytes as f64 * 100.0 };
    let left = row.left_seconds.map(|left| format!(", {} left", duration(left as u64)));
    let note = row.note.as_ref().map(|note| format!(", {note}"));
    format!(
        "{} {} of {}, {percent:.1} %{}{}",
        row.phase.as_deref().unwrap_or("begins"),
        print::bytes(done),
        print::bytes(bytes),
        left.unwrap_or_default(),
        note.unwrap_or_default()
    )
}

fn tasks(rows: &[TaskRow]) {
    let names = rows.iter().flat_map(|row| [row.errand.source.as_str(), &row.errand.target]);
    let width = width(names);
    for row in rows {
        let state = match row.state {
            cluster::TaskState::Running => progress(row),
            _ => {
                let held = row.held_ms.map(|ms| format!(", writers held for {ms:.1} ms"));
                let back = if row.way_back { ", can be rolled back" } else { "" };
                format!("{}{}{back}", print::bytes(row.errand.bytes), held.unwrap_or_default())
            }
        };
        println!(
            "task {:<4} {:<9} {:width$} -> {:width$}  {state}  ({}, job {})",
            row.task,
            row.state,
            row.errand.source,
            row.errand.target,
            row.errand.tables.join(", "),
            row.name
        );
        if let Some(error) = &row.error {
            println!("          {error}");
        }
    }
}

/// A timestamp to the second.
fn second(at: &str) -> &str {
    at.split('.').next().unwrap_or(at)
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{}:{:02} min", seconds / 60, seconds % 60),
        _ => format!("{}:{:02} h", seconds / 3600, seconds / 60 % 60),
    }
}

/// What is printed of tasks that something was done to.
pub fn done(what: &str, tasks: &[u32], as_json: bool) -> anyhow::Result<ExitCode> {
    if as_json {
        print::json(&Value::from(tasks.to_vec()))?;
    } else if tasks.is_empty() {
        println!("no task to be {what}");
    } else {
        let list: Vec<String> = tasks.iter().map(u32::to_string).collect();
        println!("{what}: task {}", list.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_left_are_told_in_the_unit_that_fits() {
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(61), "1:01 min");
        assert_eq!(duration(3_720), "1:02 h");
        assert_eq!(second("2026-01-02 03:04:05.678+00"), "2026-01-02 03:04:05");
    }
}
