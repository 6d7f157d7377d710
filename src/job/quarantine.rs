//! `walferry quarantine`: what the forward stream keeps aside on the target, and what becomes of
//! it.
//!
//! All of it is in the target's tables, where the applier looks every second: a list needs no
//! runner, and a retry or a drop is a mark in a row and a wait for what the applier makes of it.

use std::time::Duration;

use serde::Serialize;

use super::config::JobConfig;
use super::state::{Phase, Refused};
use super::{Error, Result};
use crate::apply::parked::{self, KeptChange, Parked};
use crate::clock::Deadline;
use crate::id::{JobName, Stream};
use crate::pg::Session;

/// How often it is asked what became of a try.
const POLL: Duration = Duration::from_millis(100);

/// A parked table with the first of what is kept of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Listed {
    /// The table.
    #[serde(flatten)]
    pub parked: Parked,
    /// Its oldest changes.
    pub rows: Vec<KeptChange>,
}

/// What came of a try.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tried {
    /// `schema.table`.
    pub table: String,
    /// Nothing is kept of it any more; it is followed again.
    pub written: bool,
    /// How many changes were dropped before that.
    pub dropped: i64,
    /// How many are kept still.
    pub changes: i64,
    /// What keeps it.
    pub error: Option<String>,
}

/// Parked tables, all or those named, each with at most `limit` of its changes.
///
/// Error: a table that is named is not parked (`NotParked`).
pub async fn list(
    home: &mut Session,
    job: &JobName,
    tables: &[String],
    limit: usize,
) -> Result<Vec<Listed>> {
    let stream = job.object(Stream::Forward);
    let mut listed = Vec::new();
    for parked in select(home, job, tables).await? {
        let rows = parked::kept(home, &stream, &parked.name, limit).await?;
        listed.push(Listed { parked, rows });
    }
    Ok(listed)
}

/// Parked tables, all or those named.
async fn select(home: &mut Session, job: &JobName, tables: &[String]) -> Result<Vec<Parked>> {
    let mut all = parked::parked(home, &job.object(Stream::Forward)).await?;
    let is = |parked: &Parked, name: &str| {
        parked.table == name || format!("{}.{}", parked.name.schema, parked.name.name) == name
    };
    if let Some(table) = tables.iter().find(|name| !all.iter().any(|parked| is(parked, name))) {
        let parked: Vec<String> = all.into_iter().map(|parked| parked.table).collect();
        return Err(Error::NotParked { table: table.clone(), parked: parked.join(", ") });
    }
    all.retain(|parked| tables.is_empty() || tables.iter().any(|name| is(parked, name)));
    Ok(all)
}

/// A job's parked tables: they are expected to differ.
pub async fn of(config: &JobConfig) -> Result<Vec<Parked>> {
    let mut home = Session::control(&config.target).await?;
    Ok(parked::parked(&mut home, &config.job.object(Stream::Forward)).await?)
}

/// Refuses where no forward stream flows that could write what is kept.
pub fn refuse_still(phase: Phase) -> Result<()> {
    match phase {
        Phase::CatchingUp | Phase::Following | Phase::Split | Phase::RolledBack => Ok(()),
        phase => Err(Error::Refused(Refused {
            phase,
            asked: "this",
            why: "what is kept is written by the stream from source to target, which does not \
                  flow now",
        })),
    }
}

/// Has the applier try what is kept of the tables, all or those named, and tells what came of it
/// within `wait`. With `discard`, what is kept is dropped before. A runner must be alive.
pub async fn retry(
    home: &mut Session,
    job: &JobName,
    tables: &[String],
    discard: bool,
    wait: Duration,
) -> Result<Vec<Tried>> {
    let stream = job.object(Stream::Forward);
    let mut tried = Vec::new();
    for table in select(home, job, tables).await? {
        let dropped = match discard {
            true => parked::discard(home, &stream, &table.name, None).await?,
            false => 0,
        };
        parked::ask(home, &stream, &table.name).await?;
        tried.push((table, dropped));
    }
    let deadline = Deadline::after(wait);
    loop {
        let now = parked::parked(home, &stream).await?;
        let of = |table: &Parked| now.iter().find(|parked| parked.name == table.name);
        let waiting = tried.iter().any(|(table, _)| of(table).is_some_and(|parked| parked.asked));
        if waiting && deadline.passed() {
            return Err(Error::NoAnswer {
                verb: "quarantine".to_string(),
                wait,
                pid: String::new(),
            });
        }
        if waiting {
            tokio::time::sleep(POLL).await;
            continue;
        }
        let outcome = |(table, dropped): &(Parked, i64)| Tried {
            table: table.table.clone(),
            written: of(table).is_none(),
            dropped: *dropped,
            changes: of(table).map_or(0, |parked| parked.changes),
            error: of(table).map(|parked| parked.error.clone()),
        };
        return Ok(tried.iter().map(outcome).collect());
    }
}

/// Drops one change that is kept; the table stays parked. Error: there is none of that id
/// (`NotKept`).
pub async fn discard_one(home: &mut Session, job: &JobName, id: i64) -> Result<Tried> {
    let stream = job.object(Stream::Forward);
    for table in parked::parked(home, &stream).await? {
        let dropped = parked::discard(home, &stream, &table.name, Some(id)).await?;
        if dropped > 0 {
            let (changes, error) = (table.changes - dropped, Some(table.error));
            return Ok(Tried { table: table.table, written: false, dropped, changes, error });
        }
    }
    Err(Error::NotKept { id })
}
