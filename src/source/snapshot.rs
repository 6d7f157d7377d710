//! Snapshots shared between sessions, and what they see.
//!
//! A copy reads many tables over many sessions under one snapshot. The slot's own snapshot dies
//! with its session; tables not finished by then are read again under one taken here. It need not
//! fit the slot: [`Snapshot::sees`] tells for each streamed transaction whether the copy already
//! has it.
//!
//! <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-SNAPSHOT-SYNCHRONIZATION>

use crate::change::Snapshot;
use crate::id::quote_literal;
use crate::lsn::Lsn;
use crate::pg::{self, Session};

use super::{Error, Result};

/// A snapshot that other sessions can use for as long as this value lives.
#[derive(Debug)]
pub struct ExportedSnapshot {
    session: Session,
    /// For [`begin_with_snapshot`].
    pub name: String,
    /// What it sees.
    pub snapshot: Snapshot,
    /// The WAL's insert position read after the snapshot was taken: every transaction it sees has
    /// its commit record before this. Once the target has applied up to here, no transaction that
    /// is still to come is in the copy.
    pub lsn: Lsn,
}

impl ExportedSnapshot {
    /// Ends the transaction that holds it and gives the session back.
    pub async fn close(mut self) -> Result<Session> {
        self.session.execute("commit").await?;
        Ok(self.session)
    }
}

/// Opens a REPEATABLE READ, READ ONLY transaction on `session` and exports its snapshot.
///
/// Errors on a standby, whose snapshots do not list running transactions: `Standby`.
pub async fn export(mut session: Session) -> Result<ExportedSnapshot> {
    let recovery = session.query("select pg_catalog.pg_is_in_recovery()").await?;
    if recovery.first().is_some_and(|row| row.bool(0).unwrap_or(false)) {
        return Err(Error::Standby { peer: session.peer().to_string() });
    }
    session.execute("begin isolation level repeatable read, read only").await?;
    let current = current_snapshot_sql(&session);
    // Statements of one transaction share its snapshot, so the second is after the first's.
    let name = one(&mut session, "select pg_catalog.pg_export_snapshot()").await?.string(0)?;
    let snapshot = one(&mut session, current).await?.parse(0)?;
    let lsn = one(&mut session, "select pg_catalog.pg_current_wal_insert_lsn()").await?.lsn(0)?;
    Ok(ExportedSnapshot { session, name, snapshot, lsn })
}

/// Opens a REPEATABLE READ, READ ONLY transaction that sees what the named snapshot sees, and tells
/// what that is. The caller ends the transaction.
///
/// Errors: `SnapshotGone` if its holder ended; the session is then outside any transaction.
pub async fn begin_with_snapshot(session: &mut Session, name: &str) -> Result<Snapshot> {
    session.execute("begin isolation level repeatable read, read only").await?;
    let set = format!("set transaction snapshot {}", quote_literal(name));
    if let Err(error) = session.execute(&set).await {
        if error.is_closed() {
            return Err(error.into());
        }
        session.execute("rollback").await?;
        return match error.code() {
            // 22023 up to 16, 42704 from 17 on.
            Some("22023" | "42704") => Err(Error::SnapshotGone { name: name.to_string() }),
            _ => Err(error.into()),
        };
    }
    current(session).await
}

/// What a statement begun now would see. On a primary only: on a standby `xip` is empty.
pub async fn current(session: &mut Session) -> Result<Snapshot> {
    let current = current_snapshot_sql(session);
    Ok(one(session, current).await?.parse(0)?)
}

/// The functions were renamed in 13; the text is the same.
fn current_snapshot_sql(session: &Session) -> &'static str {
    if session.major_version() >= 13 {
        "select pg_catalog.pg_current_snapshot()"
    } else {
        "select pg_catalog.txid_current_snapshot()"
    }
}

async fn one(session: &mut Session, sql: &str) -> pg::Result<pg::Row> {
    let rows = session.query(sql).await?;
    rows.into_iter().next().ok_or_else(|| pg::Error::Result(format!("no row: {sql}")))
}
