//! Tables that move in a special way, or not at all, and what acts on their rows.

use crate::catalog::TableKind;
use crate::id::{QualifiedName, quote_ident};
use crate::pg::{self, Session};

use super::finding::some;
use super::{Check, Finding, Side};

/// A condition on `n` (pg_namespace) and `c` (pg_class): no system schema, none of ours, no part of
/// an extension.
macro_rules! of_users {
    () => {
        "n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
         and n.nspname !~ '^pg_(toast|temp)' \
         and not exists (select 1 from pg_catalog.pg_depend d where d.objid = c.oid \
             and d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.deptype = 'e') "
    };
}
pub(super) use of_users;

const TRIGGERS: &str = concat!(
    "select n.nspname, c.relname, t.tgname, t.tgenabled from pg_catalog.pg_trigger t \
     join pg_catalog.pg_class c on c.oid = t.tgrelid \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where t.tgenabled in ('A', 'R') and not t.tgisinternal and ",
    of_users!(),
    "order by n.nspname, c.relname, t.tgname"
);

const NAMES: &str = concat!(
    "select n.nspname, c.relname from pg_catalog.pg_class c \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where c.relkind in ('r', 'p', 'f', 'm') and c.relpersistence <> 't' and ",
    of_users!(),
    "order by 1, 2"
);

const INHERITED: &str = concat!(
    "select distinct n.nspname, c.relname from pg_catalog.pg_inherits h \
     join pg_catalog.pg_class c on c.oid = h.inhrelid \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where c.relkind = 'r' and not c.relispartition and ",
    of_users!(),
    "order by 1, 2"
);

impl Check<'_> {
    /// A pattern that covers nothing is a typo, and would leave a table behind or take one along.
    pub(super) async fn patterns(&mut self) -> pg::Result<()> {
        if self.options.selection.is_everything() || self.begun.is_some() {
            return Ok(());
        }
        let here = names(&mut self.source.session).await?;
        let there = names(&mut self.target.session).await?;
        for pattern in self.options.selection.unmatched(&here, &there) {
            let message = "matches no table of the source: correct it (schema.table, with * and ? \
                 as wildcards; upper and lower case differ), or leave it out";
            let object = format!("pattern {pattern}");
            let finding = Finding::error(Side::Source, "pattern-matches-nothing", object, message);
            self.findings.push(finding);
        }
        Ok(())
    }

    pub(super) async fn tables(&mut self) -> pg::Result<()> {
        self.partitioned();
        for row in self.source.session.query(TRIGGERS).await? {
            let name = QualifiedName::new(row.str(0)?, row.str(1)?);
            if !self.options.selection.has_schema(&name) {
                continue;
            }
            let (trigger, letter) = (quote_ident(row.str(2)?), row.str(3)?);
            let (mode, change) =
                if letter == "A" { ("ALWAYS", "ENABLE") } else { ("REPLICA", "DISABLE") };
            let message = format!(
                "trigger {trigger} is ENABLE {mode}, so on the other side it fires for every \
                 change that is applied, beside the changes it made on this side"
            );
            let fix = format!("ALTER TABLE {} {change} TRIGGER {trigger};", name.quoted());
            let object = format!("table {name}");
            self.findings.push(
                Finding::warning(Side::Source, "trigger-fires-on-apply", object, message).fix(fix),
            );
        }
        let inherited: Vec<String> = self
            .source
            .session
            .query(INHERITED)
            .await?
            .iter()
            .map(|row| Ok(QualifiedName::new(row.str(0)?, row.str(1)?).to_string()))
            .collect::<pg::Result<_>>()?;
        if !inherited.is_empty() {
            let message =
                format!("{} inherit; each table moves with its own rows", some(&inherited));
            let object = "inherited tables";
            self.findings.push(Finding::info(Side::Source, "inherited-tables", object, message));
        }
        self.temporary().await
    }

    fn partitioned(&mut self) {
        let mut partitioned = Vec::new();
        for table in &self.tables {
            if table.kind == TableKind::Partitioned && table.partition_of.is_none() {
                partitioned.push(table.name.to_string());
            }
        }
        if !partitioned.is_empty() {
            let message = format!("{}: moved partition by partition", some(&partitioned));
            let object = "partitioned tables";
            self.findings.push(Finding::info(Side::Source, "partitioned-tables", object, message));
        }
    }

    async fn temporary(&mut self) -> pg::Result<()> {
        let sql = "select count(*) from pg_catalog.pg_class where relpersistence = 't' \
             and relkind = 'r'";
        let count: i64 = self.source.session.query_one(sql, &[]).await?.parse(0)?;
        if count > 0 {
            let message =
                format!("{count} in use by sessions: they end with the session at the cutover");
            let object = "temporary tables";
            self.findings.push(Finding::info(Side::Source, "temporary-tables", object, message));
        }
        Ok(())
    }
}

async fn names(session: &mut Session) -> pg::Result<Vec<QualifiedName>> {
    let rows = session.query(NAMES).await?;
    rows.iter().map(|row| Ok(QualifiedName::new(row.str(0)?, row.str(1)?))).collect()
}
