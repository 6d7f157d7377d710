//! `--ddl` without event triggers: indexes, constraints, NOT NULL and defaults, which no stream
//! shows ([`crate::schema::silent`]), looked for beside the stream and made as the policy says.
//!
//! A look at the source is of now, and the target is behind. So what a look has found waits until
//! the target has applied what was there by then; and it is done only if the next look finds it
//! still so, as rows that come meanwhile may not fit what is gone again. What the target refuses is
//! tried again with the next look, and said once.
//!
//! What is left to be run by hand, or was refused, is kept in `walferry.awaited` until the target
//! has it: status and every cutover name it. Tables that are new are [`super::joining`]'s.
//!
//! What the source had is kept in `walferry.source_object`, first as it was when the schema was
//! copied, and moved on one by one in the transaction that does it. So each is done once, through
//! any crash.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::joining::Newcomers;
use super::pipeline::Task;
use super::run::{Notice, Report, Runner};
use super::state::Phase;
use super::store::Store;
use super::{Error, Result};
use crate::apply::Applied;
use crate::catalog::Selection;
use crate::id::{JobName, Stream};
use crate::limit::CATALOG_WAIT;
use crate::lsn::Lsn;
use crate::pg::{CancelHandle, Config, Purpose, Session};
use crate::schema::captured;
use crate::schema::policy::{Action, Policy};
use crate::schema::silent::{Change, Key, Look, Objects, Todo, changes, look, todo};

/// Between two looks.
const TURN: Duration = Duration::from_secs(5);

/// While something that was found waits to be seen again.
const SOON: Duration = Duration::from_secs(1);

/// Such a statement does not queue for a lock in front of the stream for longer.
pub(super) const LOCK_TIMEOUT: &str = "set lock_timeout = '5s'";

/// Looks that are taken for as long as this lives.
pub(super) struct Silent {
    _task: Task<()>,
    statement: Arc<Mutex<Option<CancelHandle>>>,
    /// Tables that are new are noted.
    noted: Arc<AtomicBool>,
}

/// Looks at both catalogs.
pub(super) struct Watcher {
    pub(super) source: Config,
    target: Config,
    pub(super) selection: Selection,
    job: JobName,
    stream: String,
    pub(super) policy: Policy,
    pub(super) report: Report,
    /// Where the job takes in tables that are new.
    pub(super) newcomers: Option<Newcomers>,
    applied: watch::Receiver<Applied>,
    /// The look before, and where the source's log stood then.
    seen: Option<(Look, Lsn)>,
    said: HashSet<String>,
    /// What `walferry.awaited` has, once that is known.
    awaited: Option<BTreeMap<String, String>>,
    statement: Arc<Mutex<Option<CancelHandle>>>,
}

impl Watcher {
    async fn watch(mut self) {
        loop {
            let pause = match self.turn().await {
                Ok(true) => SOON,
                Ok(false) => TURN,
                Err(error) => {
                    tracing::debug!(%error, "catalogs could not be compared");
                    TURN
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// True if something was found that waits.
    async fn turn(&mut self) -> Result<bool> {
        let mut source = Session::control(&self.source).await?.with_patience(CATALOG_WAIT);
        let now = look(&mut source, &self.selection).await?;
        // Read after it: what was seen had committed before.
        let lsn = source.query_one("select pg_catalog.pg_current_wal_insert_lsn()", &[]).await?;
        let lsn = lsn.lsn(0)?;
        let target = Session::connect(&self.target, Purpose::Sql).await?;
        let mut home = Store::new(target, self.job.clone());
        let mut awaited = BTreeMap::new();
        let soon = self.meet_newcomers(&mut source, &mut home, &mut awaited).await?;
        let mut target = home.session;
        let mut known = load(&mut target, self.job.as_str()).await?;
        self.add_columns_of_stream(&mut target, &mut known).await?;
        let Some((before, seen_lsn)) = self.seen.take() else {
            let waits = known != now.objects;
            self.seen = Some((now, lsn));
            return Ok(waits || soon);
        };
        if self.applied.borrow().applied_lsn < seen_lsn {
            let waits = known != now.objects;
            self.seen = Some((before, seen_lsn));
            return Ok(waits || soon);
        }
        let still = |change: &Change| before.objects.get(&change.key) == change.now.as_ref();
        let found: Vec<Change> = changes(&known, &now.objects);
        let (ripe, fresh): (Vec<Change>, Vec<Change>) = found.into_iter().partition(still);
        for change in &ripe {
            if let Some(sql) = self.carry(&mut target, change, &now).await? {
                awaited.insert(key_text(&change.key)?, sql);
            }
        }
        self.keep_awaited(&mut target, awaited).await?;
        self.seen = Some((now, lsn));
        Ok(!fresh.is_empty() || soon)
    }

    /// Defaults and NOT NULL of columns that came by the stream, or have another name by it, are
    /// the source's too, though no look may have seen them there.
    async fn add_columns_of_stream(&self, target: &mut Session, known: &mut Objects) -> Result<()> {
        let sql = "select schema, name, sql from walferry.altered where stream = $1 \
             and sql ~ ' (add|rename) column '";
        let rows = target.query_params(sql, &[Some(&self.stream)]).await?;
        if rows.is_empty() {
            return Ok(());
        }
        let mut altered = Vec::with_capacity(rows.len());
        for row in &rows {
            altered.push((row.string(0)?, row.string(1)?, row.string(2)?));
        }
        let of_stream = |key: &Key| {
            let names = (&key.schema, &key.table);
            let mut here = altered.iter().filter(|(schema, table, _)| (schema, table) == names);
            here.any(|(_, _, sql)| key.is_of_column_in(sql))
        };
        for (key, definition) in look(target, &self.selection).await?.objects {
            if of_stream(&key) {
                known.entry(key).or_insert(definition);
            }
        }
        Ok(())
    }

    async fn keep_awaited(
        &mut self,
        target: &mut Session,
        awaited: BTreeMap<String, String>,
    ) -> Result<()> {
        if self.awaited.as_ref() == Some(&awaited) {
            return Ok(());
        }
        let sql = "with gone as (delete from walferry.awaited where job = $1 \
               and not $2::jsonb ? key) \
             insert into walferry.awaited (job, key, sql) \
             select $1, o.key, o.value from pg_catalog.jsonb_each_text($2::jsonb) o \
             on conflict (job, key) do update set sql = excluded.sql";
        let all = serde_json::to_string(&awaited).map_err(|e| Error::State(e.to_string()))?;
        target.query_params(sql, &[Some(self.job.as_str()), Some(&all)]).await?;
        self.awaited = Some(awaited);
        Ok(())
    }

    /// Gives what is to be run on the target and was not.
    async fn carry(
        &mut self,
        target: &mut Session,
        change: &Change,
        here: &Look,
    ) -> Result<Option<String>> {
        let there = look(target, &self.selection).await?;
        let statements = match todo(change, here, &there) {
            Todo::Nothing => {
                store(target, self.job.as_str(), change).await?;
                return Ok(None);
            }
            Todo::Wait => return Ok(None),
            Todo::Differs => {
                let key = &change.key;
                self.say(format!(
                    "warning: {} of {}.{} was changed on the source, and is another one on the \
                     target: it is left alone",
                    key.name, key.schema, key.table
                ));
                return Ok(None);
            }
            Todo::Run(statements) => statements,
        };
        let sql = statements.join("; ");
        if self.policy.of(change.key.kind.class()) != Action::Apply {
            self.say(format!("warning: the stream is silent about it, run on the target: {sql}"));
            return Ok(Some(sql));
        }
        self.at_work(Some(target.cancel_handle()));
        let ran = run(target, self.job.as_str(), &self.stream, change, &statements).await;
        self.at_work(None);
        match ran {
            Ok(()) => {
                (self.report)(Notice::Said(format!("the source has it, made here: {sql}")));
                Ok(None)
            }
            Err(Error::Pg(error)) if error.is_closed() => Err(error.into()),
            Err(error) => {
                self.say(format!("warning: tried again with the next look: {sql}: {error}"));
                Ok(Some(sql))
            }
        }
    }

    /// What a flip has to end in its server.
    pub(super) fn at_work(&self, handle: Option<CancelHandle>) {
        *self.statement.lock().unwrap_or_else(PoisonError::into_inner) = handle;
    }

    pub(super) fn say(&mut self, text: String) {
        if self.said.insert(text.clone()) {
            (self.report)(Notice::Said(text));
        }
    }
}

/// One change, in one transaction with what is remembered of it.
async fn run(
    target: &mut Session,
    job: &str,
    stream: &str,
    change: &Change,
    statements: &[String],
) -> Result<()> {
    target.execute(LOCK_TIMEOUT).await?;
    target.execute("begin").await?;
    let work = async {
        for sql in statements {
            target.execute(sql).await?;
        }
        let Key { schema, table, .. } = &change.key;
        let sql = "insert into walferry.altered (stream, schema, name, sql) \
             values ($1, $2, $3, $4)";
        let all = statements.join("; ");
        target.query_params(sql, &[Some(stream), Some(schema), Some(table), Some(&all)]).await?;
        store(target, job, change).await?;
        target.execute("commit").await?;
        Ok(())
    };
    let worked: Result<()> = work.await;
    if worked.is_err() && target.in_transaction() {
        target.execute("rollback").await?;
    }
    worked
}

fn key_text(key: &Key) -> Result<String> {
    serde_json::to_string(key).map_err(|e| Error::State(e.to_string()))
}

async fn store(target: &mut Session, job: &str, change: &Change) -> Result<()> {
    let key = key_text(&change.key)?;
    let Some(now) = &change.now else {
        let sql = "delete from walferry.source_object where job = $1 and key = $2";
        target.query_params(sql, &[Some(job), Some(&key)]).await?;
        return Ok(());
    };
    let sql = "insert into walferry.source_object (job, key, definition) values ($1, $2, $3) \
         on conflict (job, key) do update set definition = excluded.definition";
    target.query_params(sql, &[Some(job), Some(&key), Some(now)]).await?;
    Ok(())
}

async fn load(target: &mut Session, job: &str) -> Result<Objects> {
    let sql = "select key, definition from walferry.source_object where job = $1";
    let mut objects = Objects::new();
    for row in target.query_params(sql, &[Some(job)]).await? {
        let key = serde_json::from_str(row.str(0)?)
            .map_err(|e| Error::State(format!("walferry.source_object: {e}")))?;
        objects.insert(key, row.string(1)?);
    }
    Ok(objects)
}

/// What the source has and no stream shows, as SQL that is to be run on the target.
pub(super) async fn awaited(home: &mut Session, job: &str) -> Result<Vec<String>> {
    let there = "select pg_catalog.to_regclass('walferry.awaited') is not null";
    if !home.query_one(there, &[]).await?.bool(0)? {
        return Ok(Vec::new());
    }
    let sql = "select sql from walferry.awaited where job = $1 order by key";
    let rows = home.query_params(sql, &[Some(job)]).await?;
    rows.iter().map(|row| Ok(row.string(0)?)).collect()
}

impl Runner {
    /// Keeps what the source has as its schema is copied. `from` is the source, or a copy of it
    /// that somebody else made.
    pub(super) async fn remember_objects(&mut self, from: &mut Session) -> Result<()> {
        let objects = look(from, &self.selection).await?.objects;
        let mut all = Vec::with_capacity(objects.len());
        for (key, definition) in &objects {
            all.push((key_text(key)?, definition));
        }
        let all = serde_json::to_string(&all).map_err(|e| Error::State(e.to_string()))?;
        let sql = "with gone as (delete from walferry.source_object where job = $1) \
             insert into walferry.source_object (job, key, definition) \
             select $1, o ->> 0, o ->> 1 from pg_catalog.jsonb_array_elements($2::jsonb) o \
             on conflict (job, key) do update set definition = excluded.definition";
        let job = self.config.job.as_str();
        self.store.session.query_params(sql, &[Some(job), Some(&all)]).await?;
        Ok(())
    }

    /// Looks while the forward stream is followed, if DDL is wanted and no event trigger tells it.
    pub(super) async fn keep_looking(&mut self, phase: Phase) -> Result<()> {
        let (Some(policy), Some(pipe)) = (self.config.ddl, &self.forward) else { return Ok(()) };
        // Under other names nothing could be held against the source.
        if phase != Phase::Following || self.silent.is_some() || self.config.map.is_some() {
            return Ok(());
        }
        let applied = pipe.applied.clone();
        if policy.captures() {
            let mut source = Session::control(&self.config.source).await?;
            if captured::is_installed(&mut source, &self.config.job).await? {
                return Ok(());
            }
        }
        let statement = Arc::new(Mutex::new(None));
        let newcomers = self.newcomers().await?;
        let noted = newcomers.as_ref().map(|these| these.noted.clone()).unwrap_or_default();
        let watcher = Watcher {
            source: self.config.source.clone(),
            target: self.config.target.clone(),
            selection: self.selection.clone(),
            job: self.config.job.clone(),
            stream: self.config.job.object(Stream::Forward),
            policy,
            report: self.report.clone(),
            newcomers,
            applied,
            seen: None,
            said: HashSet::new(),
            awaited: None,
            statement: statement.clone(),
        };
        let _task = Task(tokio::spawn(watcher.watch()));
        self.silent = Some(Silent { _task, statement, noted });
        Ok(())
    }

    /// True once tables that are new may be taken in.
    pub(super) fn may_join(&self) -> bool {
        let noted = self.silent.as_ref().map(|silent| silent.noted.load(Ordering::SeqCst));
        noted.unwrap_or(false) && self.hold.is_none()
    }

    /// Before a flip: ends a statement in its server too, which would keep its locks.
    pub(super) async fn stop_looking(&mut self) {
        let Some(silent) = self.silent.take() else { return };
        let handle = silent.statement.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(silent);
        if let Some(handle) = handle {
            let _ = handle.cancel().await;
        }
    }
}
