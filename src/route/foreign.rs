//! Whether a foreign server leads to the tables of one group, and to no others: a switch of the
//! server leads all of its foreign tables.

use super::{Error, Result};
use crate::id::{QualifiedName, quote_literal};
use crate::pg::Session;

/// Tables that foreign tables of the server stand for and that are not in `group`, each with its
/// foreign table. Of postgres_fdw, whose options they are, and which takes the foreign table's own
/// names where they are missing.
///
/// <https://www.postgresql.org/docs/current/postgres-fdw.html#POSTGRES-FDW-OPTIONS-OBJECT-NAME>
pub(super) async fn strangers(
    session: &mut Session,
    server: &str,
    group: &[QualifiedName],
) -> Result<Vec<String>> {
    let wrong = |source| Error::Router { doing: "reading pg_foreign_table".into(), source };
    let sql = format!(
        "select coalesce(o.options ->> 'schema_name', n.nspname), \
         coalesce(o.options ->> 'table_name', c.relname), f.ftrelid::pg_catalog.regclass::text \
         from pg_catalog.pg_foreign_table f \
         join pg_catalog.pg_foreign_server s on s.oid = f.ftserver \
         join pg_catalog.pg_class c on c.oid = f.ftrelid \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace, lateral \
         (select coalesce(pg_catalog.json_object_agg(option_name, option_value), '{{}}') options \
            from pg_catalog.pg_options_to_table(f.ftoptions)) o \
         where s.srvname = {} order by 1, 2",
        quote_literal(server)
    );
    let mut strangers = Vec::new();
    for row in session.query(&sql).await.map_err(wrong)? {
        let table = QualifiedName::new(row.str(0).map_err(wrong)?, row.str(1).map_err(wrong)?);
        if !group.contains(&table) {
            strangers.push(format!("{table} (as {})", row.str(2).map_err(wrong)?));
        }
    }
    Ok(strangers)
}

/// What is said of a server that leads to them.
pub(super) fn said(strangers: &[String]) -> String {
    let named = strangers.join(", ");
    format!(
        "leads to tables that are not in the group: {named}. Give each group a foreign server of \
         its own"
    )
}
