//! A cutover or rollback as it is asked for, what is stored of it, and what its routes are told.

use serde::{Deserialize, Serialize};

use super::groups::{Group, Part};
use super::rest::{Refresh, Unlogged};
use super::run::JobConfig;
use super::state::Phase;
use super::store::FlipRecord;
use crate::cutover::Limits;
use crate::id::Stream;
use crate::route;

/// A cutover or rollback as asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FlipRequest {
    /// `forward`: cutover; `reverse`: rollback.
    pub flip: String,
    /// Tells this attempt from others in the journal.
    pub attempt: String,
    /// `--fence`.
    pub fence: String,
    /// `--route`, without passwords.
    pub routes: Vec<String>,
    /// The passwords, for the runner that was asked alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub letter: Option<String>,
    /// How long it may take.
    #[serde(flatten)]
    pub limits: Limits,
    /// `--refresh`.
    #[serde(default)]
    pub refresh: Refresh,
    /// `--unlogged`.
    #[serde(default)]
    pub unlogged: Unlogged,
    /// `--leave-quarantined`.
    #[serde(default)]
    pub leave_quarantined: bool,
    /// `--dry-run`.
    pub dry_run: bool,
    /// `--one-way`: there is to be no way back.
    #[serde(default)]
    pub one_way: bool,
    /// What of the job is to be switched.
    #[serde(default)]
    pub part: Part,
    /// The tables that `part` comes to, found by the runner.
    #[serde(skip)]
    pub group: Option<Group>,
    /// The live tables' [`catalog::mark`] before they were looked at: another one, once writers
    /// are stopped, refuses the flip.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<String>,
}

impl FlipRequest {
    /// What is stored before the flip begins; `last` is the record of the one before.
    pub fn record(&self, from: Phase, last: Option<&FlipRecord>) -> FlipRecord {
        let mut earlier_routes: Vec<String> = Vec::new();
        for route in last.iter().flat_map(|last| last.routes.iter().chain(&last.earlier_routes)) {
            if !self.routes.contains(route) && !earlier_routes.contains(route) {
                earlier_routes.push(route.clone());
            }
        }
        FlipRecord {
            earlier_routes,
            from: from.to_string(),
            attempt: self.attempt.clone(),
            flip: self.flip.clone(),
            fence: self.fence.clone(),
            routes: self.routes.clone(),
            skipped: Vec::new(),
            released: false,
            switched_lsn: None,
            fenced_ms: None,
            refresh_due: self.refresh == Refresh::After,
            group: self.group.clone(),
        }
    }

    pub(super) fn stream(&self) -> Stream {
        stream_of(&self.flip)
    }
}

pub(super) fn stream_of(flip: &str) -> Stream {
    if flip == "reverse" { Stream::Reverse } else { Stream::Forward }
}

/// What routes are told.
pub(super) fn context(config: &JobConfig, flip: Stream) -> route::Context {
    route::Context {
        job: config.job.clone(),
        flip,
        source: config.source.clone(),
        target: config.target.clone(),
        scope: config.options.to_string(),
        tables: Vec::new(),
        is_group: false,
        reads: false,
    }
}

/// What the routes of a stored flip are told: those of a group know its tables at every step.
pub(super) fn context_of(config: &JobConfig, record: &FlipRecord) -> route::Context {
    let context = context(config, stream_of(&record.flip));
    match &record.group {
        Some(group) => route::Context { tables: group.tables.clone(), is_group: true, ..context },
        None => context,
    }
}
