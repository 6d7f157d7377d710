//! Which of the applied transactions a crash of the target can no longer take back. Pure.
//!
//! Batches commit with synchronous_commit off. After each COMMIT the target is asked where its log
//! stands; once it is flushed up to there, the batch is durable.

use std::collections::VecDeque;

use crate::lsn::Lsn;

/// Commits awaiting the flush of the target's log, oldest first.
#[derive(Debug, Default)]
pub(super) struct Durable {
    /// (position in the source's log, position in the target's log that makes it durable)
    pending: VecDeque<(Lsn, Lsn)>,
    durable_lsn: Lsn,
}

impl Durable {
    /// Everything up to `durable_lsn` of the source is durable; nothing is pending.
    pub fn new(durable_lsn: Lsn) -> Self {
        Durable { pending: VecDeque::new(), durable_lsn }
    }

    /// Source position up to which (exclusive) all is durable.
    pub fn durable_lsn(&self) -> Lsn {
        self.durable_lsn
    }

    /// Number of commits not known to be durable.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// A batch ending at `end_lsn` is committed; the target's log stood at `target_insert_lsn`
    /// after it.
    pub fn committed(&mut self, end_lsn: Lsn, target_insert_lsn: Lsn) {
        self.pending.push_back((end_lsn, target_insert_lsn));
    }

    /// The target's log is flushed up to `target_flush_lsn`.
    pub fn flushed(&mut self, target_flush_lsn: Lsn) {
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
        self.flushed(Lsn(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_durable_once_the_target_flushed_it() {
        let mut durable = Durable::new(Lsn(10));
        durable.committed(Lsn(20), Lsn(1000));
        durable.committed(Lsn(30), Lsn(2000));
        durable.flushed(Lsn(999));
        assert_eq!(durable.durable_lsn(), Lsn(10));
        durable.flushed(Lsn(1999));
        assert_eq!((durable.durable_lsn(), durable.pending()), (Lsn(20), 1));
        durable.flushed_all();
        assert_eq!((durable.durable_lsn(), durable.pending()), (Lsn(30), 0));
    }
}
