//! What stops a job.

use std::time::Duration;

use super::gone::{Gone, hung};
use super::{mapped, reshard};
use crate::buffer::{durable, spool};
use crate::id::{QualifiedName, quote_ident};
use crate::lsn::Lsn;
use crate::{apply, catalog, cluster, copy, cutover, large, pg, route, schema, source, verify};

/// Why a job, or a command to it, did not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A server or the connection to it.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// The reading side of a stream.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The writing side of a stream.
    #[error(transparent)]
    Apply(#[from] apply::Error),
    /// The disk spool.
    #[error(transparent)]
    Spool(#[from] spool::Error),
    /// The disk spool or topic, whichever it is.
    #[error(transparent)]
    Buffer(#[from] durable::Error),
    /// The bulk copy.
    #[error(transparent)]
    Copy(#[from] copy::Error),
    /// Dump or restore of the schema.
    #[error(transparent)]
    Schema(#[from] schema::Error),
    /// The comparison.
    #[error(transparent)]
    Verify(#[from] verify::Error),
    /// The job's map.
    #[error(transparent)]
    Mapped(#[from] mapped::Error),
    /// Several sources and targets.
    #[error(transparent)]
    Reshard(#[from] reshard::Error),
    /// Large objects, likewise.
    #[error(transparent)]
    Large(#[from] large::Error),
    /// The choreography.
    #[error(transparent)]
    Cutover(#[from] cutover::Error),
    /// Table patterns.
    #[error(transparent)]
    Pattern(#[from] catalog::PatternError),
    /// A command that does not fit the phase.
    #[error(transparent)]
    Refused(#[from] super::state::Refused),
    /// Check found errors.
    #[error("not ready: {0} (walferry check lists all, each with what mends it)")]
    NotReady(String),
    /// The way back would find itself without rights when it is needed.
    #[error(
        "the way back may not write to all that moves: run on the source, as an administrator, \
         \"{}\"; nothing was switched and writers go on", grants.join(" ")
    )]
    NoWayBack {
        /// What mends it.
        grants: Vec<String>,
    },
    /// Citus gives changes of shards another name.
    #[error(
        "on the {side}, citus.enable_change_data_capture is on: changes of shards come under the \
         name of their table, and would be left out without a word. For as long as shards move: \
         alter system set citus.enable_change_data_capture = off; select pg_reload_conf()"
    )]
    ShardsCaptured {
        /// Which.
        side: String,
    },
    /// Another runner has the job.
    #[error(
        "job {job} is being run by another process (backend {pid} on the target); one runner at a \
         time. walferry status shows it"
    )]
    Busy {
        /// The job.
        job: String,
        /// The backend that holds the lease.
        pid: String,
    },
    /// A dead runner's session would not end.
    #[error(
        "{peer}: backend {pid}, left by an earlier run of this job, does not end; look at it in \
         pg_stat_activity and end it with select pg_terminate_backend({pid})"
    )]
    Predecessor {
        /// Which server.
        peer: String,
        /// Which backend.
        pid: String,
    },
    /// A table that is named is not parked.
    #[error(
        "nothing is kept of {table}{}",
        if parked.is_empty() { String::new() } else { format!(", but of {parked}") }
    )]
    NotParked {
        /// Its name as it was given.
        table: String,
        /// Those that are.
        parked: String,
    },
    /// A change that is named is not kept.
    #[error("no change {id} is kept: walferry quarantine list shows those that are")]
    NotKept {
        /// Its number.
        id: i64,
    },
    /// `--heartbeat`, and no way to beat.
    #[error(
        "a heartbeat needs something that \"{role}\" may write on the source: grant execute on \
         function pg_logical_emit_message(boolean, text, text) to it, or schema walferry, or give \
         a statement of your own with --heartbeat-sql"
    )]
    NoHeartbeat {
        /// The role.
        role: String,
    },
    /// The lease's session is gone.
    #[error("the lease on the home database was lost; taking it again")]
    LeaseLost,
    /// The job's stored state cannot be used.
    #[error("the job's stored state: {0}")]
    State(String),
    /// No such job.
    #[error(
        "there is no job \"{job}\" on {peer}{}; walferry run starts one (or give the right \
         --name and --target)",
        if others.is_empty() { String::new() } else { format!(", but there is {others}") }
    )]
    NoJob {
        /// The name asked for.
        job: String,
        /// Where it was looked for.
        peer: String,
        /// Names of the jobs that are there.
        others: String,
    },
    /// A different server than the one the job was made with.
    #[error(
        "{side} is another system than the one this job was made with (system identifier {found}, \
         was {expected}): it was restored, upgraded or replaced, so its WAL positions mean \
         something else. Point {side} at the original, or end this job with walferry cancel \
         --source-is-gone and start a new one"
    )]
    OtherSystem {
        /// `--source` or `--target`.
        side: &'static str,
        /// What it says now.
        found: String,
        /// What was stored.
        expected: String,
    },
    /// Options that differ from those the job was planned with.
    #[error(
        "job {job} was planned with other table options ({planned}); give the same, or another \
         --name for a new job"
    )]
    OtherOptions {
        /// The job.
        job: String,
        /// What it was planned with.
        planned: String,
    },
    /// The slot was told of positions that only the spool or topic had, and it has them no more.
    #[error(
        "slot {slot} was told {confirmed_lsn}, the target has only {progress_lsn}, and {place} \
         {held}: the changes between are nowhere any more. {mend}, or walferry run \
         --after-failover refill, or walferry cancel and run, which copies every table again"
    )]
    SpoolLost {
        /// The slot.
        slot: String,
        /// What it was told.
        confirmed_lsn: Lsn,
        /// What the target durably has.
        progress_lsn: Lsn,
        /// Where they should be.
        place: String,
        /// What it has.
        held: String,
        /// What could bring them back.
        mend: &'static str,
    },
    /// The spool is on another host.
    #[error(
        "the spool of this job is on host {host}, in {dir}, and this is {here}: run there, or, if \
         it is lost, run once with --buffer memory, which says whether it was needed"
    )]
    OtherHost {
        /// Where it is.
        host: String,
        /// In which directory.
        dir: String,
        /// The host of this process.
        here: String,
    },
    /// The spool is in another directory.
    #[error(
        "the spool of this job is in {dir}: give --buffer spool:{dir}, or run once with \
         --buffer memory to leave it"
    )]
    OtherDirectory {
        /// Where it is.
        dir: String,
    },
    /// Leaving the spool would lose changes.
    #[error(
        "slot {slot} was told {confirmed_lsn} because {place} has what the target, at \
         {progress_lsn}, has not: run there with --buffer {option} until the target is level. If \
         it is lost, walferry cancel and walferry run copy every table again"
    )]
    SpoolNeeded {
        /// The slot.
        slot: String,
        /// What it was told.
        confirmed_lsn: Lsn,
        /// What the target durably has.
        progress_lsn: Lsn,
        /// Where the changes are.
        place: String,
        /// The same as an option.
        option: String,
    },
    /// The job's topic is another.
    #[error(
        "the changes of this job are in topic {topic}: give --buffer {option}, or run once with \
         --buffer memory to leave it"
    )]
    OtherTopic {
        /// Which.
        topic: String,
        /// The same as an option.
        option: String,
    },
    /// Capture and apply meet in a topic, and the job has none.
    #[error(
        "walferry capture and walferry apply meet in a Kafka topic: give --buffer \
         kafka:BROKERS/TOPIC to walferry apply; a job that waits in memory or in a spool is run by \
         walferry run"
    )]
    NoTopic,
    /// A decoder other than the slot's.
    #[error(
        "--decoder {decoder} cannot be had for this job: its slot was made for {bound}, and a slot \
         is bound to its decoder; leave the option out, or give another --name for a new job"
    )]
    OtherDecoder {
        /// What was asked for.
        decoder: String,
        /// The slot's plugin.
        bound: String,
    },
    /// The forward slot is on another server than it is to be read from.
    #[error(
        "slot {slot} is not on {peer}: {mend}. If the slot is lost with its server, walferry run \
         --after-failover refill makes one here and reads again what differs"
    )]
    SlotElsewhere {
        /// The slot.
        slot: String,
        /// Where it was looked for.
        peer: String,
        /// Where it should be.
        mend: String,
    },
    /// No decoder that the side lets us use.
    #[error(
        "decoder {decoder} cannot be used: {reason}; choose another by --decoder, or install the \
         wal2json package on the server, or let the role publish (GRANT CREATE ON DATABASE and \
         ownership of the tables)"
    )]
    NoDecoder {
        /// Which.
        decoder: String,
        /// Why not.
        reason: String,
    },
    /// No publication of the name given.
    #[error(
        "publication {publication} does not exist on the source: give the right --publication, or \
         have it made (\"CREATE PUBLICATION {} FOR ALL TABLES;\")",
        quote_ident(publication)
    )]
    NoPublication {
        /// Its name.
        publication: String,
    },
    /// Tables that the publication given does not show.
    #[error(
        "publication {publication} does not show {}: \"{fix}\" as its owner, or leave them out \
         with --exclude",
        names(tables)
    )]
    NotPublished {
        /// Its name.
        publication: String,
        /// Which tables.
        tables: Vec<QualifiedName>,
        /// What mends it.
        fix: String,
    },
    /// The publication given is not any more what it was.
    #[error(
        "publication {publication} was altered since the slot was made: {}. What was written to \
         these tables meanwhile may be missing on the target, and nothing in the stream says so. \
         End this job with walferry cancel and start it anew, which copies every table again",
        changes.join("; ")
    )]
    PublicationChanged {
        /// Its name.
        publication: String,
        /// What is different, one line for each.
        changes: Vec<String>,
    },
    /// A job of a part of the rows has no way back.
    #[error(
        "publication {publication} leaves out a part of the tables ({}), so the old side would \
         keep rows that the target never had: there is no way back, and therefore no cutover. \
         Nothing was switched and writers go on; point clients to the target by hand and end with \
         walferry cancel, or start a job by a publication of whole tables", left_out.join("; ")
    )]
    Partial {
        /// Its name.
        publication: String,
        /// By table, what is left out.
        left_out: Vec<String>,
    },
    /// A cluster, or a task as it was planned of it.
    #[error(transparent)]
    Cluster(#[from] cluster::read::Error),
    /// No such job of the cluster.
    #[error("the cluster has no job {job}; it has {others} (walferry cluster jobs lists them)")]
    NoClusterJob {
        /// The number asked for.
        job: i64,
        /// Those that are there.
        others: String,
    },
    /// No such task.
    #[error("job {job} of the cluster has no task {task}; walferry cluster job {job} lists them")]
    NoTask {
        /// The job.
        job: i64,
        /// The number asked for.
        task: u32,
    },
    /// Another runner has the cluster's job.
    #[error(
        "job {job} of the cluster is being run by another process (backend {pid} on its home); one \
         runner at a time. walferry cluster job {job} shows it"
    )]
    ClusterBusy {
        /// The job.
        job: i64,
        /// The backend that holds the lease.
        pid: String,
    },
    /// It was canceled, maybe in this moment.
    #[error(
        "job {job} of the cluster is canceled; walferry cluster reset {job} --tasks N brings a \
         task of it back, and a new plan is a new job"
    )]
    ClusterCanceled {
        /// The job.
        job: i64,
    },
    /// What is asked does not fit the task's state.
    #[error("task {task} is {state}, and {asked} is not possible: {why}")]
    TaskState {
        /// The task.
        task: u32,
        /// Its state.
        state: String,
        /// What was asked.
        asked: &'static str,
        /// What to do instead.
        why: &'static str,
    },
    /// A node's replication slots would run out.
    #[error(
        "not enough replication slots for the tasks and their ways back: {}. Set \
         max_replication_slots (and max_wal_senders) higher and restart, run some of them at a \
         time (--tasks), or have each way back ended at once (--finish)", nodes.join("; ")
    )]
    SlotsShort {
        /// Each with what it has free.
        nodes: Vec<String>,
    },
    /// Other tasks move the same.
    #[error(
        "the same is moved by {}: let that end, finish or cancel it, and then reset this task or \
         plan anew", rivals.join(", ")
    )]
    TaskRivals {
        /// Each in words.
        rivals: Vec<String>,
    },
    /// Somebody changed the task's tables.
    #[error(
        "the task's tables were changed since it began, and no stream carries that: {}. Nothing \
         was switched; reset the task, and run it again", changes.join("; ")
    )]
    TaskChanged {
        /// Each in a sentence.
        changes: Vec<String>,
    },
    /// Tables, each in a sentence, came to the task's group; nothing was switched.
    #[error("not in the task: {}; {}", .0.join("; "), super::cluster::PLAN_ANEW)]
    TaskGrew(Vec<String>),
    /// The comparison before a task's cutover.
    #[error(
        "both sides of the task differ, which must never be: {}. Nothing was switched; walferry \
         verify on the task's own job names the rows", tables.join(", ")
    )]
    TaskDiffers {
        /// Number of rows by table.
        tables: Vec<String>,
    },
    /// A stream stopped for good.
    #[error("the {stream} stream stopped: {message}")]
    Stream {
        /// Which.
        stream: String,
        /// Why.
        message: String,
    },
    /// A route keeps a flip from being undone, or its clients from being let through.
    #[error(
        "a switch that was begun cannot be {todo} yet: {cause}. It is tried again every few \
         seconds. A password is not stored: give WALFERRY_ROUTE_PASSWORD, a line in ~/.pgpass, or \
         --route to `walferry run`. If it is gone for good, `walferry run --skip-route KIND` \
         (KIND is {}) goes on without it and says what to do by hand",
        route::KINDS
    )]
    RouteWaits {
        /// `undone`, or `finished` and what that means.
        todo: &'static str,
        /// What the route said.
        cause: String,
    },
    /// `--skip-route` where nothing waits for such a route.
    #[error(
        "--skip-route is for a route that keeps a switch from being undone or finished, and no \
         switch waits for one: {detail}"
    )]
    NothingToSkip {
        /// What is so instead.
        detail: String,
    },
    /// A runner did not answer a command.
    #[error(
        "the runner did not answer `{verb}` within {wait:?}; walferry status shows its state.{}",
        hung(pid)
    )]
    NoAnswer {
        /// The command.
        verb: String,
        /// How long was waited.
        wait: Duration,
        /// The backend that holds the lease; empty if none does.
        pid: String,
    },
    /// Readers stay where they are.
    #[error(transparent)]
    Reads(#[from] super::reads::Refused),
    /// A group of tables stays where it is.
    #[error(transparent)]
    Groups(#[from] super::groups::Refused),
    /// A runner, an asker or a server that is gone, or is said to be.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// A target that is a copy, and where it stands.
    #[error(transparent)]
    Seam(#[from] super::Seam),
    /// A command failed in the runner, which said why.
    #[error("{0}")]
    Remote(String),
    /// `finish` or `cancel` asked the runner to stop.
    #[error("the job is being ended by finish or cancel")]
    Ended,
    /// Asked to stop while waiting.
    #[error("stopped; the same command goes on from here")]
    Interrupted,
}

fn names(tables: &[QualifiedName]) -> String {
    tables.iter().map(QualifiedName::to_string).collect::<Vec<_>>().join(", ")
}
