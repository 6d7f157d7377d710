//! Time as the replication protocol counts it, and waits with a deadline.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Seconds from 1970-01-01 to 2000-01-01 UTC, PostgreSQL's epoch.
const POSTGRES_EPOCH_SECONDS: u64 = 946_684_800;

/// Microseconds since 2000-01-01 UTC, PostgreSQL's `TimestampTz`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct PgTimestamp(pub i64);

impl PgTimestamp {
    /// This machine's clock now.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let micros = since.as_micros() as i64 - (POSTGRES_EPOCH_SECONDS as i64 * 1_000_000);
        PgTimestamp(micros)
    }

    /// Microseconds since 1970-01-01 UTC, as SQL's epoch counts.
    pub fn unix_micros(self) -> i64 {
        self.0.saturating_add(POSTGRES_EPOCH_SECONDS as i64 * 1_000_000)
    }

    /// From microseconds since 1970-01-01 UTC.
    pub fn from_unix_micros(micros: i64) -> Self {
        PgTimestamp(micros.saturating_sub(POSTGRES_EPOCH_SECONDS as i64 * 1_000_000))
    }

    /// Seconds from `self` to this machine's now; never negative, so a source whose clock runs
    /// ahead of ours shows no lag rather than a negative one.
    pub fn seconds_ago(self) -> f64 {
        ((PgTimestamp::now().0 - self.0) as f64 / 1e6).max(0.0)
    }

    /// From `timestamptz` output text under DateStyle ISO, exact to the microsecond, whatever its
    /// offset: `2026-11-21 04:18:20.123456+05:30`. `None` for another text.
    pub fn from_iso(text: &str) -> Option<Self> {
        let sign = text.rfind(['+', '-']).filter(|at| *at > 10)?;
        let (local, offset) = text.split_at(sign);
        let local: jiff::civil::DateTime = local.parse().ok()?;
        let mut seconds = 0;
        for (part, unit) in offset.get(1..)?.splitn(3, ':').zip([3600, 60, 1]) {
            seconds += part.parse::<u16>().ok().map(i64::from)? * unit;
        }
        let east = if offset.starts_with('-') { -seconds } else { seconds };
        let utc = local.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_microsecond();
        Some(PgTimestamp(utc - (POSTGRES_EPOCH_SECONDS as i64 + east) * 1_000_000))
    }

    /// The timestamp as `timestamptz` input text, exact to the microsecond, for SQL.
    pub fn to_sql(self) -> String {
        match jiff::Timestamp::from_microsecond(self.unix_micros()) {
            Ok(timestamp) => timestamp.to_string(),
            Err(_) => "epoch".to_string(),
        }
    }
}

/// A point in time by which something must have happened.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// `wait` from now.
    pub fn after(wait: Duration) -> Self {
        Deadline(Instant::now() + wait)
    }

    /// Time left; zero once passed.
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// True once there is no time left.
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }
}

/// Waits between tries, doubling from `first` to `last`, with a little noise so that many
/// walferries do not knock on one server in step.
#[derive(Clone, Debug)]
pub struct Backoff {
    next: Duration,
    last: Duration,
}

impl Backoff {
    /// Starts at `first` and never waits longer than about `last`.
    pub fn new(first: Duration, last: Duration) -> Self {
        Backoff { next: first, last }
    }

    /// The wait before the next try.
    pub fn step(&mut self) -> Duration {
        let wait = self.next;
        self.next = (self.next * 2).min(self.last);
        wait.mul_f64(0.8 + 0.4 * fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_read_to_the_microsecond_in_any_offset() {
        let read = |text: &str| PgTimestamp::from_iso(text).map(|t| t.0);
        assert_eq!(read("2000-01-01 00:00:00+00"), Some(0));
        assert_eq!(read("2000-01-01 00:00:01.5+00"), Some(1_500_000));
        assert_eq!(read("2000-01-01 05:30:00.000001+05:30"), Some(1));
        assert_eq!(read("1999-12-31 20:29:45-03:30:15"), Some(0));
        for bad in ["", "2000-01-01 00:00:00", "2000-13-01 00:00:00+00", "now+00", "+", "x+y"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn postgres_epoch_is_the_year_2000() {
        assert_eq!(PgTimestamp(0).to_sql(), "2000-01-01T00:00:00Z");
        assert_eq!(PgTimestamp(1).to_sql(), "2000-01-01T00:00:00.000001Z");
    }
}
