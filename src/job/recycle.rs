//! The recycle bin: where the old side's tables go when a job of tables alone ends.
//!
//! Until then they are kept current by the stream that leads back, and a rollback restores them.
//! After that nobody writes to them any more, and beside the live tables of their cluster they
//! would only be in the way: of a later move of the same shards, and, by their foreign keys, of
//! rows of reference tables that are deleted on every node. So they are moved, with their indexes
//! and the sequences they own, into schema `walferry_recycle_BIN` of the same database, without the
//! keys that lead out of the job, until somebody empties it. BIN is the cluster's job, or the job's
//! own name.
//!
//! What survives a crash: all of a job's tables are moved in one transaction, together with the
//! rows of `contents` in that schema which say where they came from. Locks are taken in short
//! tries, as readers may still be there.

use std::time::Duration;

use serde::Serialize;

use super::Result;
use crate::clock::Deadline;
use crate::id::{QualifiedName, quote_ident, quote_literal};
use crate::pg::Session;

/// How the names of bins begin.
const PREFIX: &str = "walferry_recycle_";

/// How long locks are tried for, one try of them, and a pause.
const PUT_WAIT: Duration = Duration::from_secs(60);
const LOCK_MS: u64 = 200;
const PAUSE: Duration = Duration::from_millis(300);

/// A table in a bin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// The bin: the number of a cluster's job, or the name of a job.
    pub bin: String,
    /// The job that moved it away.
    pub job: String,
    /// The schema it was in.
    pub schema: String,
    /// Its name, then and now.
    pub name: String,
    /// When it was put there.
    pub recycled_at: String,
    /// Size on disk with indexes and TOAST, in bytes.
    pub bytes: u64,
}

fn schema_of(bin: &str) -> String {
    quote_ident(&format!("{PREFIX}{bin}"))
}

/// Moves these tables into the bin; partitions are named beside their parents. Gives how many that
/// were. None are left where it was done before.
///
/// # Errors
/// Where a lock cannot be had within a minute, or a table of that name is in the bin already.
pub(super) async fn put(
    session: &mut Session,
    bin: &str,
    job: &str,
    tables: &[QualifiedName],
) -> Result<usize> {
    if tables.is_empty() {
        return Ok(0);
    }
    let sql = statements(session, bin, job, tables).await?.join("; ");
    let deadline = Deadline::after(PUT_WAIT);
    loop {
        let tried = format!("begin; set local lock_timeout = {LOCK_MS}; {sql}; commit");
        let outcome = session.execute(&tried).await;
        if !outcome.as_ref().is_err_and(crate::pg::Error::is_closed) && session.in_transaction() {
            session.execute("rollback").await?;
        }
        match outcome {
            Ok(_) => return Ok(tables.len()),
            Err(error) if matches!(error.code(), Some("55P03" | "40P01")) && !deadline.passed() => {
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn statements(
    session: &mut Session,
    bin: &str,
    job: &str,
    tables: &[QualifiedName],
) -> Result<Vec<String>> {
    let schema = schema_of(bin);
    let mut sqls = vec![
        "set local client_min_messages = error".to_string(),
        format!("create schema if not exists {schema}"),
        format!(
            "create table if not exists {schema}.contents (\"schema\" text not null, \
             name text primary key, job text not null, \
             recycled_at timestamptz not null default pg_catalog.clock_timestamp())"
        ),
    ];
    for (table, key) in keys_out(session, tables).await? {
        sqls.push(format!("alter table {} drop constraint {}", table.quoted(), quote_ident(&key)));
    }
    let noted = "select pg_catalog.to_regclass('walferry.set_aside') is not null";
    if session.query_one(noted, &[]).await?.bool(0)? {
        // What was set aside there does not come back.
        sqls.push(format!("delete from walferry.set_aside where job = {}", quote_literal(job)));
    }
    for table in tables {
        sqls.push(format!(
            "insert into {schema}.contents (\"schema\", name, job) values ({}, {}, {})",
            quote_literal(&table.schema),
            quote_literal(&table.name),
            quote_literal(job)
        ));
        sqls.push(format!("alter table {} set schema {schema}", table.quoted()));
    }
    Ok(sqls)
}

/// Foreign keys of the tables to others; those of a partitioned table once, with it.
async fn keys_out(
    session: &mut Session,
    tables: &[QualifiedName],
) -> Result<Vec<(QualifiedName, String)>> {
    let sql = "select k.conname, n.nspname, c.relname, fn.nspname, f.relname \
         from pg_catalog.pg_constraint k \
         join pg_catalog.pg_class c on c.oid = k.conrelid \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         join pg_catalog.pg_class f on f.oid = k.confrelid \
         join pg_catalog.pg_namespace fn on fn.oid = f.relnamespace \
         where k.contype = 'f' \
         and coalesce(pg_catalog.to_jsonb(k) ->> 'conparentid', '0') = '0' order by 2, 3, 1";
    let mut keys = Vec::new();
    for row in session.query(sql).await? {
        let table = QualifiedName::new(row.str(1)?, row.str(2)?);
        let other = QualifiedName::new(row.str(3)?, row.str(4)?);
        if tables.contains(&table) && !tables.contains(&other) {
            keys.push((table, row.string(0)?));
        }
    }
    Ok(keys)
}

/// What is in the bins of a database, or in one of them, for longer than `older`: oldest first in
/// each.
pub async fn list(session: &mut Session, bin: Option<&str>, older: Duration) -> Result<Vec<Kept>> {
    let sql = "select n.nspname from pg_catalog.pg_namespace n \
         join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = 'contents' \
         where pg_catalog.starts_with(n.nspname::text, $1) order by 1";
    let mut kept = Vec::new();
    for row in session.query_params(sql, &[Some(PREFIX)]).await? {
        let name = row.str(0)?.strip_prefix(PREFIX).unwrap_or_default().to_string();
        if bin.is_some_and(|bin| bin != name) {
            continue;
        }
        let sql = format!(
            "select k.job, k.\"schema\", k.name, k.recycled_at, \
             coalesce(pg_catalog.pg_total_relation_size(c.oid), 0) from {}.contents k \
             left join pg_catalog.pg_class c on c.relname = k.name \
               and c.relnamespace = pg_catalog.to_regnamespace({}) \
             where k.recycled_at <= now() - interval '{} ms' order by k.recycled_at, k.name",
            schema_of(&name),
            quote_literal(&schema_of(&name)),
            older.as_millis()
        );
        for row in session.query(&sql).await? {
            kept.push(Kept {
                bin: name.clone(),
                job: row.string(0)?,
                schema: row.string(1)?,
                name: row.string(2)?,
                recycled_at: row.string(3)?,
                bytes: row.parse(4)?,
            });
        }
    }
    Ok(kept)
}

/// Drops what is in the bins of a database, or in one of them, and was put there longer ago than
/// `older`; a bin that is empty then goes too. Gives what was dropped.
pub async fn empty(session: &mut Session, bin: Option<&str>, older: Duration) -> Result<Vec<Kept>> {
    let mut dropped = Vec::new();
    for kept in list(session, bin, older).await? {
        let schema = schema_of(&kept.bin);
        // A partition may have gone with its parent; a key of one to another goes with either.
        let sql = format!(
            "begin; set local client_min_messages = error; \
             drop table if exists {schema}.{} cascade; \
             delete from {schema}.contents where name = {}; commit",
            quote_ident(&kept.name),
            quote_literal(&kept.name)
        );
        session.execute(&sql).await?;
        let rest = format!("select exists (select 1 from {schema}.contents)");
        if !session.query_one(&rest, &[]).await?.bool(0)? {
            session.execute(&format!("drop table {schema}.contents; drop schema {schema}")).await?;
        }
        dropped.push(kept);
    }
    Ok(dropped)
}
