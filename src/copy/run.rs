//! The workers.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;

use super::family::Families;
use super::parts::{PART_BYTES, SMALL_BYTES, bundle, order, part_bytes, parts, weight};
use super::snapshot::import;
use super::store::{self, Stored, filenode, is_uneven, is_whole};
use super::transfer::{Item, Origin, connect_target, transfer};
use super::{CopyProgress, Error, Format, Result, SnapshotSource, format};
use crate::catalog::{Selection, Table, TableKind, tables};
use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::pg::{Config, Purpose, Session};

/// A worker that lost a connection tries so often, then leaves the part to others and ends.
const ATTEMPTS: u32 = 4;

/// Which rows are written frozen, so that neither the first reader nor VACUUM has to write their
/// pages again.
///
/// <https://www.postgresql.org/docs/current/sql-copy.html> (FREEZE)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Freeze {
    /// Those of tables that one transaction empties and fills, small ones left out: for these
    /// TRUNCATE would take longer than it saves.
    #[default]
    Whole,
    /// None.
    Never,
}

/// How a copy is done.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where rows are read.
    pub source: Config,
    /// Where they are written, and where the parts are stored.
    pub target: Config,
    /// The job, in whose name parts are stored.
    pub job: String,
    /// Workers, each with a session on both sides; 0 counts as 1.
    pub jobs: usize,
    /// Tables larger than this (TOAST included) are cut into parts of at most about this size, in
    /// bytes; into smaller ones where workers would wait for the last. Only what is not stored yet
    /// is cut; 0 cuts none.
    pub part_bytes: u64,
    /// How rows travel.
    pub format: Format,
    /// Small tables that are copied in one transaction at most; 1 is each by itself.
    pub bundle_tables: usize,
    /// Which rows are written frozen.
    pub freeze: Freeze,
    /// Commits do not wait for the target's disk.
    pub async_commit: bool,
    /// Others write to the target's tables as well: those may have rows, and are never emptied, so
    /// each table is one part, whose transaction brings all of it or nothing.
    pub shared: bool,
}

impl Options {
    /// Four workers, parts of [`PART_BYTES`]. Of small tables 64 together: their request is small,
    /// and what a table costs by itself is then all there is.
    pub fn new(source: Config, target: Config, job: &str) -> Self {
        Options {
            source,
            target,
            job: job.to_string(),
            jobs: 4,
            part_bytes: PART_BYTES,
            format: Format::Auto,
            bundle_tables: 64,
            freeze: Freeze::Whole,
            async_commit: true,
            shared: false,
        }
    }
}

/// Copies the rows of `tables` (those whose rows are to move; partitioned parents in it are passed
/// over) that are not copied yet, each part in a transaction with its own mark. The tables exist
/// on the target, and are empty before the first call for this job, unless they are shared.
///
/// The session that exported `snapshot` is the caller's, and has to stay as it is until this
/// returns. Errors: [`Error::SnapshotLost`] if it did not (call again with a fresh one); others of
/// [`Fault::Retry`] after some attempts of each worker (call again); of [`Fault::Stop`] at once,
/// with the other workers' parts left undone. What is done stays done in every case.
pub async fn run(
    options: &Options,
    tables: &[Table],
    snapshot: &SnapshotSource,
    progress: &CopyProgress,
) -> Result<()> {
    let mut target = open_target(options).await?;
    let source = Session::connect(&options.source, Purpose::Sql).await?;
    store_parts(&mut target, &source, options, tables).await?;
    drop(source);
    let stored = store::load(&mut target.session, &options.job).await?;
    let families = Families::of(tables);
    let is_left = |table: &&Table| stored.get(&table.name).is_some_and(|parts| !is_whole(parts));
    if !order(tables).iter().any(is_left) && families.torn(&stored).is_none() {
        report(progress, &stored);
        return Ok(());
    }
    let (mut source, snapshot_id) = import(&options.source, snapshot).await?;
    let written = written_names(tables);
    reset_mixed(&mut target, &mut source, (options, &written), &stored, &snapshot_id).await?;
    for table in families.misfits(&stored, &snapshot_id) {
        target.reset(options, &table, &written).await?;
    }
    let stored = store::load(&mut target.session, &options.job).await?;
    report(progress, &stored);
    let queue = queue(&target, &source, options, tables, &stored);
    let shared = Arc::new(Shared {
        options: options.clone(),
        source: snapshot.clone(),
        origin: Origin {
            job: options.job.clone(),
            snapshot: snapshot.stored(),
            snapshot_lsn: snapshot.lsn(),
            snapshot_id,
            freeze: if options.shared { Freeze::Never } else { options.freeze },
        },
        queue: Mutex::new(queue),
        rewritten: Mutex::new(Vec::new()),
        progress: progress.clone(),
    });
    let first = Pair { source, target: target.session };
    let mut target = work_off(&shared, first).await?;
    if let Some(table) = shared.rewritten() {
        return Err(Error::Rewritten { table });
    }
    if let Some(table) = store::uneven(&mut target, &options.job).await? {
        return Err(Error::Rewritten { table });
    }
    // A partition that was rewritten has been read under a later snapshot than its siblings.
    match families.torn(&store::load(&mut target, &options.job).await?) {
        Some(root) => Err(Error::Rewritten { table: root.clone() }),
        None => Ok(()),
    }
}

/// A session on the target, and what it found there.
struct Target {
    session: Session,
    tables: HashMap<QualifiedName, Table>,
    /// Triggers stay quiet.
    replica: bool,
}

impl Target {
    fn only(&self, table: &QualifiedName) -> &'static str {
        let parted = |t: &Table| t.kind == TableKind::Partitioned;
        if self.tables.get(table).is_some_and(parted) { "" } else { "only " }
    }

    /// Empties what `table` of the source is written to, and has it copied again.
    async fn reset(
        &mut self,
        options: &Options,
        table: &QualifiedName,
        written: &HashMap<QualifiedName, QualifiedName>,
    ) -> Result<()> {
        if options.shared {
            return Err(Error::Bug(format!("{table} was to be emptied, and others write to it")));
        }
        let to = written.get(table).unwrap_or(table);
        let only = self.only(to);
        store::reset(&mut self.session, &options.job, table, (to, only)).await
    }
}

/// By its name on the source, where a table is written that has another name there.
fn written_names(tables: &[Table]) -> HashMap<QualifiedName, QualifiedName> {
    let mapped = tables.iter().filter(|table| table.mapped.is_some());
    mapped.map(|table| (table.name.clone(), table.written_name().clone())).collect()
}

async fn open_target(options: &Options) -> Result<Target> {
    let (mut session, replica) = connect_target(&options.target, options.async_commit).await?;
    let everything = Selection::default();
    let tables = tables(&mut session, &everything).await?;
    let tables = tables.into_iter().map(|table| (table.name.clone(), table)).collect();
    Ok(Target { session, tables, replica })
}

/// Cuts and stores the tables that are not stored yet, after a look that they are empty there.
async fn store_parts(
    target: &mut Target,
    source: &Session,
    options: &Options,
    tables: &[Table],
) -> Result<()> {
    let stored = store::load(&mut target.session, &options.job).await?;
    let fresh: Vec<&Table> =
        order(tables).into_iter().filter(|table| !stored.contains_key(&table.name)).collect();
    if fresh.is_empty() {
        return Ok(());
    }
    for table in &fresh {
        check_target(&target.tables, table)?;
    }
    if !target.replica {
        check_triggers(target, &fresh, &options.target.user).await?;
    }
    let bytes = match options.shared {
        true => u64::MAX,
        false => {
            check_empty(target, &fresh).await?;
            part_bytes(&fresh, options.jobs, options.part_bytes)
        }
    };
    let major = source.major_version();
    let parts: Vec<_> = fresh.iter().flat_map(|table| parts(table, bytes, major)).collect();
    target.session.execute(&store::insert_sql(&options.job, &parts)).await?;
    Ok(())
}

/// Refuses tables that have rows. Those without a block, as most are, are not asked.
async fn check_empty(target: &mut Target, tables: &[&Table]) -> Result<()> {
    let has_no_block = |t: &Table| t.kind == TableKind::Plain && t.blocks == 0;
    let mut asked = tables.to_vec();
    asked.retain(|table| !target.tables.get(table.written_name()).is_some_and(has_no_block));
    if asked.is_empty() {
        return Ok(());
    }
    let empty: Vec<String> = asked
        .iter()
        .map(|table| {
            let name = table.written_name();
            format!("select exists (select from {}{})", target.only(name), name.quoted())
        })
        .collect();
    let answers = target.session.query(&empty.join("; ")).await?;
    for (table, row) in asked.iter().zip(&answers) {
        if row.bool(0)? {
            return Err(Error::NotEmpty { table: table.written_name().clone() });
        }
    }
    Ok(())
}

pub(super) fn check_target(tables: &HashMap<QualifiedName, Table>, table: &Table) -> Result<()> {
    let missing = |what: String| Err(Error::Missing { table: table.written_name().clone(), what });
    let Some(there) = tables.get(table.written_name()) else {
        return missing("does not exist".to_string());
    };
    for column in table.stored_columns() {
        let name = table.written(&column.name);
        match there.columns.iter().find(|c| c.name == name) {
            None => return missing(format!("has no column \"{name}\"")),
            Some(c) if c.generated => {
                return missing(format!("generates column \"{name}\" itself"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Without session_replication_role, triggers and foreign keys would fire for copied rows.
async fn check_triggers(target: &mut Target, tables: &[&Table], role: &str) -> Result<()> {
    // tgtype & 4: fires on INSERT.
    let sql = "select n.nspname, c.relname from pg_catalog.pg_trigger t \
               join pg_catalog.pg_class c on c.oid = t.tgrelid \
               join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
               where t.tgenabled in ('O', 'A') and t.tgtype & 4 <> 0 \
               and (not t.tgisinternal or exists (select from pg_catalog.pg_constraint k \
                   where k.oid = t.tgconstraint and k.contype = 'f')) order by 1, 2";
    for row in target.session.query(sql).await? {
        let table = QualifiedName::new(row.str(0)?, row.str(1)?);
        if tables.iter().any(|t| *t.written_name() == table) {
            return Err(Error::Triggers { table, role: role.to_string() });
        }
    }
    Ok(())
}

/// Empties tables whose finished parts do not fit what will be read now.
async fn reset_mixed(
    target: &mut Target,
    source: &mut Session,
    (options, written): (&Options, &HashMap<QualifiedName, QualifiedName>),
    stored: &HashMap<QualifiedName, Vec<Stored>>,
    snapshot_id: &str,
) -> Result<()> {
    for (table, parts) in stored {
        // A plain list: an iterator with a closure, alive across an await, would make the future
        // one that cannot be sent to another thread.
        let mut done: Vec<&Stored> = Vec::with_capacity(parts.len());
        done.extend(parts.iter().filter(|part| part.done));
        if is_whole(parts) || done.is_empty() {
            continue;
        }
        let filenode = filenode(source, table).await?;
        let fits = |part: &Stored| {
            part.snapshot_id.as_deref() == Some(snapshot_id) && part.filenode == filenode
        };
        if is_uneven(parts) || !done.into_iter().all(fits) {
            target.reset(options, table, written).await?;
        }
    }
    Ok(())
}

fn report(progress: &CopyProgress, stored: &HashMap<QualifiedName, Vec<Stored>>) {
    for (table, parts) in stored {
        let done = || parts.iter().filter(|part| part.done);
        progress.resume(
            table,
            parts.len() as u64,
            done().count() as u64,
            done().map(|part| part.rows).sum(),
            done().map(|part| part.bytes).sum(),
        );
    }
}

fn queue(
    target: &Target,
    source: &Session,
    options: &Options,
    tables: &[Table],
    stored: &HashMap<QualifiedName, Vec<Stored>>,
) -> VecDeque<Vec<Item>> {
    let encoding = |session: &Session| -> String {
        session.parameter("server_encoding").unwrap_or("UTF8").to_string()
    };
    let (from, into) = (encoding(source), encoding(&target.session));
    let encodings = (from.as_str(), into.as_str());
    let mut queue = Vec::new();
    for table in order(tables) {
        let Some(there) = target.tables.get(table.written_name()) else { continue };
        let with = format::options(options.format, encodings, table, there);
        let shared = Arc::new(table.clone());
        let todo = stored.get(&table.name).into_iter().flatten().filter(|part| !part.done);
        queue.extend(todo.map(|stored| Item {
            table: shared.clone(),
            part: stored.part.clone(),
            with: with.clone(),
            only: target.only(table.written_name()),
            begun: stored.begun && !options.shared,
        }));
    }
    let small = |item: &Item| {
        let bytes = weight(&item.table);
        // What may have left dead rows is emptied first, by itself.
        let fits = item.part.parts == 1 && bytes <= SMALL_BYTES && !item.begun;
        fits.then_some(bytes)
    };
    bundle(queue, small, (options.bundle_tables, options.jobs)).into()
}

/// The two sessions of a worker.
struct Pair {
    source: Session,
    target: Session,
}

/// What the workers share.
struct Shared {
    options: Options,
    source: SnapshotSource,
    origin: Origin,
    /// What one transaction brings, each.
    queue: Mutex<VecDeque<Vec<Item>>>,
    /// Tables that were rewritten on the source after the snapshot was taken.
    rewritten: Mutex<Vec<QualifiedName>>,
    progress: CopyProgress,
}

impl Shared {
    fn take(&self) -> Option<Vec<Item>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn give_back(&self, work: Vec<Item>) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_front(work);
    }

    fn set_aside(&self, tables: Vec<QualifiedName>) {
        self.rewritten.lock().unwrap_or_else(PoisonError::into_inner).extend(tables);
    }

    fn rewritten(&self) -> Option<QualifiedName> {
        self.rewritten.lock().unwrap_or_else(PoisonError::into_inner).first().cloned()
    }

    fn left(&self) -> usize {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    async fn connect(&self) -> Result<Pair> {
        let (source, snapshot_id) = import(&self.options.source, &self.source).await?;
        if snapshot_id != self.origin.snapshot_id {
            let name = self.source.name();
            let text = format!("snapshot {name} is {snapshot_id}, not {}", self.origin.snapshot_id);
            return Err(Error::Bug(text));
        }
        let Options { target, async_commit, .. } = &self.options;
        let (target, _) = connect_target(target, *async_commit).await?;
        Ok(Pair { source, target })
    }
}

/// Lets the workers go until nothing is left or none can go on; gives a session on the target.
async fn work_off(shared: &Arc<Shared>, first: Pair) -> Result<Session> {
    let count = shared.options.jobs.clamp(1, shared.left().max(1));
    let mut workers = JoinSet::new();
    let mut first = Some(first);
    for _ in 0..count {
        workers.spawn(worker(shared.clone(), first.take()));
    }
    let mut target = None;
    let mut failure: Option<Error> = None;
    while let Some(ended) = workers.join_next().await {
        match ended.map_err(|e| Error::Bug(format!("a copy worker: {e}")))? {
            Ok(session) => target = session.or(target),
            // Dropping the workers closes their sessions, and what they were at is undone.
            Err(error) if error.fault() != Fault::Retry => return Err(error),
            Err(lost @ Error::SnapshotLost { .. }) => failure = Some(lost),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    if shared.left() > 0 {
        let nobody = || Error::Bug("copy workers ended with work left".to_string());
        return Err(failure.unwrap_or_else(nobody));
    }
    match target {
        Some(session) => Ok(session),
        None => Ok(Session::connect(&shared.options.target, Purpose::Sql).await?),
    }
}

/// Takes parts until there are none. After a lost connection it opens others and tries the same
/// again; when it has to give up, it goes back for the others. Of a bundle that was refused, each
/// table is tried by itself: that names the one at fault, and brings the rest.
async fn worker(shared: Arc<Shared>, mut pair: Option<Pair>) -> Result<Option<Session>> {
    let mut attempts = 0;
    let mut last_process = None;
    while let Some(mut work) = shared.take() {
        match attempt(&shared, &mut pair, &work, &mut last_process).await {
            // For these tables the snapshot is of no use any more; for all others it is.
            Ok(rewritten) => {
                attempts = 0;
                shared.set_aside(rewritten);
            }
            Err(error) => {
                pair = None;
                let passing = error.fault() == Fault::Retry;
                if work.len() > 1 && !passing {
                    work.into_iter().rev().for_each(|item| shared.give_back(vec![item]));
                    continue;
                }
                attempts += 1;
                if let [only] = work.as_mut_slice() {
                    only.begun = true;
                }
                shared.give_back(work);
                let lost = matches!(error, Error::SnapshotLost { .. });
                if !passing || lost || attempts >= ATTEMPTS {
                    return Err(error);
                }
                tracing::warn!(%error, attempts, "copy worker connects again");
                tokio::time::sleep(Duration::from_millis(100 << (2 * attempts))).await;
            }
        }
    }
    Ok(pair.map(|pair| pair.target))
}

async fn attempt(
    shared: &Shared,
    pair: &mut Option<Pair>,
    work: &[Item],
    last_process: &mut Option<i32>,
) -> Result<Vec<QualifiedName>> {
    if pair.is_none() {
        let mut fresh = shared.connect().await?;
        if let Some(process) = last_process.take() {
            // The backend of the attempt before may not know yet that we are gone, and would hold
            // the part's lock until it does.
            let sql = format!(
                "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity \
                 where pid = {process} and application_name like 'walferry%' \
                 and usename = current_user and datname = pg_catalog.current_database() \
                 and pid <> pg_catalog.pg_backend_pid()"
            );
            fresh.target.query(&sql).await?;
        }
        *pair = Some(fresh);
    }
    let Some(pair) = pair else { return Ok(Vec::new()) };
    *last_process = Some(pair.target.process_id());
    transfer(&mut pair.source, &mut pair.target, &shared.origin, work, &shared.progress).await
}
