//! Every statement sent to every node, for `walferry cluster log`.
//!
//! Sessions tell it of their statements as they are answered; the runner writes what is new with
//! each of its turns. A statement that comes again and again (positions are asked twice a second)
//! is one line with a count, and the times of its first and last: the log stays readable, and a
//! task's share of it fixed. A runner that is killed loses what its last turn had not written yet,
//! half a second.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use crate::clock::PgTimestamp;
use crate::job::Result;
use crate::pg::{Heard, Session, Witness};
use crate::secret::redact;

pub(super) const DDL: &str = "
create table if not exists walferry.cluster_log (
    job bigint not null references walferry.cluster_job on delete cascade, line text not null,
    task int not null, node text not null, sql text not null, error text, times bigint not null,
    first_at timestamptz not null, last_at timestamptz not null, ms float8 not null,
    primary key (job, line));
";

/// Counts of lines that are written already are written again this often.
const COUNTS_EVERY: Duration = Duration::from_secs(10);

/// Lines that are remembered so that their repetitions are counted; beyond, they begin anew.
const LINES_MAX: usize = 20_000;

/// Characters of a statement that are kept: a schema may be megabytes.
const SQL_CHARS: usize = 10_000;

/// What is said of a statement once.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    task: u32,
    node: String,
    sql: String,
    error: Option<String>,
}

#[derive(Debug)]
struct Line {
    /// Its place in the order.
    number: u64,
    times: u64,
    first_at: PgTimestamp,
    last_at: PgTimestamp,
    /// Of all times.
    took: Duration,
    /// It was never written.
    is_new: bool,
    /// It has been counted since it was written.
    is_behind: bool,
}

#[derive(Debug, Default)]
struct Lines {
    known: HashMap<Key, Line>,
    next: u64,
    counted_at: Option<Instant>,
}

/// The statements of one process; clones are the same.
#[derive(Clone, Debug)]
pub struct Log {
    /// Tells lines of one process from those of others.
    process: String,
    lines: Arc<Mutex<Lines>>,
}

impl Default for Log {
    fn default() -> Self {
        Log { process: format!("{:016x}", fastrand::u64(..)), lines: Arc::default() }
    }
}

/// A statement as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct LogLine {
    /// When it was answered first, in UTC.
    pub first_at: String,
    /// When last.
    pub last_at: String,
    /// For which task.
    pub task: u32,
    /// `source host:port/dbname`, `target ...`, `router ...`.
    pub node: String,
    /// Its text, without secrets, parameters and rows.
    pub sql: String,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// How often it was sent and answered so.
    pub times: u64,
    /// How long that took each time, on average, in milliseconds.
    pub ms: f64,
}

impl Log {
    /// Hears what is sent for a task.
    pub(super) fn witness(&self, task: u32) -> Witness {
        let lines = self.lines.clone();
        Witness::new(move |heard| {
            lines.lock().unwrap_or_else(PoisonError::into_inner).hear(task, heard);
        })
    }

    /// Writes what is new, and counts from time to time; all of it where `all` is said.
    pub(super) async fn write(&self, session: &mut Session, job: i64, all: bool) -> Result<()> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner).take(all);
        if lines.is_empty() {
            return Ok(());
        }
        let sql = "insert into walferry.cluster_log (job, line, task, node, sql, error, times, \
             first_at, last_at, ms) select $1, $3 || r.line, r.task, r.node, r.sql, r.error, \
             r.times, r.first_at, r.last_at, r.ms from pg_catalog.jsonb_to_recordset($2::jsonb) \
             r(line text, task int, node text, sql text, error text, times bigint, \
             first_at timestamptz, last_at timestamptz, ms float8) on conflict (job, line) \
             do update set times = excluded.times, last_at = excluded.last_at, ms = excluded.ms";
        let (lines, process) = (Value::from(lines).to_string(), format!("{}-", self.process));
        session.query_params(sql, &[Some(&job.to_string()), Some(&lines), Some(&process)]).await?;
        Ok(())
    }
}

impl Lines {
    fn hear(&mut self, task: u32, heard: Heard<'_>) {
        let mut sql = redact(heard.sql);
        if let Some((at, _)) = sql.char_indices().nth(SQL_CHARS) {
            sql.truncate(at);
            sql.push_str("...");
        }
        // A NUL cannot be stored; no statement that was answered has one.
        let sql = sql.replace('\0', "");
        let error = heard.error.map(|error| redact(&error.to_string()).replace('\0', ""));
        let key = Key { task, node: heard.peer.to_string(), sql, error };
        let now = PgTimestamp::now();
        let next = self.next;
        let line = self.known.entry(key).or_insert(Line {
            number: next,
            times: 0,
            first_at: now,
            last_at: now,
            took: Duration::ZERO,
            is_new: true,
            is_behind: true,
        });
        line.times += 1;
        line.last_at = now;
        line.took += heard.took;
        line.is_behind = true;
        self.next += 1;
    }

    /// What is to be written now.
    fn take(&mut self, all: bool) -> Vec<Value> {
        let all = all || self.counted_at.is_none_or(|at| at.elapsed() > COUNTS_EVERY);
        if all {
            self.counted_at = Some(Instant::now());
        }
        let mut taken = Vec::new();
        for (key, line) in &mut self.known {
            if line.is_new || (all && line.is_behind) {
                (line.is_new, line.is_behind) = (false, false);
                // Numbered so that their texts are in the order of their coming.
                taken.push(json!({
                    "line": format!("{:012}", line.number), "task": key.task, "node": key.node,
                    "sql": key.sql, "error": key.error,
                    "times": line.times, "first_at": line.first_at.to_sql(),
                    "last_at": line.last_at.to_sql(),
                    "ms": line.took.as_secs_f64() * 1e3 / line.times as f64,
                }));
            }
        }
        if all && self.known.len() > LINES_MAX {
            self.known.clear();
        }
        taken
    }
}

/// The log of a job, oldest first; of one task, if that is given.
pub(super) async fn load(
    session: &mut Session,
    job: i64,
    task: Option<u32>,
) -> Result<Vec<LogLine>> {
    let sql = "select first_at, last_at, task, node, sql, error, times, ms \
         from walferry.cluster_log where job = $1 and task = coalesce($2::int, task) \
         order by first_at, line";
    let task = task.map(|task| task.to_string());
    let rows = session.query_params(sql, &[Some(&job.to_string()), task.as_deref()]).await?;
    rows.iter()
        .map(|row| {
            Ok(LogLine {
                first_at: row.string(0)?,
                last_at: row.string(1)?,
                task: row.parse(2)?,
                node: row.string(3)?,
                sql: row.string(4)?,
                error: row.opt(5)?.map(str::to_string),
                times: row.parse(6)?,
                ms: row.parse(7)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_are_counted_and_secrets_are_not_kept() {
        let mut lines = Lines::default();
        let took = Duration::from_millis(2);
        let heard = |sql| Heard { peer: "source a:1/x", sql, took, error: None };
        for _ in 0..3 {
            lines.hear(1, heard("select 1"));
        }
        lines.hear(2, heard("select 1"));
        let long = "x".repeat(SQL_CHARS + 5);
        lines.hear(1, heard(&long));
        lines.hear(1, heard("alter server s options (set p0 'host=a password=hush')"));
        let taken = lines.take(false);
        assert_eq!(taken.len(), 4);
        assert!(!format!("{taken:?}").contains("hush"));
        let first = taken.iter().min_by_key(|line| line["line"].to_string()).unwrap();
        assert_eq!((&first["times"], &first["ms"]), (&json!(3), &json!(2.0)));
        lines.hear(1, heard("select 1"));
        assert!(lines.take(false).is_empty(), "a count alone waits");
        let taken = lines.take(true);
        assert_eq!((taken.len(), &taken[0]["times"]), (1, &json!(4)));
    }
}
