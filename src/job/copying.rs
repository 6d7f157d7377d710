//! Rows, then indexes and constraints.
//!
//! All tables are read under one snapshot while the slot's lives, otherwise what is not finished is
//! read under a fresh one, whose visibility the applier then respects. Foreign keys and the rest come
//! once the target is consistent, which it is at once where all tables share one snapshot.

use std::sync::Arc;

use super::run::{Notice, Runner};
use super::state::Event;
use super::{Error, Result};
use crate::copy::{self, CopyProgress, SnapshotSource};
use crate::pg::{Purpose, Session};
use crate::schema::{self, PostPhase};
use crate::source::snapshot;

impl Runner {
    /// Copies what is not yet copied and builds what is not yet built.
    pub(super) async fn copy(&mut self) -> Result<Event> {
        let tables = self.tables(&self.config.source).await?;
        let progress = Arc::new(CopyProgress::default());
        self.say(Notice::Copying(progress.clone()));
        loop {
            let (holder, snapshots) = self.snapshot().await?;
            let options = copy::Options {
                source: self.config.source.clone(),
                target: self.config.target.clone(),
                job: self.config.job.to_string(),
                jobs: self.config.jobs,
                split_bytes: self.config.split_bytes,
                ..copy::Options::default()
            };
            let outcome = copy::run(&options, &tables, &snapshots, &progress).await;
            drop(holder);
            match outcome {
                Ok(()) => break,
                Err(copy::Error::SnapshotLost { .. }) => {
                    self.say(Notice::Said("the snapshot was lost, taking another".to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.build(PostPhase::Indexes).await?;
        self.build(PostPhase::Rest).await?;
        Ok(Event::CopyDone)
    }

    /// The slot's snapshot while its holder lives, else a fresh one. The session must be kept.
    async fn snapshot(&mut self) -> Result<(Session, SnapshotSource)> {
        if let (Some(holder), Some(name)) = (self.slot_holder.take(), self.slot_snapshot.take()) {
            return Ok((holder, SnapshotSource::Slot { name }));
        }
        let session = Session::connect(&self.config.source, Purpose::Sql).await?;
        let fresh = snapshot::export(session).await?;
        let source =
            SnapshotSource::Fresh { name: fresh.name, snapshot: fresh.snapshot, lsn: fresh.lsn };
        Ok((fresh.session, source))
    }

    async fn build(&mut self, phase: PostPhase) -> Result<()> {
        let dump = self.store.load_dump().await?;
        let (pre, post) =
            dump.ok_or_else(|| Error::State("the schema dump is gone".to_string()))?;
        let report = self.report.clone();
        let progress = move |done: usize, total: usize, statement: &str| {
            report(Notice::Building(done, total, statement.to_string()));
        };
        schema::apply_post(
            &self.config.target,
            &schema::Dump { pre, post },
            phase,
            self.config.job.as_str(),
            self.config.jobs,
            &progress,
        )
        .await?;
        Ok(())
    }
}
