//! A mark of what the catalogs say of some tables: another one after each DDL on them.

use crate::id::QualifiedName;
use crate::pg::{Result, Session};

/// Rows of the catalogs with the transactions that wrote them, which is quick to ask and tells
/// nothing of what has changed. In-place updates of VACUUM and ANALYZE leave xmin as it is.
const MARK: &str = "with t as (select c.oid from pg_catalog.pg_class c \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname || '.' || c.relname \
     = any ($1::text[])), rows as ( \
     select 1, c.oid, 0, c.xmin from pg_catalog.pg_class c join t on t.oid = c.oid union all \
     select 2, a.attrelid, a.attnum, a.xmin from pg_catalog.pg_attribute a \
       join t on t.oid = a.attrelid where a.attnum > 0 union all \
     select 3, d.oid, 0, d.xmin from pg_catalog.pg_attrdef d join t on t.oid = d.adrelid union all \
     select 4, i.indexrelid, 0, i.xmin from pg_catalog.pg_index i \
       join t on t.oid = i.indrelid union all \
     select 5, k.oid, 0, k.xmin from pg_catalog.pg_constraint k \
       join t on t.oid = k.conrelid where k.contype <> 'f' union all \
     select 6, h.inhrelid, 0, h.xmin from pg_catalog.pg_inherits h join t on t.oid = h.inhparent) \
     select pg_catalog.md5(coalesce(string_agg(r::text, ',' order by r::text), '')) from rows r";

/// The mark of these tables. Foreign keys and triggers are no part of it.
pub async fn mark(session: &mut Session, tables: &[QualifiedName]) -> Result<String> {
    let item = |name: &QualifiedName| {
        let text = format!("{}.{}", name.schema, name.name);
        format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
    };
    let names: Vec<String> = tables.iter().map(item).collect();
    let array = format!("{{{}}}", names.join(","));
    session.query_one(MARK, &[Some(&array)]).await?.string(0)
}
