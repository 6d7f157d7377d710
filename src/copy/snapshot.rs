//! The snapshot that all workers share.
//!
//! <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-SNAPSHOT-SYNCHRONIZATION>

use super::{Error, Result};
use crate::change::Snapshot;
use crate::id::quote_literal;
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, Session};

/// Where the snapshot comes from. The caller keeps the session that exported it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotSource {
    /// The one that came with the slot: rows in it and changes from the slot fit without a gap.
    Slot {
        /// For SET TRANSACTION SNAPSHOT.
        name: String,
    },
    /// Another one, later than the slot's.
    Fresh {
        /// For SET TRANSACTION SNAPSHOT.
        name: String,
        /// What it sees.
        snapshot: Snapshot,
        /// A position that every transaction it sees had committed before.
        lsn: Lsn,
    },
}

impl SnapshotSource {
    /// The name for SET TRANSACTION SNAPSHOT.
    pub fn name(&self) -> &str {
        match self {
            SnapshotSource::Slot { name } | SnapshotSource::Fresh { name, .. } => name,
        }
    }

    /// What is stored with a part: `slot`, or the snapshot itself.
    pub(super) fn stored(&self) -> String {
        match self {
            SnapshotSource::Slot { .. } => "slot".to_string(),
            SnapshotSource::Fresh { snapshot, .. } => snapshot.to_string(),
        }
    }

    /// The position stored with it.
    pub(super) fn lsn(&self) -> Lsn {
        match self {
            SnapshotSource::Slot { .. } => Lsn::ZERO,
            SnapshotSource::Fresh { lsn, .. } => *lsn,
        }
    }
}

/// Begins a transaction on `session` and exports its snapshot, for as long as the session stays in
/// it. The source has to be a primary: a standby's snapshots do not name running transactions.
pub async fn export_snapshot(session: &mut Session) -> Result<SnapshotSource> {
    session.execute("begin isolation level repeatable read read only").await?;
    let function = current_snapshot(session);
    // The position is read after the snapshot was taken, so nothing the snapshot sees is past it.
    let sql = format!("select pg_catalog.pg_export_snapshot(), {function}");
    let row = session.query_one(&sql, &[]).await?;
    let lsn = session.query_one("select pg_catalog.pg_current_wal_insert_lsn()", &[]).await?;
    let snapshot = row.str(1)?.parse().map_err(|e| Error::Bug(format!("{e}")))?;
    Ok(SnapshotSource::Fresh { name: row.string(0)?, snapshot, lsn: lsn.lsn(0)? })
}

fn current_snapshot(session: &Session) -> &'static str {
    if session.major_version() >= 13 {
        "pg_catalog.pg_current_snapshot()"
    } else {
        "pg_catalog.txid_current_snapshot()"
    }
}

/// A session on the source in a read-only transaction under the snapshot, and the snapshot's text,
/// the same for every session that imports it.
pub(super) async fn import(config: &Config, source: &SnapshotSource) -> Result<(Session, String)> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    session.execute("begin isolation level repeatable read read only").await?;
    let set = format!("set transaction snapshot {}", quote_literal(source.name()));
    if let Err(error) = session.execute(&set).await {
        return Err(lost(source, error));
    }
    let sql = format!("select {}", current_snapshot(&session));
    let text = session.query_one(&sql, &[]).await?.string(0)?;
    Ok((session, text))
}

/// 22023 and 42704 (from 17): no such file; 55000: its holder is not running any more. A snapshot
/// name is passed as it was given, so no other fault can give these (PeerDB#1750, pgcopydb#720).
fn lost(source: &SnapshotSource, error: crate::pg::Error) -> Error {
    match (error.code(), error.server()) {
        (Some("22023" | "42704" | "55000"), Some(said)) => {
            Error::SnapshotLost { name: source.name().to_string(), detail: said.message.clone() }
        }
        _ => Error::Pg(error),
    }
}
