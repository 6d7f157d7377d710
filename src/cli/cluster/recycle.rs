//! `walferry cluster recycle`: old shards that are kept on their nodes.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use serde_json::json;

use super::jobs::home_of;
use super::print;
use super::run::{TaskArgs, rollback};
use crate::cluster::{self, Address};
use crate::config::{self, parse_duration};
use crate::job::cluster::{ClusterJob, ClusterStore, TaskRow};
use crate::job::recycle::{self, Kept};
use crate::pg::Session;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Old shards on every node: those that are still kept current, and those in recycle bins
    List(OfJob),
    /// Drop what is in the recycle bins
    Empty {
        #[command(flatten)]
        of: OfJob,
        /// Only what has been there for longer [default: all]
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        older: Option<Duration>,
    },
    /// Lead a task's clients back to its old shards, with all that was written since: possible
    /// until the task is finished
    Restore {
        /// The task's number
        #[arg(value_name = "TASK")]
        task: u32,
        #[command(flatten)]
        of: OfJob,
    },
}

/// Which job's.
#[derive(Clone, Debug, clap::Args)]
pub struct OfJob {
    /// Of this job only; of restore, the newest job that has such a task
    #[arg(long = "job", value_name = "JOB")]
    job: Option<i64>,
}

/// A table in a bin of a node.
#[derive(Serialize)]
struct On<'a> {
    node: &'a str,
    #[serde(flatten)]
    kept: Kept,
}

/// 0 done.
pub async fn run(address: Address, command: Command, as_json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Command::List(of) => list(&address, of.job, as_json).await,
        Command::Empty { of, older } => empty(&address, of.job, older, as_json).await,
        Command::Restore { task, of } => {
            let job = match of.job {
                Some(job) => job,
                None => newest(&address, task).await?,
            };
            rollback(address, TaskArgs::one(job, task), as_json).await
        }
    }
}

/// Jobs of the cluster, the newest first; none where there is no place for them.
async fn jobs(address: &Address) -> anyhow::Result<Vec<ClusterJob>> {
    let layout = cluster::layout(address).await?;
    Ok(ClusterStore::open(&home_of(&layout)?).await?.jobs().await?)
}

async fn newest(address: &Address, task: u32) -> anyhow::Result<i64> {
    let has = |job: &&ClusterJob| job.tasks.iter().any(|row| row.task == task && row.way_back);
    match jobs(address).await?.iter().find(has) {
        Some(job) => Ok(job.job),
        None => {
            let message = format!(
                "no job has a task {task} whose old shards are kept current: once a task is \
                 finished, move its group back by a new job (walferry cluster move)"
            );
            Err(config::Error::Value { option: "TASK", message }.into())
        }
    }
}

async fn list(address: &Address, job: Option<i64>, as_json: bool) -> anyhow::Result<ExitCode> {
    let layout = cluster::layout(address).await?;
    let bin = job.map(|job| job.to_string());
    let mut found = Vec::new();
    for (node, config) in &layout.nodes {
        let mut session = Session::control(config).await?;
        let kept = recycle::list(&mut session, bin.as_deref(), Duration::ZERO).await?;
        found.extend(kept.into_iter().map(|kept| On { node, kept }));
    }
    let jobs = jobs(address).await?;
    let open = jobs
        .iter()
        .filter(|one| job.is_none_or(|job| job == one.job))
        .flat_map(|job| job.tasks.iter().filter(|row| row.way_back).map(move |row| (job.job, row)));
    let open: Vec<(i64, &TaskRow)> = open.collect();
    if as_json {
        let current = open.iter().map(|(job, row)| {
            json!({
                "job": job,
                "task": row.task,
                "node": row.errand.source,
                "tables": row.errand.tables,
                "shards": row.errand.shards,
            })
        });
        let current: Vec<_> = current.collect();
        print::json(&json!({ "current": current, "recycled": found }))?;
        return Ok(ExitCode::SUCCESS);
    }
    for (job, row) in &open {
        println!(
            "task {} of job {job} on {}: {} kept current, recycle restore {} --job {job} leads \
             clients back",
            row.task,
            row.errand.source,
            row.errand.tables.join(", "),
            row.task
        );
    }
    for on in &found {
        println!(
            "job {} on {}: {}.{}, {}, since {}",
            on.kept.bin,
            on.node,
            on.kept.schema,
            on.kept.name,
            print::bytes(on.kept.bytes),
            on.kept.recycled_at
        );
    }
    if open.is_empty() && found.is_empty() {
        println!("nothing is kept");
    }
    Ok(ExitCode::SUCCESS)
}

async fn empty(
    address: &Address,
    job: Option<i64>,
    older: Option<Duration>,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let layout = cluster::layout(address).await?;
    let bin = job.map(|job| job.to_string());
    let mut dropped = Vec::new();
    for (node, config) in &layout.nodes {
        let mut session = Session::control(config).await?;
        let older = older.unwrap_or_default();
        let gone = recycle::empty(&mut session, bin.as_deref(), older).await?;
        dropped.extend(gone.into_iter().map(|kept| On { node, kept }));
    }
    if as_json {
        print::json(&dropped)?;
        return Ok(ExitCode::SUCCESS);
    }
    for on in &dropped {
        println!(
            "dropped {}.{} of job {} on {}",
            on.kept.schema, on.kept.name, on.kept.bin, on.node
        );
    }
    let bytes = dropped.iter().map(|on| on.kept.bytes).sum();
    println!("{} tables, {}", dropped.len(), print::bytes(bytes));
    Ok(ExitCode::SUCCESS)
}
