//! What a fence leaves behind once it is sealed: triggers that refuse writes, and a read-only
//! database. They are opened where a flip leads to, shut again where it is undone, and dropped at
//! the end.
//!
//! Where tables are switched group by group, each is sealed on the side that does not own it, from
//! before the first switch on. A trigger for a statement fires for the table that the statement
//! names, and not for the partition its rows go to; so these have one for each row besides, which
//! is asked whatever way a row comes.

use std::collections::HashSet;
use std::time::Duration;

use super::Result;
use super::database::{self, Opening, open_database, tidy};
use crate::id::{JobName, QualifiedName};
use crate::pg::Session;

/// Triggers that are changed in one short transaction.
const BUNDLE: usize = 64;

/// How often that is tried before they are changed one by one.
const TRIES: usize = 3;

/// Name of the trigger with which a job seals a table: 54 bytes at most.
pub fn seal_name(job: &JobName) -> String {
    format!("walferry_seal_{job}")
}

/// And of the one for rows, that tables of a group have as well.
fn rows_seal_name(job: &JobName) -> String {
    format!("walferry_rows_{job}")
}

/// What is to be sealed.
#[derive(Clone, Copy, Debug)]
pub struct Sealing<'a> {
    /// By which job.
    pub job: &'a JobName,
    /// Which tables.
    pub tables: &'a [QualifiedName],
    /// They are a group of the job's: rows are refused too that come by a partitioned parent.
    pub is_group: bool,
}

impl Sealing<'_> {
    /// For each table the SQL by which its seal is shut, made where there is none: ends with a
    /// semicolon.
    pub async fn statements(&self, session: &mut Session) -> Result<Vec<String>> {
        let group = self.is_group.then_some(self.tables);
        let there = seals(session, self.job, "", group).await?;
        let there: HashSet<(&QualifiedName, &str)> =
            there.iter().map(|seal| (&seal.table, &*seal.trigger)).collect();
        let (seal, rows) = (seal_name(self.job), rows_seal_name(self.job));
        let shut = |table: &QualifiedName| {
            let on = table.quoted();
            let is_there = |trigger: &str| there.contains(&(table, trigger));
            if self.is_group && is_there(&seal) && is_there(&rows) {
                return turned(table, "enable", &[&seal, &rows]);
            }
            let enable = |trigger: &str| turned(table, "enable", &[trigger]);
            let said = if self.is_group { "'group'" } else { "" };
            let mut sql = match is_there(&seal) {
                true => enable(&seal),
                false => format!(
                    "create trigger {seal} before insert or update or delete or truncate on {on} \
                     for each statement execute procedure walferry.seal({said});"
                ),
            };
            if self.is_group {
                sql += &match is_there(&rows) {
                    true => enable(&rows),
                    false => format!(
                        "create trigger {rows} before insert or update or delete on {on} \
                         for each row execute procedure walferry.seal({said});"
                    ),
                };
            }
            sql
        };
        Ok(self.tables.iter().map(shut).collect())
    }

    /// Seals them, in short tries.
    pub async fn shut(&self, session: &mut Session) -> Result<()> {
        hasten(session).await;
        let statements = self.statements(session).await?;
        change(session, &statements).await
    }

    /// Takes their seals off, those that there are.
    pub async fn open(&self, session: &mut Session) -> Result<()> {
        open(session, self.job, Some(self.tables)).await
    }
}

/// A trigger of ours.
#[derive(Debug)]
pub(super) struct Seal {
    table: QualifiedName,
    trigger: String,
}

/// SQL that enables or disables triggers of a table at once: each such statement has the table's
/// description read anew.
fn turned(table: &QualifiedName, how: &str, triggers: &[&str]) -> String {
    let turns: Vec<String> = triggers.iter().map(|name| format!("{how} trigger {name}")).collect();
    format!("alter table {} {};", table.quoted(), turns.join(", "))
}

/// The job's seals, of those that `which` allows, on `group` alone or on every table.
async fn seals(
    session: &mut Session,
    job: &JobName,
    which: &str,
    group: Option<&[QualifiedName]>,
) -> Result<Vec<Seal>> {
    // Of thousands of tables a group's are few.
    let among = match group {
        None => "",
        Some(_) => {
            "and t.tgrelid = any (array(select pg_catalog.to_regclass(g)::oid \
             from pg_catalog.jsonb_array_elements_text($3::jsonb) g))"
        }
    };
    let sql = format!(
        "select n.nspname, c.relname, t.tgname from pg_catalog.pg_trigger t \
         join pg_catalog.pg_class c on c.oid = t.tgrelid \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where t.tgname in ($1, $2) and not t.tgisinternal {which} {among} order by 1, 2, 3"
    );
    let group = group.map(crate::catalog::list_of);
    let mut names = vec![Some(seal_name(job)), Some(rows_seal_name(job))];
    names.extend(group.map(Some));
    let names: Vec<Option<&str>> = names.iter().map(Option::as_deref).collect();
    let mut seals = Vec::new();
    for row in session.query_params(&sql, &names).await? {
        let table = QualifiedName::new(row.str(0)?, row.str(1)?);
        seals.push(Seal { table, trigger: row.string(2)? });
    }
    Ok(seals)
}

/// True if a switch has left this side shut to writers.
pub async fn is_shut(session: &mut Session, job: &JobName) -> Result<bool> {
    if !seals(session, job, SHUT, None).await?.is_empty() {
        return Ok(true);
    }
    database::noted(session, job, "and opened_at is null").await
}

/// Of these tables, those that are there and that the job has not shut.
pub async fn unsealed(
    session: &mut Session,
    job: &JobName,
    tables: &[QualifiedName],
) -> Result<Vec<QualifiedName>> {
    let sql = "select n.nspname, c.relname from pg_catalog.pg_class c \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where c.relkind in ('r', 'p') and not exists (select 1 from pg_catalog.pg_trigger t \
            where t.tgrelid = c.oid and t.tgname = $1 and t.tgenabled <> 'D') order by 1, 2";
    let wanted: HashSet<&QualifiedName> = tables.iter().collect();
    let mut open = Vec::new();
    for row in session.query_params(sql, &[Some(&seal_name(job))]).await? {
        let table = QualifiedName::new(row.str(0)?, row.str(1)?);
        if wanted.contains(&table) {
            open.push(table);
        }
    }
    Ok(open)
}

/// A lock wait cancels an autovacuum in the way only after deadlock_timeout (1 s), which is longer
/// than a short try waits. Only superusers may shorten it; gives false for others.
pub async fn hasten(session: &mut Session) -> bool {
    session.execute("set deadlock_timeout = '20ms'").await.is_ok()
}

/// For a side whose seal is soon to be opened while writers are held: ends an autovacuum that would
/// keep it shut. Best done while nobody is held, as it may take a second.
pub async fn clear_way(
    session: &mut Session,
    job: &JobName,
    group: Option<&[QualifiedName]>,
) -> Result<()> {
    if hasten(session).await {
        return Ok(());
    }
    let mut tables: Vec<QualifiedName> = Vec::new();
    for seal in seals(session, job, SHUT, group).await? {
        if tables.last() != Some(&seal.table) {
            tables.push(seal.table);
        }
    }
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
/// (which locks out writers for a moment, not readers), and the database may be written again; of a
/// `group`, its triggers alone. Idempotent.
pub async fn open(
    session: &mut Session,
    job: &JobName,
    group: Option<&[QualifiedName]>,
) -> Result<()> {
    let shut = seals(session, job, SHUT, group).await?;
    turn(session, &shut, "disable").await?;
    match group {
        Some(_) => Ok(()),
        None => open_database(session, job, Opening::ForGood).await,
    }
}

/// What an earlier flip of the job has shut on a side.
#[derive(Debug)]
pub struct Shut {
    seals: Vec<Seal>,
    database: bool,
}

impl Shut {
    /// Looks for it, on `group` alone or everywhere. Only the job itself changes it.
    pub async fn find(
        session: &mut Session,
        job: &JobName,
        group: Option<&[QualifiedName]>,
    ) -> Result<Shut> {
        let seals = seals(session, job, SHUT, group).await?;
        let database = group.is_none() && database::noted(session, job, "").await?;
        Ok(Shut { seals, database })
    }

    /// Opens it, by a flip that may still be undone, so that [`shut`] finds what it opened.
    pub async fn open_for_now(&self, session: &mut Session, job: &JobName) -> Result<()> {
        turn(session, &self.seals, "disable").await?;
        if self.database {
            open_database(session, job, Opening::ByFlip).await?;
        }
        Ok(())
    }
}

async fn turn(session: &mut Session, seals: &[Seal], how: &str) -> Result<()> {
    let statements = seals.chunk_by(|one, next| one.table == next.table).filter_map(|seals| {
        let triggers: Vec<&str> = seals.iter().map(|seal| &*seal.trigger).collect();
        Some(turned(&seals.first()?.table, how, &triggers))
    });
    change(session, &statements.collect::<Vec<String>>()).await
}

/// Many in one message, as writers may be waiting; where a lock is in the way, one by one.
async fn change(session: &mut Session, statements: &[String]) -> Result<()> {
    for bundle in statements.chunks(BUNDLE) {
        let mut done = false;
        for _ in 0..TRIES {
            done = bundle.len() > 1 && retry_once(session, &bundle.concat()).await?;
            if done || bundle.len() == 1 {
                break;
            }
        }
        for sql in bundle.iter().filter(|_| !done) {
            retry_locks(session, sql).await?;
        }
    }
    Ok(())
}

/// Shuts what [`Shut::open_for_now`] opened: triggers, and the database; of a `group`, its triggers
/// alone. Idempotent; makes no new seal.
pub async fn shut(
    session: &mut Session,
    job: &JobName,
    group: Option<&[QualifiedName]>,
) -> Result<()> {
    hasten(session).await;
    let open = seals(session, job, "and t.tgenabled = 'D'", group).await?;
    turn(session, &open, "enable").await?;
    match group {
        Some(_) => Ok(()),
        None => database::shut_again(session, job).await,
    }
}

/// Drops the job's seals for good, for finish and cancel. Idempotent.
pub async fn remove(session: &mut Session, job: &JobName) -> Result<()> {
    open_database(session, job, Opening::ForGood).await?;
    hasten(session).await;
    let seals = seals(session, job, "", None).await?;
    let drop = |seal: &Seal| {
        format!("drop trigger if exists {} on {};", seal.trigger, seal.table.quoted())
    };
    let statements: Vec<String> = seals.iter().map(drop).collect();
    change(session, &statements).await
}

/// Of triggers, those that are shut.
const SHUT: &str = "and t.tgenabled <> 'D'";

/// One short try; `false` if a lock was in the way.
async fn retry_once(session: &mut Session, sql: &str) -> Result<bool> {
    let sql = format!("begin; set local lock_timeout = '100ms'; {sql} commit");
    let outcome = session.execute(&sql).await;
    if session.in_transaction() {
        session.execute("rollback").await?;
    }
    match outcome {
        Ok(_) => Ok(true),
        // A client's own transaction may have locked two of them in another order.
        Err(error) if matches!(error.code(), Some("55P03" | "40P01")) => Ok(false),
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
            Err(error) if matches!(error.code(), Some("55P03" | "40P01")) && !deadline.passed() => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
