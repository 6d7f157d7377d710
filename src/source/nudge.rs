//! Has the server let go of WAL that a slot's reader has long confirmed.
//!
//! WAL is kept from a slot's restart_lsn on. That moves only at records of running transactions:
//! there the decoder writes its snapshot down, and begins again from it once the reader has
//! confirmed what lies behind. A server logs such a record every 15 seconds and at checkpoints, and
//! a transaction that is running at one holds it at the record before. So a slot keeps what all
//! databases of its server wrote in twice that time, however idle its own is and however prompt its
//! reader.
//!
//! 1. Look at what is confirmed and kept all the same.
//! 2. Once that is [`STEP_BYTES`], and as much was logged since the last time, have one more record
//!    logged: by pg_log_standby_snapshot() from 16 on, where the role may; else by making a
//!    temporary slot, which begins with just that, and dropping it. The slot would go on to wait
//!    for transactions that run; that is cut short, as the record is in the log by then.
//!
//! Making a slot has the server decode what is logged until it is consistent, and flush. Beside a
//! database that is idle nobody feels it; under 2,000 transactions a second in our own each time
//! cost the stream some 40 ms, seven times in twenty seconds. There a slot is made only once
//! [`BUSY_STEP_BYTES`] are kept, which the server's own records seldom let it come to.
//!
//! Nothing waits for any of this, and without it more WAL is kept, no more.
//!
//! <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-SNAPSHOT-SYNCHRONIZATION>,
//! <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>

use std::time::Instant;

use crate::id::quote_literal;
use crate::lsn::Lsn;
use crate::pg::{self, Session};

/// Bytes of log between two records that are asked for. Two such steps are kept, and twice what
/// comes in between two looks: of twice as much, 71 MB at 12 MB/s on a machine full of other work.
pub const STEP_BYTES: u64 = 8 << 20;

/// The same where a slot has to be made for it in a database that is busy.
pub const BUSY_STEP_BYTES: u64 = 256 << 20;

/// Transactions a second from which a database is busy.
const BUSY_RATE: f64 = 100.0;

/// SQLSTATEs of a slot's creation that got as far as to wait for somebody's transaction: lock
/// timeout, statement timeout.
const CUT_SHORT: [&str; 2] = ["55P03", "57014"];

/// max_replication_slots.
const NO_SLOT_FREE: &str = "53400";

/// Of one slot.
#[derive(Debug)]
pub struct Nudge {
    slot: String,
    plugin: String,
    /// Where the log ended at the last.
    nudged_lsn: Lsn,
    way: Option<Way>,
    /// A refusal was told.
    told: bool,
    /// Transactions that had ended in the database, and when they were counted.
    counted: Option<(i64, Instant)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Function,
    Slot,
    /// The server refuses both.
    Neither,
}

/// What came of a look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nudged {
    /// There was no need.
    No,
    /// The server logged a record.
    Yes,
    /// It refuses, for this reason; told once.
    Refused(String),
}

impl Nudge {
    /// For a slot of this name, with its output plugin.
    pub fn new(slot: &str, plugin: &str) -> Nudge {
        Nudge {
            slot: slot.to_string(),
            plugin: plugin.to_string(),
            nudged_lsn: Lsn::ZERO,
            way: None,
            told: false,
            counted: None,
        }
    }

    /// Looks once, and has a record logged where that helps. `session` is an ordinary session of
    /// the slot's database, used for this alone: it is given short timeouts. Takes a few seconds at
    /// most.
    ///
    /// Errors: what the wire gives; look again with a new session then.
    pub async fn look(&mut self, session: &mut Session) -> pg::Result<Nudged> {
        if self.way == Some(Way::Neither) {
            return Ok(Nudged::No);
        }
        // On a standby the log is the primary's to write.
        let sql = self.kept(
            ", case when not pg_catalog.pg_is_in_recovery() \
               then pg_catalog.pg_current_wal_insert_lsn() end, \
             coalesce((select d.xact_commit + d.xact_rollback from pg_catalog.pg_stat_database d \
               where d.datname = pg_catalog.current_database()), 0)",
        );
        let rows = session.query(&sql).await?;
        let Some(row) = rows.first() else { return Ok(Nudged::No) };
        let (kept, end): (i64, Option<Lsn>) = (row.parse(0)?, row.parse_opt(1)?);
        let Some(end_lsn) = end else { return Ok(Nudged::No) };
        let busy = self.is_busy(row.parse(2)?);
        let way = self.way(session);
        let step = if busy && way == Way::Slot { BUSY_STEP_BYTES } else { STEP_BYTES };
        if !due(step, kept, end_lsn, self.nudged_lsn) {
            return Ok(Nudged::No);
        }
        self.nudged_lsn = end_lsn;
        self.nudge(way, session).await
    }

    /// The same for a slot on a standby, whose `primary` writes the log.
    pub async fn look_from(
        &mut self,
        standby: &mut Session,
        primary: &mut Session,
    ) -> pg::Result<Nudged> {
        let rows = standby.query(&self.kept("")).await?;
        let Some(row) = rows.first() else { return Ok(Nudged::No) };
        let kept: i64 = row.parse(0)?;
        let end = primary.query_one("select pg_catalog.pg_current_wal_insert_lsn()", &[]).await?;
        let end_lsn = end.lsn(0)?;
        if !due(STEP_BYTES, kept, end_lsn, self.nudged_lsn) {
            return Ok(Nudged::No);
        }
        self.nudged_lsn = end_lsn;
        self.ask(primary).await
    }

    /// Asks how many bytes the slot keeps that are confirmed, and what `more` asks behind that.
    fn kept(&self, more: &str) -> String {
        format!(
            "select coalesce(pg_catalog.pg_wal_lsn_diff( \
               s.confirmed_flush_lsn, s.restart_lsn), 0)::int8{more} \
             from pg_catalog.pg_replication_slots s where s.slot_name = {}",
            quote_literal(&self.slot)
        )
    }

    /// Has a record logged now, if the server lets us. `session` as for [`Nudge::look`], and of a
    /// primary.
    ///
    /// Errors: as there.
    pub async fn ask(&mut self, session: &mut Session) -> pg::Result<Nudged> {
        match self.way(session) {
            Way::Neither => Ok(Nudged::No),
            way => self.nudge(way, session).await,
        }
    }

    fn way(&mut self, session: &Session) -> Way {
        *self.way.get_or_insert(match session.major_version() {
            16.. => Way::Function,
            _ => Way::Slot,
        })
    }

    /// Whether many transactions have ended in the database since the last look. Unknown is idle.
    fn is_busy(&mut self, ended: i64) -> bool {
        let last = self.counted.replace((ended, Instant::now()));
        last.is_some_and(|(before, at)| {
            // A look soon after another would take a handful for many.
            (ended - before) as f64 > BUSY_RATE * at.elapsed().as_secs_f64().max(1.0)
        })
    }

    async fn nudge(&mut self, way: Way, session: &mut Session) -> pg::Result<Nudged> {
        let mut refused = String::new();
        if way == Way::Function {
            match session.query("select pg_catalog.pg_log_standby_snapshot()").await {
                Ok(_) => return Ok(Nudged::Yes),
                Err(error) if error.is_closed() => return Err(error),
                Err(error) => refused = format!("{error}; "),
            }
        }
        let sql = format!(
            "select pg_catalog.pg_drop_replication_slot(s.slot_name) \
             from pg_catalog.pg_create_logical_replication_slot({}, {}, true) s",
            quote_literal(&format!("walferry_nudge_{:08x}", fastrand::u32(..))),
            quote_literal(&self.plugin)
        );
        session.execute("set lock_timeout = '100ms'; set statement_timeout = '2s'").await?;
        match session.query(&sql).await {
            Err(error) if error.is_closed() => return Err(error),
            Err(error) if error.code().is_some_and(|code| CUT_SHORT.contains(&code)) => {}
            Err(error) => {
                // A slot may come free; a right does not come by itself.
                if error.code() != Some(NO_SLOT_FREE) {
                    self.way = Some(Way::Neither);
                }
                let told = std::mem::replace(&mut self.told, true);
                let refusal = Nudged::Refused(format!("{refused}{error}"));
                return Ok(if told { Nudged::No } else { refusal });
            }
            Ok(_) => {}
        }
        self.way = Some(Way::Slot);
        Ok(Nudged::Yes)
    }
}

/// `kept` bytes are confirmed and in the log all the same.
fn due(step: u64, kept: i64, end_lsn: Lsn, nudged_lsn: Lsn) -> bool {
    u64::try_from(kept).is_ok_and(|kept| kept >= step) && end_lsn.bytes_since(nudged_lsn) >= step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_busy_where_many_transactions_ended_since_the_last_look() {
        let mut nudge = Nudge::new("kept", "pgoutput");
        assert!(!nudge.is_busy(1_000_000));
        assert!(!nudge.is_busy(1_000_090));
        assert!(nudge.is_busy(1_000_191));
        assert!(!nudge.is_busy(1_000_191));
    }

    #[test]
    fn a_record_is_due_once_a_step_is_kept_and_a_step_was_logged_since_the_last() {
        let (step, kept) = (STEP_BYTES, STEP_BYTES as i64);
        assert!(due(step, kept, Lsn(step), Lsn::ZERO));
        assert!(!due(step, kept - 1, Lsn(step), Lsn::ZERO));
        // Somebody's transaction holds the slot where it is: one record a step, not one a look.
        assert!(!due(step, kept * 9, Lsn(10 * step), Lsn(9 * step + 1)));
        assert!(due(step, kept * 9, Lsn(10 * step), Lsn(9 * step)));
        assert!(!due(step, -1, Lsn(step), Lsn::ZERO));
    }
}
