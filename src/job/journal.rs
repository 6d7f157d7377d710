//! The journal of a flip, in the home database.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::Error;
use super::state::Phase;
use super::store::{FlipRecord, Store};
use crate::cutover::{self, Journal, Step};
use crate::lsn::Lsn;

/// The journal in the home database.
pub(super) struct HomeJournal<'a> {
    store: &'a mut Store,
    record: FlipRecord,
    phase: Phase,
    /// The lines of steps that are not known to be done, by their names.
    lines: HashMap<String, String>,
    open: Arc<AtomicBool>,
}

impl<'a> HomeJournal<'a> {
    /// Of this flip, which leads to `phase`; `open` is set once the reverse stream is to apply what
    /// it reads.
    pub(super) fn new(
        store: &'a mut Store,
        record: FlipRecord,
        phase: Phase,
        open: Arc<AtomicBool>,
    ) -> HomeJournal<'a> {
        HomeJournal { store, record, phase, lines: HashMap::new(), open }
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
        if steps.contains(&"switch") && self.phase == Phase::Switched {
            // A hook may let clients through as soon as it flips: what they write on the target
            // from here on is the application's, and flows back.
            self.open.store(true, Ordering::SeqCst);
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
        self.store.set_phase_and_flip(self.phase, &self.record).await.map_err(journal_error)?;
        self.open.store(self.phase == Phase::Switched, Ordering::SeqCst);
        Ok(())
    }

    async fn released(&mut self) -> cutover::Result<()> {
        self.record.released = true;
        self.store.set_flip(&self.record).await.map_err(journal_error)
    }
}
