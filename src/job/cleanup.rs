//! Finish and cancel: nothing of walferry is left on either side.
//!
//! They run without streams: the runner, if one is alive, is asked to stop, and the lease taken.
//! Every drop is idempotent, so a clean-up that was cut short is done again by the same command.
//! The home schema goes last, as it holds the memory of what is still to be done.

use super::flip::{context, parse_routes, stream_of};
use super::lease::Lease;
use super::run::{JobConfig, place};
use super::state::{Event, Phase, step};
use super::store::{JobRow, Store};
use super::{Error, Result, lease};
use crate::apply;
use crate::cutover::{self, fence};
use crate::id::Stream;
use crate::pg::{Purpose, Session};
use crate::source::{publication, slot};

/// What a clean-up did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CleanedUp {
    /// The phase the job ended in.
    pub phase: Phase,
    /// What was dropped, one line each.
    pub dropped: Vec<String>,
}

/// Ends a job. `event` is FinishAsked or CancelAsked; `lease` must be held by the caller.
pub async fn clean_up(
    config: &JobConfig,
    event: Event,
    keep_history: bool,
    _lease: &Lease,
) -> Result<CleanedUp> {
    let home = Session::connect(&config.target, Purpose::Sql).await?;
    let mut store = Store::new(home, config.job.clone());
    let row = store.load().await?;
    let row = row
        .ok_or_else(|| Error::NoJob { job: config.job.to_string(), peer: place(&config.target) })?;
    let phase = match (row.phase, event) {
        // A clean-up that was cut short is taken up again.
        (Phase::Finished, Event::FinishAsked) => Phase::Finished,
        (phase, event) => step(phase, event)?.0,
    };
    let mut source = Session::connect(&config.source, Purpose::Sql).await?;
    lease::end_predecessors(&mut source, &config.job, &[]).await?;
    store.set_phase(phase).await?;
    let mut dropped = Vec::new();
    for (stream, session) in [(Stream::Forward, &mut source), (Stream::Reverse, &mut store.session)]
    {
        let name = config.job.object(stream);
        if slot::status(session, &name).await?.is_some() {
            dropped.push(format!("replication slot {name}"));
        }
        slot::drop(session, &name).await?;
        publication::drop(session, &name).await?;
        apply::forget(session, &config.job.object(stream.opposite())).await?;
        fence::remove(session).await?;
    }
    forget_routes(config, &row).await?;
    drop_schema(&mut source, config, &mut dropped, false).await?;
    drop_schema(&mut store.session, config, &mut dropped, keep_history).await?;
    Ok(CleanedUp { phase, dropped })
}

/// What a route kept to find its way back (a copy of a pgbouncer line) is not needed any more.
async fn forget_routes(config: &JobConfig, row: &JobRow) -> Result<()> {
    let Some(record) = &row.flip else { return Ok(()) };
    let context = context(config, stream_of(&record.flip));
    for route in parse_routes(&record.routes)? {
        route.forget(&context).await.map_err(cutover::Error::from)?;
    }
    Ok(())
}

/// Drops schema walferry, or only this job's rows where other jobs use it too.
async fn drop_schema(
    session: &mut Session,
    config: &JobConfig,
    dropped: &mut Vec<String>,
    keep_history: bool,
) -> Result<()> {
    let others = session
        .query_one(
            "select (select count(*) from pg_catalog.pg_publication \
                where pubname like 'walferry\\_%') \
             + (select count(*) from pg_catalog.pg_replication_slots \
                where slot_name like 'walferry\\_%' \
                and database = pg_catalog.current_database())",
            &[],
        )
        .await?;
    if keep_history || others.parse::<i64>(0)? > 0 {
        session
            .query_params(
                "delete from walferry.canary where job = $1",
                &[Some(config.job.as_str())],
            )
            .await?;
        return Ok(());
    }
    session
        .execute("set client_min_messages = error; drop schema if exists walferry cascade")
        .await?;
    dropped.push(format!("schema walferry on {}", session.peer()));
    Ok(())
}
