//! What a task's tables look like, so that it is noticed when somebody changes one of them while
//! they move: no stream carries DDL, and a column or index that came in between would be missing on
//! the target without a word.
//!
//! A shape is kept when a task begins, before its schema is read, and held against the source again
//! and again, for the last time just before the cutover. From then on the fence's locks keep tables
//! as they are. Tables that appear are changes too: a new partition, or a table of a database that
//! moves as a whole.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::catalog::Selection;
use crate::id::QualifiedName;
use crate::job::store::JobOptions;
use crate::job::{Error, Result};
use crate::limit::CATALOG_WAIT;
use crate::pg::{Config, Session};

/// By table, one hash for each of [`PARTS`].
type Shape = BTreeMap<String, Vec<String>>;

/// What each hash is of.
const PARTS: [&str; 3] = ["its columns or its kind", "its indexes", "its constraints"];

/// Foreign keys are left out: walferry itself may have to set those of a side aside. So are
/// triggers and rights, which do nothing to rows that are applied.
const SHAPE: &str = "select n.nspname, c.relname, \
     pg_catalog.md5(pg_catalog.concat_ws(' ', c.relkind, c.relpersistence, c.relreplident, \
       c.relispartition, pg_catalog.pg_get_expr(c.relpartbound, c.oid), (select \
       string_agg(pg_catalog.concat_ws(' ', a.attname, pg_catalog.format_type(a.atttypid, \
         a.atttypmod), a.attnotnull, a.attidentity, pg_catalog.pg_get_expr(d.adbin, d.adrelid)), \
         ',' order by a.attnum) from pg_catalog.pg_attribute a \
       left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum \
       where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped))), \
     pg_catalog.md5(coalesce((select string_agg(pg_catalog.concat_ws(' ', \
         pg_catalog.pg_get_indexdef(i.indexrelid), i.indisreplident), ',' order by i.indexrelid) \
       from pg_catalog.pg_index i where i.indrelid = c.oid), '')), \
     pg_catalog.md5(coalesce((select string_agg(pg_catalog.concat_ws(' ', k.conname, \
         pg_catalog.pg_get_constraintdef(k.oid)), ',' order by k.oid) \
       from pg_catalog.pg_constraint k where k.conrelid = c.oid and k.contype <> 'f'), '')) \
     from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where c.relkind in ('r', 'p') and c.relpersistence <> 't' \
     and n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
     and n.nspname !~ '^pg_(toast|temp)'";

/// As the tables are now.
pub(super) async fn take(side: &Config, options: &JobOptions) -> Result<Value> {
    let mut session = Session::control(side).await?;
    session.set_patience(CATALOG_WAIT);
    let selection: Selection = options.selection(&mut session).await?;
    let mut shape = Shape::new();
    for row in session.query(SHAPE).await? {
        let name = QualifiedName::new(row.str(0)?, row.str(1)?);
        if selection.has_schema(&name) {
            let hashes = (2..2 + PARTS.len()).map(|i| row.string(i));
            shape.insert(name.to_string(), hashes.collect::<crate::pg::Result<_>>()?);
        }
    }
    serde_json::to_value(shape).map_err(|e| Error::State(e.to_string()))
}

/// What has changed between two shapes, in sentences; empty where nothing has.
pub(super) fn changes(before: &Value, now: &Value) -> Vec<String> {
    let read = |value: &Value| serde_json::from_value::<Shape>(value.clone()).unwrap_or_default();
    let (before, now) = (read(before), read(now));
    let mut changes = Vec::new();
    for (table, hashes) in &before {
        match now.get(table) {
            None => changes.push(format!("{table} is gone, or has another name")),
            Some(other) => {
                let differ = PARTS.iter().zip(hashes.iter().zip(other));
                let differ = differ.filter(|(_, (was, is))| was != is).map(|(part, _)| *part);
                let parts: Vec<&str> = differ.collect();
                if !parts.is_empty() {
                    changes.push(format!("{table} is altered: {}", parts.join(", ")));
                }
            }
        }
    }
    let new = now.keys().filter(|table| !before.contains_key(*table));
    changes.extend(new.map(|table| format!("{table} is new")));
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn changes_are_named_by_table_and_part() {
        let before =
            json!({ "s.a": ["1", "2", "3"], "s.b": ["1", "2", "3"], "s.c": ["1", "1", "1"] });
        let now = json!({ "s.a": ["1", "x", "y"], "s.c": ["1", "1", "1"], "s.d": ["1", "1", "1"] });
        assert_eq!(
            changes(&before, &now),
            [
                "s.a is altered: its indexes, its constraints",
                "s.b is gone, or has another name",
                "s.d is new"
            ]
        );
        assert!(changes(&now, &now).is_empty());
    }
}
