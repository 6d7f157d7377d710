//! What an administrator's publication gives of the job's tables, and what it leaves out.

use std::collections::BTreeMap;

use crate::catalog::{Publication, Table};
use crate::id::{QualifiedName, quote_ident};
use crate::pg;

use super::super::published::{add_tables, partial};
use super::finding::some;
use super::{Check, Finding, Side};

impl Check<'_> {
    /// A job that has begun has its publication held against what it kept.
    pub(super) async fn published(&mut self) -> pg::Result<()> {
        let Some(name) = self.options.wanted.publication.clone() else { return Ok(()) };
        let object = format!("publication {name}");
        let Some(publication) = Publication::read(&mut self.source.session, &name).await? else {
            let message = "does not exist: correct --publication, or have it made".to_string();
            let fix = format!("CREATE PUBLICATION {} FOR ALL TABLES;", quote_ident(&name));
            let finding = Finding::error(Side::Source, "publication-missing", object, message);
            self.findings.push(finding.fix(fix));
            return Ok(());
        };
        let rows = |table: &&Table| self.options.selection.has_rows(&table.name) && !table.unlogged;
        let tables: Vec<Table> = self.tables.iter().filter(rows).cloned().collect();
        self.findings.push(summary(&publication, &tables));
        self.findings.extend(lacking(&publication, &tables, self.source.major_version()));
        self.findings.extend(mixed(&publication, &tables));
        let narrowed = publication.narrow(tables.clone());
        self.findings.extend(narrowed.iter().filter_map(|table| left_out(&publication, table)));
        let required = self.required(&publication, &narrowed).await?;
        self.findings.extend(required);
        self.findings.extend(large_values(&narrowed));
        if let Some(finding) = leaves(&publication, &tables) {
            self.findings.push(finding);
        }
        let partial = partial(&publication, &tables);
        if !partial.is_empty() {
            let names: Vec<String> = partial.iter().map(|(name, _)| name.to_string()).collect();
            let message = format!(
                "leaves out a part of {}: the old side would keep rows that the target never had, \
                 so there is no way back, and cutover is refused. Copying, following and verify \
                 work; end with walferry cancel, which keeps what is on the target",
                some(&names)
            );
            self.findings.push(Finding::warning(Side::Source, "no-way-back", object, message));
        } else if self.options.reverse {
            let found = self.own_tables(&publication).await?;
            self.findings.extend(found);
        }
        Ok(())
    }

    /// Columns that are left out and must have a value.
    async fn required(
        &mut self,
        publication: &Publication,
        narrowed: &[Table],
    ) -> pg::Result<Vec<Finding>> {
        let mut wrong: BTreeMap<QualifiedName, Vec<String>> = BTreeMap::new();
        let sql = "select a.attname from pg_catalog.pg_attribute a \
             where a.attrelid = $1::text::oid and a.attnum > 0 and not a.attisdropped \
             and a.attnotnull and not a.atthasdef and a.attidentity = ''";
        let some_columns = |t: &&Table| !t.published.columns_left_out.is_empty();
        for table in narrowed.iter().filter(some_columns) {
            let oid = table.oid.to_string();
            for row in self.source.session.query_params(sql, &[Some(&oid)]).await? {
                let column = row.string(0)?;
                if table.published.columns_left_out.contains(&column) {
                    wrong.entry(table.name.clone()).or_default().push(column);
                }
            }
        }
        Ok(wrong
            .into_iter()
            .map(|(table, columns)| {
                let message = format!(
                    "publication {} leaves out {}, which must have a value and has no default: the \
                     target would refuse every row; have them published, or give them a default",
                    publication.name,
                    columns.join(", ")
                );
                let object = format!("table {table}");
                Finding::error(Side::Source, "publication-lacks-columns", object, message)
            })
            .collect())
    }

    /// The canary and the marker have to be shown too: by a publication of walferry's own, where
    /// one may be made.
    async fn own_tables(&mut self, publication: &Publication) -> pg::Result<Option<Finding>> {
        let own = [self.options.job.canary(), QualifiedName::new("walferry", "progress")];
        let marked = !super::super::ability::Ability::probe(&mut self.source.session).await?.origin;
        let needed = own.into_iter().take(if marked { 2 } else { 1 });
        let needed: Vec<QualifiedName> = needed.filter(|t| !publication.shows(t)).collect();
        let sql =
            "select pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create')";
        let may = self.source.session.query_one(sql, &[]).await?.bool(0)?;
        if needed.is_empty() || publication.all_tables || may {
            return Ok(None);
        }
        let sql = "select pg_catalog.to_regnamespace('walferry') is not null";
        let schema = self.source.session.query_one(sql, &[]).await?.bool(0)?;
        let mut fix = self.own_tables_ddl(schema);
        fix.push(add_tables(&publication.name, &needed));
        let message = format!(
            "does not show walferry's own tables, by which a cutover proves the way there and \
             back, and role {} may not make a publication of its own: an administrator makes and \
             adds them once",
            self.source.facts.role
        );
        let object = format!("publication {}", publication.name);
        let finding = Finding::error(Side::Source, "publication-right", object, message);
        Ok(Some(finding.fix(fix.join("\n"))))
    }
}

fn summary(publication: &Publication, tables: &[Table]) -> Finding {
    let leaves = tables.iter().filter(|t| t.kind == crate::catalog::TableKind::Plain).count();
    let shown = leaves - publication.missing(tables).len();
    let kind = if publication.all_tables { "FOR ALL TABLES" } else { "of an administrator" };
    let root = if publication.via_root { ", partitions as their root" } else { "" };
    let lacks = match publication.lacks.as_slice() {
        [] => "all operations".to_string(),
        lacks => format!("without {}", lacks.join(", ").to_uppercase()),
    };
    let message = format!("{kind}: shows {shown} of the job's {leaves} tables, {lacks}{root}");
    let object = format!("publication {}", publication.name);
    Finding::info(Side::Source, "publication", object, message)
}

/// Tables that it does not show.
fn lacking(publication: &Publication, tables: &[Table], major: u32) -> Option<Finding> {
    let missing = publication.missing(tables);
    if missing.is_empty() {
        return None;
    }
    let parent = |name: &QualifiedName| {
        tables.iter().find(|t| t.name == *name).and_then(|t| t.partition_of.clone())
    };
    let mut names: Vec<QualifiedName> = Vec::new();
    for table in &missing {
        // Listed by its root, a partition made later is published too; 10 to 12 know leaves only.
        let mut line = std::iter::successors(Some(table.name.clone()), parent);
        let name = if major >= 13 { line.last() } else { line.next() };
        names.extend(name.filter(|name| !names.contains(name)));
    }
    let list: Vec<String> = missing.iter().map(|t| t.name.to_string()).collect();
    let message = format!("does not show {}: add them, or leave them out", some(&list));
    let object = format!("publication {}", publication.name);
    let finding = Finding::error(Side::Source, "publication-lacks-tables", object, message);
    Some(finding.fix(add_tables(&publication.name, &names)))
}

/// Under the root's name come the rows of all its partitions.
fn mixed(publication: &Publication, tables: &[Table]) -> Vec<Finding> {
    let mixed = publication.mixed(tables).into_iter();
    mixed
        .map(|(table, under)| {
            let message = format!(
                "publication {} shows its changes as those of {under} \
                 (publish_via_partition_root), so both take part in the job, or neither: correct \
                 --include and --exclude",
                publication.name
            );
            let object = format!("table {table}");
            Finding::error(Side::Source, "publication-mixes-tables", object, message)
        })
        .collect()
}

fn left_out(publication: &Publication, table: &Table) -> Option<Finding> {
    if !publication.shows(&table.name) || table.published.is_whole() {
        return None;
    }
    let name = &publication.name;
    let mut message = format!(
        "publication {name} leaves out {}: neither copied nor followed nor compared",
        table.published.left_out()
    );
    if !table.published.columns_left_out.is_empty() {
        message.push_str("; such columns have their default on the target");
    }
    if table.published.filter.is_some() {
        message.push_str("; foreign keys of other tables to rows that are left out will fail");
    }
    let object = format!("table {}", table.name);
    Some(Finding::warning(Side::Source, "publication-leaves-out", object, message))
}

/// A row that a new key brings into the filter comes as INSERT, without what TOAST left unchanged.
fn large_values(narrowed: &[Table]) -> Vec<Finding> {
    let full = |t: &Table| t.identity == crate::change::ReplicaIdentity::Full;
    let risky = narrowed.iter().filter(|t| t.published.filter.is_some() && !full(t));
    risky
        .map(|table| {
            let message = "its row filter is over the key: an UPDATE of the key that brings a row \
                 with large values into the filter carries those only under identity FULL, and \
                 stops the job otherwise";
            let fix = format!("ALTER TABLE {} REPLICA IDENTITY FULL;", table.name.quoted());
            let object = format!("table {}", table.name);
            Finding::info(Side::Source, "publication-large-values", object, message).fix(fix)
        })
        .collect()
}

/// PostgreSQL does not publish a TRUNCATE of one partition by way of its root.
fn leaves(publication: &Publication, tables: &[Table]) -> Option<Finding> {
    let narrowed = publication.narrow(tables.to_vec());
    let names: Vec<String> = narrowed
        .iter()
        .filter(|t| t.published.under.is_some())
        .map(|t| t.name.to_string())
        .collect();
    if names.is_empty() || publication.lacks.iter().any(|operation| operation == "truncate") {
        return None;
    }
    let message = format!(
        "publishes partitions as their root, and then not a TRUNCATE of one partition ({}): its \
         rows would stay on the target; empty it by DELETE",
        some(&names)
    );
    let object = format!("publication {}", publication.name);
    let fix = format!(
        "ALTER PUBLICATION {} SET (publish_via_partition_root = false);",
        quote_ident(&publication.name)
    );
    Some(Finding::warning(Side::Source, "publication-via-root", object, message).fix(fix))
}
