//! COPY in and out, rows passed through untouched.
//!
//! Several COPY statements in one request are one exchange: [`CopyOut::fill`] says where each ends,
//! and [`CopyIn::next`] goes on to the next without waiting for the one before. Should one fail,
//! the server throws away what was sent for the others.

use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;

use super::frame::Frame;
use super::{Error, Result, ServerError, Session};

/// Bytes of CopyData collected before they are sent: few system calls, little memory.
const COPY_SEND_BYTES: usize = 256 << 10;

/// A message's tag and length.
const HEADER_BYTES: usize = 5;

/// Rows on their way from one server to another: one CopyData message being put together, whatever
/// the messages were that they came in. No row is copied more than the once that this takes.
#[derive(Debug)]
pub struct CopyChunk {
    message: BytesMut,
}

impl CopyChunk {
    /// An empty one with room for so many bytes; it grows.
    pub fn with_capacity(bytes: usize) -> CopyChunk {
        let mut message = BytesMut::with_capacity(HEADER_BYTES + bytes);
        message.put_slice(b"d\0\0\0\0");
        CopyChunk { message }
    }

    /// Bytes of rows in it.
    pub fn len(&self) -> usize {
        self.message.len().saturating_sub(HEADER_BYTES)
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The whole message.
    fn seal(mut self) -> Bytes {
        let len = (self.message.len() - 1) as u32;
        if let Some(place) = self.message.get_mut(1..HEADER_BYTES) {
            place.copy_from_slice(&len.to_be_bytes());
        }
        self.message.freeze()
    }
}

/// Why [`CopyOut::fill`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// The chunk is full; there may be more.
    Full,
    /// The COPY under way is at its end; another of the same request may follow.
    Copied,
    /// Nothing follows: the session is ready again.
    Ready,
}

/// A running `COPY ... TO STDOUT`, or several. Dropped before its end, the session is unusable.
#[derive(Debug)]
pub struct CopyOut<'a> {
    session: &'a mut Session,
}

/// A running `COPY ... FROM STDIN`, or several. Dropped before [`CopyIn::finish`], the session is
/// unusable and the server rolls back when it is dropped too.
#[derive(Debug)]
pub struct CopyIn<'a> {
    session: &'a mut Session,
    out: BytesMut,
    /// Rows of those that have ended, as the server counted them.
    counts: Vec<u64>,
    /// The server ended the COPY with an error, which has been given; it takes no more data.
    failed: bool,
}

impl Session {
    /// Starts `COPY ... TO STDOUT`, or several separated by semicolons.
    pub async fn copy_out(&mut self, sql: &str) -> Result<CopyOut<'_>> {
        self.start_copy(sql).await?;
        Ok(CopyOut { session: self })
    }

    /// Starts `COPY ... FROM STDIN`, or several separated by semicolons.
    pub async fn copy_in(&mut self, sql: &str) -> Result<CopyIn<'_>> {
        self.start_copy(sql).await?;
        Ok(CopyIn { session: self, out: BytesMut::new(), counts: Vec::new(), failed: false })
    }

    async fn start_copy(&mut self, sql: &str) -> Result<()> {
        let begun = Instant::now();
        let started = self.send_copy(sql).await;
        self.tell_witness(sql, begun, started.as_ref().err());
        started
    }

    async fn send_copy(&mut self, sql: &str) -> Result<()> {
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

    /// Like [`CopyOut::next`], but gives the pieces that have arrived as one, of about `limit`
    /// bytes at most: cheaper where pieces are small and many.
    pub async fn gathered(&mut self, limit: usize) -> Result<Option<Bytes>> {
        let reader = &mut self.session.reader;
        let mut pieces = BytesMut::with_capacity(reader.arrived().min(limit));
        match reader.gather(&mut pieces, limit) {
            0 => self.next().await,
            _ => Ok(Some(pieces.freeze())),
        }
    }

    /// Adds rows to `chunk` until it holds `limit` bytes or more, or a COPY ends. Gives the number
    /// of messages added (text and CSV: rows), and why it came back. After [`Filled::Copied`] it is
    /// called again, up to [`Filled::Ready`].
    pub async fn fill(&mut self, chunk: &mut CopyChunk, limit: usize) -> Result<(u64, Filled)> {
        let mut count = 0;
        loop {
            count += self.session.reader.gather(&mut chunk.message, limit + HEADER_BYTES);
            if chunk.len() >= limit {
                return Ok((count, Filled::Full));
            }
            let frame = self.session.reader.next().await.map_err(|e| self.session.lost(e))?;
            if let Frame::CopyData(data) = frame {
                chunk.message.put_slice(&data);
                count += 1;
                continue;
            }
            match self.session.absorb(frame) {
                Ok(Some(Message::CommandComplete(_))) => return Ok((count, Filled::Copied)),
                Ok(Some(Message::ReadyForQuery(body))) => {
                    self.session.end_exchange(body.status());
                    return Ok((count, Filled::Ready));
                }
                Ok(_) => {}
                Err(error) => return Err(self.session.drain(error).await),
            }
        }
    }
}

impl CopyIn<'_> {
    /// Passes a chunk on. What the server refuses is reported as by [`CopyIn::write`].
    pub async fn pass(&mut self, chunk: CopyChunk) -> Result<()> {
        if self.failed {
            return Err(self.over());
        }
        if self.out.len() + chunk.message.len() < COPY_SEND_BYTES {
            self.out.put_slice(&chunk.seal());
            return Ok(());
        }
        if !self.out.is_empty() {
            self.flush().await?;
        }
        self.send(chunk.seal()).await
    }

    /// Ends the COPY under way and goes on to the next of the same request, at once: what the
    /// server says of the first is read later.
    pub fn next(&mut self) {
        frontend::copy_done(&mut self.out);
    }

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
        let out = self.out.split().freeze();
        self.send(out).await
    }

    async fn send(&mut self, mut out: Bytes) -> Result<()> {
        let mut flushed = false;
        while !flushed {
            let Some(frame) = self.session.frame_or_write(&mut out, &mut flushed).await? else {
                continue;
            };
            match self.session.absorb(frame) {
                Ok(message) => self.count(message.as_ref()),
                Err(error) => {
                    self.failed = true;
                    // What is left of `out` must still go out whole: half a message would be taken
                    // for the beginning of the next one. The server throws it away.
                    if !error.is_closed() {
                        self.session.send(&out).await?;
                    }
                    return Err(self.session.drain(error).await);
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, message: Option<&Message>) {
        if let Some(Message::CommandComplete(body)) = message {
            let tag = body.tag().unwrap_or_default();
            self.counts.push(tag.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0));
        }
    }

    fn over(&self) -> Error {
        self.session.protocol("this COPY has already failed".to_string())
    }

    /// Ends the last COPY; gives the number of rows of each. On an error the session is ready
    /// again.
    pub async fn finish(mut self) -> Result<Vec<u64>> {
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
    async fn end(mut self) -> Result<Vec<u64>> {
        let mut out = self.out.split().freeze();
        let mut flushed = false;
        loop {
            let Some(frame) = self.session.frame_or_write(&mut out, &mut flushed).await? else {
                continue;
            };
            match self.session.absorb(frame) {
                Ok(Some(Message::ReadyForQuery(body))) => {
                    self.session.end_exchange(body.status());
                    return Ok(self.counts);
                }
                Ok(message) => self.count(message.as_ref()),
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
