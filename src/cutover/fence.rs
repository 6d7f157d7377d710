//! What stops writers: locks, a read-only database, or nothing.
//!
//! *lock*: one transaction takes SHARE ROW EXCLUSIVE on every table (readers go on, writers wait)
//! and adds to each a statement trigger that refuses writes. Until it commits, the end of our
//! session for whatever reason undoes it all. Its commit is the seal: those who waited get the
//! trigger's error, a transaction with an old snapshot too, as triggers are read from the catalog
//! as it is now. Sessions with session_replication_role = replica, the reverse stream's, do not
//! fire it. Where large objects move and the role is a superuser, their catalogs are locked too.
//!
//! *read-only*: default_transaction_read_only on the database, and every other client session
//! ended. For roles that own the database but not its tables. Not airtight: a session may set it
//! off. What the database had before is kept in walferry.read_only, in the same transaction, and
//! given back by whoever takes the fence down.
//!
//! Several jobs may move tables of one database: each has seals of its own name, and a database
//! stays read-only until the last job that made it so lets go.
//!
//! <https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES>

use std::str::FromStr;
use std::time::Duration;

use super::database::{self, open_database, refuse_unendable, shut_database, tidy};
use super::{Error, Result, Rules};
use crate::id::{JobName, QualifiedName};
use crate::large;
use crate::pg::{Config, Purpose, Session};

/// Name of the trigger with which a job seals a table: 54 bytes at most.
pub fn seal_name(job: &JobName) -> String {
    format!("walferry_seal_{job}")
}

/// `--fence`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceKind {
    /// Locks and triggers.
    Lock,
    /// The database becomes read-only.
    ReadOnly,
    /// The routes alone stop writers.
    None,
}

impl FenceKind {
    /// As written on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            FenceKind::Lock => "lock",
            FenceKind::ReadOnly => "read-only",
            FenceKind::None => "none",
        }
    }
}

impl FromStr for FenceKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [FenceKind::Lock, FenceKind::ReadOnly, FenceKind::None]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| Error::UnknownFence(text.to_string()))
    }
}

/// A fence that is ready to be put up, with what could be prepared while writers still go on.
#[derive(Debug)]
pub struct Fence {
    kind: FenceKind,
    job: JobName,
    session: Session,
    lock_sql: String,
    trigger_sql: String,
    /// Writers of large objects are stopped too, by locks on their catalogs.
    has_large_objects: bool,
}

impl Fence {
    /// Opens the session and prepares the statements. Stops nobody.
    ///
    /// Should the network between us and the server go, the server itself ends the fence soon
    /// after `max_hold`.
    pub async fn prepare(
        kind: FenceKind,
        job: &JobName,
        live: &Config,
        tables: &[QualifiedName],
        max_hold: Duration,
    ) -> Result<Fence> {
        let mut session = Session::connect(live, Purpose::Sql).await?;
        let millis = (max_hold + Duration::from_secs(1)).as_millis();
        session.execute(&format!("set idle_in_transaction_session_timeout = {millis}")).await?;
        hasten(&mut session).await;
        let mut trigger_sql = String::new();
        if kind == FenceKind::ReadOnly {
            refuse_unendable(&mut session).await?;
        }
        if kind == FenceKind::Lock {
            refuse_not_owned(&mut session, tables).await?;
            let seal = seal_name(job);
            let sealed = seals(&mut session, job, "").await?;
            for table in tables {
                trigger_sql.push_str(&if sealed.contains(table) {
                    format!("alter table {} enable trigger {seal};", table.quoted())
                } else {
                    format!(
                        "create trigger {seal} before insert or update or delete or truncate on {} \
                         for each statement execute procedure walferry.seal();",
                        table.quoted()
                    )
                });
            }
        }
        let names: Vec<String> = tables.iter().map(|t| format!("only {}", t.quoted())).collect();
        let lock_sql = names.join(", ");
        let (job, has_large_objects) = (job.clone(), false);
        Ok(Fence { kind, job, session, lock_sql, trigger_sql, has_large_objects })
    }

    /// Makes a fence of locks stop those who write large objects, too, where there are any and the
    /// role may lock their catalogs. Before the fence is raised.
    pub async fn take_large_objects(&mut self) -> Result<()> {
        let session = &mut self.session;
        self.has_large_objects = self.kind == FenceKind::Lock
            && large::count(session).await? > 0
            && large::are_lockable(session).await?;
        if self.has_large_objects {
            let more = if self.lock_sql.is_empty() { "" } else { ", " };
            self.lock_sql.push_str(more);
            self.lock_sql.push_str("pg_catalog.pg_largeobject, pg_catalog.pg_largeobject_metadata");
        }
        Ok(())
    }

    /// One try to stop writers, for at most `wait`. `Ok(false)`: somebody holds a lock; nobody
    /// waits for us any more.
    pub async fn raise(&mut self, wait: Duration) -> Result<bool> {
        match self.kind {
            FenceKind::None => Ok(true),
            FenceKind::ReadOnly => self.raise_read_only(wait).await,
            FenceKind::Lock if self.lock_sql.is_empty() => {
                self.session.execute("begin").await?;
                Ok(true)
            }
            FenceKind::Lock => {
                if !self.raise_lock(wait).await? {
                    return Ok(false);
                }
                // One made or removed holds no lock until its transaction ends.
                if self.has_large_objects && !self.session.query(UNFINISHED).await?.is_empty() {
                    self.session.execute("rollback").await?;
                    return Ok(false);
                }
                Ok(true)
            }
        }
    }

    async fn raise_lock(&mut self, wait: Duration) -> Result<bool> {
        // statement_timeout bounds the whole list: tables locked first would otherwise stay locked
        // through one lock_timeout for every table behind them.
        let millis = wait.as_millis().max(1);
        // Two messages: releases before 11 start the statement timer with a message only.
        let begin = format!(
            "begin; set local lock_timeout = {millis}; set local statement_timeout = {millis}"
        );
        self.session.execute(&begin).await?;
        let sql = format!(
            "lock table {} in share row exclusive mode; set local statement_timeout = 0; \
             set local lock_timeout = 0; {}",
            self.lock_sql, self.trigger_sql
        );
        match self.session.execute(&sql).await {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.code(), Some("55P03" | "57014" | "40P01")) => {
                self.session.execute("rollback").await?;
                Ok(false)
            }
            Err(error) => {
                if !error.is_closed() {
                    self.session.execute("rollback").await?;
                }
                Err(error.into())
            }
        }
    }

    async fn raise_read_only(&mut self, wait: Duration) -> Result<bool> {
        match shut_database(&mut self.session, &self.job, wait).await {
            Err(Error::Pg(error)) if error.code() == Some("55P03") => return Ok(false),
            outcome => outcome?,
        }
        // Sessions that are open keep their own setting: they must go. One that was just starting
        // may show itself late, so it takes two looks that find none.
        let mut empty = 0;
        for _ in 0..200 {
            empty = if database::empty(&mut self.session).await? { empty + 1 } else { 0 };
            if empty == 2 {
                return Ok(true);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        open(&mut self.session, &self.job).await?;
        Ok(false)
    }

    /// What it is.
    pub fn kind(&self) -> FenceKind {
        self.kind
    }

    /// Lets writers go on, whatever state the session is in; ends its backend if it must.
    pub async fn abandon(mut self, live: &Config) -> Result<()> {
        if self.lower().await.is_ok() {
            return Ok(());
        }
        let pid = self.session.process_id().to_string();
        drop(self.session);
        let mut session = Session::connect(live, Purpose::Sql).await?;
        loop {
            let left = session
                .query_opt(
                    "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity \
                     where pid = $1 and application_name = \
                        pg_catalog.current_setting('application_name')",
                    &[Some(&pid)],
                )
                .await?;
            if left.is_none() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Makes a raised fence outlive this session. What would act on rows that the stream writes
    /// here from now on goes with the same commit.
    pub async fn seal(&mut self, rules: &Rules, tables: &[QualifiedName]) -> Result<()> {
        rules.silence_live(&mut self.session, tables).await?;
        if self.kind == FenceKind::Lock {
            self.session.execute("commit").await?;
        }
        Ok(())
    }

    /// Lets writers go on; for a fence that is raised and not sealed.
    pub async fn lower(&mut self) -> Result<()> {
        match self.kind {
            // Without locks too a transaction may be open, or its commit under way: then this fails
            // and the backend is ended.
            FenceKind::None | FenceKind::Lock => {
                self.session.execute("rollback").await?;
                Ok(())
            }
            FenceKind::ReadOnly => open(&mut self.session, &self.job).await,
        }
    }

    /// Transactions that hold locks in our way: for the error message.
    pub async fn blockers(&mut self) -> Result<String> {
        let mut rows = self.session.query(&format!("{BLOCKERS} and {HOLDS_LOCK} {OLDEST}")).await?;
        if rows.is_empty() {
            // A pooler that is paused waits for transactions without locks, too.
            rows = self.session.query(&format!("{BLOCKERS} {OLDEST}")).await?;
        }
        let mut lines = Vec::new();
        for row in &rows {
            lines.push(format!(
                "pid {} ({}, {}) in a transaction for {} s: {}",
                row.str(0)?,
                row.str(1)?,
                row.opt(2)?.unwrap_or("running"),
                row.str(3)?,
                row.opt(4)?.unwrap_or("")
            ));
        }
        if lines.is_empty() {
            lines.push("locks were held by transactions that have ended since".to_string());
        }
        Ok(lines.join("; "))
    }
}

/// Transactions of others that have written something, in no table that is fenced.
const UNFINISHED: &str = "select 1 from pg_catalog.pg_stat_activity \
     where datname = pg_catalog.current_database() and backend_xid is not null \
     and pid <> pg_catalog.pg_backend_pid() and application_name is distinct from \
        pg_catalog.current_setting('application_name') limit 1";

/// Transactions of others.
const BLOCKERS: &str = "select a.pid, coalesce(a.usename, 'autovacuum'), a.state, \
     coalesce(extract(epoch from pg_catalog.clock_timestamp() - a.xact_start), 0)::int8, \
     pg_catalog.left(pg_catalog.regexp_replace(a.query, '\\s+', ' ', 'g'), 80) \
     from pg_catalog.pg_stat_activity a \
     where a.datname = pg_catalog.current_database() and a.pid <> pg_catalog.pg_backend_pid() \
     and a.xact_start is not null and a.application_name is distinct from \
        pg_catalog.current_setting('application_name')";

/// Those that hold a lock which keeps a table from being fenced.
const HOLDS_LOCK: &str = "exists (select 1 from pg_catalog.pg_locks l where l.pid = a.pid \
     and l.locktype = 'relation' and l.granted and l.relation >= 16384 \
     and l.mode in ('RowExclusiveLock', 'ShareUpdateExclusiveLock', 'ShareLock', \
        'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))";

const OLDEST: &str = "order by a.xact_start limit 5";

/// Whoever has the right TRIGGER may seal a table, but only its owner may open it again.
async fn refuse_not_owned(session: &mut Session, tables: &[QualifiedName]) -> Result<()> {
    let rows = session
        .query(
            "select n.nspname, c.relname from pg_catalog.pg_class c \
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             where c.relkind in ('r', 'p') and not pg_catalog.pg_has_role(c.relowner, 'usage')",
        )
        .await?;
    for row in &rows {
        let table = QualifiedName::new(row.str(0)?, row.str(1)?);
        if tables.contains(&table) {
            return Err(Error::NotOwned { table });
        }
    }
    Ok(())
}

/// Tables that carry the job's seal, of those that `which` allows.
async fn seals(session: &mut Session, job: &JobName, which: &str) -> Result<Vec<QualifiedName>> {
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
    let seal = seal_name(job);
    let shut: Vec<String> = seals(session, job, "and t.tgenabled <> 'D'")
        .await?
        .iter()
        .map(|table| format!("alter table {} disable trigger {seal}", table.quoted()))
        .collect();
    // All in one message, as writers may be waiting; where a lock is in the way, one by one.
    if shut.len() > 1 && retry_once(session, &shut.join("; ")).await? {
        return open_database(session, job).await;
    }
    for sql in &shut {
        retry_locks(session, sql).await?;
    }
    open_database(session, job).await
}

/// Shuts the seals that [`open`] opened. Idempotent; makes none.
pub async fn shut(session: &mut Session, job: &JobName) -> Result<()> {
    let seal = seal_name(job);
    hasten(session).await;
    for table in seals(session, job, "and t.tgenabled = 'D'").await? {
        retry_locks(session, &format!("alter table {} enable trigger {seal}", table.quoted()))
            .await?;
    }
    Ok(())
}

/// Drops the job's seals for good, for finish and cancel. Idempotent.
pub async fn remove(session: &mut Session, job: &JobName) -> Result<()> {
    open_database(session, job).await?;
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
