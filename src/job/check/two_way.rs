//! What `--two-way` takes on both sides: commit times, and rows that a primary key identifies.

use super::finding::some;
use super::{Check, Finding, Side};
use crate::apply::conflict::{Policy, weights};
use crate::catalog::{self, Selection, Table, TableKind};
use crate::change::ReplicaIdentity;
use crate::clock::PgTimestamp;
use crate::id::QualifiedName;
use crate::job::prepare::refuse_errors;
use crate::job::run::Report;
use crate::pg::{self, Session};

const CODE: &str = "two-way";

/// Clocks that differ by more let the side that is behind lose conflicts that it should win.
const SKEW_SECONDS: f64 = 0.5;

/// Indexes whose violations are not settled.
const UNSETTLED: &str = "select n.nspname || '.' || c.relname from pg_catalog.pg_index i \
     join pg_catalog.pg_class c on c.oid = i.indexrelid \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where (i.indisunique and (i.indpred is not null or i.indexprs is not null) \
         or i.indisexclusion) \
     and n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
     and n.nspname !~ '^pg_(toast|temp)' order by 1";

/// Tables whose conflicts `column` does not settle, by why, each with what mends it.
///
/// `same_encoding`: of both sides; texts are ordered by their bytes.
async fn unfit(
    session: &mut Session,
    (tables, selection): (&[&Table], &Selection),
    (policy, column): (&Policy, &str),
    same_encoding: bool,
) -> pg::Result<Vec<Finding>> {
    let tables: Vec<&Table> =
        tables.iter().copied().filter(|table| selection.has_rows(&table.name)).collect();
    let names: Vec<QualifiedName> = tables.iter().map(|table| table.name.clone()).collect();
    let weights = weights(session, &names, column).await?;
    let why = |table: &Table| {
        let Some(weight) = weights.get(&table.name) else {
            return policy.others().is_none().then_some(Unfit::Absent);
        };
        let full = table.identity == ReplicaIdentity::Full;
        let unfit = [
            (weight.less.is_none(), Unfit::Unordered),
            (weight.generated, Unfit::Generated),
            (weight.toasted && !full, Unfit::Unseen),
            (weight.collates && !same_encoding, Unfit::Foreign),
        ];
        unfit.into_iter().find(|(is_so, _)| *is_so).map(|(_, why)| why)
    };
    let found: Vec<(&Table, Unfit)> =
        tables.into_iter().filter_map(|table| Some((table, why(table)?))).collect();
    let told = Unfit::ALL.into_iter().filter_map(|why| {
        let of = found.iter().filter(|(_, unfit)| *unfit == why).map(|(table, _)| *table);
        let of: Vec<&Table> = of.collect();
        (!of.is_empty()).then(|| why.finding(&of, column))
    });
    Ok(told.collect())
}

/// A policy that a job which is there is to go on by must fit its tables: what check says of a new
/// one. Encodings are told by check alone.
pub(in crate::job) async fn refuse_unfit(
    session: &mut Session,
    selection: &Selection,
    policy: &Policy,
    report: &Report,
) -> crate::job::Result<()> {
    let Some(column) = policy.column() else { return Ok(()) };
    let tables = catalog::tables(session, selection).await?;
    let tables: Vec<&Table> = tables.iter().collect();
    let found = unfit(session, (&tables, selection), (policy, column), true).await?;
    refuse_errors(found.iter(), report)
}

/// Why a column does not settle a table's conflicts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unfit {
    Absent,
    Unordered,
    Generated,
    Unseen,
    Foreign,
}

impl Unfit {
    const ALL: [Unfit; 5] =
        [Unfit::Absent, Unfit::Unordered, Unfit::Generated, Unfit::Unseen, Unfit::Foreign];

    fn finding(self, tables: &[&Table], column: &str) -> Finding {
        let (object, why) = match self {
            Unfit::Absent => ("tables without the column", format!("there is no column {column}")),
            Unfit::Unordered => (
                "columns without an order",
                format!(
                    "two values of column {column} have no order that both sides read alike \
                     (json, point, arrays, ranges, rows, money)"
                ),
            ),
            Unfit::Generated => {
                ("generated columns", format!("the stream does not bring column {column}"))
            }
            Unfit::Unseen => (
                "columns out of line",
                format!(
                    "a value of column {column} may be out of line, and an UPDATE that leaves it \
                     as it is shows it under REPLICA IDENTITY FULL alone (on both sides)"
                ),
            ),
            Unfit::Foreign => (
                "texts in two encodings",
                format!(
                    "texts are ordered by their bytes, which differ on the two sides, in column \
                     {column}"
                ),
            ),
        };
        let names: Vec<String> = tables.iter().map(|table| table.name.to_string()).collect();
        let message = format!("{}: {why}", some(&names));
        let leave = "leave them out with --exclude or --schema-only";
        let fix = match self {
            Unfit::Absent => {
                format!(
                    "settle them otherwise: --on-conflict greatest:{column},last-commit; or {leave}"
                )
            }
            Unfit::Unseen => {
                let full = |table: &&Table| {
                    format!("ALTER TABLE {} REPLICA IDENTITY FULL;", table.name.quoted())
                };
                tables.iter().map(full).collect::<Vec<_>>().join("\n")
            }
            _ => format!("settle by another column; or {leave}"),
        };
        Finding::error(Side::Source, CODE, object, message).fix(fix)
    }
}

impl Check<'_> {
    /// Nothing where it is not asked for.
    pub(super) async fn two_way(&mut self) -> pg::Result<()> {
        let Some(policy) = &self.options.two_way else { return Ok(()) };
        for (side, end) in [(Side::Source, &self.source), (Side::Target, &self.target)] {
            if end.setting("track_commit_timestamp") != Some("on") {
                let message = "is off: without the times of commits no conflict is found";
                let fix =
                    "ALTER SYSTEM SET track_commit_timestamp = on;\n-- and restart the server";
                let object = "track_commit_timestamp";
                self.findings.push(Finding::error(side, CODE, object, message).fix(fix));
            }
        }
        self.two_way_tables();
        if let Some(column) = policy.column() {
            let same = self.source.facts.encoding == self.target.facts.encoding;
            let tables: Vec<&Table> = self.tables.iter().collect();
            let selection = &self.options.selection;
            let session = &mut self.source.session;
            let unfit = unfit(session, (&tables, selection), (policy, column), same).await?;
            self.findings.extend(unfit);
        }
        self.two_way_rest().await
    }

    fn two_way_tables(&mut self) {
        let (mut unkeyed, mut parted, mut unlogged) = (Vec::new(), Vec::new(), Vec::new());
        let has_rows = |name: &QualifiedName| self.options.selection.has_rows(name);
        for table in self.tables.iter().filter(|table| has_rows(&table.name)) {
            let name = table.name.to_string();
            let by_key = match table.identity {
                ReplicaIdentity::Full => !table.key.is_empty(),
                _ => !table.key.is_empty() && table.identity_columns == table.key,
            };
            if table.kind == TableKind::Partitioned || table.partition_of.is_some() {
                parted.push(name);
            } else if table.unlogged {
                unlogged.push(name);
            } else if !by_key {
                unkeyed.push(name);
            }
        }
        let mut add = |names: &[String], object: &str, message: &str| {
            if !names.is_empty() {
                let message = format!("{}: {message}", some(names));
                let finding = Finding::error(Side::Source, CODE, object, message);
                let fix = "leave them out with --exclude or --schema-only";
                self.findings.push(finding.fix(fix));
            }
        };
        let message = "which of two rows is the same is told by a primary key, which must be the \
                       replica identity (or that FULL)";
        add(&unkeyed, "tables without a key", message);
        let message = "a row that moves between partitions is a deletion and an insertion, which \
                       conflicts would settle apart";
        add(&parted, "partitioned tables", message);
        add(&unlogged, "unlogged tables", "no stream has their changes");
    }

    async fn two_way_rest(&mut self) -> pg::Result<()> {
        let sequences = catalog::sequences(&mut self.source.session).await?;
        let count = sequences.iter().filter(|sequence| !sequence.cycle).count();
        if count > 0 && self.begun.is_none() {
            let message = format!(
                "{count} get twice their increment on both sides, so that each side hands out \
                 every second value; finish and cancel give them back what they had"
            );
            self.findings.push(Finding::info(Side::Source, CODE, "sequences", message));
        }
        let cycling: Vec<String> =
            sequences.iter().filter(|s| s.cycle).map(|s| s.name.to_string()).collect();
        if !cycling.is_empty() {
            let message = format!("{}: both sides hand out the same values", some(&cycling));
            self.findings.push(Finding::warning(Side::Source, CODE, "cycling sequences", message));
        }
        let rows = self.source.session.query(UNSETTLED).await?;
        let indexes: Vec<String> = rows.iter().map(|r| r.string(0)).collect::<pg::Result<_>>()?;
        if !indexes.is_empty() {
            let message = format!(
                "{}: over expressions, a part of the table, or by exclusion: two rows that \
                 violate one stop the stream, all others are settled",
                some(&indexes)
            );
            self.findings.push(Finding::warning(Side::Source, CODE, "unique indexes", message));
        }
        let clock = "select pg_catalog.clock_timestamp()";
        let mut clocks = Vec::new();
        for end in [&mut self.source, &mut self.target] {
            let row = end.session.query_one(clock, &[]).await?;
            clocks.extend(PgTimestamp::from_iso(row.str(0)?).map(|at| (at, PgTimestamp::now())));
        }
        if let [(source, here), (target, later)] = clocks.as_slice() {
            let apart = (source.0 - target.0 + later.0 - here.0) as f64 / 1e6;
            if apart.abs() > SKEW_SECONDS {
                let message = format!(
                    "the source's is {apart:.1} s ahead of the target's: under last-commit, the \
                     side that is behind loses conflicts that it should win. Both sides end equal \
                     all the same"
                );
                self.findings.push(Finding::warning(Side::Source, CODE, "clocks", message));
            }
        }
        Ok(())
    }
}
