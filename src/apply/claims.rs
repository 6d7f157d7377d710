//! Which rows a batch writes, so that another may be begun beside it. Pure.
//!
//! Two target transactions at once are as good as one after the other where they write no row in
//! common, and where the one that commits first never waits for the other: for a row, or for a
//! value of an index that allows each but once. The other way round it does no harm.
//!
//! Rows are told apart by their keys, and those by a hash of their text: two that share one are
//! taken for the same row, which costs a moment and no more. That equal keys have equal texts does
//! not hold of every type (1.0 and 1.00), and what other unique indexes hold is not seen here: such
//! tables are written by one batch at a time.

use std::hash::BuildHasher;

use foldhash::fast::FixedState;
use foldhash::{HashMap, HashSet, HashSetExt};

use super::plan;
use super::setwise;
use super::statement::{Locator, Mapping};
use crate::change::Row;
use crate::id::QualifiedName;

/// Types whose equal values have equal texts, as the server prints them for us.
const EXACT: &[&str] = &[
    "smallint",
    "integer",
    "bigint",
    "uuid",
    "bytea",
    "date",
    "timestamp without time zone",
    "timestamp with time zone",
];

/// The same where their collation holds no different texts equal.
const EXACT_TEXTS: &[&str] = &["text", "character varying"];

/// What is written of each table.
#[derive(Debug, Default)]
pub(super) struct Claims(HashMap<QualifiedName, Claim>);

/// What of one.
#[derive(Debug)]
enum Claim {
    /// New rows of a table that has no unique index.
    Appends,
    /// Rows with these keys.
    Keys(HashSet<u64>),
    /// Any.
    Whole,
}

/// How a table's rows are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Apart<'a> {
    /// By these columns.
    Keys(&'a [usize]),
    /// They are all new, and stand in each other's way nowhere.
    Appends,
    /// Not at all.
    No,
}

impl<'a> Apart<'a> {
    /// Of a table's changes, which are `new_only` rows or not.
    pub fn of(mapping: &'a Mapping, new_only: bool) -> Apart<'a> {
        let table = &mapping.table;
        if table.is_partitioned() {
            // Partitions have indexes of their own.
            return Apart::No;
        }
        match &mapping.locator {
            _ if table.unique_indexes == 0 && new_only => Apart::Appends,
            Locator::Key(keys)
                if table.unique_indexes == 1
                    && keys.len() == table.key.len()
                    && setwise::is_unique(mapping, keys)
                    && keys.iter().all(|key| is_exact(mapping, *key)) =>
            {
                Apart::Keys(keys)
            }
            _ => Apart::No,
        }
    }
}

fn is_exact(mapping: &Mapping, column: usize) -> bool {
    mapping.target(column).is_some_and(|column| {
        let name = &*column.base_type_name;
        EXACT.contains(&name) || (EXACT_TEXTS.contains(&name) && column.deterministic)
    })
}

impl Claims {
    /// All of a table is written, or it cannot be told what.
    pub fn whole(&mut self, table: &QualifiedName) {
        self.0.insert(table.clone(), Claim::Whole);
    }

    /// New rows of a table without unique indexes are written.
    pub fn appends(&mut self, table: &QualifiedName) {
        self.0.entry(table.clone()).or_insert(Claim::Appends);
    }

    /// The row with this key is written.
    pub fn keys(&mut self, table: &QualifiedName, keys: impl Iterator<Item = u64>) {
        let claim = self.0.entry(table.clone());
        match claim.or_insert_with(|| Claim::Keys(HashSet::new())) {
            Claim::Keys(known) => known.extend(keys),
            claim => *claim = Claim::Whole,
        }
    }

    /// True if something of the table is written.
    pub fn touches(&self, table: &QualifiedName) -> bool {
        self.0.contains_key(table)
    }

    /// True if more than new rows without a key are written of the table.
    pub fn stops_appends(&self, table: &QualifiedName) -> bool {
        self.0.get(table).is_some_and(|claim| !matches!(claim, Claim::Appends))
    }

    /// True if the row with this key may be written.
    pub fn has(&self, table: &QualifiedName, key: u64) -> bool {
        self.0.get(table).is_some_and(|claim| match claim {
            Claim::Keys(keys) => keys.contains(&key),
            Claim::Appends | Claim::Whole => true,
        })
    }
}

/// A row's key, `keys` in ascending order; 0 for a row that has none, which is to be like any other
/// such row.
pub(super) fn key(row: &Row, keys: &[usize]) -> u64 {
    plan::key_of(row, keys).map_or(0, |text| FixedState::default().hash_one(&*text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_claimed_is_met_again_and_nothing_else() {
        let [a, b, c] = ["a", "b", "c"].map(|name| QualifiedName::new("public", name));
        let mut claims = Claims::default();
        claims.keys(&a, [1, 2].into_iter());
        claims.keys(&a, [3].into_iter());
        claims.appends(&b);
        assert!(claims.has(&a, 1) && claims.has(&a, 3) && !claims.has(&a, 4));
        assert!(claims.touches(&a) && claims.touches(&b) && !claims.touches(&c));
        assert!(claims.stops_appends(&a) && !claims.stops_appends(&b));
        assert!(!claims.stops_appends(&c) && !claims.has(&c, 1));
        // A table that is written in two ways is written whole.
        claims.keys(&b, [1].into_iter());
        assert!(claims.stops_appends(&b) && claims.has(&b, 2));
        claims.whole(&a);
        claims.appends(&a);
        claims.keys(&a, [9].into_iter());
        assert!(claims.has(&a, 4));
    }
}
