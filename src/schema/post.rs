//! Post-data on the target: many sessions, each statement exactly once.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::pack;
use super::plan::{self, Lock, PostPhase, Step, Wave};
use super::pre::{known_settings, record, texts, transaction, with_settings};
use super::{Acting, Dump, Error, Result};
use crate::catalog::Selection;
use crate::id::{QualifiedName, quote_literal};
use crate::pg::{CancelHandle, Config, Purpose, Session};

/// A statement that met a deadlock or a lock timeout is run again so many times: others on the
/// target (autovacuum, a curious person) are in nobody's plan, and are gone soon.
const LOCK_ATTEMPTS: u32 = 5;

/// How post-data is run.
#[derive(Clone, Debug)]
pub struct PostOptions {
    /// The job, in whose name steps are remembered.
    pub job: String,
    /// Which half.
    pub phase: PostPhase,
    /// Leave this out; [`super::build_acting`] makes it later.
    pub postponed: Acting,
    /// Tables that move: a foreign key between one of them and another crosses the border.
    pub selection: Selection,
    /// Sessions at most; 0 counts as 1.
    pub parallel: usize,
    /// maintenance_work_mem of each, in bytes, where the server's own is less.
    pub maintenance_work_mem: u64,
    /// Statements about small tables that share a transaction at most; 1 is each by itself.
    pub bundle: usize,
    /// Keys of large tables are built beside their other indexes.
    pub keys_beside: bool,
    /// Commits do not wait for the server's disk: a statement and its row are lost together or not
    /// at all. Only for callers that note what comes of it by a commit on this very server, which
    /// waits for all before it.
    pub async_commit: bool,
    /// Rows are still being copied, and what is there wholly gets its indexes meanwhile; without,
    /// all rows are there.
    pub beside: Option<Beside>,
}

/// What is copied so far. Names are those on the target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Tables that have all their rows for good: none of them is emptied again.
    pub tables: HashSet<QualifiedName>,
    /// Everything is copied.
    pub all: bool,
}

/// A copy under way beside which indexes are built.
#[derive(Clone, Debug)]
pub struct Beside {
    /// Where the copy is. If the sender goes before all is copied, so does what is being built.
    pub copied: watch::Receiver<Copied>,
    /// Heap sizes on the source, in bytes, of the tables that are copied: those on the target say
    /// nothing yet.
    pub bytes: HashMap<QualifiedName, u64>,
    /// Sessions at most until all is copied; 0 counts as 1.
    pub parallel: usize,
}

impl Beside {
    fn is_over(&self) -> bool {
        self.copied.borrow().all
    }

    /// True if these may run now. Until all is copied nothing locks a table against readers for as
    /// long as an index takes: a copy that begins again, and a person, look at sizes.
    fn lets(&self, steps: &[Step]) -> bool {
        let copied = self.copied.borrow();
        let may = |lock: &Lock| !lock.exclusive && copied.tables.contains(&lock.table);
        copied.all || steps.iter().all(|step| step.locks.iter().all(may))
    }
}

impl PostOptions {
    /// Enough to sort some 8 million keys without a file, and little beside the shared_buffers of a
    /// server that holds as many.
    pub const MEMORY_BYTES: u64 = 256 << 20;

    /// Of the job, with everything that makes it fast.
    pub fn new(job: &str, phase: PostPhase) -> PostOptions {
        PostOptions {
            job: job.to_string(),
            phase,
            postponed: Acting::Nothing,
            selection: Selection::default(),
            parallel: 4,
            maintenance_work_mem: Self::MEMORY_BYTES,
            bundle: 64,
            keys_beside: true,
            async_commit: false,
            beside: None,
        }
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
pub struct PostProgress<'a> {
    /// Statements done, those of earlier runs included.
    pub done: usize,
    /// Statements of this phase.
    pub total: usize,
    /// The statement that starts now, or has just ended.
    pub statement: &'a str,
    /// Tables that have just got the last of their indexes. What an earlier call has built is not
    /// told.
    pub complete: &'a [QualifiedName],
}

/// Runs one half of post-data over up to `parallel` sessions of its own. Statements that an
/// earlier call for this job has done are left out. `progress` is called at the start and the end
/// of each transaction, with its first statement, and must not block.
///
/// Beside a copy, indexes of a table are built once its rows are there, and everything else waits
/// for the end of the copy. What is recorded as done then stands on rows that are there as well,
/// though neither commit may have waited for the disk: both are in one server's log, and of that a
/// crash loses the end, so the index goes before its rows do.
///
/// After an error the statements under way are canceled and rolled back, and a later call goes on
/// from there. A refused statement is shown whole. [`Error::NotCopied`]: the copy was given up.
pub async fn apply_post(
    config: &Config,
    dump: &Dump,
    options: &PostOptions,
    progress: &mut (dyn FnMut(PostProgress<'_>) + Send),
) -> Result<()> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let done = done(&mut session, &options.job).await?;
    let mut bytes = table_bytes(&mut session).await?;
    let copied = options.beside.iter().flat_map(|beside| &beside.bytes);
    for (table, copied) in copied.filter(|(_, copied)| **copied > 0) {
        let there = bytes.entry(table.clone()).or_default();
        *there = (*there).max(*copied);
    }
    let known = known_settings(&mut session).await?;
    let mut steps = plan::steps(&dump.post, &bytes)?;
    steps.retain(|step| {
        let postponed = options.postponed.covers(&step.statement.sql, &options.selection);
        step.wave.phase() == options.phase && !postponed
    });
    if options.keys_beside {
        let early = options.beside.as_ref().map(|beside| &beside.bytes);
        let is_early = |table: &QualifiedName| early.is_some_and(|early| early.contains_key(table));
        steps = pack::keys_beside(steps, &bytes, &done, is_early);
    }
    let total = steps.len();
    steps.retain(|step| !done.contains(&step.id));
    let mut crew = Crew {
        config,
        options,
        known,
        idle: Vec::new(),
        busy: JoinSet::new(),
        running: HashMap::new(),
        unbuilt: unbuilt(&steps),
        started: 0,
        done: total - steps.len(),
        total,
    };
    crew.prepare(&mut session).await?;
    crew.idle.push(session);
    let waves = [
        Wave::Build,
        Wave::Adopt,
        Wave::Attach,
        Wave::Mark,
        Wave::ForeignKey,
        Wave::Rest,
        Wave::EventTrigger,
    ];
    for wave in waves {
        let steps = steps.iter().filter(|step| step.wave == wave).cloned().collect();
        let bundles = pack::bundles(steps, &bytes, (options.bundle, options.parallel));
        if let Err(error) = crew.wave(wave, bundles.into(), progress).await {
            crew.cancel().await;
            return Err(error);
        }
    }
    Ok(())
}

/// How many indexes each table lacks.
fn unbuilt(steps: &[Step]) -> HashMap<QualifiedName, usize> {
    let mut unbuilt = HashMap::new();
    for lock in steps.iter().filter(|step| step.wave == Wave::Build).flat_map(|step| &step.locks) {
        *unbuilt.entry(lock.table.clone()).or_default() += 1;
    }
    unbuilt
}

async fn done(session: &mut Session, job: &str) -> Result<HashSet<String>> {
    let sql = format!("select id from walferry.schema_step where job = {}", quote_literal(job));
    texts(session, &sql).await
}

/// Heap sizes on the target, where the indexes are built; tables without rows left out.
async fn table_bytes(session: &mut Session) -> Result<HashMap<QualifiedName, u64>> {
    let rows = session
        .query(
            "select n.nspname, c.relname, pg_catalog.pg_relation_size(c.oid) \
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             where c.relkind in ('r', 'm') and n.nspname !~ '^pg_' \
             and pg_catalog.pg_relation_size(c.oid) > 0",
        )
        .await?;
    let mut bytes = HashMap::with_capacity(rows.len());
    for row in &rows {
        bytes.insert(QualifiedName::new(row.str(0)?, row.str(1)?), row.parse(2)?);
    }
    Ok(bytes)
}

/// The sessions, and what they are at.
struct Crew<'a> {
    config: &'a Config,
    options: &'a PostOptions,
    known: HashSet<String>,
    idle: Vec<Session>,
    busy: JoinSet<(Session, usize, Result<()>)>,
    /// What each transaction under way runs, by its number.
    running: HashMap<usize, (Vec<Step>, CancelHandle)>,
    /// Tables that lack indexes, and how many.
    unbuilt: HashMap<QualifiedName, usize>,
    started: usize,
    done: usize,
    total: usize,
}

impl Crew<'_> {
    async fn prepare(&self, session: &mut Session) -> Result<()> {
        let kb = self.options.maintenance_work_mem >> 10;
        let sql = format!(
            "select pg_catalog.set_config(name, '{kb}', false) from pg_catalog.pg_settings \
             where name = 'maintenance_work_mem' and setting::int8 < {kb}"
        );
        session.query(&sql).await?;
        if self.options.async_commit {
            session.execute("set synchronous_commit = off").await?;
        }
        Ok(())
    }

    async fn session(&mut self) -> Result<Session> {
        if let Some(session) = self.idle.pop() {
            return Ok(session);
        }
        let mut session = Session::connect(self.config, Purpose::Sql).await?;
        self.prepare(&mut session).await?;
        Ok(session)
    }

    async fn wave(
        &mut self,
        wave: Wave,
        mut waiting: VecDeque<Vec<Step>>,
        progress: &mut (dyn FnMut(PostProgress<'_>) + Send),
    ) -> Result<()> {
        let mut beside = self.options.beside.clone();
        loop {
            while self.running.len() < self.parallel(wave) {
                let others = self.running.values().flat_map(|(steps, _)| steps);
                let free = waiting.iter().position(|steps| {
                    beside.as_ref().is_none_or(|beside| beside.lets(steps))
                        && steps
                            .iter()
                            .all(|step| others.clone().all(|other| step.is_free_of(other)))
                });
                let Some(steps) = free.and_then(|index| waiting.remove(index)) else { break };
                self.report(&steps, &[], progress);
                self.start(steps).await?;
            }
            // Other waves find all copied: this, the first, does not end before.
            let copying = beside.as_mut().filter(|beside| !beside.is_over());
            let ended = match copying {
                None => self.busy.join_next().await,
                Some(beside) => tokio::select! {
                    ended = self.busy.join_next(), if !self.busy.is_empty() => ended,
                    changed = beside.copied.changed() => {
                        changed.map_err(|_| Error::NotCopied)?;
                        continue;
                    }
                },
            };
            let Some(ended) = ended else { return Ok(()) };
            let (session, number, outcome) =
                ended.map_err(|e| Error::Bug(format!("a schema statement: {e}")))?;
            let steps = self.running.remove(&number).map_or(Vec::new(), |(steps, _)| steps);
            outcome?;
            self.idle.push(session);
            self.done += steps.len();
            let complete = self.complete(wave, &steps);
            self.report(&steps, &complete, progress);
        }
    }

    /// Sessions that may be at work.
    fn parallel(&self, wave: Wave) -> usize {
        let beside = self.options.beside.as_ref().filter(|beside| !beside.is_over());
        match beside {
            _ if !wave.is_parallel() => 1,
            Some(beside) => beside.parallel.clamp(1, self.options.parallel.max(1)),
            None => self.options.parallel.max(1),
        }
    }

    /// Tables that have got the last of their indexes with these.
    fn complete(&mut self, wave: Wave, steps: &[Step]) -> Vec<QualifiedName> {
        let mut complete = Vec::new();
        if wave != Wave::Build {
            return complete;
        }
        for lock in steps.iter().flat_map(|step| &step.locks) {
            let Some(left) = self.unbuilt.get_mut(&lock.table) else { continue };
            *left = left.saturating_sub(1);
            if *left == 0 {
                complete.push(lock.table.clone());
            }
        }
        complete
    }

    fn report(
        &self,
        steps: &[Step],
        complete: &[QualifiedName],
        progress: &mut (dyn FnMut(PostProgress<'_>) + Send),
    ) {
        if let Some(step) = steps.first() {
            let statement = step.statement.sql.as_str();
            progress(PostProgress { done: self.done, total: self.total, statement, complete });
        }
    }

    /// Begins a transaction of these steps.
    async fn start(&mut self, steps: Vec<Step>) -> Result<()> {
        let mut session = self.session().await?;
        let number = self.started;
        self.started += 1;
        let statements = steps.iter().map(|step| step.statement.clone()).collect();
        let mut sqls = with_settings(statements, &self.known);
        sqls.push(record(&self.options.job, steps.iter().map(|step| step.id.as_str())));
        self.running.insert(number, (steps, session.cancel_handle()));
        self.busy.spawn(async move {
            let outcome = attempt(&mut session, &sqls).await;
            (session, number, outcome)
        });
        Ok(())
    }

    /// Stops what is under way. The server would otherwise go on building for a client that is
    /// gone, and be in the way of the next run.
    async fn cancel(&mut self) {
        for (_, (_, handle)) in self.running.drain() {
            let _ = handle.cancel().await;
        }
        // They end with an error that says nothing new; a limit in case the request was lost.
        let ended = async { while self.busy.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(Duration::from_secs(5), ended).await;
        self.busy.abort_all();
    }
}

async fn attempt(session: &mut Session, sqls: &[String]) -> Result<()> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        match transaction(session, sqls).await {
            Err(Error::Statement { error, .. })
                if attempts < LOCK_ATTEMPTS && matches!(error.code(), Some("40P01" | "55P03")) => {}
            outcome => return outcome,
        }
    }
}
