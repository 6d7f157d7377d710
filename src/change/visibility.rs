//! Exact visibility: was a streamed transaction already part of what the copy read?
//!
//! Every copied table keeps the `pg_current_snapshot()` it was read under. A transaction is in the
//! copy if and only if its id is below `xmax` and not in `xip`. So a lost snapshot, a copy begun
//! again, or a table added later needs no second slot and no write on the source, and is exact.
//! On a primary only: on a standby `xip` is empty.

use std::fmt;
use std::str::FromStr;

/// PostgreSQL's `pg_snapshot` (`txid_snapshot` before 13), with 64-bit ids.
///
/// <https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT>
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Lowest id that was still running; all below are visible or aborted.
    pub xmin: u64,
    /// First id not yet assigned; none from here on is visible.
    pub xmax: u64,
    /// Ids running when the snapshot was taken, ascending.
    pub xip: Vec<u64>,
}

impl Snapshot {
    /// True if the transaction with this 32-bit id, known to have committed, is visible.
    ///
    /// Ids wrap at 2^32; the one meant is the nearest to `xmax`, as PostgreSQL never lets two
    /// live ids lie 2^31 apart.
    pub fn sees(&self, xid: u32) -> bool {
        let full = nearest(xid, self.xmax);
        full < self.xmax && self.xip.binary_search(&full).is_err()
    }
}

fn nearest(xid: u32, reference: u64) -> u64 {
    let offset = xid.wrapping_sub(reference as u32) as i32;
    reference.saturating_add_signed(i64::from(offset))
}

/// The text was not `xmin:xmax:xip,...`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not a snapshot (expected the form 10:20:12,15)")]
pub struct ParseSnapshotError(String);

impl FromStr for Snapshot {
    type Err = ParseSnapshotError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| ParseSnapshotError(text.to_string()))
    }
}

fn parse(text: &str) -> Option<Snapshot> {
    let mut parts = text.split(':');
    let xmin = parts.next()?.parse().ok()?;
    let xmax = parts.next()?.parse().ok()?;
    let list = parts.next()?;
    let mut xip = Vec::new();
    if !list.is_empty() {
        for id in list.split(',') {
            xip.push(id.parse().ok()?);
        }
    }
    xip.sort_unstable();
    parts.next().is_none().then_some(Snapshot { xmin, xmax, xip })
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let xip: Vec<String> = self.xip.iter().map(u64::to_string).collect();
        write!(f, "{}:{}:{}", self.xmin, self.xmax, xip.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_sees_what_had_ended_and_nothing_else() {
        let snapshot: Snapshot = "10:20:12,15".parse().unwrap();
        assert_eq!(snapshot.to_string(), "10:20:12,15");
        for (xid, seen) in
            [(9, true), (11, true), (12, false), (15, false), (19, true), (20, false)]
        {
            assert_eq!(snapshot.sees(xid), seen, "{xid}");
        }
    }

    #[test]
    fn ids_are_compared_across_the_wrap() {
        let epoch = 1_u64 << 32;
        let snapshot = Snapshot { xmin: epoch + 5, xmax: epoch + 10, xip: vec![epoch + 7] };
        assert!(snapshot.sees(u32::MAX)); // last id of the epoch before
        assert!(snapshot.sees(6));
        assert!(!snapshot.sees(7));
        assert!(!snapshot.sees(10));
    }

    #[test]
    fn what_is_not_a_snapshot_is_refused() {
        for text in ["", "1", "1:2", "a:b:", "1:2:x", "1:2:3:4"] {
            assert!(text.parse::<Snapshot>().is_err(), "{text}");
        }
    }
}
