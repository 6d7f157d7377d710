//! Jobs of clusters and their tasks, in schema `walferry` of the cluster's home.

use serde::Serialize;
use serde_json::{Value, json};

use super::log::{self, LogLine};
use crate::cluster::{Errand, TaskState};
use crate::id::JobName;
use crate::job::ddl::DDL_BOTH;
use crate::job::lease;
use crate::job::store::ensure;
use crate::job::{Error, Result};
use crate::pg::{Config, Row, Session};

/// A task's row is its ordinary job seen from the cluster; the history keeps every state it had.
const DDL: &str = "
create table if not exists walferry.cluster_job (
    id bigint generated always as identity primary key, tag text not null, cluster text not null,
    wish text not null, plan jsonb not null, routers jsonb not null default '[]',
    canceled boolean not null default false, created_at timestamptz not null default now());
create table if not exists walferry.cluster_task (
    job bigint not null references walferry.cluster_job on delete cascade, task int not null,
    name text not null, state text not null default 'init', errand jsonb not null,
    shape jsonb, made_database boolean not null default false,
    way_back boolean not null default false, phase text, note text, error text,
    processed_bytes bigint not null default 0, left_seconds float8, held_ms float8,
    started_at timestamptz, ended_at timestamptz, primary key (job, task));
create table if not exists walferry.cluster_history (
    id bigint generated always as identity primary key,
    job bigint not null references walferry.cluster_job on delete cascade, task int not null,
    state text not null, detail text, at timestamptz not null default clock_timestamp());
";

/// What is read of a task, in the order of [`read_task`].
const TASK: &str = "task, name, state, errand, shape, made_database, way_back, phase, note, error, \
     processed_bytes, left_seconds, held_ms, started_at, ended_at";

/// A task as it is stored.
#[derive(Clone, Debug, Serialize)]
pub struct TaskRow {
    /// Its number, counted from 1 in its job.
    pub task: u32,
    /// The name of its ordinary job, on the target: for walferry's other commands.
    pub name: String,
    /// Where it stands.
    pub state: TaskState,
    /// What it is.
    #[serde(flatten)]
    pub errand: Errand,
    /// What its tables looked like when it began.
    #[serde(skip)]
    pub shape: Option<Value>,
    /// Its database on the target was made for it.
    pub made_database: bool,
    /// It was switched, and can be rolled back.
    pub way_back: bool,
    /// The phase of its ordinary job when that was last seen.
    pub phase: Option<String>,
    /// What it is at, or was told last.
    pub note: Option<String>,
    /// Why it stopped.
    pub error: Option<String>,
    /// Of its bytes, those that are on the target.
    pub processed_bytes: u64,
    /// Estimate, while it copies.
    pub left_seconds: Option<f64>,
    /// How long writers were held at its cutover, in milliseconds.
    pub held_ms: Option<f64>,
    /// When it began, in UTC.
    pub started_at: Option<String>,
    /// When it came to its present end, in UTC.
    pub ended_at: Option<String>,
}

impl TaskRow {
    /// The number of its cluster's job: its own job's name begins with `cJOBtTASK`.
    pub fn cluster_job(&self) -> Option<&str> {
        Some(self.name.strip_prefix('c')?.split_once('t')?.0)
    }

    /// The name of its ordinary job.
    pub fn job_name(&self) -> Result<JobName> {
        self.name.parse().map_err(|e| Error::State(format!("walferry.cluster_task.name: {e}")))
    }
}

/// A job with all its tasks.
#[derive(Clone, Debug, Serialize)]
pub struct ClusterJob {
    /// Its number.
    pub job: i64,
    /// The cluster it was planned of, without secrets.
    pub cluster: String,
    /// What was asked for.
    pub wish: String,
    /// What its tasks make of it.
    pub state: TaskState,
    /// It was canceled, or is about to be.
    pub canceled: bool,
    /// When it was planned, in UTC.
    pub created_at: String,
    /// URIs of further databases that lead clients to the cluster, without passwords.
    #[serde(skip)]
    pub routers: Vec<String>,
    /// Backend of the runner that lives, if one does.
    pub runner: Option<String>,
    /// Its tasks, in the order of their numbers.
    pub tasks: Vec<TaskRow>,
}

/// A state that a task had.
#[derive(Clone, Debug, Serialize)]
pub struct HistoryLine {
    /// Which task.
    pub task: u32,
    /// The state it came to.
    pub state: String,
    /// Why, or how.
    pub detail: Option<String>,
    /// When, in UTC.
    pub at: String,
}

/// How a task's state changes.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// The state to come.
    pub to: TaskState,
    /// For the history.
    pub detail: &'a str,
}

/// The tables, through one session with the home.
#[derive(Debug)]
pub struct ClusterStore {
    /// The session.
    pub session: Session,
}

/// The lease of a job's runner; has a letter that no ordinary job's name has.
pub fn lease_name(job: i64) -> String {
    format!("cluster/{job}")
}

impl ClusterStore {
    /// Connects to the home. Makes nothing.
    pub async fn open(home: &Config) -> Result<ClusterStore> {
        Ok(ClusterStore { session: Session::control(home).await? })
    }

    /// Makes schema and tables where they are missing.
    pub async fn ensure(&mut self) -> Result<()> {
        ensure(&mut self.session, &[DDL_BOTH, DDL, log::DDL]).await
    }

    /// Writes a planned job down; gives its number.
    pub async fn create(
        &mut self,
        cluster: &str,
        wish: &str,
        plan: &Value,
        errands: &[(u32, Errand)],
    ) -> Result<i64> {
        self.ensure().await?;
        let tasks: Vec<Value> = errands
            .iter()
            .map(|(task, errand)| json!({ "task": task, "errand": errand }))
            .collect();
        // Slots of several clusters may be on one server: the tag keeps their names apart.
        let tag = format!("{:06x}", fastrand::u32(..1 << 24));
        let sql = "with j as (insert into walferry.cluster_job (tag, cluster, wish, plan) \
             values ($1, $2, $3, $4::jsonb) returning id, tag), \
             t as (insert into walferry.cluster_task (job, task, name, errand) \
               select j.id, r.task, 'c' || j.id || 't' || r.task || '_' || j.tag, r.errand \
               from j, pg_catalog.jsonb_to_recordset($5::jsonb) r(task int, errand jsonb) \
               returning job, task, state), \
             h as (insert into walferry.cluster_history (job, task, state, detail) \
               select job, task, state, 'planned' from t) select id from j";
        let (plan, tasks) = (plan.to_string(), Value::from(tasks).to_string());
        let params = [Some(tag.as_str()), Some(cluster), Some(wish), Some(&plan), Some(&tasks)];
        Ok(self.session.query_one(sql, &params).await?.parse(0)?)
    }

    /// True if any job was ever stored here.
    async fn exists(&mut self) -> Result<bool> {
        let sql = "select pg_catalog.to_regclass('walferry.cluster_job') is not null";
        Ok(self.session.query_one(sql, &[]).await?.bool(0)?)
    }

    /// All jobs, the newest first.
    pub async fn jobs(&mut self) -> Result<Vec<ClusterJob>> {
        if !self.exists().await? {
            return Ok(Vec::new());
        }
        let sql = "select id from walferry.cluster_job order by id desc";
        let mut jobs = Vec::new();
        for row in self.session.query(sql).await? {
            jobs.push(self.load(row.parse(0)?).await?);
        }
        Ok(jobs)
    }

    /// One job. An error names those there are.
    pub async fn load(&mut self, job: i64) -> Result<ClusterJob> {
        let none = || Error::NoClusterJob { job, others: "none".to_string() };
        if !self.exists().await? {
            return Err(none());
        }
        let id = job.to_string();
        let sql = "select cluster, wish, canceled, created_at, routers from walferry.cluster_job \
             where id = $1";
        let Some(row) = self.session.query_opt(sql, &[Some(&id)]).await? else {
            let sql = "select coalesce(string_agg(id::text, ', ' order by id), 'none') \
                 from walferry.cluster_job";
            let others = self.session.query_one(sql, &[]).await?.string(0)?;
            return Err(Error::NoClusterJob { job, others });
        };
        let tasks = self.tasks(job).await?;
        let states: Vec<TaskState> = tasks.iter().map(|task| task.state).collect();
        let runner = lease::holder_of(&mut self.session, &lease_name(job)).await?;
        Ok(ClusterJob {
            job,
            cluster: row.string(0)?,
            wish: row.string(1)?,
            state: TaskState::of_job(&states),
            canceled: row.bool(2)?,
            created_at: row.string(3)?,
            routers: json_of(row.str(4)?, "cluster_job.routers")?,
            runner,
            tasks,
        })
    }

    /// A job's tasks, in the order of their numbers.
    pub async fn tasks(&mut self, job: i64) -> Result<Vec<TaskRow>> {
        let sql = format!("select {TASK} from walferry.cluster_task where job = $1 order by task");
        let rows = self.session.query_params(&sql, &[Some(&job.to_string())]).await?;
        rows.iter().map(read_task).collect()
    }

    /// Every state that a job's tasks had, oldest first.
    pub async fn history(&mut self, job: i64) -> Result<Vec<HistoryLine>> {
        let sql = "select task, state, detail, at from walferry.cluster_history where job = $1 \
             order by id";
        let rows = self.session.query_params(sql, &[Some(&job.to_string())]).await?;
        rows.iter()
            .map(|row| {
                Ok(HistoryLine {
                    task: row.parse(0)?,
                    state: row.string(1)?,
                    detail: row.opt(2)?.map(str::to_string),
                    at: row.string(3)?,
                })
            })
            .collect()
    }

    /// What was sent for a job, or for one task of it, oldest first.
    pub async fn log(&mut self, job: i64, task: Option<u32>) -> Result<Vec<LogLine>> {
        log::load(&mut self.session, job, task).await
    }

    /// Changes a task's state, if it stands where that state may follow, and keeps it in the
    /// history. False if it stands elsewhere: somebody else has changed it.
    pub async fn change(&mut self, job: i64, task: u32, change: Change<'_>) -> Result<bool> {
        let Change { to, detail } = change;
        let may: Vec<&str> = to.follows().iter().map(|state| state.as_str()).collect();
        let fresh = to == TaskState::Init;
        let sql = "with c as (update walferry.cluster_task set state = $3::text, \
             error = case when $3::text = 'error' then $4::text end, \
             started_at = case when $3::text = 'init' then null \
               else coalesce(started_at, clock_timestamp()) end, \
             ended_at = case when $3::text in ('init', 'running') then null \
               else clock_timestamp() end, left_seconds = null, \
             way_back = $3::text = 'completed', note = null, \
             processed_bytes = case when $6::bool then 0 else processed_bytes end, \
             phase = case when $6::bool then null else phase end, \
             shape = case when $6::bool then null else shape end, \
             made_database = not $6::bool and made_database, \
             held_ms = case when $6::bool then null else held_ms end \
             where job = $1 and task = $2 and state = any ($5::text[]) returning job, task) \
             insert into walferry.cluster_history (job, task, state, detail) \
             select job, task, $3::text, nullif($4::text, '') from c returning id";
        let (job, task) = (job.to_string(), task.to_string());
        let may = format!("{{{}}}", may.join(","));
        let params = [
            Some(job.as_str()),
            Some(&task),
            Some(to.as_str()),
            Some(detail),
            Some(&may),
            Some(if fresh { "true" } else { "false" }),
        ];
        Ok(!self.session.query_params(sql, &params).await?.is_empty())
    }

    /// Tasks that move the same as this one, between nodes that it takes part in, and are not over:
    /// in sentences. A way back that is kept counts: it writes to where the group was.
    pub async fn rivals(&mut self, job: i64, task: u32) -> Result<Vec<String>> {
        let sql = "select 'task ' || o.task || ' of job ' || o.job || case when o.way_back \
             then ' (completed, and not finished)' else ' (running)' end \
             from walferry.cluster_task o, walferry.cluster_task t \
             where t.job = $1 and t.task = $2 and (o.job, o.task) <> (t.job, t.task) \
             and (o.state = 'running' or o.way_back) \
             and array[o.errand ->> 'source', o.errand ->> 'target'] \
               && array[t.errand ->> 'source', t.errand ->> 'target'] \
             and (o.errand -> 'dbname' = t.errand -> 'dbname' or exists (select \
               from pg_catalog.jsonb_array_elements(o.errand -> 'relations') a \
               join pg_catalog.jsonb_array_elements(t.errand -> 'relations') b on a = b)) \
             order by o.job, o.task";
        let (job, task) = (job.to_string(), task.to_string());
        let rows = self.session.query_params(sql, &[Some(&job), Some(&task)]).await?;
        Ok(rows.iter().map(|row| row.string(0)).collect::<crate::pg::Result<_>>()?)
    }

    /// Sets one column of a task.
    pub async fn set(
        &mut self,
        job: i64,
        task: u32,
        column: &'static str,
        value: Option<&str>,
    ) -> Result<()> {
        let sql =
            format!("update walferry.cluster_task set {column} = $3 where job = $1 and task = $2");
        let (job, task) = (job.to_string(), task.to_string());
        self.session.query_params(&sql, &[Some(&job), Some(&task), value]).await?;
        Ok(())
    }

    /// What is seen of tasks under way, in one statement: `(task, phase, note, processed, left)`.
    pub async fn save_views(&mut self, job: i64, views: &Value) -> Result<()> {
        let sql = "update walferry.cluster_task t set phase = coalesce(r.phase, t.phase), \
             note = r.note, processed_bytes = greatest(r.processed, t.processed_bytes), \
             left_seconds = r.left_seconds from pg_catalog.jsonb_to_recordset($2::jsonb) \
             r(task int, phase text, note text, processed bigint, left_seconds float8) \
             where t.job = $1 and t.task = r.task";
        let (job, views) = (job.to_string(), views.to_string());
        self.session.query_params(sql, &[Some(&job), Some(&views)]).await?;
        Ok(())
    }

    /// Says that the job is to be canceled; its runner sees it. `false` takes it back.
    pub async fn set_canceled(&mut self, job: i64, canceled: bool) -> Result<()> {
        let sql = "update walferry.cluster_job set canceled = $2 where id = $1";
        let canceled = if canceled { "true" } else { "false" };
        self.session.query_params(sql, &[Some(&job.to_string()), Some(canceled)]).await?;
        Ok(())
    }

    /// Whether it is to be canceled.
    pub async fn is_canceled(&mut self, job: i64) -> Result<bool> {
        let sql = "select canceled from walferry.cluster_job where id = $1";
        let row = self.session.query_opt(sql, &[Some(&job.to_string())]).await?;
        Ok(row.is_none_or(|row| row.bool(0).unwrap_or(false)))
    }

    /// Keeps the routers that the job is led by, so that a run elsewhere knows of them.
    pub async fn set_routers(&mut self, job: i64, routers: &[String]) -> Result<()> {
        let sql = "update walferry.cluster_job set routers = $2::jsonb where id = $1";
        let routers = json!(routers).to_string();
        self.session.query_params(sql, &[Some(&job.to_string()), Some(&routers)]).await?;
        Ok(())
    }
}

fn json_of<T: serde::de::DeserializeOwned>(text: &str, column: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| Error::State(format!("walferry.{column}: {e}")))
}

fn read_task(row: &Row) -> Result<TaskRow> {
    let text = |i| row.opt(i).map(|v| v.map(str::to_string));
    Ok(TaskRow {
        task: row.parse(0)?,
        name: row.string(1)?,
        state: row.str(2)?.parse().map_err(Error::State)?,
        errand: json_of(row.str(3)?, "cluster_task.errand")?,
        shape: row.opt(4)?.map(|shape| json_of(shape, "cluster_task.shape")).transpose()?,
        made_database: row.bool(5)?,
        way_back: row.bool(6)?,
        phase: text(7)?,
        note: text(8)?,
        error: text(9)?,
        processed_bytes: row.parse(10)?,
        left_seconds: row.parse_opt(11)?,
        held_ms: row.parse_opt(12)?,
        started_at: text(13)?,
        ended_at: text(14)?,
    })
}
