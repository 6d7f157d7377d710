//! The cutover of all pairs, with its record in the home database, and what a crash left of one.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::layout::{Layout, Pair};
use super::pairs::Pairs;
use super::store::{Stage, Store};
use super::{Error, Reshard};
use crate::cutover::{self, Joint, JointJournal, Leaving, Limits, Outcome, run_joint, undo_joint};
use crate::id::{QualifiedName, Stream};
use crate::job::store::FlipRecord;
use crate::job::{self, Phase, Result};
use crate::lsn::Lsn;
use crate::pg::Session;
use crate::route;

/// How long a route may take to let clients through before it is tried again.
const RELEASE_WAIT: Duration = Duration::from_secs(30);

/// Streams that have just begun anew are still connecting.
const FLOW_WAIT: Duration = Duration::from_secs(10);

/// A cutover as asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Wanted {
    /// Tells this attempt from others.
    pub attempt: String,
    /// `--route`, hooks alone, as they are stored.
    pub routes: Vec<String>,
    /// How long it may take.
    #[serde(flatten)]
    pub limits: Limits,
    /// `--dry-run`.
    pub dry_run: bool,
}

/// What is stored of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    wanted: Wanted,
    /// Clients were let through, and every pair knows.
    #[serde(default)]
    settled: bool,
    /// Once it is past the point of no return: barriers in the order of the sources.
    #[serde(default)]
    barriers: Vec<String>,
    /// How long writers had been held by then, in milliseconds.
    #[serde(default)]
    held_ms: f64,
}

impl Record {
    fn new(wanted: &Wanted) -> Record {
        Record { wanted: wanted.clone(), settled: false, barriers: Vec::new(), held_ms: 0.0 }
    }

    fn read(flip: Option<Value>) -> Result<Record> {
        let none = || job::Error::State("walferry.reshard has no flip".to_string());
        let read = serde_json::from_value(flip.ok_or_else(none)?);
        read.map_err(|e| job::Error::State(format!("walferry.reshard.flip: {e}")))
    }
}

/// Writes into the home database.
struct Journal<'a> {
    store: &'a mut Store,
    record: Record,
}

impl JointJournal for Journal<'_> {
    async fn begin(&mut self, steps: &[&str]) -> cutover::Result<()> {
        let noted = self.store.note(&self.record.wanted.attempt, steps).await;
        noted.map_err(|error| cutover::Error::Journal(error.to_string()))
    }

    async fn point_of_no_return(
        &mut self,
        barriers: &[Lsn],
        held: Duration,
    ) -> cutover::Result<()> {
        self.record.barriers = barriers.iter().map(Lsn::to_string).collect();
        self.record.held_ms = held.as_secs_f64() * 1e3;
        let stored = self.store.set_stage(Stage::Switched, &json!(self.record)).await;
        stored.map_err(|error| cutover::Error::Journal(error.to_string()))
    }
}

impl Reshard {
    /// What routes are told: the first source and the first target stand for all.
    fn context(&self) -> Result<route::Context> {
        let (source, target) = match (self.sources.first(), self.targets.first()) {
            (Some(source), Some(target)) => (source.clone(), target.clone()),
            _ => return Err(super::layout::unfit("there are no servers".to_string())),
        };
        Ok(route::Context {
            job: self.name.clone(),
            flip: Stream::Forward,
            source,
            target,
            scope: format!("{} sources to {} targets", self.sources.len(), self.targets.len()),
            tables: Vec::new(),
            is_group: false,
            reads: false,
        })
    }

    /// Leads all over, or up to the gates for a dry run. On an error all is as before, unless its
    /// fault says to look at the stage again.
    pub(super) async fn fly(
        &self,
        store: &mut Store,
        pairs: &mut Pairs,
        layout: &Layout,
        wanted: &Wanted,
    ) -> Result<Outcome> {
        let waiting = pairs.not_at(self, Phase::Following).await?;
        if !waiting.is_empty() {
            return Err(Error::NotFollowing { waiting }.into());
        }
        // A table that came since is in no stream.
        if self.layout().await? != *layout {
            let problem = "tables or columns of the sources changed since it began".to_string();
            return Err(super::layout::unfit(problem));
        }
        pairs.until_flowing(FLOW_WAIT).await;
        let mut plan = self.plan(pairs, layout, wanted)?;
        let record = Record::new(wanted);
        if !wanted.dry_run {
            store.set_stage(Stage::CuttingOver, &json!(record)).await?;
        }
        let mut journal = Journal { store: &mut *store, record };
        let outcome = run_joint(&mut plan, &mut journal).await;
        let doubtful = matches!(
            outcome,
            Err(cutover::Error::Unknown { .. } | cutover::Error::NotUndone { .. })
        );
        if outcome.is_err() && !doubtful && !wanted.dry_run {
            store.set_stage(Stage::Running, &json!(Record::new(wanted))).await?;
        }
        Ok(outcome?)
    }

    fn plan(&self, pairs: &Pairs, layout: &Layout, wanted: &Wanted) -> Result<Joint> {
        let mut sources = Vec::new();
        for (place, source) in self.sources.iter().enumerate() {
            let own = layout.0.iter().filter(|(_, slices)| slices.is_some() || place == 0);
            let tables: Vec<QualifiedName> = own.map(|(name, _)| name.clone()).collect();
            let carries = pairs.carries(place).ok_or(cutover::Error::StreamStopped)?;
            sources.push(Leaving { live: self.named(source), tables, carries });
        }
        Ok(Joint {
            job: self.name.clone(),
            sources,
            targets: self.targets.iter().map(|target| self.named(target)).collect(),
            routes: self.base.secrets.routes(&wanted.routes)?,
            context: self.context()?,
            limits: wanted.limits,
            dry_run: wanted.dry_run,
        })
    }

    /// Takes back a cutover that a crash left half done. May be repeated.
    pub(super) async fn undo(&self, store: &mut Store, flip: Option<Value>) -> Result<()> {
        let record = Record::read(flip)?;
        let lives: Vec<_> = self.sources.iter().map(|source| self.named(source)).collect();
        let routes = self.base.secrets.routes(&record.wanted.routes)?;
        undo_joint(&self.name, &lives, &routes, &self.context()?).await?;
        store.set_stage(Stage::Running, &json!(record)).await?;
        let error = "the cutover was cut short, and undone: nothing was switched";
        store.answer(&json!({ "attempt": record.wanted.attempt, "error": error })).await
    }

    /// Goes on past the point of no return: every pair is told, and clients are let through. No
    /// runner of a pair may be alive. May be repeated.
    pub(super) async fn settle(
        &self,
        store: &mut Store,
        pairs: &[Pair],
        flip: Option<Value>,
    ) -> Result<()> {
        let mut record = Record::read(flip)?;
        if record.settled {
            return Ok(());
        }
        for pair in pairs {
            let home = Session::control(&pair.config.target).await?;
            let mut own = job::store::Store::new(home, pair.config.job.clone());
            if own.load_existing().await?.phase == Phase::Following {
                let noted = noted(&record, pair.source);
                own.set_phase_and_flip(Phase::Switched, &noted).await?;
            }
        }
        let (routes, context) = (self.base.secrets.routes(&record.wanted.routes)?, self.context()?);
        let released = cutover::release(&routes, &context, |_| {});
        let released = tokio::time::timeout(RELEASE_WAIT, released).await;
        released.map_err(|_| cutover::Error::NoAnswer { waited: RELEASE_WAIT })??;
        record.settled = true;
        store.set_stage(Stage::Switched, &json!(record)).await
    }

    /// What a switch did, where nothing of it is left to be done.
    pub(super) fn settled(flip: Option<Value>) -> Option<Value> {
        let record = Record::read(flip).ok().filter(|record| record.settled)?;
        let (barriers, held_ms) = (record.barriers.join(" "), record.held_ms);
        Some(json!({ "switched_lsn": barriers, "fenced_ms": held_ms, "released": true }))
    }
}

/// What a pair's job keeps of it.
fn noted(record: &Record, source: usize) -> FlipRecord {
    FlipRecord {
        from: Phase::Following.to_string(),
        attempt: record.wanted.attempt.clone(),
        flip: Stream::Forward.to_string(),
        fence: cutover::FenceKind::Lock.as_str().to_string(),
        routes: Vec::new(),
        skipped: Vec::new(),
        earlier_routes: Vec::new(),
        released: true,
        switched_lsn: record.barriers.get(source).cloned(),
        fenced_ms: Some(record.held_ms),
        refresh_due: false,
        group: None,
    }
}
