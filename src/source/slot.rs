//! Logical slots: making one without hanging, looking at one, dropping one.
//!
//! PostgreSQL gives a new slot its consistent point only when every transaction that was running
//! has ended, and waits for them inside the command, under no lock timeout that would be safe to
//! rely on. So creation here has a deadline of its own, says all the time whom it waits for, and
//! cancels (then terminates) its own backend when given up, so that no half-made slot stays
//! (pgcopydb#819, rocicorp/mono#5874).

use std::fmt;
use std::future::Future;
use std::time::Duration;

use crate::clock::Deadline;
use crate::id::quote_literal;
use crate::lsn::Lsn;
use crate::pg::{self, CancelHandle, CreatedSlot, Row, Session, SlotKind};

use super::{Error, Result};

/// Creation that takes longer than this is reported, and how often it is.
const REPORT_INTERVAL: Duration = Duration::from_millis(300);

/// How long a canceled or terminated backend may take to be gone.
const GIVE_UP_WAIT: Duration = Duration::from_secs(5);

/// A walsender whose client closed its socket is gone within milliseconds, unless it is busy
/// decoding; only then does it need ending.
const LEAVE_WAIT: Duration = Duration::from_millis(500);

/// SQLSTATEs: <https://www.postgresql.org/docs/current/errcodes-appendix.html>
const UNDEFINED_OBJECT: &str = "42704";
const DUPLICATE_OBJECT: &str = "42710";
const OBJECT_IN_USE: &str = "55006";

/// A transaction that slot creation waits for, or may come to wait for.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocker {
    /// Backend, `None` for a prepared transaction.
    pub pid: Option<i32>,
    /// Its (sub)transaction id.
    pub xid: u32,
    /// Global identifier of a prepared transaction.
    pub gid: Option<String>,
    /// Since its transaction began or was prepared, where we may see it.
    pub age: Option<Duration>,
    /// `pg_stat_activity.state`, where we may see it.
    pub state: Option<String>,
    /// Who: role, and application where it says.
    pub user: String,
    /// First 200 characters of its last query, where we may see it.
    pub query: Option<String>,
    /// The one waited for just now; the others began before it ends, and may be next.
    pub waited_for: bool,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.gid, self.pid) {
            (Some(gid), _) => write!(f, "prepared transaction {}", quote_literal(gid))?,
            (None, Some(pid)) => write!(f, "process {pid}")?,
            (None, None) => write!(f, "a prepared transaction")?,
        }
        write!(f, " (xid {}", self.xid)?;
        if !self.user.is_empty() {
            write!(f, ", {}", self.user)?;
        }
        if let Some(age) = self.age {
            write!(f, ", open for {:.0} s", age.as_secs_f64())?;
        }
        if let Some(state) = &self.state {
            write!(f, ", {state}")?;
        }
        if let Some(query) = &self.query {
            write!(f, ", last query: {query}")?;
        }
        f.write_str(")")?;
        match (&self.gid, self.pid) {
            (Some(gid), _) => write!(f, ", end it with: rollback prepared {}", quote_literal(gid)),
            (None, Some(pid)) => write!(f, ", end it with: select pg_terminate_backend({pid})"),
            (None, None) => Ok(()),
        }
    }
}

/// A slot just made, held together with the session that keeps its snapshot alive.
///
/// The snapshot dies with this value, or with its session's next command.
#[derive(Debug)]
pub struct HeldSlot {
    session: Session,
    /// Everything committed before it is in the snapshot, everything after comes from the slot.
    pub consistent_lsn: Lsn,
    /// For [`super::snapshot::begin_with_snapshot`].
    pub snapshot_name: String,
}

impl HeldSlot {
    /// Gives the session back; the snapshot is gone at its next command.
    pub fn release(self) -> Session {
        self.session
    }
}

/// What to make, and how long to try.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The slot's name.
    pub name: String,
    /// `pgoutput`, `wal2json`, `test_decoding`.
    pub plugin: String,
    /// How long it lives, and where.
    pub kind: SlotKind,
    /// Give up after this.
    pub wait: Duration,
}

/// Makes a slot with an exported snapshot over `replication`, a replication session.
///
/// Waits for open transactions up to `options.wait`; meanwhile, several times a second, `on_wait`
/// is told whom it waits for, as seen by `watcher`, an ordinary session on the same server. When
/// given up, or when this future is dropped, the backend is canceled. A future dropped in the
/// instant in which the slot comes into being leaves it: cleaning up means [`drop`] as well.
/// Errors: `Blocked` with nothing left behind, `SlotExists`, `Orphan`, and what the wire gives.
///
/// <https://www.postgresql.org/docs/current/protocol-replication.html#PROTOCOL-REPLICATION-CREATE-REPLICATION-SLOT>
pub async fn create(
    mut replication: Session,
    watcher: &mut Session,
    options: &CreateOptions,
    on_wait: impl FnMut(&[Blocker]),
) -> Result<HeldSlot> {
    let maker = Maker::of(&replication);
    let making = replication.create_slot(&options.name, &options.plugin, options.kind);
    let CreatedSlot { consistent_lsn, snapshot_name } =
        maker.watch(making, watcher, &options.name, options.wait, on_wait).await?;
    Ok(HeldSlot { session: replication, consistent_lsn, snapshot_name })
}

/// Makes a slot by SQL function, without a snapshot: for the reverse stream, whose target already
/// has the rows. Gives the consistent point. Waits and gives up like [`create`]; after an error
/// `session` may be closed.
pub async fn create_plain(
    session: &mut Session,
    watcher: &mut Session,
    options: &CreateOptions,
    on_wait: impl FnMut(&[Blocker]),
) -> Result<Lsn> {
    let kind = match options.kind {
        SlotKind::Temporary => "true",
        SlotKind::Permanent => "false",
        // Not two-phase: the reader's first START_REPLICATION says so.
        SlotKind::Failover => "false, false, true",
    };
    let sql = format!(
        "select lsn from pg_catalog.pg_create_logical_replication_slot({}, {}, {kind})",
        quote_literal(&options.name),
        quote_literal(&options.plugin),
    );
    let maker = Maker::of(session);
    let making = async {
        let rows = session.query(&sql).await?;
        rows.first().map_or_else(|| Err(no_row(&options.name)), |row| row.lsn(0))
    };
    maker.watch(making, watcher, &options.name, options.wait, on_wait).await
}

fn no_row(slot: &str) -> pg::Error {
    pg::Error::Result(format!("making slot {slot} gave no row"))
}

/// The backend that makes a slot. Cancels it when dropped before it is done.
struct Maker {
    pid: i32,
    cancel: Option<CancelHandle>,
}

impl Maker {
    fn of(session: &Session) -> Self {
        Maker { pid: session.process_id(), cancel: Some(session.cancel_handle()) }
    }

    async fn watch<T>(
        mut self,
        making: impl Future<Output = pg::Result<T>>,
        watcher: &mut Session,
        slot: &str,
        wait: Duration,
        mut on_wait: impl FnMut(&[Blocker]),
    ) -> Result<T> {
        tokio::pin!(making);
        let deadline = Deadline::after(wait);
        let mut seen = Vec::new();
        while !deadline.passed() {
            let pause = REPORT_INTERVAL.min(deadline.left());
            match tokio::time::timeout(pause, &mut making).await {
                Ok(made) => {
                    self.cancel = None;
                    return made.map_err(|error| creation_error(slot, error));
                }
                Err(_) => {
                    seen = blockers(watcher, self.pid).await?;
                    on_wait(&seen);
                }
            }
        }
        let outcome = self.give_up(making.as_mut(), watcher, slot).await?;
        if let Some(Err(error)) = outcome.filter(|o| o.as_ref().err().is_some_and(not_canceled)) {
            return Err(creation_error(slot, error));
        }
        let standby = match in_recovery(watcher).await? {
            true => {
                ". On a standby also run, on its primary: select pg_log_standby_snapshot() \
                 (16 and on), or checkpoint"
            }
            false => "",
        };
        let (slot, seconds) = (slot.to_string(), wait.as_secs());
        Err(Error::Blocked { slot, seconds, blockers: seen, standby })
    }

    /// Cancels, then terminates, and removes what was made in the very last moment.
    async fn give_up<T>(
        &mut self,
        mut making: std::pin::Pin<&mut impl Future<Output = pg::Result<T>>>,
        watcher: &mut Session,
        slot: &str,
    ) -> Result<Option<pg::Result<T>>> {
        let orphan =
            |detail: &str| Error::Orphan { slot: slot.to_string(), detail: detail.to_string() };
        if let Some(cancel) = &self.cancel {
            // A lost cancel request is as good as none; termination follows.
            let _ = cancel.cancel().await;
        }
        let mut outcome = tokio::time::timeout(GIVE_UP_WAIT, &mut making).await.ok();
        if outcome.is_none() {
            terminate(watcher, self.pid).await?;
            outcome = tokio::time::timeout(GIVE_UP_WAIT, &mut making).await.ok();
            if !backend_gone(watcher, self.pid).await? {
                return Err(orphan(&format!("process {} does not end", self.pid)));
            }
        }
        self.cancel = None;
        if !matches!(outcome, Some(Err(_))) {
            // It came into being while we gave up, or may have: had the name been taken before,
            // creation would have failed at once. A permanent slot must not stay.
            terminate(watcher, self.pid).await?;
            backend_gone(watcher, self.pid).await?;
            drop(watcher, slot).await?;
        }
        Ok(outcome)
    }
}

/// A caller that stops waiting (Ctrl-C) must not leave a backend waiting on its behalf: it would
/// not notice the closed socket until the last blocker ends, and then leave its slot.
impl Drop for Maker {
    fn drop(&mut self) {
        let Some(cancel) = self.cancel.take() else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { cancel.cancel().await });
        }
    }
}

fn not_canceled(error: &pg::Error) -> bool {
    !error.is_closed() && error.code() != Some("57014")
}

fn creation_error(slot: &str, error: pg::Error) -> Error {
    match error.code() {
        Some(DUPLICATE_OBJECT) => Error::SlotExists { slot: slot.to_string() },
        _ => Error::Pg(error),
    }
}

/// Transactions with an id, in any database, but that of backend `maker`. The one it waits for
/// now comes first, the oldest next. Locks are visible to every role; the rest only where allowed.
pub async fn blockers(watcher: &mut Session, maker: i32) -> Result<Vec<Blocker>> {
    let sql = format!(
        "with waited as (select transactionid from pg_catalog.pg_locks \
             where pid = {maker} and locktype = 'transactionid' and not granted) \
         select l.pid, l.transactionid, p.gid, \
           extract(epoch from pg_catalog.clock_timestamp() - coalesce(p.prepared, a.xact_start)), \
           a.state, coalesce(p.owner, a.usename, ''), coalesce(a.application_name, ''), \
           nullif(pg_catalog.left(a.query, 200), ''), \
           exists (select from waited w where w.transactionid = l.transactionid) \
         from pg_catalog.pg_locks l \
         left join pg_catalog.pg_stat_activity a on a.pid = l.pid \
         left join pg_catalog.pg_prepared_xacts p \
           on l.pid is null and p.transaction = l.transactionid \
         where l.locktype = 'transactionid' and l.granted and l.mode = 'ExclusiveLock' \
           and l.pid is distinct from {maker} \
         order by 9 desc, pg_catalog.age(l.transactionid) desc"
    );
    let mut blockers: Vec<Blocker> = Vec::new();
    for row in watcher.query(&sql).await? {
        let blocker = read_blocker(&row)?;
        // A backend holds a lock for each subtransaction; one line each is enough.
        let known = |b: &Blocker| blocker.pid.is_some() && b.pid == blocker.pid;
        if !blockers.iter().any(known) {
            blockers.push(blocker);
        }
    }
    Ok(blockers)
}

fn read_blocker(row: &Row) -> pg::Result<Blocker> {
    let (role, application) = (row.str(5)?, row.str(6)?);
    let user =
        if application.is_empty() { role.to_string() } else { format!("{role} in {application}") };
    let age: Option<f64> = row.parse_opt(3)?;
    Ok(Blocker {
        pid: row.parse_opt(0)?,
        xid: row.parse(1)?,
        gid: row.opt(2)?.map(str::to_string),
        age: age.map(|seconds| Duration::from_secs_f64(seconds.clamp(0.0, 1e9))),
        state: row.opt(4)?.map(str::to_string),
        user,
        query: row.opt(7)?.map(str::to_string),
        waited_for: row.bool(8)?,
    })
}

/// A slot as the server sees it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    /// Its name.
    pub name: String,
    /// Its output plugin; empty for a physical slot.
    pub plugin: String,
    /// Its database; empty for a physical slot.
    pub database: String,
    /// The backend that reads it.
    pub active_pid: Option<i32>,
    /// WAL is kept from here; `None` where the server removed it.
    pub restart_lsn: Option<Lsn>,
    /// Exclusive: what the reader said it has.
    pub confirmed_flush_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved`, `lost`; `None` before 13.
    pub wal_status: Option<String>,
    /// Why it was invalidated, from 17 on.
    pub invalidation_reason: Option<String>,
    /// Gone with the session that made it, or made by a standby and not in sync yet.
    pub temporary: bool,
    /// Standbys that synchronize slots keep it too. Never before 17.
    pub failover: bool,
    /// Bytes of WAL kept for it.
    pub retained_bytes: u64,
}

/// True if the slot gives prepared transactions at their PREPARE: once read so, it does for ever.
///
/// <https://www.postgresql.org/docs/current/view-pg-replication-slots.html>
pub(super) async fn is_two_phase(session: &mut Session, slot: &str) -> Result<bool> {
    let sql = format!(
        "select coalesce((pg_catalog.to_jsonb(s) ->> 'two_phase')::bool, false) \
         from pg_catalog.pg_replication_slots s where s.slot_name = {}",
        quote_literal(slot)
    );
    let rows = session.query(&sql).await?;
    Ok(rows.first().map(|row| row.bool(0)).transpose()?.unwrap_or(false))
}

impl SlotStatus {
    /// Why the server will not send from it any more, if so.
    pub fn lost_reason(&self) -> Option<&str> {
        if self.temporary {
            return Some("temporary: a standby was promoted before it had it in sync");
        }
        if let Some(reason) = &self.invalidation_reason {
            return Some(reason);
        }
        match (self.wal_status.as_deref(), self.restart_lsn) {
            (Some("lost"), _) => Some("wal_status is lost"),
            (_, None) => Some("it has no restart_lsn"),
            _ => None,
        }
    }
}

/// The slot of that name, or `None`. Works on SQL and replication sessions of 10 to 18, on
/// primaries and standbys.
///
/// <https://www.postgresql.org/docs/current/view-pg-replication-slots.html>
pub async fn status(session: &mut Session, name: &str) -> Result<Option<SlotStatus>> {
    // Columns that came with later versions are asked of the row as JSON, which lacks them before.
    // 16 says why only by a column of its own.
    let sql = format!(
        "select s.slot_name, coalesce(s.plugin, ''), coalesce(s.database, ''), s.active_pid, \
           s.restart_lsn, s.confirmed_flush_lsn, pg_catalog.to_jsonb(s) ->> 'wal_status', \
           coalesce(pg_catalog.to_jsonb(s) ->> 'invalidation_reason', \
             case when (pg_catalog.to_jsonb(s) ->> 'conflicting')::bool then 'conflicting' end), \
           coalesce(greatest(pg_catalog.pg_wal_lsn_diff( \
             case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn() \
               else pg_catalog.pg_current_wal_lsn() end, s.restart_lsn), 0), 0)::int8, \
           s.temporary, coalesce((pg_catalog.to_jsonb(s) ->> 'failover')::bool, false) \
         from pg_catalog.pg_replication_slots s where s.slot_name = {}",
        quote_literal(name)
    );
    let rows = session.query(&sql).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some(SlotStatus {
        name: row.string(0)?,
        plugin: row.string(1)?,
        database: row.string(2)?,
        active_pid: row.parse_opt(3)?,
        restart_lsn: row.parse_opt(4)?,
        confirmed_flush_lsn: row.parse_opt(5)?,
        wal_status: row.opt(6)?.map(str::to_string),
        invalidation_reason: row.opt(7)?.map(str::to_string),
        retained_bytes: row.parse(8)?,
        temporary: row.bool(9)?,
        failover: row.bool(10)?,
    }))
}

/// Drops the slot by its exact name (never by pattern: etl#679); `false` if there was none.
///
/// One read by a walsender of walferry (by its application_name) is taken from it by terminating
/// that walsender; one read by anyone else is left alone: `SlotInUse`.
pub async fn drop(session: &mut Session, name: &str) -> Result<bool> {
    let sql = format!("select pg_catalog.pg_drop_replication_slot({})", quote_literal(name));
    let deadline = Deadline::after(GIVE_UP_WAIT * 2);
    loop {
        match session.query(&sql).await {
            Ok(_) => return Ok(true),
            Err(error) => match error.code() {
                Some(UNDEFINED_OBJECT) => return Ok(false),
                Some(OBJECT_IN_USE) if !deadline.passed() => {}
                _ => return Err(error.into()),
            },
        }
        free(session, name, deadline.left()).await?;
    }
}

/// Waits until nobody reads the slot, for at most `wait`; a walsender of walferry's own that does
/// not let it go by itself soon (after a cut network, which it has not noticed) is terminated. The
/// caller holds the job's lease, so no other runner of the job is alive.
///
/// Errors: `SlotInUse` if someone else reads it, or it is not let go in time.
pub async fn free(session: &mut Session, name: &str, wait: Duration) -> Result<()> {
    let (deadline, patience) = (Deadline::after(wait), Deadline::after(LEAVE_WAIT.min(wait)));
    loop {
        let Some((pid, user)) = active(session, name).await? else { return Ok(()) };
        let ours = user.starts_with("walferry");
        if ours && patience.passed() {
            terminate(session, pid).await?;
        }
        if deadline.passed() || !ours {
            return Err(Error::SlotInUse { slot: name.to_string(), pid, user });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn active(session: &mut Session, name: &str) -> Result<Option<(i32, String)>> {
    let sql = format!(
        "select s.active_pid, coalesce(a.application_name, '') \
         from pg_catalog.pg_replication_slots s \
         left join pg_catalog.pg_stat_activity a on a.pid = s.active_pid \
         where s.slot_name = {} and s.active_pid is not null",
        quote_literal(name)
    );
    match session.query(&sql).await?.first() {
        Some(row) => Ok(Some((row.parse(0)?, row.string(1)?))),
        None => Ok(None),
    }
}

async fn terminate(session: &mut Session, pid: i32) -> Result<()> {
    session.query(&format!("select pg_catalog.pg_terminate_backend({pid})")).await?;
    Ok(())
}

/// Waits until the backend has gone from pg_stat_activity; `false` if it does not in time.
async fn backend_gone(session: &mut Session, pid: i32) -> Result<bool> {
    let deadline = Deadline::after(GIVE_UP_WAIT);
    let sql = format!("select 1 from pg_catalog.pg_stat_activity where pid = {pid}");
    while !session.query(&sql).await?.is_empty() {
        if deadline.passed() {
            return Ok(false);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(true)
}

/// True on a standby.
pub(super) async fn in_recovery(session: &mut Session) -> Result<bool> {
    let rows = session.query("select pg_catalog.pg_is_in_recovery()").await?;
    rows.first().map_or(Ok(false), |row| Ok(row.bool(0)?))
}
