//! The two servers, and how every contestant is given the same ones: their data directories are
//! put aside once, while both are down, and put back before each run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;
use walferry::demo::compare::compare_without;
use walferry::demo::server::{Server, StopMode};
use walferry::pg::{Config, Purpose, Session};

use crate::process::{Watched, run};

/// The database that is moved, on both sides.
pub const DATABASE: &str = "bench";

/// Between looks at the target.
const LOOK: Duration = Duration::from_millis(2);

/// Both servers. In the order of the fields: servers go before the copies they came from.
pub struct Pair {
    pub source: Server,
    pub target: Server,
    /// For logs, scripts and work files.
    pub scratch: PathBuf,
    pub runtime: Runtime,
}

/// What both servers are set to, beside what `demo::server` gives every server. fsync is on, as the
/// waits for it are a part of the work; not in a smoke run, whose times mean nothing.
pub fn settings(smoke: bool) -> Vec<String> {
    let cores = cores();
    [
        format!("fsync = {}", if smoke { "off" } else { "on" }),
        "shared_buffers = 512MB".to_string(),
        "max_wal_size = 8GB".to_string(),
        "checkpoint_timeout = 30min".to_string(),
        "maintenance_work_mem = 256MB".to_string(),
        "max_worker_processes = 32".to_string(),
        "max_logical_replication_workers = 16".to_string(),
        format!("max_sync_workers_per_subscription = {}", cores.max(2)),
        "max_locks_per_transaction = 256".to_string(),
    ]
    .to_vec()
}

/// How many jobs each contestant is told to use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

impl Pair {
    /// Starts both, with an empty database each.
    pub fn start(smoke: bool) -> Result<Pair> {
        let bin = Server::default_bin()?;
        let settings = settings(smoke);
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let (source, target) = (Server::start(&bin, &settings)?, Server::start(&bin, &settings)?);
        for server in [&source, &target] {
            server.psql("postgres", &format!("create database {DATABASE}"))?;
        }
        let scratch = source.dir().join("scratch");
        std::fs::create_dir(&scratch)?;
        Ok(Pair { source, target, scratch, runtime: Runtime::new()? })
    }

    pub fn source_uri(&self) -> String {
        self.source.uri(DATABASE)
    }

    pub fn target_uri(&self) -> String {
        self.target.uri(DATABASE)
    }

    /// A libpq connection string to the source, for SQL that quotes it.
    pub fn source_dsn(&self, port: u16) -> String {
        format!("host=127.0.0.1 port={port} user=postgres dbname={DATABASE}")
    }

    /// A file for what a program says.
    pub fn log(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.log"))
    }

    /// An empty database on the target again.
    pub fn empty_target(&self) -> Result<()> {
        // A database with a subscription cannot be dropped; its slot belongs to the next runs.
        let names = self.target.psql(DATABASE, "select subname from pg_subscription")?;
        for name in names.lines().filter(|name| !name.is_empty()) {
            for what in ["disable", "set (slot_name = none)"] {
                self.target.psql(DATABASE, &format!("alter subscription {name} {what}"))?;
            }
            self.target.psql(DATABASE, &format!("drop subscription {name}"))?;
        }
        self.target
            .psql("postgres", &format!("drop database if exists {DATABASE} with (force)"))?;
        // Origins are the server's and outlive the database; walferry takes one that it did not make
        // for an earlier job's.
        self.target.psql(
            "postgres",
            "select pg_replication_origin_drop(roname) from pg_replication_origin",
        )?;
        self.target.psql("postgres", &format!("create database {DATABASE}"))?;
        Ok(())
    }

    /// Nothing left to be written by a checkpoint of one run in the time of the next.
    pub fn settle(&self) -> Result<()> {
        for server in [&self.source, &self.target] {
            server.psql("postgres", "checkpoint")?;
        }
        Ok(())
    }

    /// pg_dump of the source's schema, or of its rows too, into a file for pg_restore.
    pub fn dump(&self, schema_only: bool) -> Result<PathBuf> {
        let path = self.scratch.join("dump");
        let mut command = Command::new(Server::default_bin()?.join("pg_dump"));
        command.args(["-Fc", "-Z0", "--no-publications", "--no-subscriptions", "-f"]).arg(&path);
        if schema_only {
            command.arg("--schema-only");
        }
        run(command.args(["-N", "walferry", "-N", "pglogical", "-d", &self.source_uri()]))?;
        Ok(path)
    }

    /// pg_restore of one section, or of all, into the target.
    pub fn restore_dump(&self, dump: &Path, section: Option<&str>, jobs: usize) -> Result<()> {
        let mut command = Command::new(Server::default_bin()?.join("pg_restore"));
        command.args(["-e", "-j", &jobs.to_string(), "-d", &self.target_uri()]);
        if let Some(section) = section {
            command.args(["--section", section]);
        }
        run(command.arg(dump))?;
        Ok(())
    }

    /// Puts a server's data aside under a name; it is down before and after.
    pub fn save(&self, server: &Server, name: &str) -> Result<()> {
        server.stop(StopMode::Fast)?;
        replace(&server.data_dir(), &server.dir().join(format!("saved-{name}")))
    }

    /// Brings a server back to what was saved; it is up after.
    pub fn restore(&self, server: &Server, name: &str) -> Result<()> {
        server.stop(StopMode::Immediate)?;
        replace(&server.dir().join(format!("saved-{name}")), &server.data_dir())?;
        // What is still to be written would take the disk from whoever comes first.
        run(Command::new("sync").arg("-f").arg(server.dir()))?;
        server.resume()?;
        Ok(())
    }

    /// Waits until a query on the target gives `t`. Blocks; seconds since `since`.
    pub fn wait_for(
        &self,
        sql: &str,
        since: Instant,
        patience: Duration,
        worker: Option<&Watched>,
    ) -> Result<f64> {
        self.runtime.block_on(async {
            let config = Config::parse(&self.target_uri())?;
            let mut session = Session::connect(&config, Purpose::Sql).await?;
            loop {
                let row = session.query_opt(sql, &[]).await?;
                if row.is_some_and(|row| row.str(0).is_ok_and(|value| value == "t")) {
                    return Ok(since.elapsed().as_secs_f64());
                }
                if let Some(worker) = worker.filter(|worker| worker.has_ended()) {
                    bail!("it ended too early, saying:\n{}", worker.said());
                }
                if since.elapsed() > patience {
                    bail!("not done within {} s", patience.as_secs());
                }
                tokio::time::sleep(LOOK).await;
            }
        })
    }

    /// Fails unless both sides hold the same rows; the number of rows.
    pub fn check_equal(&self, who: &str) -> Result<u64> {
        let ours = ["pgcopydb.sentinel"];
        let (source, target) = (self.source_uri(), self.target_uri());
        let compared = compare_without(&source, &target, &ours);
        let mut found = self.runtime.block_on(compared)?;
        // Logical replication does not carry sequences; none of the data sets rests on one.
        found.differences.retain(|text| !text.starts_with("sequence "));
        if !found.is_equal() {
            bail!("{who}: the end states differ: {}", found.differences.join("; "));
        }
        Ok(found.rows())
    }
}

fn replace(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to).with_context(|| to.display().to_string())?;
    }
    run(Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to))?;
    Ok(())
}
