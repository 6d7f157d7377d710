//! `[[map]]`: whether every section fits the tables there are, and whether the stream will carry
//! what it takes to give the same as the copy.
//!
//! Expressions are held to what PostgreSQL asks of an index: immutable, of one row, without
//! subqueries. So the source itself judges them, by an index on a temporary table with the columns
//! of the real one, which is rolled back.
//!
//! <https://www.postgresql.org/docs/current/sql-createindex.html>

use std::collections::{BTreeMap, HashMap};

use crate::catalog::{self, Selection, Table, TableKind};
use crate::change::ReplicaIdentity;
use crate::id::{QualifiedName, quote_ident};
use crate::map::{self, Map, Mask, TableMap};
use crate::pg::{self, Session};

use super::super::mapped::{ddl, made_by_dump, one_way};
use super::{Check, Finding, Level, Side};

/// Columns whose values PostgreSQL may store out of line, so that an UPDATE's record lacks them.
const TOASTABLE: &str = "select a.attname from pg_catalog.pg_attribute a \
     where a.attrelid = $1::oid and a.attnum > 0 and not a.attisdropped \
     and a.attlen = -1 and a.attstorage <> 'p'";

/// Found of one table, before it is known to be of use.
struct Judge<'a> {
    table: &'a Table,
    mapped: &'a TableMap,
    /// Names of columns that may be stored out of line.
    toastable: Vec<String>,
    findings: Vec<Finding>,
}

impl Check<'_> {
    /// The tables that come with the dump.
    pub(super) fn made(&self) -> Selection {
        let selection = &self.options.selection;
        // Patterns of our own making are patterns.
        made_by_dump(selection, self.options.map.as_deref()).unwrap_or_else(|_| selection.clone())
    }

    pub(super) async fn mapped(&mut self) -> pg::Result<()> {
        let Some(map) = self.options.map.clone() else { return Ok(()) };
        if !self.options.shared {
            self.way_back_through(&map);
        }
        self.sections(&map);
        self.names(&map);
        let there = catalog::tables(&mut self.target.session, &Selection::default()).await?;
        let there: HashMap<&QualifiedName, &Table> = there.iter().map(|t| (&t.name, t)).collect();
        for table in self.tables.clone() {
            let Some(mapped) = map.of(&table.name) else { continue };
            let session = &mut self.source.session;
            let major = session.major_version();
            let oid = table.oid.to_string();
            let rows = session.query_params(TOASTABLE, &[Some(&oid)]).await?;
            let toastable = rows.iter().map(|row| row.string(0)).collect::<pg::Result<_>>()?;
            let mut judge =
                Judge { table: &table, mapped: &mapped, toastable, findings: Vec::new() };
            let rows = self.options.selection.has_rows(&table.name);
            if judge.kind(rows) && judge.columns() {
                judge.masks(major);
                judge.stream();
                judge.target(&map, there.get(&mapped.target).copied());
                if judge.findings.iter().all(|finding| finding.level != Level::Error) {
                    judge.expressions(&mut self.source.session).await?;
                }
            }
            self.findings.append(&mut judge.findings);
        }
        Ok(())
    }

    fn way_back_through(&mut self, map: &Map) {
        if let Some(back) = map.inverse().filter(|_| !self.options.one_way) {
            return self.names_back(map, &back);
        }
        let (object, reasons) = ("map".to_string(), one_way(map));
        self.findings.push(match self.options.one_way {
            true => {
                let message = format!(
                    "there will be no way back from a cutover, which takes --one-way once more: \
                     {reasons}. Tables of the map are made with columns, NOT NULL and key, \
                     where they are not there; their indexes, defaults, foreign keys and triggers \
                     are yours to make"
                );
                Finding::warning(Side::Here, "no-way-back", object, message)
            }
            false => {
                let message = format!(
                    "a job with a map has no way back: {reasons}. Say --one-way (one-way = true in \
                     walferry.toml) if that is meant, or leave the [[map]] out"
                );
                Finding::error(Side::Here, "no-way-back", object, message)
            }
        });
    }

    /// A map of names alone is turned back, where each leads to the table that it came from.
    fn names_back(&mut self, map: &Map, back: &Map) {
        let torn = |table: &&Table| back.target_of(&map.target_of(&table.name)) != table.name;
        for table in self.tables.iter().filter(torn) {
            let message = format!(
                "would not be led back from {}, as another section's names are in the way: say \
                 --one-way (one-way = true in walferry.toml), or give one of the two another name",
                map.target_of(&table.name)
            );
            let object = format!("table {}", table.name);
            self.findings.push(Finding::error(Side::Here, "no-way-back", object, message));
        }
    }

    /// Sections that are about nothing.
    fn sections(&mut self, map: &Map) {
        let mut nothing = Vec::new();
        for table in map.named() {
            if !self.tables.iter().any(|t| t.name == table.source) {
                nothing.push(format!("table {}", table.source));
            }
        }
        for (schema, _) in map.schemas() {
            if !self.tables.iter().any(|t| t.name.schema == *schema) {
                nothing.push(format!("schema {schema}"));
            }
        }
        for object in nothing {
            let message = "is mapped, and not among the tables of the source that the job is of: \
                 correct the section's table (upper and lower case differ), or take it out";
            let finding = Finding::error(Side::Source, "map-matches-nothing", object, message);
            self.findings.push(finding);
        }
    }

    /// Two tables that would be one on the target.
    fn names(&mut self, map: &Map) {
        let mut by_target: BTreeMap<QualifiedName, Vec<String>> = BTreeMap::new();
        for table in &self.tables {
            let target = map.target_of(&table.name);
            by_target.entry(target).or_default().push(table.name.to_string());
        }
        for (target, sources) in by_target.into_iter().filter(|(_, sources)| sources.len() > 1) {
            let message = format!(
                "would be filled from {}: give one of them another name with to, or --exclude it",
                sources.join(" and ")
            );
            let object = format!("table {target}");
            self.findings.push(Finding::error(Side::Target, "map-name-taken", object, message));
        }
    }
}

impl Judge<'_> {
    fn error(&mut self, code: &'static str, message: impl Into<String>) {
        let object = format!("table {}", self.table.name);
        self.findings.push(Finding::error(Side::Source, code, object, message));
    }

    fn needs_full(&mut self, message: &str) {
        let fix = format!("ALTER TABLE {} REPLICA IDENTITY FULL;", self.table.name.quoted());
        let object = format!("table {}", self.table.name);
        let finding = Finding::error(Side::Source, "map-needs-identity", object, message);
        self.findings.push(finding.fix(fix));
    }

    /// Keys by which rows are shared out hardly ever change, and such a change is found out.
    fn advises_full(&mut self, columns: &str) {
        let message = format!(
            "an UPDATE that changes {} and leaves long values (of {}) as they are does not carry \
             them to the row's new target, and stops the job: let whole rows identify, if such \
             statements come",
            self.mapped.slice.as_ref().map_or("", |slice| slice.column.as_str()),
            columns
        );
        let fix = format!("ALTER TABLE {} REPLICA IDENTITY FULL;", self.table.name.quoted());
        let object = format!("table {}", self.table.name);
        let finding = Finding::warning(Side::Source, "shard-key-update", object, message);
        self.findings.push(finding.fix(fix));
    }

    fn is_full(&self) -> bool {
        self.table.identity == ReplicaIdentity::Full
    }

    /// False if nothing else needs to be said.
    fn kind(&mut self, has_rows: bool) -> bool {
        let what = match self.table.kind {
            _ if !has_rows => "takes part with its schema alone (--schema-only)",
            TableKind::Partitioned => "is partitioned",
            _ if self.table.partition_of.is_some() => "is a partition",
            _ if self.table.unlogged => "is unlogged",
            TableKind::Plain => return true,
        };
        let message = format!(
            "{what}, and such a table cannot be mapped: take it out of the map, or leave it out \
             with --exclude"
        );
        self.error("map-kind", message);
        false
    }

    /// False if a column is missing, so that nothing more can be said.
    fn columns(&mut self) -> bool {
        let mut whole = true;
        for name in self.mapped.named_columns() {
            let found = self.table.columns.iter().find(|column| column.name == *name);
            let what = match found {
                None => "is not there: correct the section, or take it out",
                Some(column) if column.generated => {
                    "is generated, and goes along in no way: take it out of the section"
                }
                Some(_) => continue,
            };
            whole = false;
            self.error("map-column", format!("column {name} of the map {what}"));
        }
        let mut names = BTreeMap::<&str, u32>::new();
        for column in self.kept() {
            *names.entry(self.mapped.written(column)).or_default() += 1;
        }
        let twice: Vec<String> =
            names.into_iter().filter(|(_, n)| *n > 1).map(|(name, _)| name.to_string()).collect();
        for name in twice {
            self.error("map-column", format!("two columns would be called {name} on the target"));
        }
        let lost = |column: &&String| !self.mapped.keeps(column);
        let lost: Vec<String> = self.table.identity_columns.iter().filter(lost).cloned().collect();
        if !lost.is_empty() && !self.is_full() {
            let message = format!(
                "column {} identifies its rows in the stream and is left out: take it along (it \
                 may be masked with hash), or let whole rows identify",
                lost.join(", ")
            );
            self.needs_full(&message);
        }
        whole
    }

    fn kept(&self) -> Vec<&str> {
        let stored = self.table.stored_columns().map(|column| column.name.as_str());
        stored.filter(|column| self.mapped.keeps(column)).collect()
    }

    fn masks(&mut self, major: u32) {
        let mut wrong = Vec::new();
        for column in self.table.stored_columns() {
            let Some(mask) = self.mapped.mask(&column.name) else { continue };
            if let Err(why) = self.mapped.expression(&column.typed()) {
                wrong.push(("map-mask", why));
                continue;
            }
            let name = &column.name;
            let identifies = self.table.identity_columns.iter().chain(&self.table.key);
            if identifies.into_iter().any(|key| key == name)
                && let Some(why) = mask.breaks_key(&column.typed())
            {
                let message = format!("column {name} is of a key, and its mask breaks it: {why}");
                wrong.push(("map-key", message));
            }
            if *mask == Mask::Null && column.not_null {
                let message = format!("column {name} is NOT NULL: mask it with constant: or sql:");
                wrong.push(("map-mask", message));
            }
            if *mask == Mask::Hash && major < 11 {
                let message = format!(
                    "column {name}: a hash is computed by sha256(), which PostgreSQL {major} does \
                     not have (11 and newer): use null, constant:, partial: or sql:"
                );
                wrong.push(("map-mask", message));
            }
        }
        for (code, message) in wrong {
            self.error(code, message);
        }
    }

    /// Whether updates and deletes carry what they have to.
    fn stream(&mut self) {
        if self.is_full() {
            return;
        }
        let stored: Vec<&str> = self.table.stored_columns().map(|c| c.name.as_str()).collect();
        let identifies = |column: &str| self.table.identity_columns.iter().any(|c| c == column);
        let long = |column: &str| self.toastable.iter().any(|c| c == column);
        let (mut reasons, mut advised) = (Vec::new(), None);
        if self.mapped.chooses() {
            let what = if self.mapped.slice.is_some() { "its [[shard]]" } else { "its filter" };
            let spoken = self.mapped.filter_depends(&stored);
            let blind: Vec<&str> = spoken.into_iter().filter(|c| !identifies(c)).collect();
            let late: Vec<&str> =
                self.kept().into_iter().filter(|c| long(c) && !identifies(c)).collect();
            if !blind.is_empty() {
                reasons.push(format!(
                    "{what} speaks of {}, of which an UPDATE or DELETE does not carry the \
                     value before",
                    blind.join(", ")
                ));
            } else if !late.is_empty() && self.mapped.filter.is_none() {
                advised = Some(late.join(", "));
            } else if !late.is_empty() {
                reasons.push(format!(
                    "a row that {what} lets in by an UPDATE comes without long values that did \
                     not change (of {})",
                    late.join(", ")
                ));
            }
        }
        for column in self.kept() {
            let depends = self.mapped.depends(column, &stored);
            let lacks = depends.iter().any(|c| long(c));
            if lacks && depends.len() > 1 {
                reasons.push(format!(
                    "the mask of {column} needs {}, of which an UPDATE does not carry long values \
                     that did not change",
                    depends.join(", ")
                ));
            }
        }
        if let Some(columns) = advised {
            self.advises_full(&columns);
        }
        for reason in reasons {
            self.needs_full(&format!("{reason}: let whole rows identify"));
        }
    }

    /// A table that is there already must be able to take the rows.
    fn target(&mut self, map: &Map, there: Option<&Table>) {
        let Some(there) = there else { return };
        let ours = self.table.clone().mapped_by(Some(map));
        let mut wrong = Vec::new();
        for column in ours.stored_columns() {
            let name = ours.written(&column.name);
            match there.columns.iter().find(|c| c.name == name) {
                None => wrong.push(format!("has no column {}", quote_ident(name))),
                Some(c) if c.generated => {
                    wrong.push(format!("generates column {} itself", quote_ident(name)));
                }
                Some(c) if c.type_name != column.type_name => wrong.push(format!(
                    "has {} for column {} where {} comes",
                    c.type_name,
                    quote_ident(name),
                    column.type_name
                )),
                Some(_) => {}
            }
        }
        let named = |name: &&String| self.mapped.keeps(name);
        let key: Vec<&str> =
            self.table.key.iter().filter(named).map(|name| ours.written(name)).collect();
        let theirs: Vec<&str> = there.key.iter().map(String::as_str).collect();
        if !key.is_empty() && key.len() == self.table.key.len() && theirs.is_empty() {
            wrong.push(format!("has no key where ({}) is one", key.join(", ")));
        }
        if wrong.is_empty() {
            return;
        }
        let message = format!(
            "is there already and {}: mend it, or drop it and have it made",
            wrong.join("; ")
        );
        let object = format!("table {}", self.mapped.target);
        let fix = format!("DROP TABLE {}; {};", self.mapped.target.quoted(), ddl(&ours));
        let finding = Finding::error(Side::Target, "map-target", object, message);
        self.findings.push(finding.fix(fix));
    }

    /// Has the source look at the expressions.
    async fn expressions(&mut self, source: &mut Session) -> pg::Result<()> {
        let mut tried = Vec::new();
        if let Some(condition) = self.mapped.condition() {
            tried.push(("where".to_string(), condition, self.mapped.filter.clone()));
        }
        for column in self.table.stored_columns() {
            if let Some(Mask::Sql(sql)) = self.mapped.mask(&column.name)
                && let Ok(expression) = self.mapped.expression(&column.typed())
            {
                let what = format!("mask of {}", column.name);
                // What is computed has a type that an index may not be of.
                tried.push((what, format!("{expression} is not null"), Some(sql.clone())));
            }
        }
        for (what, expression, sql) in tried {
            let computed = self.table.columns.iter().filter(|c| c.generated);
            let generated = computed
                .map(|column| &column.name)
                .find(|name| sql.as_ref().is_some_and(|sql| map::mentions(sql, name)));
            if let Some(name) = generated {
                let message = format!(
                    "{what}: column {name} is generated, and not in the stream: write what it is \
                     generated from"
                );
                self.error("map-expression", message);
                continue;
            }
            if let Err(error) = self.try_expression(source, &expression).await {
                if error.is_closed() {
                    return Err(error);
                }
                let said = error.server().map_or(error.to_string(), |said| said.message.clone());
                let message = format!(
                    "{what}: {said}. An expression is of one row's columns, immutable, without \
                     subqueries, and names functions of your own with their schema"
                );
                self.error("map-expression", message);
            }
        }
        Ok(())
    }

    async fn try_expression(&self, source: &mut Session, expression: &str) -> pg::Result<()> {
        let sql = format!(
            "begin; create temporary table {row} (like {}); \
             create index on pg_temp.{row} (({expression}))",
            self.table.name.quoted(),
            row = map::ROW
        );
        let tried = source.execute(&sql).await;
        source.execute("rollback").await?;
        tried.map(|_| ())
    }
}
