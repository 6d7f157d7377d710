//! Rows, then indexes and constraints.
//!
//! All tables are read under one snapshot while the slot's lives, otherwise what is not finished is
//! read under a fresh one, whose visibility the applier then respects. Foreign keys and the rest
//! come once the target is consistent, which it is at once where all tables share one snapshot.

use std::sync::Arc;

use super::run::{Notice, Runner};
use super::state::Event;
use super::{Error, Result};
use crate::catalog::Table;
use crate::copy::{self, CopyProgress, SnapshotSource};
use crate::pg::{Purpose, Session};
use crate::schema::{self, PostOptions, PostPhase, PostProgress};
use crate::source::{ExportedSnapshot, HeldSlot, snapshot};

impl Runner {
    /// Copies what is not yet copied and builds what is not yet built.
    pub(super) async fn copy(&mut self) -> Result<Event> {
        self.capture_forward().await?;
        let tables = self.tables_with_rows(&self.config.source).await?;
        let progress = Arc::new(CopyProgress::new(&tables));
        self.say(Notice::Copying(progress.clone()));
        let (config, job) = (&self.config, self.config.job.as_str());
        let options = copy::Options {
            jobs: config.jobs,
            ..copy::Options::new(config.source.clone(), config.target.clone(), job)
        };
        loop {
            let (holder, snapshots) = self.snapshot().await?;
            let outcome = copy::run(&options, &tables, &snapshots, &progress).await;
            drop(holder);
            match outcome {
                Ok(()) => break,
                Err(error @ (copy::Error::SnapshotLost { .. } | copy::Error::Rewritten { .. })) => {
                    self.say(Notice::Said(error.to_string()))
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.copy_large_objects().await?;
        self.build(PostPhase::Indexes).await?;
        self.analyze(&tables).await?;
        // Tables read under different snapshots do not fit each other until the stream has passed
        // them; foreign keys have to wait for that.
        let job = self.config.job.as_str();
        if copy::visibility(&mut self.store.session, job).await?.is_empty() {
            self.build_rest().await?;
        }
        Ok(Event::CopyDone)
    }

    /// The planner would know nothing of the new tables until autovacuum comes by, and applications
    /// may be switched to them before that.
    async fn analyze(&self, tables: &[Table]) -> Result<()> {
        self.say(Notice::Said("analyzing the target's tables".to_string()));
        let mut session = Session::connect(&self.config.target, Purpose::Sql).await?;
        // A help and no condition: a table that somebody has locked is left to autovacuum.
        session.execute("set lock_timeout = '1s'").await?;
        for table in tables {
            match session.execute(&format!("analyze {}", table.name.quoted())).await {
                Err(error) if error.code() == Some("55P03") => {
                    self.say(Notice::Said(format!("{} is locked, not analyzed", table.name)));
                }
                analyzed => {
                    analyzed?;
                }
            }
        }
        Ok(())
    }

    /// Foreign keys, triggers and the rest; nothing if they are there.
    pub(super) async fn build_rest(&mut self) -> Result<()> {
        self.build(PostPhase::Rest).await
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

    async fn build(&mut self, phase: PostPhase) -> Result<()> {
        let dump = self.dump().await?;
        let postpone_acting = !self.row().await?.abilities.target.replica_role;
        let report = self.report.clone();
        let mut progress = move |at: PostProgress<'_>| {
            report(Notice::Building(at.done, at.total, at.statement.to_string()));
        };
        let options = PostOptions {
            job: self.config.job.to_string(),
            phase,
            postpone_acting,
            parallel: self.config.jobs,
            maintenance_work_mem: None,
        };
        schema::apply_post(&self.config.target, &dump, &options, &mut progress).await?;
        Ok(())
    }
}

/// Keeps a snapshot alive.
#[allow(dead_code, reason = "held for its session")]
enum Holder {
    Slot(HeldSlot),
    Fresh(ExportedSnapshot),
}
