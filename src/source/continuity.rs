//! Law 4: is this slot the one that the target's progress belongs to?
//!
//! START_REPLICATION from a position before the slot's confirmed one silently begins at the
//! confirmed one. So whoever takes the greater of two positions loses what lies between, without a
//! word (etl#935, debezium#3970). Here every mismatch is an error that names both positions.

use crate::id::quote_literal;
use crate::lsn::Lsn;
use crate::pg::{self, Config, Purpose, Session};

use super::slot::SlotStatus;
use super::{Error, Result};

/// Which server this is, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// Made by initdb; the same on all standbys and after every failover.
    pub system_identifier: String,
    /// Grows with every promotion.
    pub timeline: u32,
    /// Exclusive end of its flushed WAL.
    pub flush_lsn: Lsn,
}

/// IDENTIFY_SYSTEM, on a replication session.
pub async fn identify(session: &mut Session) -> Result<System> {
    let rows = session.query("IDENTIFY_SYSTEM").await?;
    let Some(row) = rows.first() else {
        return Err(pg::Error::Result("IDENTIFY_SYSTEM gave no row".to_string()).into());
    };
    let (system_identifier, timeline) = (row.string(0)?, row.parse(1)?);
    Ok(System { system_identifier, timeline, flush_lsn: row.lsn(2)? })
}

/// The same on an ordinary session of a primary. The timeline is that of the WAL being written, as
/// the control file learns of a promotion only at the next checkpoint.
pub async fn identify_by_sql(session: &mut Session) -> Result<System> {
    let sql = "select s.system_identifier, w.lsn, pg_catalog.pg_walfile_name(w.lsn) \
         from pg_catalog.pg_control_system() s, \
           (select pg_catalog.pg_current_wal_flush_lsn() as lsn) w";
    let row = session.query_one(sql, &[]).await?;
    let timeline = row.str(2)?.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok());
    Ok(System {
        system_identifier: row.string(0)?,
        timeline: timeline.ok_or_else(|| pg::Error::Result("no timeline".to_string()))?,
        flush_lsn: row.lsn(1)?,
    })
}

/// What the job recorded when it made the slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// [`System::system_identifier`] then.
    pub system_identifier: String,
    /// [`System::timeline`] then.
    pub timeline: u32,
    /// The slot's database.
    pub database: String,
    /// The slot's plugin.
    pub plugin: String,
}

/// The server is the recorded one, and no history that the target holds is missing from it.
///
/// A later timeline is fine if it forked at or after `progress_lsn` (a failover that lost
/// nothing we have). `session` is a replication session.
pub async fn check_system(
    session: &mut Session,
    recorded: &Recorded,
    progress_lsn: Lsn,
) -> Result<System> {
    let system = identify(session).await?;
    let fork_lsn = match system.timeline == recorded.timeline {
        true => None,
        false => Some(fork(session, system.timeline, recorded.timeline).await?),
    };
    compare(session, system, fork_lsn, recorded, progress_lsn)
}

/// The same on an ordinary session. What another timeline forked off is in a file that only a
/// superuser reads, or said on a replication connection; who has neither cannot know that nothing
/// was lost, and is refused.
pub async fn check_system_by_sql(
    session: &mut Session,
    config: &Config,
    recorded: &Recorded,
    progress_lsn: Lsn,
) -> Result<System> {
    let system = identify_by_sql(session).await?;
    let mut fork_lsn = None;
    if system.timeline != recorded.timeline {
        let asking = Session::connect(config, Purpose::Replication);
        fork_lsn = Some(match asking.await {
            Ok(mut asked) => fork(&mut asked, system.timeline, recorded.timeline).await?,
            Err(error) => {
                tracing::warn!(%error, "the timeline's history cannot be read");
                Lsn::ZERO
            }
        });
    }
    compare(session, system, fork_lsn, recorded, progress_lsn)
}

fn compare(
    session: &Session,
    system: System,
    fork_lsn: Option<Lsn>,
    recorded: &Recorded,
    progress_lsn: Lsn,
) -> Result<System> {
    let peer = session.peer().to_string();
    if system.system_identifier != recorded.system_identifier {
        return Err(Error::AnotherSystem {
            peer,
            found: system.system_identifier,
            expected: recorded.system_identifier.clone(),
        });
    }
    if let Some(fork_lsn) = fork_lsn.filter(|fork_lsn| *fork_lsn < progress_lsn) {
        return Err(Error::AnotherTimeline {
            peer,
            found_timeline: system.timeline,
            expected_timeline: recorded.timeline,
            fork_lsn,
            progress_lsn,
        });
    }
    if system.flush_lsn < progress_lsn {
        return Err(Error::Behind { peer, flush_lsn: system.flush_lsn, progress_lsn });
    }
    Ok(system)
}

/// Where `timeline`'s history left `from`; `0/0` if it never was on it.
async fn fork(session: &mut Session, timeline: u32, from: u32) -> Result<Lsn> {
    if timeline < from {
        return Ok(Lsn::ZERO);
    }
    let rows = session.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
    let content = rows.first().and_then(|row| row.bytes(1)).cloned().unwrap_or_default();
    Ok(fork_in(&String::from_utf8_lossy(&content), from).unwrap_or(Lsn::ZERO))
}

/// Where a server that is on `timeline` left the timeline `from`, which is the exclusive end of the
/// last record of it that the server has; `None` if it never was on it. `session` is an ordinary
/// one of that server; the history comes by a replication connection, or, where none is let in,
/// from the file itself, which a superuser may read.
///
/// <https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES>
pub async fn left_at(
    config: &Config,
    session: &mut Session,
    timeline: u32,
    from: u32,
) -> Result<Option<Lsn>> {
    if timeline <= from {
        return Ok(None);
    }
    let refused = match Session::connect(config, Purpose::Replication).await {
        Ok(mut asked) => {
            let fork_lsn = fork(&mut asked, timeline, from).await?;
            return Ok(Some(fork_lsn).filter(|lsn| lsn.is_valid()));
        }
        Err(error) => error,
    };
    let sql = format!("select pg_catalog.pg_read_file('pg_wal/{timeline:08X}.history')");
    match session.query(&sql).await {
        Ok(rows) => {
            let content = rows.first().map(|row| row.string(0)).transpose()?.unwrap_or_default();
            Ok(fork_in(&content, from))
        }
        Err(_) => Err(refused.into()),
    }
}

/// A history file has one line for each timeline left: its number, where, and why.
fn fork_in(history: &str, from: u32) -> Option<Lsn> {
    history.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let timeline: u32 = fields.next()?.parse().ok()?;
        let lsn = fields.next()?.parse().ok()?;
        (timeline == from).then_some(lsn)
    })
}

/// The slot exists, is ours and alive, and does not begin after what the target durably has.
/// Gives its confirmed position, which is `<= progress_lsn`.
pub fn check_slot(
    name: &str,
    status: Option<&SlotStatus>,
    recorded: &Recorded,
    progress_lsn: Lsn,
) -> Result<Lsn> {
    let slot = name.to_string();
    let Some(status) = status else {
        return Err(Error::SlotMissing { slot, progress_lsn });
    };
    for (what, found, expected) in [
        ("plugin", &status.plugin, &recorded.plugin),
        ("database", &status.database, &recorded.database),
    ] {
        if found != expected {
            let (found, expected) = (quote_literal(found), quote_literal(expected));
            return Err(Error::SlotForeign { slot, what, found, expected });
        }
    }
    let confirmed_lsn = status.confirmed_flush_lsn.unwrap_or(Lsn::ZERO);
    if let Some(reason) = status.lost_reason() {
        let reason = reason.to_string();
        return Err(Error::SlotLost { slot, reason, confirmed_lsn, progress_lsn });
    }
    if confirmed_lsn > progress_lsn {
        return Err(Error::SlotAhead { slot, confirmed_lsn, progress_lsn });
    }
    Ok(confirmed_lsn)
}

/// [`check_system`] and [`check_slot`] together, over one replication session of the slot's
/// database.
pub async fn check_continuity(
    session: &mut Session,
    slot: &str,
    recorded: &Recorded,
    progress_lsn: Lsn,
) -> Result<SlotStatus> {
    check_system(session, recorded, progress_lsn).await?;
    let status = super::slot::status(session, slot).await?;
    check_slot(slot, status.as_ref(), recorded, progress_lsn)?;
    status.ok_or(Error::SlotMissing { slot: slot.to_string(), progress_lsn })
}

/// The same over an ordinary session of the slot's database, on a primary.
pub async fn check_continuity_by_sql(
    session: &mut Session,
    config: &Config,
    slot: &str,
    recorded: &Recorded,
    progress_lsn: Lsn,
) -> Result<(System, SlotStatus)> {
    let system = check_system_by_sql(session, config, recorded, progress_lsn).await?;
    let status = super::slot::status(session, slot).await?;
    check_slot(slot, status.as_ref(), recorded, progress_lsn)?;
    let status = status.ok_or(Error::SlotMissing { slot: slot.to_string(), progress_lsn })?;
    Ok((system, status))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::fault::{Fault, Faulty};

    fn recorded() -> Recorded {
        Recorded {
            system_identifier: "1".to_string(),
            timeline: 1,
            database: "shop".to_string(),
            plugin: "pgoutput".to_string(),
        }
    }

    /// A slot in good order.
    pub(crate) fn status() -> SlotStatus {
        SlotStatus {
            name: "s".to_string(),
            plugin: "pgoutput".to_string(),
            database: "shop".to_string(),
            active_pid: None,
            restart_lsn: Some(Lsn(50)),
            confirmed_flush_lsn: Some(Lsn(100)),
            wal_status: Some("reserved".to_string()),
            invalidation_reason: None,
            temporary: false,
            failover: false,
            retained_bytes: 0,
        }
    }

    #[test]
    fn a_slot_at_or_before_progress_is_continued() {
        assert_eq!(check_slot("s", Some(&status()), &recorded(), Lsn(100)).unwrap(), Lsn(100));
        assert_eq!(check_slot("s", Some(&status()), &recorded(), Lsn(200)).unwrap(), Lsn(100));
    }

    #[test]
    fn etl_935_a_slot_beyond_progress_is_refused_naming_both() {
        let error = check_slot("s", Some(&status()), &recorded(), Lsn(99)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("0/64") && text.contains("0/63"), "{text}");
        assert_eq!(error.fault(), Fault::Stop);
    }

    #[test]
    fn missing_lost_and_foreign_slots_are_refused() {
        let check = |status: Option<SlotStatus>| {
            check_slot("s", status.as_ref(), &recorded(), Lsn(100)).unwrap_err()
        };
        assert!(matches!(check(None), Error::SlotMissing { .. }));
        let lost = SlotStatus { wal_status: Some("lost".to_string()), ..status() };
        assert!(matches!(check(Some(lost)), Error::SlotLost { .. }));
        let removed = SlotStatus { restart_lsn: None, wal_status: None, ..status() };
        assert!(matches!(check(Some(removed)), Error::SlotLost { .. }));
        let unsynced = SlotStatus { temporary: true, ..status() };
        assert!(check(Some(unsynced)).to_string().contains("in sync"));
        let reason = Some("idle_timeout".to_string());
        let idle = SlotStatus { invalidation_reason: reason, ..status() };
        assert!(check(Some(idle)).to_string().contains("idle_timeout"));
        let foreign = SlotStatus { plugin: "wal2json".to_string(), ..status() };
        assert!(matches!(check(Some(foreign)), Error::SlotForeign { what: "plugin", .. }));
        let foreign = SlotStatus { database: "other".to_string(), ..status() };
        assert!(matches!(check(Some(foreign)), Error::SlotForeign { what: "database", .. }));
    }

    #[test]
    fn a_history_file_tells_where_timelines_parted() {
        let history = "1\t0/3000060\tno recovery target specified\n\n2\t0/5000000\tx\n";
        assert_eq!(fork_in(history, 1), Some(Lsn(0x3000060)));
        assert_eq!(fork_in(history, 2), Some(Lsn(0x5000000)));
        assert_eq!(fork_in(history, 3), None);
    }
}
