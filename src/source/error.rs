//! What can go wrong at the reading end of a stream.

use std::fmt;

use crate::decode::{self, wal2json};
use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::pg;

use super::slot::Blocker;

/// Errors of slots, publications, snapshots and the stream.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The wire.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// The bytes.
    #[error("stream of slot {slot}: {source}")]
    Decode {
        /// The slot.
        slot: String,
        /// What is wrong with them.
        source: decode::Error,
    },
    /// The slot's plugin is none that can be read.
    #[error("slot {slot}: {unknown}")]
    Plugin {
        /// The slot.
        slot: String,
        /// Its plugin.
        unknown: decode::UnknownPlugin,
    },
    /// A wal2json that tells too little.
    #[error(
        "slot {slot}: the server's {}; install 2.5 or newer on the server and run again, or end \
         this job with walferry cancel and start it anew with --decoder test_decoding",
        wal2json::TOO_OLD
    )]
    OldWal2json {
        /// The slot.
        slot: String,
    },
    /// A pull would take a PREPARE that comes again for a transaction of its own.
    #[error(
        "slot {slot} gives prepared transactions at their PREPARE, as it was read so once \
         (--two-phase on), and only a stream can follow that: run with --transport stream, or end \
         this job with walferry cancel and start it anew without --two-phase"
    )]
    TwoPhasePull {
        /// The slot.
        slot: String,
    },
    /// A decoder by names met one that is no table's any more.
    #[error(
        "table {table} has changes in the stream and is not there under that name any more; the \
         slot's decoder tells names only, so nothing of it can be read. If it was renamed and \
         nothing was written to it since, rename it back; otherwise end this job with walferry \
         cancel and start it anew"
    )]
    TableGone {
        /// Its name.
        table: QualifiedName,
    },
    /// A decoder by names met one that is another table's now.
    #[error(
        "table {table} is another table than when the slot was made: dropped and made anew, or its \
         name was given to another. The slot's decoder tells names only, so the rows of the one \
         are not told from those of the other. Give the first table its name back if it is still \
         there and neither was written to since; otherwise end this job with walferry cancel and \
         start it anew"
    )]
    OtherTable {
        /// Its name.
        table: QualifiedName,
    },
    /// Slot creation waited too long and was given up; nothing of it is left.
    #[error(
        "slot {slot} could not be made within {seconds} s, as PostgreSQL waits for every \
         transaction that was open when it began{}; nothing was left behind{standby}",
        Blockers(blockers)
    )]
    Blocked {
        /// The slot.
        slot: String,
        /// How long was waited.
        seconds: u64,
        /// Who was waited for at the end.
        blockers: Vec<Blocker>,
        /// A hint where the server is a standby; empty otherwise.
        standby: &'static str,
    },
    /// Slot creation was given up, and what is left of it could not be removed.
    #[error(
        "making slot {slot} was given up, but it may have been left behind: {detail}; look for it \
         with: select * from pg_replication_slots where slot_name = {literal}, and remove it \
         with: select pg_drop_replication_slot({literal})", literal = crate::id::quote_literal(slot)
    )]
    Orphan {
        /// The slot.
        slot: String,
        /// What kept it.
        detail: String,
    },
    /// No such slot where progress says there must be one.
    #[error(
        "slot {slot} does not exist, but the target has applied up to {progress_lsn}: it was \
         dropped, or lost in a failover, and the changes since cannot be had any more; \
         walferry run --after-failover refill makes a new slot and reads again what differs, \
         walferry cancel and walferry run start over"
    )]
    SlotMissing {
        /// The slot.
        slot: String,
        /// What the target durably has.
        progress_lsn: Lsn,
    },
    /// The slot is further than the target: it was made again, or advanced, by someone else.
    #[error(
        "slot {slot} is confirmed up to {confirmed_lsn}, but the target durably has only \
         {progress_lsn}: it was dropped and made again, or advanced, by someone else, and the \
         changes in between cannot be had any more (a target that was restored, or whose standby \
         took over, may lack them too); walferry run --after-failover refill makes a new slot and \
         reads again what differs, walferry cancel and walferry run start over"
    )]
    SlotAhead {
        /// The slot.
        slot: String,
        /// Where it begins to send.
        confirmed_lsn: Lsn,
        /// What the target durably has.
        progress_lsn: Lsn,
    },
    /// The server removed WAL that the slot needs.
    #[error(
        "slot {slot} was invalidated by the server ({reason}), confirmed up to {confirmed_lsn} \
         with the target at {progress_lsn}; {}; walferry run --after-failover refill makes a new \
         slot and reads again what differs",
        removed(reason)
    )]
    SlotLost {
        /// The slot.
        slot: String,
        /// `wal_removed`, `rows_removed`, ... as the server says.
        reason: String,
        /// Where it stood; `0/0` if it never was consistent.
        confirmed_lsn: Lsn,
        /// What the target durably has.
        progress_lsn: Lsn,
    },
    /// A slot of that name, but not ours.
    #[error(
        "slot {slot} is of {what} {found} where {expected} is needed: another program's; choose \
         another job name, or drop it with: select pg_drop_replication_slot({literal})",
        literal = crate::id::quote_literal(slot)
    )]
    SlotForeign {
        /// The slot.
        slot: String,
        /// `plugin` or `database`.
        what: &'static str,
        /// What it has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// A slot of that name exists where a new one was to be made.
    #[error(
        "slot {slot} exists already; if nothing uses it any more, drop it with: \
         select pg_drop_replication_slot({literal})", literal = crate::id::quote_literal(slot)
    )]
    SlotExists {
        /// The slot.
        slot: String,
    },
    /// Someone reads it.
    #[error(
        "slot {slot} is in use by process {pid} ({user}); end it with: \
         select pg_terminate_backend({pid})"
    )]
    SlotInUse {
        /// The slot.
        slot: String,
        /// The backend's process id.
        pid: i32,
        /// Its application_name, or what else is known.
        user: String,
    },
    /// The server is not the one the job began with.
    #[error(
        "{peer} is another system: its system identifier is {found}, the job began with \
         {expected}; check the connection string, or start over with walferry cancel and \
         walferry run"
    )]
    AnotherSystem {
        /// The server.
        peer: String,
        /// What it is.
        found: String,
        /// What the job recorded.
        expected: String,
    },
    /// The server is on another branch of the same system's history.
    #[error(
        "{peer} is on timeline {found_timeline}, the job began on {expected_timeline}, and \
         history forked at {fork_lsn} while the target has {progress_lsn}: the target holds \
         transactions that this server lost; walferry run --after-failover refill makes a new slot \
         and reads again what differs"
    )]
    AnotherTimeline {
        /// The server.
        peer: String,
        /// Where it is.
        found_timeline: u32,
        /// What the job recorded.
        expected_timeline: u32,
        /// Where they parted; `0/0` if its history does not know the recorded one.
        fork_lsn: Lsn,
        /// What the target durably has.
        progress_lsn: Lsn,
    },
    /// The server's WAL ends before what the target holds.
    #[error(
        "{peer} has written WAL up to {flush_lsn} only, but the target holds it up to \
         {progress_lsn}: it was restored from a backup or lost its end; walferry run \
         --after-failover refill makes a new slot and reads again what differs"
    )]
    Behind {
        /// The server.
        peer: String,
        /// Where its WAL ends.
        flush_lsn: Lsn,
        /// What the target durably has.
        progress_lsn: Lsn,
    },
    /// Tables whose changes never reach the WAL.
    #[error(
        "unlogged or temporary tables cannot be published: {}; exclude them, or mend with: {}",
        Names(tables),
        SetLogged(tables)
    )]
    Unlogged {
        /// All of them.
        tables: Vec<QualifiedName>,
    },
    /// Tables to publish that are not there.
    #[error("tables to publish do not exist: {}; correct --include", Names(tables))]
    TablesMissing {
        /// All of them.
        tables: Vec<QualifiedName>,
    },
    /// A publication of that name, but not ours.
    #[error(
        "publication {publication} is FOR ALL TABLES, so it is another program's; choose another \
         job name, or drop it with: drop publication {publication}"
    )]
    PublicationForeign {
        /// The publication.
        publication: String,
    },
    /// Making or changing the publication was refused.
    #[error(
        "{doing} refused: {source}; it takes CREATE on the database and ownership of every table \
         (grant create on database ... to ...; alter table ... owner to ...)"
    )]
    PublicationRefused {
        /// What was tried.
        doing: String,
        /// What the server said.
        source: pg::Error,
    },
    /// A publication that the stream is read by is gone, and the server goes on without.
    #[error(
        "slot {slot}: the source does not know a publication any more that the stream is read by \
         ({notice}), and what was written since is lost to it; end this job with walferry cancel \
         and start it anew"
    )]
    PublicationSkipped {
        /// The slot.
        slot: String,
        /// What the server said.
        notice: String,
    },
    /// An exported snapshot whose holder is gone.
    #[error(
        "snapshot {name} does not exist any more: the session that exported it ended; \
         take a new one"
    )]
    SnapshotGone {
        /// Its name.
        name: String,
    },
    /// Exact visibility needs running transaction ids, which a standby does not know.
    #[error(
        "{peer} is a standby, where snapshots do not list running transactions; \
         connect to its primary"
    )]
    Standby {
        /// The server.
        peer: String,
    },
    /// A standby that is decoded from has not replayed what is needed of it yet.
    #[error(
        "standby {peer} has replayed the log up to {replay_lsn}, and {wanted_lsn} is needed: it is \
         waited for; see there pg_stat_wal_receiver and pg_is_wal_replay_paused()"
    )]
    StandbyBehind {
        /// The standby.
        peer: String,
        /// Where it is.
        replay_lsn: Lsn,
        /// Where it has to be.
        wanted_lsn: Lsn,
    },
    /// A standby that is decoded from is on a timeline that the source is not on.
    #[error(
        "standby {standby} is on timeline {found_timeline}, the source {peer} on {timeline}: it \
         was promoted, or follows another primary; let --source lead to the primary of timeline \
         {found_timeline}"
    )]
    SourceLeft {
        /// The standby.
        standby: String,
        /// The source.
        peer: String,
        /// The standby's.
        found_timeline: u32,
        /// The source's.
        timeline: u32,
    },
    /// A stream from a standby was opened on another timeline.
    #[error(
        "the stream was opened on timeline {expected}, and the source is on {source_timeline}, its \
         standby on {standby}: it is opened again"
    )]
    TimelineLeft {
        /// The stream's.
        expected: u32,
        /// The source's.
        source_timeline: u32,
        /// The standby's.
        standby: u32,
    },
    /// No room for a transaction in progress.
    #[error(
        "slot {slot}: changes of transactions in progress could not be kept on disk: {source}; \
         the stream is opened again without them, so that the server keeps them until they commit \
         (--streaming off does so always, --streaming-limit gives them more room)"
    )]
    Spill {
        /// The slot.
        slot: String,
        /// Where, and what the system said.
        source: std::io::Error,
    },
    /// The source said nothing, not even when asked.
    #[error("{peer} sent nothing for {seconds:.1} s, not even an answer to a request for one")]
    Silent {
        /// The server.
        peer: String,
        /// How long.
        seconds: f64,
    },
}

impl Error {
    /// True if the source or the target has lost what the stream needs, and trying again does not
    /// bring it back.
    pub fn is_loss(&self) -> bool {
        matches!(
            self,
            Error::SlotMissing { .. }
                | Error::SlotAhead { .. }
                | Error::SlotLost { .. }
                | Error::AnotherTimeline { .. }
                | Error::Behind { .. }
        )
    }
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pg(error) if is_session_spent(error) => Fault::Retry,
            Error::Pg(error) => error.fault(),
            Error::Decode { source, .. } => source.fault(),
            // Open transactions end, readers go away, networks come back, snapshots are taken anew.
            Error::Blocked { .. } | Error::SlotInUse { .. } => Fault::Retry,
            Error::Silent { .. } | Error::SnapshotGone { .. } | Error::Spill { .. } => Fault::Retry,
            // A standby follows, and a source that failed over is found by its hosts.
            Error::StandbyBehind { .. } | Error::SourceLeft { .. } => Fault::Retry,
            Error::TimelineLeft { .. } => Fault::Retry,
            _ => Fault::Stop,
        }
    }
}

/// pgoutput asks for a callback at each start, and an old server's session has room for ten: one
/// that pulls runs out of them, and a new one has room again. Mended in 11.19 to 15.2, never in 10.
fn is_session_spent(error: &pg::Error) -> bool {
    error.code() == Some("XX000") && error.to_string().contains("relcache_callback_list slots")
}

/// What the slot needs and has not any more.
fn removed(reason: &str) -> &'static str {
    match reason {
        // 16 says the latter, 17 and newer the former; a primary's slots keep their rows.
        "rows_removed" | "conflicting" => {
            "the primary removed rows that a slot of this standby needs (on the standby: alter \
             system set hot_standby_feedback = on, and a slot of the primary in primary_slot_name; \
             select pg_reload_conf())"
        }
        _ => {
            "WAL it needs is gone (more room: alter system set max_slot_wal_keep_size = -1; select \
             pg_reload_conf())"
        }
    }
}

struct Blockers<'a>(&'a [Blocker]);

impl fmt::Display for Blockers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, blocker) in self.0.iter().enumerate() {
            write!(f, "{} {blocker}", if index == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

struct Names<'a>(&'a [QualifiedName]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(QualifiedName::to_string).collect();
        f.write_str(&names.join(", "))
    }
}

struct SetLogged<'a>(&'a [QualifiedName]);

impl fmt::Display for SetLogged<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for name in self.0 {
            write!(f, "alter table {} set logged; ", name.quoted())?;
        }
        Ok(())
    }
}
