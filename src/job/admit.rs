//! Who may run which job: what a run, a finish and a cancel hold against what is stored before they
//! touch anything, and how servers are told apart.

use super::ability::{Abilities, Ability};
use super::lease;
use super::run::{JobConfig, Report};
use super::seam::Seam;
use super::state::{Event, step};
use super::store::{BESIDE, DDL_BOTH, JobRow, NOT_BESIDE, Store, ensure};
use super::{Error, Result};
use crate::catalog::Selection;
use crate::cutover::canary;
use crate::id::quote_ident;
use crate::pg::{self, Config, Session};
use crate::source::Recorded;
use crate::{apply, copy, schema};

impl JobConfig {
    /// As the runner's sessions are told from all others.
    pub(super) fn with_runner_name(mut self) -> JobConfig {
        let name = lease::application_name(&self.job);
        self.source = self.source.labelled("source").with_application_name(&name);
        self.target = self.target.labelled("target").with_application_name(&name);
        self.decode_from = self.decode_from.map(|standby| standby.with_application_name(&name));
        self
    }
}

/// A job that exists must be the one asked for, on the same servers; for a new one nothing may
/// stand in the way. Nothing is written, so that a mistake leaves no trace. True if check has
/// passed.
pub(super) async fn admit(
    config: &JobConfig,
    selection: &Selection,
    source: &mut Session,
    store: &mut Store,
    report: &Report,
) -> Result<bool> {
    let Some(row) = store.load().await? else {
        super::prepare::check_ready(config, selection, report).await?;
        return Ok(true);
    };
    step(row.phase, Event::Start)?;
    accept_systems(&row, source, &mut store.session).await?;
    if row.options != config.options {
        return Err(Error::OtherOptions {
            job: config.job.to_string(),
            planned: row.options.to_string(),
        });
    }
    if let (Some(given), Some(begun)) = (config.from_lsn, row.slot_lsn)
        && given != begun
    {
        return Err(Seam::Begun { given, begun }.into());
    }
    config.same_map(&row)?;
    Ok(false)
}

/// Schema walferry on both sides, and the job's row.
pub(super) async fn make_tables(
    config: &JobConfig,
    store: &mut Store,
    source: &mut Session,
) -> Result<()> {
    let beside = format!("select {BESIDE}");
    let is_new = store.load().await?.is_none();
    let on_target = async {
        // The row of a job that is there shows that the schema is in use.
        if is_new {
            store.session.execute(&beside).await?;
        }
        store.ensure(&[apply::DDL, copy::DDL, schema::DDL, schema::ASIDE_DDL]).await?;
        if config.two_way.is_some() {
            store.ensure(&[apply::conflict::DDL]).await?;
        }
        probed(&mut store.session, is_new).await
    };
    let on_source = async {
        make_source_tables_beside(config, source).await?;
        probed(source, is_new).await
    };
    let sides = tokio::try_join!(on_target, on_source)?;
    if let (Some((target_system, on_target)), Some((source_system, on_source))) = sides {
        let abilities = Abilities { source: on_source, target: on_target };
        let places = (place(&config.source), place(&config.target));
        let systems = (source_system.as_str(), target_system.as_str());
        store.create((&places.0, &places.1), systems, &config.options, abilities).await?;
    }
    let beside_no_more = format!("select {NOT_BESIDE}");
    source.execute(&beside_no_more).await?;
    if is_new {
        store.session.execute(&beside_no_more).await?;
    }
    Ok(())
}

/// Of a new job's side: its system, and what the role may do there. A job that is there has both.
async fn probed(session: &mut Session, is_new: bool) -> Result<Option<(String, Ability)>> {
    if !is_new {
        return Ok(None);
    }
    Ok(Some((system_of(session).await?, Ability::probe(session).await?)))
}

/// Tables on the source, where the way back keeps its progress.
pub(super) async fn make_source_tables(config: &JobConfig, source: &mut Session) -> Result<()> {
    let canary = canary::ddl(&config.job);
    ensure(source, &[DDL_BOTH, &canary, apply::DDL, schema::ASIDE_DDL]).await?;
    match config.two_way {
        Some(_) => ensure(source, &[apply::conflict::DDL]).await,
        None => Ok(()),
    }
}

/// The same where the role may make them, while no clean-up of another job takes the schema away:
/// until the session ends, or says that it is beside no more.
pub(super) async fn make_source_tables_beside(
    config: &JobConfig,
    source: &mut Session,
) -> Result<()> {
    source.execute(&format!("select {BESIDE}")).await?;
    // Following needs none of them; the way back does, and asks again.
    match may_have_tables(source).await? {
        true => make_source_tables(config, source).await,
        false => Ok(()),
    }
}

/// True if schema walferry is there for us, or we may make it.
pub(super) async fn may_have_tables(session: &mut Session) -> pg::Result<bool> {
    let sql = "select coalesce((select pg_catalog.has_schema_privilege(oid, 'create') \
             and pg_catalog.has_schema_privilege(oid, 'usage') \
             from pg_catalog.pg_namespace where nspname = 'walferry'), \
         pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create'))";
    session.query_one(sql, &[]).await?.bool(0)
}

/// What an administrator gives a role that may not make a schema.
pub(super) fn schema_grant(role: &str) -> String {
    format!("CREATE SCHEMA walferry AUTHORIZATION {};", quote_ident(role))
}

/// What tells one cluster, and one of its histories, from another: `identifier/timeline`. The
/// timeline is that of the log being written: the control file learns of a promotion only at the
/// next checkpoint.
pub(super) async fn system_of(session: &mut Session) -> Result<String> {
    let sql = "select s.system_identifier || '/' || \
           case when pg_catalog.pg_is_in_recovery() then c.timeline_id \
             else ('x' || pg_catalog.left(pg_catalog.pg_walfile_name( \
               pg_catalog.pg_current_wal_flush_lsn()), 8))::bit(32)::int end \
         from pg_catalog.pg_control_system() s, pg_catalog.pg_control_checkpoint() c";
    Ok(session.query_one(sql, &[]).await?.string(0)?)
}

pub(super) fn identifier(system: &str) -> &str {
    system.split('/').next().unwrap_or(system)
}

/// A side's server and slot as they were recorded.
pub(super) fn recorded(side: &Config, system: Option<&str>, plugin: &str) -> Recorded {
    let (identifier, timeline) = system.and_then(|s| s.split_once('/')).unwrap_or_default();
    Recorded {
        system_identifier: identifier.to_string(),
        timeline: timeline.parse().unwrap_or(1),
        database: side.dbname.clone(),
        plugin: plugin.to_string(),
    }
}

/// Host, port and database, for people.
pub(super) fn place(config: &Config) -> String {
    config.hosts.first().map(|host| config.clone().labelled("").peer(host)).unwrap_or_default()
}

/// Refuses to go on with other servers than the job was made with.
pub(super) async fn accept_systems(
    row: &JobRow,
    source: &mut Session,
    target: &mut Session,
) -> Result<()> {
    for (side, stored, session) in
        [("--source", &row.source_system, source), ("--target", &row.target_system, target)]
    {
        let Some(expected) = stored.clone() else { continue };
        let found = system_of(session).await?;
        if identifier(&expected) != identifier(&found) {
            return Err(Error::OtherSystem { side, found, expected });
        }
    }
    Ok(())
}
