//! `walferry.table_copy` on the target: what is copied in which parts, and what of it is done.

use std::collections::{HashMap, HashSet};

use super::parts::Part;
use super::transfer::Origin;
use super::{Error, Result};
use crate::change::Snapshot;
use crate::id::{QualifiedName, quote_literal};
use crate::lsn::Lsn;
use crate::pg::{self, Session};

/// This room's table; schema `walferry` has to exist. May be run again.
pub const DDL: &str = "create table if not exists walferry.table_copy (\
     job text not null, schema text not null, name text not null, \
     part int not null, parts int not null, \
     lo_block int8 not null, hi_block int8, \
     state text not null default 'todo' check (state in ('todo', 'done')), \
     snapshot text, snapshot_lsn pg_lsn, snapshot_id text, filenode oid, \
     rows int8, bytes int8, begun_at timestamptz, done_at timestamptz, \
     primary key (job, schema, name, part)); \
     comment on column walferry.table_copy.snapshot is \
     '''slot'' if read under the slot''s own snapshot, else the snapshot'; \
     comment on column walferry.table_copy.snapshot_id is \
     'pg_current_snapshot() under which the part was read, the slot''s own included'; \
     comment on column walferry.table_copy.filenode is \
     'pg_relation_filenode() on the source, for tables of several parts: ctids mean nothing \
     in another'; \
     create table if not exists walferry.table_refill (\
     job text not null, schema text not null, name text not null, reason text not null, \
     begun_at timestamptz not null default now(), judged_at timestamptz, \
     missing int8, extra int8, different int8, primary key (job, schema, name)); \
     comment on table walferry.table_refill is \
     'tables compared with the source after a loss, and by how many rows they differed'";

/// A stored part.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub part: Part,
    pub done: bool,
    /// An attempt was made: there may be dead rows.
    pub begun: bool,
    pub snapshot_id: Option<String>,
    pub filenode: Option<u32>,
    pub rows: u64,
    pub bytes: u64,
}

/// What a finished part leaves behind.
pub(super) struct Done<'a> {
    pub part: &'a Part,
    pub filenode: Option<u32>,
    pub rows: u64,
    pub bytes: u64,
}

/// All parts of the job, by table, in order.
pub(super) async fn load(
    session: &mut Session,
    job: &str,
) -> Result<HashMap<QualifiedName, Vec<Stored>>> {
    let sql = "select schema, name, part, parts, lo_block, hi_block, state = 'done', \
               begun_at is not null, snapshot_id, filenode, coalesce(rows, 0), coalesce(bytes, 0) \
               from walferry.table_copy where job = $1 order by schema, name, part";
    let mut tables: HashMap<QualifiedName, Vec<Stored>> = HashMap::new();
    for row in session.query_params(sql, &[Some(job)]).await? {
        let table = QualifiedName::new(row.str(0)?, row.str(1)?);
        let part = Part {
            table: table.clone(),
            part: row.parse(2)?,
            parts: row.parse(3)?,
            lo_block: row.parse(4)?,
            hi_block: row.parse_opt(5)?,
        };
        tables.entry(table).or_default().push(Stored {
            part,
            done: row.bool(6)?,
            begun: row.bool(7)?,
            snapshot_id: row.opt(8)?.map(str::to_string),
            filenode: row.parse_opt(9)?,
            rows: row.parse(10)?,
            bytes: row.parse(11)?,
        });
    }
    Ok(tables)
}

/// SQL that stores parts as `todo`.
pub(super) fn insert_sql(job: &str, parts: &[Part]) -> String {
    let values: Vec<String> = parts
        .iter()
        .map(|part| {
            format!(
                "({}, {}, {}, {}, {}, {}, {})",
                quote_literal(job),
                quote_literal(&part.table.schema),
                quote_literal(&part.table.name),
                part.part,
                part.parts,
                part.lo_block,
                part.hi_block.map_or("null".to_string(), |hi| hi.to_string())
            )
        })
        .collect();
    format!(
        "insert into walferry.table_copy (job, schema, name, part, parts, lo_block, hi_block) \
         values {}",
        values.join(", ")
    )
}

pub(super) fn is_table(job: &str, table: &QualifiedName) -> String {
    format!(
        "job = {} and schema = {} and name = {}",
        quote_literal(job),
        quote_literal(&table.schema),
        quote_literal(&table.name)
    )
}

fn is_part(job: &str, part: &Part) -> String {
    format!("{} and part = {}", is_table(job, &part.table), part.part)
}

/// Remembers, outside of the part's own transaction, that it is begun.
pub(super) fn begun_sql(job: &str, part: &Part) -> String {
    format!(
        "update walferry.table_copy set begun_at = pg_catalog.clock_timestamp() where {}",
        is_part(job, part)
    )
}

/// Begins a transaction, takes the parts' row locks and gives the tables whose part is done. An
/// attempt whose connection was lost at COMMIT may have succeeded, or may still be under way on the
/// server.
pub(super) async fn lock(
    session: &mut Session,
    job: &str,
    parts: impl ExactSizeIterator<Item = &Part>,
) -> Result<HashSet<QualifiedName>> {
    let count = parts.len();
    let keys: Vec<String> = parts.map(|part| format!("({})", key(part))).collect();
    let sql = format!(
        "begin; select c.schema, c.name, c.state = 'done' from walferry.table_copy c \
         join (values {}) v (schema, name, part) \
         on c.schema = v.schema and c.name = v.name and c.part = v.part \
         where c.job = {} for update of c",
        keys.join(", "),
        quote_literal(job)
    );
    let rows = session.query(&sql).await?;
    if rows.len() != count {
        return Err(Error::Bug(format!("{} of {count} parts are stored", rows.len())));
    }
    let mut done = HashSet::new();
    for row in &rows {
        if row.bool(2)? {
            done.insert(QualifiedName::new(row.str(0)?, row.str(1)?));
        }
    }
    Ok(done)
}

/// A part's name in a list of VALUES.
fn key(part: &Part) -> String {
    let Part { table, part, .. } = part;
    format!("{}, {}, {part}", quote_literal(&table.schema), quote_literal(&table.name))
}

/// Turns parts `done`, in the transaction of their rows.
pub(super) fn done_sql(origin: &Origin, done: &[Done<'_>]) -> String {
    let values: Vec<String> = done
        .iter()
        .map(|Done { part, filenode, rows, bytes }| {
            let filenode = filenode.map_or("null".to_string(), |filenode| filenode.to_string());
            format!("({}, {filenode}::oid, {rows}, {bytes})", key(part))
        })
        .collect();
    format!(
        "update walferry.table_copy c set state = 'done', snapshot = {}, snapshot_lsn = '{}', \
         snapshot_id = {}, filenode = v.filenode, rows = v.rows, bytes = v.bytes, \
         done_at = pg_catalog.clock_timestamp() \
         from (values {}) v (schema, name, part, filenode, rows, bytes) where c.job = {} \
         and c.schema = v.schema and c.name = v.name and c.part = v.part",
        quote_literal(&origin.snapshot),
        origin.snapshot_lsn,
        quote_literal(&origin.snapshot_id),
        values.join(", "),
        quote_literal(&origin.job)
    )
}

/// True if all parts are done, and fit each other.
pub(super) fn is_whole(parts: &[Stored]) -> bool {
    parts.iter().all(|part| part.done) && !is_uneven(parts)
}

/// True if parts that are done were not read from one file under one snapshot.
pub(super) fn is_uneven(parts: &[Stored]) -> bool {
    let mut done = parts.iter().filter(|part| part.done);
    let first = done.next();
    done.any(|part| {
        first.is_some_and(|f| (&f.snapshot_id, f.filenode) != (&part.snapshot_id, part.filenode))
    })
}

/// The source's file of a table.
pub(super) async fn filenode(source: &mut Session, table: &QualifiedName) -> Result<Option<u32>> {
    let sql = "select pg_catalog.pg_relation_filenode(pg_catalog.to_regclass($1))";
    let row = source.query_one(sql, &[Some(&table.quoted())]).await?;
    Ok(row.parse_opt(0)?)
}

/// Empties what the table is written to, and makes all its parts `todo` again, in one transaction.
pub(super) async fn reset(
    session: &mut Session,
    job: &str,
    table: &QualifiedName,
    (written, only): (&QualifiedName, &str),
) -> Result<()> {
    session.execute("begin").await?;
    let outcome = async {
        empty(session, written, only).await?;
        let sql = format!(
            "update walferry.table_copy set state = 'todo', snapshot = null, snapshot_lsn = null, \
             snapshot_id = null, filenode = null, rows = null, bytes = null, begun_at = null, \
             done_at = null where {}",
            is_table(job, table)
        );
        session.execute(&sql).await?;
        session.execute("commit").await
    };
    match outcome.await {
        Ok(_) => Ok(()),
        Err(error) => {
            if !error.is_closed() {
                session.execute("rollback").await?;
            }
            Err(Error::Refused { table: table.clone(), error: Box::new(error) })
        }
    }
}

/// Empties a table inside of the open transaction: by TRUNCATE, or row by row where a foreign key
/// of the target's own forbids that. `only` is `only ` but for a partitioned target. True for
/// TRUNCATE.
pub(super) async fn empty(
    session: &mut Session,
    table: &QualifiedName,
    only: &str,
) -> pg::Result<bool> {
    session.execute("savepoint walferry_empty").await?;
    let truncated = match session.execute(&format!("truncate {only}{}", table.quoted())).await {
        Ok(_) => true,
        Err(error) if matches!(error.code(), Some("0A000" | "42501")) => {
            session.execute("rollback to savepoint walferry_empty").await?;
            session.execute(&format!("delete from {only}{}", table.quoted())).await?;
            false
        }
        Err(error) => return Err(error),
    };
    session.execute("release savepoint walferry_empty").await?;
    Ok(truncated)
}

/// A table whose parts were not read under one snapshot from one file, though all are done.
pub(super) async fn uneven(session: &mut Session, job: &str) -> Result<Option<QualifiedName>> {
    let sql = "select schema, name from walferry.table_copy where job = $1 and state = 'done' \
               group by schema, name \
               having count(distinct snapshot_id) > 1 or count(distinct filenode) > 1 limit 1";
    let row = session.query_opt(sql, &[Some(job)]).await?;
    match row {
        Some(row) => Ok(Some(QualifiedName::new(row.str(0)?, row.str(1)?))),
        None => Ok(None),
    }
}

/// Tables that are copied for good: all parts of each are done, and fit each other. A later
/// [`super::run`] leaves them as they are, but for partitions published as their root, which have
/// to fit their siblings.
pub async fn whole(session: &mut Session, job: &str) -> Result<HashSet<QualifiedName>> {
    let tables = load(session, job).await?;
    Ok(tables.into_iter().filter(|(_, parts)| is_whole(parts)).map(|(table, _)| table).collect())
}

/// Tables of the job that were read under another snapshot than the slot's, with that snapshot and
/// a position past every transaction it sees. A change to such a table is skipped if the snapshot
/// sees its transaction, and applied if not; from that position on, none is seen.
///
/// `session` is on the target. Tables that are not copied yet are not among them.
pub async fn visibility(
    session: &mut Session,
    job: &str,
) -> Result<HashMap<QualifiedName, (Snapshot, Lsn)>> {
    let sql = "select distinct schema, name, snapshot, snapshot_lsn from walferry.table_copy \
               where job = $1 and state = 'done' and snapshot <> 'slot'";
    let mut tables = HashMap::new();
    for row in session.query_params(sql, &[Some(job)]).await? {
        let snapshot = row.str(2)?.parse().map_err(|e| Error::Bug(format!("{e}")))?;
        let table = QualifiedName::new(row.str(0)?, row.str(1)?);
        tables.insert(table, (snapshot, row.lsn(3)?));
    }
    Ok(tables)
}
