//! What people and scripts see of a job, read from its tables; works whether a runner lives or not.

use std::time::Duration;

use serde::Serialize;

use super::owners::GroupStatus;
use super::place::Place;
use super::reading::Reading;
use super::reads::ReadRecord;
use super::standby_status::StandbyStatus;
use super::state::Phase;
use super::store::{Store, StreamRow};
use super::{Result, lease, silent, standby_status, two_way};
use crate::apply;
use crate::apply::parked::{self, Parked};
use crate::id::{JobName, Stream};
use crate::lsn::Lsn;
use crate::pg::{Config, Session};
use crate::source::slot;

/// A source that is silent must not keep status waiting for long: for each question.
const SOURCE_PATIENCE: Duration = Duration::from_secs(3);

/// One table's figures.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TableStatus {
    /// `schema.table`.
    pub name: String,
    /// Rows copied so far, of finished parts.
    pub rows_copied: i64,
    /// Bytes copied so far, of finished parts.
    pub bytes_copied: i64,
    /// `todo`, `copying` or `done`.
    pub copy_state: String,
    /// Changes decoded (law 10: decoded = applied + filtered + quarantined + lost).
    pub decoded: i64,
    /// Changes applied.
    pub applied: i64,
    /// Changes left out on purpose: visible in the copy already, or not of this job.
    pub filtered: i64,
    /// Changes set aside.
    pub quarantined: i64,
    /// Changes not written, as what an application wrote on the other side won (`--two-way`).
    pub lost: i64,
}

/// The reverse stream's part.
#[derive(Clone, Debug, Serialize)]
pub struct ReverseStatus {
    /// How it is read.
    #[serde(flatten)]
    pub reading: Option<Reading>,
    /// Its positions.
    #[serde(flatten)]
    pub positions: StreamRow,
    /// Its counters by table.
    pub tables: Vec<TableStatus>,
    /// Batches that were refused as sets, and written in row order.
    pub fallbacks: i64,
    /// Conflicts on record on the source (`--two-way`).
    pub conflicts: i64,
}

/// All of it, as `status --json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The job.
    pub job: String,
    /// Where it stands.
    pub phase: String,
    /// Where the source is.
    pub source: String,
    /// Where the target is.
    pub target: String,
    /// Backend of the runner that lives, if one does.
    pub runner: Option<String>,
    /// How the forward stream is read, once that is chosen.
    #[serde(flatten)]
    pub reading: Option<Reading>,
    /// The standby of the source that it is read from (`--decode-from`).
    pub decoded_at: Option<String>,
    /// A cutover or rollback is under way, or was cut short: clients may be waiting. With no
    /// runner alive, `run` undoes or finishes it.
    pub held_clients: bool,
    /// The forward stream's positions.
    #[serde(flatten)]
    pub positions: StreamRow,
    /// By table.
    pub tables: Vec<TableStatus>,
    /// Batches that were refused as sets, and written in row order.
    pub fallbacks: i64,
    /// Conflicts on record on the target (`--two-way`).
    pub conflicts: i64,
    /// What settles them, as on the command line; `None` for a job of one way.
    pub on_conflict: Option<String>,
    /// Tables whose changes are kept aside.
    pub parked: Vec<Parked>,
    /// SQL for the target, of what the source has and no stream shows (`--ddl`).
    pub awaited: Vec<String>,
    /// The reverse stream, once armed.
    pub reverse: Option<ReverseStatus>,
    /// Slots on standbys of the source.
    pub standbys: Vec<StandbyStatus>,
    /// Readers that were led to the target, or are on their way.
    pub reads: Option<ReadRecord>,
    /// Where each group of tables is, once there are any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupStatus>,
    /// Where the spool or the topic is, and what its loss would cost.
    pub spool: Option<SpoolStatus>,
    /// What stopped the job, or keeps a stream from flowing.
    pub error: Option<String>,
}

/// A job's spool or topic.
#[derive(Clone, Debug, Serialize)]
pub struct SpoolStatus {
    /// Host and directory, or brokers and topic.
    #[serde(flatten)]
    pub place: Place,
    /// True if the slot of some stream was told of changes that only the spool has: without it
    /// every table has to be copied again.
    pub needed: bool,
    /// The same in words.
    pub loss: String,
}

/// What is lost with the spool, by what the slots were told and the other side durably has.
fn spool_status(place: Place, streams: &[&StreamRow]) -> SpoolStatus {
    let lsn = |text: &Option<String>| text.as_deref().and_then(|l| l.parse::<Lsn>().ok());
    let mut needed = None;
    for row in streams {
        let (told, has) = (lsn(&row.confirmed_lsn), lsn(&row.durable_lsn).unwrap_or(Lsn::ZERO));
        needed = told.filter(|told| *told > has).map(|told| (told, has)).or(needed);
    }
    let loss = match needed {
        None => "nothing: the source still has all that the target lacks".to_string(),
        Some((told, has)) => format!(
            "a new copy of every table: the source may forget what is below {told}, and the target \
             has only what is below {has}"
        ),
    };
    SpoolStatus { place, needed: needed.is_some(), loss }
}

/// Reads a job's status from its home. The source is asked too, if it is known and answers: a
/// runner that is not alive leaves stale positions, and the slot knows better.
pub async fn read(job: &JobName, home: &Config, source: Option<&Config>) -> Result<Status> {
    let session = Session::control(home).await?;
    let mut store = Store::new(session, job.clone());
    let row = store.load_existing().await?;
    let readings = store.load_readings().await?;
    let runner = lease::holder(&mut store.session, job).await?;
    let mut positions = store.load_stream(Stream::Forward).await?.unwrap_or_default();
    let mut source = connected(source).await;
    let unreleased = row.flip.as_ref().is_some_and(|flip| !flip.released);
    let flipped = matches!(row.phase, Phase::Split | Phase::Switched | Phase::RolledBack);
    let held_clients = row.phase == Phase::CuttingOver || (flipped && unreleased);
    let open = !matches!(row.phase, Phase::Finished | Phase::Canceled);
    let (name, spooled) = (job.object(Stream::Forward), row.spool.is_some());
    if runner.is_none() && open {
        let fresh = ask(&mut source, async |session: &mut Session| {
            let mut fresh = positions.clone();
            refresh(&name, spooled, session, &mut fresh).await?;
            Ok(fresh)
        });
        positions = fresh.await.unwrap_or(positions);
    }
    let parked = parked::parked(&mut store.session, &name).await?;
    let forward_fallbacks = fallbacks(&mut store.session, &name).await?;
    let reverse = if row.armed {
        let mut positions = store.load_stream(Stream::Reverse).await?.unwrap_or_default();
        let name = job.object(Stream::Reverse);
        if runner.is_none() && open {
            refresh(&name, spooled, &mut store.session, &mut positions).await?;
        }
        let counted = ask(&mut source, async |source: &mut Session| {
            let tables = counters(source, &name).await?;
            let conflicts = two_way::conflicts(source, &name).await?;
            Ok((tables, fallbacks(source, &name).await?, conflicts))
        });
        let (tables, fallbacks, conflicts) = counted.await.unwrap_or_default();
        Some(ReverseStatus { reading: readings.reverse, positions, tables, fallbacks, conflicts })
    } else {
        None
    };
    let spool = row.spool.map(|place| {
        let reverse = reverse.as_ref().map(|reverse| &reverse.positions);
        spool_status(place, &[&positions].into_iter().chain(reverse).collect::<Vec<_>>())
    });
    Ok(Status {
        job: job.to_string(),
        held_clients,
        phase: row.phase.to_string(),
        source: row.source,
        target: row.target,
        runner,
        reading: readings.forward,
        decoded_at: readings.decoded_at,
        error: row.error.or_else(|| positions.error.clone()),
        positions,
        tables: tables(&mut store.session, job.as_str(), &name).await?,
        fallbacks: forward_fallbacks,
        conflicts: two_way::conflicts(&mut store.session, &name).await?,
        on_conflict: two_way::stored(&mut store.session, job).await?,
        parked,
        awaited: silent::awaited(&mut store.session, job.as_str()).await?,
        reverse,
        standbys: standby_status::load(&mut store.session, job).await?,
        reads: row.reads,
        groups: store.groups().await?,
        spool,
    })
}

/// The source, if it is known and answers in time.
async fn connected(source: Option<&Config>) -> Option<Session> {
    let connecting = Session::control(source?);
    tokio::time::timeout(SOURCE_PATIENCE, connecting).await.ok()?.ok()
}

/// The source's answer, if it gives one in time: it may itself be the trouble that status is to
/// show. After a failure it is asked nothing more.
async fn ask<T>(
    source: &mut Option<Session>,
    question: impl AsyncFnOnce(&mut Session) -> Result<T>,
) -> Option<T> {
    let mut session = source.take()?;
    let answer = tokio::time::timeout(SOURCE_PATIENCE, question(&mut session)).await;
    match answer {
        Ok(Ok(answer)) => {
            *source = Some(session);
            Some(answer)
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "the source did not say");
            None
        }
        Err(_) => None,
    }
}

/// Without a runner: what the slot was told, and how far the side's WAL has gone since. A slot that
/// is told what is applied knows more than what was stored last; one that is told what is spooled
/// knows nothing of the other side.
async fn refresh(
    name: &str,
    spooled: bool,
    session: &mut Session,
    positions: &mut StreamRow,
) -> Result<()> {
    let Some(status) = slot::status(session, name).await? else {
        return Ok(());
    };
    let row = session.query_one("select pg_catalog.pg_current_wal_insert_lsn()", &[]).await?;
    let end_lsn = row.lsn(0)?;
    let confirmed_lsn = status.confirmed_flush_lsn.unwrap_or(Lsn::ZERO);
    positions.confirmed_lsn = Some(confirmed_lsn.to_string());
    positions.retained_bytes = Some(status.retained_bytes as i64);
    let applied = positions.applied_lsn.as_deref().and_then(|l| l.parse().ok());
    let told_lsn = if spooled { Lsn::ZERO } else { confirmed_lsn };
    let applied_lsn = applied.unwrap_or(confirmed_lsn).max(told_lsn);
    positions.lag_bytes = Some(end_lsn.bytes_since(applied_lsn) as i64);
    Ok(())
}

async fn fallbacks(session: &mut Session, stream: &str) -> Result<i64> {
    let there = "select pg_catalog.to_regclass('walferry.stream_fallback') is not null";
    if !session.query_one(there, &[]).await?.bool(0)? {
        return Ok(0);
    }
    let sql = "select coalesce(max(batches), 0) from walferry.stream_fallback where stream = $1";
    Ok(session.query_one(sql, &[Some(stream)]).await?.parse(0)?)
}

async fn counters(session: &mut Session, stream: &str) -> Result<Vec<TableStatus>> {
    let there = "select pg_catalog.to_regclass('walferry.stream_table') is not null";
    if !session.query_one(there, &[]).await?.bool(0)? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "select schema || '.' || name, decoded, applied, filtered, quarantined \
         from ({}) as books where schema <> 'walferry' order by 1",
        apply::BOOKS
    );
    let rows = session.query_params(&sql, &[Some(stream)]).await?;
    let lost = two_way::lost(session, stream).await?;
    rows.iter()
        .map(|row| {
            Ok(TableStatus {
                lost: lost.get(row.str(0)?).copied().unwrap_or(0),
                name: row.string(0)?,
                decoded: row.parse(1)?,
                applied: row.parse(2)?,
                filtered: row.parse(3)?,
                quarantined: row.parse(4)?,
                ..TableStatus::default()
            })
        })
        .collect()
}

async fn tables(session: &mut Session, job: &str, stream: &str) -> Result<Vec<TableStatus>> {
    let mut tables = counters(session, stream).await?;
    let there = "select pg_catalog.to_regclass('walferry.table_copy') is not null";
    if !session.query_one(there, &[]).await?.bool(0)? {
        return Ok(tables);
    }
    let rows = session
        .query_params(
            "select schema || '.' || name, coalesce(sum(rows), 0), coalesce(sum(bytes), 0), \
             case when bool_and(state = 'done') then 'done' \
                when bool_or(state = 'done') then 'copying' else 'todo' end \
             from walferry.table_copy where job = $1 group by 1 order by 1",
            &[Some(job)],
        )
        .await?;
    for row in &rows {
        let name = row.string(0)?;
        if !tables.iter().any(|t| t.name == name) {
            tables.push(TableStatus { name: name.clone(), ..TableStatus::default() });
        }
        if let Some(table) = tables.iter_mut().find(|t| t.name == name) {
            table.rows_copied = row.parse(1)?;
            table.bytes_copied = row.parse(2)?;
            table.copy_state = row.string(3)?;
        }
    }
    tables.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tables)
}
