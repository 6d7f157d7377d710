//! Positions on the live side, and waiting for the other side to reach them.

use std::time::Duration;

use tokio::sync::watch;

use super::{Error, Result};
use crate::apply::{Applied, parked};
use crate::lsn::Lsn;
use crate::pg::Session;

/// A position that covers every transaction that has committed so far, made durable.
///
/// The end of WAL is read first; then a transactional message is committed, which flushes
/// everything before it, gives the stream something beyond the position to send, and wakes the
/// walsender at once instead of at the next background flush.
pub async fn mark(session: &mut Session, what: &str) -> Result<Lsn> {
    let row = session.query_one("select pg_catalog.pg_current_wal_insert_lsn()", &[]).await?;
    let lsn = row.lsn(0)?;
    session
        .query_params(
            "select pg_catalog.pg_logical_emit_message(true, 'walferry', $1)",
            &[Some(what)],
        )
        .await?;
    Ok(lsn)
}

/// Waits until everything before `lsn` is applied; `Ok(false)` after `wait`.
pub async fn reached(
    carry: &mut watch::Receiver<Applied>,
    lsn: Lsn,
    wait: Duration,
) -> Result<bool> {
    let waiting = carry.wait_for(|applied| applied.applied_lsn >= lsn);
    match tokio::time::timeout(wait, waiting).await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(_)) => Err(Error::StreamStopped),
        Err(_) => Ok(false),
    }
}

/// Refuses to leave a side on which transactions are prepared: no fence stops their COMMIT
/// PREPARED, and after the switch it would write to the side that is left.
///
/// Asked as a gate, and once more when the fence holds.
pub async fn refuse_prepared(session: &mut Session) -> Result<()> {
    let sql = "select pg_catalog.quote_literal(gid), owner::text, transaction::text \
         from pg_catalog.pg_prepared_xacts where database = pg_catalog.current_database() \
         order by prepared";
    let rows = session.query(sql).await?;
    let Some(first) = rows.first() else { return Ok(()) };
    let (gid, owner, xid) = (first.string(0)?, first.string(1)?, first.string(2)?);
    Err(Error::Prepared { gid, owner, xid, others: rows.len() - 1 })
}

/// Refuses to switch to a side on which changes of the stream are kept aside.
///
/// Asked as a gate, and once more when all that there is has been drained.
pub async fn refuse_parked(dest: &mut Session, stream: &str) -> Result<()> {
    let parked = parked::parked(dest, stream).await.map_err(|e| Error::Parked(e.to_string()))?;
    if parked.is_empty() {
        return Ok(());
    }
    let tables = parked.iter().map(|p| format!("{} ({} changes: {})", p.table, p.changes, p.error));
    Err(Error::Quarantined { tables: tables.collect() })
}

/// The barrier, on a side whose writers are stopped.
pub async fn mark_held(live: &mut Session) -> Result<Lsn> {
    refuse_prepared(live).await?;
    mark(live, "barrier").await
}

/// The gate: a probe committed now is applied within `max_lag`.
///
/// A measured arrival and not a computed lag: a lag that is not known yet looks like none
/// (pgdog#1121, pgdog#1201).
pub async fn gate(
    session: &mut Session,
    carry: &mut watch::Receiver<Applied>,
    max_lag: Duration,
) -> Result<()> {
    let probe_lsn = mark(session, "probe").await?;
    if reached(carry, probe_lsn, max_lag).await? {
        return Ok(());
    }
    let applied_lsn = carry.borrow().applied_lsn;
    Err(Error::Lag { max_lag, probe_lsn, applied_lsn })
}
