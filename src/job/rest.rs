//! What no stream carries, as a job does it: large objects copied after the rows and brought level
//! before every flip, unlogged tables copied again inside the fence, materialized views refreshed.
//!
//! All that may take long is done before anybody is held, while whoever asked for the flip can
//! still go away: the looks are repeated until one is short. What is left for the fence is what has
//! changed since the last look.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::request::{FlipRequest, stream_of};
use super::run::{JobConfig, Notice, Report, Runner};
use super::state::Phase;
use super::store::JobRow;
use super::{Error, Result};
use crate::catalog::TableKind;
use crate::copy::Again;
use crate::cutover::{self, Large, Rest};
use crate::id::{QualifiedName, Stream};
use crate::large::{self, Mark};
use crate::pg::{Config, Purpose, Session};
use crate::schema::{self, Unrefreshed};

/// Looks for changed large objects before a flip: each is shorter than the one before, unless they
/// are changed faster than they can be copied.
const ROUNDS: usize = 10;

/// A look that takes no longer than this is short enough not to be repeated.
const SHORT: Duration = Duration::from_millis(500);

/// Bytes of unlogged tables that are copied in a second, at the least: an assumption, on the slow
/// side, for the decision whether writers may wait for it.
const UNLOGGED_BYTES_PER_SECOND: u64 = 20 << 20;

/// `--refresh`: when materialized views are refreshed on the side that becomes live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Refresh {
    /// Before writers are held.
    #[default]
    Before,
    /// Once applications are there, by the runner.
    After,
    /// By somebody else.
    Never,
}

/// `--unlogged`: what becomes of the rows of unlogged tables at a flip.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unlogged {
    /// Copied again while writers are held.
    #[default]
    Copy,
    /// Left as they are on the other side.
    Leave,
    /// Nothing is switched while there are any.
    Refuse,
}

impl FromStr for Refresh {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Refresh, String> {
        match text {
            "before" => Ok(Refresh::Before),
            "after" => Ok(Refresh::After),
            "never" => Ok(Refresh::Never),
            _ => Err(format!("\"{text}\" is none of before, after and never")),
        }
    }
}

impl FromStr for Unlogged {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Unlogged, String> {
        match text {
            "copy" => Ok(Unlogged::Copy),
            "leave" => Ok(Unlogged::Leave),
            "refuse" => Ok(Unlogged::Refuse),
            _ => Err(format!("\"{text}\" is none of copy, leave and refuse")),
        }
    }
}

impl fmt::Display for Refresh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refresh::Before => "before",
            Refresh::After => "after",
            Refresh::Never => "never",
        })
    }
}

/// Materialized views being refreshed beside the runner's other work.
#[derive(Debug)]
pub(super) struct Refreshing(JoinHandle<()>);

impl Drop for Refreshing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Runner {
    /// Live side and the other one of a flip.
    fn ends(&self, flip: Stream) -> (Config, Config) {
        let (source, target) = (self.config.source.clone(), self.config.target.clone());
        match flip {
            Stream::Forward => (source, target),
            Stream::Reverse => (target, source),
        }
    }

    /// The copy of large objects, after that of the rows. Goes on where it was cut short.
    pub(super) async fn copy_large_objects(&mut self) -> Result<()> {
        if !self.begin_large_objects().await? {
            return Ok(());
        }
        let mut source = Session::connect(&self.config.source, Purpose::Sql).await?;
        let count = large::count(&mut source).await?;
        if count > 0 {
            self.say(Notice::Said(format!("copying {count} large objects")));
        }
        self.level_large_objects(Stream::Forward).await?;
        Ok(())
    }

    /// True if large objects move. Notes that before the first is written: whatever the target has
    /// from then on is ours.
    async fn begin_large_objects(&mut self) -> Result<bool> {
        if !self.config.options.moves_large_objects() {
            return Ok(false);
        }
        let home = &mut self.store.session;
        if moves_large_objects(home, &self.config).await? {
            return Ok(true);
        }
        let job = self.config.job.as_str();
        let there = large::count(home).await?;
        if there > 0 && !self.config.options.brought {
            let mut source = Session::connect(&self.config.source, Purpose::Sql).await?;
            if large::count(&mut source).await? == 0 {
                return Ok(false);
            }
            let peer = home.peer().to_string();
            return Err(cutover::Error::Large(large::Error::NotEmpty { peer, count: there }).into());
        }
        let sql = "insert into walferry.large_object (job, side) values ($1, 'source')";
        home.query_params(sql, &[Some(job)]).await?;
        Ok(true)
    }

    async fn mark(&mut self, side: &str) -> Result<Option<Mark>> {
        load_mark(&mut self.store.session, self.config.job.as_str(), side).await
    }

    async fn set_mark(&mut self, side: &str, mark: Mark) -> Result<()> {
        let (xmin, count) = (mark.xmin.to_string(), mark.count.to_string());
        let job = Some(self.config.job.as_str());
        let sql = "insert into walferry.large_object (job, side, snapshot_xmin, objects) \
             values ($1, $2, $3, $4) on conflict (job, side) \
             do update set snapshot_xmin = excluded.snapshot_xmin, objects = excluded.objects";
        self.store.session.query_params(sql, &[job, Some(side), Some(&xmin), Some(&count)]).await?;
        Ok(())
    }

    /// One pass; gives how long it took, and whether it wrote anything.
    async fn level_large_objects(&mut self, flip: Stream) -> Result<(Duration, bool)> {
        let (live, dest) = self.ends(flip);
        let since = self.mark(side_of(flip)).await?;
        let mut live = Session::connect(&live, Purpose::Sql).await?;
        let mut dest = Session::connect(&dest, Purpose::Sql).await?;
        let begun = Instant::now();
        let levelled = large::level(&mut live, &mut dest, since, self.config.owners).await;
        let levelled = levelled.map_err(cutover::Error::from)?;
        self.set_mark(side_of(flip), levelled.mark).await?;
        for what in &levelled.left {
            self.say(Notice::Said(format!("warning: {what}")));
        }
        if levelled.copied + levelled.removed > 0 {
            self.say(Notice::Said(format!(
                "large objects: {} copied ({} bytes), {} removed",
                levelled.copied, levelled.bytes, levelled.removed
            )));
        }
        Ok((begun.elapsed(), levelled.copied + levelled.removed > 0))
    }

    /// What takes long, before a flip and before anybody is held.
    pub(super) async fn approach(&mut self, request: &FlipRequest) -> Result<()> {
        let flip = request.stream();
        if request.dry_run {
            return Ok(());
        }
        if self.begin_large_objects().await? {
            for _ in 0..ROUNDS {
                let (took, wrote) = self.level_large_objects(flip).await?;
                if took < SHORT || !wrote {
                    break;
                }
            }
        }
        if request.refresh == Refresh::Before {
            let (live, dest) = self.ends(flip);
            let failed = refresh(&live, &dest, &self.selection, false, &self.report).await?;
            let refused: Vec<String> = failed
                .iter()
                .filter(|failed| !failed.denied)
                .map(|failed| format!("{}: {}", failed.view, failed.error))
                .collect();
            if !refused.is_empty() {
                return Err(cutover::Error::Refresh { views: refused }.into());
            }
            self.unrefreshed = failed;
        }
        Ok(())
    }

    /// What is left for the fence; refused where that would hold writers for too long.
    pub(super) async fn rest(&mut self, flip: Stream, request: &FlipRequest) -> Result<Rest> {
        let max_hold = request.limits.max_hold;
        let unlogged = self.unlogged(flip, request, max_hold).await?;
        if !self.begin_large_objects().await? {
            return Ok(Rest { large: None, unlogged });
        }
        let looking = async {
            match request.dry_run {
                true => self.look_for_large_objects(flip).await,
                false => Ok(self.level_large_objects(flip).await?.0),
            }
        };
        // What is cut short here is gone on with by the next attempt.
        let limit = max_hold / 2;
        let took = tokio::time::timeout(limit, looking).await.unwrap_or(Ok(limit))?;
        if took >= limit {
            self.renew_home().await?;
            return Err(cutover::Error::LargeSlow { took, max_hold }.into());
        }
        let since = self.mark(side_of(flip)).await?;
        let (live, dest) = self.ends(flip);
        let mut live = Session::connect(&live, Purpose::Sql).await?;
        let mut dest = Session::connect(&dest, Purpose::Sql).await?;
        let large = Large {
            since,
            sees_pages: large::sees_pages(&mut live).await?,
            dest: large::mark(&mut dest).await?,
            owners: self.config.owners,
            level: None,
        };
        Ok(Rest { large: Some(large), unlogged })
    }

    async fn look_for_large_objects(&mut self, flip: Stream) -> Result<Duration> {
        let (live, dest) = self.ends(flip);
        let since = self.mark(side_of(flip)).await?;
        let mut live = Session::connect(&live, Purpose::Sql).await?;
        let mut dest = Session::connect(&dest, Purpose::Sql).await?;
        let begun = Instant::now();
        let changed = large::look(&mut live, &mut dest, since).await;
        let changed = changed.map_err(cutover::Error::from)?;
        if changed > 0 {
            self.say(Notice::Said(format!("{changed} large objects have changed")));
        }
        Ok(begun.elapsed())
    }

    async fn unlogged(
        &mut self,
        flip: Stream,
        request: &FlipRequest,
        max_hold: Duration,
    ) -> Result<Option<Again>> {
        let (live, dest) = self.ends(flip);
        let mut tables = self.tables_with_rows(&live).await?;
        tables.retain(|table| table.unlogged && table.kind == TableKind::Plain);
        if tables.is_empty() || request.unlogged == Unlogged::Leave {
            return Ok(None);
        }
        let names: Vec<String> = tables.iter().map(|table| table.name.to_string()).collect();
        if request.unlogged == Unlogged::Refuse {
            let mut session = Session::control(&live).await?;
            let mut filled = Vec::new();
            for table in &tables {
                let sql = format!("select 1 from only {} limit 1", table.name.quoted());
                filled.extend(session.query_opt(&sql, &[]).await?.map(|_| table.name.to_string()));
            }
            if !filled.is_empty() {
                return Err(cutover::Error::UnloggedRefused { tables: filled }.into());
            }
            return Ok(None);
        }
        let bytes: u64 = tables.iter().map(|table| table.bytes).sum();
        let takes = Duration::from_millis(bytes * 1000 / UNLOGGED_BYTES_PER_SECOND);
        if takes > max_hold / 2 {
            let megabytes = bytes >> 20;
            let tables = names;
            return Err(cutover::Error::UnloggedSlow { tables, megabytes, takes, max_hold }.into());
        }
        let again = Again::prepare(&live, &dest, tables).await;
        Ok(Some(again.map_err(cutover::Error::from)?))
    }

    /// Keeps the marks of a flip that was made, for the next one either way.
    pub(super) async fn keep_marks(&mut self, flip: Stream, rest: &Rest) -> Result<()> {
        if let Some((live, dest)) = rest.large.as_ref().and_then(|large| large.level) {
            self.set_mark(side_of(flip), live).await?;
            self.set_mark(side_of(flip.opposite()), dest).await?;
        }
        Ok(())
    }

    /// After a flip with `--refresh after`, and after a crash since.
    pub(super) async fn refresh_beside(&mut self, row: &JobRow) -> Result<()> {
        let flown = matches!(row.phase, Phase::Switched | Phase::RolledBack);
        let due = row.flip.as_ref().filter(|flip| flown && flip.refresh_due);
        let Some(record) = due.filter(|_| self.refreshing.is_none()) else { return Ok(()) };
        let (old, live) = self.ends(stream_of(&record.flip));
        let (home, job) = (self.config.target.clone(), self.config.job.to_string());
        let (selection, report) = (self.selection.clone(), self.report.clone());
        let attempt = record.attempt.clone();
        let task = async move {
            let failed = refresh(&old, &live, &selection, true, &report).await?;
            for failed in failed {
                let (view, error) = (failed.view, failed.error);
                report(Notice::Said(format!("warning: {view} is not refreshed: {error}")));
            }
            let mut session = Session::connect(&home, Purpose::Sql).await?;
            let sql = "update walferry.job set flip = flip || '{\"refresh_due\": false}' \
                 where name = $1 and flip ->> 'attempt' = $2";
            session.query_params(sql, &[Some(&job), Some(&attempt)]).await?;
            Ok::<(), Error>(())
        };
        let report = self.report.clone();
        self.refreshing = Some(Refreshing(tokio::spawn(async move {
            if let Err(error) = task.await {
                report(Notice::Said(format!("warning: materialized views: {error}")));
            }
        })));
        Ok(())
    }
}

/// The live side of a flip, as marks name it.
fn side_of(flip: Stream) -> &'static str {
    match flip {
        Stream::Forward => "source",
        Stream::Reverse => "target",
    }
}

/// True if the job takes large objects along and has begun to.
pub async fn moves_large_objects(home: &mut Session, config: &JobConfig) -> Result<bool> {
    let sql = "select 1 from walferry.large_object where job = $1";
    Ok(config.options.moves_large_objects()
        && home.query_opt(sql, &[Some(config.job.as_str())]).await?.is_some())
}

/// Where `side` stood when both had the same large objects; `None` where that is not known.
pub async fn load_mark(home: &mut Session, job: &str, side: &str) -> Result<Option<Mark>> {
    let sql = "select snapshot_xmin, objects from walferry.large_object \
         where job = $1 and side = $2 and snapshot_xmin is not null";
    let row = home.query_opt(sql, &[Some(job), Some(side)]).await?;
    row.map(|row| Ok(Mark { xmin: row.parse(0)?, count: row.parse(1)? })).transpose()
}

/// Refreshes those of the selection, in the order in which they read each other.
async fn refresh(
    live: &Config,
    dest: &Config,
    selection: &crate::catalog::Selection,
    in_use: bool,
    report: &Report,
) -> Result<Vec<Unrefreshed>> {
    let mut session = Session::connect(live, Purpose::Sql).await?;
    let mut wanted = schema::materialized(&mut session).await?;
    wanted.retain(|(view, _)| selection.has_schema(view));
    let said = |view: &QualifiedName| report(Notice::Said(format!("refreshing {view}")));
    Ok(schema::refresh(dest, &wanted, in_use, said).await?)
}
