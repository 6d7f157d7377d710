//! Whether updates and deletes of every table can be streamed.
//!
//! A published table without a replica identity refuses UPDATE and DELETE: not to us, but to the
//! application, from the moment the publication exists. So this is found before there is one.
//!
//! <https://www.postgresql.org/docs/current/logical-replication-publication.html>

use crate::id::{QualifiedName, quote_ident};
use crate::pg;

use super::finding::Level;
use super::{Check, Finding, Side};

/// Tables whose identity is not usable, with the index that could serve. The identity of a table
/// left at its default is its primary key, unless that is deferrable. An index over a generated
/// column identifies nothing: the stream does not carry the column.
const WITHOUT: &str = "select n.nspname, c.relname, c.relreplident, \
     exists (select 1 from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisprimary \
         and i.indimmediate and i.indisvalid and not GENERATED), \
     exists (select 1 from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisprimary \
         and not i.indimmediate), \
     (select x.relname from pg_catalog.pg_index i \
         join pg_catalog.pg_class x on x.oid = i.indexrelid \
         where i.indrelid = c.oid and i.indisunique and i.indimmediate and i.indisvalid \
         and i.indpred is null and i.indexprs is null and not GENERATED \
         and not exists (select 1 from pg_catalog.unnest(i.indkey::int2[]) u(n) \
             join pg_catalog.pg_attribute b on b.attrelid = c.oid and b.attnum = u.n \
             where not b.attnotnull) \
         order by i.indnatts, x.relname limit 1), \
     pg_catalog.pg_stat_get_tuples_updated(c.oid) + pg_catalog.pg_stat_get_tuples_deleted(c.oid), \
     exists (select 1 from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisvalid \
         and case c.relreplident when 'd' then i.indisprimary else i.indisreplident end \
         and GENERATED) \
     from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where c.relkind = 'r' and c.relpersistence = 'p' \
     and case c.relreplident when 'f' then false when 'n' then true \
         else not exists (select 1 from pg_catalog.pg_index i where i.indrelid = c.oid \
             and i.indisvalid and i.indimmediate and not GENERATED \
             and case c.relreplident when 'd' then i.indisprimary else i.indisreplident end) end \
     order by n.nspname, c.relname";

/// Stands for GENERATED above: a column of the index's key is generated. Columns it only includes
/// do not count.
const GENERATED: &str = "exists (select 1 from pg_catalog.pg_attribute g \
     where g.attrelid = c.oid and g.attgenerated <> '' \
     and g.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1]))";

/// What is wrong with the identity of a table: the finding's code, and why.
fn wrong(deferrable: bool, nothing: bool, generated: bool) -> (&'static str, &'static str) {
    match (deferrable, nothing, generated) {
        (_, true, _) => ("no-replica-identity", "its replica identity is NOTHING"),
        (_, _, true) => ("generated-key", "its key holds a generated column"),
        (true, ..) => ("deferrable-primary-key", "its primary key is deferrable"),
        _ => ("no-replica-identity", "it has no primary key"),
    }
}

impl Check<'_> {
    /// Partitions count each for themselves: the leaf's identity decides.
    pub(super) async fn identities(&mut self) -> pg::Result<()> {
        let generated = if self.source.major_version() >= 12 { GENERATED } else { "false" };
        let sql = WITHOUT.replace("GENERATED", generated);
        let rows = self.source.session.query(&sql).await?;
        for row in rows {
            let name = QualifiedName::new(row.str(0)?, row.str(1)?);
            let selected = self.tables.iter().any(|t| t.name == name);
            if !selected || !self.options.selection.has_rows(&name) {
                continue;
            }
            let nothing = row.str(2)? == "n";
            let (primary, deferrable) = (row.bool(3)?, row.bool(4)?);
            let (index, changes) = (row.opt(5)?, row.parse::<i64>(6)?);
            let clause = match (primary, index) {
                (true, _) => "DEFAULT".to_string(),
                (false, Some(index)) => format!("USING INDEX {}", quote_ident(index)),
                (false, None) => "FULL".to_string(),
            };
            let fix = format!("ALTER TABLE {} REPLICA IDENTITY {clause};", name.quoted());
            let (code, why) = wrong(deferrable, nothing, row.bool(7)?);
            // PostgreSQL 18 refuses them; earlier ones leave the column out of the stream.
            let refused = code != "generated-key" || self.source.major_version() >= 18;
            let so = match refused {
                false => {
                    "the stream leaves that out, so UPDATE and DELETE find no row on the target"
                }
                true => "once it is published the application's own UPDATE and DELETE of it fail",
            };
            let (level, seen) = match changes > 0 {
                // As was asked for.
                true if refused && self.options.insert_only => {
                    (Level::Warning, format!("statistics count {changes} of them"))
                }
                true => (Level::Error, format!("statistics count {changes} of them")),
                false => (Level::Warning, "statistics count none so far".to_string()),
            };
            let message = format!("{why}: {so}; {seen}");
            let finding = Finding::error(Side::Source, code, format!("table {name}"), message);
            self.findings.push(finding.at(level).fix(fix));
        }
        Ok(())
    }
}
