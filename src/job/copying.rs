//! Rows, then indexes and constraints.
//!
//! All tables are read under one snapshot while the slot's lives, otherwise what is not finished is
//! read under a fresh one, whose visibility the applier then respects. Foreign keys and the rest
//! come once the target is consistent, which it is at once where all tables share one snapshot.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinSet;

use super::run::{Notice, Report, Runner};
use super::state::Event;
use super::{Error, Result};
use crate::catalog::{Table, TableKind};
use crate::copy::{self, CopyProgress, Format, Freeze, SnapshotSource};
use crate::id::QualifiedName;
use crate::pg::{Config, Purpose, Session};
use crate::schema::{self, PostOptions, PostPhase, PostProgress};
use crate::source::{ExportedSnapshot, HeldSlot, snapshot};

/// What makes the copy fast, each with a value that turns it off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bulk {
    /// Small tables that share a transaction (copied, given indexes, analyzed) at most; 1 is off.
    pub bundle_tables: usize,
    /// Which rows are written frozen.
    pub freeze: Freeze,
    /// Keys of large tables are built beside their other indexes.
    pub keys_beside: bool,
    /// Tables that are larger are copied in parts of so many bytes at most; 0 is each in one.
    pub part_bytes: u64,
    /// How rows travel.
    pub format: Format,
    /// maintenance_work_mem of each session that builds indexes, in bytes, where the target's own
    /// is less; 0 leaves it to the target.
    pub maintenance_work_mem: u64,
}

impl Default for Bulk {
    fn default() -> Bulk {
        Bulk {
            bundle_tables: 64,
            freeze: Freeze::default(),
            keys_beside: true,
            part_bytes: copy::PART_BYTES,
            format: Format::default(),
            maintenance_work_mem: PostOptions::MEMORY_BYTES,
        }
    }
}

impl Runner {
    /// Copies what is not yet copied and builds what is not yet built.
    pub(super) async fn copy(&mut self) -> Result<Event> {
        if let Some(event) = self.unbroken(self.spool.is_none()).await? {
            return Ok(event);
        }
        if self.config.options.brought {
            self.capture_forward().await?;
            return self.complete_copy().await;
        }
        let mut tables = self.copied_tables().await?;
        let joined = self.take_in(&mut tables).await?;
        self.capture_forward().await?;
        let progress = Arc::new(CopyProgress::new(&tables));
        self.say(Notice::Copying(progress.clone()));
        let config = self.config.clone();
        let options = copy::Options {
            jobs: config.jobs,
            bundle_tables: config.bulk.bundle_tables,
            freeze: config.bulk.freeze,
            part_bytes: config.bulk.part_bytes,
            format: config.bulk.format,
            async_commit: config.tuning.async_commit,
            shared: config.options.shared,
            ..copy::Options::new(config.source.clone(), config.target.clone(), config.job.as_str())
        };
        loop {
            let (holder, snapshots) = self.snapshot().await?;
            let judged = self.judge(&tables, &snapshots).await;
            let outcome = match judged {
                Ok(()) => copy::run(&options, &tables, &snapshots, &progress).await,
                Err(Error::Copy(error)) => Err(error),
                Err(error) => return Err(error),
            };
            drop(holder);
            match outcome {
                Ok(()) => break,
                Err(error @ (copy::Error::SnapshotLost { .. } | copy::Error::Rewritten { .. })) => {
                    self.say(Notice::Said(error.to_string()))
                }
                Err(error) => return Err(error.into()),
            }
        }
        if joined {
            self.analyze(&tables).await?;
            self.store.forget_newcomers().await?;
            return Ok(Event::CopyDone);
        }
        // Neither needs the other, and there may be nothing but commits to wait for.
        let indexes = self.building(PostPhase::Indexes).await?;
        tokio::try_join!(indexes, self.copy_large_objects())?;
        self.analyze(&tables).await?;
        // Tables read under different snapshots do not fit each other until the stream has passed
        // them; foreign keys have to wait for that.
        let job = self.config.job.as_str();
        if copy::visibility(&mut self.store.session, job).await?.is_empty() {
            self.build_rest().await?;
        }
        Ok(Event::CopyDone)
    }

    /// What has no position in the log and so no seam: unlogged tables, which recovery empties, and
    /// large objects, of which whatever differs is copied.
    async fn complete_copy(&mut self) -> Result<Event> {
        let mut unlogged = self.tables_with_rows(&self.config.source).await?;
        unlogged.retain(|table| table.unlogged && table.kind == TableKind::Plain);
        let (source, target) = (&self.config.source, &self.config.target);
        copy::Again::prepare(source, target, unlogged).await?.run().await?;
        self.copy_large_objects().await?;
        Ok(Event::CopyDone)
    }

    /// The planner would know nothing of the new tables until autovacuum comes by, and applications
    /// may be switched to them before that. As many sessions as copied take the tables by the
    /// handful, largest first.
    async fn analyze(&self, tables: &[Table]) -> Result<()> {
        self.say(Notice::Said("analyzing the target's tables".to_string()));
        let names = analyzed(tables);
        let jobs = self.config.jobs.max(1);
        let count = self.config.bulk.bundle_tables.min(names.len().div_ceil(4 * jobs)).max(1);
        let waiting: VecDeque<Vec<QualifiedName>> =
            names.chunks(count).map(<[QualifiedName]>::to_vec).collect();
        let sessions = jobs.min(waiting.len());
        let waiting = Arc::new(Mutex::new(waiting));
        let mut workers = JoinSet::new();
        for _ in 0..sessions {
            let (target, report) = (self.config.target.clone(), self.report.clone());
            workers.spawn(analyze_waiting(target, waiting.clone(), report));
        }
        while let Some(ended) = workers.join_next().await {
            ended.map_err(|e| Error::State(format!("analyzing: {e}")))??;
        }
        Ok(())
    }

    /// Foreign keys, triggers and the rest; nothing if they are there.
    pub(super) async fn build_rest(&mut self) -> Result<()> {
        self.building(PostPhase::Rest).await?.await
    }

    /// The slot's snapshot while its holder lives, else a fresh one. The holder must be kept.
    async fn snapshot(&mut self) -> Result<(Holder, SnapshotSource)> {
        if let Some(held) = self.slot.take() {
            let source = SnapshotSource::Slot { name: held.snapshot_name.clone() };
            return Ok((Holder::Slot(held), source));
        }
        let session = Session::connect(&self.config.source, Purpose::Sql).await?;
        let fresh = snapshot::export(session).await?;
        let source = SnapshotSource::Fresh {
            name: fresh.name.clone(),
            snapshot: fresh.snapshot.clone(),
            lsn: fresh.lsn,
        };
        Ok((Holder::Fresh(fresh), source))
    }

    /// The schema as it was read when the job was made.
    pub(super) async fn dump(&mut self) -> Result<schema::Dump> {
        let dump = self.store.load_dump().await?;
        let (pre, post) =
            dump.ok_or_else(|| Error::State("the schema dump is gone".to_string()))?;
        Ok(schema::Dump { pre, post })
    }

    /// What builds one half of post-data, by sessions of its own.
    async fn building(
        &mut self,
        phase: PostPhase,
    ) -> Result<impl Future<Output = Result<()>> + use<>> {
        let dump = self.dump().await?;
        let target = self.row().await?.abilities.target;
        let report = self.report.clone();
        let mut progress = move |at: PostProgress<'_>| {
            report(Notice::Building(at.done, at.total, at.statement.to_string()));
        };
        let mut options = PostOptions::new(self.config.job.as_str(), phase);
        options.postponed = target.acting(self.selection.tables_only);
        options.selection = self.selection_by_dump()?;
        options.parallel = self.config.jobs;
        options.bundle = self.config.bulk.bundle_tables;
        options.keys_beside = self.config.bulk.keys_beside;
        options.maintenance_work_mem = self.config.bulk.maintenance_work_mem;
        options.async_commit = self.config.tuning.async_commit;
        let target = self.config.target.clone();
        Ok(async move { Ok(schema::apply_post(&target, &dump, &options, &mut progress).await?) })
    }
}

/// What to name in ANALYZE, largest first: of a partitioned table the parent, which takes its
/// partitions along.
///
/// <https://www.postgresql.org/docs/current/sql-analyze.html>
fn analyzed(tables: &[Table]) -> Vec<QualifiedName> {
    let all: HashSet<&QualifiedName> = tables.iter().map(|table| &table.name).collect();
    let mut named: Vec<&Table> = tables
        .iter()
        .filter(|table| !table.partition_of.as_ref().is_some_and(|parent| all.contains(parent)))
        .collect();
    named.sort_by_key(|table| {
        std::cmp::Reverse((table.kind == TableKind::Partitioned, table.bytes))
    });
    named.into_iter().map(|table| table.written_name().clone()).collect()
}

/// Analyzes handfuls of tables until none waits. A help and no condition: a table that somebody has
/// locked is left to autovacuum.
async fn analyze_waiting(
    target: Config,
    waiting: Arc<Mutex<VecDeque<Vec<QualifiedName>>>>,
    report: Report,
) -> Result<()> {
    let mut session = Session::connect(&target, Purpose::Sql).await?;
    session.execute("set lock_timeout = '1s'").await?;
    let take = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    while let Some(names) = take() {
        // Up to 10 the statement takes one table.
        if session.major_version() > 10 && names.len() > 1 {
            let list: Vec<String> = names.iter().map(QualifiedName::quoted).collect();
            match session.execute(&format!("analyze {}", list.join(", "))).await {
                Ok(_) => continue,
                Err(error) if error.code() == Some("55P03") => {}
                Err(error) => return Err(error.into()),
            }
        }
        for name in names {
            match session.execute(&format!("analyze {}", name.quoted())).await {
                Err(error) if error.code() == Some("55P03") => {
                    report(Notice::Said(format!("{name} is locked, not analyzed")));
                }
                analyzed => {
                    analyzed?;
                }
            }
        }
    }
    Ok(())
}

/// Keeps a snapshot alive.
#[allow(dead_code, reason = "held for its session")]
enum Holder {
    Slot(HeldSlot),
    Fresh(ExportedSnapshot),
}
