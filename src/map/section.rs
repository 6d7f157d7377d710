//! One `[[map]]` section as it is written, and what it says.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::mask::Mask;
use super::{ROW, TableMap, mentions};
use crate::id::QualifiedName;

/// `[[map]]` of walferry.toml.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Section {
    /// The table on the source, `schema.table`, or `schema.*` to give a schema another name.
    pub table: String,
    /// Its name on the target, likewise; the same if it is not given.
    pub to: Option<String>,
    /// Only these columns.
    pub include_columns: Vec<String>,
    /// Not these columns.
    pub exclude_columns: Vec<String>,
    /// Only the rows for which this SQL is true.
    #[serde(rename = "where")]
    pub filter: Option<String>,
    /// Columns' names on the source, and on the target.
    pub rename: BTreeMap<String, String>,
    /// Columns' names on the source, and what hides their values.
    pub mask: BTreeMap<String, String>,
}

/// What a section says.
pub(super) enum Read {
    /// A schema's names on both sides.
    Schema(String, String),
    /// A table.
    Table(Box<TableMap>),
}

impl Section {
    pub(super) fn read(&self) -> Result<Read, String> {
        let (schema, name) = split(&self.table).ok_or_else(|| {
            format!("table = \"{}\": write schema.table, or schema.*", self.table)
        })?;
        let to = match &self.to {
            None => None,
            Some(to) => Some(
                split(to)
                    .ok_or_else(|| format!("to = \"{to}\": write schema.table, or schema.*"))?,
            ),
        };
        if name == "*" {
            return self.schema(schema, to);
        }
        let source = QualifiedName::new(schema, name);
        let target = match to {
            None => source.clone(),
            Some((_, name)) if name == "*" => {
                return Err(format!("{source}: one table cannot become all of a schema"));
            }
            Some((schema, name)) => QualifiedName::new(schema, name),
        };
        for side in [&source, &target] {
            if side.schema == "walferry" || side.schema.starts_with("pg_") {
                return Err(format!("{side} is in a schema that no job moves"));
            }
        }
        let mut table = TableMap::renamed(source, target);
        self.fill(&mut table).map_err(|what| format!("{}: {what}", table.source))?;
        Ok(Read::Table(Box::new(table)))
    }

    fn schema(&self, from: String, to: Option<(String, String)>) -> Result<Read, String> {
        let bare = Section { table: self.table.clone(), to: self.to.clone(), ..Section::default() };
        match to {
            Some((to, name)) if name == "*" && *self == bare => Ok(Read::Schema(from, to)),
            _ => Err(format!(
                "table = \"{}\": a whole schema takes to = \"other.*\" and nothing else; write a \
                 section for each table that has more",
                self.table
            )),
        }
    }

    fn fill(&self, table: &mut TableMap) -> Result<(), String> {
        if !self.include_columns.is_empty() && !self.exclude_columns.is_empty() {
            return Err("give include-columns or exclude-columns, not both".to_string());
        }
        table.include.clone_from(&self.include_columns);
        table.exclude.clone_from(&self.exclude_columns);
        table.rename.clone_from(&self.rename);
        for (column, text) in &self.mask {
            let mask: Mask = text.parse().map_err(|why| format!("mask of {column}: {why}"))?;
            if let Mask::Sql(sql) = &mask {
                refuse_tricks(sql).map_err(|why| format!("mask of {column}: {why}"))?;
            }
            table.masks.insert(column.clone(), mask);
        }
        if let Some(filter) = &self.filter {
            refuse_tricks(filter).map_err(|why| format!("where: {why}"))?;
            table.filter = Some(filter.clone());
        }
        let kept = table.rename.keys().chain(table.masks.keys());
        if let Some(column) = kept.into_iter().find(|column| !table.keeps(column)) {
            return Err(format!("column {column} is renamed or masked, and left out as well"));
        }
        let mut written: Vec<&String> = table.rename.values().collect();
        written.sort();
        if let Some([twice, _]) = written.windows(2).find(|pair| matches!(pair, [a, b] if a == b)) {
            return Err(format!("two columns become {twice}"));
        }
        Ok(())
    }
}

/// What would mean one thing in one statement and another in the next, or hide a column's name.
fn refuse_tricks(sql: &str) -> Result<(), String> {
    if sql.trim().is_empty() {
        return Err("is empty".to_string());
    }
    if mentions(sql, ROW) {
        return Err(format!("may speak of columns, not of the whole row {ROW}"));
    }
    if sql.to_ascii_lowercase().contains("u&\"") {
        return Err("write names of columns plainly, not as U&\"...\"".to_string());
    }
    Ok(())
}

/// A table's name as `schema.table`, either in double quotes where it needs them.
pub fn table_name(text: &str) -> Option<QualifiedName> {
    let (schema, name) = split(text)?;
    let moves = name != "*" && schema != "walferry" && !schema.starts_with("pg_");
    moves.then(|| QualifiedName::new(schema, name))
}

/// Schema and name; either may be in double quotes, in which a doubled quote stands for one.
fn split(text: &str) -> Option<(String, String)> {
    let mut parts = vec![String::new()];
    let (mut quoted, mut chars) = (false, text.trim().chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                parts.last_mut()?.push('"');
            }
            '"' => quoted = !quoted,
            '.' if !quoted => parts.push(String::new()),
            c => parts.last_mut()?.push(c),
        }
    }
    let [schema, name] = <[String; 2]>::try_from(parts).ok()?;
    (!quoted && !schema.is_empty() && !name.is_empty()).then_some((schema, name))
}
