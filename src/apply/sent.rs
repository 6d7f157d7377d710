//! How batches were sent, for whoever looks for what bounds a stream: told in the log, at level
//! debug, when it ends.

use super::batch::Batch;

/// Batches since the applier connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// All.
    batches: u64,
    /// Written as sets.
    as_sets: u64,
    /// Sent behind another that was under way.
    behind: u64,
    /// Of those, the ones that were not full.
    closely: u64,
    /// Begun in another session than the one under way.
    ahead: u64,
    /// Source transactions of the largest.
    transactions_max: u64,
}

impl Sent {
    /// One more is sent.
    pub fn count(&mut self, batch: &Batch, behind: bool, as_sets: bool, ahead: bool) {
        self.batches += 1;
        self.as_sets += u64::from(as_sets);
        self.behind += u64::from(behind);
        self.ahead += u64::from(ahead);
        self.closely += u64::from(behind && !batch.full);
        self.transactions_max = self.transactions_max.max(batch.transactions());
    }

    /// Says so.
    pub fn tell(&self, stream: &str) {
        let Sent { batches, as_sets, behind, closely, ahead, transactions_max } = *self;
        tracing::debug!(
            stream,
            batches,
            as_sets,
            behind,
            closely,
            ahead,
            transactions_max,
            "batches sent to the target"
        );
    }
}
