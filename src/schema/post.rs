//! Post-data on the target: many sessions, each statement exactly once.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::task::JoinSet;

use super::plan::{self, PostPhase, Step, Wave};
use super::pre::{known_settings, record, set_local, texts, transaction};
use super::{Dump, Error, Result};
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
    /// Leave out what acts on written rows; [`super::build_acting`] makes it later.
    pub postpone_acting: bool,
    /// Sessions at most; 0 counts as 1.
    pub parallel: usize,
    /// maintenance_work_mem of each, in PostgreSQL's notation (`1GB`); the server's own if `None`.
    pub maintenance_work_mem: Option<String>,
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
/// of each statement, and must not block.
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
        let postponed = options.postpone_acting && plan::acts(&step.statement.sql);
        step.wave.phase() == options.phase && !postponed
    });
    let total = steps.len();
    steps.retain(|step| !done.contains(&step.id));
    let mut crew = Crew {
        config,
        options,
        known,
        idle: Vec::new(),
        busy: JoinSet::new(),
        running: Vec::new(),
        done: total - steps.len(),
        total,
    };
    crew.prepare(&mut session).await?;
    crew.idle.push(session);
    let waves =
        [Wave::Build, Wave::Attach, Wave::Mark, Wave::ForeignKey, Wave::Rest, Wave::EventTrigger];
    for wave in waves {
        let steps = steps.iter().filter(|step| step.wave == wave).cloned().collect();
        if let Err(error) = crew.wave(wave, steps, progress).await {
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
    busy: JoinSet<(Session, Step, Result<()>)>,
    running: Vec<(Step, CancelHandle)>,
    done: usize,
    total: usize,
}

impl Crew<'_> {
    async fn prepare(&self, session: &mut Session) -> Result<()> {
        if let Some(memory) = &self.options.maintenance_work_mem {
            let sql = format!("set maintenance_work_mem = {}", quote_literal(memory));
            session.execute(&sql).await?;
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
        mut waiting: Vec<Step>,
        progress: &mut (dyn FnMut(PostProgress<'_>) + Send),
    ) -> Result<()> {
        let parallel = if wave.is_parallel() { self.options.parallel.max(1) } else { 1 };
        loop {
            while self.running.len() < parallel {
                let free = waiting
                    .iter()
                    .position(|step| self.running.iter().all(|(other, _)| step.is_free_of(other)));
                let Some(index) = free else { break };
                let step = waiting.remove(index);
                self.report(&step, progress);
                self.start(step).await?;
            }
            let Some(ended) = self.busy.join_next().await else { return Ok(()) };
            let (session, step, outcome) =
                ended.map_err(|e| Error::Bug(format!("a schema statement: {e}")))?;
            self.running.retain(|(other, _)| other.id != step.id);
            outcome?;
            self.idle.push(session);
            self.done += 1;
            self.report(&step, progress);
        }
    }

    fn report(&self, step: &Step, progress: &mut (dyn FnMut(PostProgress<'_>) + Send)) {
        let statement = step.statement.sql.as_str();
        progress(PostProgress { done: self.done, total: self.total, statement });
    }

    async fn start(&mut self, step: Step) -> Result<()> {
        let mut session = self.session().await?;
        self.running.push((step.clone(), session.cancel_handle()));
        let mut sqls: Vec<String> = step
            .statement
            .settings
            .iter()
            .filter_map(|(name, value)| set_local(name, value, &self.known))
            .collect();
        sqls.push(step.statement.sql.clone());
        sqls.push(record(&self.options.job, &step.id));
        self.busy.spawn(async move {
            let outcome = attempt(&mut session, &sqls).await;
            (session, step, outcome)
        });
        Ok(())
    }

    /// Stops what is under way. The server would otherwise go on building for a client that is
    /// gone, and be in the way of the next run.
    async fn cancel(&mut self) {
        for (_, handle) in self.running.drain(..) {
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
