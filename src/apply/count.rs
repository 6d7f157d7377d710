//! The books of law 10: decoded = applied + filtered + quarantined + lost, per table.
//!
//! They are exact after any crash, as they commit with the rows. But a row of their own for each
//! table of each batch would cost a small batch more than its rows do. So what is counted waits in
//! the row of progress, which every batch writes anyway, as one text, and is entered in
//! `walferry.stream_table` once a second, and when a stream begins, rests or ends. [`BOOKS`] reads
//! both. What is quarantined is entered at once: others subtract from it there.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::error::{Error, Result};
use crate::id::QualifiedName;

/// The books of stream `$1` as they stand: schema, name, decoded, applied, filtered, quarantined.
/// A table of progress that an earlier version made has no counts.
pub const BOOKS: &str = "select schema, name, sum(decoded)::int8 as decoded, \
     sum(applied)::int8 as applied, sum(filtered)::int8 as filtered, \
     sum(quarantined)::int8 as quarantined from (\
     select schema, name, decoded, applied, filtered, quarantined from walferry.stream_table \
     where stream = $1 union all \
     select c.v ->> 0, c.v ->> 1, (c.v ->> 2)::int8, (c.v ->> 3)::int8, (c.v ->> 4)::int8, \
     (c.v ->> 5)::int8 from walferry.progress p, pg_catalog.json_array_elements(\
     (pg_catalog.to_jsonb(p) ->> 'counts')::json) c(v) where p.stream = $1) b \
     group by schema, name";

/// More text than this does not wait: it is written with every batch.
const WAITING_BYTES_MAX: usize = 1000;

/// Adds counts to what the target has; the source of the rows goes between.
const INSERT: &str = "insert into walferry.stream_table as t \
     (stream, schema, name, decoded, applied, filtered, quarantined)";
const ADD: &str = "on conflict (stream, schema, name) do update \
     set decoded = t.decoded + excluded.decoded, applied = t.applied + excluded.applied, \
     filtered = t.filtered + excluded.filtered, quarantined = t.quarantined + excluded.quarantined";

/// Adds the changes that lost a conflict.
pub(super) const LOST: &str = "insert into walferry.stream_lost as l \
     (stream, schema, name, changes) \
     select $1::text, c.* from unnest($2::text[], $3::text[], $4::int8[]) as c \
     on conflict (stream, schema, name) do update set changes = l.changes + excluded.changes";

/// The statement that enters counts: stream, and the parameters of [`Entry::Table`].
pub(super) fn upsert() -> String {
    format!(
        "{INSERT} select $1::text, c.* from unnest($2::text[], $3::text[], $4::int8[], \
         $5::int8[], $6::int8[], $7::int8[]) as c {ADD}"
    )
}

/// The statement that enters what waits beside the progress of a stream, a literal.
pub(super) fn enter_waiting(stream: &str) -> String {
    format!(
        "{INSERT} select p.stream, c.v ->> 0, c.v ->> 1, (c.v ->> 2)::int8, (c.v ->> 3)::int8, \
         (c.v ->> 4)::int8, (c.v ->> 5)::int8 from walferry.progress p, \
         pg_catalog.json_array_elements(p.counts::json) c(v) where p.stream = {stream} {ADD}"
    )
}

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

/// What a target transaction does to the books.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing was counted.
    #[default]
    Nothing,
    /// All that was counted goes into the table.
    Table {
        /// Of [`upsert`], after the stream's name.
        params: Vec<String>,
        /// Some of it has waited beside progress.
        waited: bool,
    },
    /// It waits beside progress.
    Beside {
        /// With all that waits there already.
        text: String,
        /// Some of it has waited there before.
        waited: bool,
    },
}

impl Entry {
    /// Whether there is something beside progress now, and what is to be there then; `None` if that
    /// is not touched.
    pub fn beside(&self) -> Option<(bool, Option<&str>)> {
        match self {
            Entry::Nothing | Entry::Table { waited: false, .. } => None,
            Entry::Table { waited: true, .. } => Some((true, None)),
            Entry::Beside { text, waited } => Some((*waited, Some(text))),
        }
    }
}

/// What waits beside progress.
#[derive(Debug)]
pub(super) struct Books {
    waiting: BTreeMap<QualifiedName, Counts>,
    entered_at: Instant,
    interval: Duration,
}

impl Books {
    /// Nothing waits yet, and nothing longer than `interval`: zero for no waiting at all.
    pub fn new(interval: Duration) -> Books {
        Books { waiting: BTreeMap::new(), entered_at: Instant::now(), interval }
    }

    /// True if something waits.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// True if it has waited long enough.
    pub fn is_due(&self) -> bool {
        self.is_waiting() && self.entered_at.elapsed() >= self.interval
    }

    /// Counts that a target transaction commits, in the order of those transactions.
    pub fn enter(&mut self, counts: &[(&QualifiedName, Counts)]) -> Entry {
        if counts.is_empty() {
            return Entry::Nothing;
        }
        let waited = self.is_waiting();
        for (table, more) in counts {
            match self.waiting.get_mut(*table) {
                Some(counts) => counts.add(*more),
                None => drop(self.waiting.insert((*table).clone(), *more)),
            }
        }
        let at_once = self.waiting.values().any(|counts| counts.quarantined > 0);
        if !at_once && self.entered_at.elapsed() < self.interval {
            let text = text(&self.waiting);
            if text.len() <= WAITING_BYTES_MAX {
                return Entry::Beside { text, waited };
            }
        }
        self.all(waited)
    }

    /// All that waits goes into the table.
    pub fn close(&mut self) -> Entry {
        self.all(true)
    }

    fn all(&mut self, waited: bool) -> Entry {
        let waiting = std::mem::take(&mut self.waiting);
        self.entered_at = Instant::now();
        let counts: Vec<(&QualifiedName, Counts)> = waiting.iter().map(|(t, c)| (t, *c)).collect();
        match counts.is_empty() {
            true => Entry::Nothing,
            false => Entry::Table { params: upsert_params(&counts), waited },
        }
    }
}

fn text(counts: &BTreeMap<QualifiedName, Counts>) -> String {
    let one = |(table, c): (&QualifiedName, &Counts)| {
        serde_json::json!([
            table.schema,
            table.name,
            c.decoded,
            c.applied,
            c.filtered,
            c.quarantined
        ])
    };
    Value::Array(counts.iter().map(one).collect()).to_string()
}

/// The parameters of [`upsert`] after the stream's name: six array literals.
fn upsert_params(counts: &[(&QualifiedName, Counts)]) -> Vec<String> {
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
    fn counts_wait_beside_progress_until_they_are_due_or_too_many() {
        let (t, u) = (QualifiedName::new("public", "t"), QualifiedName::new("s", "u \"x\""));
        let one = Counts { decoded: 3, applied: 2, filtered: 1, ..Counts::default() };
        let mut books = Books::new(Duration::from_secs(3600));
        assert_eq!((books.enter(&[]), books.close()), (Entry::Nothing, Entry::Nothing));
        let text = r#"[["public","t",3,2,1,0]]"#.to_string();
        assert_eq!(books.enter(&[(&t, one)]), Entry::Beside { text, waited: false });
        let text = r#"[["public","t",6,4,2,0],["s","u \"x\"",3,2,1,0]]"#.to_string();
        let entry = books.enter(&[(&t, one), (&u, one)]);
        assert_eq!(entry.beside(), Some((true, Some(&*text))));
        assert!(books.is_waiting() && !books.is_due());
        // What is quarantined takes the rest along.
        let kept = Counts { decoded: 1, quarantined: 1, ..Counts::default() };
        let entry = books.enter(&[(&t, kept)]);
        assert_eq!(entry.beside(), Some((true, None)));
        let Entry::Table { params, .. } = entry else { panic!("{entry:?}") };
        assert_eq!(params[1..4], ["{\"t\",\"u \\\"x\\\"\"}", "{7,3}", "{4,2}"]);
        assert!(!books.is_waiting());
        let many: Vec<_> = (0..50).map(|i| QualifiedName::new("public", i.to_string())).collect();
        let many: Vec<_> = many.iter().map(|name| (name, one)).collect();
        assert_eq!(books.enter(&many).beside(), None);
        let mut books = Books::new(Duration::ZERO);
        assert_eq!(books.enter(&[(&t, one)]).beside(), None);
    }

    #[test]
    fn names_survive_array_literals() {
        let name = QualifiedName::new("a\"b", "c\\d,{}");
        let params = upsert_params(&[(&name, Counts::default())]);
        assert_eq!(params[..3], ["{\"a\\\"b\"}", "{\"c\\\\d,{}\"}", "{0}"]);
    }
}
