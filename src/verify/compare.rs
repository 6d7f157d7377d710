//! The rows of differing buckets, merged from both sides.

use std::collections::HashMap;

use bytes::Bytes;

use crate::pg::{CopyOut, Session};

use super::family::Family;
use super::fingerprint::Expressions;
use super::report::{Difference, DifferenceKind, TableReport};
use super::{End, Result, run};

/// Rows sorted by a server at a time: about 2 GB of temporary files at worst. More differing rows
/// take another scan.
const PASS_ROWS: u64 = 20_000_000;

/// A row of a differing bucket.
struct Entry {
    /// Rows come in its order.
    match_hash: i64,
    /// md5 of the row.
    row_hash: Bytes,
    /// The key, still escaped as COPY has it; the row's text where there is no key.
    key: Bytes,
}

/// Rows of one match hash: usually one of each side.
#[derive(Default)]
struct Group {
    /// Copies on the source minus copies on the target, by key and row hash. Entries that cancel
    /// are removed, so memory is bounded by the distinct rows of one key that differ.
    surplus: HashMap<(Bytes, Bytes), i64>,
}

/// Reads rows from a running COPY. The protocol promises whole lines, one or more a message.
struct Entries<'a> {
    copy: CopyOut<'a>,
    end: End,
    name: crate::id::QualifiedName,
    pending: Bytes,
    next: Option<Entry>,
}

/// The query that gives the rows of some buckets of one side, in order of their match hash.
pub(super) fn query(
    expressions: &Expressions<'_>,
    family: &Family,
    end: End,
    all: bool,
    buckets: &[i64],
) -> String {
    let buckets = (!all).then(|| {
        let list: Vec<String> = buckets.iter().map(i64::to_string).collect();
        format!("{} = any ('{{{}}}'::int8[])", expressions.bucket(), list.join(","))
    });
    let leaves: Vec<String> = family
        .half(end)
        .into_iter()
        .flat_map(|half| half.leaves.iter().map(move |leaf| (half, leaf)))
        .map(|(half, leaf)| {
            let rows = leaf.published.filter.as_ref().map(|filter| format!("({filter})"));
            let conditions: Vec<String> = rows.into_iter().chain(buckets.clone()).collect();
            let filter = match conditions.as_slice() {
                [] => String::new(),
                some => format!("where {}", some.join(" and ")),
            };
            format!(
                "select {} as h, md5({}) as r, {} from {} t {filter}",
                expressions.match_hash(),
                expressions.row(),
                expressions.shown().join(", "),
                half.from(leaf)
            )
        })
        .collect();
    if leaves.is_empty() {
        return "copy (select where false) to stdout".to_string();
    }
    format!("copy (select * from ({}) q order by h) to stdout", leaves.join(" union all "))
}

/// A side whose rows are read.
pub(super) struct Reading<'a> {
    pub session: &'a mut Session,
    pub expressions: &'a Expressions<'a>,
    pub family: &'a Family,
    pub end: End,
}

/// Compares the rows of the given buckets, of all sources with those of the target, and adds what
/// differs to `report`.
pub(super) async fn compare(
    readings: &mut [Reading<'_>],
    family: &Family,
    buckets: &[(i64, u64)],
    keys_limit: usize,
    report: &mut TableReport,
) -> Result<()> {
    for pass in passes(buckets) {
        let all = pass.len() as u64 == family.buckets;
        let opening = readings.iter_mut().map(|reading| {
            let sql = query(reading.expressions, reading.family, reading.end, all, &pass);
            let Reading { session, end, .. } = reading;
            async move { open(session, *end, family, &sql).await }
        });
        let entries = futures_util::future::try_join_all(opening).await?;
        merge(entries, family, keys_limit, report).await?;
    }
    Ok(())
}

/// Buckets in passes of at most [`PASS_ROWS`] rows, but at least one bucket each.
fn passes(buckets: &[(i64, u64)]) -> Vec<Vec<i64>> {
    let mut passes: Vec<Vec<i64>> = Vec::new();
    let mut room = 0;
    for (bucket, rows) in buckets {
        match passes.last_mut() {
            Some(pass) if *rows <= room => {
                pass.push(*bucket);
                room -= rows;
            }
            _ => {
                passes.push(vec![*bucket]);
                room = PASS_ROWS.saturating_sub(*rows);
            }
        }
    }
    passes
}

async fn open<'a>(
    session: &'a mut Session,
    end: End,
    family: &Family,
    sql: &str,
) -> Result<Entries<'a>> {
    let name = family.name.clone();
    let copy = session.copy_out(sql).await.map_err(|e| run::table_error(&name, end, e))?;
    let mut entries = Entries { copy, end, name, pending: Bytes::new(), next: None };
    entries.advance().await?;
    Ok(entries)
}

impl Entries<'_> {
    /// Replaces `next`; gives what it was.
    async fn advance(&mut self) -> Result<Option<Entry>> {
        while self.pending.is_empty() {
            let read = self.copy.next().await;
            match read.map_err(|e| run::table_error(&self.name, self.end, e))? {
                Some(data) => self.pending = data,
                None => return Ok(self.next.take()),
            }
        }
        let line = memchr::memchr(b'\n', &self.pending).unwrap_or(self.pending.len());
        let entry = entry(&self.pending.slice(..line))?;
        self.pending = self.pending.slice((line + 1).min(self.pending.len())..);
        Ok(self.next.replace(entry))
    }

    fn match_hash(&self) -> Option<i64> {
        self.next.as_ref().map(|e| e.match_hash)
    }
}

fn entry(line: &Bytes) -> Result<Entry> {
    let bad = || crate::pg::Error::Result(format!("row: {}", String::from_utf8_lossy(line)));
    let first = memchr::memchr(b'\t', line).ok_or_else(bad)?;
    let rest = line.slice(first + 1..);
    let second = memchr::memchr(b'\t', &rest).ok_or_else(bad)?;
    let hash = std::str::from_utf8(line.get(..first).unwrap_or_default()).ok();
    Ok(Entry {
        match_hash: hash.and_then(|h| h.parse().ok()).ok_or_else(bad)?,
        row_hash: rest.slice(..second),
        key: rest.slice(second + 1..),
    })
}

async fn merge(
    mut sides: Vec<Entries<'_>>,
    family: &Family,
    keys_limit: usize,
    report: &mut TableReport,
) -> Result<()> {
    while let Some(least) = sides.iter().filter_map(Entries::match_hash).min() {
        let mut group = Group::default();
        for entries in &mut sides {
            let sign = if entries.end == End::Source { 1 } else { -1 };
            while entries.match_hash() == Some(least) {
                if let Some(entry) = entries.advance().await? {
                    group.add(entry, sign);
                }
            }
        }
        group.judge(family, keys_limit, report);
    }
    Ok(())
}

impl Group {
    fn add(&mut self, entry: Entry, sign: i64) {
        let key = (entry.key, entry.row_hash);
        let surplus = self.surplus.get(&key).copied().unwrap_or(0) + sign;
        if surplus == 0 {
            self.surplus.remove(&key);
        } else {
            self.surplus.insert(key, surplus);
        }
    }

    fn judge(self, family: &Family, keys_limit: usize, report: &mut TableReport) {
        // Rows that one side has more of, by key: (source, target).
        let mut keys: HashMap<Bytes, (u64, u64)> = HashMap::new();
        for ((key, _), surplus) in self.surplus {
            let entry = keys.entry(key).or_default();
            if surplus > 0 {
                entry.0 += surplus.unsigned_abs();
            } else {
                entry.1 += surplus.unsigned_abs();
            }
        }
        for (key, (ours, theirs)) in keys {
            // Without a key no row is another version of a row.
            let different = if family.key.is_empty() { 0 } else { ours.min(theirs) };
            report.different += different;
            report.missing += ours - different;
            report.extra += theirs - different;
            report.differing += ours + theirs - different;
            let kinds = [
                (DifferenceKind::Different, different),
                (DifferenceKind::MissingOnTarget, ours - different),
                (DifferenceKind::ExtraOnTarget, theirs - different),
            ];
            for (kind, copies) in kinds {
                if copies > 0 && report.keys.len() < keys_limit {
                    report.keys.push(Difference { key: shown(&family.key, &key), kind, copies });
                }
            }
        }
    }
}

/// `id=42, region=eu` from the fields of a COPY line.
fn shown(names: &[String], key: &Bytes) -> String {
    let fields = key.split(|b| *b == b'\t').map(unescape);
    if names.is_empty() {
        return fields.collect::<Vec<_>>().join(", ");
    }
    let named = names.iter().zip(fields).map(|(name, value)| format!("{name}={value}"));
    named.collect::<Vec<_>>().join(", ")
}

/// A field of COPY's text format.
///
/// <https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS>
fn unescape(field: &[u8]) -> String {
    if field == b"\\N" {
        return "NULL".to_string();
    }
    let mut out = Vec::with_capacity(field.len());
    let mut bytes = field.iter();
    while let Some(byte) = bytes.next() {
        out.push(match (byte, byte == &b'\\') {
            (byte, false) => *byte,
            _ => match bytes.next() {
                Some(b'b') => 8,
                Some(b'f') => 12,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'v') => 11,
                Some(other) => *other,
                None => b'\\',
            },
        });
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_shown_as_people_wrote_them() {
        let names = ["a".to_string(), "b".to_string()];
        let line = Bytes::from_static(b"x\\ty\\\\z\t\\N");
        assert_eq!(shown(&names, &line), "a=x\ty\\z, b=NULL");
    }

    #[test]
    fn passes_hold_many_small_buckets_or_one_large() {
        let buckets = [(0, 5), (1, 6), (2, PASS_ROWS * 2), (3, PASS_ROWS - 1), (4, 1), (5, 1)];
        assert_eq!(passes(&buckets), [vec![0, 1], vec![2], vec![3, 4], vec![5]]);
    }
}
