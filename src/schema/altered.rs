//! DDL in the stream: what became of a table, told from its descriptions before and after. Pure.
//!
//! A description in the stream has names and types, and no more. What it cannot say, whether a name
//! that is new is a new column or another's new name, the source's catalog can: a column's number
//! is never given again. But the catalog is of now, and the description of when it was written, so
//! the two are believed only where they do not contradict each other; else it is said that it
//! cannot be told.
//!
//! What cannot be written as a statement that is certain to do on the target what was done on the
//! source (a type changed with USING, values that a default of its own made) is said as well.

use std::collections::HashSet;
use std::fmt;

use super::policy::Class;
use crate::change::{Column, KnownColumn, Relation};
use crate::id::{QualifiedName, quote_ident, quote_literal};

/// A column of the source's table as the catalog has it now, dropped ones too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogColumn {
    /// `attnum`.
    pub attnum: i16,
    /// `attname`; meaningless where it is dropped.
    pub name: String,
    /// `attisdropped`.
    pub dropped: bool,
    /// `attnotnull`.
    pub not_null: bool,
    /// An identity column, or a generated one: its values are made by the server.
    pub made: bool,
    /// Its default.
    pub default: Option<String>,
    /// What rows have that were there when it was added with a default (`attmissingval`).
    pub fill: Option<String>,
}

/// One thing that became of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Alteration {
    /// A column is new: its place in the description.
    Add(usize),
    /// A column is gone.
    Drop(String),
    /// A column has another name: the old one, and its place in the description.
    Rename(String, usize),
    /// A column has another type: its place, and the one before.
    Retype(usize, (u32, i32)),
}

impl Alteration {
    /// Its class.
    pub fn class(&self) -> Class {
        match self {
            Alteration::Add(_) => Class::AddColumn,
            Alteration::Drop(_) => Class::DropColumn,
            Alteration::Rename(..) => Class::RenameColumn,
            Alteration::Retype(..) => Class::ColumnType,
        }
    }
}

/// Why it cannot be told what became of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unclear(pub String);

impl fmt::Display for Unclear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The numbers of a description's columns.
pub fn numbers(
    known: &[KnownColumn],
    relation: &Relation,
    catalog: &[CatalogColumn],
) -> Result<Vec<i16>, Unclear> {
    let mut numbers = Vec::with_capacity(relation.columns.len());
    let mut last = 0;
    for Column { name, .. } in &relation.columns {
        let before = known.iter().find(|k| k.name == *name && k.attnum != 0).map(|k| k.attnum);
        let now = catalog.iter().find(|c| !c.dropped && c.name == *name).map(|c| c.attnum);
        let number = match (before, now) {
            (Some(before), Some(now)) if before != now => {
                let what = format!("column {name} is another one by now than it was");
                return Err(Unclear(what));
            }
            (Some(number), _) | (None, Some(number)) => number,
            (None, None) => {
                return Err(Unclear(format!(
                    "column {name} is new, and the source does not have it any more"
                )));
            }
        };
        // Descriptions list columns by their numbers.
        if number <= last {
            return Err(Unclear(format!("column {name} is not where it was")));
        }
        last = number;
        numbers.push(number);
    }
    Ok(numbers)
}

/// What became of the table, in the order in which it is to be done.
pub fn alterations(
    known: &[KnownColumn],
    relation: &Relation,
    numbers: &[i16],
    catalog: &[CatalogColumn],
) -> Result<Vec<Alteration>, Unclear> {
    let (mut renamed, mut other, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for (place, (column, number)) in relation.columns.iter().zip(numbers).enumerate() {
        let Some(before) = known.iter().find(|k| k.attnum == *number) else {
            added.push(Alteration::Add(place));
            continue;
        };
        if before.name != column.name {
            renamed.push(Alteration::Rename(before.name.clone(), place));
        }
        let type_before = (before.type_oid, before.type_modifier);
        if type_before != (column.type_oid, column.type_modifier) {
            other.push(Alteration::Retype(place, type_before));
        }
    }
    for before in known.iter().filter(|k| !numbers.contains(&k.attnum)) {
        if before.attnum == 0 {
            return Err(Unclear(format!("which column {} was is not known", before.name)));
        }
        if catalog.iter().any(|c| c.attnum == before.attnum && !c.dropped) {
            return Err(Unclear(format!(
                "column {} is not in the stream, and the source has it still",
                before.name
            )));
        }
        other.push(Alteration::Drop(before.name.clone()));
    }
    // A name that is taken still cannot be given: two columns that swapped names, for one.
    let taken: HashSet<&str> = known.iter().map(|k| k.name.as_str()).collect();
    for rename in &renamed {
        if let Alteration::Rename(_, place) = rename
            && let Some(column) = relation.columns.get(*place)
            && taken.contains(column.name.as_str())
        {
            return Err(Unclear(format!("column {} has the name of another", column.name)));
        }
    }
    Ok([renamed, other, added].concat())
}

/// What a statement for the target is made of.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The table that is altered there: the top of a tree of partitions.
    pub table: &'a QualifiedName,
    /// The column's type, as `format_type()` gives it on the source.
    pub type_name: &'a str,
}

/// The statements that do on the target what was done on the source, or why that is not certain;
/// `column` is the one that is added, as the source has it now.
pub fn statements(
    alteration: &Alteration,
    relation: &Relation,
    target: Target<'_>,
    column: Option<&CatalogColumn>,
) -> Result<Vec<String>, Unclear> {
    let Target { table, type_name } = target;
    let alter = format!("alter table {}", table.quoted());
    let name = |place: &usize| relation.columns.get(*place).map_or("", |c| c.name.as_str());
    match alteration {
        Alteration::Drop(name) => Ok(vec![format!("{alter} drop column {}", quote_ident(name))]),
        Alteration::Rename(before, place) => {
            let (before, after) = (quote_ident(before), quote_ident(name(place)));
            Ok(vec![format!("{alter} rename column {before} to {after}")])
        }
        Alteration::Retype(place, before) => {
            let column = name(place);
            let after = relation.columns.get(*place).map(|c| (c.type_oid, c.type_modifier));
            match after.is_some_and(|after| widens(*before, after)) {
                true => Ok(vec![format!(
                    "{alter} alter column {} type {type_name}",
                    quote_ident(column)
                )]),
                false => Err(Unclear(format!(
                    "column {column} was rewritten as {type_name}, by which expression is not known"
                ))),
            }
        }
        Alteration::Add(place) => add(&alter, name(place), type_name, column),
    }
}

fn add(
    alter: &str,
    name: &str,
    type_name: &str,
    column: Option<&CatalogColumn>,
) -> Result<Vec<String>, Unclear> {
    let quoted = quote_ident(name);
    let plain = format!("{alter} add column {quoted} {type_name}");
    // One that is gone again by now held what the stream has, and what else is of no matter.
    let Some(column) = column.filter(|column| !column.dropped) else { return Ok(vec![plain]) };
    if column.made {
        return Err(Unclear(format!("column {name} has values that the source made")));
    }
    match (&column.default, &column.fill) {
        (None, None) => Ok(vec![plain]),
        (default, Some(fill)) => {
            let not_null = if column.not_null { " not null" } else { "" };
            let fill = quote_literal(fill);
            let now = match default {
                Some(default) => format!("set default {default}"),
                None => "drop default".to_string(),
            };
            Ok(vec![
                format!("{plain} default {}::{type_name}{not_null}", fill.trim_start()),
                format!("{alter} alter column {quoted} {now}"),
            ])
        }
        (Some(default), None) => Err(Unclear(format!(
            "column {name} was added, and whether rows that were there got its default \
             ({default}) is not known"
        ))),
    }
}

/// True if every value of the first type reads the same as one of the second, so that a plain ALTER
/// TYPE does on the target what it did on the source.
fn widens((before, before_modifier): (u32, i32), (after, after_modifier): (u32, i32)) -> bool {
    const INT8: u32 = 20;
    const INT2: u32 = 21;
    const INT4: u32 = 23;
    const TEXT: u32 = 25;
    const VARCHAR: u32 = 1043;
    const NUMERIC: u32 = 1700;
    /// Precision of the fraction of a second only.
    const TIMES: [u32; 4] = [1083, 1114, 1184, 1266];
    let longer =
        after_modifier == -1 || (before_modifier >= 0 && after_modifier >= before_modifier);
    match (before, after) {
        (INT2, INT4 | INT8) | (INT4, INT8) | (VARCHAR, TEXT) => true,
        (INT2 | INT4 | INT8, NUMERIC) | (TEXT, VARCHAR) => after_modifier == -1,
        (VARCHAR, VARCHAR) => longer,
        // A modifier holds precision and scale; more digits with the same scale.
        (NUMERIC, NUMERIC) => {
            let scale = |modifier: i32| (modifier - 4) & 0xFFFF;
            after_modifier == -1 || (longer && scale(before_modifier) == scale(after_modifier))
        }
        (before, after) => before == after && TIMES.contains(&before) && longer,
    }
}

/// Statements that give an enum the labels it lacks, in their places. `labels` are the source's in
/// their order, `there` the target's.
pub fn labels(name: &QualifiedName, labels: &[String], there: &[String]) -> Vec<String> {
    let mut statements = Vec::new();
    let mut before: Option<&String> = None;
    for label in labels {
        if !there.contains(label) {
            let next =
                labels.iter().find(|label| there.contains(label)).filter(|_| before.is_none());
            let place = match (before, next) {
                (Some(before), _) => format!(" after {}", quote_literal(before)),
                (None, Some(next)) => format!(" before {}", quote_literal(next)),
                (None, None) => String::new(),
            };
            let (name, label) = (name.quoted(), quote_literal(label));
            statements.push(format!("alter type {name} add value if not exists {label}{place}"));
        }
        before = Some(label);
    }
    statements
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(columns: &[(i16, &str, u32, i32)]) -> Vec<KnownColumn> {
        let of = |(attnum, name, type_oid, type_modifier): &(i16, &str, u32, i32)| KnownColumn {
            attnum: *attnum,
            name: name.to_string(),
            type_oid: *type_oid,
            type_modifier: *type_modifier,
        };
        columns.iter().map(of).collect()
    }

    fn relation(columns: &[(&str, u32, i32)]) -> Relation {
        let columns = columns.iter().map(|(name, type_oid, type_modifier)| Column {
            name: name.to_string(),
            type_oid: *type_oid,
            type_modifier: *type_modifier,
            key: false,
        });
        Relation {
            oid: 1,
            name: QualifiedName::new("s", "t"),
            identity: crate::change::ReplicaIdentity::Default,
            columns: columns.collect(),
        }
    }

    /// Names in the order of their numbers; `-` for one that is dropped.
    fn catalog(names: &[&str]) -> Vec<CatalogColumn> {
        let of = |(attnum, name): (i16, &&str)| CatalogColumn {
            attnum,
            name: name.to_string(),
            dropped: *name == "-",
            not_null: false,
            made: false,
            default: None,
            fill: None,
        };
        (1..).zip(names).map(of).collect()
    }

    /// What became of `(id int4, a varchar(10), b int4)`.
    fn became(columns: &[(&str, u32, i32)], now: &[&str]) -> Result<Vec<Alteration>, Unclear> {
        let known = known(&[(1, "id", 23, -1), (2, "a", 1043, 14), (3, "b", 23, -1)]);
        let (relation, catalog) = (relation(columns), catalog(now));
        let numbers = numbers(&known, &relation, &catalog)?;
        alterations(&known, &relation, &numbers, &catalog)
    }

    const ID: (&str, u32, i32) = ("id", 23, -1);
    const A: (&str, u32, i32) = ("a", 1043, 14);
    const B: (&str, u32, i32) = ("b", 23, -1);

    #[test]
    fn columns_added_dropped_renamed_and_retyped_are_told_apart() {
        use Alteration::*;
        let c = ("c", 25, -1);
        assert_eq!(became(&[ID, A, B], &["id", "a", "b"]), Ok(vec![]));
        assert_eq!(became(&[ID, A, B, c], &["id", "a", "b", "c"]), Ok(vec![Add(3)]));
        assert_eq!(became(&[ID, B], &["id", "-", "b"]), Ok(vec![Drop("a".to_string())]));
        // The last column under another name, or gone with a new one in its place.
        let renamed = became(&[ID, A, ("c", 23, -1)], &["id", "a", "c"]);
        assert_eq!(renamed, Ok(vec![Rename("b".to_string(), 2)]));
        let replaced = became(&[ID, A, ("c", 23, -1)], &["id", "a", "-", "c"]);
        assert_eq!(replaced, Ok(vec![Drop("b".to_string()), Add(2)]));
        let retyped = became(&[ID, ("a", 25, -1), B], &["id", "a", "b"]);
        assert_eq!(retyped, Ok(vec![Retype(1, (1043, 14))]));
    }

    #[test]
    fn what_cannot_be_told_is_said() {
        // Added, and gone or renamed since.
        assert!(became(&[ID, A, B, ("c", 25, -1)], &["id", "a", "b", "-"]).is_err());
        // Dropped and made again under its name.
        assert!(became(&[ID, A, ("b", 25, -1)], &["id", "a", "-", "b"]).is_err());
        assert!(became(&[ID, B, A], &["id", "-", "b", "a"]).is_err());
        // Its number was never known.
        let unnumbered = known(&[(0, "id", 23, -1)]);
        let (now, gone) = (catalog(&["id"]), relation(&[ID]));
        assert!(alterations(&unnumbered, &gone, &[1], &now).is_err());
        // The stream is of before, and what is remembered of after.
        assert!(became(&[ID, B], &["id", "a", "b"]).is_err());
        // Names swapped.
        assert!(became(&[ID, ("b", 1043, 14), ("a", 23, -1)], &["id", "b", "a"]).is_err());
    }

    #[test]
    fn statements_are_given_only_where_they_do_the_same() {
        let relation = relation(&[ID, ("a", 20, -1), ("c", 25, -1)]);
        let table = QualifiedName::new("s", "t");
        let sql = |alteration: &Alteration, type_name, column: Option<&CatalogColumn>| {
            let target = Target { table: &table, type_name };
            statements(alteration, &relation, target, column).map(|sqls| sqls.join("; "))
        };
        let retype = |before| sql(&Alteration::Retype(1, before), "bigint", None);
        let wider = "alter table \"s\".\"t\" alter column \"a\" type bigint";
        assert_eq!(retype((23, -1)).as_deref(), Ok(wider));
        assert!(retype((25, -1)).unwrap_err().0.contains("rewritten as bigint"));
        let mut column = catalog(&["c"]).remove(0);
        let add = |column: &CatalogColumn| sql(&Alteration::Add(2), "text", Some(column));
        assert_eq!(add(&column).as_deref(), Ok("alter table \"s\".\"t\" add column \"c\" text"));
        (column.default, column.not_null) = (Some("'x'::text".to_string()), true);
        assert!(add(&column).unwrap_err().0.contains("default"));
        column.fill = Some("it's".to_string());
        let filled = "alter table \"s\".\"t\" add column \"c\" text default 'it''s'::text \
                      not null; alter table \"s\".\"t\" alter column \"c\" set default 'x'::text";
        assert_eq!(add(&column).as_deref(), Ok(filled));
        column.made = true;
        assert!(add(&column).is_err());
    }

    #[test]
    fn types_widen_where_every_value_reads_the_same() {
        let numeric = |precision: i32, scale: i32| (1700, ((precision << 16) | scale) + 4);
        assert!(widens((1043, 14), (1043, 24)) && !widens((1043, 24), (1043, 14)));
        assert!(widens((1043, -1), (25, -1)) && !widens((1043, -1), (1043, 14)));
        assert!(widens(numeric(10, 2), numeric(12, 2)) && !widens(numeric(10, 2), numeric(12, 3)));
        assert!(widens(numeric(10, 2), (1700, -1)) && !widens((1700, -1), numeric(10, 2)));
        assert!(widens((1184, 0), (1184, 3)) && !widens((700, -1), (701, -1)));
    }

    #[test]
    fn labels_go_to_their_places() {
        let texts = |texts: &[&str]| texts.iter().map(|t| t.to_string()).collect::<Vec<_>>();
        let name = QualifiedName::new("s", "e");
        let added = labels(&name, &texts(&["a", "b", "it's", "c"]), &texts(&["b", "c"]));
        assert_eq!(
            added,
            [
                "alter type \"s\".\"e\" add value if not exists 'a' before 'b'",
                "alter type \"s\".\"e\" add value if not exists 'it''s' after 'b'",
            ]
        );
        assert_eq!(labels(&name, &texts(&["b"]), &texts(&["b", "z"])), Vec::<String>::new());
    }
}
