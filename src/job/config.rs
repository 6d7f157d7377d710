//! What a job is, as the command line and the options file put it together.

use std::sync::Arc;
use std::time::Duration;

use super::copying::Bulk;
use super::failover::{AfterFailover, Failover};
use super::heartbeat::HeartbeatOptions;
use super::opening::Half;
use super::place::{BufferOptions, StreamingOptions};
use super::reading::Wanted;
use super::routes::RouteSecrets;
use super::store::JobOptions;
use crate::apply::{OnRowError, Tuning, conflict};
use crate::id::JobName;
use crate::lsn::Lsn;
use crate::map::Map;
use crate::pg::Config;
use crate::schema::policy::Policy;
use crate::source::BulkOptions;

/// What a job is, apart from its state.
#[derive(Clone, Debug)]
pub struct JobConfig {
    /// Its name.
    pub job: JobName,
    /// Where rows come from.
    pub source: Config,
    /// Where they go; also the home of the job's tables.
    pub target: Config,
    /// Table patterns.
    pub options: JobOptions,
    /// The recycle bin that the old side's tables go to, where only tables move: the number of a
    /// cluster's job. None: the job's own name.
    pub bin: Option<String>,
    /// Tables read at the same time, and indexes built at the same time.
    pub jobs: usize,
    /// Copy owners and grants too.
    pub owners: bool,
    /// Decoder and transport, where they are not left to be chosen.
    pub wanted: Wanted,
    /// Limit of the wait for the slot's consistent point.
    pub slot_timeout: Duration,
    /// Where changes wait.
    pub buffer: BufferOptions,
    /// Have the server send transactions in progress, where it can.
    pub streaming: Option<StreamingOptions>,
    /// Prepare on the target what is prepared on the source.
    pub two_phase: bool,
    /// How changes are applied.
    pub tuning: Tuning,
    /// What becomes of a row that the target refuses.
    pub on_row_error: OnRowError,
    /// What is done where tables of the source are altered; `None`: what does not fit is an error.
    pub ddl: Option<Policy>,
    /// Keep the source's log moving, and measure lag by that.
    pub heartbeat: Option<HeartbeatOptions>,
    /// Applications write to both sides, and who wins a conflict: as given, or else as stored.
    pub two_way: Option<conflict::Policy>,
    /// Who is to win from now on, where that was given.
    pub on_conflict: Option<conflict::Policy>,
    /// `--from-lsn`: where the copy that the target is stands, exclusive.
    pub from_lsn: Option<Lsn>,
    /// Passwords of routes.
    pub secrets: RouteSecrets,
    /// Whether the forward stream is read by this process, or by another into a topic.
    pub half: Half,
    /// What of a backlog is read in bulk.
    pub backlog: BulkOptions,
    /// Whether slots are made such that standbys keep copies of them.
    pub failover: Failover,
    /// Standbys of the source that are given slots of their own.
    pub standbys: Vec<Config>,
    /// A standby of the source that has the forward slot and is decoded from; `None`: the source.
    pub decode_from: Option<Config>,
    /// What is done where a side has lost what the stream needs.
    pub after_failover: AfterFailover,
    /// What becomes of its tables on the way.
    pub map: Option<Arc<Map>>,
    /// There is to be no way back.
    pub one_way: bool,
    /// Tables without a replica identity are moved all the same, and see INSERT alone meanwhile.
    pub insert_only: bool,
    /// How rows and indexes are made.
    pub bulk: Bulk,
}
