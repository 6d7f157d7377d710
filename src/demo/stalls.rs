//! How long statements took, in fixed memory.

use std::time::Duration;

/// Steps within each doubling: values are kept to 6 %.
const STEPS: u64 = 16;

/// A histogram of durations from a microsecond to centuries.
#[derive(Clone, Debug)]
pub struct Stalls {
    counts: Vec<u64>,
    total: u64,
    longest: Duration,
    longest_statement: String,
}

impl Default for Stalls {
    fn default() -> Self {
        Stalls {
            counts: vec![0; 64 * STEPS as usize],
            total: 0,
            longest: Duration::ZERO,
            longest_statement: String::new(),
        }
    }
}

impl Stalls {
    /// Adds one; `statement` is kept if it was the longest.
    pub fn record(&mut self, took: Duration, statement: &str) {
        if let Some(count) = self.counts.get_mut(bucket(took)) {
            *count += 1;
        }
        self.total += 1;
        if took > self.longest {
            self.longest = took;
            self.longest_statement = statement.chars().take(100).collect();
        }
    }

    /// The longest, exactly.
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// What took longest, its first 100 characters.
    pub fn longest_statement(&self) -> &str {
        &self.longest_statement
    }

    /// A duration that the given part (0 to 1) of all statements stayed within, to 6 %.
    pub fn percentile(&self, part: f64) -> Duration {
        let rank = (self.total as f64 * part).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank && *count > 0 {
                return upper(index).min(self.longest);
            }
        }
        self.longest
    }
}

/// Exact below 16 µs; above, the four bits after the leading one.
fn bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    if micros < STEPS {
        return micros as usize;
    }
    let shift = 59 - u64::from(micros.leading_zeros());
    ((shift + 1) * STEPS + (micros >> shift) - STEPS) as usize
}

fn upper(bucket: usize) -> Duration {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return Duration::from_micros(bucket);
    }
    let shift = bucket / STEPS - 1;
    Duration::from_micros(((bucket % STEPS + STEPS + 1) << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_a_sixteenth() {
        let mut stalls = Stalls::default();
        for millis in 1..=1000 {
            stalls.record(Duration::from_millis(millis), "x");
        }
        for (part, exact) in [(0.5, 500.0), (0.99, 990.0), (0.001, 1.0)] {
            let found = stalls.percentile(part).as_secs_f64() * 1000.0;
            assert!((exact..exact * 1.07).contains(&found), "{part}: {found}");
        }
        assert_eq!(stalls.longest(), Duration::from_secs(1));
        assert_eq!(stalls.percentile(1.0), Duration::from_secs(1));
    }

    #[test]
    fn every_duration_is_within_its_bucket() {
        for micros in [0, 1, 15, 16, 17, 31, 32, 33, 1000, 123_456_789, u64::MAX / 2] {
            let took = Duration::from_micros(micros);
            assert!(upper(bucket(took)) >= took, "{micros}");
            assert!(bucket(took) == 0 || upper(bucket(took) - 1) < took, "{micros}");
        }
    }
}
