//! One table, as a decoder of textual output needs it.

use crate::change::ReplicaIdentity;
use crate::decode::{Described, DescribedColumn};
use crate::id::QualifiedName;
use crate::pg::{Error, Result, Session};

/// The key is that of the index which logical decoding uses (`RelationGetReplicaIndex`): a
/// deferrable primary key identifies nothing.
const DESCRIBE: &str = "select c.oid, c.relreplident, a.attname, a.atttypid, a.atttypmod, \
     pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, \
     coalesce(pg_catalog.to_jsonb(a) ->> 'attgenerated', '') <> '', \
     exists (select 1 from pg_catalog.pg_index i, \
         pg_catalog.unnest(i.indkey::int2[]) with ordinality k(attnum, n) \
         where i.indrelid = c.oid and k.attnum = a.attnum \
         and k.n <= coalesce((pg_catalog.to_jsonb(i) ->> 'indnkeyatts')::int, i.indnatts) \
         and i.indisvalid and i.indimmediate and i.indisunique and i.indpred is null \
         and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident \
             else false end) \
     from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     left join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 \
         and not a.attisdropped \
     where n.nspname = $1::text::name and c.relname = $2::text::name \
     and c.relkind in ('r', 'p', 'm') \
     order by a.attnum";

/// The table as it is now; `None` if there is no table of that name (any more).
///
/// One round trip. Sees what the session's snapshot sees, and needs no right on the table. A
/// materialized view is described too, as REFRESH ... CONCURRENTLY is decoded as changes of it.
pub async fn describe(session: &mut Session, name: &QualifiedName) -> Result<Option<Described>> {
    let parameters = [Some(name.schema.as_str()), Some(name.name.as_str())];
    let rows = session.query_params(DESCRIBE, &parameters).await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let letter = first.str(1)?.bytes().next().unwrap_or_default();
    let identity = ReplicaIdentity::from_letter(letter)
        .ok_or_else(|| Error::Result(format!("relreplident of {name} is {letter:#04x}")))?;
    let mut columns = Vec::with_capacity(rows.len());
    for row in rows.iter().filter(|row| row.bytes(2).is_some()) {
        columns.push(DescribedColumn {
            name: row.string(2)?,
            type_oid: row.parse(3)?,
            type_modifier: row.parse(4)?,
            type_name: row.string(5)?,
            not_null: row.bool(6)?,
            generated: row.bool(7)?,
            key: row.bool(8)?,
        });
    }
    Ok(Some(Described { oid: first.parse(0)?, name: name.clone(), identity, columns }))
}
