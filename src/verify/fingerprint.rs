//! One scan: rows and the sum of their hashes per bucket, computed in the server.

use std::collections::BTreeMap;

use crate::pg::Session;

use super::family::{Family, Half, Scan};
use super::render::{Dialect, Types};
use super::{End, Result, run};

/// Columns that choose the bucket of a row without a key. Any function of the row would do; a few
/// columns cost less than hashing the whole row twice.
const BUCKET_COLUMNS: usize = 4;

/// Rows and hash sums by bucket. Sums of 64-bit hashes: fewer than 2^63 rows cannot overflow i128.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fingerprint(BTreeMap<i64, (u64, i128)>);

impl Fingerprint {
    /// Adds the scan of another part of the same family.
    pub fn add(&mut self, other: Fingerprint) {
        for (bucket, (count, sum)) in other.0 {
            let entry = self.0.entry(bucket).or_default();
            entry.0 += count;
            entry.1 += sum;
        }
    }

    pub fn rows(&self) -> u64 {
        self.0.values().map(|(count, _)| count).sum()
    }

    /// Buckets that are not the same on both sides, with the larger number of rows.
    pub fn differing(&self, other: &Fingerprint) -> Vec<(i64, u64)> {
        let mut buckets: Vec<(i64, u64)> = Vec::new();
        let none = (0, 0);
        for bucket in self.0.keys().chain(other.0.keys().filter(|b| !self.0.contains_key(b))) {
            let (ours, theirs) =
                (self.0.get(bucket).unwrap_or(&none), other.0.get(bucket).unwrap_or(&none));
            if ours != theirs {
                buckets.push((*bucket, ours.0.max(theirs.0)));
            }
        }
        buckets
    }
}

/// SQL expressions over a row `t` of one half of a family.
pub(super) struct Expressions<'a> {
    family: &'a Family,
    half: &'a Half,
    types: &'a Types,
    dialect: &'a Dialect,
}

impl<'a> Expressions<'a> {
    pub fn new(
        family: &'a Family,
        half: &'a Half,
        types: &'a Types,
        dialect: &'a Dialect,
    ) -> Expressions<'a> {
        Expressions { family, half, types, dialect }
    }

    /// Name and type of columns, as expressions.
    fn values(&self, names: &[String]) -> Vec<(String, u32)> {
        names
            .iter()
            .filter_map(|name| self.half.column(name))
            .map(|c| (format!("t.{}", crate::id::quote_ident(&c.name)), c.type_oid))
            .collect()
    }

    fn concat(&self, names: &[String]) -> String {
        self.types.concat(self.dialect, &self.values(names))
    }

    /// All compared values, as ASCII text.
    pub fn row(&self) -> String {
        self.concat(&self.family.columns)
    }

    /// What rows are matched by: a hash of the key, or of the row where there is no key.
    pub fn match_hash(&self) -> String {
        let names =
            if self.family.key.is_empty() { &self.family.columns } else { &self.family.key };
        self.dialect.hash_int8(&self.concat(names))
    }

    /// The bucket: a number below `family.buckets`, int8.
    pub fn bucket(&self) -> String {
        if self.family.buckets == 1 {
            return "0::int8".to_string();
        }
        let mask = self.family.buckets - 1;
        let names = match self.family.key.as_slice() {
            [] => self.family.columns.get(..BUCKET_COLUMNS).unwrap_or(&self.family.columns),
            key => key,
        };
        format!("({} & {mask})", self.dialect.hash_int8(&self.concat(names)))
    }

    /// The key's columns as text for people; the whole row where there is no key.
    pub fn shown(&self) -> Vec<String> {
        let cut = |e: String| format!("left({e}, {SHOWN_CHARACTERS})");
        if self.family.key.is_empty() {
            let values = self.values(&self.family.columns);
            let names: Vec<String> = values.into_iter().map(|(e, _)| e).collect();
            return vec![cut(format!("row({})::text", names.join(", ")))];
        }
        let values = self.values(&self.family.key);
        values.iter().map(|(e, oid)| cut(self.types.text(e, *oid))).collect()
    }

    /// The query of one scan.
    fn scan(&self, scan: &Scan, lateral: bool) -> String {
        let from = match &scan.rows {
            Some(rows) => format!("from {rows} t"),
            None => format!("from only {} t", scan.table.quoted()),
        };
        let filter = conditions(scan);
        let (bucket, hash) = (self.bucket(), self.dialect.hash_int8(&self.row()));
        if lateral {
            // Before 13 hash aggregation could not spill, so a planner that expects as many groups
            // as rows sorts the table instead. Of a function's result it expects 200 values.
            return format!(
                "select b.b, count(*), sum({hash}) {from}, lateral int8abs({bucket}) b(b) \
                 {filter} group by b.b"
            );
        }
        format!("select {bucket}, count(*), sum({hash}) {from} {filter} group by 1")
    }
}

/// Characters of a key column or a row that are shown.
const SHOWN_CHARACTERS: usize = 300;

fn conditions(scan: &Scan) -> String {
    let mut conditions = Vec::new();
    if let Some(first) = scan.blocks.0 {
        conditions.push(format!("t.ctid >= '({first},0)'"));
    }
    if let Some(last) = scan.blocks.1 {
        conditions.push(format!("t.ctid < '({last},0)'"));
    }
    conditions.extend(scan.filter.as_ref().map(|filter| format!("({filter})")));
    if conditions.is_empty() {
        String::new()
    } else {
        format!("where {}", conditions.join(" and "))
    }
}

/// Runs one scan. Blocks for as long as the server takes to read the table.
pub(super) async fn scan(
    session: &mut Session,
    end: End,
    expressions: &Expressions<'_>,
    scan: &Scan,
) -> Result<Fingerprint> {
    let sql = expressions.scan(scan, session.major_version() < 13);
    let rows = session.query(&sql).await.map_err(|e| run::table_error(&scan.table, end, e))?;
    let mut fingerprint = Fingerprint::default();
    for row in rows {
        fingerprint.0.insert(row.parse(0)?, (row.parse(1)?, row.parse(2)?));
    }
    Ok(fingerprint)
}
