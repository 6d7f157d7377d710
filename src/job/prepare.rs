//! Check; then publication, slot, and the target's tables.
//!
//! The slot is made before the dump is taken, so that nothing can fall between them: a column added
//! after the dump is in the stream, where it is noticed. The slot's snapshot stays open for the
//! copy; a run that comes later reads under a fresh one.

use super::admit::{may_have_tables, system_of};
use super::check::CheckOptions;
use super::reading::{Reading, Wanted, choose, refuse_blind, refuse_garbled};
use super::run::{JobConfig, Notice, Report, Runner, published};
use super::state::Event;
use super::store::Store;
use super::{Error, Result, altering, check, mapped};
use crate::catalog::{Selection, Table};
use crate::decode::Plugin;
use crate::id::{QualifiedName, Stream};
use crate::pg::{Purpose, Session, SlotKind};
use crate::source::{Blocker, Transport, publication, slot};
use crate::{apply, catalog, schema};

impl Runner {
    /// Looks for what stands in the way; errors stop the job before anything is made.
    pub(super) async fn check(&mut self) -> Result<Event> {
        if !self.checked {
            check_ready(&self.config, &self.selection, &self.report).await?;
        }
        Ok(Event::CheckPassed)
    }

    /// Publication, slot, dump, pre-data. Every part finds out whether it was done before.
    pub(super) async fn make_schema(&mut self) -> Result<Event> {
        if self.config.options.brought {
            return self.take_copy().await;
        }
        let name = self.config.job.object(Stream::Forward);
        let tables = self.tables(&self.config.source).await?;
        let mut source = Session::connect(&self.config.source, Purpose::Sql).await?;
        let marked = !self.row().await?.abilities.source.origin;
        let mut followed = published(&self.config.job, &tables, marked);
        let captures = self.may_capture(&mut source).await?;
        if captures {
            schema::captured::make_table(&mut source, &self.config.job).await?;
            followed.push(self.config.job.captured());
        }
        let reading = self.choose_reading(Stream::Forward, &followed).await?;
        match self.config.options.publication.is_some() {
            true => self.keep_publication(&mut source, &tables, marked).await?,
            false => publish(&mut source, &name, &followed, &reading).await?,
        }
        self.narrow(&mut source, &name, &tables).await?;
        let unmade = self.row().await?.slot_lsn.is_none();
        let described = altering::describe_all(&mut source).await?;
        self.make_slot(&mut source, &name, &reading).await?;
        // A publication may show less of them.
        if unmade && self.config.options.publication.is_none() {
            apply::altered::remember(&mut self.store.session, &name, &described).await?;
        }
        let dump = match self.store.load_dump().await? {
            Some((pre, post)) => schema::Dump { pre, post },
            None if self.config.options.shared => {
                self.store.save_dump("", "").await?;
                schema::Dump { pre: String::new(), post: String::new() }
            }
            None => {
                self.say(Notice::Said("dumping the schema".to_string()));
                let options = schema::Options {
                    no_owner: !self.config.owners,
                    no_privileges: !self.config.owners,
                    ..schema::Options::default()
                };
                let selection = self.selection_by_dump()?;
                let dump = schema::dump(&self.config.source, &selection, &options).await?;
                let dump = self.fitted(dump, source.major_version())?;
                self.remember_objects(&mut source).await?;
                self.store.save_dump(&dump.pre, &dump.post).await?;
                dump
            }
        };
        if captures {
            self.capture_ddl(&mut source, &name, &reading).await?;
        }
        self.say(Notice::Said("creating tables on the target".to_string()));
        let job = self.config.job.as_str().to_string();
        // Not the session for short statements: an extension may take its time.
        let mut target = Session::connect(&self.config.target, Purpose::Sql).await?;
        for sql in schema::apply_pre(&mut target, &dump, &job).await? {
            self.say(Notice::Said(format!("warning: the role may not, and it is left out: {sql}")));
        }
        if let Some(map) = self.config.map.clone() {
            let tables = self.tables(&self.config.source).await?;
            mapped::make_tables(&mut target, &map, tables).await?;
        }
        Ok(Event::SchemaMade)
    }

    /// Has the source leave out what the map's filters leave out, where it can.
    async fn narrow(&mut self, source: &mut Session, name: &str, tables: &[Table]) -> Result<()> {
        let ours = self.config.options.publication.is_none();
        let Some(map) = self.config.map.clone().filter(|_| ours) else { return Ok(()) };
        let narrowed = publication::narrow(source, name, &mapped::filters(&map, tables)).await?;
        for table in narrowed {
            self.say(Notice::Said(format!("the source leaves out rows of {table} by itself")));
        }
        Ok(())
    }

    /// DDL may be captured where all of it is wanted, in a job of all tables, and where nothing
    /// that it makes on the target acts on rows.
    pub(super) async fn may_capture(&mut self, source: &mut Session) -> Result<bool> {
        let options = &self.config.options;
        let chosen = self.selection.tables_only
            || self.config.map.is_some()
            || !options.include.is_empty()
            || !options.exclude.is_empty()
            || !options.schema_only.is_empty();
        let wanted = self.config.ddl.is_some_and(|policy| policy.captures());
        let replica_role = self.row().await?.abilities.target.replica_role;
        Ok(wanted && !chosen && replica_role && may_have_tables(source).await?)
    }

    /// After the dump, which has all that was there before.
    pub(super) async fn capture_ddl(
        &mut self,
        source: &mut Session,
        name: &str,
        reading: &Reading,
    ) -> Result<()> {
        // Others tell a table by the catalog of now, which may be far ahead of what was captured.
        let said = match reading.plugin()? == Plugin::Pgoutput {
            false => "only pgoutput goes with event triggers: DDL is told from the stream alone",
            true => match schema::captured::install(source, &self.config.job, Some(name)).await? {
                true => "DDL of the source is captured by an event trigger",
                false => "the role may make no event trigger: DDL is told from the stream alone",
            },
        };
        self.say(Notice::Said(said.to_string()));
        Ok(())
    }

    /// What an administrator's publication gives, as it is before the slot is made.
    async fn keep_publication(
        &mut self,
        source: &mut Session,
        tables: &[Table],
        marked: bool,
    ) -> Result<()> {
        let name = self.config.job.object(Stream::Forward);
        let made = self.row().await?.slot_lsn.is_some();
        let mut readings = self.store.load_readings().await?;
        if made && readings.publication.is_some() && slot::status(source, &name).await?.is_some() {
            return Ok(());
        }
        let own = published(&self.config.job, &[], marked);
        self.take_publication(source, &mut readings, tables, &own).await?;
        self.store.save_readings(&readings).await
    }

    /// The schema as the target can take it, where that is older than the source.
    fn fitted(&self, dump: schema::Dump, source_major: u32) -> Result<schema::Dump> {
        let (major, peer) =
            (self.store.session.major_version(), self.store.session.peer().to_string());
        if major >= source_major {
            return Ok(dump);
        }
        let fitted = schema::fit(&dump, major).map_err(schema::Error::Script)?;
        if !fitted.refused.is_empty() {
            return Err(schema::Error::TooNew { peer, major, objects: fitted.refused }.into());
        }
        for what in &fitted.left_out {
            let said = format!("warning: PostgreSQL {major} does not know it, left out: {what}");
            self.say(Notice::Said(said));
        }
        Ok(fitted.dump)
    }

    /// Nothing has been applied yet in this phase, so a slot that is already there (from a run that
    /// died here) may go on being used, and progress of an earlier life under the same name is
    /// forgotten together with making a new one (law 4).
    ///
    /// A slot made by SQL, or on a standby, has none: the copy takes one of its own, and exact
    /// visibility tells which of the slot's transactions are in it.
    async fn make_slot(
        &mut self,
        source: &mut Session,
        name: &str,
        reading: &Reading,
    ) -> Result<()> {
        let made = self.row().await?.slot_lsn.is_some();
        let mut there = Session::control(self.config.read_at(Stream::Forward)).await?;
        if made && slot::status(&mut there, name).await?.is_some() {
            return Ok(());
        }
        slot::drop(&mut there, name).await?;
        if let Some(place) = &self.spool {
            // What an earlier slot of this name gave is of no use to this one.
            super::place::remove(place, name).await?;
        }
        self.say(Notice::Said("creating the replication slot".to_string()));
        let options = self.slot_options(name, reading, source);
        let waiting = self.tell_blockers();
        let lsn = match (self.config.decode_from.clone(), reading.transport()?) {
            (Some(standby), _) => {
                let options = slot::CreateOptions { kind: SlotKind::Permanent, ..options };
                self.make_slot_there(source, &standby, &options).await?
            }
            (None, Transport::Stream) => {
                let maker = Session::connect(&self.config.source, Purpose::Replication).await?;
                let held = slot::create(maker, source, &options, waiting).await?;
                self.slot.insert(held).consistent_lsn
            }
            (None, Transport::Pull) => {
                let mut maker = Session::connect(&self.config.source, Purpose::Sql).await?;
                slot::create_plain(&mut maker, source, &options, waiting).await?
            }
        };
        let kind = self.row().await?.abilities.target.progress();
        apply::begin_at(&mut self.store.session, name, kind, lsn).await?;
        self.store.set_system(Stream::Forward, &system_of(source).await?).await?;
        self.keep_place().await?;
        self.store.set_slot_lsn(lsn).await?;
        Ok(())
    }

    /// How a stream is read: as stored, with another transport where one is asked for now.
    pub(super) async fn reading(&mut self, stream: Stream) -> Result<Reading> {
        stored_reading(&self.config, &mut self.store, stream).await
    }

    /// The same before the stream's slot is made: chosen now, unless a slot was made already.
    pub(super) async fn choose_reading(
        &mut self,
        stream: Stream,
        tables: &[QualifiedName],
    ) -> Result<Reading> {
        let made = self.row().await?.slot_lsn.is_some();
        let mut readings = self.store.load_readings().await?;
        let side = match stream {
            Stream::Forward => &self.config.source,
            Stream::Reverse => &self.config.target,
        };
        if stream == Stream::Forward && made && readings.forward.is_some() {
            return self.reading(stream).await;
        }
        let (wanted, job) = (&self.config.wanted, &self.config.job);
        let chosen = match choose(side, job, stream, tables, wanted).await {
            // What was asked for is for the source; the target may be another kind of server.
            Err(Error::NoDecoder { .. }) if stream == Stream::Reverse => {
                choose(side, job, stream, tables, &Wanted { decoder: None, ..wanted.clone() })
                    .await?
            }
            chosen => chosen?,
        };
        *readings.of(stream) = Some(chosen.reading.clone());
        let mut session = Session::connect(side, Purpose::Sql).await?;
        let oids = catalog::oids(&mut session, tables).await?;
        readings.follow_tables(stream, tables, &oids);
        self.store.save_readings(&readings).await?;
        self.say(Notice::Said(format!("{stream} stream: {chosen}")));
        Ok(chosen.reading)
    }

    /// How this job makes a slot on a side.
    pub(super) fn slot_options(
        &self,
        name: &str,
        reading: &Reading,
        side: &Session,
    ) -> slot::CreateOptions {
        slot::CreateOptions {
            name: name.to_string(),
            plugin: reading.decoder.clone(),
            kind: self.config.failover.kind(side.major_version(), self.config.two_phase),
            wait: self.config.slot_timeout,
        }
    }

    /// Says whom a slot's creation waits for, each one once.
    pub(super) fn tell_blockers(&self) -> impl FnMut(&[Blocker]) + use<> {
        tell_blockers(&self.report, "the slot")
    }
}

/// Says for whom `what` waits, each one once.
pub(super) fn tell_blockers(report: &Report, what: &'static str) -> impl FnMut(&[Blocker]) + use<> {
    let report = report.clone();
    let mut told = std::collections::HashSet::new();
    move |blockers: &[Blocker]| {
        for blocker in blockers {
            if told.insert((blocker.pid, blocker.xid)) {
                report(Notice::Said(format!("{what} waits for {blocker}")));
            }
        }
    }
}

/// Only pgoutput needs a publication.
pub(super) async fn publish(
    session: &mut Session,
    name: &str,
    tables: &[QualifiedName],
    reading: &Reading,
) -> Result<()> {
    if reading.plugin()? == Plugin::Pgoutput {
        publication::ensure(session, name, tables).await?;
    }
    Ok(())
}

/// Looks at both sides; warnings are told, errors are one error.
pub(super) async fn check_ready(
    config: &JobConfig,
    selection: &Selection,
    report: &Report,
) -> Result<()> {
    let mut options = CheckOptions::of(config, selection.clone());
    options.sample_only_for_limit = true;
    let mut found = check::run(&config.source, &config.target, options.clone()).await?;
    while found.findings.iter().any(|finding| finding.code == "unreachable") {
        // To a person this is a finding; the runner was there a moment ago, and knows from the
        // error itself whether to try again.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        Session::connect(&config.source, Purpose::Sql).await?;
        Session::connect(&config.target, Purpose::Sql).await?;
        found = check::run(&config.source, &config.target, options.clone()).await?;
    }
    refuse_errors(found.findings.iter(), report)
}

/// Tells warnings; errors are one error.
pub(super) fn refuse_errors<'a>(
    findings: impl Iterator<Item = &'a check::Finding>,
    report: &Report,
) -> Result<()> {
    let mut errors = Vec::new();
    for finding in findings {
        match finding.level {
            check::Level::Error => errors.push(format!("{finding}")),
            check::Level::Warning => report(Notice::Said(format!("warning: {finding}"))),
            check::Level::Info => {}
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(Error::NotReady(errors.join("; "))) }
}

/// How a stream is read: as stored, with another transport where one is asked for now.
pub(super) async fn stored_reading(
    config: &JobConfig,
    store: &mut Store,
    stream: Stream,
) -> Result<Reading> {
    let mut readings = store.load_readings().await?;
    let side = match stream {
        Stream::Forward => &config.source,
        Stream::Reverse => &config.target,
    };
    let reading = readings.of(stream).get_or_insert_default();
    let stored = reading.clone();
    let mut wanted = config.wanted.clone();
    if stream == Stream::Reverse {
        wanted.decoder = None; // Its own, which may differ.
    }
    let changed = reading.follow(&wanted)?;
    let reading = reading.clone();
    refuse_blind(side, &config.job, &reading).await?;
    if changed {
        match refuse_garbled(side, &reading).await {
            // What was asked for is for the source; the target may be another kind of server.
            Err(Error::NoDecoder { .. }) if stream == Stream::Reverse => return Ok(stored),
            refused => refused?,
        }
        store.save_readings(&readings).await?;
    }
    Ok(reading)
}
