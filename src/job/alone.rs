//! Jobs of tables alone, beside whatever else their databases have: shards of a cluster.
//!
//! They differ from jobs of whole databases in what is around the tables. Where those are shards of
//! a Citus cluster, every session has to ask for a look at them. And at the end the old side's
//! tables cannot stay where they are, in the middle of a database that is in use: they go to the
//! recycle bin.

use super::state::{Event, Phase};
use super::store::JobRow;
use super::{Error, JobConfig, Result, recycle};
use crate::catalog;
use crate::cluster::shard;
use crate::id::{QualifiedName, Stream};
use crate::pg::Session;
use crate::schema;

impl JobConfig {
    /// The same with both ends as sessions have to be made there: where the tables are shards of a
    /// Citus cluster, it would hide them. Some short sessions; none for jobs of whole databases.
    ///
    /// # Errors
    /// Where Citus captures changes of shards under their table's name.
    pub async fn reaching_shards(mut self) -> Result<JobConfig> {
        if self.options.tables_only {
            let sides = [&mut self.source, &mut self.target];
            for side in sides.into_iter().chain(&mut self.decode_from) {
                if shard::is_captured(side).await? {
                    return Err(Error::ShardsCaptured { side: side.label.clone() });
                }
                *side = shard::reach(side).await?;
            }
        }
        Ok(self)
    }

    /// The side from which a job of tables alone goes away when it ends, as the stream that reads
    /// it: forward for the source. None where nothing was switched, or whole databases are moved.
    pub(super) fn left_side(&self, row: &JobRow, event: Event) -> Option<Stream> {
        if !self.options.tables_only || event != Event::FinishAsked {
            return None;
        }
        let last = row.flip.as_ref();
        let is_on_target = match row.phase {
            Phase::Switched => true,
            Phase::RolledBack => false,
            // A finish that was cut short, perhaps of a job that was split.
            _ if last.is_some_and(|f| f.group.is_some()) => return None,
            // The last switch tells, unless it was undone.
            _ => last.is_some_and(|f| (f.flip == "forward") == f.switched_lsn.is_some()),
        };
        Some(if is_on_target { Stream::Forward } else { Stream::Reverse })
    }

    /// The target's database is in use by others: the job is about tables alone, or about a group
    /// of a cluster's tables.
    pub(super) fn is_beside_others(&self) -> bool {
        self.options.tables_only || (self.bin.is_some() && !self.options.include.is_empty())
    }

    /// Drops the tables that the job made on its target; `source` knows their partitions best. That
    /// it made them is noted in the transaction that did, and goes with them, so that tables which
    /// were there before never go. Gives their names.
    ///
    /// # Errors
    /// Where others' objects depend on them.
    pub(super) async fn drop_made(
        &self,
        source: Option<&mut Session>,
        home: &mut Session,
    ) -> Result<Vec<QualifiedName>> {
        let job = self.job.as_str();
        if !schema::is_made(home, job).await? {
            return Ok(Vec::new());
        }
        let selection = match source {
            Some(source) => self.options.selection(source).await?,
            None => self.options.selection(home).await?,
        };
        let tables = catalog::tables(home, &selection).await?;
        let names: Vec<_> = tables.into_iter().map(|table| table.name).collect();
        schema::drop_made(home, job, &names).await?;
        Ok(names)
    }

    /// Puts the job's tables that are on this side into its recycle bin. Says which, if there were
    /// any.
    pub(super) async fn recycle(&self, session: &mut Session) -> Result<Option<String>> {
        let selection = self.options.selection(session).await?;
        let tables = catalog::tables(session, &selection).await?;
        let names: Vec<_> = tables.into_iter().map(|table| table.name).collect();
        let job = self.job.as_str();
        let bin = self.bin.as_deref().unwrap_or(job);
        let count = recycle::put(session, bin, job, &names).await?;
        let peer = session.peer();
        Ok((count > 0).then(|| format!("{count} tables on {peer} to walferry_recycle_{bin}")))
    }
}
