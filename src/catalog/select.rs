//! Which tables take part: `--include`, `--exclude` and `--schema-only` patterns.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::id::QualifiedName;
use crate::map::Map;
use crate::pg::{Result, Session};

/// A `schema.table` pattern: `*` stands for any characters, `?` for one, in either part. A part may
/// be double-quoted to hold a dot. A pattern without a dot means the table in any schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    schema: String,
    name: String,
}

/// The text is not a pattern.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not a table pattern: write schema.table, with * and ? as wildcards")]
pub struct PatternError(pub String);

impl std::str::FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let text = text.to_string();
        let bad = || PatternError(text.clone());
        let mut parts = vec![String::new()];
        let mut quoted = false;
        for c in text.chars() {
            match c {
                '"' => quoted = !quoted,
                '.' if !quoted => parts.push(String::new()),
                c => parts.last_mut().ok_or_else(bad)?.push(c),
            }
        }
        if quoted || parts.iter().any(String::is_empty) {
            return Err(bad());
        }
        let mut parts = parts.into_iter();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(name), None, _) => Ok(Pattern { text, schema: "*".to_string(), name }),
            (Some(schema), Some(name), None) => Ok(Pattern { text, schema, name }),
            _ => Err(bad()),
        }
    }
}

impl Pattern {
    /// True if the pattern covers the table.
    pub fn matches(&self, table: &QualifiedName) -> bool {
        glob(&self.schema, &table.schema) && glob(&self.name, &table.name)
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// Iterative glob match: on a mismatch after a `*`, let that star take one character more.
fn glob(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == '?' || Some(c) == text.get(t) => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((star_p, star_t)) => {
                    star = Some((star_p, star_t + 1));
                    p = star_p + 1;
                    t = star_t + 1;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|c| *c == '*')
}

/// The tables of a job.
///
/// A partition goes where its partitioned table goes: a pattern that covers a parent covers its
/// partitions too, at any depth, once [`Selection::with_partitions`] has learned of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Empty means all.
    pub include: Vec<Pattern>,
    /// Taken away from what is included.
    pub exclude: Vec<Pattern>,
    /// Created on the target, rows left behind.
    pub schema_only: Vec<Pattern>,
    /// The tables and what belongs to them, beside whatever else the target has: no schemas, types,
    /// functions, views, and no sequences but those that the tables own.
    pub tables_only: bool,
    /// Of all those, these alone.
    only: Option<Arc<HashSet<QualifiedName>>>,
    /// Partition to partitioned parent.
    parents: HashMap<QualifiedName, QualifiedName>,
    /// Tables are given by their names on the target of this map; patterns are of the source's.
    back: Option<Back>,
}

/// A map, as part of what can be compared.
#[derive(Clone, Debug)]
struct Back(Arc<Map>);

impl PartialEq for Back {
    fn eq(&self, other: &Back) -> bool {
        self.0.digest() == other.0.digest()
    }
}

impl Eq for Back {}

impl Selection {
    /// Reads the three lists of patterns.
    pub fn parse(
        include: &[String],
        exclude: &[String],
        schema_only: &[String],
    ) -> std::result::Result<Selection, PatternError> {
        let read = |list: &[String]| -> std::result::Result<Vec<Pattern>, PatternError> {
            list.iter().map(|p| p.parse()).collect()
        };
        Ok(Selection {
            include: read(include)?,
            exclude: read(exclude)?,
            schema_only: read(schema_only)?,
            tables_only: false,
            only: None,
            parents: HashMap::new(),
            back: None,
        })
    }

    /// The same, knowing the partitions there are on this session's server now.
    pub async fn with_partitions(mut self, session: &mut Session) -> Result<Selection> {
        if self.is_everything() {
            return Ok(self);
        }
        let rows = session
            .query(
                "select n.nspname, c.relname, pn.nspname, p.relname from pg_catalog.pg_inherits h \
                 join pg_catalog.pg_class c on c.oid = h.inhrelid and c.relispartition \
                    and c.relkind in ('r', 'p', 'f') \
                 join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
                 join pg_catalog.pg_class p on p.oid = h.inhparent \
                 join pg_catalog.pg_namespace pn on pn.oid = p.relnamespace",
            )
            .await?;
        for row in &rows {
            let partition = QualifiedName::new(row.str(0)?, row.str(1)?);
            self.parents.insert(partition, QualifiedName::new(row.str(2)?, row.str(3)?));
        }
        Ok(self)
    }

    /// The same without the tables that these patterns cover.
    pub fn without(&self, patterns: &[String]) -> std::result::Result<Selection, PatternError> {
        let mut selection = self.clone();
        for pattern in patterns {
            selection.exclude.push(pattern.parse()?);
        }
        Ok(selection)
    }

    /// The same, of the names that tables have on the target.
    pub fn on_target(&self, map: &Arc<Map>) -> Selection {
        Selection { back: Some(Back(map.clone())), ..self.clone() }
    }

    /// These tables of them, alone.
    pub fn of_group(&self, tables: &[QualifiedName]) -> Selection {
        let only = Some(Arc::new(tables.iter().cloned().collect()));
        Selection { tables_only: true, only, ..self.clone() }
    }

    /// True if the table exists on both sides after the move.
    pub fn has_schema(&self, table: &QualifiedName) -> bool {
        self.named(table).is_some_and(|table| self.has_schema_by(&table))
    }

    /// What the table is called on the source.
    fn named<'a>(&self, table: &'a QualifiedName) -> Option<Cow<'a, QualifiedName>> {
        match &self.back {
            Some(Back(map)) => map.source_of(table).map(Cow::Owned),
            None => Some(Cow::Borrowed(table)),
        }
    }

    fn has_schema_by(&self, table: &QualifiedName) -> bool {
        if self.only.as_ref().is_some_and(|only| !only.contains(table)) {
            return false;
        }
        (self.include.is_empty()
            || self.covers(&self.include, table)
            || self.covers(&self.schema_only, table))
            && !self.covers(&self.exclude, table)
    }

    /// True if the table's rows are copied, followed and verified.
    pub fn has_rows(&self, table: &QualifiedName) -> bool {
        self.named(table).is_some_and(|table| {
            self.has_schema_by(&table) && !self.covers(&self.schema_only, &table)
        })
    }

    /// True if a sequence goes where its owner goes, and one without where the database goes.
    pub fn has_sequence(&self, owner: Option<&QualifiedName>) -> bool {
        owner.map_or(!self.tables_only, |table| self.has_schema(table))
    }

    /// True if no table is left out.
    pub fn is_everything(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty() && self.schema_only.is_empty()
    }

    /// Patterns that match none of the source's tables; one of `--exclude` may be there for a table
    /// of the target.
    pub fn unmatched(&self, source: &[QualifiedName], target: &[QualifiedName]) -> Vec<&Pattern> {
        let none = |pattern: &&Pattern| !source.iter().any(|table| pattern.matches(table));
        let neither = |pattern: &&Pattern| !target.iter().any(|table| pattern.matches(table));
        let moved = [&self.include, &self.schema_only].into_iter().flatten().filter(none);
        moved.chain(self.exclude.iter().filter(none).filter(neither)).collect()
    }

    /// True if a pattern matches the table or something it is a partition of.
    fn covers(&self, patterns: &[Pattern], table: &QualifiedName) -> bool {
        let line = std::iter::successors(Some(table), |table| self.parents.get(*table));
        line.into_iter().any(|table| patterns.iter().any(|p| p.matches(table)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_cover_what_they_say() {
        let check = |pattern: &str, schema: &str, name: &str| {
            pattern.parse::<Pattern>().unwrap().matches(&QualifiedName::new(schema, name))
        };
        assert!(check("public.*", "public", "a"));
        assert!(!check("public.*", "other", "a"));
        assert!(check("*.log_??", "x", "log_01"));
        assert!(!check("*.log_??", "x", "log_001"));
        assert!(check("orders", "any", "orders"));
        assert!(check("\"a.b\".\"c.d\"", "a.b", "c.d"));
        assert!(check("a*b*c.t", "aXbXbXc", "t"));
        for bad in ["", ".", "a.", "a.b.c", "\"a"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn schema_only_tables_have_a_schema_and_no_rows() {
        let log = ["public.log".to_string()];
        let selection = Selection::parse(&[], &[], &log).unwrap();
        let name = QualifiedName::new("public", "log");
        assert!(selection.has_schema(&name) && !selection.has_rows(&name));
        assert!(selection.has_rows(&QualifiedName::new("public", "log2")));
    }

    #[test]
    fn partitions_go_where_their_root_goes() {
        let name = |table: &str| QualifiedName::new("public", table);
        let select = |include: &[&str], exclude: &[&str], schema_only: &[&str]| {
            let list = |l: &[&str]| l.iter().map(|p| p.to_string()).collect::<Vec<_>>();
            let (include, exclude) = (list(include), list(exclude));
            let mut selection = Selection::parse(&include, &exclude, &list(schema_only)).unwrap();
            selection.parents = [("leaf", "middle"), ("middle", "root")]
                .map(|(child, parent)| (name(child), name(parent)))
                .into();
            selection
        };
        assert!(select(&["root"], &[], &[]).has_rows(&name("leaf")));
        assert!(!select(&["public.*"], &["root"], &[]).has_schema(&name("leaf")));
        let quiet = select(&[], &[], &["middle"]);
        assert!(quiet.has_schema(&name("leaf")) && !quiet.has_rows(&name("leaf")));
        assert!(quiet.has_rows(&name("root")));
        let one = select(&["leaf"], &[], &[]);
        assert!(one.has_rows(&name("leaf")) && !one.has_schema(&name("root")));
        assert_eq!(
            select(&["lea?"], &["x"], &[]).unmatched(&[name("leaf")], &[])[0].to_string(),
            "x"
        );
        assert!(select(&["lea?"], &["x"], &[]).unmatched(&[name("leaf")], &[name("x")]).is_empty());
    }
}
