//! Options for jobs that follow for days: what is done when rows are refused, when tables are
//! altered, and when nobody writes.

use std::time::Duration;

use super::options::{JobArgs, on_off, size};
use crate::apply::OnRowError;
use crate::config::{self, parse_duration};
use crate::job::heartbeat::HeartbeatOptions;
use crate::job::place::{STREAMING_BYTES, StreamingOptions};
use crate::schema::policy::Policy;

/// Between beats, where only their statement was given.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Status is written twice a second; beats that come much faster only cost.
const HEARTBEAT_MIN: Duration = Duration::from_millis(100);

impl JobArgs {
    /// Whether transactions come while they are in progress, and where they wait.
    pub(super) fn streaming(
        &self,
        in_file: Option<String>,
        limit: Option<String>,
    ) -> Result<Option<StreamingOptions>, config::Error> {
        let limit = size("--streaming-limit", self.streaming_limit.clone().or(limit))?;
        let wanted = on_off("--streaming", self.streaming.clone().or(in_file), false)?;
        let limit_bytes = limit.unwrap_or(STREAMING_BYTES);
        Ok(wanted.then_some(StreamingOptions { limit_bytes }))
    }

    /// What is kept in a transaction that stays prepared cannot be seen, nor written in order.
    pub(super) fn on_row_error(
        &self,
        in_file: Option<String>,
        two_phase: bool,
    ) -> Result<OnRowError, config::Error> {
        let value = |message| config::Error::Value { option: "--on-row-error", message };
        let in_file = in_file.as_deref().map(str::parse).transpose().map_err(value)?;
        match self.on_row_error.or(in_file).unwrap_or_default() {
            OnRowError::Quarantine if two_phase => {
                Err(value("quarantine does not go with --two-phase on".to_string()))
            }
            given => Ok(given),
        }
    }

    /// What is kept may not be in a transaction that stays prepared either.
    pub(super) fn ddl(
        &self,
        in_file: Option<String>,
        two_phase: bool,
        publication: bool,
    ) -> Result<Option<Policy>, config::Error> {
        let value = |message| config::Error::Value { option: "--ddl", message };
        let in_file = in_file.as_deref().map(str::parse).transpose().map_err(value)?;
        match self.ddl.or(in_file) {
            Some(_) if two_phase => Err(value("does not go with --two-phase on".to_string())),
            Some(_) if publication => {
                Err(value("does not go with --publication, which may show a part".to_string()))
            }
            given => Ok(given),
        }
    }

    /// `--heartbeat` and `--heartbeat-sql`.
    pub(super) fn heartbeat(
        &self,
        interval: Option<String>,
        sql: Option<String>,
    ) -> Result<Option<HeartbeatOptions>, config::Error> {
        let value = |message| config::Error::Value { option: "--heartbeat", message };
        let in_file = interval.as_deref().map(parse_duration).transpose().map_err(value)?;
        let sql = self.heartbeat_sql.clone().or(sql);
        let given = self.heartbeat.or(in_file).or(sql.as_ref().map(|_| HEARTBEAT));
        if given.is_some_and(|interval| interval < HEARTBEAT_MIN) {
            return Err(value(format!("is at least {HEARTBEAT_MIN:?}")));
        }
        Ok(given.map(|interval| HeartbeatOptions { interval, sql }))
    }
}
