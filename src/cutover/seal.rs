//! What a fence leaves behind once it is sealed: triggers that refuse writes, and a read-only
//! database. They are opened where a flip leads to, shut again where it is undone, and dropped at
//! the end.

use std::time::Duration;

use super::Result;
use super::database::{self, Opening, open_database, tidy};
use crate::id::{JobName, QualifiedName};
use crate::pg::Session;

/// Name of the trigger with which a job seals a table: 54 bytes at most.
pub fn seal_name(job: &JobName) -> String {
    format!("walferry_seal_{job}")
}

/// Tables that carry the job's seal, of those that `which` allows.
pub(super) async fn seals(
    session: &mut Session,
    job: &JobName,
    which: &str,
) -> Result<Vec<QualifiedName>> {
    let sql = format!(
        "select n.nspname, c.relname from pg_catalog.pg_trigger t \
         join pg_catalog.pg_class c on c.oid = t.tgrelid \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where t.tgname = $1 and not t.tgisinternal {which}"
    );
    let rows = session.query_params(&sql, &[Some(&seal_name(job))]).await?;
    let names = rows.iter().map(|row| Ok(QualifiedName::new(row.str(0)?, row.str(1)?)));
    names.collect()
}

/// True if a switch has left this side shut to writers.
pub async fn is_shut(session: &mut Session, job: &JobName) -> Result<bool> {
    if !seals(session, job, "and t.tgenabled <> 'D'").await?.is_empty() {
        return Ok(true);
    }
    database::noted(session, job, "and opened_at is null").await
}

/// A lock wait cancels an autovacuum in the way only after deadlock_timeout (1 s), which is longer
/// than a short try waits. Only superusers may shorten it; gives false for others.
pub async fn hasten(session: &mut Session) -> bool {
    session.execute("set deadlock_timeout = '20ms'").await.is_ok()
}

/// For a side whose seal is soon to be opened while writers are held: ends an autovacuum that would
/// keep it shut. Best done while nobody is held, as it may take a second.
pub async fn clear_way(session: &mut Session, job: &JobName) -> Result<()> {
    if hasten(session).await {
        return Ok(());
    }
    let tables = seals(session, job, "and t.tgenabled <> 'D'").await?;
    for table in tables {
        let sql = format!(
            "begin; set local lock_timeout = '1200ms'; \
             lock table only {} in share row exclusive mode",
            table.quoted()
        );
        // In the way may also be somebody else, who is gone by the time it matters, or is named.
        let outcome = session.execute(&sql).await;
        if outcome.as_ref().is_err_and(crate::pg::Error::is_closed) {
            outcome?;
        }
        tidy(session).await?;
    }
    Ok(())
}

/// Opens whatever seal an earlier flip of the job left on a database: its triggers are disabled
/// (which locks out writers for a moment, not readers), and the database may be written again.
/// Idempotent.
pub async fn open(session: &mut Session, job: &JobName) -> Result<()> {
    let shut = seals(session, job, "and t.tgenabled <> 'D'").await?;
    open_triggers(session, job, &shut).await?;
    open_database(session, job, Opening::ForGood).await
}

/// What an earlier flip of the job has shut on a side.
#[derive(Debug)]
pub struct Shut {
    tables: Vec<QualifiedName>,
    database: bool,
}

impl Shut {
    /// Looks for it. Only the job itself changes it.
    pub async fn find(session: &mut Session, job: &JobName) -> Result<Shut> {
        let tables = seals(session, job, "and t.tgenabled <> 'D'").await?;
        let database = database::noted(session, job, "").await?;
        Ok(Shut { tables, database })
    }

    /// Opens it, by a flip that may still be undone, so that [`shut`] finds what it opened.
    pub async fn open_for_now(&self, session: &mut Session, job: &JobName) -> Result<()> {
        open_triggers(session, job, &self.tables).await?;
        if self.database {
            open_database(session, job, Opening::ByFlip).await?;
        }
        Ok(())
    }
}

async fn open_triggers(
    session: &mut Session,
    job: &JobName,
    tables: &[QualifiedName],
) -> Result<()> {
    let seal = seal_name(job);
    let shut: Vec<String> = tables
        .iter()
        .map(|table| format!("alter table {} disable trigger {seal}", table.quoted()))
        .collect();
    // All in one message, as writers may be waiting; where a lock is in the way, one by one.
    if shut.len() > 1 && retry_once(session, &shut.join("; ")).await? {
        return Ok(());
    }
    for sql in &shut {
        retry_locks(session, sql).await?;
    }
    Ok(())
}

/// Shuts what [`open_for_now`] opened: triggers, and the database. Idempotent; makes no new seal.
pub async fn shut(session: &mut Session, job: &JobName) -> Result<()> {
    let seal = seal_name(job);
    hasten(session).await;
    for table in seals(session, job, "and t.tgenabled = 'D'").await? {
        retry_locks(session, &format!("alter table {} enable trigger {seal}", table.quoted()))
            .await?;
    }
    database::shut_again(session, job).await
}

/// Drops the job's seals for good, for finish and cancel. Idempotent.
pub async fn remove(session: &mut Session, job: &JobName) -> Result<()> {
    open_database(session, job, Opening::ForGood).await?;
    hasten(session).await;
    let seal = seal_name(job);
    for table in seals(session, job, "").await? {
        retry_locks(session, &format!("drop trigger if exists {seal} on {}", table.quoted()))
            .await?;
    }
    Ok(())
}

/// One short try; `false` if a lock was in the way.
async fn retry_once(session: &mut Session, sql: &str) -> Result<bool> {
    let sql = format!("begin; set local lock_timeout = '100ms'; {sql}; commit");
    let outcome = session.execute(&sql).await;
    if session.in_transaction() {
        session.execute("rollback").await?;
    }
    match outcome {
        Ok(_) => Ok(true),
        Err(error) if error.code() == Some("55P03") => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Runs DDL that needs a table lock in short tries, so that nobody queues behind it for long.
async fn retry_locks(session: &mut Session, sql: &str) -> Result<()> {
    let deadline = crate::clock::Deadline::after(Duration::from_secs(60));
    for tries in 0.. {
        // After some short ones, tries that outlast the deadlock_timeout of roles that may
        // not set it.
        let millis = if tries < 5 { 200 } else { 1200 };
        session.execute(&format!("set lock_timeout = {millis}")).await?;
        let outcome = session.execute(sql).await;
        if !outcome.as_ref().is_err_and(crate::pg::Error::is_closed) {
            session.execute("set lock_timeout = 0").await?;
        }
        match outcome {
            Ok(_) => return Ok(()),
            Err(error) if error.code() == Some("55P03") && !deadline.passed() => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
