//! How large a batch may become. Pure.
//!
//! Each statement and each commit costs the same however many rows it writes, and rows that are
//! written again within a batch are written once: under a backlog, a larger batch is cheaper. But
//! its locks are held for longer, more of it is repeated after a failure, and more memory is taken.
//! So batches grow while the target is done with full ones quickly, and shrink when it is not.

use std::time::Duration;

use crate::limit;

/// A full batch that took less may be followed by one several times as large.
const QUICK: Duration = Duration::from_millis(150);

/// So many times.
const STEP: usize = 4;

/// After a full batch that took longer, the next is half as large.
const SLOW: Duration = Duration::from_millis(1000);

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
}

impl Growth {
    /// Begins with the least. Where that is not below `most`, bounds do not change.
    pub fn new(least: Limits, most: Limits) -> Growth {
        Growth { least, most, now: least }
    }

    /// The target was done with a batch, full or not, after so long.
    pub fn learn(&mut self, full: bool, took: Duration) -> Limits {
        let Limits { bytes, transactions } = self.now;
        if full && took < QUICK {
            self.now = Limits {
                bytes: (bytes * STEP).min(self.most.bytes).max(bytes),
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(bytes: usize, transactions: usize) -> Limits {
        Limits { bytes, transactions }
    }

    fn learned(growth: &mut Growth, full: bool, took_ms: u64) -> (usize, usize) {
        let Limits { bytes, transactions } = growth.learn(full, Duration::from_millis(took_ms));
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
    fn bounds_that_were_asked_for_stay() {
        let mut growth = Growth::new(limits(5, 700), limits(5, 700));
        assert_eq!(learned(&mut growth, true, 1), (5, 700));
        assert_eq!(learned(&mut growth, true, 900), (5, 700));
    }
}
