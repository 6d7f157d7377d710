//! Tables and their columns.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::change::ReplicaIdentity;
use crate::id::{QualifiedName, quote_ident};
use crate::pg::{Result, Row, Session};

use super::{Published, Selection};
use crate::map::{Map, TableMap, Typed};

/// `pg_class.relkind`, as far as rows move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableKind {
    /// Holds rows (`r`), a partition included.
    Plain,
    /// A partitioned parent (`p`): its rows are in its partitions.
    Partitioned,
}

/// A column that is not dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name, unquoted.
    pub name: String,
    /// `format_type()`: schema-qualified unless in pg_catalog, modifiers included.
    pub type_name: String,
    /// `atttypid`.
    pub type_oid: u32,
    /// NOT NULL.
    pub not_null: bool,
    /// GENERATED ALWAYS AS (...) STORED or VIRTUAL: never copied, never written.
    pub generated: bool,
    /// GENERATED ALWAYS AS IDENTITY: writing it needs OVERRIDING SYSTEM VALUE.
    pub identity_always: bool,
}

/// A table that may take part in a job.
#[derive(Clone, Debug)]
pub struct Table {
    /// `pg_class.oid`.
    pub oid: u32,
    /// Schema and name.
    pub name: QualifiedName,
    /// Plain or partitioned parent.
    pub kind: TableKind,
    /// The direct partitioned parent, for a partition.
    pub partition_of: Option<QualifiedName>,
    /// UNLOGGED: decoding never sees its changes.
    pub unlogged: bool,
    /// `relreplident`.
    pub identity: ReplicaIdentity,
    /// Names of the columns that identify a row in the stream: of the primary key or the chosen
    /// index, in index order. Empty under FULL, NOTHING, and where there is no primary key.
    pub identity_columns: Vec<String>,
    /// Names of the primary key's columns, in index order; of the smallest unique index over NOT
    /// NULL columns if there is no primary key; empty if there is neither.
    pub key: Vec<String>,
    /// In attnum order, without dropped ones.
    pub columns: Vec<Column>,
    /// Size of the main fork in blocks, now (not relpages, which is as old as the last ANALYZE).
    pub blocks: u64,
    /// Heap and TOAST, in bytes.
    pub bytes: u64,
    /// `reltuples`; negative or 0 where never analyzed.
    pub rows_estimate: f64,
    /// What is published of it; everything unless [`super::Publication::narrow`] said otherwise.
    pub published: Published,
    /// What the job's map makes of it; set by [`Table::mapped_by`] alone.
    pub mapped: Option<Arc<TableMap>>,
}

impl Table {
    /// True if the stream can carry updates and deletes of it.
    pub fn is_identified(&self) -> bool {
        match self.identity {
            ReplicaIdentity::Full => true,
            ReplicaIdentity::Nothing => false,
            ReplicaIdentity::Default | ReplicaIdentity::Index => !self.identity_columns.is_empty(),
        }
    }

    /// Columns whose values are copied and written: all but generated ones.
    pub fn stored_columns(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().filter(|c| !c.generated)
    }

    /// The same table as the map has it, if it is about it: columns that do not go along are taken
    /// away, generated ones too, and its rows are read and written as the map says. Names of
    /// columns are still those of the source.
    pub fn mapped_by(mut self, map: Option<&Map>) -> Table {
        if let Some(mapped) = map.and_then(|map| map.of(&self.name)) {
            self.columns.retain(|column| !column.generated && mapped.keeps(&column.name));
            self.mapped = Some(Arc::new(mapped));
        }
        self
    }

    /// The table that its rows are written to.
    pub fn written_name(&self) -> &QualifiedName {
        self.mapped.as_ref().map_or(&self.name, |mapped| &mapped.target)
    }

    /// The column that a column's values are written to.
    pub fn written<'a>(&'a self, column: &'a str) -> &'a str {
        self.mapped.as_ref().map_or(column, |mapped| mapped.written(column))
    }

    /// Of a mapped table, what follows FROM to read its rows as they are written, those that go
    /// along, under their names on the target, with their ctid; `among` is a condition on that.
    /// `None` for any other.
    ///
    /// # Errors
    /// Where a mask is not for its column's type: a sentence.
    pub fn mapped_rows(&self, among: Option<&str>) -> Option<std::result::Result<String, String>> {
        let mapped = self.mapped.as_ref()?;
        let columns: std::result::Result<Vec<String>, String> = self
            .stored_columns()
            .map(|column| {
                let value = mapped.expression(&column.typed())?;
                Ok(format!("{value} as {}", quote_ident(mapped.written(&column.name))))
            })
            .collect();
        let columns = match columns {
            Ok(columns) => columns,
            Err(why) => return Some(Err(format!("table {}: {why}", self.name))),
        };
        let row = crate::map::ROW;
        let list: String = columns.iter().map(|column| format!("{column}, ")).collect();
        let among = among.map_or(String::new(), |among| format!(" where {among}"));
        let filter = mapped.condition().map_or(String::new(), |filter| format!(" where {filter}"));
        Some(Ok(format!(
            "(select {list}{row}.ctid from (select *, ctid from only {}{among}) as {row}{filter})",
            self.name.quoted()
        )))
    }
}

impl Column {
    /// Name and type, for a mask.
    pub fn typed(&self) -> Typed<'_> {
        Typed { name: &self.name, type_name: &self.type_name, type_oid: self.type_oid }
    }
}

/// Plain and partitioned tables of the database that `selection` gives a schema, ordered by name;
/// system schemas, `walferry` and temporary tables left out, tables owned by extensions too.
///
/// Sees what the session's snapshot sees. One round trip for tables, one for columns.
pub async fn tables(session: &mut Session, selection: &Selection) -> Result<Vec<Table>> {
    let mut columns = columns(session).await?;
    let rows = session.query(TABLES).await?;
    let mut tables = Vec::with_capacity(rows.len());
    for row in &rows {
        let table = read_table(row, &mut columns)?;
        if selection.has_schema(&table.name) {
            tables.push(table);
        }
    }
    Ok(tables)
}

/// A table by its name, where no more is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Schema and name.
    pub name: QualifiedName,
    /// Plain or partitioned parent.
    pub kind: TableKind,
    /// UNLOGGED.
    pub unlogged: bool,
}

/// The same tables as [`tables`] gives, without what costs time where there are thousands.
pub async fn named(session: &mut Session, selection: &Selection) -> Result<Vec<Named>> {
    let rows = session.query(NAMED).await?;
    let mut found = Vec::with_capacity(rows.len());
    for row in &rows {
        let name = QualifiedName::new(row.str(0)?, row.str(1)?);
        if selection.has_schema(&name) {
            found.push(Named { name, kind: kind(row.str(2)?), unlogged: row.str(3)? == "u" });
        }
    }
    Ok(found)
}

fn kind(relkind: &str) -> TableKind {
    if relkind == "p" { TableKind::Partitioned } else { TableKind::Plain }
}

/// Oids of those tables of `names` that are there, walferry's own too. One round trip.
pub async fn oids(
    session: &mut Session,
    names: &[QualifiedName],
) -> Result<HashMap<QualifiedName, u32>> {
    let sql = "select n.nspname, c.relname, c.oid \
         from pg_catalog.jsonb_array_elements_text($1::jsonb) t(name) \
         join pg_catalog.pg_class c on c.oid = pg_catalog.to_regclass(t.name) \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace";
    let rows = session.query_params(sql, &[Some(&list_of(names))]).await?;
    rows.iter().map(|r| Ok((QualifiedName::new(r.str(0)?, r.str(1)?), r.parse(2)?))).collect()
}

/// A JSON array of quoted names, which a server takes apart and looks up.
pub fn list_of(names: &[QualifiedName]) -> String {
    let quoted = names.iter().map(|name| serde_json::Value::from(name.quoted()));
    serde_json::Value::Array(quoted.collect()).to_string()
}

/// Those of `names` that are plain tables, which hold rows. One round trip.
pub async fn plain_of(
    session: &mut Session,
    names: &[QualifiedName],
) -> Result<HashSet<QualifiedName>> {
    let sql = "select n.nspname, c.relname \
         from pg_catalog.jsonb_array_elements_text($1::jsonb) t(name) \
         join pg_catalog.pg_class c on c.oid = pg_catalog.to_regclass(t.name) \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where c.relkind = 'r' and c.relpersistence <> 't'";
    let rows = session.query_params(sql, &[Some(&list_of(names))]).await?;
    rows.iter().map(|r| Ok(QualifiedName::new(r.str(0)?, r.str(1)?))).collect()
}

/// What a row of [`TABLES`] and [`COLUMNS`] is filtered by.
macro_rules! user_tables {
    () => {
        "c.relkind in ('r', 'p') and c.relpersistence <> 't' \
         and n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
         and n.nspname !~ '^pg_(toast|temp)' \
         and not exists (select 1 from pg_catalog.pg_depend d where d.objid = c.oid \
             and d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.deptype = 'e')"
    };
}

const TABLES: &str = concat!(
    "select c.oid, n.nspname, c.relname, c.relkind, pn.nspname, p.relname, c.relpersistence, \
     c.relreplident, \
     (select pg_catalog.json_agg(a.attname order by k.n) from pg_catalog.pg_index i, \
        pg_catalog.unnest(i.indkey::int2[]) with ordinality k(attnum, n) \
        join pg_catalog.pg_attribute a on a.attnum = k.attnum \
        where i.indrelid = c.oid and a.attrelid = c.oid and i.indisvalid and i.indimmediate \
        and k.n <= ",
    "(case when pg_catalog.current_setting('server_version_num')::int >= 110000 \
        then (pg_catalog.to_jsonb(i) ->> 'indnkeyatts')::int else i.indnatts end) \
        and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident \
        else false end), \
     (select pg_catalog.json_agg(a.attname order by k.n) from (select i.* from pg_catalog.pg_index i \
          where i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indimmediate \
          and i.indpred is null and i.indexprs is null \
          and not exists (select 1 from pg_catalog.unnest(i.indkey::int2[]) u(n) \
              join pg_catalog.pg_attribute b on b.attnum = u.n and b.attrelid = c.oid \
              where not b.attnotnull) \
          order by i.indisprimary desc, i.indnatts, i.indexrelid limit 1) i, \
        pg_catalog.unnest(i.indkey::int2[]) with ordinality k(attnum, n) \
        join pg_catalog.pg_attribute a on a.attnum = k.attnum \
        where a.attrelid = c.oid and k.n <= \
        (case when pg_catalog.current_setting('server_version_num')::int >= 110000 \
        then (pg_catalog.to_jsonb(i) ->> 'indnkeyatts')::int else i.indnatts end)), \
     case when c.relkind = 'r' then pg_catalog.pg_relation_size(c.oid) \
        / pg_catalog.current_setting('block_size')::int8 else 0 end, \
     case when c.relkind = 'r' then pg_catalog.pg_table_size(c.oid) else 0 end, c.reltuples \
     from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     left join pg_catalog.pg_inherits h on h.inhrelid = c.oid and c.relispartition \
     left join pg_catalog.pg_class p on p.oid = h.inhparent \
     left join pg_catalog.pg_namespace pn on pn.oid = p.relnamespace where ",
    user_tables!(),
    " order by n.nspname, c.relname"
);

const NAMED: &str = concat!(
    "select n.nspname, c.relname, c.relkind, c.relpersistence from pg_catalog.pg_class c \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace where ",
    user_tables!(),
    " order by n.nspname, c.relname"
);

const COLUMNS: &str = concat!(
    "select a.attrelid, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.atttypid, \
     a.attnotnull, coalesce(pg_catalog.to_jsonb(a) ->> 'attgenerated', '') <> '', \
     a.attidentity = 'a' \
     from pg_catalog.pg_attribute a join pg_catalog.pg_class c on c.oid = a.attrelid \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where a.attnum > 0 and not a.attisdropped and ",
    user_tables!(),
    " order by a.attrelid, a.attnum"
);

async fn columns(session: &mut Session) -> Result<HashMap<u32, Vec<Column>>> {
    let mut columns: HashMap<u32, Vec<Column>> = HashMap::new();
    for row in session.query(COLUMNS).await? {
        columns.entry(row.parse(0)?).or_default().push(Column {
            name: row.string(1)?,
            type_name: row.string(2)?,
            type_oid: row.parse(3)?,
            not_null: row.bool(4)?,
            generated: row.bool(5)?,
            identity_always: row.bool(6)?,
        });
    }
    Ok(columns)
}

fn read_table(row: &Row, columns: &mut HashMap<u32, Vec<Column>>) -> Result<Table> {
    let oid = row.parse(0)?;
    let partition_of = match (row.opt(4)?, row.opt(5)?) {
        (Some(schema), Some(name)) => Some(QualifiedName::new(schema, name)),
        _ => None,
    };
    let letter = row.str(7)?.bytes().next().unwrap_or(b'd');
    Ok(Table {
        oid,
        name: QualifiedName::new(row.str(1)?, row.str(2)?),
        kind: kind(row.str(3)?),
        partition_of,
        unlogged: row.str(6)? == "u",
        identity: ReplicaIdentity::from_letter(letter).unwrap_or(ReplicaIdentity::Default),
        identity_columns: names(row, 8)?,
        key: names(row, 9)?,
        columns: columns.remove(&oid).unwrap_or_default(),
        blocks: row.parse(10)?,
        bytes: row.parse(11)?,
        rows_estimate: row.parse(12)?,
        published: Published::default(),
        mapped: None,
    })
}

fn names(row: &Row, index: usize) -> Result<Vec<String>> {
    let Some(text) = row.opt(index)? else { return Ok(Vec::new()) };
    serde_json::from_str(text)
        .map_err(|e| crate::pg::Error::Result(format!("column names \"{text}\": {e}")))
}
