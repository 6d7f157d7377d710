//! Options for jobs that follow for days: where changes wait, what is done when rows are refused,
//! when tables are altered, when both sides are written, and when nobody writes.

use std::time::Duration;

use super::options::{JobArgs, buffer, on_off, size};
use crate::apply::OnRowError;
use crate::apply::conflict::Policy as Settling;
use crate::buffer::durable::KafkaProperties;
use crate::config::{self, File, parse_duration};
use crate::job::heartbeat::HeartbeatOptions;
use crate::job::place::{BufferOptions, SPOOL_BYTES, STREAMING_BYTES, StreamingOptions};
use crate::schema::policy::Policy;

/// Between beats, where only their statement was given.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Status is written twice a second; beats that come much faster only cost.
const HEARTBEAT_MIN: Duration = Duration::from_millis(100);

impl JobArgs {
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

    /// Who wins was said, and is not the default.
    pub(super) fn settles(&self, file: &File) -> bool {
        self.on_conflict.is_some() || file.on_conflict.is_some()
    }

    /// `--two-way` and `--on-conflict`: only what the streams bring whole, and to both sides alike.
    pub(super) fn two_way(&self, file: &File) -> Result<Option<Settling>, config::Error> {
        let value = |message| config::Error::Value { option: "--two-way", message };
        let in_file = file.on_conflict.as_deref().map(str::parse).transpose().map_err(value)?;
        let given = self.on_conflict.clone().or(in_file);
        if !(self.two_way || file.two_way) {
            return match given {
                None => Ok(None),
                Some(_) => Err(value("is what --on-conflict is for: give both".to_string())),
            };
        }
        let quarantine = file.on_row_error.as_deref() == Some("quarantine")
            || self.on_row_error == Some(OnRowError::Quarantine);
        let asks = |switch: &Option<String>| switch.as_deref() == Some("on");
        let others = [
            ("--two-phase on", asks(&self.two_phase) || asks(&file.two_phase)),
            ("--publication", self.publication.is_some() || file.publication.is_some()),
            ("--tables-only", self.tables_only || file.tables_only),
            ("[[map]]", !file.map.is_empty()),
            ("--ddl", self.ddl.is_some() || file.ddl.is_some()),
            ("--on-row-error quarantine", quarantine),
            ("--one-way", self.one_way || file.one_way),
        ];
        match others.iter().find(|(_, asked)| *asked) {
            Some((other, _)) => Err(value(format!("does not go with {other}"))),
            None => Ok(Some(given.unwrap_or_default())),
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

    /// Where changes wait. `in_file`: buffer, limit and budget of walferry.toml.
    pub(super) fn buffering(
        &self,
        in_file: (Option<String>, Option<String>, Option<String>),
        kafka: KafkaProperties,
    ) -> Result<BufferOptions, config::Error> {
        let (kind, limit, budget) = in_file;
        let limit = size("--spool-limit", self.spool_limit.clone().or(limit))?;
        Ok(BufferOptions {
            kind: self.buffer.clone().or(kind).as_deref().map(buffer).transpose()?,
            spool_bytes: limit.unwrap_or(SPOOL_BYTES),
            wal_budget_bytes: size("--wal-budget", self.wal_budget.clone().or(budget))?,
            kafka,
        })
    }

    /// `--streaming` and `--streaming-limit`.
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
}
