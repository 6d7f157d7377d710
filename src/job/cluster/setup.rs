//! What a command knows of its cluster, and a task as an ordinary job.

use super::log::Log;
use super::store::{ClusterStore, TaskRow};
use crate::cluster::guard::{Allowed, WithoutIdentity};
use crate::cluster::{Address, Layout, Move};
use crate::cutover::{FenceKind, Limits};
use crate::id::Stream;
use crate::job::groups::Part;
use crate::job::place::Buffer;
use crate::job::rest::{Refresh, Unlogged};
use crate::job::store::JobOptions;
use crate::job::{Error, FlipRequest, JobConfig, Result};
use crate::pg::Config;
use crate::secret::{ExposeSecret, SecretString};

/// How each task cuts over: the options of cutover.
#[derive(Clone, Debug)]
pub struct Flip {
    /// `--fence`.
    pub fence: FenceKind,
    /// How long it may take.
    pub limits: Limits,
    /// How often a cutover that could not be made is tried before its task is in error, at least 1.
    pub tries: u32,
    /// Clients of a plproxy partition may only read while it is switched.
    pub read_only: bool,
}

impl Default for Flip {
    fn default() -> Self {
        Flip { fence: FenceKind::Lock, limits: Limits::default(), tries: 5, read_only: false }
    }
}

impl Flip {
    /// A cutover or rollback by these routes.
    pub fn request(&self, stream: Stream, routes: Vec<String>) -> FlipRequest {
        FlipRequest {
            flip: stream.to_string(),
            attempt: format!("{:016x}", fastrand::u64(..)),
            fence: self.fence.as_str().to_string(),
            routes,
            letter: None,
            limits: self.limits,
            refresh: match stream {
                Stream::Forward => Refresh::Before,
                Stream::Reverse => Refresh::After,
            },
            unlogged: Unlogged::default(),
            leave_quarantined: false,
            dry_run: false,
            one_way: false,
            part: Part::All,
            group: None,
            mark: None,
        }
    }
}

/// A cluster, its home, and how its tasks are to be run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The cluster as it was given.
    pub address: Address,
    /// Its nodes.
    pub layout: Layout,
    /// Where its jobs are kept.
    pub home: Config,
    /// What all tasks have in common; name, ends, tables and routes are each one's own.
    pub base: JobConfig,
    /// How each cuts over.
    pub flip: Flip,
    /// Compare all rows before a task cuts over.
    pub verify: bool,
    /// What is let pass when a task begins.
    pub allowed: Allowed,
    /// Hears every statement.
    pub log: Log,
}

/// A task ready to be run.
#[derive(Clone, Debug)]
pub struct Ready {
    /// As an ordinary job.
    pub config: JobConfig,
    /// Its routes as they are stored; their passwords are in `config.secrets`.
    pub routes: Vec<String>,
    /// What it moves.
    pub moved: Move,
}

impl Setup {
    /// Writes down what is not written yet of the statements that were sent for a job.
    pub async fn write_log(&self, job: i64) -> Result<()> {
        let mut store = ClusterStore::open(&self.home).await?;
        self.log.write(&mut store.session, job, true).await
    }

    /// The task as an ordinary job. `routers` as they are stored with the cluster's job.
    pub fn ready(&self, row: &TaskRow, routers: &[String]) -> Result<Ready> {
        let routers: Vec<SecretString> =
            routers.iter().map(|uri| SecretString::from(uri.as_str())).collect();
        let mut moved = Move::of(&self.address, &self.layout, &row.errand, &routers)?;
        if self.flip.read_only {
            moved.read_only();
        }
        let witness = self.log.witness(row.task);
        moved.source = moved.source.with_witness(witness.clone());
        moved.target = moved.target.with_witness(witness.clone());
        let learn = |route: &SecretString| {
            let learnt = self.base.secrets.learn(route.expose_secret());
            learnt.map_err(|e| Error::from(crate::cutover::Error::from(e)))
        };
        let routes = moved.routes.iter().map(learn).collect::<Result<Vec<_>>>()?;
        let mut config = self.base.clone();
        config.job = row.job_name()?;
        config.secrets = config.secrets.with_witness(witness);
        config.source = moved.source.clone();
        config.target = moved.target.clone();
        let leave_large_objects = config.options.leave_large_objects;
        let include = moved.include.clone();
        if let Some(Buffer::Kafka(place)) = &mut config.buffer.kind {
            // A topic is of one stream.
            place.topic = format!("{}.{}", place.topic, config.job);
        }
        config.wanted.publication = None;
        config.insert_only = self.allowed.without_identity == WithoutIdentity::InsertOnly;
        let tables_only = moved.tables_only;
        config.bin = row.cluster_job().map(str::to_string);
        config.options =
            JobOptions { include, leave_large_objects, tables_only, ..JobOptions::default() };
        Ok(Ready { config, routes, moved })
    }
}
