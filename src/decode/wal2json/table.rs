//! A table as the decoder reads its rows by.

use std::sync::Arc;

use crate::change::{Relation, ReplicaIdentity};
use crate::decode::described::{Described, DescribedColumn, shared};
use crate::decode::json;

/// A table's description, and what is made of it to read rows fast.
#[derive(Debug)]
pub struct Table {
    described: Described,
    pub relation: Arc<Relation>,
    pub columns: Vec<Expected>,
    /// No change of the table has been decoded since the catalog was asked: what does not fit now
    /// was written before the catalog became what it is.
    pub fresh: bool,
}

/// A column, in the order in which messages have them.
#[derive(Debug)]
pub struct Expected {
    /// How wal2json begins the column: `{"name":"id","typeoid":23,"value":`.
    pub head: Vec<u8>,
    pub name: String,
    pub type_oid: u32,
    pub kind: Kind,
    pub key: bool,
    pub not_null: bool,
    /// False for a generated column, which is in messages and not in rows.
    pub carried: bool,
}

/// Types whose values wal2json does not write as their text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As a string, or as `true`, `false` or a number.
    Plain,
    /// As hexadecimal digits without their `\x`. Not a domain over bytea: that is Plain.
    Bytea,
    /// As a number; NaN and infinities as null, before 2.6. Not a domain either.
    Special,
}

impl Kind {
    fn of(type_oid: u32) -> Kind {
        match type_oid {
            17 => Kind::Bytea,
            700 | 701 | 1700 => Kind::Special,
            _ => Kind::Plain,
        }
    }
}

/// A column as a message has it.
#[derive(Debug)]
pub struct Seen {
    pub name: String,
    pub type_oid: u32,
}

impl Table {
    /// From the catalog. `known` is kept if the description still says the same.
    pub fn new(described: Described, known: Option<&Arc<Relation>>) -> Table {
        let relation = shared(known, described.relation());
        let columns = described.columns.iter().map(Expected::new).collect();
        Table { described, relation, columns, fresh: true }
    }

    /// The first column from `from` on that has this name and this type.
    pub fn find(&self, from: usize, name: &[u8], type_oid: u32) -> Option<usize> {
        let rest = self.columns.get(from..)?;
        let same =
            |column: &Expected| column.name.as_bytes() == name && column.type_oid == type_oid;
        let found = rest.iter().position(same);
        found.map(|at| from + at)
    }

    /// Takes a message's word for the table's columns, where the catalog has moved on.
    ///
    /// `row` are the columns of the new row, all of them if `whole`; `key` those of the old row.
    pub fn believe(&mut self, row: &[Seen], whole: bool, key: &[Seen]) {
        let mut columns = Vec::new();
        let mut left = self.described.columns.as_slice();
        // A DELETE says only what the old row has.
        let seen = if row.is_empty() { key } else { row };
        for seen in seen {
            let at = left.iter().position(|column| column.name == seen.name);
            let known = at.and_then(|at| left.get(at));
            let column = believed(known, seen);
            if let Some(at) = at {
                let skipped = left.iter().take(at).filter(|_| !whole);
                columns.extend(skipped.cloned());
                left = left.get(at + 1..).unwrap_or_default();
            }
            columns.push(column);
        }
        columns.extend(left.iter().filter(|_| !whole).cloned());
        if !key.is_empty() {
            self.believe_key(&mut columns, key);
        }
        self.described.columns = columns;
        let described = self.described.clone();
        *self = Table { fresh: self.fresh, ..Table::new(described, Some(&self.relation)) };
    }

    fn believe_key(&mut self, columns: &mut [DescribedColumn], key: &[Seen]) {
        let in_key = |name: &str| key.iter().any(|seen| seen.name == name);
        let same = columns.iter().all(|column| column.key == in_key(&column.name));
        let all = columns.iter().all(|column| in_key(&column.name));
        match self.described.identity {
            ReplicaIdentity::Full if all => return,
            ReplicaIdentity::Default | ReplicaIdentity::Index if same => return,
            _ => {}
        }
        self.described.identity = if all { ReplicaIdentity::Full } else { ReplicaIdentity::Index };
        for column in columns {
            column.key = !all && in_key(&column.name);
        }
    }
}

fn believed(known: Option<&DescribedColumn>, seen: &Seen) -> DescribedColumn {
    match known {
        Some(known) if seen.type_oid == known.type_oid => known.clone(),
        _ => DescribedColumn {
            name: seen.name.clone(),
            type_oid: seen.type_oid,
            type_modifier: -1,
            type_name: String::new(),
            key: known.is_some_and(|known| known.key),
            not_null: false,
            generated: known.is_some_and(|known| known.generated),
        },
    }
}

impl Expected {
    fn new(column: &DescribedColumn) -> Expected {
        let mut head = b"{\"name\":".to_vec();
        json::escape(&column.name, &mut head);
        // wal2json prints oids with a sign here.
        let oid = column.type_oid as i32;
        head.extend_from_slice(format!(",\"typeoid\":{oid},\"value\":").as_bytes());
        Expected {
            head,
            name: column.name.clone(),
            type_oid: column.type_oid,
            kind: Kind::of(column.type_oid),
            key: column.key,
            not_null: column.not_null,
            carried: !column.generated,
        }
    }
}
