//! Rows, then indexes and constraints, or indexes beside rows (see [`super::building`]).
//!
//! All tables are read under one snapshot while the slot's lives, otherwise what is not finished is
//! read under a fresh one, whose visibility the applier then respects. Foreign keys and the rest
//! come once the target is consistent, which it is at once where all tables share one snapshot.

use std::sync::Arc;

use super::analyzing::Analysis;
use super::run::{Notice, Runner};
use super::state::Event;
use super::{Error, Result};
use crate::catalog::{Table, TableKind};
use crate::copy::{self, CopyProgress, Format, Freeze, SnapshotSource};
use crate::pg::{Purpose, Session};
use crate::schema::{self, PostOptions, PostPhase};
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
    /// Indexes of a table that is copied are built while others are copied.
    pub indexes_beside_copy: bool,
    /// A table that has its indexes is analyzed while others get theirs.
    pub analyze_beside: bool,
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
            indexes_beside_copy: false,
            analyze_beside: true,
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
        let mut analysis = Analysis::new(&self.config, &self.report, &tables);
        if joined {
            self.copy_rows(&tables, &progress).await?;
            analysis.finish().await?;
            self.store.forget_newcomers().await?;
            return Ok(Event::CopyDone);
        }
        self.copy_and_build(&tables, &progress, &mut analysis).await?;
        analysis.finish().await?;
        // Tables read under different snapshots do not fit each other until the stream has passed
        // them; foreign keys have to wait for that.
        let job = self.config.job.as_str();
        if copy::visibility(&mut self.store.session, job).await?.is_empty() {
            self.build_rest().await?;
        }
        Ok(Event::CopyDone)
    }

    /// Copies rows, under fresh snapshots where one is of no use any more, until all are there.
    pub(super) async fn copy_rows(
        &mut self,
        tables: &[Table],
        progress: &CopyProgress,
    ) -> Result<()> {
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
            let judged = self.judge(tables, &snapshots).await;
            let outcome = match judged {
                Ok(()) => copy::run(&options, tables, &snapshots, progress).await,
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
        self.say(Notice::Copied);
        Ok(())
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

    /// Foreign keys, triggers and the rest; nothing if they are there.
    pub(super) async fn build_rest(&mut self) -> Result<()> {
        self.building(PostPhase::Rest, None, None).await?.await
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
}

/// Keeps a snapshot alive.
#[allow(dead_code, reason = "held for its session")]
enum Holder {
    Slot(HeldSlot),
    Fresh(ExportedSnapshot),
}
