//! Options for how long a flip may take, and hold clients for.

use std::time::Duration;

use crate::config::file::Cutover;
use crate::config::{self, parse_duration};
use crate::cutover::Limits;

/// PostgreSQL's timeouts are 32 bits of milliseconds.
const LONGEST: Duration = Duration::from_secs(24 * 24 * 3600);

/// The options, of every command that switches something.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct LimitArgs {
    /// Do not begin while a stream is further behind [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub max_lag: Option<Duration>,
    /// Give up after trying for so long to stop writers [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub timeout: Option<Duration>,
    /// No statement waits longer for us in one try [default: 200ms]
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub lock_timeout: Option<Duration>,
    /// Once writers are stopped, let them go on if a target needs longer to drain [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub max_hold: Option<Duration>,
}

impl LimitArgs {
    /// As given, else as the file's `[cutover]` has them, else by default.
    pub fn limits(&self, file: &Cutover) -> Result<Limits, config::Error> {
        let default = Limits::default();
        let of = |option, own: Option<Duration>, text: &Option<String>, default| match (own, text) {
            (Some(own), _) => Ok(own),
            (None, Some(text)) => {
                let value = |message| config::Error::Value { option, message };
                limit(text).map_err(value)
            }
            (None, None) => Ok(default),
        };
        Ok(Limits {
            max_lag: of("[cutover] max-lag", self.max_lag, &file.max_lag, default.max_lag)?,
            timeout: of("[cutover] timeout", self.timeout, &file.timeout, default.timeout)?,
            lock_timeout: of(
                "[cutover] lock-timeout",
                self.lock_timeout,
                &file.lock_timeout,
                default.lock_timeout,
            )?,
            max_hold: of("[cutover] max-hold", self.max_hold, &file.max_hold, default.max_hold)?,
        })
    }
}

fn limit(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        long if long > LONGEST => {
            Err(format!("\"{text}\" is too long: 24d are the most that PostgreSQL can count"))
        }
        limit => Ok(limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_no_server_can_count_are_refused_by_name() {
        assert_eq!(limit("24d"), Ok(LONGEST));
        assert!(limit("25d").unwrap_err().contains("24d"));
        let file = Cutover { lock_timeout: Some("30d".to_string()), ..Cutover::default() };
        let error = LimitArgs::default().limits(&file).unwrap_err().to_string();
        assert!(error.starts_with("[cutover] lock-timeout: \"30d\" is too long"), "{error}");
    }
}
