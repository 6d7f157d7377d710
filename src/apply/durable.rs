//! Which of the applied transactions a crash of the target can no longer take back. Pure.
//!
//! Batches commit with synchronous_commit off. Some time after a COMMIT the target is asked where
//! its log stands; once it is flushed up to there, the batch and all before it are durable. A
//! target whose commits wait for standbys has flushed what they have flushed, too.

use std::collections::VecDeque;

use crate::lsn::Lsn;

/// Commits awaiting the flush of the target's log, oldest first.
#[derive(Debug, Default)]
pub(super) struct Durable {
    /// (position in the source's log, position in the target's log that makes it durable)
    pending: VecDeque<(Lsn, Lsn)>,
    /// The last commit, if the target has not been asked since.
    unplaced: Option<Lsn>,
    durable_lsn: Lsn,
}

impl Durable {
    /// Everything up to `durable_lsn` of the source is durable; nothing is pending.
    pub fn new(durable_lsn: Lsn) -> Self {
        Durable { pending: VecDeque::new(), unplaced: None, durable_lsn }
    }

    /// Source position up to which (exclusive) all is durable.
    pub fn durable_lsn(&self) -> Lsn {
        self.durable_lsn
    }

    /// Number of commits not known to be durable.
    pub fn pending(&self) -> usize {
        self.pending.len() + usize::from(self.unplaced.is_some())
    }

    /// A batch ending at `end_lsn` is committed.
    pub fn committed(&mut self, end_lsn: Lsn) {
        self.unplaced = Some(end_lsn);
    }

    /// After all of these commits the target's log stood at `target_insert_lsn`, and was flushed up
    /// to `target_flush_lsn`.
    pub fn stands(&mut self, target_insert_lsn: Lsn, target_flush_lsn: Lsn) {
        if let Some(end_lsn) = self.unplaced.take() {
            self.pending.push_back((end_lsn, target_insert_lsn));
        }
        while let Some((end_lsn, target_lsn)) = self.pending.front().copied() {
            if target_lsn > target_flush_lsn {
                break;
            }
            self.durable_lsn = end_lsn;
            self.pending.pop_front();
        }
    }

    /// The target has flushed every commit made so far.
    pub fn flushed_all(&mut self) {
        self.stands(Lsn(u64::MAX), Lsn(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_durable_once_the_target_flushed_it() {
        let mut durable = Durable::new(Lsn(10));
        durable.committed(Lsn(15));
        durable.committed(Lsn(20));
        assert_eq!(durable.pending(), 1);
        durable.stands(Lsn(1000), Lsn(999));
        assert_eq!(durable.durable_lsn(), Lsn(10));
        durable.committed(Lsn(30));
        durable.stands(Lsn(2000), Lsn(1999));
        assert_eq!((durable.durable_lsn(), durable.pending()), (Lsn(20), 1));
        durable.committed(Lsn(40));
        assert_eq!(durable.pending(), 2);
        durable.flushed_all();
        assert_eq!((durable.durable_lsn(), durable.pending()), (Lsn(40), 0));
    }
}
