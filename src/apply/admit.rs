//! Which changes of a batch are written, decided and counted once, whatever order they are then
//! written in.

use std::sync::Arc;

use super::batch::Batch;
use super::error::{Error, Result};
use super::parking::Kept;
use super::routing::{Route, Routes};
use super::statement::Locator;
use super::{MESSAGE_PREFIX, Message};
use crate::change::{Begin, Change, Chunk, Relation, Snapshot};

/// Something to write.
#[derive(Debug)]
pub(super) enum Step {
    /// One INSERT, UPDATE or DELETE: its chunk and change in the batch.
    Row(usize, usize),
    /// One TRUNCATE, and which of its tables are meant.
    Truncate(usize, usize, Vec<Arc<Relation>>),
}

/// What a batch comes to.
#[derive(Debug, Default)]
pub(super) struct Admitted {
    /// In the order of the stream.
    pub steps: Vec<Step>,
    /// Messages that are handed on once their transaction is committed.
    pub messages: Vec<Message>,
    /// A trigger or rule on one of the tables may look at the order of changes.
    pub acts: bool,
    /// Sequences are restarted with tables that are emptied.
    pub restarts: bool,
    /// Updates and deletes of tables that are searched whole for each.
    pub searches: usize,
    /// Changes of parked tables.
    pub kept: Vec<Kept>,
    /// By chunk, the place of its first change in its transaction.
    firsts: Vec<u64>,
}

impl Step {
    /// Chunk and change of the step.
    pub fn of<'a>(&self, batch: &'a Batch) -> Option<(&'a Chunk, &'a Change)> {
        let (Step::Row(chunk, change) | Step::Truncate(chunk, change, _)) = self;
        let chunk = batch.chunks.get(*chunk)?;
        Some((chunk, chunk.changes.get(*change)?))
    }

    /// Its change's place in its transaction.
    pub fn ordinal(&self, admitted: &Admitted) -> u64 {
        let (Step::Row(chunk, change) | Step::Truncate(chunk, change, _)) = self;
        admitted.firsts.get(*chunk).map_or(0, |first| first + *change as u64)
    }
}

impl Admitted {
    /// Nothing but rows is written.
    pub fn is_rows_only(&self) -> bool {
        self.steps.iter().all(|step| matches!(step, Step::Row(..)))
    }
}

/// Counts every change of the batch, and gives those to be written. Every relation must have its
/// route.
pub(super) fn admit(routes: &mut Routes, batch: &Batch) -> Result<Admitted> {
    let mut admitted = Admitted::default();
    for (chunk_at, chunk) in batch.chunks.iter().enumerate() {
        admitted.firsts.push(routes.parks.chunk(chunk.number, chunk.changes.len()));
        for (change_at, change) in chunk.changes.iter().enumerate() {
            match change {
                Change::Message { lsn, prefix, content, .. }
                    if prefix.starts_with(MESSAGE_PREFIX) =>
                {
                    let (prefix, content) = (prefix.clone(), content.clone());
                    admitted.messages.push(Message { prefix, content, lsn: *lsn });
                }
                Change::Message { .. } => {}
                Change::Truncate { relations, .. } => {
                    let at = (chunk_at, change_at);
                    let written = admitted.truncated(routes, &chunk.begin, relations, at);
                    if !written.is_empty() {
                        admitted.restarts |= change.restarts();
                        admitted.steps.push(Step::Truncate(chunk_at, change_at, written));
                    }
                }
                _ if admitted.row(routes, &chunk.begin, change, (chunk_at, change_at))? => {
                    admitted.steps.push(Step::Row(chunk_at, change_at));
                }
                _ => {}
            }
        }
    }
    Ok(admitted)
}

impl Admitted {
    fn row(
        &mut self,
        routes: &mut Routes,
        begin: &Begin,
        change: &Change,
        at: (usize, usize),
    ) -> Result<bool> {
        let Some(relation) = change.relations().first() else {
            return Err(Error::Broken("a row of no table".to_string()));
        };
        let kept = self.keeps(routes, begin, relation, at);
        let shut = routes.is_shut(relation);
        let Some(route) = routes.get_mut(relation) else {
            return Err(Error::Broken("a change without a route".to_string()));
        };
        match count(route, begin, shut, kept.is_some()) {
            Fate::Filtered => return Ok(false),
            Fate::Kept => {
                self.kept.extend(kept);
                return Ok(false);
            }
            Fate::Written => {}
        }
        if let Some(mapping) = &route.mapping {
            self.acts |= mapping.table.acts;
            let searches =
                mapping.locator == Locator::Whole && !matches!(change, Change::Insert { .. });
            self.searches += usize::from(searches);
        }
        Ok(true)
    }

    /// Those tables that are neither outside the job nor newer on the target, nor parked.
    fn truncated(
        &mut self,
        routes: &mut Routes,
        begin: &Begin,
        relations: &[Arc<Relation>],
        at: (usize, usize),
    ) -> Vec<Arc<Relation>> {
        let mut written = Vec::new();
        for relation in relations {
            let kept = self.keeps(routes, begin, relation, at);
            let shut = routes.is_shut(relation);
            let Some(route) = routes.get_mut(relation) else { continue };
            match count(route, begin, shut, kept.is_some()) {
                Fate::Written if !written.contains(relation) => written.push(relation.clone()),
                Fate::Kept => self.kept.extend(kept),
                Fate::Written | Fate::Filtered => {}
            }
        }
        written
    }

    /// The change as it is kept, if its table is parked.
    fn keeps(
        &self,
        routes: &mut Routes,
        begin: &Begin,
        relation: &Arc<Relation>,
        at: (usize, usize),
    ) -> Option<Kept> {
        if routes.parks.is_empty() {
            return None;
        }
        let ordinal = self.firsts.last().map_or(0, |first| first + at.1 as u64);
        let keeps = routes.parks.keeps(&relation.name, begin.xid, ordinal);
        keeps.then(|| Kept { at, relation: relation.clone(), ordinal })
    }
}

/// What becomes of a change.
enum Fate {
    Written,
    Filtered,
    Kept,
}

/// Counts a change of the route's table, which is `parked` or not.
fn count(route: &mut Route, begin: &Begin, shut: bool, parked: bool) -> Fate {
    route.counts.decoded += 1;
    let seen =
        |(snapshot, lsn): &(Snapshot, _)| begin.commit_lsn < *lsn && snapshot.sees(begin.xid);
    let copied = route.copied.as_ref().is_some_and(seen);
    if shut || copied || (route.mapping.is_none() && !parked) {
        route.counts.filtered += 1;
        return Fate::Filtered;
    }
    if parked {
        route.counts.quarantined += 1;
        return Fate::Kept;
    }
    route.counts.applied += 1;
    Fate::Written
}
