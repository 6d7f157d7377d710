//! How large a batch may become. Pure.
//!
//! Each statement and each commit costs the same however many rows it writes, and rows that are
//! written again within a batch are written once: under a backlog, a larger batch is cheaper. But
//! its locks are held for longer, more of it is repeated after a failure, and more memory is taken.
//! So batches grow while the target is done with full ones quickly, and shrink when it is not; and
//! they grow further while most of their changes are of rows that others of them change as well.

use std::time::Duration;

use crate::limit;

/// A full batch that took less may be followed by one several times as large.
const QUICK: Duration = Duration::from_millis(150);

/// So many times.
const STEP: usize = 4;

/// After a full batch that took longer, the next is half as large.
const SLOW: Duration = Duration::from_millis(1000);

/// A batch may be as many times as large as it has changes for each row that is written, from the
/// one to the other. With fewer, half of the changes may be of rows of their own, and the others of
/// so few that they are folded as well in a small batch: memory would be all that is spent.
const FOLDS: (usize, usize) = (3, 4);

/// Bounds of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A batch closes at this many bytes of changes.
    pub bytes: usize,
    /// A batch closes at this many source transactions.
    pub transactions: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { bytes: limit::BATCH_BYTES, transactions: limit::BATCH_TRANSACTIONS }
    }
}

/// The bounds in force, between the smallest and the largest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Growth {
    least: Limits,
    most: Limits,
    now: Limits,
    folds: usize,
}

impl Growth {
    /// Begins with the least. Where that is not below `most`, bounds do not change.
    pub fn new(least: Limits, most: Limits) -> Growth {
        Growth { least, most, now: least, folds: 1 }
    }

    /// The target was done with a batch, full or not, after so long; it had `folds` changes for
    /// each row that was written.
    pub fn learn(&mut self, full: bool, took: Duration, folds: usize) -> Limits {
        // Bounds that were asked for stay.
        let may = self.least.bytes < self.most.bytes;
        self.folds = if may && folds >= FOLDS.0 { folds.min(FOLDS.1) } else { 1 };
        let most_bytes = self.most.bytes.saturating_mul(self.folds).max(self.least.bytes);
        self.now.bytes = self.now.bytes.min(most_bytes);
        let Limits { bytes, transactions } = self.now;
        // A larger one takes no longer for that where rows are folded together.
        let quick = if self.folds > 1 { SLOW / 2 } else { QUICK };
        if full && took < quick {
            self.now = Limits {
                bytes: (bytes * STEP).min(most_bytes).max(bytes),
                transactions: (transactions * STEP).min(self.most.transactions).max(transactions),
            };
        } else if full && took > SLOW {
            self.now = Limits {
                bytes: (bytes / 2).max(self.least.bytes),
                transactions: (transactions / 2).max(self.least.transactions),
            };
        }
        self.now
    }

    /// How many changes the last batch had for each row that was written, up to a bound. Where rows
    /// are written again and again, a larger batch is hardly more to write, and saves writing them
    /// once more.
    pub fn folds(&self) -> usize {
        self.folds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(bytes: usize, transactions: usize) -> Limits {
        Limits { bytes, transactions }
    }

    fn learned(growth: &mut Growth, full: bool, took_ms: u64) -> (usize, usize) {
        let Limits { bytes, transactions } = growth.learn(full, Duration::from_millis(took_ms), 1);
        (bytes, transactions)
    }

    #[test]
    fn batches_grow_while_full_ones_are_quick_and_shrink_when_they_are_not() {
        let mut growth = Growth::new(limits(100, 10), limits(350, 80));
        assert_eq!(learned(&mut growth, false, 1), (100, 10));
        assert_eq!(learned(&mut growth, true, 1), (350, 40));
        assert_eq!(learned(&mut growth, true, 1), (350, 80));
        assert_eq!(learned(&mut growth, true, 200), (350, 80));
        assert_eq!(learned(&mut growth, true, 1100), (175, 40));
        assert_eq!(learned(&mut growth, true, 1100), (100, 20));
        assert_eq!(learned(&mut growth, true, 1100), (100, 10));
    }

    #[test]
    fn a_batch_whose_rows_are_written_again_and_again_may_be_larger() {
        let mut growth = Growth::new(limits(100, 10), limits(350, 80));
        let quick = Duration::from_millis(1);
        let mut bytes = |folds| growth.learn(true, quick, folds).bytes;
        assert_eq!([bytes(1), bytes(2), bytes(3), bytes(90)], [350, 350, 1050, 1400]);
        assert_eq!([bytes(90), bytes(0)], [1400, 350]);
        assert_eq!(growth.folds(), 1);
        let mut asked = Growth::new(limits(5, 700), limits(5, 700));
        assert_eq!(asked.learn(true, quick, 90).bytes, 5);
    }

    #[test]
    fn bounds_that_were_asked_for_stay() {
        let mut growth = Growth::new(limits(5, 700), limits(5, 700));
        assert_eq!(learned(&mut growth, true, 1), (5, 700));
        assert_eq!(learned(&mut growth, true, 900), (5, 700));
    }
}
