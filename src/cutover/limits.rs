//! The times that a flip keeps within, as they are asked for, stored and gone by.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Flattened into whatever asks for a flip, and stored there in whole milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// `--max-lag`: a stream that is further behind at the start refuses the flip.
    #[serde(rename = "max_lag_ms", with = "millis")]
    pub max_lag: Duration,
    /// `--timeout`: of all tries to stop writers, or readers, together.
    #[serde(rename = "timeout_ms", with = "millis")]
    pub timeout: Duration,
    /// `--lock-timeout`: in one try, of the wait for clients to be held and then for locks, and so
    /// the longest that a statement of theirs waits behind ours; PostgreSQL's setting of that name
    /// (<https://www.postgresql.org/docs/current/runtime-config-client.html>).
    #[serde(rename = "lock_timeout_ms", with = "millis")]
    pub lock_timeout: Duration,
    /// `--max-hold`: how long writers may be held once they are stopped. What leads readers alone
    /// does not have it.
    #[serde(rename = "max_hold_ms", with = "millis", default = "max_hold")]
    pub max_hold: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_lag: Duration::from_secs(1),
            timeout: Duration::from_secs(30),
            lock_timeout: Duration::from_millis(200),
            max_hold: max_hold(),
        }
    }
}

impl Limits {
    /// Until a flip that has begun is over, or has been given up.
    pub fn together(&self) -> Duration {
        self.timeout.saturating_add(self.max_hold)
    }
}

fn max_hold() -> Duration {
    Duration::from_secs(5)
}

/// Whole milliseconds.
mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Asked {
        attempt: String,
        #[serde(flatten)]
        limits: Limits,
    }

    #[test]
    fn limits_are_stored_flat_and_read_as_earlier_versions_stored_them() {
        let stored = json!({"attempt": "a", "max_lag_ms": 1500, "timeout_ms": 30_000,
            "lock_timeout_ms": 200, "max_hold_ms": 7000});
        let limits = Limits {
            max_lag: Duration::from_millis(1500),
            max_hold: Duration::from_secs(7),
            ..Limits::default()
        };
        let asked = Asked { attempt: "a".to_string(), limits };
        assert_eq!(serde_json::to_value(&asked).unwrap(), stored);
        assert_eq!(serde_json::from_value::<Asked>(stored.clone()).unwrap(), asked);
        assert_eq!(serde_json::from_str::<Asked>(&stored.to_string()).unwrap(), asked);
        // Readers are led without it.
        let mut reads = stored;
        reads.as_object_mut().unwrap().remove("max_hold_ms");
        let read = serde_json::from_value::<Asked>(reads.clone()).unwrap();
        assert_eq!(read.limits, Limits { max_hold: Duration::from_secs(5), ..limits });
        reads.as_object_mut().unwrap().remove("timeout_ms");
        assert!(serde_json::from_value::<Asked>(reads).is_err());
    }
}
