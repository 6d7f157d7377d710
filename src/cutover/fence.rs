//! What stops writers: locks, a read-only database, or nothing.
//!
//! *lock*: one transaction takes SHARE ROW EXCLUSIVE on every table (readers go on, writers wait)
//! and adds to each a statement trigger that refuses writes. Until it commits, the end of our
//! session for whatever reason undoes it all. Its commit is the seal: those who waited get the
//! trigger's error, a transaction with an old snapshot too, as triggers are read from the catalog
//! as it is now. Sessions with session_replication_role = replica, the reverse stream's, do not
//! fire it.
//!
//! *read-only*: default_transaction_read_only on the database, and every other client session
//! ended. For roles that own the database but not its tables. Not airtight: a session may set it
//! off.
//!
//! <https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES>

use std::str::FromStr;
use std::time::Duration;

use super::{Error, Result, Rules};
use crate::id::{QualifiedName, quote_ident};
use crate::pg::{Config, Purpose, Session};

/// Name of the trigger that seals a table.
pub const SEAL: &str = "walferry_seal";

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
    session: Session,
    lock_sql: String,
    trigger_sql: String,
}

impl Fence {
    /// Opens the session and prepares the statements. Stops nobody.
    ///
    /// Should the network between us and the server go, the server itself ends the fence soon
    /// after `max_hold`.
    pub async fn prepare(
        kind: FenceKind,
        live: &Config,
        tables: &[QualifiedName],
        max_hold: Duration,
    ) -> Result<Fence> {
        let mut session = Session::connect(live, Purpose::Sql).await?;
        let millis = (max_hold + Duration::from_secs(1)).as_millis();
        session.execute(&format!("set idle_in_transaction_session_timeout = {millis}")).await?;
        // A lock wait cancels an autovacuum in the way only after deadlock_timeout (1 s), which is
        // longer than we ever wait. Only superusers may shorten it; others retry.
        let _ = session.execute("set deadlock_timeout = '20ms'").await;
        let mut trigger_sql = String::new();
        if kind == FenceKind::Lock {
            refuse_not_owned(&mut session, tables).await?;
            let sealed = sealed_tables(&mut session).await?;
            for table in tables {
                trigger_sql.push_str(&if sealed.contains(table) {
                    format!("alter table {} enable trigger {SEAL};", table.quoted())
                } else {
                    format!(
                        "create trigger {SEAL} before insert or update or delete or truncate on {} \
                         for each statement execute procedure walferry.seal();",
                        table.quoted()
                    )
                });
            }
        }
        let names: Vec<String> = tables.iter().map(|t| format!("only {}", t.quoted())).collect();
        let lock_sql = names.join(", ");
        Ok(Fence { kind, session, lock_sql, trigger_sql })
    }

    /// One try to stop writers, for at most `wait`. `Ok(false)`: somebody holds a lock; nobody
    /// waits for us any more.
    pub async fn raise(&mut self, wait: Duration) -> Result<bool> {
        match self.kind {
            _ if wait.is_zero() => Ok(false),
            FenceKind::None => Ok(true),
            FenceKind::ReadOnly => self.raise_read_only().await,
            FenceKind::Lock if self.lock_sql.is_empty() => {
                self.session.execute("begin").await?;
                Ok(true)
            }
            FenceKind::Lock => self.raise_lock(wait).await,
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

    async fn raise_read_only(&mut self) -> Result<bool> {
        let row = self.session.query_one("select pg_catalog.current_database()", &[]).await?;
        let database = quote_ident(row.str(0)?);
        let sql = format!("alter database {database} set default_transaction_read_only = on");
        self.session.execute(&sql).await?;
        // Sessions that are open keep their own setting: they must go. One that was just starting
        // may show itself late, so it takes two looks that find none.
        let mut empty = 0;
        for _ in 0..200 {
            let left = self.session.query(TERMINATE_CLIENTS).await?;
            empty = if left.is_empty() { empty + 1 } else { 0 };
            if empty == 2 {
                return Ok(true);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        open(&mut self.session).await?;
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

    /// Makes a raised fence outlive this session. What would act on rows that the stream writes here
    /// from now on goes with the same commit.
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
            FenceKind::None => Ok(()),
            FenceKind::Lock => {
                self.session.execute("rollback").await?;
                Ok(())
            }
            FenceKind::ReadOnly => open(&mut self.session).await,
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

/// Ends every client session but our own and our runner's. An application's own name may begin
/// with ours.
const TERMINATE_CLIENTS: &str = "select pid, pg_catalog.pg_terminate_backend(pid) \
     from pg_catalog.pg_stat_activity where datname = pg_catalog.current_database() \
     and backend_type = 'client backend' and pid <> pg_catalog.pg_backend_pid() \
     and application_name <> 'walferry' and application_name <> \
        pg_catalog.current_setting('application_name')";

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

/// Tables that carry the seal's trigger, enabled or not.
async fn sealed_tables(session: &mut Session) -> Result<Vec<QualifiedName>> {
    seals(session, "").await
}

/// Those whose seal is shut.
async fn closed_tables(session: &mut Session) -> Result<Vec<QualifiedName>> {
    seals(session, "and t.tgenabled <> 'D'").await
}

async fn seals(session: &mut Session, which: &str) -> Result<Vec<QualifiedName>> {
    let rows = session
        .query(&format!(
            "select n.nspname, c.relname from pg_catalog.pg_trigger t \
             join pg_catalog.pg_class c on c.oid = t.tgrelid \
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             where t.tgname = '{SEAL}' and not t.tgisinternal {which}"
        ))
        .await?;
    let names = rows.iter().map(|row| Ok(QualifiedName::new(row.str(0)?, row.str(1)?)));
    names.collect()
}

/// Opens whatever seal an earlier flip left on a database: its triggers are disabled (which locks
/// out writers for a moment, not readers), and the database may be written again. Idempotent.
pub async fn open(session: &mut Session) -> Result<()> {
    let shut: Vec<String> = closed_tables(session)
        .await?
        .iter()
        .map(|table| format!("alter table {} disable trigger {SEAL}", table.quoted()))
        .collect();
    // All in one message, as writers may be waiting; where a lock is in the way, one by one.
    if shut.len() > 1 && retry_once(session, &shut.join("; ")).await? {
        return writable(session).await;
    }
    for sql in &shut {
        retry_locks(session, sql).await?;
    }
    writable(session).await
}

/// Shuts the seals that [`open`] opened. Idempotent; makes none.
pub async fn shut(session: &mut Session) -> Result<()> {
    for table in seals(session, "and t.tgenabled = 'D'").await? {
        retry_locks(session, &format!("alter table {} enable trigger {SEAL}", table.quoted()))
            .await?;
    }
    Ok(())
}

/// Takes the default of a read-only fence back from the database.
async fn writable(session: &mut Session) -> Result<()> {
    let read_only = session
        .query(
            "select 1 from pg_catalog.pg_db_role_setting s \
             join pg_catalog.pg_database d on d.oid = s.setdatabase \
             where d.datname = pg_catalog.current_database() and s.setrole = 0 \
             and 'default_transaction_read_only=on' = any (s.setconfig)",
        )
        .await?;
    if !read_only.is_empty() {
        let row = session.query_one("select pg_catalog.current_database()", &[]).await?;
        let database = quote_ident(row.str(0)?);
        let sql = format!("alter database {database} reset default_transaction_read_only");
        session.execute(&sql).await?;
    }
    Ok(())
}

/// Drops the seal's triggers on a job's tables for good, for finish and cancel. `read_only`: its
/// fence was of that kind; a default of the database that someone else set stays. Idempotent.
pub async fn remove(
    session: &mut Session,
    read_only: bool,
    is_ours: impl Fn(&QualifiedName) -> bool,
) -> Result<()> {
    if read_only {
        writable(session).await?;
    }
    for table in sealed_tables(session).await?.into_iter().filter(is_ours) {
        let sql = format!("drop trigger if exists {SEAL} on {}", table.quoted());
        retry_locks(session, &sql).await?;
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
    loop {
        session.execute("set lock_timeout = '200ms'").await?;
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
}
