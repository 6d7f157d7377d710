//! How far a job's streams are, as stored for status.

use serde::Serialize;

use super::Result;
use super::store::Store;
use crate::id::Stream;
use crate::lsn::Lsn;

/// Positions of one stream, as stored for status.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StreamRow {
    /// Highest position received.
    pub received_lsn: Option<String>,
    /// Highest position decoded.
    pub decoded_lsn: Option<String>,
    /// Highest position handed to the buffer.
    pub buffered_lsn: Option<String>,
    /// Highest position applied.
    pub applied_lsn: Option<String>,
    /// Highest position durable on the applying side.
    pub durable_lsn: Option<String>,
    /// What the slot was told.
    pub confirmed_lsn: Option<String>,
    /// Bytes of WAL between the writing side's end and `applied_lsn`.
    pub lag_bytes: Option<i64>,
    /// Age of the newest applied transaction while behind, 0 when level.
    pub lag_seconds: Option<f64>,
    /// What keeps the stream from flowing, if something does.
    #[serde(rename = "stream_error")]
    pub error: Option<String>,
    /// Seconds since the row was written.
    pub age_seconds: Option<f64>,
    /// Highest position durable in the spool, or beyond on the applying side.
    pub spooled_lsn: Option<String>,
    /// Bytes of the spool's files.
    pub spool_bytes: Option<i64>,
    /// Bytes of WAL that the reading side keeps for the slot.
    pub retained_bytes: Option<i64>,
    /// Row changes written since the stream was opened, those of an open transaction included.
    pub rows_written: Option<i64>,
}

impl StreamRow {
    /// Bytes of WAL from `applied_lsn` to the writing side's end, if both are known.
    pub(super) fn behind(&self, end_lsn: Option<Lsn>) -> Option<i64> {
        let applied_lsn = self.applied_lsn.as_deref()?.parse::<Lsn>().ok()?;
        Some(end_lsn?.bytes_since(applied_lsn) as i64)
    }
}

impl Store {
    /// Stores a stream's positions for status.
    pub async fn save_stream(&mut self, stream: Stream, row: &StreamRow) -> Result<()> {
        let job = self.job().clone();
        let number = |value: Option<i64>| value.map(|v| v.to_string());
        let lag_bytes = number(row.lag_bytes);
        let lag_seconds = row.lag_seconds.map(|v| format!("{v:.3}"));
        self.session
            .query_params(
                "insert into walferry.stream as s values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, \
                 $11, clock_timestamp(), $12, $13, $14, $15) \
                 on conflict (job, stream) do update set received_lsn = excluded.received_lsn, \
                 decoded_lsn = excluded.decoded_lsn, buffered_lsn = excluded.buffered_lsn, \
                 applied_lsn = excluded.applied_lsn, durable_lsn = excluded.durable_lsn, \
                 confirmed_lsn = excluded.confirmed_lsn, lag_bytes = excluded.lag_bytes, \
                 lag_seconds = excluded.lag_seconds, error = excluded.error, \
                 updated_at = excluded.updated_at, spooled_lsn = excluded.spooled_lsn, \
                 spool_bytes = excluded.spool_bytes, retained_bytes = excluded.retained_bytes, \
                 rows_written = excluded.rows_written",
                &[
                    Some(job.as_str()),
                    Some(stream.as_str()),
                    row.received_lsn.as_deref(),
                    row.decoded_lsn.as_deref(),
                    row.buffered_lsn.as_deref(),
                    row.applied_lsn.as_deref(),
                    row.durable_lsn.as_deref(),
                    row.confirmed_lsn.as_deref(),
                    lag_bytes.as_deref(),
                    lag_seconds.as_deref(),
                    row.error.as_deref(),
                    row.spooled_lsn.as_deref(),
                    number(row.spool_bytes).as_deref(),
                    number(row.retained_bytes).as_deref(),
                    number(row.rows_written).as_deref(),
                ],
            )
            .await?;
        Ok(())
    }

    /// A stream's stored positions.
    pub async fn load_stream(&mut self, stream: Stream) -> Result<Option<StreamRow>> {
        let job = self.job().clone();
        let row = self
            .session
            .query_opt(
                "select received_lsn, decoded_lsn, buffered_lsn, applied_lsn, durable_lsn, \
                 confirmed_lsn, lag_bytes, lag_seconds, error, \
                 extract(epoch from clock_timestamp() - updated_at), \
                 spooled_lsn, spool_bytes, retained_bytes, rows_written \
                 from walferry.stream where job = $1 and stream = $2",
                &[Some(job.as_str()), Some(stream.as_str())],
            )
            .await?;
        let Some(row) = row else { return Ok(None) };
        let text = |i| row.opt(i).map(|v| v.map(str::to_string));
        Ok(Some(StreamRow {
            received_lsn: text(0)?,
            decoded_lsn: text(1)?,
            buffered_lsn: text(2)?,
            applied_lsn: text(3)?,
            durable_lsn: text(4)?,
            confirmed_lsn: text(5)?,
            lag_bytes: row.parse_opt(6)?,
            lag_seconds: row.parse_opt(7)?,
            error: text(8)?,
            age_seconds: row.parse_opt(9)?,
            spooled_lsn: text(10)?,
            spool_bytes: row.parse_opt(11)?,
            retained_bytes: row.parse_opt(12)?,
            rows_written: row.parse_opt(13)?,
        }))
    }
}
