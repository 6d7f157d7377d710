//! What a stream is silent about: indexes, constraints, NOT NULL and defaults of tables that are
//! followed. No change of a row shows them, so both catalogs are looked at now and then.
//!
//! The source is held against itself as it was: what has become of it since the schema was copied
//! is done on the target, where that has it not. What the target has besides, or has made otherwise
//! by itself, is its owner's, and left alone. A table is only touched while its columns are the
//! same on both sides: a column that is new or has another name comes by the stream, at its place.
//!
//! Pure but for [`look`]. Names and definitions are PostgreSQL's own (`pg_get_indexdef` and the
//! like); nothing is read out of them.
//!
//! Left out: triggers, rules, rights, comments, views, functions; replica identities; a table under
//! another name.
//!
//! <https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-CATALOG>

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::policy::Class;
use crate::catalog::Selection;
use crate::id::{QualifiedName, quote_ident};
use crate::pg::{self, Session};

/// What it is, in the order in which such things are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A column's default.
    Default,
    /// A column that takes no NULL.
    NotNull,
    /// An index that no constraint has made.
    Index,
    /// CHECK, PRIMARY KEY, UNIQUE, EXCLUDE.
    Constraint,
    /// FOREIGN KEY.
    ForeignKey,
}

impl Kind {
    /// Its class.
    pub fn class(self) -> Class {
        match self {
            Kind::Default => Class::Default,
            Kind::Index => Class::Index,
            Kind::NotNull | Kind::Constraint | Kind::ForeignKey => Class::Constraint,
        }
    }
}

/// Names one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// What it is.
    pub kind: Kind,
    /// Schema of its table, and of an index.
    pub schema: String,
    /// Its table.
    pub table: String,
    /// Name of the index or constraint, or of the column.
    pub name: String,
}

impl Key {
    fn table_name(&self) -> QualifiedName {
        QualifiedName::new(&self.schema, &self.table)
    }

    /// True of a default or NOT NULL of a column that a statement of the stream adds or names.
    pub fn is_of_column_in(&self, sql: &str) -> bool {
        let column = quote_ident(&self.name);
        let made = ["add column", "to"].map(|verb| format!("{verb} {column}"));
        let of_column = matches!(self.kind, Kind::Default | Kind::NotNull);
        of_column && made.iter().any(|made| sql.contains(made))
    }
}

/// All there are, with their definitions.
pub type Objects = BTreeMap<Key, String>;

/// What a side has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Names and types of each table's columns, in no order.
    pub columns: BTreeMap<QualifiedName, String>,
    /// The rest.
    pub objects: Objects,
}

/// What has become of one on the source; `None` where there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which.
    pub key: Key,
    /// Its definition as it was.
    pub before: Option<String>,
    /// As it is.
    pub now: Option<String>,
}

/// What is to be done about it on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Todo {
    /// It is as on the source.
    Nothing,
    /// These statements, in one transaction.
    Run(Vec<String>),
    /// The stream has to bring columns first.
    Wait,
    /// The target has something else by that name.
    Differs,
}

const OBJECTS: &str = "with t as ( \
       select c.oid, n.nspname, c.relname from pg_catalog.pg_class c \
       join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
       where c.relkind in ('r', 'p') and c.relpersistence = 'p' \
       and n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
       and n.nspname !~ '^pg_toast') \
     select 'columns', t.nspname, t.relname, '', coalesce((select pg_catalog.string_agg( \
         pg_catalog.quote_ident(a.attname) || ' ' || \
         pg_catalog.format_type(a.atttypid, a.atttypmod), ', ' order by a.attname) \
       from pg_catalog.pg_attribute a \
       where a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped), '') from t \
     union all select 'default', t.nspname, t.relname, a.attname, \
       pg_catalog.pg_get_expr(d.adbin, d.adrelid) \
     from t join pg_catalog.pg_attribute a on a.attrelid = t.oid and not a.attisdropped \
     join pg_catalog.pg_attrdef d on d.adrelid = t.oid and d.adnum = a.attnum \
     where coalesce(pg_catalog.to_jsonb(a) ->> 'attgenerated', '') = '' \
     union all select 'not-null', t.nspname, t.relname, a.attname, '' \
     from t join pg_catalog.pg_attribute a on a.attrelid = t.oid and not a.attisdropped \
     where a.attnotnull and a.attnum > 0 \
     union all select 'index', t.nspname, t.relname, x.relname, \
       pg_catalog.pg_get_indexdef(x.oid) \
     from t join pg_catalog.pg_index i on i.indrelid = t.oid and i.indisvalid \
     join pg_catalog.pg_class x on x.oid = i.indexrelid and not x.relispartition \
     where not exists (select from pg_catalog.pg_constraint k \
       where k.conindid = x.oid and k.contype in ('p', 'u', 'x')) \
     union all select case k.contype when 'f' then 'foreign-key' else 'constraint' end, \
       t.nspname, t.relname, k.conname, pg_catalog.pg_get_constraintdef(k.oid) \
     from t join pg_catalog.pg_constraint k on k.conrelid = t.oid \
     where k.contype in ('c', 'f', 'p', 'u', 'x') and k.coninhcount = 0 \
     and coalesce((pg_catalog.to_jsonb(k) ->> 'conparentid')::int8, 0) = 0";

/// What a side has of tables whose rows take part.
pub async fn look(session: &mut Session, selection: &Selection) -> pg::Result<Look> {
    let mut look = Look::default();
    for row in session.query(OBJECTS).await? {
        let table = QualifiedName::new(row.str(1)?, row.str(2)?);
        if !selection.has_rows(&table) {
            continue;
        }
        let kind = match row.str(0)? {
            "columns" => {
                look.columns.insert(table, row.string(4)?);
                continue;
            }
            "default" => Kind::Default,
            "not-null" => Kind::NotNull,
            "index" => Kind::Index,
            "foreign-key" => Kind::ForeignKey,
            _ => Kind::Constraint,
        };
        let (schema, table, name) = (table.schema, table.name, row.string(3)?);
        look.objects.insert(Key { kind, schema, table, name }, row.string(4)?);
    }
    Ok(look)
}

/// What has become of `known`, in the order in which it is to be done: what is gone comes first,
/// keys that others refer to last of it; then what is new, those keys before others.
pub fn changes(known: &Objects, now: &Objects) -> Vec<Change> {
    let of = |key: &Key| Change {
        key: key.clone(),
        before: known.get(key).cloned(),
        now: now.get(key).cloned(),
    };
    let gone = known.keys().rev().filter(|key| !now.contains_key(*key));
    let other = now.iter().filter(|(key, definition)| known.get(*key) != Some(*definition));
    gone.map(of).chain(other.map(|(key, _)| of(key))).collect()
}

/// What `there`, the target, takes for a change of a source that looks like `here`.
pub fn todo(change: &Change, here: &Look, there: &Look) -> Todo {
    let (key, table) = (&change.key, change.key.table_name());
    let target = there.objects.get(key);
    if target == change.now.as_ref() {
        return Todo::Nothing;
    }
    match (here.columns.get(&table), there.columns.get(&table)) {
        // It went with its table, or will come with it.
        (None, _) => return Todo::Nothing,
        (Some(ours), Some(theirs)) if ours == theirs => {}
        _ => return Todo::Wait,
    }
    if target.is_some() && target != change.before.as_ref() {
        return Todo::Differs;
    }
    let mut statements = Vec::new();
    if target.is_some() && !(key.kind == Kind::Default && change.now.is_some()) {
        statements.push(unmake(key));
    }
    statements.extend(change.now.as_ref().map(|definition| make(key, definition)));
    Todo::Run(statements)
}

fn make(key: &Key, definition: &str) -> String {
    let (table, name) = (key.table_name().quoted(), quote_ident(&key.name));
    match key.kind {
        // Each table of a tree has its own.
        Kind::Default => {
            format!("alter table only {table} alter column {name} set default {definition}")
        }
        Kind::NotNull => format!("alter table {table} alter column {name} set not null"),
        // Of a partitioned table it is told without its parts, which come along.
        Kind::Index => definition.replacen(" ON ONLY ", " ON ", 1),
        Kind::Constraint | Kind::ForeignKey => {
            format!("alter table {table} add constraint {name} {definition}")
        }
    }
}

fn unmake(key: &Key) -> String {
    let (table, name) = (key.table_name().quoted(), quote_ident(&key.name));
    match key.kind {
        Kind::Default => format!("alter table only {table} alter column {name} drop default"),
        Kind::NotNull => format!("alter table {table} alter column {name} drop not null"),
        Kind::Index => {
            format!("drop index {}", QualifiedName::new(&key.schema, &key.name).quoted())
        }
        Kind::Constraint | Kind::ForeignKey => {
            format!("alter table {table} drop constraint {name}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(kind: Kind, name: &str) -> Key {
        let (schema, table) = ("public".to_string(), "t".to_string());
        Key { kind, schema, table, name: name.to_string() }
    }

    fn look(objects: &[(Kind, &str, &str)]) -> Look {
        let table = QualifiedName::new("public", "t");
        Look {
            columns: [(table, "a integer".to_string())].into(),
            objects: objects.iter().map(|(k, n, d)| (key(*k, n), d.to_string())).collect(),
        }
    }

    fn all(known: &Look, here: &Look, there: &Look) -> Vec<Todo> {
        let changes = changes(&known.objects, &here.objects);
        changes.iter().map(|change| todo(change, here, there)).collect()
    }

    const INDEX: (Kind, &str, &str) = (Kind::Index, "i", "CREATE INDEX i ON ONLY public.t (a)");
    const CHECK: (Kind, &str, &str) = (Kind::Constraint, "c", "CHECK ((a > 0))");

    fn run(sql: &[&str]) -> Todo {
        Todo::Run(sql.iter().map(|sql| sql.to_string()).collect())
    }

    #[test]
    fn what_became_of_the_source_is_done_where_the_target_has_it_not() {
        let (none, index) = (look(&[]), look(&[INDEX]));
        assert!(all(&none, &none, &index).is_empty());
        assert_eq!(all(&none, &index, &none), [run(&["CREATE INDEX i ON public.t (a)"])]);
        assert_eq!(all(&none, &index, &index), [Todo::Nothing]);
        assert_eq!(all(&index, &none, &index), [run(&["drop index \"public\".\"i\""])]);
        assert_eq!(all(&index, &none, &none), [Todo::Nothing]);
    }

    #[test]
    fn what_the_target_has_by_itself_is_left_alone() {
        let other = look(&[(Kind::Index, "i", "CREATE UNIQUE INDEX i ON public.t (a)")]);
        assert_eq!(all(&look(&[]), &look(&[INDEX]), &other), [Todo::Differs]);
        assert_eq!(all(&look(&[INDEX]), &look(&[]), &other), [Todo::Differs]);
    }

    #[test]
    fn a_column_is_the_streams_by_the_statement_that_made_or_named_it() {
        let (add, rename) = ("add column \"a\" int default 7", "rename column \"x\" to \"a\"");
        for kind in [Kind::Default, Kind::NotNull] {
            assert!(key(kind, "a").is_of_column_in(add) && key(kind, "a").is_of_column_in(rename));
            assert!(
                !key(kind, "b").is_of_column_in(add) && !key(kind, "x").is_of_column_in(rename)
            );
        }
        assert!(!key(Kind::Index, "a").is_of_column_in(add));
    }

    #[test]
    fn columns_come_first_and_by_the_stream() {
        let mut there = look(&[]);
        there.columns.insert(QualifiedName::new("public", "t"), "b integer".to_string());
        assert_eq!(all(&look(&[]), &look(&[CHECK]), &there), [Todo::Wait]);
    }

    #[test]
    fn what_has_changed_goes_and_comes_in_one_transaction_and_in_order() {
        let (strict, loose) = ((Kind::Constraint, "c", "CHECK ((a > 9))"), CHECK);
        let default = (Kind::Default, "a", "7");
        let (known, here) = (look(&[loose, default]), look(&[strict, (Kind::Default, "a", "8")]));
        assert_eq!(
            all(&known, &here, &known),
            [
                run(&["alter table only \"public\".\"t\" alter column \"a\" set default 8"]),
                run(&[
                    "alter table \"public\".\"t\" drop constraint \"c\"",
                    "alter table \"public\".\"t\" add constraint \"c\" CHECK ((a > 9))"
                ])
            ]
        );
        let key = (Kind::ForeignKey, "f", "FOREIGN KEY (a) REFERENCES u(a)");
        let gone = changes(&look(&[CHECK, key]).objects, &look(&[INDEX]).objects);
        let names: Vec<&str> = gone.iter().map(|change| change.key.name.as_str()).collect();
        assert_eq!(names, ["f", "c", "i"]);
    }
}
