//! Post-data on the target: many sessions, each statement exactly once.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::task::JoinSet;

use super::pack;
use super::plan::{self, PostPhase, Step, Wave};
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
}

/// Runs one half of post-data over up to `parallel` sessions of its own. Statements that an
/// earlier call for this job has done are left out. `progress` is called at the start and the end
/// of each transaction, with its first statement, and must not block.
///
/// After an error the statements under way are canceled and rolled back, and a later call goes on
/// from there. A refused statement is shown whole.
pub async fn apply_post(
    config: &Config,
    dump: &Dump,
    options: &PostOptions,
    progress: &mut (dyn FnMut(PostProgress<'_>) + Send),
) -> Result<()> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let done = done(&mut session, &options.job).await?;
    let bytes = table_bytes(&mut session).await?;
    let known = known_settings(&mut session).await?;
    let mut steps = plan::steps(&dump.post, &bytes)?;
    steps.retain(|step| {
        let postponed = options.postponed.covers(&step.statement.sql, &options.selection);
        step.wave.phase() == options.phase && !postponed
    });
    if options.keys_beside {
        steps = pack::keys_beside(steps, &bytes, &done);
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
        let parallel = if wave.is_parallel() { self.options.parallel.max(1) } else { 1 };
        loop {
            while self.running.len() < parallel {
                let others = self.running.values().flat_map(|(steps, _)| steps);
                let free = waiting.iter().position(|steps| {
                    steps.iter().all(|step| others.clone().all(|other| step.is_free_of(other)))
                });
                let Some(steps) = free.and_then(|index| waiting.remove(index)) else { break };
                self.report(&steps, progress);
                self.start(steps).await?;
            }
            let Some(ended) = self.busy.join_next().await else { return Ok(()) };
            let (session, number, outcome) =
                ended.map_err(|e| Error::Bug(format!("a schema statement: {e}")))?;
            let steps = self.running.remove(&number).map_or(Vec::new(), |(steps, _)| steps);
            outcome?;
            self.idle.push(session);
            self.done += steps.len();
            self.report(&steps, progress);
        }
    }

    fn report(&self, steps: &[Step], progress: &mut (dyn FnMut(PostProgress<'_>) + Send)) {
        if let Some(step) = steps.first() {
            let statement = step.statement.sql.as_str();
            progress(PostProgress { done: self.done, total: self.total, statement });
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
