//! Standbys that the target's commits wait for: what they lack is not durable, as one of them may
//! take over.

use std::time::Duration;

use super::{Applier, Durable, Error, Result};
use crate::lsn::Lsn;
use crate::pg::{Row, Session};

/// Asks where the target's log stands, how much of it nothing can take back any more, and whether
/// that is for the target's own disk alone to say. Where a commit waits for standbys, one of them
/// may take over with no more than it has flushed, and the slot must not have been told of what it
/// lacks. Whoever may not see standbys goes by the target's own disk.
/// <https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION>
pub(super) const POSITION: &str = "select pg_catalog.pg_current_wal_insert_lsn(), \
     case when own.alone then pg_catalog.pg_current_wal_flush_lsn() \
     else least(pg_catalog.pg_current_wal_flush_lsn(), coalesce((\
     select r.flush_lsn from pg_catalog.pg_stat_replication r \
     where r.sync_state in ('sync', 'quorum') order by r.flush_lsn limit 1), '0/0')) end, \
     own.alone from (select pg_catalog.current_setting('synchronous_standby_names') = '' \
     or not pg_catalog.pg_has_role('pg_read_all_stats', 'usage') as alone) own";

/// At its end a stream waits for synchronous standbys so many times, and so long each time.
const STANDBY_WAITS: u32 = 25;
const STANDBY_WAIT: Duration = Duration::from_millis(20);

/// What of an earlier applier's commits is durable: they are on the target's own disk, and a
/// standby that may take over can lack them.
pub(super) async fn beginning(session: &mut Session, progress_lsn: Lsn) -> Result<Durable> {
    let row = session.query_one(POSITION, &[]).await?;
    Durable::standing(Some(&row), progress_lsn)
}

impl Durable {
    /// The same by the answer to [`POSITION`].
    pub fn standing(position: Option<&Row>, progress_lsn: Lsn) -> Result<Durable> {
        let row = position.ok_or_else(|| Error::Broken("no answer about the log".to_string()))?;
        let mut durable = Durable::new(Lsn::ZERO);
        durable.committed(progress_lsn);
        match row.bool(2)? {
            true => durable.flushed_all(),
            false => durable.stands(row.lsn(0)?, row.lsn(1)?),
        }
        Ok(durable)
    }
}

impl Applier {
    /// Exclusive: what of it is durable, standbys that the target's commits wait for included;
    /// `0/0` while they have not flushed it.
    pub fn durable(&self) -> Lsn {
        self.applied.durable_lsn
    }

    /// Waits half a second for standbys that the target's commits wait for, before the first batch:
    /// for a slot that must be told all that is in hand before it is read.
    ///
    /// Error: `Again`, to be tried again, where they lack some of it after that.
    pub async fn await_durable(&mut self) -> Result<()> {
        self.wait_for_standbys().await?;
        self.applied.durable_lsn = self.durable.durable_lsn();
        if self.durable.pending() == 0 {
            return Ok(());
        }
        Err(Error::standbys_lack(self.progress_lsn))
    }

    pub(super) async fn wait_for_standbys(&mut self) -> Result<()> {
        for _ in 0..STANDBY_WAITS {
            if self.durable.pending() == 0 {
                break;
            }
            tokio::time::sleep(STANDBY_WAIT).await;
            self.see_flushed().await?;
        }
        Ok(())
    }
}

impl Error {
    /// To be tried again: what is in hand is not durable yet.
    pub fn standbys_lack(progress_lsn: Lsn) -> Error {
        Error::Again(format!(
            "a standby that the target's commits wait for (synchronous_standby_names) lacks some \
             of what was applied up to {progress_lsn}: it is waited for"
        ))
    }
}
