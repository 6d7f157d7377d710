//! What stands in the way of a move, found before anything is made.
//!
//! Why it exists: every refusal that PostgreSQL or the network would give hours into a job can be
//! had in a second beforehand, with the statement that mends it. Users of other tools found their
//! slot hanging on an old transaction after 5 hours (pgcopydb#819), the slot's WAL at 2855 GB
//! (pgdog#914), and the rights for the way back missing when they needed it (vitess#16794).
//!
//! Steps: connect to both sides as a job would, plainly and for replication; read what each server
//! says of itself; compare; measure the WAL rate over a second. Rights are tried where trying is
//! harmless (`SET LOCAL session_replication_role`), since clouds grant what the catalogs deny.
//!
//! Nothing is written anywhere, so nothing survives a crash (expressions of a map are tried on a
//! temporary table, which is rolled back). A question that a server refuses to
//! answer becomes a warning, never the end of the check.
//!
//! Left out: free disk space, but for a target on this very machine (SQL does not show it; sizes
//! are told instead); what a route needs, which the route asks itself; the rows (that is what
//! verify is for).

mod borders;
mod brought;
mod carried;
mod disk;
mod end;
mod failover;
mod finding;
mod given;
mod identity;
mod mapped;
mod objects;
mod older;
mod publication;
mod reading;
mod rights;
mod server;
mod standbys;
mod tables;
mod target;
mod tools;
mod traffic;
mod two_phase;
mod two_way;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::apply::conflict::Policy;
use crate::catalog::{self, Selection, Table};
use crate::id::JobName;
use crate::map::Map;
use crate::pg::{self, Config, Session};

use super::config::JobConfig;
use super::failover::Failover;
use super::place::Buffer;
use super::reading::Wanted;
use super::state::Phase;
pub use carried::not_carried;
use end::End;
pub use finding::{Finding, Level, Report, Side};
pub(super) use two_way::refuse_unfit;

/// What the job is going to be.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// Its name: objects of an earlier job of that name are in the way.
    pub job: JobName,
    /// Its tables.
    pub selection: Selection,
    /// What becomes of its tables on the way.
    pub map: Option<Arc<Map>>,
    /// There is to be no way back.
    pub one_way: bool,
    /// Large objects move with the tables.
    pub large_objects: bool,
    /// Decoder and transport, where they are not left to be chosen.
    pub wanted: Wanted,
    /// Transactions in progress are to be sent.
    pub streaming: bool,
    /// Prepared transactions are to be carried as such.
    pub two_phase: bool,
    /// Whether slots are made such that standbys keep copies of them.
    pub failover: Failover,
    /// Standbys of the source that are to have slots of their own.
    pub standbys: Vec<Config>,
    /// A standby of the source that is to be decoded from.
    pub decode_from: Option<Config>,
    /// Applications are to write to both sides, and who wins a conflict.
    pub two_way: Option<Policy>,
    /// The target is a copy that somebody else made: nothing is made there, all has to be there.
    pub brought: bool,
    /// Other jobs write the same tables of the target, which are there.
    pub shared: bool,
    /// Tables without a replica identity are moved all the same, and see INSERT alone meanwhile.
    pub insert_only: bool,
    /// Tables that are altered on the source are on the target as well, by the stream.
    pub alters: bool,
    /// Where a spool is to be, on this machine.
    pub spool: Option<PathBuf>,
    /// Parallel copies: each needs a connection on both sides.
    pub copy_jobs: usize,
    /// Sessions that build indexes on the target beside those.
    pub index_jobs: usize,
    /// Whether a way back will be armed, for which both sides need the rights of the other.
    pub reverse: bool,
    /// Assumed speed of the copy in bytes per second, all jobs together.
    pub copy_bytes_per_second: u64,
    /// How long the WAL rate is measured.
    pub wal_sample: Duration,
    /// Not at all where the source sets no limit that it could break: a run would only wait.
    pub sample_only_for_limit: bool,
    /// Transactions that hold an xid for longer are reported.
    pub transaction_age: Duration,
    /// Prepared transactions older than this are errors: nobody is coming back for them.
    pub prepared_age: Duration,
}

impl CheckOptions {
    /// A whole database with a way back: 4 copy jobs, 50 MB/s, WAL measured for a second,
    /// transactions older than 30 s, prepared ones of an hour.
    pub fn new(job: JobName) -> CheckOptions {
        CheckOptions {
            job,
            selection: Selection::default(),
            map: None,
            one_way: false,
            large_objects: true,
            wanted: Wanted::default(),
            streaming: false,
            two_phase: false,
            failover: Failover::Auto,
            standbys: Vec::new(),
            decode_from: None,
            two_way: None,
            brought: false,
            shared: false,
            insert_only: false,
            alters: false,
            spool: None,
            copy_jobs: 4,
            index_jobs: 0,
            reverse: true,
            copy_bytes_per_second: 50_000_000,
            wal_sample: Duration::from_secs(1),
            sample_only_for_limit: false,
            transaction_age: Duration::from_secs(30),
            prepared_age: Duration::from_secs(3600),
        }
    }

    /// What a job is going to be by its options.
    pub fn of(config: &JobConfig, selection: Selection) -> CheckOptions {
        CheckOptions {
            selection,
            map: config.map.clone(),
            one_way: config.one_way,
            large_objects: config.options.moves_large_objects(),
            wanted: config.wanted.clone(),
            streaming: config.streaming.is_some(),
            two_phase: config.two_phase,
            failover: config.failover,
            standbys: config.standbys.clone(),
            decode_from: config.decode_from.clone(),
            two_way: config.two_way.clone(),
            brought: config.options.brought,
            shared: config.options.shared,
            insert_only: config.insert_only,
            alters: config.ddl.is_some(),
            spool: match &config.buffer.kind {
                Some(Buffer::Spool(dir)) => Some(dir.clone()),
                _ => None,
            },
            copy_jobs: config.jobs,
            index_jobs: config.jobs_beside_copy(),
            // Without a way back none of its rights is asked for.
            reverse: !config.is_one_way(),
            ..CheckOptions::new(config.job.clone())
        }
    }
}

/// Both ends and what is found at them.
struct Check<'a> {
    options: &'a CheckOptions,
    source: End,
    target: End,
    /// Tables of the source that the selection names.
    tables: Vec<Table>,
    findings: Vec<Finding>,
    /// The phase of a job of this name that has begun: what it made is not in its own way.
    begun: Option<Phase>,
}

/// Looks at both sides. Takes a second or two; writes nothing.
///
/// A side that cannot be reached is a finding, and then the only ones are of that kind.
///
/// # Errors
/// Where a connection breaks in the middle, or a server answers what no version of PostgreSQL does.
pub async fn run(source: &Config, target: &Config, options: CheckOptions) -> pg::Result<Report> {
    let ends = tokio::join!(End::open(Side::Source, source), End::open(Side::Target, target));
    let (mut source, mut target) = match ends {
        (Ok(source), Ok(target)) => (source, target),
        (source, target) => {
            let failures = [(Side::Source, source.err()), (Side::Target, target.err())];
            let findings = failures.into_iter().filter_map(|(side, e)| Some((side, e?)));
            return Ok(Report::new(findings.map(|(s, e)| server::unreachable(s, &e)).collect()));
        }
    };
    let start = traffic::Sample::take(&mut source).await?;
    let tables = catalog::tables(&mut source.session, &options.selection).await?;
    let begun = begun(&mut target.session, &options.job).await?;
    let findings = begun.iter().map(|phase| existing(*phase, &options.job)).collect();
    let mut check = Check { options: &options, source, target, tables, findings, begun };
    check.findings.extend(options.spool.as_deref().and_then(disk::unfit_spool));
    check.patterns().await?;
    check.servers().await?;
    check.rights().await?;
    check.reading().await?;
    check.two_phase().await?;
    check.failover().await?;
    check.standbys().await?;
    check.two_way().await?;
    check.published().await?;
    check.tables().await?;
    check.identities().await?;
    check.mapped().await?;
    check.objects().await?;
    check.carried().await?;
    match options.brought {
        true => check.brought().await?,
        false if options.shared => check.both_leftovers().await?,
        false => {
            check.older().await?;
            check.target().await?;
            check.tools().await;
        }
    }
    check.traffic(start).await?;
    Ok(Report::new(check.findings))
}

/// The phase of a job of this name that has made something.
async fn begun(target: &mut Session, job: &JobName) -> pg::Result<Option<Phase>> {
    let sql = "select phase from walferry.job where name = $1";
    let row = match target.query_opt(sql, &[Some(job.as_str())]).await {
        // There is none, or the last job there ends just now and takes its tables with it.
        Err(error) if matches!(error.code(), Some("42P01" | "3F000")) => None,
        row => row?,
    };
    let phase = row.map(|row| row.parse::<Phase>(0)).transpose()?;
    Ok(phase.filter(|phase| *phase > Phase::Checked))
}

fn existing(phase: Phase, job: &JobName) -> Finding {
    let object = format!("job {job}");
    if matches!(phase, Phase::Finished | Phase::Canceled) {
        let message = format!("is {phase}, and its history is kept: give a new job another --name");
        return Finding::error(Side::Target, "job-has-ended", object, message);
    }
    let message = format!(
        "has begun and is {phase}: what it made is not reported as being in the way; `walferry \
         run` goes on with it"
    );
    Finding::info(Side::Target, "job-has-begun", object, message)
}

impl Check<'_> {
    /// Adds what a part of the check found; a refusal by the server becomes a warning.
    fn take(&mut self, side: Side, what: &str, found: pg::Result<Vec<Finding>>) -> pg::Result<()> {
        self.findings.extend(or_unreadable(side, what, found)?);
        Ok(())
    }
}

/// What was found; where the server refused to be asked, a warning that says so.
fn or_unreadable(
    side: Side,
    what: &str,
    found: pg::Result<Vec<Finding>>,
) -> pg::Result<Vec<Finding>> {
    match found {
        // Seen besides missing rights: an extension's control file that the server cannot read.
        Err(error) if error.code().is_some() && !error.is_closed() => {
            let message = format!("cannot be looked at, look yourself: {error}");
            Ok(vec![Finding::warning(side, "unreadable", what, message)])
        }
        found => found,
    }
}
