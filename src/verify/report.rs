//! What a comparison found, in the shape `verify --json` prints.

use serde::Serialize;

use crate::id::QualifiedName;

/// The outcome of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// True if every table is.
    pub equal: bool,
    /// One entry per table or partitioned table, by name.
    pub tables: Vec<TableReport>,
    /// Tables with no entry, as they were truncated or rewritten after the snapshots were taken,
    /// which no longer show their rows: to be compared again under new ones.
    #[serde(skip)]
    pub rewritten: Vec<QualifiedName>,
}

impl Report {
    pub(super) fn new(mut tables: Vec<TableReport>, rewritten: Vec<QualifiedName>) -> Report {
        tables.sort_by(|a, b| a.name.cmp(&b.name));
        let equal = rewritten.is_empty() && tables.iter().all(|t| t.equal);
        Report { equal, tables, rewritten }
    }

    /// Adds the outcome of comparing `self.rewritten` again.
    pub fn amend(self, again: Report) -> Report {
        Report::new([self.tables, again.tables].concat(), again.rewritten)
    }
}

/// The outcome for one table (with all its partitions, if it has any).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TableReport {
    /// `schema.name`, quoted where it has to be.
    pub name: String,
    /// Rows on the source.
    pub rows: u64,
    /// Rows on the target.
    pub rows_target: u64,
    /// Same columns, same rows.
    pub equal: bool,
    /// Keys that differ: the sum of the three counts below, exact.
    pub differing: u64,
    /// Rows only the source has.
    pub missing: u64,
    /// Rows only the target has.
    pub extra: u64,
    /// Keys both have, with other values. Always 0 without a key: there, a changed row is one
    /// missing and one extra.
    pub different: u64,
    /// The columns rows are matched by; empty for a table without a key, which is compared as a
    /// multiset of whole rows.
    pub key: Vec<String>,
    /// The first of the differing keys.
    pub keys: Vec<Difference>,
    /// What makes the tables unequal besides rows, such as a missing column.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// What to know when reading the above; does not make the tables unequal.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl TableReport {
    /// Sorts and cuts the listed keys: shorter first, so that numbers come in order.
    pub(super) fn sort_keys(&mut self) {
        self.keys.sort_by(|a, b| (a.key.len(), &a.key).cmp(&(b.key.len(), &b.key)));
    }
}

/// A key that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// `id=42`, `region=eu, id=42`; the beginning of the row's text for a table without a key.
    pub key: String,
    /// How it differs.
    pub kind: DifferenceKind,
    /// By how many rows: more than 1 only where rows of one key or one text repeat.
    pub copies: u64,
}

/// How a key differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DifferenceKind {
    /// Only the source has the row.
    MissingOnTarget,
    /// Only the target has the row.
    ExtraOnTarget,
    /// Both have the key, with other values.
    Different,
}
