//! The replication commands and the COPY BOTH stream.
//!
//! <https://www.postgresql.org/docs/current/protocol-replication.html>

use std::time::Instant;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;

use super::frame::Frame;
use super::{Error, Result, Session};
use crate::clock::PgTimestamp;
use crate::id::quote_ident;
use crate::lsn::Lsn;

/// A slot just made, with the snapshot that fits it.
#[derive(Clone, Debug)]
pub struct CreatedSlot {
    /// Everything committed before it is in the snapshot, everything after comes from the slot.
    pub consistent_lsn: Lsn,
    /// For SET TRANSACTION SNAPSHOT; dies with the next command on the session that made it.
    pub snapshot_name: String,
}

/// How long a slot lives, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// As long as the session that makes it.
    Temporary,
    /// Until it is dropped.
    Permanent,
    /// Likewise, and standbys that synchronize slots keep a copy of it: 17 and on.
    ///
    /// <https://www.postgresql.org/docs/current/logicaldecoding-explanation.html#LOGICALDECODING-REPLICATION-SLOTS-SYNCHRONIZATION>
    Failover,
}

/// One message of the stream.
#[derive(Debug)]
pub enum ReplicationMessage {
    /// Output of the plugin.
    Data {
        /// Where the message stands; for pgoutput's Commit the end of the transaction.
        start_lsn: Lsn,
        /// The server's end of WAL when it was sent.
        end_lsn: Lsn,
        /// The plugin's bytes.
        data: Bytes,
    },
    /// A sign of life.
    Keepalive {
        /// All that stands before it has been sent.
        end_lsn: Lsn,
        /// The server wants an answer at once, or it will hang up.
        reply_requested: bool,
    },
}

impl Session {
    /// CREATE_REPLICATION_SLOT ... LOGICAL with an exported snapshot.
    ///
    /// Waits for every transaction that was running when it began; `lock_timeout` and
    /// `statement_timeout` set on this session bound the wait. The session must stay idle for as
    /// long as the snapshot is needed.
    pub async fn create_slot(
        &mut self,
        name: &str,
        plugin: &str,
        kind: SlotKind,
    ) -> Result<CreatedSlot> {
        let (temporary, exporting) = match kind {
            SlotKind::Temporary => ("TEMPORARY ", "EXPORT_SNAPSHOT"),
            SlotKind::Permanent => ("", "EXPORT_SNAPSHOT"),
            SlotKind::Failover => ("", "(SNAPSHOT 'export', FAILOVER)"),
        };
        let sql = format!(
            "CREATE_REPLICATION_SLOT {} {temporary}LOGICAL {} {exporting}",
            quote_ident(name),
            quote_ident(plugin)
        );
        let rows = self.query(&sql).await?;
        let row = rows.first().ok_or_else(|| Error::Result("slot without a row".to_string()))?;
        Ok(CreatedSlot { consistent_lsn: row.lsn(1)?, snapshot_name: row.string(2)? })
    }

    /// START_REPLICATION from `start_lsn` (the server begins no earlier than the slot's
    /// confirmed position). From here on only [`Session::replication_message`] and
    /// [`Session::send_feedback`] may be called.
    pub async fn start_replication(
        &mut self,
        slot: &str,
        start_lsn: Lsn,
        options: &[(&str, &str)],
    ) -> Result<()> {
        let options: Vec<String> = options
            .iter()
            .map(|(name, value)| format!("{} '{}'", quote_ident(name), value.replace('\'', "''")))
            .collect();
        let sql = format!(
            "START_REPLICATION SLOT {} LOGICAL {start_lsn} ({})",
            quote_ident(slot),
            options.join(", ")
        );
        let begun = Instant::now();
        let started = self.send_start(&sql).await;
        self.tell_witness(&sql, begun, started.as_ref().err());
        started
    }

    async fn send_start(&mut self, sql: &str) -> Result<()> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)
            .map_err(|e| self.protocol(format!("cannot encode query: {e}")))?;
        self.begin_exchange()?;
        self.send(&out).await?;
        loop {
            match self.reader.next().await.map_err(|e| self.lost(e))? {
                Frame::CopyBoth => return Ok(()),
                frame => match self.absorb(frame) {
                    Ok(_) => {}
                    Err(error) => return Err(self.drain(error).await),
                },
            }
        }
    }

    /// The next message of the stream; `None` when the server ended it. Cancel-safe.
    pub async fn replication_message(&mut self) -> Result<Option<ReplicationMessage>> {
        loop {
            let frame = self.reader.next().await.map_err(|e| self.lost(e))?;
            if let Some(message) = self.replication_frame(frame)? {
                return Ok(message);
            }
        }
    }

    /// A message that has already arrived, without waiting: `None` if there is none.
    pub fn buffered_replication_message(&mut self) -> Result<Option<ReplicationMessage>> {
        while let Some(frame) = self.reader.buffered().map_err(|e| self.lost(e))? {
            if let Some(Some(message)) = self.replication_frame(frame)? {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    fn replication_frame(&mut self, frame: Frame) -> Result<Option<Option<ReplicationMessage>>> {
        if let Frame::CopyData(data) = frame {
            let message = parse(data);
            return message
                .map(|m| Some(Some(m)))
                .ok_or_else(|| self.protocol("malformed replication message".to_string()));
        }
        match self.absorb(frame)? {
            Some(Message::CopyDone | Message::ReadyForQuery(_)) => Ok(Some(None)),
            _ => Ok(None),
        }
    }

    /// Standby status update. All three positions count as "the byte after": `flushed` is what the
    /// slot may forget. Short; not cancel-safe.
    pub async fn send_feedback(
        &mut self,
        received: Lsn,
        flushed: Lsn,
        applied: Lsn,
        reply_requested: bool,
    ) -> Result<()> {
        let mut out = BytesMut::with_capacity(64);
        out.put_u8(b'd');
        out.put_u32(4 + 34);
        out.put_u8(b'r');
        out.put_u64(received.0);
        out.put_u64(flushed.0);
        out.put_u64(applied.0);
        out.put_i64(PgTimestamp::now().0);
        out.put_u8(u8::from(reply_requested));
        self.send(&out).await
    }
}

fn parse(mut data: Bytes) -> Option<ReplicationMessage> {
    match data.try_get_u8().ok()? {
        b'w' => {
            let start_lsn = Lsn(data.try_get_u64().ok()?);
            let end_lsn = Lsn(data.try_get_u64().ok()?);
            let _sent_at = data.try_get_u64().ok()?;
            Some(ReplicationMessage::Data { start_lsn, end_lsn, data })
        }
        b'k' => {
            let end_lsn = Lsn(data.try_get_u64().ok()?);
            let _sent_at = data.try_get_u64().ok()?;
            let reply_requested = data.try_get_u8().ok()? == 1;
            Some(ReplicationMessage::Keepalive { end_lsn, reply_requested })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_a_replication_message_or_refused(
            tag in prop::sample::select(b"wkr\x00".to_vec()),
            body in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut data = vec![tag];
            data.extend_from_slice(&body);
            let whole = match tag {
                b'w' => body.len() >= 24,
                b'k' => body.len() >= 17,
                _ => false,
            };
            prop_assert_eq!(parse(Bytes::from(data)).is_some(), whole);
        }
    }

    #[test]
    fn an_empty_message_is_refused() {
        assert!(parse(Bytes::new()).is_none());
    }
}
