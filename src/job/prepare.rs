//! Check; then publication, slot, and the target's tables.
//!
//! The slot is made before the dump is taken, so that nothing can fall between them: a column added
//! after the dump is in the stream, where it is noticed. The slot's snapshot stays open for the
//! copy; a run that comes later reads under a fresh one.

use super::run::{JobConfig, Notice, Report, Runner, published};
use super::state::Event;
use super::{Error, Result, check};
use crate::catalog::Selection;
use crate::id::Stream;
use crate::pg::{Purpose, Session};
use crate::source::{Blocker, publication, slot};
use crate::{apply, schema};

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
        let name = self.config.job.object(Stream::Forward);
        let tables = self.tables(&self.config.source).await?;
        let mut source = Session::connect(&self.config.source, Purpose::Sql).await?;
        let marked = !self.row().await?.abilities.source.origin;
        let wanted = published(&self.config.job, &tables, marked);
        publication::ensure(&mut source, &name, &wanted).await?;
        self.make_slot(&mut source, &name).await?;
        let dump = match self.store.load_dump().await? {
            Some((pre, post)) => schema::Dump { pre, post },
            None => {
                self.say(Notice::Said("dumping the schema".to_string()));
                let options = schema::Options {
                    no_owner: !self.config.owners,
                    no_privileges: !self.config.owners,
                    ..schema::Options::default()
                };
                let dump = schema::dump(&self.config.source, &self.selection, &options).await?;
                self.store.save_dump(&dump.pre, &dump.post).await?;
                dump
            }
        };
        self.say(Notice::Said("creating tables on the target".to_string()));
        let job = self.config.job.as_str().to_string();
        for sql in schema::apply_pre(&mut self.store.session, &dump, &job).await? {
            self.say(Notice::Said(format!("warning: the role may not, and it is left out: {sql}")));
        }
        Ok(Event::SchemaMade)
    }

    /// Nothing has been applied yet in this phase, so a slot that is already there (from a run that
    /// died here) may go on being used, and progress of an earlier life under the same name is
    /// forgotten together with making a new one (law 4).
    async fn make_slot(&mut self, source: &mut Session, name: &str) -> Result<()> {
        let made = self.row().await?.slot_lsn.is_some();
        if made && slot::status(source, name).await?.is_some() {
            return Ok(());
        }
        slot::drop(source, name).await?;
        self.say(Notice::Said("creating the replication slot".to_string()));
        let maker = Session::connect(&self.config.source, Purpose::Replication).await?;
        let options = self.slot_options(name);
        let held = slot::create(maker, source, &options, self.tell_blockers()).await?;
        let kind = self.row().await?.abilities.target.progress();
        apply::begin_at(&mut self.store.session, name, kind, held.consistent_lsn).await?;
        self.store.set_slot_lsn(held.consistent_lsn).await?;
        self.slot = Some(held);
        Ok(())
    }

    /// How this job makes a slot.
    pub(super) fn slot_options(&self, name: &str) -> slot::CreateOptions {
        slot::CreateOptions {
            name: name.to_string(),
            plugin: "pgoutput".to_string(),
            temporary: false,
            wait: self.config.slot_timeout,
        }
    }

    /// Says whom a slot's creation waits for, each one once.
    pub(super) fn tell_blockers(&self) -> impl FnMut(&[Blocker]) + use<> {
        let report = self.report.clone();
        let mut told = std::collections::HashSet::new();
        move |blockers: &[Blocker]| {
            for blocker in blockers {
                if told.insert((blocker.pid, blocker.xid)) {
                    report(Notice::Said(format!("the slot waits for {blocker}")));
                }
            }
        }
    }
}

/// Looks at both sides; warnings are told, errors are one error.
pub(super) async fn check_ready(
    config: &JobConfig,
    selection: &Selection,
    report: &Report,
) -> Result<()> {
    let mut options = check::CheckOptions::new(config.job.clone());
    options.selection = selection.clone();
    options.copy_jobs = config.jobs;
    let mut found = check::run(&config.source, &config.target, options.clone()).await?;
    while found.findings.iter().any(|finding| finding.code == "unreachable") {
        // To a person this is a finding; the runner was there a moment ago, and knows from the
        // error itself whether to try again.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        Session::connect(&config.source, Purpose::Sql).await?;
        Session::connect(&config.target, Purpose::Sql).await?;
        found = check::run(&config.source, &config.target, options.clone()).await?;
    }
    let mut errors = Vec::new();
    for finding in &found.findings {
        match finding.level {
            check::Level::Error => errors.push(format!("{finding}")),
            check::Level::Warning => report(Notice::Said(format!("warning: {finding}"))),
            check::Level::Info => {}
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(Error::NotReady(errors.join("; "))) }
}
