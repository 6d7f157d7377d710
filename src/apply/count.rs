//! The books of law 10: decoded = applied + filtered + quarantined + lost, per table.

use std::collections::BTreeMap;

use super::error::{Error, Result};
use crate::id::QualifiedName;

/// Adds one batch's counts to what the target has of earlier ones.
pub(super) const UPSERT: &str = "insert into walferry.stream_table as t \
     (stream, schema, name, decoded, applied, filtered, quarantined) \
     select $1::text, c.* from unnest($2::text[], $3::text[], $4::int8[], $5::int8[], $6::int8[], \
     $7::int8[]) as c on conflict (stream, schema, name) do update \
     set decoded = t.decoded + excluded.decoded, applied = t.applied + excluded.applied, \
     filtered = t.filtered + excluded.filtered, quarantined = t.quarantined + excluded.quarantined";

/// Adds the changes that lost a conflict.
pub(super) const LOST: &str = "insert into walferry.stream_lost as l \
     (stream, schema, name, changes) \
     select $1::text, c.* from unnest($2::text[], $3::text[], $4::int8[]) as c \
     on conflict (stream, schema, name) do update set changes = l.changes + excluded.changes";

/// Counts a batch that set order was refused for.
pub(super) const FALLBACK: &str = "insert into walferry.stream_fallback as f (stream, batches) \
     values ($1::text, 1) on conflict (stream) do update set batches = f.batches + 1";

/// Changes of one table, of one target transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Seen in the stream.
    pub decoded: u64,
    /// Written.
    pub applied: u64,
    /// Left out on purpose: not in the job, or part of the copy.
    pub filtered: u64,
    /// Kept, as their table is parked.
    pub quarantined: u64,
    /// Not written, as what applications wrote on this side won.
    pub lost: u64,
}

impl Counts {
    /// Adds those of the same table from elsewhere.
    pub fn add(&mut self, more: Counts) {
        self.decoded += more.decoded;
        self.applied += more.applied;
        self.filtered += more.filtered;
        self.quarantined += more.quarantined;
        self.lost += more.lost;
    }

    /// Refuses books that do not balance.
    pub fn check(&self, table: &QualifiedName) -> Result<()> {
        let Counts { decoded, applied, filtered, quarantined, lost } = *self;
        if decoded == applied + filtered + quarantined + lost {
            return Ok(());
        }
        let table = table.clone();
        Err(Error::Conservation { table, decoded, applied, filtered, quarantined, lost })
    }
}

/// The parameters of [`UPSERT`] after the stream's name: six array literals.
pub(super) fn upsert_params(counts: &[(&QualifiedName, Counts)]) -> Vec<String> {
    let texts = |get: fn(&QualifiedName) -> &str| array(counts.iter().map(|(n, _)| quoted(get(n))));
    let numbers = |get: fn(&Counts) -> u64| array(counts.iter().map(|(_, c)| get(c).to_string()));
    vec![
        texts(|n| &n.schema),
        texts(|n| &n.name),
        numbers(|c| c.decoded),
        numbers(|c| c.applied),
        numbers(|c| c.filtered),
        numbers(|c| c.quarantined),
    ]
}

/// The parameters of [`LOST`] after the stream's name; none where nothing lost.
pub(super) fn lost_params(counts: &BTreeMap<&QualifiedName, Counts>) -> Vec<String> {
    let lost: Vec<_> = counts.iter().filter(|(_, counts)| counts.lost > 0).collect();
    if lost.is_empty() {
        return Vec::new();
    }
    let texts = |get: fn(&QualifiedName) -> &str| array(lost.iter().map(|(n, _)| quoted(get(n))));
    let numbers = array(lost.iter().map(|(_, counts)| counts.lost.to_string()));
    vec![texts(|n| &n.schema), texts(|n| &n.name), numbers]
}

fn array(elements: impl Iterator<Item = String>) -> String {
    format!("{{{}}}", elements.collect::<Vec<_>>().join(","))
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn books_that_do_not_balance_are_refused() {
        let name = QualifiedName::new("public", "t");
        let even = Counts { decoded: 7, applied: 3, filtered: 2, quarantined: 1, lost: 1 };
        assert!(even.check(&name).is_ok());
        assert!(Counts { lost: 0, ..even }.check(&name).is_err());
        assert!(Counts { decoded: 8, ..even }.check(&name).is_err());
    }

    #[test]
    fn names_survive_array_literals() {
        let name = QualifiedName::new("a\"b", "c\\d,{}");
        let params = upsert_params(&[(&name, Counts::default())]);
        assert_eq!(params[..3], ["{\"a\\\"b\"}", "{\"c\\\\d,{}\"}", "{0}"]);
    }
}
