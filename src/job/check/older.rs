//! What an older target cannot have of the source's schema.

use std::collections::HashSet;

use crate::pg;
use crate::schema;

use super::tables::of_users;
use super::{Check, Finding, Side};

/// The server's own types that columns and domains have; an array stands for its elements.
const TYPES: &str = concat!(
    "select case c.relkind when 'v' then 'view ' when 'c' then 'type ' else 'table ' end \
         || n.nspname || '.' || c.relname, a.attname, coalesce(e.typname, t.typname) \
     from pg_catalog.pg_attribute a \
     join pg_catalog.pg_class c on c.oid = a.attrelid \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     join pg_catalog.pg_type t on t.oid = a.atttypid \
         and t.typnamespace = 'pg_catalog'::regnamespace \
     left join pg_catalog.pg_type e on e.typarray = t.oid \
     where a.attnum > 0 and not a.attisdropped \
         and c.relkind in ('r', 'p', 'v', 'm', 'f', 'c') and ",
    of_users!(),
    "union all select 'domain ' || n.nspname || '.' || d.typname, '', t.typname \
     from pg_catalog.pg_type d join pg_catalog.pg_namespace n on n.oid = d.typnamespace \
     join pg_catalog.pg_type t on t.oid = d.typbasetype \
         and t.typnamespace = 'pg_catalog'::regnamespace \
     where d.oid >= 16384 and n.nspname <> 'walferry' order by 1, 2"
);

impl Check<'_> {
    /// Finds it in the very dump that a job would take, so that the two cannot disagree.
    pub(super) async fn older(&mut self) -> pg::Result<()> {
        let (source, target) = (self.source.major_version(), self.target.major_version());
        if target >= source || self.begun.is_some() {
            return Ok(());
        }
        self.types(target).await?;
        let options = schema::Options::default();
        let dump = schema::dump(&self.source.config, &self.made(), &options).await;
        let fitted = dump.and_then(|dump| Ok(schema::fit(&dump, target)?));
        let fitted = match fitted {
            Ok(fitted) => fitted,
            Err(schema::Error::Pg(error)) if error.is_closed() => return Err(error),
            // Told by its own finding.
            Err(schema::Error::NoPgDump { .. }) => return Ok(()),
            Err(error) => {
                let message = format!("cannot be looked at, look yourself: {error}");
                let finding = Finding::warning(Side::Source, "unreadable", "schema", message);
                self.findings.push(finding);
                return Ok(());
            }
        };
        for found in fitted.refused {
            let message = format!(
                "has {}, which is known since {}, and means something: PostgreSQL {target} would \
                 refuse it. Give it up on the source, leave it out, or move to a later version",
                found.what, found.since
            );
            self.findings.push(Finding::error(Side::Target, "too-new", found.object, message));
        }
        for left_out in fitted.left_out {
            let message = format!("is not known to PostgreSQL {target}, and left out");
            self.findings.push(Finding::info(Side::Target, "left-out", left_out, message));
        }
        Ok(())
    }

    async fn types(&mut self, target: u32) -> pg::Result<()> {
        let known = "select typname from pg_catalog.pg_type \
             where typnamespace = 'pg_catalog'::regnamespace";
        let rows = self.target.session.query(known).await?;
        let known: HashSet<String> = rows.iter().map(|r| r.string(0)).collect::<pg::Result<_>>()?;
        for row in self.source.session.query(TYPES).await? {
            let (object, column, name) = (row.str(0)?, row.str(1)?, row.str(2)?);
            if known.contains(name) {
                continue;
            }
            let of = if column.is_empty() { String::new() } else { format!(" of column {column}") };
            let message = format!("the type{of}, {name}, is not known to PostgreSQL {target}");
            self.findings.push(Finding::error(Side::Target, "too-new", object, message));
        }
        Ok(())
    }
}
