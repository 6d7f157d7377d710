//! Foreign keys of a whole database.

use crate::id::QualifiedName;
use crate::pg::{self, Session};

/// One foreign key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignKey {
    /// Its name.
    pub name: String,
    /// The table that has it.
    pub table: QualifiedName,
    /// The table that it refers to.
    pub other: QualifiedName,
    /// Its columns as `column=other column`, with commas between.
    pub columns: String,
}

const KEYS: &str = "select k.conname, n.nspname, c.relname, fn.nspname, f.relname, \
     (select pg_catalog.string_agg(a.attname || '=' || fa.attname, ',') \
      from unnest(k.conkey, k.confkey) as u(here, there) \
      join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = u.here \
      join pg_catalog.pg_attribute fa on fa.attrelid = k.confrelid and fa.attnum = u.there) \
     from pg_catalog.pg_constraint k \
     join pg_catalog.pg_class c on c.oid = k.conrelid \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     join pg_catalog.pg_class f on f.oid = k.confrelid \
     join pg_catalog.pg_namespace fn on fn.oid = f.relnamespace \
     where k.contype = 'f' order by 2, 3, 1";

/// All foreign keys, by the names of their tables.
pub async fn foreign_keys(session: &mut Session) -> pg::Result<Vec<ForeignKey>> {
    let rows = session.query(KEYS).await?;
    rows.iter()
        .map(|row| {
            Ok(ForeignKey {
                name: row.string(0)?,
                table: QualifiedName::new(row.str(1)?, row.str(2)?),
                other: QualifiedName::new(row.str(3)?, row.str(4)?),
                columns: row.opt(5)?.unwrap_or_default().to_string(),
            })
        })
        .collect()
}
