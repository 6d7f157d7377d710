//! What shards and databases weigh, asked of their nodes.

use std::collections::BTreeMap;

use super::{Error, Result};
use crate::id::QualifiedName;
use crate::pg::{Config, Purpose, Session};

/// What one shard weighs, and what it is called where it is.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    pub relation: QualifiedName,
    pub bytes: u64,
    pub rows: u64,
    pub load: u64,
}

/// Rows read and written, by the counters of the statistics.
/// <https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-STATS-FUNCTIONS>
const LOAD: &str = "coalesce(pg_catalog.pg_stat_get_tuples_inserted(c.oid) \
     + pg_catalog.pg_stat_get_tuples_updated(c.oid) \
     + pg_catalog.pg_stat_get_tuples_deleted(c.oid) \
     + pg_catalog.pg_stat_get_tuples_returned(c.oid) \
     + pg_catalog.pg_stat_get_tuples_fetched(c.oid), 0)";

/// Citus hides shards from catalog queries of plain clients; on a server without it this is a
/// setting that nobody reads.
const SEE_SHARDS: &str = "set citus.override_table_visibility = off";

/// A shard's name ends in its number. Where that makes it too long, Citus cuts the table's name
/// and puts a hash between, so only the beginning is compared: of 63 bytes at least 20 are left
/// of the name, which is 5 characters in the worst case.
const NAME_CHARS: usize = 5;

/// Sizes of a node's shards, by number. One that is not there is an error.
pub(super) async fn of_shards(
    config: &Config,
    shards: &BTreeMap<u64, QualifiedName>,
) -> Result<BTreeMap<u64, Sizes>> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    session.execute(SEE_SHARDS).await?;
    let list: Vec<String> = shards.keys().map(u64::to_string).collect();
    let sql = format!(
        "select q.shard, q.nspname, q.relname, \
         pg_catalog.pg_total_relation_size(q.oid), q.rows, q.load from (\
         select pg_catalog.substring(c.relname, '_([0-9]{{1,19}})$')::numeric as shard, \
         n.nspname, c.relname, c.oid, greatest(c.reltuples, 0)::int8 as rows, {LOAD} as load \
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where c.relkind in ('r', 'p', 'f') and c.relname ~ '_[0-9]{{1,19}}$') q \
         where q.shard = any ($1::numeric[])"
    );
    let array = format!("{{{}}}", list.join(","));
    let mut sizes = BTreeMap::new();
    for row in session.query_params(&sql, &[Some(&array)]).await? {
        let id: u64 = row.parse(0)?;
        let relation = QualifiedName::new(row.string(1)?, row.string(2)?);
        let is_it = |table: &QualifiedName| {
            let begins: String = table.name.chars().take(NAME_CHARS).collect();
            table.schema == relation.schema && relation.name.starts_with(&begins)
        };
        if shards.get(&id).is_some_and(is_it) {
            let (bytes, rows, load) = (row.parse(3)?, row.parse(4)?, row.parse(5)?);
            sizes.insert(id, Sizes { relation, bytes, rows, load });
        }
    }
    match shards.iter().find(|(id, _)| !sizes.contains_key(id)) {
        Some((id, table)) => Err(Error::Other {
            peer: session.peer().to_string(),
            detail: format!(
                "shard {id} of {table} should be here and is not; compare pg_dist_placement with \
                 this node's tables"
            ),
        }),
        None => Ok(sizes),
    }
}

/// Sizes of named tables. One that is not there is an error.
pub(super) async fn of_tables(
    config: &Config,
    tables: &[QualifiedName],
) -> Result<BTreeMap<QualifiedName, Sizes>> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let sql = format!(
        "select pg_catalog.pg_total_relation_size(c.oid), \
         greatest(c.reltuples, 0)::int8, {LOAD} \
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')"
    );
    let mut sizes = BTreeMap::new();
    for table in tables {
        let params = [Some(table.schema.as_str()), Some(table.name.as_str())];
        let Some(row) = session.query_opt(&sql, &params).await? else {
            return Err(Error::Other {
                peer: session.peer().to_string(),
                detail: format!("there is no table {table}; mend the cluster's file"),
            });
        };
        let (bytes, rows, load) = (row.parse(0)?, row.parse(1)?, row.parse(2)?);
        sizes.insert(table.clone(), Sizes { relation: table.clone(), bytes, rows, load });
    }
    Ok(sizes)
}

/// Bytes, rows and load of the whole database.
pub(super) async fn of_database(config: &Config) -> Result<(u64, u64, u64)> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let sql = "select pg_catalog.pg_database_size(d.oid), \
         (select coalesce(sum(greatest(c.reltuples, 0)), 0)::int8 from pg_catalog.pg_class c \
         where c.relkind = 'r' and c.relnamespace <> 'pg_catalog'::regnamespace), \
         coalesce(pg_catalog.pg_stat_get_db_tuples_inserted(d.oid) \
         + pg_catalog.pg_stat_get_db_tuples_updated(d.oid) \
         + pg_catalog.pg_stat_get_db_tuples_deleted(d.oid) \
         + pg_catalog.pg_stat_get_db_tuples_returned(d.oid), 0) \
         from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()";
    let row = session.query_one(sql, &[]).await?;
    Ok((row.parse(0)?, row.parse(1)?, row.parse(2)?))
}
