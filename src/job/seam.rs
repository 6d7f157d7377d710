//! Where a copy that somebody else made stands in the source's log, so that the stream begins
//! exactly there.
//!
//! A physical copy has a transaction if and only if it has replayed the record of its commit: one
//! that ends at or before the end of the last record replayed. A stream from that position on has
//! those whose commit begins at or after it. Records do not overlap, so nothing is missing and
//! nothing comes twice, whatever else lies in between.
//!
//! The end of the last record replayed is told by PostgreSQL where the copy was promoted: the new
//! timeline's history says where the old one was left. A recovery target says less than it seems:
//! with recovery_target_lsn and recovery_target_inclusive (the default), the record that *begins*
//! at the target is replayed as well, and may be a commit. Without a timeline of its own (a storage
//! snapshot that recovered from its crash) nothing tells later where recovery ended: what the
//! server wrote since is in the same numbers. Then, and for a copy that was restored from a dump,
//! whoever made it says so.
//!
//! <https://www.postgresql.org/docs/current/runtime-config-wal.html#RUNTIME-CONFIG-WAL-RECOVERY-TARGET>

use super::run::JobConfig;
use super::{Error, Result};
use crate::lsn::Lsn;
use crate::pg::Session;
use crate::source::{self, SlotStatus, continuity, identify_by_sql};

/// How a storage snapshot, or a backup without a recovery target, gets a timeline of its own.
const PROMOTE: &str = "start it from its files with standby.signal (before 12: standby_mode = on \
     in recovery.conf), and promote it once it has replayed what it has";

/// Why a copy cannot be followed from.
#[derive(Debug, thiserror::Error)]
pub enum Seam {
    /// The slot has to be older than the copy.
    #[error(
        "slot {slot} is not on the source: a copy is followed from a slot that is older than it. \
         Make it with walferry slot create, and then the copy"
    )]
    NoSlot {
        /// Its name.
        slot: String,
    },
    /// The slot is another database's.
    #[error("slot {slot} is of database {database}, and the source is {source_database}")]
    ForeignSlot {
        /// Its name.
        slot: String,
        /// Its database.
        database: String,
        /// That of `--source`.
        source_database: String,
    },
    /// Made since the slot.
    #[error(
        "publication {publication} does not show {tables}: made since the slot, or left out when \
         that was made, so that changes of them may be missing. Leave them out with --exclude, or \
         begin again with walferry slot create and another copy"
    )]
    Unpublished {
        /// Its name.
        publication: String,
        /// Which tables.
        tables: String,
    },
    /// Nothing tells where the copy stands.
    #[error(
        "where the copy stands in the source's log cannot be told: {why}. Give it with --from-lsn: \
         for a dump under a slot's snapshot, what walferry slot create has printed. For a copy \
         of files, {}; its history then tells",
        PROMOTE
    )]
    Untold {
        /// What is missing.
        why: String,
    },
    /// What is given is not what the copy says.
    #[error(
        "--from-lsn {given} is not where the copy stands: it left the source's timeline at {told}. \
         Leave the option out"
    )]
    OtherLsn {
        /// `--from-lsn`.
        given: Lsn,
        /// By the timeline's history.
        told: Lsn,
    },
    /// The job has begun from elsewhere.
    #[error(
        "--from-lsn {given}: the job has begun from {begun} already. Leave the option out, or \
         start anew with walferry cancel"
    )]
    Begun {
        /// `--from-lsn`.
        given: Lsn,
        /// As stored.
        begun: Lsn,
    },
    /// Changes between copy and slot are nowhere.
    #[error(
        "the copy stands at {copy_lsn}, and slot {slot} has only what commits from {slot_lsn} on: \
         what lies between is nowhere. Let the copy replay more of the source's log, or make \
         another one: the slot comes first"
    )]
    SlotLater {
        /// Its name.
        slot: String,
        /// What it was told.
        slot_lsn: Lsn,
        /// Where the copy stands.
        copy_lsn: Lsn,
    },
    /// A position that the log has not come to.
    #[error("--from-lsn {copy_lsn} is beyond the end of the {side}'s log, {end_lsn}")]
    Beyond {
        /// Which.
        side: &'static str,
        /// Where the copy should stand.
        copy_lsn: Lsn,
        /// Exclusive end.
        end_lsn: Lsn,
    },
}

/// What the target says of itself.
struct Told {
    /// It was made from the source's files.
    physical: bool,
    /// Where it stands, or why that is not told.
    lsn: std::result::Result<Lsn, String>,
    /// Exclusive end of its own log.
    end_lsn: Lsn,
}

/// Where the copy stands: exclusive end of what it has of the source's log. `source` and `target`
/// are ordinary sessions.
pub(super) async fn find(
    config: &JobConfig,
    source: &mut Session,
    target: &mut Session,
    slot: &SlotStatus,
) -> Result<Lsn> {
    let system = identify_by_sql(source).await?;
    let told = told(config, &system, target).await?;
    let lsn = match (config.from_lsn, told.lsn) {
        (Some(given), Ok(told)) if given != told => {
            return Err(Seam::OtherLsn { given, told }.into());
        }
        (Some(given), _) => given,
        (None, Ok(told)) => told,
        (None, Err(why)) => return Err(Seam::Untold { why }.into()),
    };
    let confirmed_lsn = slot.confirmed_flush_lsn.unwrap_or(Lsn::ZERO);
    if lsn < confirmed_lsn {
        let (slot, slot_lsn) = (slot.name.clone(), confirmed_lsn);
        return Err(Seam::SlotLater { slot, slot_lsn, copy_lsn: lsn }.into());
    }
    let ends = [("source", system.flush_lsn), ("target", told.end_lsn)];
    for (side, end_lsn) in ends.into_iter().take(if told.physical { 2 } else { 1 }) {
        if lsn > end_lsn {
            return Err(Seam::Beyond { side, copy_lsn: lsn, end_lsn }.into());
        }
    }
    Ok(lsn)
}

/// True if the target is a server of its own that was made from the source's files. Both sides may
/// also be databases of one server.
pub(super) async fn is_physical(source: &mut Session, target: &mut Session) -> Result<bool> {
    let sql = "select system_identifier, pg_catalog.pg_postmaster_start_time()::text \
         from pg_catalog.pg_control_system()";
    let (ours, theirs) = (source.query_one(sql, &[]).await?, target.query_one(sql, &[]).await?);
    Ok(ours.str(0)? == theirs.str(0)? && ours.str(1)? != theirs.str(1)?)
}

async fn told(config: &JobConfig, source: &source::System, target: &mut Session) -> Result<Told> {
    let system = identify_by_sql(target).await?;
    let physical = system.system_identifier == source.system_identifier;
    let say = |lsn| Told { physical, lsn, end_lsn: system.flush_lsn };
    if !physical {
        let why = "the target is another system, so it was restored from a dump".to_string();
        return Ok(say(Err(why)));
    }
    if system.timeline == source.timeline {
        let why = format!("the copy is on the source's own timeline, {}", source.timeline);
        return Ok(say(Err(why)));
    }
    let left = continuity::left_at(&config.target, target, system.timeline, source.timeline).await;
    Ok(say(match left {
        Ok(Some(lsn)) => Ok(lsn),
        Ok(None) => Err(format!(
            "the copy is on timeline {}, which never was on the source's, {}",
            system.timeline, source.timeline
        )),
        Err(error) if matches!(&error, source::Error::Pg(error) if error.code().is_some()) => {
            Err(format!("the history of its timeline may not be read ({error})"))
        }
        Err(error) => return Err(Error::from(error)),
    }))
}
