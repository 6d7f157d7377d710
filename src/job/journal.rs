//! The journal of a flip, in the home database.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::Error;
use super::request::stream_of;
use super::state::Phase;
use super::store::{FlipRecord, Store};
use crate::apply::{Gate, Open};
use crate::cutover::{self, Journal, Step};
use crate::id::Stream;
use crate::lsn::Lsn;

/// The journal in the home database.
pub(super) struct HomeJournal<'a> {
    store: &'a mut Store,
    record: FlipRecord,
    phase: Phase,
    /// The lines of steps that are not known to be done, by their names.
    lines: HashMap<String, String>,
    gate: Arc<Gate>,
}

impl<'a> HomeJournal<'a> {
    /// Of this flip, which leads to `phase`; `gate` is opened once the reverse stream is to apply
    /// what it reads.
    pub(super) fn new(
        store: &'a mut Store,
        record: FlipRecord,
        phase: Phase,
        gate: Arc<Gate>,
    ) -> HomeJournal<'a> {
        HomeJournal { store, record, phase, lines: HashMap::new(), gate }
    }

    fn is_forward(&self) -> bool {
        stream_of(&self.record.flip) == Stream::Forward
    }

    fn turn(&self, open: bool) {
        let group = self.record.group.as_ref();
        self.gate.turn(group.map(|group| group.tables.as_slice()), open);
    }

    /// Lines of steps that are known to be done now, with their milliseconds.
    fn done(&mut self, steps: &[Step]) -> Vec<(String, f64)> {
        let lines = steps.iter().filter_map(|s| Some((self.lines.remove(&s.name)?, s.ms)));
        lines.collect()
    }
}

fn journal_error(error: Error) -> cutover::Error {
    cutover::Error::Journal(error.to_string())
}

impl Journal for HomeJournal<'_> {
    async fn begin(&mut self, steps: &[&str], done: &[Step]) -> cutover::Result<()> {
        if steps.contains(&"switch") && self.is_forward() {
            // A hook may let clients through as soon as it flips: what they write on the target
            // from here on is the application's, and flows back.
            self.turn(true);
        }
        let done = self.done(done);
        let begun = self.store.journal_begin(&self.record, steps, &done).await;
        let begun = begun.map_err(journal_error)?;
        self.lines.extend(steps.iter().map(ToString::to_string).zip(begun));
        Ok(())
    }

    async fn end(&mut self, done: &[Step]) -> cutover::Result<()> {
        let done = self.done(done);
        self.store.journal_end(&done).await.map_err(journal_error)
    }

    async fn point_of_no_return(&mut self, lsn: Lsn, held: Duration) -> cutover::Result<()> {
        self.record.switched_lsn = Some(lsn.to_string());
        self.record.fenced_ms = Some(held.as_secs_f64() * 1e3);
        self.store.pass(self.phase, &self.record).await.map_err(journal_error)?;
        match self.phase {
            Phase::Switched => self.gate.set(Open::Everything),
            Phase::RolledBack => self.gate.set(Open::Nothing),
            _ => self.turn(self.is_forward()),
        }
        Ok(())
    }

    async fn released(&mut self) -> cutover::Result<()> {
        self.record.released = true;
        self.store.set_flip(&self.record).await.map_err(journal_error)
    }
}
