//! What an administrator's publication shows of a database's tables: which, which of their rows and
//! columns, by which operations, and under which name.
//!
//! A stored one is held against what there is later: decoding looks publications up as they were at
//! each change, so one that was altered shows less (or more) from there on, and says nothing of it.
//!
//! <https://www.postgresql.org/docs/current/logical-replication-publication.html>

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::{Table, TableKind, list_of};
use crate::id::QualifiedName;
use crate::pg::{Result, Session};

/// A publication, as it is at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// Its name.
    pub name: String,
    /// FOR ALL TABLES.
    pub all_tables: bool,
    /// `publish_via_partition_root`.
    pub via_root: bool,
    /// Which of `insert`, `update`, `delete` and `truncate` it leaves out.
    pub lacks: Vec<String>,
    /// `pg_publication.xmin`: another one after any ALTER PUBLICATION ... SET (...), OWNER or
    /// RENAME.
    pub version: String,
    /// Everything shown, by table: what it publishes, and all partitions of that.
    pub shown: Vec<Shown>,
}

/// A table whose changes a publication shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// Its oid.
    pub oid: u32,
    /// Its schema and name.
    pub table: (String, String),
    /// The table that its changes are shown as changes of: itself, or what it is a partition of.
    pub under: (String, String),
    /// The columns shown, where there is a column list.
    pub columns: Option<Vec<String>>,
    /// The row filter, as SQL over the table's columns.
    pub filter: Option<String>,
    /// Oid of the entry in `pg_publication_rel`, where the table is listed by itself: another one
    /// once it was taken out and added again.
    pub entry: Option<u32>,
}

/// What is published of one table; by default everything under its own name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// The name that its changes come under, where that is not its own.
    pub under: Option<QualifiedName>,
    /// The rows that are, as SQL over its columns; all of them if `None`.
    pub filter: Option<String>,
    /// Its columns that are not, generated ones left out.
    pub columns_left_out: Vec<String>,
    /// The operations that are not.
    pub operations_left_out: Vec<String>,
}

impl Published {
    /// True if every row, column and operation is published.
    pub fn is_whole(&self) -> bool {
        let Published { filter, columns_left_out, operations_left_out, .. } = self;
        filter.is_none() && columns_left_out.is_empty() && operations_left_out.is_empty()
    }

    /// What is left out, for people; empty if nothing is.
    pub fn left_out(&self) -> String {
        let mut parts = Vec::new();
        if let Some(filter) = &self.filter {
            parts.push(format!("rows that are not {filter}"));
        }
        if !self.columns_left_out.is_empty() {
            parts.push(format!("columns {}", self.columns_left_out.join(", ")));
        }
        if !self.operations_left_out.is_empty() {
            parts.push(self.operations_left_out.join(", ").to_uppercase());
        }
        parts.join("; ")
    }
}

/// PostgreSQL 10 does not decode TRUNCATE, and has no option for it.
const FLAGS: &str = "select p.puballtables, p.xmin::text, \
     coalesce((pg_catalog.to_jsonb(p) ->> 'pubviaroot')::bool, false), \
     p.pubinsert, p.pubupdate, p.pubdelete, \
     coalesce((pg_catalog.to_jsonb(p) ->> 'pubtruncate')::bool, true) \
     from pg_catalog.pg_publication p where p.pubname = $1";

/// The view knows of column lists and row filters from 15 on, and names no list apart from one that
/// has every column.
const SHOWN: &str = "with recursive shown as ( \
       select c.oid, n.nspname, c.relname, r.oid as entry, \
         case when pg_catalog.to_jsonb(r) ->> 'prattrs' is not null \
           then pg_catalog.to_jsonb(t) -> 'attnames' end as columns, \
         pg_catalog.to_jsonb(t) ->> 'rowfilter' as filter \
       from pg_catalog.pg_publication_tables t \
       join pg_catalog.pg_publication p on p.pubname = t.pubname \
       join pg_catalog.pg_namespace n on n.nspname = t.schemaname \
       join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = t.tablename \
       left join pg_catalog.pg_publication_rel r on r.prpubid = p.oid and r.prrelid = c.oid \
       where t.pubname = $1), \
     tree(oid, root, depth) as ( \
       select oid, oid, 0 from shown union all \
       select h.inhrelid, tree.root, tree.depth + 1 from tree \
       join pg_catalog.pg_inherits h on h.inhparent = tree.oid \
       join pg_catalog.pg_class c on c.oid = h.inhrelid and c.relispartition) \
     select distinct on (c.oid) c.oid, n.nspname, c.relname, s.nspname, s.relname, s.columns, \
       s.filter, s.entry \
     from tree join shown s on s.oid = tree.root \
     join pg_catalog.pg_class c on c.oid = tree.oid \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     order by c.oid, tree.depth desc";

impl Publication {
    /// The publication of that name as it is now; `None` if there is none. Two round trips.
    pub async fn read(session: &mut Session, name: &str) -> Result<Option<Publication>> {
        let Some(row) = session.query_opt(FLAGS, &[Some(name)]).await? else { return Ok(None) };
        let mut lacks = Vec::new();
        for (index, operation) in (3..).zip(["insert", "update", "delete", "truncate"]) {
            if !row.bool(index)? {
                lacks.push(operation.to_string());
            }
        }
        let mut publication = Publication {
            name: name.to_string(),
            all_tables: row.bool(0)?,
            version: row.string(1)?,
            via_root: row.bool(2)?,
            lacks,
            shown: Vec::new(),
        };
        for row in session.query_params(SHOWN, &[Some(name)]).await? {
            let columns = row.opt(5)?.map(serde_json::from_str).transpose();
            publication.shown.push(Shown {
                oid: row.parse(0)?,
                table: (row.string(1)?, row.string(2)?),
                under: (row.string(3)?, row.string(4)?),
                columns: columns.map_err(|e| crate::pg::Error::Result(e.to_string()))?,
                filter: row.opt(6)?.map(str::to_string),
                entry: row.parse_opt(7)?,
            });
        }
        Ok(Some(publication))
    }

    /// The same, of these tables only, and of what they are shown under.
    pub fn of(&self, tables: &[Table]) -> Publication {
        let names: HashSet<(&str, &str)> =
            tables.iter().map(|t| (&*t.name.schema, &*t.name.name)).collect();
        let taken = |(schema, name): &(String, String)| names.contains(&(&**schema, &**name));
        let mut publication = self.clone();
        publication.shown.retain(|shown| taken(&shown.table) || taken(&shown.under));
        publication
    }

    /// True if it shows the table.
    pub fn shows(&self, table: &QualifiedName) -> bool {
        self.find(table).is_some()
    }

    fn find(&self, table: &QualifiedName) -> Option<&Shown> {
        self.shown.iter().find(|s| s.table.0 == table.schema && s.table.1 == table.name)
    }

    /// Logged tables that hold rows and that it does not show, in their order.
    pub fn missing<'a>(&self, tables: &'a [Table]) -> Vec<&'a Table> {
        let holds = |t: &&Table| t.kind == TableKind::Plain && !t.unlogged;
        tables.iter().filter(holds).filter(|t| !self.shows(&t.name)).collect()
    }

    /// Tables that are shown under a name that is none of `tables`, or beside partitions that are
    /// none of them: what comes under that name would not be theirs alone. With that name.
    pub fn mixed(&self, tables: &[Table]) -> Vec<(QualifiedName, QualifiedName)> {
        let known: HashSet<&QualifiedName> = tables.iter().map(|t| &t.name).collect();
        let mut mixed = Vec::new();
        for shown in self.shown.iter().filter(|shown| shown.table != shown.under) {
            let (table, under) = (named(&shown.table), named(&shown.under));
            if known.contains(&table) != known.contains(&under) {
                mixed.push((table, under));
            }
        }
        mixed
    }

    /// The tables with what is published of them: columns that are not are taken away.
    pub fn narrow(&self, mut tables: Vec<Table>) -> Vec<Table> {
        for table in &mut tables {
            let Some(shown) = self.find(&table.name) else { continue };
            self.narrow_one(table, shown);
        }
        self.narrow_parents(&mut tables);
        tables
    }

    fn narrow_one(&self, table: &mut Table, shown: &Shown) {
        let under = (shown.table != shown.under).then(|| named(&shown.under));
        let is_shown = |name: &String| shown.columns.as_ref().is_none_or(|c| c.contains(name));
        let left_out =
            table.stored_columns().map(|c| c.name.clone()).filter(|name| !is_shown(name)).collect();
        table.columns.retain(|column| column.generated || is_shown(&column.name));
        table.published = Published {
            under,
            filter: shown.filter.clone(),
            columns_left_out: left_out,
            operations_left_out: self.lacks.clone(),
        };
    }

    /// A parent that is not shown itself has the columns that all its partitions have.
    fn narrow_parents(&self, tables: &mut [Table]) {
        let mut left_out: HashMap<QualifiedName, Vec<String>> = HashMap::new();
        let parents: HashMap<QualifiedName, QualifiedName> =
            tables.iter().filter_map(|t| Some((t.name.clone(), t.partition_of.clone()?))).collect();
        for table in tables.iter().filter(|t| !t.published.columns_left_out.is_empty()) {
            let line = std::iter::successors(parents.get(&table.name), |name| parents.get(*name));
            for parent in line {
                let columns = left_out.entry(parent.clone()).or_default();
                columns.extend(table.published.columns_left_out.iter().cloned());
            }
        }
        for table in tables.iter_mut().filter(|t| !self.shows(&t.name)) {
            let Some(columns) = left_out.remove(&table.name) else { continue };
            table.columns.retain(|column| !columns.contains(&column.name));
            table.published.columns_left_out = columns;
        }
    }

    /// What is not any more as it was in `before`, for people: of the tables that this had, one
    /// line each. New tables are no change.
    pub fn changes(&self, before: &Publication) -> Vec<String> {
        let mut changes = Vec::new();
        if self.lacks != before.lacks {
            let list = |lacks: &[String]| match lacks {
                [] => "nothing".to_string(),
                some => some.join(", "),
            };
            changes.push(format!(
                "it left out {}, and leaves out {} now",
                list(&before.lacks),
                list(&self.lacks)
            ));
        }
        for old in &before.shown {
            let name = named(&old.table);
            match self.shown.iter().find(|new| new.oid == old.oid) {
                None => changes.push(format!("{name} is not in it any more")),
                Some(new) => changes.extend(change(&name, old, new)),
            }
        }
        changes
    }

    /// True if it was altered since `before`, though maybe into what it was.
    pub fn was_touched(&self, before: &Publication) -> bool {
        self.version != before.version
    }
}

/// Those of `names` that a publication made FOR TABLE shows: they are in it, or a partitioned table
/// above them is. One round trip.
///
/// `pg_publication_tables` says the same of all tables, at the cost of looking at each.
pub async fn published_of(
    session: &mut Session,
    publication: &str,
    names: &[QualifiedName],
) -> Result<HashSet<QualifiedName>> {
    let list = list_of(names);
    let sql = "with recursive up(root, oid) as ( \
           select c.oid, c.oid from pg_catalog.jsonb_array_elements_text($2::jsonb) t(name) \
           join pg_catalog.pg_class c on c.oid = pg_catalog.to_regclass(t.name) \
           union select up.root, i.inhparent from up \
           join pg_catalog.pg_class c on c.oid = up.oid and c.relispartition \
           join pg_catalog.pg_inherits i on i.inhrelid = up.oid) \
         select distinct n.nspname, c.relname from up \
         join pg_catalog.pg_publication_rel r on r.prrelid = up.oid \
         join pg_catalog.pg_publication p on p.oid = r.prpubid and p.pubname = $1 \
         join pg_catalog.pg_class c on c.oid = up.root \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace";
    let rows = session.query_params(sql, &[Some(publication), Some(&list)]).await?;
    rows.iter().map(|r| Ok(QualifiedName::new(r.str(0)?, r.str(1)?))).collect()
}

fn change(name: &QualifiedName, old: &Shown, new: &Shown) -> Option<String> {
    let all = |filter: &Option<String>| filter.clone().unwrap_or_else(|| "none".to_string());
    if new.filter != old.filter {
        let (was, is) = (all(&old.filter), all(&new.filter));
        return Some(format!("the row filter of {name} was {was} and is {is}"));
    }
    let mut lists = (old.columns.clone(), new.columns.clone());
    for list in [&mut lists.0, &mut lists.1].into_iter().flatten() {
        list.sort();
    }
    if lists.0 != lists.1 {
        let text = |list: Option<Vec<String>>| list.map_or("all".to_string(), |l| l.join(", "));
        let (was, is) = (text(lists.0), text(lists.1));
        return Some(format!("the columns of {name} were {was} and are {is}"));
    }
    if new.under != old.under {
        let (was, is) = (named(&old.under), named(&new.under));
        return Some(format!("{name} was published as {was} and is as {is}"));
    }
    (new.entry != old.entry).then(|| format!("{name} was taken out of it and added again"))
}

fn named((schema, name): &(String, String)) -> QualifiedName {
    QualifiedName::new(schema, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(oid: u32, table: &str, under: &str) -> Shown {
        let named = |name: &str| ("public".to_string(), name.to_string());
        let (table, under) = (named(table), named(under));
        Shown { oid, table, under, columns: None, filter: None, entry: None }
    }

    fn publication(shown: Vec<Shown>) -> Publication {
        Publication {
            name: "p".to_string(),
            all_tables: false,
            via_root: true,
            lacks: Vec::new(),
            version: "1".to_string(),
            shown,
        }
    }

    #[test]
    fn each_change_of_a_publication_is_told_by_its_table() {
        let before = publication(vec![shown(1, "a", "a"), shown(2, "b", "b"), shown(3, "c", "c")]);
        assert_eq!(before.changes(&before), Vec::<String>::new());
        let mut now = before.clone();
        now.shown.push(shown(4, "later", "later"));
        assert_eq!(now.changes(&before), Vec::<String>::new());
        now.shown[0].filter = Some("(id > 3)".to_string());
        now.shown[1].columns = Some(vec!["id".to_string()]);
        now.shown[2].entry = Some(77);
        now.lacks = vec!["delete".to_string()];
        let told = now.changes(&before);
        let parts = ["leaves out delete now", "filter of public.a was none and is (id > 3)"];
        assert!(parts.iter().zip(&told).all(|(part, line)| line.contains(part)), "{told:?}");
        assert!(told[2].contains("columns of public.b were all and are id"), "{told:?}");
        assert!(told[3].contains("public.c was taken out"), "{told:?}");
        now.shown.remove(0);
        assert!(now.changes(&before)[1].contains("public.a is not in it any more"));
        // The order of a column list means nothing.
        let list = |names: [&str; 2]| Some(names.map(str::to_string).to_vec());
        let (mut one, mut other) = (before.clone(), before.clone());
        (one.shown[0].columns, other.shown[0].columns) = (list(["a", "b"]), list(["b", "a"]));
        assert_eq!(one.changes(&other), Vec::<String>::new());
    }

    #[test]
    fn what_is_left_out_is_told_in_one_line() {
        let mut published = Published::default();
        assert!(published.is_whole() && published.left_out().is_empty());
        published.under = Some(QualifiedName::new("public", "root"));
        assert!(published.is_whole());
        published.filter = Some("(id > 3)".to_string());
        published.columns_left_out = vec!["a".to_string(), "b".to_string()];
        published.operations_left_out = vec!["delete".to_string(), "truncate".to_string()];
        let said = "rows that are not (id > 3); columns a, b; DELETE, TRUNCATE";
        assert_eq!(published.left_out(), said);
        assert!(!published.is_whole());
    }
}
