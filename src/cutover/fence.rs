//! What stops writers: locks, a read-only database, or nothing.
//!
//! *lock*: one transaction takes SHARE ROW EXCLUSIVE on every table (readers go on, writers wait)
//! and adds to each a statement trigger that refuses writes. Until it commits, the end of our
//! session for whatever reason undoes it all. Its commit is the seal: those who waited get the
//! trigger's error, a transaction with an old snapshot too, as triggers are read from the catalog
//! as it is now. Sessions with session_replication_role = replica, the reverse stream's, do not
//! fire it. A fence of a group of tables has the locks of those alone; its seal has a trigger for
//! each row too (`seal` says why). Where large objects move and the role is a superuser, their
//! catalogs are locked too.
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

use super::database::{self, refuse_unendable, shut_database};
use super::seal::{self, Sealing, hasten};
use super::{Error, Result, Rules};
use crate::catalog;
use crate::id::{JobName, QualifiedName};
use crate::large;
use crate::pg::{Config, Row, Session};
use crate::schema;

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

/// What a server may take to answer beyond the waits that it was told.
const RAISE_SLACK: Duration = Duration::from_secs(5);

/// A fence that is ready to be put up, with what could be prepared while writers still go on.
#[derive(Debug)]
pub struct Fence {
    kind: FenceKind,
    job: JobName,
    session: Session,
    lock_sql: String,
    trigger_sql: String,
    /// What the seal does beside the triggers, once it is known.
    silencing: Vec<String>,
    /// Once locks are held, the time that a switch may take.
    unbounded_sql: String,
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
        live: &Config,
        sealing: Sealing<'_>,
        max_hold: Duration,
    ) -> Result<Fence> {
        let (job, tables) = (sealing.job, sealing.tables);
        let mut session = Session::control(live).await?;
        let millis = (max_hold + Duration::from_secs(1)).as_millis();
        let unbounded_sql = format!(
            "set local statement_timeout = 0; set local lock_timeout = 0; \
             set local idle_in_transaction_session_timeout = {millis}"
        );
        hasten(&mut session).await;
        database::forget_opened(&mut session, job).await?;
        let mut trigger_sql = String::new();
        if kind == FenceKind::ReadOnly {
            refuse_unendable(&mut session).await?;
        }
        if kind == FenceKind::Lock {
            refuse_not_owned(&mut session, tables).await?;
            trigger_sql = sealing.statements(&mut session).await?.concat();
        }
        let names: Vec<String> = tables.iter().map(|t| format!("only {}", t.quoted())).collect();
        let lock_sql = names.join(", ");
        Ok(Fence {
            kind,
            job: job.clone(),
            session,
            lock_sql,
            trigger_sql,
            silencing: Vec::new(),
            unbounded_sql,
            has_large_objects: false,
        })
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

    /// Begins the transaction of one try, so that nothing but the locks is left for when clients
    /// are held. Stops nobody.
    pub async fn begin(&mut self, wait: Duration) -> Result<()> {
        self.session.set_patience(wait + RAISE_SLACK);
        if self.kind == FenceKind::Lock && !self.session.in_transaction() {
            // statement_timeout bounds the whole list: tables locked first would otherwise stay
            // locked through one lock_timeout for every table behind them.
            let millis = wait.as_millis().max(1);
            // A message of its own: releases before 11 start the statement timer with a message
            // only.
            // Routes may take long to hold their clients, and nothing is locked meanwhile.
            let begin = format!(
                "begin; set local lock_timeout = {millis}; set local statement_timeout = {millis}; \
                 set local idle_in_transaction_session_timeout = 0"
            );
            self.session.execute(&begin).await?;
        }
        Ok(())
    }

    /// One try to stop writers, for at most `wait`. `Ok(false)`: somebody holds a lock; nobody
    /// waits for us any more.
    pub async fn raise(&mut self, wait: Duration) -> Result<bool> {
        self.begin(wait).await?;
        match self.kind {
            FenceKind::None => Ok(true),
            FenceKind::ReadOnly => self.raise_read_only(wait).await,
            FenceKind::Lock if self.lock_sql.is_empty() => {
                self.session.execute(&self.unbounded_sql).await?;
                Ok(true)
            }
            FenceKind::Lock => {
                if !self.lock().await? {
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

    async fn lock(&mut self) -> Result<bool> {
        let sql = format!(
            "lock table {} in share row exclusive mode; {}",
            self.lock_sql, self.unbounded_sql
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
        if database::end_clients(&mut self.session, None).await? {
            return Ok(true);
        }
        seal::open(&mut self.session, &self.job, None).await?;
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
        let mut session = Session::control(live).await?;
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

    /// Makes the triggers in the fence's own transaction, and looks what has to go with its commit:
    /// what would act on rows that the stream writes here from then on. For a fence that is raised;
    /// nothing of it outlives this session before [`Fence::seal`].
    pub async fn prepare_seal(&mut self, rules: &Rules, tables: &[QualifiedName]) -> Result<()> {
        if self.kind == FenceKind::Lock && !self.trigger_sql.is_empty() {
            self.session.execute(&self.trigger_sql).await?;
        }
        self.silencing = rules.silencing_live(&mut self.session, tables).await?;
        Ok(())
    }

    /// Makes a fence that is raised and prepared outlive this session.
    pub async fn seal(&mut self) -> Result<()> {
        let mut statements = std::mem::take(&mut self.silencing);
        if self.kind == FenceKind::Lock {
            statements.push("commit".to_string());
        }
        Ok(schema::together(&mut self.session, &statements).await?)
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
            FenceKind::ReadOnly => seal::open(&mut self.session, &self.job, None).await,
        }
    }

    /// Transactions that hold locks in our way: for the error message.
    pub async fn blockers(&mut self) -> Result<String> {
        let mut rows = self.session.query(&format!("{BLOCKERS} and {HOLDS_LOCK} {OLDEST}")).await?;
        if rows.is_empty() {
            // A pooler that is paused waits for transactions without locks, too.
            rows = self.session.query(&format!("{BLOCKERS} and {IN_TRANSACTION} {OLDEST}")).await?;
        }
        let mut lines = described(&rows)?;
        if lines.is_empty() {
            lines.push("locks were held by transactions that have ended since".to_string());
        }
        Ok(lines.join("; "))
    }

    /// The transactions that this fence's session waits for now, asked by another session.
    pub async fn in_the_way(&self, other: &mut Session) -> Result<String> {
        let pid = self.session.process_id();
        let sql =
            format!("{BLOCKERS} and a.pid = any(pg_catalog.pg_blocking_pids({pid})) {OLDEST}");
        Ok(described(&other.query(&sql).await?)?.join("; "))
    }
}

/// Transactions of others that have written something, in no table that is fenced.
const UNFINISHED: &str = "select 1 from pg_catalog.pg_stat_activity \
     where datname = pg_catalog.current_database() and backend_xid is not null \
     and pid <> pg_catalog.pg_backend_pid() and application_name is distinct from \
        pg_catalog.current_setting('application_name') limit 1";

/// Rows of [`BLOCKERS`] for people.
fn described(rows: &[Row]) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for row in rows {
        lines.push(format!(
            "pid {} ({}, {}) in a transaction for {} s: {}",
            row.str(0)?,
            row.str(1)?,
            row.opt(2)?.unwrap_or("running"),
            row.str(3)?,
            row.opt(4)?.unwrap_or("")
        ));
    }
    Ok(lines)
}

/// Sessions of others. What they do is hidden from roles without pg_read_all_stats, all but the
/// locks they hold.
const BLOCKERS: &str = "select a.pid, coalesce(a.usename, 'autovacuum'), a.state, \
     coalesce(extract(epoch from pg_catalog.clock_timestamp() - a.xact_start), 0)::int8, \
     pg_catalog.left(pg_catalog.regexp_replace(a.query, '\\s+', ' ', 'g'), 80) \
     from pg_catalog.pg_stat_activity a \
     where a.datname = pg_catalog.current_database() and a.pid <> pg_catalog.pg_backend_pid() \
     and a.application_name is distinct from \
        pg_catalog.current_setting('application_name')";

/// Those that hold a lock which keeps a table from being fenced.
const HOLDS_LOCK: &str = "exists (select 1 from pg_catalog.pg_locks l where l.pid = a.pid \
     and l.locktype = 'relation' and l.granted and l.relation >= 16384 \
     and l.mode in ('RowExclusiveLock', 'ShareUpdateExclusiveLock', 'ShareLock', \
        'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))";

const IN_TRANSACTION: &str = "a.xact_start is not null";

const OLDEST: &str = "order by a.xact_start limit 5";

/// Whoever has the right TRIGGER may seal a table, but only its owner may open it again.
async fn refuse_not_owned(session: &mut Session, tables: &[QualifiedName]) -> Result<()> {
    let sql = "select n.nspname, c.relname \
         from pg_catalog.jsonb_array_elements_text($1::jsonb) t(name) \
         join pg_catalog.pg_class c on c.oid = pg_catalog.to_regclass(t.name) \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where not pg_catalog.pg_has_role(c.relowner, 'usage') order by 1, 2 limit 1";
    let row = session.query_opt(sql, &[Some(&catalog::list_of(tables))]).await?;
    let Some(row) = row else { return Ok(()) };
    Err(Error::NotOwned { table: QualifiedName::new(row.str(0)?, row.str(1)?) })
}
