//! One runner at a time: an advisory lock on the home database.
//!
//! The lock belongs to a session of its own that does nothing else, so it is free the moment its
//! holder's process dies, and within seconds of its network dying (the session asks its server for
//! short TCP keepalives). A holder that hangs, its host and network well, is told by its silence:
//! the session is used every second, and its server ends one that is idle for half a minute. From
//! 14 on that is a setting; before, only sessions inside a transaction are looked at in this way,
//! so there it waits in one, of a second, with neither a snapshot nor a transaction id that would
//! hold anything up. What a dead predecessor left running is ended before the new holder works: a
//! backend that still builds an index or applies a batch would otherwise race it.

use std::time::Duration;

use super::error::Error;
use super::run::JobConfig;
use super::{Result, client};
use crate::clock::Deadline;
use crate::id::JobName;
use crate::pg::{Config, Pipeline, Session};

/// Class of our advisory locks: "walf" would not fit a role's own numbers by accident.
const LOCK_CLASS: i32 = 0x77_61_6c_66;

/// The right to run a job, held while this lives.
#[derive(Debug)]
pub struct Lease {
    session: Session,
    holder: Holder,
    /// It waits in a transaction.
    in_transaction: bool,
}

/// The next transaction to wait in. Under a database's default of repeatable read it would keep a
/// snapshot.
const NEXT: &str = "commit; begin isolation level read committed; select 1";

/// The backend that holds a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: i32,
    /// When it was started; process ids are used again.
    pub started: String,
}

impl Lease {
    /// Takes the lease if it is free; `None` if another runner holds it. `home` must carry the
    /// application name of [`application_name`].
    pub async fn try_take(home: &Config, job: &JobName) -> Result<Option<Lease>> {
        Self::try_take_named(home, job.as_str()).await
    }

    /// The same of any name: [`capture_name`], for the process that reads the source into a topic.
    pub async fn try_take_named(home: &Config, name: &str) -> Result<Option<Lease>> {
        let mut session = Session::control(home).await?;
        // Not every platform or socket has these; where they are refused the defaults stay.
        let mut keepalives = Pipeline::new();
        for (name, value) in [("idle", 5), ("interval", 3), ("count", 3)] {
            keepalives.once(&format!("set tcp_keepalives_{name} = {value}"));
        }
        // It is asked every second: silent for longer, its holder is gone, cut off, or hangs.
        // https://www.postgresql.org/docs/current/runtime-config-client.html
        let in_transaction = session.major_version() < 14;
        let idle = if in_transaction { "idle_in_transaction_session" } else { "idle_session" };
        let mut lock = Pipeline::new();
        lock.once(&format!("set {idle}_timeout = '30s'"));
        lock.ask(
            "select pg_catalog.pg_try_advisory_lock($1, pg_catalog.hashtext($2)), \
             (select backend_start from pg_catalog.pg_stat_activity \
                where pid = pg_catalog.pg_backend_pid())",
            &[Some(&LOCK_CLASS.to_string()), Some(name)],
        );
        let [_, locked] = session.exchange_each([keepalives, lock]).await?;
        let locked = locked?;
        let Some(row) = locked.first() else {
            return Err(Error::State("no answer about the lease".to_string()));
        };
        let started = row.opt(1)?.unwrap_or_default().to_string();
        let holder = Holder { pid: session.process_id(), started };
        if !row.bool(0)? {
            return Ok(None);
        }
        if in_transaction {
            session.execute(&format!("begin; {NEXT}")).await?;
        }
        Ok(Some(Lease { session, holder, in_transaction }))
    }

    /// Fails once the lease is lost with its session. Cheap; asked every second.
    pub async fn check(&mut self) -> Result<()> {
        let asking = self.session.query(if self.in_transaction { NEXT } else { "select 1" });
        match tokio::time::timeout(Duration::from_secs(10), asking).await {
            Ok(answer) => answer.map(|_| ()).map_err(Error::from),
            Err(_) => Err(Error::LeaseLost),
        }
    }

    /// True if finish or cancel asks for the runner's end; answers them.
    pub async fn stop_asked(&mut self, job: &JobName) -> Result<bool> {
        let asking = client::take_stop(&mut self.session, job);
        let asked = tokio::time::timeout(Duration::from_secs(10), asking).await;
        let asked = asked.map_err(|_| Error::LeaseLost)??;
        if self.in_transaction {
            // Commits that it was heard, and lets the table's lock go.
            self.check().await?;
        }
        Ok(asked)
    }

    /// Process id of the backend that holds it.
    pub fn process_id(&self) -> i32 {
        self.session.process_id()
    }

    /// The backend that holds it.
    pub fn holder(&self) -> &Holder {
        &self.holder
    }
}

/// The lease, waiting a little for a predecessor whose session its server has not yet noticed dead.
///
/// `last` is the lease this very process had before: where the network swallowed its end, the
/// server holds on to it, and it is ended here. Errors: [`Error::Busy`] after a second; longer
/// where it turns out to be free then, and is taken again by somebody.
pub async fn take(home: &Config, job: &JobName, last: Option<&Holder>) -> Result<Lease> {
    for turn in 0..60 {
        if let Some(lease) = Lease::try_take(home, job).await? {
            return Ok(lease);
        }
        if let Some(last) = last.filter(|_| turn == 1) {
            let mut session = Session::control(home).await?;
            session
                .query_params(
                    "select pg_catalog.pg_terminate_backend(pid) \
                     from pg_catalog.pg_stat_activity where pid = $1 and backend_start = $2",
                    &[Some(&last.pid.to_string()), Some(&last.started)],
                )
                .await?;
        }
        if turn % 20 == 19 {
            let mut session = Session::control(home).await?;
            if let Some(pid) = holder(&mut session, job).await? {
                return Err(Error::Busy { job: job.to_string(), pid });
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(Error::Busy { job: job.to_string(), pid: String::new() })
}

/// The lease, and a runner's sessions: with the home database, with it for notifications, and with
/// the source. All at once, as each takes several round trips; none does anything before the lease
/// is there and predecessors are gone.
pub(super) async fn take_with_sessions(
    config: &JobConfig,
    last: Option<&Holder>,
) -> Result<(Lease, Result<[Session; 3]>)> {
    let (lease, home, listener, source) = tokio::join!(
        take(&config.target, &config.job, last),
        Session::control(&config.target),
        Session::control(&config.target),
        Session::control(&config.source),
    );
    let lease = lease?;
    let keep = |listener: &Session| [lease.process_id(), listener.process_id()];
    let sessions = async {
        let (mut home, listener, source) = (home?, listener?, source?);
        end_predecessors(&mut home, &config.job, &keep(&listener)).await?;
        Ok([home, listener, source])
    };
    let sessions = sessions.await;
    Ok((lease, sessions))
}

/// What a runner's sessions are called in pg_stat_activity.
pub fn application_name(job: &JobName) -> String {
    format!("walferry run {job}")
}

/// The lease of who reads the job's source into a topic. Has a letter that no job's name has.
pub fn capture_name(job: &JobName) -> String {
    format!("{job}/capture")
}

/// What its sessions are called in pg_stat_activity.
pub fn capture_application_name(job: &JobName) -> String {
    format!("walferry capture {job}")
}

/// Ends sessions that a dead runner of this job left on a server, and waits until they are gone.
/// `keep` are process ids of ours.
pub async fn end_predecessors(session: &mut Session, job: &JobName, keep: &[i32]) -> Result<()> {
    end_sessions(session, &application_name(job), keep).await
}

/// The same by the name of the sessions.
pub async fn end_sessions(session: &mut Session, name: &str, keep: &[i32]) -> Result<()> {
    let keep: Vec<String> = keep.iter().map(i32::to_string).collect();
    let keep = format!("{{{}}}", keep.join(","));
    let deadline = Deadline::after(Duration::from_secs(30));
    loop {
        let left = session
            .query_params(
                "select pid, pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity \
                 where application_name = $1 and pid <> pg_catalog.pg_backend_pid() \
                 and datname = pg_catalog.current_database() and pid <> all ($2::int[])",
                &[Some(name), Some(&keep)],
            )
            .await?;
        if left.is_empty() {
            return Ok(());
        }
        if deadline.passed() {
            let pid = left.first().map(|r| r.string(0)).transpose()?.unwrap_or_default();
            return Err(Error::Predecessor { peer: session.peer().to_string(), pid });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The backend that holds a job's lease, if one does.
pub async fn holder(session: &mut Session, job: &JobName) -> Result<Option<String>> {
    holder_of(session, job.as_str()).await
}

/// The same of any name.
pub async fn holder_of(session: &mut Session, name: &str) -> Result<Option<String>> {
    let row = session
        .query_opt(
            "select pid from pg_catalog.pg_locks where locktype = 'advisory' and granted \
             and classid::int8 = $1 and objsubid = 2 \
             and objid = (select oid from \
                (select (pg_catalog.hashtext($2)::int8 & 4294967295)) h(oid)) \
             and database = (select oid from pg_catalog.pg_database \
                where datname = pg_catalog.current_database())",
            &[Some(&LOCK_CLASS.to_string()), Some(name)],
        )
        .await?;
    Ok(row.map(|r| r.string(0)).transpose()?)
}
