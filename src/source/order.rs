//! A snapshot placed in the log by SQL alone: which position has everything it sees before it, and
//! nothing that it does not see.
//!
//! A replication connection exports a slot's snapshot, which is at a position by construction. SQL
//! functions make a slot without one. An ordinary snapshot need not be at any position: a commit is
//! in the log a moment before it can be seen, and two may become visible in the other order. So a
//! temporary slot is asked, after the snapshot was taken, which transactions committed in which
//! order; the snapshot tells of each whether it sees it. If all that are seen come before all that
//! are not, the position between them is the snapshot's. Else another is taken: the other order
//! lasts for microseconds.
//!
//! What committed before the slot's own consistent point does not come from it. All of that is seen
//! by a snapshot that lists none as running of those that ran when the slot was made: a commit that
//! is in the log and cannot be seen yet belongs to a transaction that counts as running.
//!
//! Left out: standbys, whose snapshots do not list running transactions.

use std::collections::BTreeSet;
use std::time::Duration;

use super::options::plugin_options;
use super::peek::{Peeks, Starts};
use super::snapshot::{self, ExportedSnapshot};
use super::{Result, StreamOptions, slot};
use crate::change::Snapshot;
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, Session, SlotKind};

/// A temporary slot that knows in which order transactions commit from its consistent point on.
#[derive(Debug)]
pub struct Order {
    session: Session,
    peeks: Peeks,
    starts: Starts,
    running: BTreeSet<u64>,
    /// Everything from here on is known.
    pub consistent_lsn: Lsn,
}

/// Where a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// What it sees committed before this, and what it does not see commits here or later.
    At(Lsn),
    /// At no position: another snapshot may be.
    Nowhere,
    /// Not known to this slot, as something it never saw may have committed before it: another slot
    /// may know.
    Unknown,
}

impl Order {
    /// Makes the slot, of the plugin that `options` record, waiting for open transactions up to
    /// `wait`. It goes with this value's session. Errors: those of [`slot::create_plain`].
    pub async fn watch(config: &Config, options: StreamOptions, wait: Duration) -> Result<Order> {
        let mut spoken = options.spoken()?;
        let mut session = Session::connect(config, Purpose::Sql).await?;
        let mut watcher = Session::connect(config, Purpose::Sql).await?;
        let made = slot::CreateOptions {
            name: options.slot.clone(),
            plugin: options.recorded.plugin.clone(),
            kind: SlotKind::Temporary,
            wait,
        };
        loop {
            let consistent_lsn =
                slot::create_plain(&mut session, &mut watcher, &made, |_| {}).await?;
            let running = snapshot::current(&mut session).await?.xip.into_iter().collect();
            let major = session.major_version();
            let wanted = plugin_options(spoken, major, &options);
            let peeks = Peeks::new(&options.slot, spoken.plugin, major, &wanted);
            match session.query(&peeks.first()).await {
                Ok(_) => {
                    let mut starts = Starts::of(&session, spoken.plugin);
                    starts.take();
                    return Ok(Order { session, peeks, starts, running, consistent_lsn });
                }
                // An error drops a temporary slot.
                Err(error) if spoken.older(&error) => spoken.admit(&options.slot)?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// True if its session can start the plugin no more: another slot has to be made.
    pub fn is_spent(&self) -> bool {
        self.starts.are_spent()
    }

    /// Where `exported` is, or is not. `floor_lsn` is a record's boundary not before the consistent
    /// point, read before the snapshot was taken; `upto_lsn` is one on disk, read after. The place
    /// is not before `floor_lsn`.
    pub async fn place(
        &mut self,
        exported: &ExportedSnapshot,
        floor_lsn: Lsn,
        upto_lsn: Lsn,
    ) -> Result<Place> {
        if exported.snapshot.xip.iter().any(|xid| self.running.contains(xid)) {
            return Ok(Place::Unknown);
        }
        self.starts.take();
        let commits = self.commits(upto_lsn).await?;
        Ok(between(&commits, &exported.snapshot, floor_lsn, upto_lsn))
    }

    /// Transactions that committed before `upto_lsn`, and maybe a few after it: id and exclusive
    /// end, in order. Those with nothing that the plugin shows may be left out.
    async fn commits(&mut self, upto_lsn: Lsn) -> Result<Vec<(u32, Lsn)>> {
        let rows = self.session.query(&self.peeks.commits(upto_lsn)).await?;
        let commits = rows.iter().map(|row| Ok((row.parse(0)?, row.lsn(1)?)));
        let mut commits = commits.collect::<Result<Vec<(u32, Lsn)>>>()?;
        commits.sort_by_key(|(_, end_lsn)| *end_lsn);
        Ok(commits)
    }
}

fn between(commits: &[(u32, Lsn)], snapshot: &Snapshot, floor_lsn: Lsn, upto_lsn: Lsn) -> Place {
    let seen = commits.iter().take_while(|(xid, _)| snapshot.sees(*xid)).count();
    let (before, after) = commits.split_at(seen);
    if after.iter().any(|(xid, _)| snapshot.sees(*xid)) {
        return Place::Nowhere;
    }
    let last_lsn = before.last().map_or(floor_lsn, |(_, end_lsn)| floor_lsn.max(*end_lsn));
    match after.first() {
        // All that committed before it is seen, and nothing that committed after it.
        None => Place::At(upto_lsn.max(last_lsn)),
        // In the log before the floor was read, and not to be seen yet.
        Some((_, end_lsn)) if *end_lsn <= last_lsn => Place::Nowhere,
        Some(_) => Place::At(last_lsn),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(commits: &[(u32, u64)]) -> Place {
        let snapshot = Snapshot { xmin: 10, xmax: 20, xip: vec![12, 15] };
        let commits: Vec<_> = commits.iter().map(|(xid, lsn)| (*xid, Lsn(*lsn))).collect();
        between(&commits, &snapshot, Lsn(100), Lsn(500))
    }

    #[test]
    fn a_snapshot_is_between_what_it_sees_and_what_it_does_not() {
        assert_eq!(place(&[]), Place::At(Lsn(500)));
        assert_eq!(place(&[(9, 90), (11, 150)]), Place::At(Lsn(500)));
        assert_eq!(place(&[(9, 90), (11, 150), (12, 200), (21, 300)]), Place::At(Lsn(150)));
        // What is seen ended before the floor, what is not begins behind it.
        assert_eq!(place(&[(9, 90), (15, 130)]), Place::At(Lsn(100)));
    }

    #[test]
    fn a_snapshot_that_sees_the_later_of_two_is_nowhere() {
        assert_eq!(place(&[(12, 150), (11, 200)]), Place::Nowhere);
        assert_eq!(place(&[(9, 120), (20, 150), (19, 200)]), Place::Nowhere);
        // Committed before the floor, and still not seen.
        assert_eq!(place(&[(12, 90)]), Place::Nowhere);
    }
}
