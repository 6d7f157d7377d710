//! `walferry slot create`: the source's end of a job, made before a copy that somebody else makes.
//!
//! The order is what matters: publication, then slot, then the copy. So whatever the copy lacks is
//! in the slot. All that is made bears the job's name, and is what a run would have made; the run
//! with `--initial-copy none` finds it. Nothing is written down anywhere else, as the target, where
//! a job has its home, does not exist yet: to give up, `walferry cancel --target-is-gone` cleans
//! the source by name.
//!
//! The slot's snapshot sees just what commits before the slot. It lives as long as
//! [`Reserved::held`], for a pg_dump that reads under it.

use serde::Serialize;

use super::Result;
use super::ability::Ability;
use super::admit::{make_source_tables, may_have_tables};
use super::check::{self, CheckOptions, Side};
use super::prepare::{publish, refuse_errors, tell_blockers};
use super::reading::{self, Wanted};
use super::run::{JobConfig, Notice, Report, published};
use crate::catalog;
use crate::id::Stream;
use crate::pg::{Purpose, Session};
use crate::source::{self, HeldSlot, Transport, identify_by_sql, slot};

/// What was made.
#[derive(Debug, Serialize)]
pub struct Reserved {
    /// The job.
    pub job: String,
    /// The slot.
    pub slot: String,
    /// Its output plugin.
    pub plugin: String,
    /// What it is read by; none for a plugin that needs none.
    pub publication: Option<String>,
    /// Everything that commits at or after this position comes from the slot.
    pub consistent_lsn: String,
    /// The source's own identifier, which every physical copy of it has.
    pub system_identifier: String,
    /// The timeline that the slot is on.
    pub timeline: u32,
    /// Name of the snapshot that sees all before the position, for as long as [`Self::held`] lives.
    pub snapshot: Option<String>,
    /// What keeps it.
    #[serde(skip)]
    pub held: Option<HeldSlot>,
}

/// Makes publication and slot. `config.target` is not used. With `hold`, the slot's snapshot is
/// kept. Waits for open transactions, `config.slot_timeout` at most, and says for which.
///
/// Errors: `NotReady` with what check finds on the source; `SlotExists` where it was made before,
/// as a copy may rely on it.
pub async fn reserve(config: &JobConfig, hold: bool, report: &Report) -> Result<Reserved> {
    let mut source = Session::connect(&config.source, Purpose::Sql).await?;
    let selection = config.options.selection(&mut source).await?;
    let name = config.job.object(Stream::Forward);
    if slot::status(&mut source, &name).await?.is_some() {
        return Err(source::Error::SlotExists { slot: name }.into());
    }
    check_source(config, &selection, report).await?;
    if may_have_tables(&mut source).await? {
        make_source_tables(config, &mut source).await?;
    }
    let marked = !Ability::probe(&mut source).await?.origin;
    let mut tables = catalog::tables(&mut source, &selection).await?;
    tables.retain(|table| selection.has_rows(&table.name) && !table.unlogged);
    let followed = published(&config.job, &tables, marked);
    let wanted = Wanted {
        // A snapshot is exported by the protocol only.
        transport: if hold { Some(Transport::Stream) } else { config.wanted.transport },
        ..config.wanted.clone()
    };
    let chosen =
        reading::choose(&config.source, &config.job, Stream::Forward, &followed, &wanted).await?;
    report(Notice::Said(format!("forward stream: {chosen}")));
    publish(&mut source, &name, &followed, &chosen.reading).await?;
    let options = slot::CreateOptions {
        name: name.clone(),
        plugin: chosen.reading.decoder.clone(),
        kind: config.failover.kind(source.major_version(), config.two_phase),
        wait: config.slot_timeout,
    };
    let waiting = tell_blockers(report, "the slot");
    let (consistent_lsn, held) = match chosen.reading.transport()? {
        Transport::Stream => {
            let maker = Session::connect(&config.source, Purpose::Replication).await?;
            let held = slot::create(maker, &mut source, &options, waiting).await?;
            (held.consistent_lsn, Some(held).filter(|_| hold))
        }
        Transport::Pull => {
            let mut maker = Session::connect(&config.source, Purpose::Sql).await?;
            (slot::create_plain(&mut maker, &mut source, &options, waiting).await?, None)
        }
    };
    let system = identify_by_sql(&mut source).await?;
    let textual = chosen.reading.plugin()?.is_textual();
    Ok(Reserved {
        job: config.job.to_string(),
        publication: (!textual).then(|| name.clone()),
        slot: name,
        plugin: chosen.reading.decoder,
        consistent_lsn: consistent_lsn.to_string(),
        system_identifier: system.system_identifier,
        timeline: system.timeline,
        snapshot: held.as_ref().map(|held| held.snapshot_name.clone()),
        held,
    })
}

/// There is no target yet: the source is held against itself, and what is said of a target is left
/// out. It is said before there is a publication, from which on a table without an identity would
/// refuse the application's own updates.
async fn check_source(
    config: &JobConfig,
    selection: &catalog::Selection,
    report: &Report,
) -> Result<()> {
    let mut options = CheckOptions::new(config.job.clone());
    options.selection = selection.clone();
    options.large_objects = config.options.moves_large_objects();
    options.wanted = config.wanted.clone();
    options.sample_only_for_limit = true;
    options.brought = true;
    let itself = config.source.clone().labelled("target");
    let found = check::run(&config.source, &itself, options).await?;
    let of_source = found.findings.iter().filter(|finding| finding.side == Side::Source);
    refuse_errors(of_source.filter(|finding| !finding.code.starts_with("copy-")), report)
}
