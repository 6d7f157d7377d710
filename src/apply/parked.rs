//! What is parked, for people: reading it, asking for another try, and dropping it. By any session
//! with the written side; the applier sees it at its next turn.

use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::error::{Error, Result};
use super::parking::described;
use super::release::unhex;
use crate::change::{Relation, Row, Value};
use crate::id::QualifiedName;
use crate::pg::Session;

/// A table whose changes are kept.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Parked {
    /// `schema.table`, as status and verify name it.
    pub table: String,
    /// Its name.
    #[serde(skip)]
    pub name: QualifiedName,
    /// `row`: a row was refused; `ddl`: its definition is behind.
    pub reason: String,
    /// What keeps it.
    pub error: String,
    /// The SQL that is waited for on the target.
    pub awaited: Option<String>,
    /// Somebody has asked for a try that was not made yet.
    pub asked: bool,
    /// Since when.
    pub since: String,
    /// How many changes are kept.
    pub changes: i64,
}

/// A change that is kept.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KeptChange {
    /// What `drop` takes.
    pub id: i64,
    /// `schema.table`.
    pub table: String,
    /// INSERT, UPDATE, DELETE, TRUNCATE.
    pub operation: String,
    /// The source transaction.
    pub xid: i64,
    /// Start of its commit record.
    pub commit_lsn: String,
    /// The change's place in it.
    pub ordinal: i64,
    /// The row before, as far as the stream has it, by column.
    pub old: Option<Json>,
    /// The row after.
    pub new: Option<Json>,
    /// What the target said to it, if it was tried.
    pub error: Option<String>,
}

/// The stream's parked tables, longest parked first. One round trip, as writers may be waiting; not
/// inside a transaction, as an error would end it.
pub async fn parked(session: &mut Session, stream: &str) -> Result<Vec<Parked>> {
    let sql = "select schema, name, reason, error, awaited, asked, since::text, \
           (select pg_catalog.count(*) from walferry.parked_change k \
             where (k.stream, k.schema, k.name) = (p.stream, p.schema, p.name)) \
         from walferry.parked p where stream = $1 order by p.since, schema, name";
    let rows = match session.query_params(sql, &[Some(stream)]).await {
        // No such table, or no such schema: nothing was ever parked.
        Err(error) if matches!(error.code(), Some("42P01" | "3F000")) => return Ok(Vec::new()),
        rows => rows?,
    };
    rows.iter()
        .map(|row| {
            let name = QualifiedName::new(row.str(0)?, row.str(1)?);
            Ok(Parked {
                table: name.to_string(),
                name,
                reason: row.string(2)?,
                error: row.string(3)?,
                awaited: row.opt(4)?.map(str::to_string),
                asked: row.bool(5)?,
                since: row.string(6)?,
                changes: row.parse(7)?,
            })
        })
        .collect()
}

/// The first `limit` changes kept of a table, in order.
pub async fn kept(
    session: &mut Session,
    stream: &str,
    table: &QualifiedName,
    limit: usize,
) -> Result<Vec<KeptChange>> {
    let sql = "select k.id, k.operation, k.xid, k.commit_lsn, k.ordinal, k.error, r.description, \
           pg_catalog.encode(k.old, 'hex'), pg_catalog.encode(k.new, 'hex') \
         from walferry.parked_change k \
         join walferry.parked_relation r on r.stream = k.stream and r.id = k.relation \
         where k.stream = $1 and k.schema = $2 and k.name = $3 order by k.id limit $4::int8";
    let limit = limit.to_string();
    let params = [stream, &table.schema, &table.name, &limit].map(Some);
    let rows = session.query_params(sql, &params).await?;
    rows.iter()
        .map(|row| {
            let relation = described(row.str(6)?)?;
            Ok(KeptChange {
                id: row.parse(0)?,
                table: table.to_string(),
                operation: row.string(1)?,
                xid: row.parse(2)?,
                commit_lsn: row.string(3)?,
                ordinal: row.parse(4)?,
                old: row.opt(7)?.map(|hex| image(&relation, hex)).transpose()?,
                new: row.opt(8)?.map(|hex| image(&relation, hex)).transpose()?,
                error: row.opt(5)?.map(str::to_string),
            })
        })
        .collect()
}

/// A row by column. What the stream does not have of it is left out.
fn image(relation: &Relation, hex: &str) -> Result<Json> {
    let broken = || Error::Broken("walferry.parked_change holds what is no row".to_string());
    let mut bytes = unhex(hex).map(bytes::Bytes::from).ok_or_else(broken)?;
    let row = Row::split_from(&mut bytes).map_err(|_| broken())?;
    let mut columns = Map::new();
    for (column, value) in relation.columns.iter().zip(row.values()) {
        let text = |bytes: &[u8]| Json::String(String::from_utf8_lossy(bytes).into_owned());
        let value = match value {
            Value::Null => Json::Null,
            Value::Unchanged => continue,
            Value::Text(bytes) | Value::Binary(bytes) => text(bytes),
        };
        columns.insert(column.name.clone(), value);
    }
    Ok(Json::Object(columns))
}

/// Asks the applier to write what is kept of a table.
pub async fn ask(session: &mut Session, stream: &str, table: &QualifiedName) -> Result<()> {
    let sql = "update walferry.parked set asked = true \
         where stream = $1 and schema = $2 and name = $3";
    session.query_params(sql, &[Some(stream), Some(&table.schema), Some(&table.name)]).await?;
    Ok(())
}

/// Drops what is kept of a table, or one change of it, in one transaction with the books, where it
/// counts as filtered from now on. Gives how many changes that were.
pub async fn discard(
    session: &mut Session,
    stream: &str,
    table: &QualifiedName,
    id: Option<i64>,
) -> Result<i64> {
    let id = id.map(|id| id.to_string());
    let sql = "with d as (delete from walferry.parked_change where stream = $1 and schema = $2 \
           and name = $3 and ($4::int8 is null or id = $4::int8) returning 1), \
         n as (select pg_catalog.count(*) as n from d), \
         b as (update walferry.stream_table t set filtered = filtered + n.n, \
             quarantined = quarantined - n.n from n \
           where t.stream = $1 and t.schema = $2 and t.name = $3) \
         select n from n";
    let params = [Some(stream), Some(&*table.schema), Some(&*table.name), id.as_deref()];
    Ok(session.query_one(sql, &params).await?.parse(0)?)
}
