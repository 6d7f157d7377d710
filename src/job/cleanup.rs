//! Finish and cancel: nothing of walferry is left on either side.
//!
//! They run without streams: the runner, if one is alive, is asked to stop, and the lease taken.
//! Every drop is idempotent, so a clean-up that was cut short is done again by the same command.
//! The home schema goes last, as it holds the memory of what is still to be done.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;

use super::admit::accept_systems;
use super::lease::Lease;
use super::place::Place;
use super::request::context_of;
use super::run::JobConfig;
use super::state::{Event, Phase};
use super::store::{JobRow, Store, TRY_ALONE};
use super::{Result, lease, standby_status, two_way};
use crate::clock::Deadline;
use crate::cluster::shard;
use crate::cutover::{self, seal};
use crate::id::{JobName, Stream};
use crate::pg::{Config, Purpose, Session};
use crate::source::{publication, slot};
use crate::{apply, schema};

/// Tables of the home database with the column that names the job, the job's own row last.
const HOME_TABLES: [(&str, &str); 14] = [
    ("table_copy", "job"),
    ("table_refill", "job"),
    ("schema_step", "job"),
    ("schema_dump", "job"),
    ("source_object", "job"),
    ("awaited", "job"),
    ("newcomer", "job"),
    ("large_object", "job"),
    ("stream", "job"),
    ("standby", "job"),
    ("journal", "job"),
    ("ownership", "job"),
    ("command", "job"),
    ("job", "name"),
];

/// What a route that could not be reached before may take now.
const RELEASE_WAIT: Duration = Duration::from_secs(5);

/// How long others that are making their tables in the schema are waited for, and between looks.
const MAKING_WAIT: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_millis(100);

/// What a clean-up did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CleanedUp {
    /// What was dropped, one line each.
    pub dropped: Vec<String>,
    /// What was put into the recycle bin.
    pub recycled: Option<String>,
    /// What a person has to do.
    pub left: Vec<String>,
    /// After a cancel: tables that the job made on the target are still there.
    pub tables_stay: bool,
}

/// How a job is ended.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    /// FinishAsked, FinishSplitAsked or CancelAsked.
    pub event: Event,
    /// Keep schema walferry on the target.
    pub keep_history: bool,
    /// The source does not exist any more, or another server stands in its place: leave it alone.
    pub source_is_gone: bool,
}

/// Ends a job. `lease` must be held by the caller.
pub async fn clean_up(config: &JobConfig, ending: Ending, lease: &Lease) -> Result<CleanedUp> {
    let Ending { event, keep_history, source_is_gone } = ending;
    let mut config = config.clone();
    let mut store = Store::new(Session::control(&config.target).await?, config.job.clone());
    // The job knows its tables; the command need not repeat the options.
    config.options = store.load_existing().await?.options;
    if config.options.tables_only {
        config.target = shard::reach(&config.target).await?;
        if !source_is_gone {
            config.source = shard::reach(&config.source).await?;
        }
    }
    let config = &config;
    let home = Session::control(&config.target).await?;
    let mut store = Store::new(home, config.job.clone());
    let row = store.load_existing().await?;
    let phase = match (row.phase, event) {
        // A clean-up that was cut short is taken up again.
        (Phase::Finished, Event::FinishAsked | Event::FinishSplitAsked) => Phase::Finished,
        (_, event) => {
            super::reads::refuse_end(&row, ending)?;
            two_way::ended(&row, event)?
        }
    };
    let mut source = None;
    if !source_is_gone {
        let mut session = Session::control(&config.source).await?;
        // Dropped on another system, the slot of the true one would be forgotten and fill its disk.
        accept_systems(&row, &mut session, &mut store.session).await?;
        lease::end_predecessors(&mut session, &config.job, &[]).await?;
        source = Some(session);
    }
    // A build or a copy that was abandoned goes on in its server for a while, and keeps its locks.
    lease::end_predecessors(&mut store.session, &config.job, &[lease.process_id()]).await?;
    let mut left = let_clients_go(config, &row).await?;
    store.set_phase(phase).await?;
    if let Some(session) = &mut source {
        // A process that reads into a topic sees the phase, and does not come back.
        let name = lease::capture_application_name(&config.job);
        lease::end_sessions(session, &name, &[]).await?;
    }
    let mut dropped = Vec::new();
    let mut recycled = None;
    two_way::part(source.as_mut(), &mut store.session, &config.job).await?;
    let left_side = config.left_side(&row, event);
    if let Some(session) = &mut source {
        if left_side == Some(Stream::Forward) {
            recycled = config.recycle(session).await?;
        }
        drop_objects(session, &config.source, &config.job, Stream::Forward, &mut dropped).await?;
    }
    standby_status::clean_up(config, &row, &mut store, &mut dropped, &mut left).await?;
    let home = &mut store.session;
    if left_side == Some(Stream::Reverse) {
        recycled = config.recycle(home).await?;
    }
    let canceled = event == Event::CancelAsked;
    let tables_stay = canceled && drop_made(config, source.as_mut(), home, &mut dropped).await?;
    drop_objects(home, &config.target, &config.job, Stream::Reverse, &mut dropped).await?;
    forget_routes(config, &row, &mut left).await?;
    left.extend(super::reads::forget(config, &row, RELEASE_WAIT).await?);
    remove_spool(config, &row, &mut dropped, &mut left).await?;
    if let Some(source) = &mut source {
        drop_schema(source, &config.job, &mut dropped, false).await?;
    }
    drop_home(&mut store, config, keep_history, &mut dropped).await?;
    Ok(CleanedUp { dropped, recycled, left, tables_stay })
}

/// Takes away the tables that a job beside others of a database has made on its target and not
/// switched to: they would be in the way there. True if tables that a job of a whole database has
/// made are still there.
async fn drop_made(
    config: &JobConfig,
    source: Option<&mut Session>,
    home: &mut Session,
    dropped: &mut Vec<String>,
) -> Result<bool> {
    if !config.is_beside_others() {
        return Ok(schema::is_made(home, config.job.as_str()).await?);
    }
    // May wait for readers.
    let mut session = Session::connect(&config.target, Purpose::Sql).await?;
    let tables = config.drop_made(source, &mut session).await?;
    dropped.extend(tables.iter().map(|table| format!("table {table} on {}", home.peer())));
    Ok(false)
}

/// Clients that a route still holds, as it could not be reached after the switch, are not waited
/// for any more. Gives what a person has to do.
async fn let_clients_go(config: &JobConfig, row: &JobRow) -> Result<Vec<String>> {
    let flipped = matches!(row.phase, Phase::Split | Phase::Switched | Phase::RolledBack);
    let mut left = Vec::new();
    let Some(record) = row.flip.as_ref().filter(|flip| flipped && !flip.released) else {
        return Ok(left);
    };
    let context = context_of(config, record);
    for route in config.secrets.routes(&record.waiting())? {
        let tried = tokio::time::timeout(RELEASE_WAIT, route.release(&context)).await;
        if !matches!(tried, Ok(Ok(()))) {
            let by_hand = route.by_hand(&context, true);
            left.push(format!("clients may still be held by {route}: {by_hand}"));
        }
    }
    Ok(left)
}

/// What the side has of the streams: `reads` is the one that is read there.
pub(super) async fn drop_objects(
    session: &mut Session,
    side: &Config,
    job: &JobName,
    reads: Stream,
    dropped: &mut Vec<String>,
) -> Result<()> {
    let name = job.object(reads);
    if slot::status(session, &name).await?.is_some() {
        dropped.push(format!("replication slot {name}"));
    }
    slot::drop(session, &name).await?;
    schema::captured::remove(session, job).await?;
    schema::restore(session, job.as_str()).await?;
    // Takes as long as reading the tables.
    let mut validating = Session::connect(side, Purpose::Sql).await?;
    schema::validate(&mut validating, job.as_str()).await?;
    publication::drop(session, &name).await?;
    two_way::remove(session, job, &HashMap::new()).await?;
    apply::forget(session, &job.object(reads.opposite())).await?;
    seal::remove(session, job).await?;
    Ok(())
}

/// Forgets the job where others have their state in the same home; gives how many those are.
async fn forget_job(store: &mut Store, config: &JobConfig, keep_history: bool) -> Result<i64> {
    let name = config.job.as_str();
    // Jobs of a cluster are kept here as well.
    let sql = "select count(*) + case when pg_catalog.to_regclass('walferry.cluster_job') is null \
         then 0 else 1 end from walferry.job where name <> $1";
    let others: i64 = store.session.query_one(sql, &[Some(name)]).await?.parse(0)?;
    if others > 0 && !keep_history {
        for (table, column) in HOME_TABLES {
            let sql = format!("delete from walferry.{table} where {column} = $1");
            store.session.query_params(&sql, &[Some(name)]).await?;
        }
    }
    Ok(others)
}

/// The spool's directories; on another host they are only named, and so are topics, which others
/// may read.
async fn remove_spool(
    config: &JobConfig,
    row: &JobRow,
    dropped: &mut Vec<String>,
    left: &mut Vec<String>,
) -> Result<()> {
    let Some(place) = &row.spool else { return Ok(()) };
    for stream in [Stream::Forward, Stream::Reverse] {
        let name = config.job.object(stream);
        let spool = match place {
            Place::Spool(spool) => spool,
            Place::Kafka(kafka) => {
                let topic = kafka.of(stream);
                if stream == Stream::Forward || row.armed {
                    left.push(format!(
                        "topic {topic} of {} stays, as others may read it: kafka-topics.sh \
                         --delete --topic {topic}",
                        kafka.brokers
                    ));
                }
                continue;
            }
        };
        let dir = spool.of(&name).display().to_string();
        if !spool.is_here() {
            left.push(format!("the spool on host {} stays: there, rm -r {dir}", spool.host));
        } else if super::place::remove(place, &name).await? {
            dropped.push(format!("spool {dir}"));
        }
    }
    Ok(())
}

/// What a route kept to find its way back (a copy of a pgbouncer line, a comment) is not needed any
/// more. One that is gone keeps no job from its end.
async fn forget_routes(config: &JobConfig, row: &JobRow, left: &mut Vec<String>) -> Result<()> {
    let Some(record) = &row.flip else { return Ok(()) };
    let context = context_of(config, record);
    let switched =
        matches!(row.phase, Phase::Split | Phase::Switched | Phase::RolledBack | Phase::Finished);
    let routes = [&*record.routes, &*record.earlier_routes].concat();
    for route in config.secrets.routes(&routes)? {
        if route.kind() == "citus" {
            // What it keeps there is more than a note.
            route.forget(&context).await.map_err(cutover::Error::from)?;
            continue;
        }
        let why = match tokio::time::timeout(RELEASE_WAIT, route.forget(&context)).await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", RELEASE_WAIT.as_secs()),
        };
        let by_hand = route.by_hand(&context, switched);
        left.push(format!(
            "{route} keeps what was noted there for the way back ({why}): {by_hand}"
        ));
    }
    Ok(())
}

/// What is left of the job in its home.
async fn drop_home(
    store: &mut Store,
    config: &JobConfig,
    keep_history: bool,
    dropped: &mut Vec<String>,
) -> Result<()> {
    let keep = keep_history || forget_job(store, config, keep_history).await? > 0;
    let stays = drop_schema(&mut store.session, &config.job, dropped, keep).await?;
    if stays && !keep {
        // Another job has begun since.
        forget_job(store, config, keep_history).await?;
    }
    Ok(())
}

/// Drops schema walferry, or only this job's canary where other jobs use it too, of which one may
/// be about to begin. True if the schema stays.
pub(super) async fn drop_schema(
    session: &mut Session,
    job: &JobName,
    dropped: &mut Vec<String>,
    keep_history: bool,
) -> Result<bool> {
    let deadline = Deadline::after(MAKING_WAIT);
    let alone = loop {
        session.execute("begin").await?;
        if session.query_one(&format!("select {TRY_ALONE}"), &[]).await?.bool(0)? {
            break true;
        }
        session.execute("rollback").await?;
        if deadline.passed() {
            break false;
        }
        tokio::time::sleep(AGAIN).await;
    };
    let outcome = drop_unused(session, job, keep_history || !alone).await;
    if session.in_transaction() {
        let end = if outcome.is_ok() { "commit" } else { "rollback" };
        session.execute(end).await?;
    }
    let said = outcome?;
    dropped.extend(said.map(|said| format!("{said} on {}", session.peer())));
    Ok(said.is_none())
}

/// What went; `None` if the schema stays, or is not there.
async fn drop_unused(
    session: &mut Session,
    job: &JobName,
    keep: bool,
) -> Result<Option<&'static str>> {
    let canary = job.canary();
    let others = session
        .query_one(
            "select (select count(*) from pg_catalog.pg_publication \
                where pubname like 'walferry\\_%' and pg_catalog.pg_has_role(pubowner, 'usage')) \
             + (select count(*) from pg_catalog.pg_replication_slots \
                where slot_name like 'walferry\\_%' \
                and database = pg_catalog.current_database()) \
             + (select count(*) from pg_catalog.pg_class c \
                join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
                where n.nspname = 'walferry' and c.relkind = 'r' \
                and c.relname like 'canary\\_%' and c.relname <> $1) \
             + case when pg_catalog.to_regclass('walferry.cluster_job') is null then 0 else 1 end",
            &[Some(&canary.name)],
        )
        .await?;
    if !keep && others.parse::<i64>(0)? == 0 {
        return empty_or_drop(session).await;
    }
    let (canary, captured) = (canary.quoted(), job.captured().quoted());
    let sql = format!(
        "set client_min_messages = error; drop table if exists {canary}, {captured}; \
         reset client_min_messages"
    );
    session.execute(&sql).await?;
    Ok(None)
}

/// A schema that an administrator made for a role that may make none stays, empty; it could not be
/// made again. Nor does a table go that his publication shows. Gives what went; `None` where there
/// is no such schema.
async fn empty_or_drop(session: &mut Session) -> Result<Option<&'static str>> {
    session.execute("set client_min_messages = error").await?;
    let sql = "select pg_catalog.obj_description(oid, 'pg_namespace') \
         is not distinct from 'made by walferry' \
         from pg_catalog.pg_namespace where nspname = 'walferry'";
    let Some(row) = session.query_opt(sql, &[]).await? else { return Ok(None) };
    if row.bool(0)? {
        session.execute("drop schema walferry cascade").await?;
        return Ok(Some("schema walferry"));
    }
    let ours = session
        .query(
            "select case when exists \
                 (select from pg_catalog.pg_publication_rel where prrelid = c.oid) \
               then 'delete from ' || oid::regclass \
               else 'drop table if exists ' || oid::regclass || ' cascade' end \
             from pg_catalog.pg_class c where relnamespace = 'walferry'::regnamespace \
             and relkind = 'r' union all \
             select 'drop function if exists ' || oid::regprocedure || ' cascade' \
             from pg_catalog.pg_proc where pronamespace = 'walferry'::regnamespace",
        )
        .await?;
    for row in &ours {
        session.execute(row.str(0)?).await?;
    }
    Ok(Some("all in schema walferry"))
}
