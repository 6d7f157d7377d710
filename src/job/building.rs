//! Indexes and constraints, and indexes beside the copy.
//!
//! The last index is what a copy ends with, and cores are idle while one alone is built. So where
//! `indexes-beside-copy` says so, a table gets its indexes once it is copied, while others still
//! are: by half as many sessions as copy, and by as many once that is done. Not by default: where
//! both servers share the cores that COPY fills, what an index gets the copy loses, and its
//! snapshot lives longer (figures in bench/README.md).
//!
//! A table is ready when `walferry.table_copy` says that all of its parts are there and fit each
//! other ([`copy::whole`]): a copy that goes on under a fresh snapshot, in this run or the next,
//! leaves it as it is. Only partitions that are published as their root may have to be read again
//! for their siblings' sake, and so they wait for the end of the copy. So does whatever locks out
//! readers, as keys of small tables do.
//!
//! An error of one side ends the other. What the copy has done stays done, and so does what is
//! built: the next run goes on with what is left of both. Which keys become indexes first is
//! decided anew then, and those that were begun so are ended so.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;

use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::sync::watch;

use super::analyzing::Analysis;
use super::config::JobConfig;
use super::run::{Notice, Runner};
use super::{Error, Result};
use crate::catalog::{Table, TableKind};
use crate::copy::{self, CopyProgress};
use crate::id::QualifiedName;
use crate::pg::{Config, Purpose, Session};
use crate::schema::{self, Beside, Copied, PostOptions, PostPhase, PostProgress};

impl JobConfig {
    /// Sessions that build indexes beside the copy. None where others copy into the same tables, as
    /// no table is known to be there wholly.
    pub(super) fn jobs_beside_copy(&self) -> usize {
        let beside = self.bulk.indexes_beside_copy && !self.options.shared;
        if beside { (self.jobs / 2).max(1) } else { 0 }
    }
}

impl Runner {
    /// Copies rows, and builds indexes then or meanwhile; what is left of them beside large objects
    /// and the analysis of what is complete.
    pub(super) async fn copy_and_build(
        &mut self,
        tables: &[Table],
        progress: &CopyProgress,
        analysis: &mut Analysis,
    ) -> Result<()> {
        let (complete, completed) = mpsc::unbounded_channel();
        let complete = self.config.bulk.analyze_beside.then_some(complete);
        let jobs = self.config.jobs_beside_copy();
        if jobs == 0 {
            self.copy_rows(tables, progress).await?;
            let indexes = self.building(PostPhase::Indexes, None, complete).await?;
            let analyzing = analysis.meanwhile(completed);
            tokio::try_join!(indexes, analyzing, self.copy_large_objects())?;
            return Ok(());
        }
        let (copied, copying) = watch::channel(Copied::default());
        let beside = Beside { copied: copying, bytes: heap_bytes(tables), parallel: jobs };
        let indexes = self.building(PostPhase::Indexes, Some(beside), complete).await?;
        let building = async { tokio::try_join!(indexes, analysis.meanwhile(completed)) };
        tokio::pin!(building);
        let (target, job) = (self.config.target.clone(), self.config.job.clone());
        let copying = async {
            tokio::select! {
                outcome = self.copy_rows(tables, progress) => outcome,
                failed = tell_ready(&target, job.as_str(), tables, progress, &copied) => {
                    failed.map(|never| match never {})
                }
            }
        };
        let outcome = tokio::select! {
            outcome = copying => outcome,
            built = &mut building => {
                let early = || Error::State("indexes came before their rows".to_string());
                return Err(built.err().unwrap_or_else(early));
            }
        };
        if let Err(error) = outcome {
            drop(copied);
            // Cancels what is being built, and has nothing else to tell.
            let _ = building.await;
            return Err(error);
        }
        copied.send_modify(|copied| copied.all = true);
        tokio::try_join!(building, self.copy_large_objects())?;
        Ok(())
    }

    /// What builds one half of post-data, by sessions of its own. Names tables that are complete.
    pub(super) async fn building(
        &mut self,
        phase: PostPhase,
        beside: Option<Beside>,
        complete: Option<UnboundedSender<QualifiedName>>,
    ) -> Result<impl Future<Output = Result<()>> + use<>> {
        let dump = self.dump().await?;
        let target = self.row().await?.abilities.target;
        let report = self.report.clone();
        let mut progress = move |at: PostProgress<'_>| {
            report(Notice::Building(at.done, at.total, at.statement.to_string()));
            if let Some(complete) = &complete {
                // Nobody listens where the analysis has failed, which ends this too.
                at.complete.iter().for_each(|table| drop(complete.send(table.clone())));
            }
        };
        let mut options = PostOptions::new(self.config.job.as_str(), phase);
        options.postponed = target.acting(self.selection.tables_only);
        options.selection = self.selection_by_dump()?;
        options.parallel = self.config.jobs;
        options.bundle = self.config.bulk.bundle_tables;
        options.keys_beside = self.config.bulk.keys_beside;
        options.maintenance_work_mem = self.config.bulk.maintenance_work_mem;
        options.async_commit = self.config.tuning.async_commit;
        options.beside = beside;
        let target = self.config.target.clone();
        Ok(async move { Ok(schema::apply_post(&target, &dump, &options, &mut progress).await?) })
    }
}

/// Sizes of what is copied, by names on the target.
fn heap_bytes(tables: &[Table]) -> HashMap<QualifiedName, u64> {
    let plain = tables.iter().filter(|table| table.kind == TableKind::Plain);
    plain.map(|table| (table.written_name().clone(), copy::heap_bytes(table))).collect()
}

/// Says which tables are ready, until it is dropped.
async fn tell_ready(
    target: &Config,
    job: &str,
    tables: &[Table],
    progress: &CopyProgress,
    copied: &watch::Sender<Copied>,
) -> Result<Infallible> {
    let mut changes = progress.whole();
    let mut session = Session::connect(target, Purpose::Sql).await?;
    loop {
        if changes.changed().await.is_err() {
            return Err(Error::State("the copy's counters are gone".to_string()));
        }
        let ready = ready(tables, &copy::whole(&mut session, job).await?);
        copied.send_if_modified(|copied| {
            let more = copied.tables != ready;
            copied.tables = ready;
            more
        });
    }
}

/// Tables, by names on the target, that nothing is written to any more.
fn ready(tables: &[Table], whole: &HashSet<QualifiedName>) -> HashSet<QualifiedName> {
    let plain = || tables.iter().filter(|table| table.kind == TableKind::Plain);
    let waits = |table: &&Table| table.published.under.is_some() || !whole.contains(&table.name);
    let waiting: HashSet<&QualifiedName> = plain().filter(waits).map(Table::written_name).collect();
    plain().map(Table::written_name).filter(|name| !waiting.contains(name)).cloned().collect()
}
