//! Positions on the live side, and waiting for the other side to reach them.

use std::time::Duration;

use tokio::sync::watch;

use super::{Error, Result};
use crate::apply::{Applied, parked};
use crate::clock::Deadline;
use crate::id::{QualifiedName, quote_literal};
use crate::lsn::Lsn;
use crate::pg::{self, Session};
use crate::source::continuity;

/// How long a transaction may stay prepared before it counts as left behind, and between looks.
const PREPARED_WAIT: Duration = Duration::from_secs(2);
const PREPARED_LOOK: Duration = Duration::from_millis(20);

/// A position that covers every transaction that has committed so far, made durable.
///
/// The end of WAL is read first; then a transactional message is committed, which flushes
/// everything before it, gives the stream something beyond the position to send, and wakes the
/// walsender at once instead of at the next background flush.
pub async fn mark(session: &mut Session, what: &str) -> Result<Lsn> {
    // One message, as writers may be waiting: its statements are run in their order.
    let sql = format!(
        "select pg_catalog.pg_current_wal_insert_lsn(); \
         select pg_catalog.pg_logical_emit_message(true, 'walferry', {})",
        quote_literal(what)
    );
    let rows = session.query(&sql).await?;
    let row =
        rows.first().ok_or_else(|| pg::Error::Result("no position of the log".to_string()))?;
    Ok(row.lsn(0)?)
}

/// Makes durable what was applied on this side.
pub async fn flush(dest: &mut Session) -> Result<()> {
    dest.query("select pg_catalog.pg_logical_emit_message(true, 'walferry', 'flush')").await?;
    Ok(())
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

/// True if sequences of the other side may have been restarted since `applied_lsn` was this.
pub fn restarted(carry: &watch::Receiver<Applied>, since_lsn: Lsn) -> bool {
    carry.borrow().restarted_lsn >= since_lsn
}

/// Refuses where the standby that the live side is decoded from is not on its timeline: it was
/// promoted, or follows another, and positions of the two mean different things. `decoder` is a
/// replication session. Asked behind a drained barrier, as a standby replays one history: what it
/// gave before is the live side's then.
pub async fn refuse_parted(live: &mut Session, decoder: &mut Session) -> Result<()> {
    let at_live = continuity::identify_by_sql(live).await?.timeline;
    let found = continuity::identify(decoder).await?.timeline;
    match found == at_live {
        true => Ok(()),
        false => Err(Error::Parted {
            standby: decoder.peer().to_string(),
            found_timeline: found,
            timeline: at_live,
        }),
    }
}

/// Transactions that are prepared here, as errors would name them: all of the database, or those
/// that hold a lock on one of `tables`.
async fn prepared(
    session: &mut Session,
    tables: Option<&[QualifiedName]>,
) -> Result<Vec<(String, String, String)>> {
    let theirs = match tables {
        None => String::new(),
        Some(tables) => {
            let names: Vec<String> =
                tables.iter().map(|table| quote_literal(&table.quoted())).collect();
            format!(
                " and exists (select from pg_catalog.pg_locks x join pg_catalog.pg_locks r \
                 on r.virtualtransaction = x.virtualtransaction and r.pid is null \
                 where x.pid is null and x.transactionid = p.transaction \
                 and r.locktype = 'relation' and r.relation = any (array(select \
                 pg_catalog.to_regclass(t)::pg_catalog.oid \
                 from pg_catalog.unnest(array[{}]::text[]) t)))",
                names.join(", ")
            )
        }
    };
    let sql = format!(
        "select pg_catalog.quote_literal(gid), owner::text, transaction::text \
         from pg_catalog.pg_prepared_xacts p where database = pg_catalog.current_database() \
         {theirs} order by prepared"
    );
    let rows = session.query(&sql).await?;
    let read = rows.iter().map(|row| Ok((row.string(0)?, row.string(1)?, row.string(2)?)));
    read.collect()
}

/// Refuses to leave a side on which transactions are prepared: no fence stops their COMMIT
/// PREPARED, and after the switch it would write to the side that is left. Of a job of tables alone
/// only those count that have locked one of `tables`.
pub async fn refuse_prepared(
    session: &mut Session,
    tables: Option<&[QualifiedName]>,
) -> Result<()> {
    refuse(prepared(session, tables).await?)
}

/// The same as a gate, before anybody is held. In the middle of a cluster's traffic some are always
/// prepared, each for a moment: those count that are still there after a while.
pub async fn refuse_left_prepared(
    session: &mut Session,
    tables: Option<&[QualifiedName]>,
) -> Result<()> {
    if tables.is_none() {
        return refuse_prepared(session, tables).await;
    }
    let deadline = Deadline::after(PREPARED_WAIT);
    let mut left = prepared(session, tables).await?;
    while !left.is_empty() && !deadline.passed() {
        tokio::time::sleep(PREPARED_LOOK).await;
        let now = prepared(session, tables).await?;
        left.retain(|one| now.contains(one));
    }
    refuse(left)
}

fn refuse(prepared: Vec<(String, String, String)>) -> Result<()> {
    let others = prepared.len().saturating_sub(1);
    match prepared.into_iter().next() {
        Some((gid, owner, xid)) => Err(Error::Prepared { gid, owner, xid, others }),
        None => Ok(()),
    }
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
