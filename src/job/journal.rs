//! The journal of a flip, in the home database.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::request::stream_of;
use super::state::Phase;
use super::store::{FlipRecord, JournalLine, Store, json};
use super::{Error, Result};
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

impl Store {
    /// Writes steps of a flip down before they are done; gives the lines' ids in their order.
    /// `done` are lines of steps that have ended, and their milliseconds: one commit for all.
    pub async fn journal_begin(
        &mut self,
        flip: &FlipRecord,
        steps: &[&str],
        done: &[(String, f64)],
    ) -> Result<Vec<String>> {
        let job = self.job().to_string();
        let (steps, (lines, ms)) = (json(&steps)?, columns(done)?);
        let rows = self
            .session
            .query_params(
                &format!(
                    "with {ENDED} \
                     insert into walferry.journal (job, attempt, flip, step) \
                     select $3, $4, $5, s.step \
                     from pg_catalog.jsonb_array_elements_text($6::jsonb) \
                     with ordinality s(step, place) order by s.place returning id"
                ),
                &[
                    Some(&lines),
                    Some(&ms),
                    Some(&job),
                    Some(&flip.attempt),
                    Some(&flip.flip),
                    Some(&steps),
                ],
            )
            .await?;
        rows.iter().map(|row| Ok(row.string(0)?)).collect()
    }

    /// Writes down that they are done.
    pub async fn journal_end(&mut self, done: &[(String, f64)]) -> Result<()> {
        if done.is_empty() {
            return Ok(());
        }
        let (lines, ms) = columns(done)?;
        let sql = format!("with {ENDED} select 1");
        self.session.query_params(&sql, &[Some(&lines), Some(&ms)]).await?;
        Ok(())
    }

    /// The lines of one attempt, oldest first.
    pub async fn journal(&mut self, attempt: &str) -> Result<Vec<JournalLine>> {
        let job = self.job().to_string();
        let rows = self
            .session
            .query_params(
                "select step, ms from walferry.journal where job = $1 and attempt = $2 order by id",
                &[Some(&job), Some(attempt)],
            )
            .await?;
        rows.iter()
            .map(|row| Ok(JournalLine { step: row.string(0)?, ms: row.parse_opt(1)? }))
            .collect()
    }
}

/// Of lines and their milliseconds, JSON arrays: says of each line how long its step took.
const ENDED: &str = "ended as (update walferry.journal j set ms = d.ms::float8 \
     from (select l.line, m.ms from pg_catalog.jsonb_array_elements_text($1::jsonb) \
        with ordinality l(line, place) join pg_catalog.jsonb_array_elements_text($2::jsonb) \
        with ordinality m(ms, place) using (place)) d where j.id = d.line::int8)";

/// The two arrays of [`ENDED`].
fn columns(done: &[(String, f64)]) -> Result<(String, String)> {
    let lines: Vec<&str> = done.iter().map(|(line, _)| line.as_str()).collect();
    let ms: Vec<String> = done.iter().map(|(_, ms)| format!("{ms:.3}")).collect();
    Ok((json(&lines)?, json(&ms)?))
}
