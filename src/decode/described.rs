//! What a decoder of textual output was told about tables, as the catalog has it.
//!
//! wal2json and test_decoding name a table and its columns and nothing more: which columns the key
//! has, which are unchanged and therefore left out, and in which order rows carry them is asked of
//! the source's catalog once a table, through [`Step::Describe`](super::Step::Describe).

use std::collections::HashMap;
use std::sync::Arc;

use crate::change::{Column, Relation, ReplicaIdentity};
use crate::id::QualifiedName;

/// A table as the catalog has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// `pg_class.oid`.
    pub oid: u32,
    /// Schema and name.
    pub name: QualifiedName,
    /// `relreplident`.
    pub identity: ReplicaIdentity,
    /// In attnum order, without dropped ones, with generated ones: the plugins print those too.
    pub columns: Vec<DescribedColumn>,
}

/// A column as the catalog has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescribedColumn {
    /// `attname`, unquoted.
    pub name: String,
    /// `atttypid`.
    pub type_oid: u32,
    /// `atttypmod`.
    pub type_modifier: i32,
    /// `format_type(atttypid, atttypmod)` under an empty search_path.
    pub type_name: String,
    /// Part of the primary key or of the chosen index, whichever the identity uses. False for all
    /// columns under FULL and NOTHING.
    pub key: bool,
    /// NOT NULL.
    pub not_null: bool,
    /// Generated, stored or virtual: pgoutput leaves these out, so rows do not carry them.
    pub generated: bool,
}

impl Described {
    /// The description that goes with each change, as pgoutput gives it: without generated columns,
    /// and under FULL with every column a key.
    pub fn relation(&self) -> Relation {
        let full = self.identity == ReplicaIdentity::Full;
        let columns = self.carried().map(|column| Column {
            name: column.name.clone(),
            type_oid: column.type_oid,
            type_modifier: column.type_modifier,
            key: full || column.key,
        });
        Relation {
            oid: self.oid,
            name: self.name.clone(),
            identity: self.identity,
            columns: columns.collect(),
        }
    }

    /// The columns that rows carry, in row order.
    pub fn carried(&self) -> impl Iterator<Item = &DescribedColumn> {
        self.columns.iter().filter(|column| !column.generated)
    }
}

/// What is remembered of one table. `T` is what a decoder prepares from a description.
#[derive(Debug)]
pub enum Known<T> {
    /// Its changes are decoded.
    Table(T),
    /// Its changes are of no interest: it takes no part in the job.
    Ignored,
}

/// What is remembered of all tables, by name. Looking up costs no allocation.
///
/// The catalog answers as it is when it is asked, and DDL is not in the stream: whoever sees that
/// there may have been some says so by [`Tables::outdate`]. What was ignored needs that most: a
/// table that took no part may have become a partition of one that does.
#[derive(Debug)]
pub struct Tables<T> {
    known: HashMap<Box<[u8]>, (u64, Known<T>)>,
    key: Vec<u8>,
    /// How often everything became outdated.
    epoch: u64,
}

/// Names remembered as being of no interest, at most: a source that makes and drops tables all day
/// must not fill our memory. Past it all of them are forgotten and asked for again.
const IGNORED_AT_MOST: usize = 100_000;

impl<T> Default for Tables<T> {
    fn default() -> Self {
        Tables { known: HashMap::new(), key: Vec::new(), epoch: 0 }
    }
}

impl<T> Tables<T> {
    /// What is known of the table, if anything that is not outdated. Names unquoted, as bytes.
    pub fn get_mut(&mut self, schema: &[u8], name: &[u8]) -> Option<&mut Known<T>> {
        make_key(&mut self.key, schema, name);
        let (epoch, known) = self.known.get_mut(self.key.as_slice())?;
        (*epoch == self.epoch).then_some(known)
    }

    /// What was known of a table last, outdated or not.
    pub fn last(&mut self, name: &QualifiedName) -> Option<&T> {
        make_key(&mut self.key, name.schema.as_bytes(), name.name.as_bytes());
        match self.known.get(self.key.as_slice()) {
            Some((_, Known::Table(table))) => Some(table),
            _ => None,
        }
    }

    /// There may have been DDL: each table is to be asked for again.
    pub fn outdate(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// Remembers a table, in place of what was known of it.
    pub fn describe(&mut self, name: &QualifiedName, table: T) {
        self.set(name, Known::Table(table));
    }

    /// Remembers that a table's changes are to be passed over.
    pub fn ignore(&mut self, name: &QualifiedName) {
        if self.known.len() >= IGNORED_AT_MOST {
            self.known.retain(|_, (_, known)| matches!(known, Known::Table(_)));
        }
        self.set(name, Known::Ignored);
    }

    fn set(&mut self, name: &QualifiedName, known: Known<T>) {
        make_key(&mut self.key, name.schema.as_bytes(), name.name.as_bytes());
        self.known.insert(self.key.as_slice().into(), (self.epoch, known));
    }
}

/// No name holds a NUL byte, so it parts the two.
fn make_key(key: &mut Vec<u8>, schema: &[u8], name: &[u8]) {
    key.clear();
    key.extend_from_slice(schema);
    key.push(0);
    key.extend_from_slice(name);
}

/// The relation made from a description, kept as it is while it says the same: equal pointers mean
/// the same table with the same shape.
pub fn shared(known: Option<&Arc<Relation>>, relation: Relation) -> Arc<Relation> {
    match known {
        Some(known) if **known == relation => known.clone(),
        _ => Arc::new(relation),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, key: bool, generated: bool) -> DescribedColumn {
        DescribedColumn {
            name: name.to_string(),
            type_oid: 23,
            type_modifier: -1,
            type_name: "integer".to_string(),
            key,
            not_null: key,
            generated,
        }
    }

    #[test]
    fn a_relation_is_what_pgoutput_would_describe() {
        let columns = vec![column("id", true, false), column("g", false, true)];
        let name = QualifiedName::new("public", "t");
        let mut table = Described { oid: 7, name, identity: ReplicaIdentity::Default, columns };
        table.columns.push(column("v", false, false));
        let relation = table.relation();
        let names: Vec<_> = relation.columns.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["id", "v"]);
        assert_eq!(relation.key_columns().collect::<Vec<_>>(), [0]);
        table.identity = ReplicaIdentity::Full;
        assert_eq!(table.relation().key_columns().collect::<Vec<_>>(), [0, 1]);
        let kept = Arc::new(relation);
        assert!(Arc::ptr_eq(&shared(Some(&kept), (*kept).clone()), &kept));
        assert!(!Arc::ptr_eq(&shared(Some(&kept), table.relation()), &kept));
    }

    #[test]
    fn names_are_told_apart_and_ignored_ones_are_bounded() {
        let mut tables = Tables::default();
        tables.describe(&QualifiedName::new("a", "bc"), 1);
        tables.describe(&QualifiedName::new("ab", "c"), 2);
        assert!(matches!(tables.get_mut(b"a", b"bc"), Some(Known::Table(1))));
        assert!(matches!(tables.get_mut(b"ab", b"c"), Some(Known::Table(2))));
        for i in 0..=IGNORED_AT_MOST {
            tables.ignore(&QualifiedName::new("x", i.to_string()));
        }
        assert!(tables.known.len() <= IGNORED_AT_MOST);
        assert!(matches!(tables.get_mut(b"a", b"bc"), Some(Known::Table(1))));
        assert!(matches!(tables.get_mut(b"x", b"100000"), Some(Known::Ignored)));
    }

    #[test]
    fn what_is_outdated_is_asked_for_again_the_ignored_too() {
        let (kept, left) = (QualifiedName::new("a", "b"), QualifiedName::new("a", "c"));
        let mut tables = Tables::default();
        tables.describe(&kept, 1);
        tables.ignore(&left);
        tables.outdate();
        assert!(tables.get_mut(b"a", b"b").is_none() && tables.get_mut(b"a", b"c").is_none());
        assert_eq!(tables.last(&kept), Some(&1));
        assert_eq!(tables.last(&left), None);
        tables.describe(&left, 2);
        assert!(matches!(tables.get_mut(b"a", b"c"), Some(Known::Table(2))));
    }
}
