//! One side cleaned by a job's name alone, because the other, or the job's own tables, are gone.
//!
//! The job's state is on the target. Where that is lost, nothing says any more what the job was
//! at, but all that it made on the source bears its name:
//!
//! | kept | on the source | on the target |
//! | --- | --- | --- |
//! | slot, publication | `walferry_<job>_forward` | `walferry_<job>_reverse` |
//! | origin, progress | `walferry_<job>_reverse` | `walferry_<job>_forward` |
//! | of a fence | seals (triggers), notes on a read-only database, rules set aside | the same |
//! | schema walferry | canary, progress, those notes | the same, and the job's tables |
//!
//! A source that was switched away from is sealed. Opening it makes it the side to write to, with
//! what the way back had brought by then. So whoever asks for it says that the target is gone; one
//! that answers and knows the job is refused, and so is a side where a session of the job is alive.
//! Sequences stand where they stood at the switch, and those that a column owns are set past its
//! values before anybody can write.
//!
//! Each drop may be repeated; the schema, with the notes, goes last. Left out: what routes and
//! spools keep, as their places are not known here; it is said.

use std::time::Duration;

use super::cleanup::{CleanedUp, drop_objects, drop_schema};
use super::lease;
use super::state::Phase;
use super::store::Store;
use super::{Error, Gone, Result};
use crate::cutover::seal::{is_shut, seal_name};
use crate::id::{JobName, Stream};
use crate::pg::{Config, Purpose, Session};

/// A target that has not answered by then is gone, or as good as.
const TARGET_WAIT: Duration = Duration::from_secs(15);

/// Cleans the source where the target is gone; `target` is where it was, if that is known.
///
/// Errors: [`Gone::NotGone`] if it answers and has the job; [`Gone::StillThere`] for a session of
/// the job on the source; [`Gone::NothingLeft`].
pub async fn clean_source(
    job: &JobName,
    source: &Config,
    target: Option<&Config>,
) -> Result<CleanedUp> {
    if let Some(target) = target {
        refuse_alive(job, target).await?;
    }
    clean(job, source, Stream::Forward).await
}

/// Cleans the target where the source is gone and the job's own tables with it.
///
/// Errors: [`Gone::StillThere`]; [`Gone::NothingLeft`].
pub async fn clean_target(job: &JobName, target: &Config) -> Result<CleanedUp> {
    clean(job, target, Stream::Reverse).await
}

/// A target that answers in any way but that its database is gone is not gone.
async fn refuse_alive(job: &JobName, target: &Config) -> Result<()> {
    let asking = async {
        let mut store = Store::new(Session::control(target).await?, job.clone());
        store.load().await
    };
    match tokio::time::timeout(TARGET_WAIT, asking).await {
        Err(_) | Ok(Ok(None)) => Ok(()),
        Ok(Ok(Some(row))) => {
            let flipped = matches!(row.phase, Phase::Switched | Phase::RolledBack);
            let command = if flipped { "finish" } else { "cancel" };
            Err(Gone::NotGone { job: job.to_string(), phase: row.phase, command }.into())
        }
        Ok(Err(Error::Pg(error))) if matches!(error.code(), None | Some("3D000")) => {
            tracing::info!(%error, "the target is taken for gone");
            Ok(())
        }
        Ok(Err(error)) => Err(error),
    }
}

async fn clean(job: &JobName, side: &Config, reads: Stream) -> Result<CleanedUp> {
    let mut session = Session::control(side).await?;
    refuse_session(job, &mut session).await?;
    if !is_there(job, &mut session, reads).await? {
        return Err(nothing_left(job, &mut session).await);
    }
    let (mut dropped, mut left) = (Vec::new(), Vec::new());
    if is_shut(&mut session, job).await? {
        let upto = progress(job, &mut session, reads.opposite()).await?;
        left.extend(set_sequences(side).await?);
        left.push(format!(
            "this side was sealed by a switch and takes writes again, with what the other side had \
             written up to {upto}. Sequences that no column owns stand where they stood at that \
             switch: set them (select setval(...))"
        ));
    }
    drop_objects(&mut session, side, job, reads, &mut dropped).await?;
    drop_schema(&mut session, job, &mut dropped, false).await?;
    left.push(format!(
        "routes of the job are not known here: see that no pooler is paused and that clients are \
         led to {}. Beside a pgbouncer.ini its line as it was is in *.walferry_{job}_*, a foreign \
         server's options as they were are in its comment (\"walferry: ...\"); a spool is in a \
         directory named walferry_{job}_*",
        session.peer()
    ));
    Ok(CleanedUp { dropped, recycled: None, left, tables_stay: false })
}

/// A session of the job is a runner that is alive, or one whose end the server has not noticed.
async fn refuse_session(job: &JobName, session: &mut Session) -> Result<()> {
    let (run, capture) = (lease::application_name(job), lease::capture_application_name(job));
    let sql = "select pid, coalesce(client_addr::text, 'this host'), \
         pg_catalog.date_trunc('second', backend_start)::text \
         from pg_catalog.pg_stat_activity where application_name in ($1, $2) \
         and datname = pg_catalog.current_database() order by backend_start limit 1";
    let Some(row) = session.query_opt(sql, &[Some(&run), Some(&capture)]).await? else {
        return Ok(());
    };
    let (pid, host, since) = (row.string(0)?, row.string(1)?, row.string(2)?);
    let peer = session.peer().to_string();
    Err(Gone::StillThere { job: job.to_string(), peer, pid, host, since }.into())
}

async fn is_there(job: &JobName, session: &mut Session, reads: Stream) -> Result<bool> {
    let sql = "select exists (select 1 from pg_catalog.pg_replication_slots where slot_name = $1 \
             and database = pg_catalog.current_database()) \
         or exists (select 1 from pg_catalog.pg_publication where pubname = $1) \
         or exists (select 1 from pg_catalog.pg_replication_origin where roname = $2) \
         or exists (select 1 from pg_catalog.pg_trigger where tgname = $3) \
         or pg_catalog.to_regclass($4) is not null";
    let (reads, writes) = (job.object(reads), job.object(reads.opposite()));
    let (seal, canary) = (seal_name(job), job.canary().quoted());
    let named = [Some(&*reads), Some(&*writes), Some(&*seal), Some(&*canary)];
    Ok(session.query_one(sql, &named).await?.bool(0)?)
}

async fn nothing_left(job: &JobName, session: &mut Session) -> Error {
    let sql = "select pg_catalog.string_agg(slot_name, ', ' order by slot_name) \
         from pg_catalog.pg_replication_slots where slot_name like 'walferry\\_%' \
         and database = pg_catalog.current_database()";
    let named = session.query_one(sql, &[]).await;
    let slots = named.ok().and_then(|row| row.opt(0).ok().flatten().map(str::to_string));
    let (job, peer) = (job.to_string(), session.peer().to_string());
    Gone::NothingLeft { job, peer, slots: slots.unwrap_or_default() }.into()
}

/// Up to where the stream that writes here has been applied, for people.
async fn progress(job: &JobName, session: &mut Session, writes: Stream) -> Result<String> {
    let sql = "select end_lsn from walferry.progress where stream = $1";
    let row = session.query_opt(sql, &[Some(&job.object(writes))]).await?;
    let lsn = row.map(|row| row.string(0)).transpose()?;
    Ok(lsn.map_or("the switch".to_string(), |lsn| format!("{lsn} in its log")))
}

/// Sets sequences that a column owns past the values in it; gives one line for each. Reads whole
/// tables where no index helps.
async fn set_sequences(side: &Config) -> Result<Vec<String>> {
    let mut session = Session::connect(side, Purpose::Sql).await?;
    let owned = session
        .query(
            "select s.seqrelid::regclass, pg_catalog.quote_ident(a.attname), a.attrelid::regclass, \
             pg_catalog.quote_literal(s.seqrelid::regclass::text) \
             from pg_catalog.pg_sequence s join pg_catalog.pg_depend d on d.objid = s.seqrelid \
                and d.classid = 'pg_catalog.pg_class'::regclass \
                and d.refclassid = 'pg_catalog.pg_class'::regclass and d.deptype in ('a', 'i') \
             join pg_catalog.pg_attribute a on a.attrelid = d.refobjid \
                and a.attnum = d.refobjsubid \
             where s.seqincrement > 0 and not a.attisdropped and a.atttypid in (20, 21, 23) \
             order by 1",
        )
        .await?;
    let mut lines = Vec::new();
    for row in &owned {
        let (sequence, column, table) = (row.str(0)?, row.str(1)?, row.str(2)?);
        let sql = format!(
            "select pg_catalog.setval({}, m.v) from {sequence} s, \
             (select pg_catalog.max({column})::int8 as v from {table}) m \
             where m.v > s.last_value or (m.v = s.last_value and not s.is_called)",
            row.str(3)?
        );
        if let Some(set) = session.query_opt(&sql, &[]).await? {
            lines.push(format!("sequence {sequence} set to {}", set.str(0)?));
        }
    }
    Ok(lines)
}
