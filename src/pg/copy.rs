//! COPY in and out, frames passed through untouched.

use bytes::{BufMut, Bytes, BytesMut};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;

use super::frame::Frame;
use super::{Error, Result, ServerError, Session};

/// Bytes of CopyData collected before they are sent: few system calls, little memory.
const COPY_SEND_BYTES: usize = 256 << 10;

/// A running `COPY ... TO STDOUT`. Dropped before its end, the session is unusable.
#[derive(Debug)]
pub struct CopyOut<'a> {
    session: &'a mut Session,
}

/// A running `COPY ... FROM STDIN`. Dropped before [`CopyIn::finish`], the session is unusable and
/// the server rolls back when it is dropped too.
#[derive(Debug)]
pub struct CopyIn<'a> {
    session: &'a mut Session,
    out: BytesMut,
    /// The server ended the COPY with an error, which has been given; it takes no more data.
    failed: bool,
}

impl Session {
    /// Starts `COPY ... TO STDOUT`.
    pub async fn copy_out(&mut self, sql: &str) -> Result<CopyOut<'_>> {
        self.start_copy(sql).await?;
        Ok(CopyOut { session: self })
    }

    /// Starts `COPY ... FROM STDIN`.
    pub async fn copy_in(&mut self, sql: &str) -> Result<CopyIn<'_>> {
        self.start_copy(sql).await?;
        Ok(CopyIn { session: self, out: BytesMut::new(), failed: false })
    }

    async fn start_copy(&mut self, sql: &str) -> Result<()> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)
            .map_err(|e| self.protocol(format!("cannot encode query: {e}")))?;
        self.begin_exchange()?;
        self.send(&out).await?;
        match self.receive().await {
            Ok(Message::CopyInResponse(_) | Message::CopyOutResponse(_)) => Ok(()),
            Ok(_) => Err(self.protocol(format!("not a COPY: {sql}"))),
            Err(error) => Err(self.drain(error).await),
        }
    }

    /// Reads up to ReadyForQuery after an error, so that the session can go on; gives the error.
    pub(super) async fn drain(&mut self, error: Error) -> Error {
        if error.is_closed() {
            return error;
        }
        loop {
            match self.receive().await {
                Ok(Message::ReadyForQuery(body)) => {
                    self.end_exchange(body.status());
                    return error;
                }
                Ok(_) => {}
                Err(lost) if lost.is_closed() => return lost,
                Err(_) => {}
            }
        }
    }
}

impl CopyOut<'_> {
    /// As [`Session::take_warnings`], while the COPY runs.
    pub fn take_warnings(&mut self) -> Vec<ServerError> {
        self.session.take_warnings()
    }

    /// The next piece of data (text and CSV: whole lines; binary: see the manual), `None` at the
    /// end, after which the session is ready again.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let frame = self.session.reader.next().await.map_err(|e| self.session.lost(e))?;
            if let Frame::CopyData(data) = frame {
                return Ok(Some(data));
            }
            match self.session.absorb(frame) {
                Ok(Some(Message::ReadyForQuery(body))) => {
                    self.session.end_exchange(body.status());
                    return Ok(None);
                }
                Ok(_) => {}
                Err(error) => return Err(self.session.drain(error).await),
            }
        }
    }
}

impl CopyIn<'_> {
    /// Adds data; sent when enough has come together. A row that the server refuses is reported
    /// here as soon as the server says so; the session is then ready again and this COPY over.
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        if self.failed {
            return Err(self.over());
        }
        self.out.put_u8(b'd');
        self.out.put_u32(data.len() as u32 + 4);
        self.out.put_slice(data);
        if self.out.len() < COPY_SEND_BYTES {
            return Ok(());
        }
        self.flush().await
    }

    /// Sends what was collected, reading meanwhile: a server held up by its own notices would
    /// never take the rest, and an error must not wait for the end of the data.
    async fn flush(&mut self) -> Result<()> {
        let mut out = self.out.split().freeze();
        let mut flushed = false;
        while !flushed {
            let Some(frame) = self.session.frame_or_write(&mut out, &mut flushed).await? else {
                continue;
            };
            if let Err(error) = self.session.absorb(frame) {
                self.failed = true;
                // What is left of `out` must still go out whole: half a message would be taken
                // for the beginning of the next one. The server throws it away.
                if !error.is_closed() {
                    self.session.send(&out).await?;
                }
                return Err(self.session.drain(error).await);
            }
        }
        Ok(())
    }

    fn over(&self) -> Error {
        self.session.protocol("this COPY has already failed".to_string())
    }

    /// Ends the COPY; gives the number of rows. On an error the session is ready again.
    pub async fn finish(mut self) -> Result<u64> {
        if self.failed {
            return Err(self.over());
        }
        frontend::copy_done(&mut self.out);
        self.end().await
    }

    /// Gives up: the server forgets the rows. The session is ready again.
    pub async fn abort(mut self, reason: &str) -> Result<()> {
        if self.failed {
            return Ok(());
        }
        self.out.clear();
        let _ = frontend::copy_fail(reason, &mut self.out);
        match self.end().await {
            Err(error) if error.is_closed() => Err(error),
            _ => Ok(()),
        }
    }

    /// Sends what is left and reads to the end, both at once: the server's last words may come
    /// before our last byte is known to be sent, and must not be read past.
    async fn end(mut self) -> Result<u64> {
        let mut out = self.out.split().freeze();
        let mut flushed = false;
        let mut count = 0;
        loop {
            let Some(frame) = self.session.frame_or_write(&mut out, &mut flushed).await? else {
                continue;
            };
            match self.session.absorb(frame) {
                Ok(Some(Message::CommandComplete(body))) => {
                    let tag = body.tag().unwrap_or_default();
                    count = tag.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
                }
                Ok(Some(Message::ReadyForQuery(body))) => {
                    self.session.end_exchange(body.status());
                    return Ok(count);
                }
                Ok(_) => {}
                Err(error) => {
                    if !error.is_closed() {
                        self.session.send(&out).await?;
                    }
                    return Err(self.session.drain(error).await);
                }
            }
        }
    }
}
