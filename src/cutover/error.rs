//! Why a cutover did not happen.

use std::time::Duration;

use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::{copy, large, pg, route, schema, source};

/// What stopped the choreography. Everything done before it has been undone unless the error is
/// [`Error::NotUndone`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A server or the connection to it.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// Where servers stand.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The standby that is decoded from left the live side.
    #[error(
        "standby {standby}, which is decoded from, is on timeline {found_timeline}, and the source \
         on {timeline}: it was promoted, or follows another primary; nothing was switched and \
         writers go on. Let --source lead to the primary of timeline {found_timeline}"
    )]
    Parted {
        /// The standby.
        standby: String,
        /// Its timeline.
        found_timeline: u32,
        /// The live side's.
        timeline: u32,
    },
    /// A route.
    #[error(transparent)]
    Route(#[from] route::Error),
    /// Sequences could not be set.
    #[error("sequences: {0}")]
    Sequences(#[from] schema::Error),
    /// Large objects could not be brought level.
    #[error("large objects: {0}")]
    Large(#[from] large::Error),
    /// Unlogged tables could not be copied again.
    #[error("unlogged tables: {0}")]
    Unlogged(#[from] copy::Error),
    /// Large objects would keep writers waiting for too long.
    #[error(
        "looking for large objects that have changed takes {took:?}, and writers may be held for \
         {max_hold:?} in all, of which it may have half: nothing was switched and writers go on. \
         Raise --max-hold, or, if nobody changes large objects any more, start the job with \
         --large-objects leave and carry them yourself"
    )]
    LargeSlow {
        /// How long the last look took.
        took: Duration,
        /// `--max-hold`.
        max_hold: Duration,
    },
    /// Unlogged tables would keep writers waiting for too long.
    #[error(
        "copying the unlogged tables {} again ({megabytes} MB) would hold writers for about \
         {takes:?}, which is more than half of --max-hold ({max_hold:?}): nothing was switched and \
         writers go on. Raise --max-hold, empty what is not needed, or use --unlogged leave, \
         which leaves them on the other side as they were copied at first", tables.join(", ")
    )]
    UnloggedSlow {
        /// Which.
        tables: Vec<String>,
        /// Their size.
        megabytes: u64,
        /// For how long.
        takes: Duration,
        /// `--max-hold`.
        max_hold: Duration,
    },
    /// `--unlogged refuse`, and there are some with rows.
    #[error(
        "unlogged tables have rows, and --unlogged refuse was given: {}. Make them logged (ALTER \
         TABLE ... SET LOGGED, before a new job), empty them, or use --unlogged copy; nothing was \
         switched and writers go on", tables.join(", ")
    )]
    UnloggedRefused {
        /// Which.
        tables: Vec<String>,
    },
    /// A materialized view could not be refreshed before the switch.
    #[error(
        "materialized views could not be refreshed on the other side before the switch: {}. Mend \
         that, or use --refresh after or --refresh never; nothing was switched and writers go on",
        views.join("; ")
    )]
    Refresh {
        /// Each with what the server said.
        views: Vec<String>,
    },
    /// The stream is not close enough.
    #[error(
        "the stream is more than {max_lag:?} behind (a probe committed at {probe_lsn} has not \
         arrived; applied {applied_lsn}); wait for it to catch up, or raise --max-lag"
    )]
    Lag {
        /// The gate.
        max_lag: Duration,
        /// Where the probe stands.
        probe_lsn: Lsn,
        /// How far the stream is.
        applied_lsn: Lsn,
    },
    /// DDL between a look at the tables and the fence.
    #[error(
        "a table was altered while the cutover began; nothing was switched and writers go on. Look \
         at what was altered, and try again"
    )]
    Altered,
    /// Rows would be missing on the other side.
    #[error(
        "changes are kept aside and would not be on the other side: {}; see walferry quarantine \
         list, and retry or drop them, or leave them behind with --leave-quarantined; nothing was \
         switched and writers go on", tables.join("; ")
    )]
    Quarantined {
        /// Each with what keeps it.
        tables: Vec<String>,
    },
    /// What is kept aside could not be read.
    #[error("what is kept aside on the other side cannot be read: {0}")]
    Parked(String),
    /// A prepared transaction would be left behind.
    #[error(
        "transaction {gid} of {owner} (xid {xid}){} is prepared on the side that is to be left, \
         and nothing could stop its COMMIT PREPARED from writing there after the switch; end it \
         with: commit prepared {gid}, or: rollback prepared {gid}", And(*others)
    )]
    Prepared {
        /// Its identifier, quoted.
        gid: String,
        /// Who prepared it.
        owner: String,
        /// Its id.
        xid: String,
        /// How many more there are in the database.
        others: usize,
    },
    /// The canary did not come through.
    #[error(
        "the {leg} stream is not proven: a canary row did not arrive within {wait:?}; \
         walferry status shows what holds the stream up"
    )]
    Canary {
        /// `forward` or `reverse`.
        leg: String,
        /// How long was waited.
        wait: Duration,
    },
    /// What was waited for did not come through because a stream has stopped.
    #[error("{cause}. The stream stopped: {message}")]
    Broken {
        /// What is not so, or not proven.
        cause: String,
        /// What the stream said.
        message: String,
    },
    /// Writers would not stop in time.
    #[error(
        "could not stop writers within {waited:?}: {blockers}; nothing was switched and writers go \
         on. End or wait for these transactions, or raise --timeout"
    )]
    Fence {
        /// For how long it was tried.
        waited: Duration,
        /// Who held locks.
        blockers: String,
    },
    /// The fence of locks is not for a role that does not own the tables.
    #[error(
        "--fence lock needs the owner of every table, as only owners can open its seal again, and \
         {table} belongs to another role: use --fence none with a route that holds clients, or let \
         an administrator run \"grant <owner of {table}> to <walferry's role>\"; nothing was \
         switched and writers go on"
    )]
    NotOwned {
        /// The first of them.
        table: QualifiedName,
    },
    /// The read-only fence has to end sessions of a role that we may not signal.
    #[error(
        "--fence read-only ends every client session, and may not end pid {pid} of role {role}: \
         end it yourself, or, unless {role} is a superuser, let an administrator run \"grant \
         pg_signal_backend to {own}\"; nothing was switched and writers go on"
    )]
    NotEnded {
        /// The session.
        pid: String,
        /// Whose it is.
        role: String,
        /// The role of ours.
        own: String,
    },
    /// Sessions begun on the old side during an undone flip do not end.
    #[error(
        "{peer} is read-only again, but sessions that began there while it was not do not end; \
         end them by pg_terminate_backend"
    )]
    NotShut {
        /// Which server.
        peer: String,
    },
    /// The stream did not reach the barrier in time.
    #[error(
        "the target did not reach the barrier {barrier_lsn} within {waited:?} (applied \
         {applied_lsn}); nothing was switched and writers go on"
    )]
    Drain {
        /// The barrier.
        barrier_lsn: Lsn,
        /// How far it came.
        applied_lsn: Lsn,
        /// For how long.
        waited: Duration,
    },
    /// A step between the fence and the switch took too long.
    #[error(
        "writers had been held for {waited:?} and the step after \"{after}\" was not done{}; \
         nothing was switched and writers go on. See whether both servers answer, or raise \
         --max-hold",
        if blockers.is_empty() { String::new() } else { format!("; in its way: {blockers}") }
    )]
    Held {
        /// The last step that was done.
        after: String,
        /// For how long.
        waited: Duration,
        /// Transactions that the fence's session waited for; empty if for none.
        blockers: String,
    },
    /// A server does not answer.
    #[error("the live side did not answer within {waited:?}")]
    NoAnswer {
        /// For how long.
        waited: Duration,
    },
    /// Asked to stop.
    #[error("asked to stop; nothing was switched and writers go on")]
    Stopped,
    /// The point of no return was asked for, and the answer was lost.
    #[error(
        "it is not known whether the switch was committed ({cause}); the home database knows: \
         `walferry run` (or this command again) asks it, then goes back or finishes the switch. \
         Clients that are held stay held until then"
    )]
    Unknown {
        /// What was lost.
        cause: String,
    },
    /// The stream ended while it was waited for.
    #[error("the stream stopped during the cutover; nothing was switched and writers go on")]
    StreamStopped,
    /// Something but walferry has written to the side that is to become live.
    #[error(
        "{changes} changes were made on the other side by something else than walferry \
         (last seen in {table}); they would collide with the application's own. Find who writes \
         there, then cancel and start again"
    )]
    RogueWrites {
        /// How many row changes.
        changes: u64,
        /// In which table.
        table: String,
    },
    /// The journal could not be written.
    #[error("the job's journal: {0}")]
    Journal(String),
    /// The fence kind is not one.
    #[error("\"{0}\" is not a fence: use lock, read-only or none")]
    UnknownFence(String),
    /// Tables that the stream does not carry, or that the other side lacks.
    #[error(
        "{} not part of the move: {}. Each was made here, or dropped there, after the job began; \
         cancel and start again, or drop them",
        if tables.len() == 1 { "a table is" } else { "tables are" },
        tables.join(", ")
    )]
    NotFollowed {
        /// Each with what is missing.
        tables: Vec<String>,
    },
    /// Undoing failed; the job stays in cutting_over and the same is tried again by any command.
    #[error(
        "{cause}; and undoing failed: {undo}. The job is in cutting_over: `walferry run` (or \
         cutover again) repeats the undoing; --skip-route of `run` leaves out a route that is \
         gone for good"
    )]
    NotUndone {
        /// What went wrong first.
        cause: String,
        /// What went wrong then.
        undo: String,
    },
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pg(error) => error.fault(),
            Error::Source(error) => error.fault(),
            Error::Large(error) => error.fault(),
            Error::Unlogged(error) => error.fault(),
            // The stored phase says what is to be done, and is looked at again. A drain that
            // reaches the runner belongs to an undoing, which nobody else will do.
            Error::Unknown { .. } | Error::NotUndone { .. } | Error::Journal(_) => Fault::Retry,
            Error::Drain { .. } | Error::StreamStopped => Fault::Retry,
            Error::NoAnswer { .. } | Error::NotShut { .. } => Fault::Retry,
            _ => Fault::Stop,
        }
    }
}

/// How many more of them there are.
struct And(usize);

impl std::fmt::Display for And {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(f, " (and {} more)", self.0) }
    }
}
