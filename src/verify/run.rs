//! Sessions, the queue of scans, and the workers that empty it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::JoinSet;

use crate::catalog::{self, Selection};
use crate::fault::{Fault, Faulty};
use crate::id::{QualifiedName, quote_literal};
use crate::pg::{self, Purpose, Session};

use super::family::{Catalog, Family, Piece, Scan, families, pieces};
use super::fingerprint::{Expressions, Fingerprint, scan};
use super::render::{Dialect, Types};
use super::report::{Report, TableReport};
use super::{End, Error, Options, Progress, Result, Side, compare};

/// A session on each side.
struct Pair {
    source: Session,
    target: Session,
}

/// What all workers share.
struct Shared {
    options: Options,
    families: Vec<Family>,
    types: (Types, Types),
    dialects: (Dialect, Dialect),
    state: Mutex<State>,
}

struct State {
    queue: VecDeque<Piece>,
    families: Vec<FamilyState>,
    progress: Progress,
}

#[derive(Default)]
struct FamilyState {
    /// Scans that have not ended.
    pending: usize,
    source: Fingerprint,
    target: Fingerprint,
    /// One of its tables has another file than the snapshot knows.
    rewritten: bool,
    report: Option<TableReport>,
}

/// Compares the two sides as `options` says.
///
/// Takes one scan of every table on each side, and another of those that differ. Dropping the
/// future ends it: the sessions close, and servers of 14 and newer stop scanning within 5 s.
///
/// # Errors
/// Where a server, a snapshot or a table cannot be read. Differences are in the report.
pub async fn run(options: Options) -> Result<Report> {
    let mut pair = Pair::open(&options).await?;
    let mut tables = catalog::tables(&mut pair.source, &options.selection).await?;
    if let Some(publication) = &options.publication {
        tables = publication.narrow(tables);
    }
    let map = options.map.as_deref();
    let tables = tables.into_iter().map(|table| table.mapped_by(map)).collect();
    let source = Catalog::new(tables);
    // Tables that the map fills have names that no pattern of the job speaks of.
    let wide = map.map(|_| Selection::default());
    let selection = wide.as_ref().unwrap_or(&options.selection);
    let target = Catalog::new(catalog::tables(&mut pair.target, selection).await?);
    let types = (Types::read(&mut pair.source).await?, Types::read(&mut pair.target).await?);
    let dialects = agree(&mut pair.source, &mut pair.target).await?;
    let families = families(&source, &target, &options).map_err(Error::Mask)?;
    let piece_blocks =
        |s: &Session| if s.major_version() < 14 { u64::MAX } else { options.piece_blocks };
    let queue = pieces(&families, (piece_blocks(&pair.source), piece_blocks(&pair.target)));
    let workers = options.parallelism.clamp(1, queue.len().max(1));
    let shared = Arc::new(Shared::new(options, families, types, dialects, queue));
    let mut tasks = JoinSet::new();
    tasks.spawn(work(shared.clone(), Some(pair)));
    for _ in 1..workers {
        tasks.spawn(work(shared.clone(), None));
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|e| Error::Task(e.to_string()))??;
    }
    Ok(shared.report())
}

/// Scans until the queue is empty. Whoever ends the last scan of a family judges it.
async fn work(shared: Arc<Shared>, pair: Option<Pair>) -> Result<()> {
    let mut pair = match pair {
        Some(pair) => pair,
        None => Pair::open(&shared.options).await?,
    };
    loop {
        let Some(piece) = shared.lock().queue.pop_front() else { return Ok(()) };
        let scanned = pair.scan(&shared, &piece).await?;
        if let Some((source, target)) = shared.add(&piece, scanned) {
            let report = pair.judge(&shared, piece.family, &source, &target).await?;
            shared.finish(piece.family, report);
        }
    }
}

impl Shared {
    fn new(
        options: Options,
        families: Vec<Family>,
        types: (Types, Types),
        dialects: (Dialect, Dialect),
        queue: Vec<Piece>,
    ) -> Shared {
        let mut states: Vec<FamilyState> =
            families.iter().map(|_| FamilyState::default()).collect();
        for piece in &queue {
            if let Some(state) = states.get_mut(piece.family) {
                state.pending += 1;
            }
        }
        let progress = Progress {
            table: QualifiedName::new("", ""),
            rows: 0,
            bytes: 0,
            bytes_total: queue.iter().filter_map(|p| p.source.as_ref()).map(|s| s.bytes).sum(),
            tables: 0,
            tables_total: families.len(),
        };
        let state = State { queue: queue.into(), families: states, progress };
        Shared { options, families, types, dialects, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expressions(&self, family: usize, end: End) -> Option<Expressions<'_>> {
        let (types, dialect) = match end {
            End::Source => (&self.types.0, &self.dialects.0),
            End::Target => (&self.types.1, &self.dialects.1),
        };
        let family = self.families.get(family)?;
        Some(Expressions::new(family, family.half(end)?, types, dialect))
    }

    /// Adds the result of a piece (`None`: the table was rewritten); gives the sums once the family
    /// has no piece left, if they are of all rows.
    fn add(
        &self,
        piece: &Piece,
        scanned: Option<(Fingerprint, Fingerprint)>,
    ) -> Option<(Fingerprint, Fingerprint)> {
        let rewritten = scanned.is_none();
        let (source, target) = scanned.unwrap_or_default();
        let (progress, sums) = {
            let mut state = self.lock();
            state.progress.rows += source.rows();
            state.progress.bytes += piece.source.as_ref().map_or(0, |s| s.bytes);
            if let Some(family) = self.families.get(piece.family) {
                state.progress.table = family.name.clone();
            }
            let progress = state.progress.clone();
            let family = state.families.get_mut(piece.family)?;
            family.pending -= 1;
            family.rewritten |= rewritten;
            family.source.add(source);
            family.target.add(target);
            let sums = (family.pending == 0 && !family.rewritten)
                .then(|| (std::mem::take(&mut family.source), std::mem::take(&mut family.target)));
            (progress, sums)
        };
        self.announce(&progress);
        sums
    }

    fn finish(&self, family: usize, report: Option<TableReport>) {
        let progress = {
            let mut state = self.lock();
            if let Some(state) = state.families.get_mut(family) {
                state.rewritten = report.is_none();
                state.report = report;
            }
            state.progress.tables += 1;
            if let Some(family) = self.families.get(family) {
                state.progress.table = family.name.clone();
            }
            state.progress.clone()
        };
        self.announce(&progress);
    }

    fn announce(&self, progress: &Progress) {
        if let Some(on_progress) = &self.options.on_progress {
            on_progress(progress);
        }
    }

    fn report(&self) -> Report {
        let mut state = self.lock();
        let ended = self.families.iter().zip(&state.families);
        let rewritten = ended.filter(|(_, f)| f.rewritten).map(|(family, _)| family.name.clone());
        let rewritten = rewritten.collect();
        let tables = state.families.iter_mut().filter_map(|f| f.report.take()).collect();
        Report::new(tables, rewritten)
    }
}

impl Pair {
    async fn open(options: &Options) -> Result<Pair> {
        let (source, target) = tokio::try_join!(
            open(&options.source, End::Source),
            open(&options.target, End::Target)
        )?;
        Ok(Pair { source, target })
    }

    /// `None` where a table was rewritten since the snapshot.
    async fn scan(
        &mut self,
        shared: &Shared,
        piece: &Piece,
    ) -> Result<Option<(Fingerprint, Fingerprint)>> {
        let run = async |session: &mut Session, end, scan_of: Option<&Scan>, snapshot: bool| {
            let (Some(expressions), Some(of)) = (shared.expressions(piece.family, end), scan_of)
            else {
                return Ok::<_, Error>(Some(Fingerprint::default()));
            };
            let whole = !snapshot || is_whole(session, end, &of.table).await?;
            let fingerprint = match whole {
                true => Some(scan(session, end, &expressions, of).await?),
                false => None,
            };
            release(session, snapshot).await?;
            Ok(fingerprint)
        };
        let snapshots =
            (shared.options.source.snapshot.is_some(), shared.options.target.snapshot.is_some());
        let (source, target) = tokio::try_join!(
            run(&mut self.source, End::Source, piece.source.as_ref(), snapshots.0),
            run(&mut self.target, End::Target, piece.target.as_ref(), snapshots.1),
        )?;
        Ok(source.zip(target))
    }

    /// Locks all tables of a family; false if one of them was rewritten since the snapshot.
    async fn are_whole(&mut self, shared: &Shared, family: &Family) -> Result<bool> {
        let options = &shared.options;
        for (session, end, side) in [
            (&mut self.source, End::Source, &options.source),
            (&mut self.target, End::Target, &options.target),
        ] {
            for leaf in family.half(end).into_iter().flat_map(|half| &half.leaves) {
                if side.snapshot.is_some() && !is_whole(session, end, &leaf.name).await? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    async fn judge(
        &mut self,
        shared: &Shared,
        index: usize,
        source: &Fingerprint,
        target: &Fingerprint,
    ) -> Result<Option<TableReport>> {
        let Some(family) = shared.families.get(index) else {
            return Err(Error::Task(format!("no family {index}")));
        };
        let mut report = begin_report(family, source.rows(), target.rows());
        let ends = (shared.expressions(index, End::Source), shared.expressions(index, End::Target));
        let buckets = source.differing(target);
        match &ends {
            (Some(ours), Some(theirs)) if !buckets.is_empty() => {
                if !self.are_whole(shared, family).await? {
                    self.release(&shared.options).await?;
                    return Ok(None);
                }
                let limit = shared.options.keys_limit;
                let mut readings = [
                    compare::Reading {
                        session: &mut self.source,
                        expressions: ours,
                        family,
                        end: End::Source,
                    },
                    compare::Reading {
                        session: &mut self.target,
                        expressions: theirs,
                        family,
                        end: End::Target,
                    },
                ];
                compare::compare(&mut readings, family, &buckets, limit, &mut report).await?;
                self.release(&shared.options).await?;
                let fixed = shared.options.source.snapshot.is_some()
                    && shared.options.target.snapshot.is_some();
                if report.differing == 0 && fixed {
                    return Err(Error::Inconsistent { table: family.name.clone() });
                }
            }
            (Some(_), Some(_)) => {}
            _ => {
                report.missing = report.rows;
                report.extra = report.rows_target;
                report.differing = report.missing + report.extra;
            }
        }
        report.sort_keys();
        report.equal = report.differing == 0 && report.problems.is_empty();
        Ok(Some(report))
    }

    async fn release(&mut self, options: &Options) -> Result<()> {
        release(&mut self.source, options.source.snapshot.is_some()).await?;
        release(&mut self.target, options.target.snapshot.is_some()).await
    }
}

/// What is known of a family once its rows are counted.
pub(super) fn begin_report(family: &Family, rows: u64, rows_target: u64) -> TableReport {
    TableReport {
        name: family.name.to_string(),
        rows,
        rows_target,
        equal: false,
        differing: 0,
        missing: 0,
        extra: 0,
        different: 0,
        key: family.key.clone(),
        keys: Vec::new(),
        problems: family.problems.clone(),
        notes: family.notes.clone(),
    }
}

/// How both sides will hash.
pub(super) async fn agree(
    source: &mut Session,
    target: &mut Session,
) -> Result<(Dialect, Dialect)> {
    let encoding = |s: &Session| s.parameter("server_encoding").unwrap_or("UTF8").to_string();
    let encodings = (encoding(source), encoding(target));
    let versions = (source.major_version(), target.major_version());
    let same_bytes = encodings.0 == encodings.1;
    let mut fast = same_bytes && versions.0 >= 11 && versions.1 >= 11;
    if fast {
        // The hash may depend on the processor's byte order, and could change one day.
        let probe = "select hashtextextended(repeat('walferry', n) collate \"C\", 0) \
             from generate_series(0, 5) n order by n";
        let (ours, theirs) = tokio::try_join!(source.query(probe), target.query(probe))?;
        fast = ours.iter().zip(&theirs).all(|(a, b)| a.bytes(0) == b.bytes(0));
    }
    let floats_differ = (versions.0 < 12) != (versions.1 < 12);
    // SQL_ASCII stores bytes of unknown meaning: taken as they are.
    let convert = |encoding: &str| match (same_bytes, encoding) {
        (true, _) => None,
        (false, "SQL_ASCII") => Some("SQL_ASCII"),
        (false, _) => Some("UTF8"),
    };
    let dialect = |e: &str| Dialect { fast, encoding: convert(e), floats_differ };
    Ok((dialect(&encodings.0), dialect(&encodings.1)))
}

/// Locks the table, so that nobody can rewrite it any more, and looks whether somebody has since
/// the snapshot was taken (TRUNCATE, ALTER TYPE, CLUSTER). In the new file the snapshot may see no
/// rows, and no error says so; pg_class as the snapshot sees it names the file before.
pub(super) async fn is_whole(
    session: &mut Session,
    end: End,
    table: &QualifiedName,
) -> Result<bool> {
    let sql = format!(
        "lock table only {0} in access share mode; \
         select c.relfilenode = pg_catalog.pg_relation_filenode(c.oid) \
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where n.nspname = {1} and c.relname = {2}",
        table.quoted(),
        quote_literal(&table.schema),
        quote_literal(&table.name)
    );
    let rows = session.query(&sql).await.map_err(|e| table_error(table, end, e))?;
    Ok(match rows.first() {
        Some(row) => row.opt(0)? == Some("t"),
        None => false,
    })
}

/// Gives table locks back while the transaction goes on, so that a comparison of hours does not
/// stand in the way of an ALTER TABLE, or of the fence, for longer than one scan.
pub(super) async fn release(session: &mut Session, snapshot: bool) -> Result<()> {
    if snapshot {
        session.execute("rollback to savepoint walferry_verify").await?;
    }
    Ok(())
}

pub(super) async fn open(side: &Side, end: End) -> Result<Session> {
    let mut session = Session::connect(&side.config, Purpose::Sql).await?;
    let major_version = session.major_version();
    // Plans: buckets are few, so sorting rows to group them is never right. 64 MB of work_mem are
    // for the sort of differing rows; before 13 it also decides whether grouping may hash.
    let mut settings = "set enable_sort = off; set work_mem = '64MB'; \
         set max_parallel_workers_per_gather = 0;"
        .to_string();
    if major_version >= 11 {
        settings.push_str("set jit = off;");
    }
    session.execute(&settings).await?;
    session.pass_unknown_bytes().await?;
    if let Some(snapshot) = &side.snapshot {
        let begin = format!(
            "begin isolation level repeatable read read only; set transaction snapshot {}; \
             savepoint walferry_verify",
            quote_literal(snapshot)
        );
        session.execute(&begin).await.map_err(|source| match source {
            source @ pg::Error::Server { .. } => Error::Snapshot {
                side: end.as_str(),
                snapshot: snapshot.clone(),
                source: Box::new(source),
            },
            other => Error::Pg(other),
        })?;
    }
    Ok(session)
}

/// Names the table and, for a missing right, what gives it.
pub(super) fn table_error(table: &QualifiedName, end: End, source: pg::Error) -> Error {
    if source.fault() == Fault::Retry {
        return Error::Pg(source);
    }
    let hint = match source.code() {
        Some("42501") => format!(
            "; as its owner: GRANT SELECT ON {} TO <the role walferry uses>; for row-level \
             security: ALTER ROLE <that role> BYPASSRLS",
            table.quoted()
        ),
        _ => String::new(),
    };
    Error::Table { table: table.clone(), side: end.as_str(), source: Box::new(source), hint }
}
