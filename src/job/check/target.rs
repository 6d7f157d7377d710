//! What is already where the job wants to make something.

use std::collections::{HashMap, HashSet};

use crate::catalog;
use crate::id::{QualifiedName, Stream, quote_literal};
use crate::pg::{self, Session};

use super::tables::of_users;
use super::{Check, Finding, Side};

const RELATIONS: &str = concat!(
    "select n.nspname, c.relname, c.relkind, c.relispartition from pg_catalog.pg_class c \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where c.relkind in ('r', 'p', 'v', 'm', 'S', 'f') and c.relpersistence <> 't' and ",
    of_users!(),
    "order by 1, 2"
);

/// Functions and types by the text that names them in a DROP.
const OTHERS: &str = "select 'FUNCTION', p.oid::pg_catalog.regprocedure::text \
     from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace \
     where n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
     and n.nspname !~ '^pg_temp' \
     and not exists (select 1 from pg_catalog.pg_depend d where d.objid = p.oid \
         and d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass and d.deptype in ('e', 'i')) \
     union all select 'TYPE', pg_catalog.format_type(t.oid, null) from pg_catalog.pg_type t \
     join pg_catalog.pg_namespace n on n.oid = t.typnamespace \
     left join pg_catalog.pg_class c on c.oid = t.typrelid \
     where n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
     and n.nspname !~ '^pg_temp' \
     and (t.typtype in ('e', 'd', 'r') or c.relkind = 'c') \
     and not exists (select 1 from pg_catalog.pg_depend d where d.objid = t.oid \
         and d.classid = 'pg_catalog.pg_type'::pg_catalog.regclass and d.deptype = 'e') \
     order by 1, 2";

/// Slots, publications and origins of the given names, and who holds a slot.
///
/// Whole names are compared: with LIKE, an underscore would match the neighbour's (etl#679).
const LEFTOVERS: &str = "select 'slot', slot_name::text, coalesce(active_pid, 0), \
     'SELECT pg_drop_replication_slot(' || pg_catalog.quote_literal(slot_name) || ');' \
     from pg_catalog.pg_replication_slots where slot_name = any (array[$names$]) \
     union all select 'publication', pubname::text, 0, \
     'DROP PUBLICATION ' || pg_catalog.quote_ident(pubname) || ';' \
     from pg_catalog.pg_publication where pubname = any (array[$names$]) \
     and pg_catalog.pg_has_role(pubowner, 'usage') \
     union all select 'replication origin', roname, 0, \
     'SELECT pg_replication_origin_drop(' || pg_catalog.quote_literal(roname) || ');' \
     from pg_catalog.pg_replication_origin where roname = any (array[$names$])";

impl Check<'_> {
    pub(super) async fn target(&mut self) -> pg::Result<()> {
        if self.begun.is_some() {
            return Ok(());
        }
        let same = self.findings.iter().any(|f| f.code == "same-database");
        if !same {
            self.relations().await?;
        }
        if self.options.selection.tables_only {
            self.borders().await?;
        } else if !same {
            let ours = others(&mut self.source.session).await?;
            let theirs = others(&mut self.target.session).await?;
            for (kind, name) in theirs.into_iter().filter(|other| ours.contains(other)) {
                let message = "exists on both sides: making it on the target will fail";
                let object = format!("{} {name}", kind.to_lowercase());
                let fix = format!("DROP {kind} {name};");
                self.findings.push(
                    Finding::error(Side::Target, "target-object-exists", object, message).fix(fix),
                );
            }
        }
        self.both_leftovers().await
    }

    pub(super) async fn both_leftovers(&mut self) -> pg::Result<()> {
        if self.begun.is_some() {
            return Ok(());
        }
        for side in [Side::Source, Side::Target] {
            let found = self.leftovers(side).await;
            self.take(side, "leftovers", found)?;
        }
        Ok(())
    }

    async fn relations(&mut self) -> pg::Result<()> {
        let ours = relations(&mut self.source.session).await?;
        let ours: HashSet<QualifiedName> = ours.into_iter().map(|(name, ..)| name).collect();
        let owners: HashMap<QualifiedName, QualifiedName> = match self.options.selection.tables_only
        {
            true => owners(&mut self.source.session).await?,
            false => HashMap::new(),
        };
        let selection = self.made();
        for (name, kind, is_partition) in relations(&mut self.target.session).await? {
            let is_table = matches!(kind.as_str(), "r" | "p");
            let moves = match kind.as_str() {
                "r" | "p" => selection.has_schema(&name),
                "S" => selection.has_sequence(owners.get(&name)),
                _ => !selection.tables_only,
            };
            let filled = self.options.map.as_ref().is_some_and(|map| {
                map.source_of(&name).is_some_and(|source| ours.contains(&source))
            });
            let alone = moves && is_table && !is_partition && !ours.contains(&name) && !filled;
            if alone && self.options.reverse {
                // Its rows could not come along on the way back.
                let message = format!(
                    "is on the target alone, and would refuse the way back: leave it out with \
                     --exclude {name}, or drop it if it is of no use"
                );
                let object = format!("table {name}");
                self.findings.push(Finding::error(
                    Side::Target,
                    "target-table-alone",
                    object,
                    message,
                ));
            }
            if !moves || !ours.contains(&name) {
                continue;
            }
            let (what, drop) = match kind.as_str() {
                "v" => ("view", "VIEW"),
                "m" => ("materialized view", "MATERIALIZED VIEW"),
                "S" => ("sequence", "SEQUENCE"),
                "f" => ("foreign table", "FOREIGN TABLE"),
                _ => ("table", "TABLE"),
            };
            let object = format!("{what} {name}");
            let fix = format!("DROP {drop} {};", name.quoted());
            if !is_table {
                let message = "exists on both sides: making it on the target will fail";
                self.findings.push(
                    Finding::error(Side::Target, "target-object-exists", object, message).fix(fix),
                );
                continue;
            }
            self.findings.push(if has_rows(&mut self.target.session, &name).await? {
                // No statement is printed that would take rows away.
                let message = "exists already, with rows: walferry copies only into tables it \
                     makes itself. Use another database, exclude the table, or drop it if its rows \
                     are of no use";
                Finding::error(Side::Target, "target-table-has-rows", object, message)
            } else {
                let message = "exists already: walferry copies only into tables it makes itself";
                Finding::error(Side::Target, "target-table-exists", object, message).fix(fix)
            });
        }
        Ok(())
    }

    /// Of a copy that somebody else made, slot and publication were made first, and came along.
    pub(super) async fn leftovers(&mut self, side: Side) -> pg::Result<Vec<Finding>> {
        let job = self.options.job.clone();
        let streams: &[Stream] = match self.options.brought {
            true => &[Stream::Reverse],
            false => &[Stream::Forward, Stream::Reverse],
        };
        let names = streams.iter().flat_map(|stream| job.origins(*stream));
        let names: Vec<String> = names.map(|name| quote_literal(&name)).collect();
        let sql = LEFTOVERS.replace("$names$", &names.join(","));
        let mut findings = Vec::new();
        for row in self.end(side).session.query(&sql).await? {
            let (kind, name, pid) = (row.str(0)?, row.str(1)?, row.parse::<i32>(2)?);
            let message = if pid > 0 {
                format!("is in use by process {pid}: a job named {job} is running")
            } else {
                format!(
                    "is left from an earlier job named {job}: `walferry cancel --name {job}` takes \
                     it away, or choose another name"
                )
            };
            let finding = Finding::error(side, "leftover", format!("{kind} {name}"), message);
            findings.push(if pid > 0 { finding } else { finding.fix(row.str(3)?) });
        }
        Ok(findings)
    }
}

/// Name, kind, and whether it is a partition.
async fn relations(session: &mut Session) -> pg::Result<Vec<(QualifiedName, String, bool)>> {
    let rows = session.query(RELATIONS).await?;
    rows.iter()
        .map(|row| {
            let name = QualifiedName::new(row.str(0)?, row.str(1)?);
            Ok((name, row.string(2)?, row.bool(3)?))
        })
        .collect()
}

/// Who owns each sequence that has an owner.
async fn owners(session: &mut Session) -> pg::Result<HashMap<QualifiedName, QualifiedName>> {
    let sequences = catalog::sequences(session).await?;
    Ok(sequences.into_iter().filter_map(|s| Some((s.name, s.owner?))).collect())
}

async fn others(session: &mut Session) -> pg::Result<HashSet<(String, String)>> {
    let rows = session.query(OTHERS).await?;
    rows.iter().map(|row| Ok((row.string(0)?, row.string(1)?))).collect()
}

/// Stops at the first row. A table that may not be read counts as one with rows.
async fn has_rows(session: &mut Session, name: &QualifiedName) -> pg::Result<bool> {
    let sql = format!("select exists (select from {})", name.quoted());
    match session.query_one(&sql, &[]).await {
        Ok(row) => row.bool(0),
        Err(error) if error.is_closed() => Err(error),
        Err(_) => Ok(true),
    }
}
