//! `walferry cluster run`, and what takes back or ends what a run made.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::watch;

use super::jobs::{done, home_of, overall, progress};
use super::print;
use crate::cli::limits::LimitArgs;
use crate::cli::options;
use crate::cli::run::stop_on_signal;
use crate::cluster::guard::Allowed;
use crate::cluster::schedule::Limits;
use crate::cluster::{self, Address, TaskState};
use crate::config::{self, file};
use crate::cutover::FenceKind;
use crate::job::cluster::log::Log;
use crate::job::cluster::undo::Gone;
use crate::job::cluster::{
    self as jobs, ClusterJob, ClusterStore, Flip, PLAN_ANEW, Said, Setup, TaskRow, Tell, Wanted,
    undo,
};

/// Between lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Options of `run`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The job's number
    #[arg(value_name = "JOB")]
    job: i64,
    /// Only these tasks
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    tasks: Option<Vec<u32>>,
    /// Tasks at the same time [default: as many as nodes allow]
    #[arg(long, value_name = "N")]
    parallel: Option<usize>,
    /// Tasks that one node takes part in at the same time, as source or target
    #[arg(long, value_name = "N", default_value_t = 1)]
    per_node: usize,
    /// End each task's way back as soon as it is switched: there is no rollback then, and no slot
    /// stays for it
    #[arg(long)]
    finish: bool,
    /// Keep the old sides current when all tasks are over, until stopped
    #[arg(long, conflicts_with = "finish")]
    stay: bool,
    /// Cut over without comparing all rows first
    #[arg(long)]
    no_verify: bool,
    /// A further database that leads clients to the same plproxy cluster; may be given again, and
    /// is remembered
    #[arg(long, value_name = "URI")]
    router: Vec<String>,
    /// Tables copied, and indexes built, at the same time, in each task [default: 4]
    #[arg(short, long, value_name = "N")]
    jobs: Option<usize>,
    /// A file with options of tasks [default: walferry.toml, if there is one]
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flip: FlipArgs,
}

/// How tasks cut over.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct FlipArgs {
    /// What stops writers: lock, read-only or none [default: lock]
    #[arg(long, value_name = "KIND")]
    fence: Option<String>,
    #[command(flatten)]
    limits: LimitArgs,
    /// How often a cutover that was given up is tried before its task is in error [default: 5]
    #[arg(long, value_name = "N")]
    tries: Option<u32>,
    /// Clients of a plproxy partition only read from when its writers are stopped until it is
    /// switched, and sessions from before are ended; else calls that write wait for the fence
    #[arg(long)]
    read_only: bool,
}

/// Options of what is done to single tasks.
#[derive(Clone, Debug, clap::Args)]
pub struct TaskArgs {
    /// The job's number
    #[arg(value_name = "JOB")]
    job: i64,
    /// Which tasks: of reset, all in error, and of finish, all completed ones, where none are named
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    tasks: Option<Vec<u32>>,
}

/// Options of `reset`.
#[derive(Clone, Debug, clap::Args)]
pub struct ResetArgs {
    #[command(flatten)]
    tasks: TaskArgs,
    #[command(flatten)]
    gone: GoneArgs,
}

/// Options of `cancel`.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct CancelArgs {
    /// The job's number
    #[arg(value_name = "JOB")]
    job: i64,
    #[command(flatten)]
    gone: GoneArgs,
}

#[derive(Clone, Copy, Debug, clap::Args)]
struct GoneArgs {
    /// The nodes that tasks were leaving do not exist any more: clean up on the others only
    #[arg(long)]
    source_is_gone: bool,
}

impl GoneArgs {
    fn gone(self) -> Gone {
        if self.source_is_gone { Gone::Source } else { Gone::None }
    }
}

impl TaskArgs {
    /// One task of a job.
    pub fn one(job: i64, task: u32) -> TaskArgs {
        TaskArgs { job, tasks: Some(vec![task]) }
    }
}

impl FlipArgs {
    /// As given, else as the file has it.
    fn flip(&self, file: &file::Cutover) -> anyhow::Result<Flip> {
        let default = Flip::default();
        let fence = self.fence.as_ref().or(file.fence.as_ref());
        let fence = fence.map(|text| text.parse::<FenceKind>()).transpose();
        let value = |e: crate::cutover::Error| config::Error::Value {
            option: "--fence",
            message: e.to_string(),
        };
        Ok(Flip {
            fence: fence.map_err(value)?.unwrap_or(default.fence),
            limits: self.limits.limits(file)?,
            tries: self.tries.unwrap_or(default.tries),
            read_only: self.read_only,
        })
    }
}

/// The cluster and one of its jobs.
async fn load(
    address: Address,
    job: i64,
    task_options: &options::JobArgs,
    flip: &FlipArgs,
) -> anyhow::Result<(Setup, ClusterJob)> {
    let layout = cluster::layout(&address).await?;
    let home = home_of(&layout)?;
    let job = ClusterStore::open(&home).await?.load(job).await?;
    if !address.is_like(&job.cluster) {
        let (job, planned) = (job.job, job.cluster);
        anyhow::bail!("job {job} was planned of {planned}: give the same --cluster");
    }
    let file = task_options.file()?;
    let flip = flip.flip(&file.cutover)?;
    let base = task_options.between(file, home.clone(), home.clone())?;
    if base.map.is_some() {
        let message = "is of one database's job, not of a cluster's: leave it out".to_string();
        return Err(config::Error::Value { option: "[[map]]", message }.into());
    }
    let allowed = Allowed::default();
    let log = Log::default();
    let setup = Setup { address, layout, home, base, flip, verify: true, allowed, log };
    Ok((setup, job))
}

/// Runs a job. 0 if its tasks are completed, or it was stopped by hand; 1 if one is not.
pub async fn run(
    address: Address,
    args: Args,
    allowed: Allowed,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let task_options =
        options::JobArgs { config: args.config, jobs: args.jobs, ..options::JobArgs::default() };
    if args.flip.read_only && !matches!(address, Address::Plproxy { .. }) {
        let message = "is for plproxy clusters".to_string();
        return Err(config::Error::Value { option: "--read-only", message }.into());
    }
    let (mut setup, job) = load(address, args.job, &task_options, &args.flip).await?;
    setup.verify = !args.no_verify;
    setup.allowed = allowed;
    remember_routers(&setup, &job, &args.router).await?;
    let parallel = args.parallel.unwrap_or(usize::MAX);
    let wanted = Wanted {
        job: args.job,
        tasks: args.tasks,
        limits: Limits { parallel, per_node: args.per_node },
        finish: args.finish,
        stay: args.stay,
    };
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(stop_on_signal(stop));
    let ended = jobs::run(&Arc::new(setup), &wanted, &screen(), stopping).await?;
    let completed = |row: &&TaskRow| row.state == TaskState::Completed;
    let count = ended.tasks.iter().filter(completed).count();
    let open = ended.tasks.iter().any(|row| row.state == TaskState::Error);
    if as_json {
        print::json(&json!({ "job": args.job, "stopped": ended.stopped, "tasks": ended.tasks }))?;
    } else {
        println!("{count} of {} tasks are completed", ended.tasks.len());
    }
    advise(&job, &ended);
    Ok(if open { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Keeps further routers with the job, without passwords; those stay with this process.
async fn remember_routers(setup: &Setup, job: &ClusterJob, given: &[String]) -> anyhow::Result<()> {
    if given.is_empty() {
        return Ok(());
    }
    let Address::Plproxy { cluster, .. } = &setup.address else {
        let message = "is for plproxy clusters".to_string();
        return Err(config::Error::Value { option: "--router", message }.into());
    };
    let mut routers = Vec::new();
    let how = if setup.flip.read_only { ",read-only" } else { "" };
    for uri in given {
        let (stored, _) = crate::pg::Config::split_password(uri)?;
        // One for each partition; the password is learned for those of this job.
        for row in &job.tasks {
            let partition = row.errand.partition.as_deref().unwrap_or("p0");
            let route = format!("plproxy:{uri},{cluster},{partition}{how}");
            options::learn(&setup.base.secrets, "--router", &[route])?;
        }
        routers.push(stored);
    }
    let mut store = ClusterStore::open(&setup.home).await?;
    Ok(store.set_routers(job.job, &routers).await?)
}

/// What is left to do when a run has ended, on standard error.
fn advise(job: &ClusterJob, ended: &jobs::Ended) {
    let number = job.job;
    if ended.stopped {
        eprintln!("stopped; the same command goes on from here");
    }
    for row in ended.tasks.iter().filter(|row| row.state == TaskState::Error) {
        let error = row.error.as_deref().unwrap_or_default();
        eprintln!("task {} is in error: {error}", row.task);
        if !error.ends_with(PLAN_ANEW) {
            let reset = format!("walferry cluster reset {number} --tasks {}", row.task);
            eprintln!("    once that is mended, {reset} has it begin again");
        }
    }
    if job.cluster.starts_with("file ") {
        for row in ended.tasks.iter().filter(|row| row.state == TaskState::Completed) {
            let (tables, node) = (row.errand.tables.join(", "), &row.errand.target);
            eprintln!("write into the cluster's file: the group of {tables} is on node {node} now");
        }
    }
    let back = ended.tasks.iter().filter(|row| row.way_back).count();
    if back > 0 {
        eprintln!(
            "{back} tasks can be rolled back (walferry cluster rollback {number} --tasks N). Until \
             walferry cluster finish {number}, their slots keep WAL on the new nodes; cluster run \
             {number} --stay keeps the old ones current"
        );
    }
}

/// Lines on standard error, progress of all every few seconds.
fn screen() -> Tell {
    let last: Mutex<Option<Instant>> = Mutex::new(None);
    Arc::new(move |said| match said {
        Said::Task(task, line) => eprintln!("task {task}: {line}"),
        Said::Job(line) => eprintln!("{line}"),
        Said::Progress(all, tasks) => {
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            // Nothing has moved when a run begins.
            let due = last.get_or_insert_with(Instant::now).elapsed() > LINE_EVERY;
            if due {
                *last = Some(Instant::now());
                for row in tasks.iter().filter(|row| row.state == TaskState::Running) {
                    eprintln!("task {}: {}", row.task, progress(row));
                }
                eprintln!("{}", overall(&all));
            }
        }
    })
}

/// Cancels a job. 0 done.
pub async fn cancel(address: Address, args: CancelArgs, as_json: bool) -> anyhow::Result<ExitCode> {
    let (setup, job) = loaded(address, args.job).await?;
    let canceled = undo::cancel(&setup, &job, args.gone.gone(), &screen()).await;
    setup.write_log(job.job).await?;
    done("canceled", &canceled?, as_json)
}

/// Puts tasks back to init. 0 done.
pub async fn reset(address: Address, args: ResetArgs, as_json: bool) -> anyhow::Result<ExitCode> {
    let TaskArgs { job, tasks } = args.tasks;
    let (setup, job) = loaded(address, job).await?;
    let reset = undo::reset(&setup, &job, tasks.as_deref(), args.gone.gone(), &screen()).await;
    setup.write_log(job.job).await?;
    done("reset", &reset?, as_json)
}

/// Leads clients back. 0 done.
pub async fn rollback(address: Address, args: TaskArgs, as_json: bool) -> anyhow::Result<ExitCode> {
    let Some(tasks) = args.tasks else {
        let message = "name the tasks whose clients are to be led back".to_string();
        return Err(config::Error::Value { option: "--tasks", message }.into());
    };
    let (setup, job) = loaded(address, args.job).await?;
    let held = undo::rollback(&setup, &job, &tasks, &screen()).await;
    setup.write_log(job.job).await?;
    let held = held?;
    if as_json {
        let list = held.iter().map(|(task, ms)| json!({ "task": task, "held_ms": ms }));
        print::json(&list.collect::<Vec<_>>())?;
    } else {
        for (task, ms) in held {
            println!("task {task} is rolled back; writers were held for {ms:.1} ms");
        }
        println!("walferry cluster reset {} --tasks N takes what it left away", job.job);
    }
    Ok(ExitCode::SUCCESS)
}

/// Ends ways back. 0 done.
pub async fn finish(address: Address, args: TaskArgs, as_json: bool) -> anyhow::Result<ExitCode> {
    let (setup, job) = loaded(address, args.job).await?;
    let tasks = undo::finish(&setup, &job, args.tasks.as_deref(), &screen()).await;
    setup.write_log(job.job).await?;
    let tasks = tasks?;
    for row in job.tasks.iter().filter(|row| tasks.contains(&row.task)) {
        let old =
            if row.state == TaskState::Completed { &row.errand.source } else { &row.errand.target };
        let what = match setup.address {
            Address::Citus { .. } => "is in the recycle bin of",
            _ => "is no longer used, drop it on",
        };
        eprintln!("task {}: {} {what} {old}", row.task, row.errand.tables.join(", "));
    }
    done("finished", &tasks, as_json)
}

async fn loaded(address: Address, job: i64) -> anyhow::Result<(Setup, ClusterJob)> {
    load(address, job, &options::JobArgs::default(), &FlipArgs::default()).await
}
