//! Tables whose stream had a gap: compared under a snapshot, and read again where they differ.
//!
//! A stream that begins anew from another slot knows nothing of what was written between the end of
//! the old one and its own consistent point, nor of what the source has lost. So every table is in
//! doubt. Those that a comparison finds equal under a snapshot count as copied under it, and keep
//! their rows; any other is read again whole, emptied and filled in one transaction, so that
//! readers of the target see the old rows or the new. From there on exact visibility says what of
//! the new stream each table has, as after any copy.
//!
//! After a crash: tables in doubt are compared again; those that are settled are gone on with like
//! those of a first copy.

use super::error::Error;
use super::snapshot::{SnapshotSource, import};
use super::{Result, store};
use crate::id::{QualifiedName, quote_literal};
use crate::lsn::Lsn;
use crate::pg::{Config, Session};

/// What a comparison found of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The same rows on both sides: so many.
    Equal(u64),
    /// No rows on the target: it is copied like any empty table.
    Empty,
    /// Anything else.
    Unequal,
}

/// The outcome for one table with rows of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The table.
    pub table: QualifiedName,
    /// What its rows were, those of all partitions together where it is one.
    pub found: Found,
    /// Rows only the source has, only the target has, and keys with other values; 0 for all
    /// partitions of a table but the first.
    pub counts: [u64; 3],
}

/// Puts every table of the job in doubt, for `reason`, and forgets what is known of the copy. In
/// the caller's transaction, if it has one.
pub async fn begin(session: &mut Session, job: &str, reason: &str) -> Result<()> {
    let sql = "insert into walferry.table_refill (job, schema, name, reason) \
         select distinct job, schema, name, $2::text from walferry.table_copy where job = $1 \
         on conflict (job, schema, name) do update set reason = excluded.reason, \
         begun_at = now(), judged_at = null, missing = null, extra = null, different = null";
    session.query_params(sql, &[Some(job), Some(reason)]).await?;
    // One that began before and was not ended is begun anew.
    let again = "update walferry.table_refill set judged_at = null where job = $1";
    session.query_params(again, &[Some(job)]).await?;
    session.query_params("delete from walferry.table_copy where job = $1", &[Some(job)]).await?;
    Ok(())
}

/// True if tables of the job are in doubt.
pub async fn is_due(session: &mut Session, job: &str) -> Result<bool> {
    let sql = "select exists (select from walferry.table_refill \
         where job = $1 and judged_at is null)";
    Ok(session.query_one(sql, &[Some(job)]).await?.bool(0)?)
}

/// A position past all that the snapshots of finished tables see, `0/0` where the slot's own was
/// enough: a source whose history forked off before has not got what was copied.
pub async fn seen_lsn(session: &mut Session, job: &str) -> Result<Lsn> {
    // There is no max(pg_lsn) before 13.
    let sql = "select snapshot_lsn from walferry.table_copy \
         where job = $1 and state = 'done' and snapshot_lsn is not null \
         order by snapshot_lsn desc limit 1";
    let row = session.query_opt(sql, &[Some(job)]).await?;
    Ok(row.map(|row| row.lsn(0)).transpose()?.unwrap_or(Lsn::ZERO))
}

/// Takes these tables out of doubt, all in one transaction: equal ones are done, others are to be
/// read by [`super::run`]. The session that exported `snapshot` must still be in its transaction.
///
/// # Errors
/// [`Error::SnapshotLost`] if it is not.
pub async fn settle(
    target: &mut Session,
    source: &Config,
    job: &str,
    snapshot: &SnapshotSource,
    verdicts: &[Verdict],
) -> Result<()> {
    let (_, snapshot_id) = import(source, snapshot).await?;
    let mut sql = String::from("begin");
    for verdict in verdicts {
        sql.push_str("; ");
        sql.push_str(&settle_sql(job, snapshot, &snapshot_id, verdict));
    }
    let left = format!(
        "; update walferry.table_refill set judged_at = now() \
         where job = {} and judged_at is null; commit",
        quote_literal(job)
    );
    match target.execute(&(sql + &left)).await {
        Ok(_) => Ok(()),
        Err(error) => {
            if target.in_transaction() {
                target.execute("rollback").await?;
            }
            Err(Error::Pg(error))
        }
    }
}

fn settle_sql(
    job: &str,
    snapshot: &SnapshotSource,
    snapshot_id: &str,
    verdict: &Verdict,
) -> String {
    let table = &verdict.table;
    let key = [job, &table.schema, &table.name].map(quote_literal).join(", ");
    let is_table = store::is_table(job, table);
    let mut sql = format!("delete from walferry.table_copy where {is_table}");
    let columns = "job, schema, name, part, parts, lo_block, state";
    match verdict.found {
        Found::Equal(rows) => sql.push_str(&format!(
            "; insert into walferry.table_copy ({columns}, snapshot, snapshot_lsn, snapshot_id, \
             rows, bytes, begun_at, done_at) values ({key}, 1, 1, 0, 'done', {}, '{}', {}, {rows}, \
             0, now(), now())",
            quote_literal(&snapshot.stored()),
            snapshot.lsn(),
            quote_literal(snapshot_id)
        )),
        // One part that was begun before: its transaction empties the table first.
        Found::Unequal => sql.push_str(&format!(
            "; insert into walferry.table_copy ({columns}, begun_at) \
             values ({key}, 1, 1, 0, 'todo', now())"
        )),
        // Not stored: cut anew, as many parts as it takes.
        Found::Empty => {}
    }
    let [missing, extra, different] = verdict.counts;
    sql + &format!(
        "; insert into walferry.table_refill (job, schema, name, reason, judged_at, missing, \
         extra, different) values ({key}, '', now(), {missing}, {extra}, {different}) \
         on conflict (job, schema, name) do update set judged_at = excluded.judged_at, \
         missing = excluded.missing, extra = excluded.extra, different = excluded.different"
    )
}
