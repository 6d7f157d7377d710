//! Rows of several sources in the tables of one target, compared with what all of them have.
//!
//! Which source a row of the target came from it does not tell. Sums of hashes do not mind: those
//! of the sources are added, and must be the target's. Where a bucket differs, its rows are merged
//! from all sides. Tables are taken one after the other, each side by one session.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::{self, Selection};
use crate::id::QualifiedName;
use crate::pg::Session;

use super::compare::{Reading, compare};
use super::family::{Catalog, Family, Half, families};
use super::fingerprint::{Expressions, Fingerprint, scan};
use super::render::{Dialect, Types};
use super::report::{Report, TableReport};
use super::run::{agree, begin_report, is_whole, open, release};
use super::{End, Error, Options, Result};

/// One of the sources.
struct Source {
    session: Session,
    families: BTreeMap<QualifiedName, Family>,
    types: Types,
}

/// What reads and judges.
struct United {
    options: Vec<Options>,
    sources: Vec<Source>,
    target: Session,
    types: Types,
    /// Of the sources, and of the target.
    dialects: (Dialect, Dialect),
}

/// Compares what the sources of all `options` have, each by its own selection and map, with the
/// target, which is the same in all of them. Sources have one encoding.
///
/// # Errors
/// As [`super::run`].
pub async fn run_united(options: Vec<Options>) -> Result<Report> {
    let Some(first) = options.first() else { return Ok(Report::new(Vec::new(), Vec::new())) };
    let mut target = open(&first.target, End::Target).await?;
    let there = Catalog::new(catalog::tables(&mut target, &Selection::default()).await?);
    let types = Types::read(&mut target).await?;
    let (mut sources, mut dialects) = (Vec::new(), Vec::new());
    for options in &options {
        let mut session = open(&options.source, End::Source).await?;
        let tables = catalog::tables(&mut session, &options.selection).await?;
        let map = options.map.as_deref();
        let tables = Catalog::new(tables.into_iter().map(|table| table.mapped_by(map)).collect());
        let families = families(&tables, &there, options).map_err(Error::Mask)?;
        let own = families.into_iter().filter(|family| family.source.is_some());
        dialects.push(agree(&mut session, &mut target).await?);
        sources.push(Source {
            families: own.map(|family| (family.name.clone(), family)).collect(),
            types: Types::read(&mut session).await?,
            session,
        });
    }
    let dialects = in_common(&dialects);
    let mut united = United { options, sources, target, types, dialects };
    let (mut tables, mut rewritten) = (Vec::new(), Vec::new());
    let names: BTreeSet<QualifiedName> =
        united.sources.iter().flat_map(|source| source.families.keys().cloned()).collect();
    for name in names {
        match united.table(&name).await? {
            Some(report) => tables.push(report),
            None => rewritten.push(name),
        }
    }
    Ok(Report::new(tables, rewritten))
}

/// What every side can do.
fn in_common(dialects: &[(Dialect, Dialect)]) -> (Dialect, Dialect) {
    let fast = dialects.iter().all(|(source, _)| source.fast);
    let floats_differ = dialects.iter().any(|(source, _)| source.floats_differ);
    let of = |encoding| Dialect { fast, encoding, floats_differ };
    match dialects.first() {
        Some((source, target)) => (of(source.encoding), of(target.encoding)),
        None => (of(None), of(None)),
    }
}

impl United {
    /// `None` where a table was rewritten since the snapshots.
    async fn table(&mut self, name: &QualifiedName) -> Result<Option<TableReport>> {
        let families = self.families(name);
        let judged = match self.are_whole(&families).await? {
            true => Some(self.judge(&families).await?),
            false => None,
        };
        for (source, options) in self.sources.iter_mut().zip(&self.options) {
            release(&mut source.session, options.source.snapshot.is_some()).await?;
        }
        let fixed = self.is_fixed();
        release(&mut self.target, fixed).await?;
        Ok(judged)
    }

    /// The table on each source, for the sources that have it: with as many buckets, and what is
    /// wrong with any of them.
    fn families(&self, name: &QualifiedName) -> Vec<Option<Family>> {
        let mut families: Vec<Option<Family>> =
            self.sources.iter().map(|source| source.families.get(name).cloned()).collect();
        let known = || families.iter().flatten();
        let buckets = known().map(|family| family.buckets).max().unwrap_or(1);
        let shapes: BTreeSet<(&[String], &[String])> =
            known().map(|family| (&*family.columns, &*family.key)).collect();
        let torn = (shapes.len() > 1)
            .then(|| "the sources have other columns, or another key, of it".to_string());
        let problems: BTreeSet<String> =
            known().flat_map(|family| family.problems.clone()).chain(torn).collect();
        for family in families.iter_mut().flatten() {
            family.buckets = buckets;
            family.problems = problems.iter().cloned().collect();
        }
        families
    }

    fn is_fixed(&self) -> bool {
        self.options.first().is_some_and(|options| options.target.snapshot.is_some())
    }

    async fn are_whole(&mut self, families: &[Option<Family>]) -> Result<bool> {
        let leaves = |family: &Family, end| -> Vec<QualifiedName> {
            let half: Option<&Half> = family.half(end);
            half.into_iter().flat_map(|half| &half.leaves).map(|t| t.name.clone()).collect()
        };
        for ((source, options), family) in self.sources.iter_mut().zip(&self.options).zip(families)
        {
            let own: Vec<QualifiedName> =
                family.iter().flat_map(|family| leaves(family, End::Source)).collect();
            for leaf in own.iter().filter(|_| options.source.snapshot.is_some()) {
                if !is_whole(&mut source.session, End::Source, leaf).await? {
                    return Ok(false);
                }
            }
        }
        let first: Vec<QualifiedName> =
            families.iter().flatten().take(1).flat_map(|f| leaves(f, End::Target)).collect();
        let fixed = self.is_fixed();
        for leaf in first.iter().filter(|_| fixed) {
            if !is_whole(&mut self.target, End::Target, leaf).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn judge(&mut self, families: &[Option<Family>]) -> Result<TableReport> {
        let Some(first) = families.iter().flatten().next() else {
            return Err(Error::Task("a table of no source".to_string()));
        };
        let (ours, theirs) = (&self.dialects.0, &self.dialects.1);
        let mut sums = (Fingerprint::default(), Fingerprint::default());
        let mut expressions = Vec::new();
        for (source, family) in self.sources.iter_mut().zip(families) {
            let Source { session, types, .. } = source;
            let Some((family, half)) = family.as_ref().and_then(|f| Some((f, f.source.as_ref()?)))
            else {
                continue;
            };
            let by = Expressions::new(family, half, types, ours);
            sums.0.add(whole(session, End::Source, &by, half).await?);
            expressions.push((session, by, family));
        }
        let Some(half) = &first.target else {
            let mut report = begin_report(first, sums.0.rows(), 0);
            (report.missing, report.differing) = (report.rows, report.rows);
            return Ok(report);
        };
        let by = Expressions::new(first, half, &self.types, theirs);
        sums.1.add(whole(&mut self.target, End::Target, &by, half).await?);
        let mut report = begin_report(first, sums.0.rows(), sums.1.rows());
        let buckets = sums.0.differing(&sums.1);
        if !buckets.is_empty() {
            let mut readings: Vec<Reading<'_>> = Vec::new();
            for (session, expressions, family) in &mut expressions {
                readings.push(Reading { session, expressions, family, end: End::Source });
            }
            let session = &mut self.target;
            readings.push(Reading { session, expressions: &by, family: first, end: End::Target });
            let limit = self.options.first().map_or(0, |options| options.keys_limit);
            compare(&mut readings, first, &buckets, limit, &mut report).await?;
        }
        report.sort_keys();
        report.equal = buckets.is_empty() && report.problems.is_empty();
        Ok(report)
    }
}

/// All rows of a half.
async fn whole(
    session: &mut Session,
    end: End,
    by: &Expressions<'_>,
    half: &Half,
) -> Result<Fingerprint> {
    let mut sum = Fingerprint::default();
    for part in half.scans(u64::MAX) {
        sum.add(scan(session, end, by, &part).await?);
    }
    Ok(sum)
}
