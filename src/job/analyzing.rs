//! ANALYZE of the tables that were copied.
//!
//! The planner would know nothing of the new tables until autovacuum comes by, and applications may
//! be switched to them before that. A table is analyzed once it has its indexes, as those on
//! expressions have statistics of their own: while others still get theirs by one session, and what
//! is left then by as many as copied, by the handful, largest first.
//!
//! A help and no condition: a table that somebody has locked is left to autovacuum.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;

use super::config::JobConfig;
use super::run::{Notice, Report};
use super::{Error, Result};
use crate::catalog::{Table, TableKind};
use crate::id::QualifiedName;
use crate::pg::{Config, Purpose, Session};

/// What is to be analyzed.
pub(super) struct Analysis {
    target: Config,
    report: Report,
    /// Sessions at most.
    jobs: usize,
    /// Tables of one statement at most.
    bundle: usize,
    /// Tables still to come, largest first.
    left: Vec<QualifiedName>,
    /// Those that have no partitions to wait for.
    alone: HashSet<QualifiedName>,
}

impl Analysis {
    pub(super) fn new(config: &JobConfig, report: &Report, tables: &[Table]) -> Analysis {
        let plain = tables.iter().filter(|table| table.kind == TableKind::Plain);
        Analysis {
            target: config.target.clone(),
            report: report.clone(),
            jobs: config.jobs.max(1),
            bundle: config.bulk.bundle_tables.max(1),
            left: analyzed(tables),
            alone: plain.map(|table| table.written_name().clone()).collect(),
        }
    }

    /// Analyzes tables that are complete while others are built, until those are; what has come by
    /// then, and what somebody has locked, is left to [`Analysis::finish`].
    pub(super) async fn meanwhile(
        &mut self,
        mut complete: UnboundedReceiver<QualifiedName>,
    ) -> Result<()> {
        if complete.is_closed() {
            return Ok(());
        }
        // At once: the first table that is complete may be the last but one.
        let mut session = connect(&self.target).await?;
        let mut names = Vec::new();
        while complete.recv_many(&mut names, self.bundle).await > 0 && !complete.is_closed() {
            names.retain(|name| self.alone.contains(name) && self.left.contains(name));
            let locked = analyze(&mut session, &names).await?;
            self.left.retain(|name| !names.contains(name) || locked.contains(name));
            names.clear();
        }
        Ok(())
    }

    /// Analyzes what is left.
    pub(super) async fn finish(&mut self) -> Result<()> {
        if self.left.is_empty() {
            return Ok(());
        }
        (self.report)(Notice::Said("analyzing the target's tables".to_string()));
        let names = std::mem::take(&mut self.left);
        let count = self.bundle.min(names.len().div_ceil(4 * self.jobs)).max(1);
        let waiting: VecDeque<Vec<QualifiedName>> =
            names.chunks(count).map(<[QualifiedName]>::to_vec).collect();
        let sessions = self.jobs.min(waiting.len());
        let waiting = Arc::new(Mutex::new(waiting));
        let mut workers = JoinSet::new();
        for _ in 0..sessions {
            let (target, report) = (self.target.clone(), self.report.clone());
            workers.spawn(analyze_waiting(target, waiting.clone(), report));
        }
        while let Some(ended) = workers.join_next().await {
            ended.map_err(|e| Error::State(format!("analyzing: {e}")))??;
        }
        Ok(())
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

async fn connect(target: &Config) -> Result<Session> {
    let mut session = Session::connect(target, Purpose::Sql).await?;
    session.execute("set lock_timeout = '1s'").await?;
    Ok(session)
}

/// Analyzes handfuls of tables until none waits.
async fn analyze_waiting(
    target: Config,
    waiting: Arc<Mutex<VecDeque<Vec<QualifiedName>>>>,
    report: Report,
) -> Result<()> {
    let mut session = connect(&target).await?;
    let take = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    while let Some(names) = take() {
        for name in analyze(&mut session, &names).await? {
            report(Notice::Said(format!("{name} is locked, not analyzed")));
        }
    }
    Ok(())
}

/// Gives those that somebody has locked.
async fn analyze(session: &mut Session, names: &[QualifiedName]) -> Result<Vec<QualifiedName>> {
    // Up to 10 the statement takes one table.
    if session.major_version() > 10 && names.len() > 1 {
        let list: Vec<String> = names.iter().map(QualifiedName::quoted).collect();
        match session.execute(&format!("analyze {}", list.join(", "))).await {
            Ok(_) => return Ok(Vec::new()),
            Err(error) if error.code() == Some("55P03") => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut locked = Vec::new();
    for name in names {
        match session.execute(&format!("analyze {}", name.quoted())).await {
            Err(error) if error.code() == Some("55P03") => locked.push(name.clone()),
            analyzed => {
                analyzed?;
            }
        }
    }
    Ok(locked)
}
