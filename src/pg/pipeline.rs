//! Many statements in one round trip.
//!
//! The applier writes a whole batch (BEGIN, origin, rows, COMMIT) with one Sync at its end. Replies
//! are read while the request is still being written: a server blocked on its own output would
//! otherwise never read the rest of ours (pgcopydb#880).

use std::task::Poll;
use std::time::Instant;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::io::AsyncWriteExt;

use super::frame::Frame;
use super::{Result, Row, Session};
use crate::pg::Error;

/// Most bytes of rows in one CopyData message: the server keeps a whole one in memory.
const COPY_MESSAGE_BYTES: usize = 128 << 10;

/// No forms: every result is text.
const RESULT_FORMS: [u8; 2] = [0; 2];

/// Values from this size on are sent from where they lie; smaller ones are copied behind what is
/// there, as each that is not takes a write of its own.
const APART_BYTES: usize = 16 << 10;

/// Requests being collected for one exchange.
#[derive(Debug, Default)]
pub struct Pipeline {
    /// What goes before `out`, in order.
    before: Vec<Bytes>,
    out: BytesMut,
}

/// What a statement answered. Given in the order of the statements.
#[derive(Debug)]
pub enum Reply {
    /// A row.
    Row(Row),
    /// The statement is done; its command tag (`INSERT 0 1`, `COMMIT`).
    Done(String),
}

/// A parameter's value and form.
#[derive(Clone, Copy, Debug)]
pub enum Param<'a> {
    /// Text, or NULL.
    Text(Option<&'a [u8]>),
    /// The type's receive format.
    Binary(&'a [u8]),
}

/// A parameter that is handed over: a large one is not copied.
#[derive(Debug)]
pub struct OwnedParam {
    /// It is in the type's receive format; as text otherwise.
    pub binary: bool,
    /// The value.
    pub value: Vec<u8>,
}

impl Pipeline {
    /// An empty request.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes collected so far.
    pub fn len(&self) -> usize {
        self.before.iter().map(Bytes::len).sum::<usize>() + self.out.len()
    }

    /// True if nothing was collected.
    pub fn is_empty(&self) -> bool {
        self.before.is_empty() && self.out.is_empty()
    }

    /// Names a prepared statement; `types` are parameter type OIDs, 0 for "infer".
    pub fn parse(&mut self, name: &str, sql: &str, types: &[u32]) {
        // Fails only for text with a NUL byte, which no identifier or SQL of ours can hold.
        let _ = frontend::parse(name, sql, types.iter().copied(), &mut self.out);
    }

    /// Binds and runs a prepared statement with text parameters; results come as text.
    pub fn run<'a>(&mut self, name: &str, params: impl Iterator<Item = Option<&'a [u8]>>) {
        let start = self.begin_bind(name);
        self.out.put_u16(0); // every parameter is text
        let count_at = self.out.len();
        self.out.put_u16(0);
        let mut count: u16 = 0;
        for param in params {
            count = count.saturating_add(1);
            match param {
                None => self.out.put_i32(-1),
                Some(bytes) => {
                    self.out.put_u32(bytes.len() as u32);
                    self.out.put_slice(bytes);
                }
            }
        }
        patch(&mut self.out, count_at, &count.to_be_bytes());
        self.end_bind_and_execute(start);
    }

    /// Binds and runs a prepared statement with parameters of either form; results come as text.
    pub fn run_mixed(&mut self, name: &str, params: &[Param<'_>]) {
        let start = self.begin_bind(name);
        self.out.put_u16(params.len() as u16);
        for param in params {
            self.out.put_u16(u16::from(matches!(param, Param::Binary(_))));
        }
        self.out.put_u16(params.len() as u16);
        for param in params {
            match param {
                Param::Text(None) => self.out.put_i32(-1),
                Param::Text(Some(bytes)) | Param::Binary(bytes) => {
                    self.out.put_u32(bytes.len() as u32);
                    self.out.put_slice(bytes);
                }
            }
        }
        self.end_bind_and_execute(start);
    }

    /// Binds and runs a prepared statement with parameters that are handed over; results come as
    /// text. A message holds less than 2 GB.
    pub fn run_owned(&mut self, name: &str, params: Vec<OwnedParam>) {
        let start = self.begin_bind(name);
        self.out.put_u16(params.len() as u16);
        for param in &params {
            self.out.put_u16(u16::from(param.binary));
        }
        self.out.put_u16(params.len() as u16);
        // Told before the values, which need not come to lie behind it.
        let values: usize = params.iter().map(|param| 4 + param.value.len()).sum();
        self.set_length(start, values + RESULT_FORMS.len());
        for param in params {
            self.out.put_u32(param.value.len() as u32);
            self.hand_over(param.value);
        }
        self.execute();
    }

    /// Adds a value: a large one where it lies, the rest behind what is there.
    fn hand_over(&mut self, value: impl AsRef<[u8]> + Into<Bytes>) {
        if value.as_ref().len() < APART_BYTES {
            return self.out.put_slice(value.as_ref());
        }
        self.before.push(self.out.split().freeze());
        self.before.push(value.into());
    }

    /// The head of a Bind message to the unnamed portal; gives where its length stands.
    fn begin_bind(&mut self, name: &str) -> usize {
        self.out.put_u8(b'B');
        let start = self.out.len();
        self.out.put_u32(0);
        self.out.put_u8(0); // the unnamed portal
        self.out.put_slice(name.as_bytes());
        self.out.put_u8(0);
        start
    }

    fn end_bind_and_execute(&mut self, start: usize) {
        self.set_length(start, RESULT_FORMS.len());
        self.execute();
    }

    /// Tells the length of a message that has so many bytes to come.
    fn set_length(&mut self, start: usize, to_come: usize) {
        let length = (self.out.len() - start + to_come) as u32;
        patch(&mut self.out, start, &length.to_be_bytes());
    }

    /// The end of a Bind message, and Execute.
    fn execute(&mut self) {
        self.out.put_slice(&RESULT_FORMS);
        let _ = frontend::execute("", 0, &mut self.out);
    }

    /// Binds and runs a prepared `COPY ... FROM STDIN` without parameters, and gives it all of its
    /// data, before the server has said that it wants it: one that does not reads past it. Each
    /// piece is a message of its own, or several if it is large.
    ///
    /// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-COPY>
    pub fn copy(&mut self, name: &str, pieces: impl IntoIterator<Item = Vec<u8>>) {
        self.run(name, std::iter::empty());
        for mut rest in pieces.into_iter().map(Bytes::from) {
            while !rest.is_empty() {
                let piece = rest.split_to(rest.len().min(COPY_MESSAGE_BYTES));
                self.out.put_u8(b'd');
                self.out.put_u32(piece.len() as u32 + 4);
                self.hand_over(piece);
            }
        }
        frontend::copy_done(&mut self.out);
    }

    /// Prepares, binds and runs one statement without a name and without parameters.
    pub fn once(&mut self, sql: &str) {
        self.parse("", sql, &[]);
        self.run("", std::iter::empty());
    }

    /// The same with parameters in text form.
    pub fn ask(&mut self, sql: &str, params: &[Option<&str>]) {
        self.parse("", sql, &[]);
        self.run("", params.iter().map(|param| param.map(str::as_bytes)));
    }

    /// The text of what is prepared in it, with semicolons between.
    fn statements(&self) -> String {
        let all = [self.before.concat().as_slice(), self.out.as_ref()].concat();
        let (mut rest, mut texts) = (all.as_slice(), Vec::new());
        // Each message is a tag, its length with the four bytes of it, and the body.
        while let Some((head, tail)) = rest.split_at_checked(5) {
            let mut length = head.get(1..).unwrap_or_default();
            let length = (length.get_u32() as usize).saturating_sub(4);
            let Some((body, next)) = tail.split_at_checked(length) else { break };
            if head.first() == Some(&b'P') {
                let text = body.split(|byte| *byte == 0).nth(1).unwrap_or_default();
                texts.push(String::from_utf8_lossy(text).into_owned());
            }
            rest = next;
        }
        texts.join("; ")
    }

    /// Adds what another has collected, behind.
    pub fn append(&mut self, other: Pipeline) {
        if self.is_empty() {
            *self = other;
        } else if other.before.is_empty() {
            self.out.unsplit(other.out);
        } else {
            self.before.push(self.out.split().freeze());
            self.before.extend(other.before);
            self.out = other.out;
        }
    }

    /// Drops a prepared statement.
    pub fn close(&mut self, name: &str) {
        let _ = frontend::close(b'S', name, &mut self.out);
    }
}

fn patch(out: &mut BytesMut, at: usize, bytes: &[u8]) {
    if let Some(place) = out.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// What the future gives without waiting, if it does.
pub async fn now<F: Future>(future: F) -> Option<F::Output> {
    tokio::pin!(future);
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// What comes back for requests that were posted.
#[derive(Debug)]
pub enum Event {
    /// A statement's answer.
    Reply(Reply),
    /// A statement failed; the rest of its request is skipped.
    Failed(Error),
    /// The oldest request is over.
    Over,
}

impl Session {
    /// Sends the collected requests and one Sync, giving each reply to `on_reply` in order.
    ///
    /// After the first error the server skips everything up to the Sync; that error is returned
    /// once the session is ready again, so the session stays usable (but may be in a failed
    /// transaction block: see [`Session::in_transaction`]). `on_reply` must not block.
    pub async fn exchange(
        &mut self,
        pipeline: Pipeline,
        mut on_reply: impl FnMut(Reply),
    ) -> Result<()> {
        let (begun, sql) = (Instant::now(), self.has_witness().then(|| pipeline.statements()));
        let outcome = self.exchange_unseen(pipeline, &mut on_reply).await;
        if let Some(sql) = sql {
            self.tell_witness(&sql, begun, outcome.as_ref().err());
        }
        outcome
    }

    /// Sends several requests at once, each of which is a transaction of its own: one round trip.
    /// Gives the rows of each, or what the server refused it for; the others are done all the same.
    ///
    /// Errors: of the session itself, and where the limit of [`Session::with_patience`] has passed.
    pub async fn exchange_each<const N: usize>(
        &mut self,
        pipelines: [Pipeline; N],
    ) -> Result<[Result<Vec<Row>>; N]> {
        let texts = pipelines.each_ref().map(Pipeline::statements);
        let begun = Instant::now();
        let answers = match self.patience() {
            None => self.exchange_each_unseen(pipelines).await?,
            Some(limit) => {
                let asking = self.exchange_each_unseen(pipelines);
                match tokio::time::timeout(limit, asking).await {
                    Ok(answers) => answers?,
                    Err(_) => return Err(self.too_long(&texts.join("; "), limit)),
                }
            }
        };
        for (sql, answer) in texts.iter().zip(&answers) {
            self.tell_witness(sql, begun, answer.as_ref().err());
        }
        Ok(answers)
    }

    async fn exchange_each_unseen<const N: usize>(
        &mut self,
        pipelines: [Pipeline; N],
    ) -> Result<[Result<Vec<Row>>; N]> {
        let mut answers = [const { Ok(Vec::new()) }; N];
        if self.posted > 0 {
            return Err(self.abandoned());
        }
        let mut over = 0;
        let mut take = |event| {
            let answer = answers.get_mut(over);
            match (event, answer) {
                (Event::Over, _) => over += 1,
                (Event::Reply(Reply::Row(row)), Some(Ok(rows))) => rows.push(row),
                (Event::Failed(error), Some(answer @ Ok(_))) => *answer = Err(error),
                _ => {}
            }
        };
        for pipeline in pipelines {
            self.post(pipeline, &mut take).await?;
        }
        while self.posted > 0 {
            take(self.next_event().await?);
        }
        Ok(answers)
    }

    async fn exchange_unseen(
        &mut self,
        pipeline: Pipeline,
        on_reply: &mut impl FnMut(Reply),
    ) -> Result<()> {
        let mut failure: Option<Error> = None;
        let mut take = |event| match event {
            Event::Reply(reply) => on_reply(reply),
            Event::Failed(error) => failure = failure.take().or(Some(error)),
            Event::Over => {}
        };
        if self.posted > 0 {
            return Err(self.abandoned());
        }
        self.post(pipeline, &mut take).await?;
        while self.posted > 0 {
            take(self.next_event().await?);
        }
        failure.map_or(Ok(()), Err)
    }

    /// Sends the collected requests and one Sync, and returns when all is written; requests posted
    /// before may still be unanswered. What comes meanwhile is given to `on_event`, which must not
    /// block. An error of the session itself, not of a statement, is returned.
    ///
    /// Until every request is over by [`Session::next_event`], the session takes nothing else.
    pub async fn post(
        &mut self,
        pipeline: Pipeline,
        mut on_event: impl FnMut(Event),
    ) -> Result<()> {
        self.submit(pipeline)?;
        while !self.outbox.is_empty() {
            let Some(frame) = self.frame_or_written().await? else { continue };
            if let Some(event) = self.event(frame)? {
                on_event(event);
            }
        }
        Ok(())
    }

    /// Takes the collected requests and one Sync to be written, and does not wait for it: that is
    /// done in [`Session::next_event`]. For whoever has other sessions to look after meanwhile.
    pub fn submit(&mut self, pipeline: Pipeline) -> Result<()> {
        let Pipeline { before, mut out } = pipeline;
        frontend::sync(&mut out);
        if self.posted == 0 {
            self.begin_exchange()?;
        }
        self.posted += 1;
        self.outbox.extend(before);
        self.outbox.push_back(out.freeze());
        Ok(())
    }

    /// The next event of the requests posted, waiting for it. Writes meanwhile what is to be
    /// written. Cancel-safe.
    pub async fn next_event(&mut self) -> Result<Event> {
        loop {
            let Some(frame) = self.frame_or_written().await? else { continue };
            if let Some(event) = self.event(frame)? {
                return Ok(event);
            }
        }
    }

    /// A frame that came in, or `None` after some of what is to be written went out. Cancel-safe.
    async fn frame_or_written(&mut self) -> Result<Option<Frame>> {
        let Session { reader, writer, outbox, .. } = &mut *self;
        let is_last = outbox.len() == 1;
        let writing = async {
            match outbox.front_mut() {
                None => std::future::pending().await,
                // TLS keeps the last records until flushed; a full socket must not stop reading.
                Some(out) if out.is_empty() => {
                    if is_last {
                        writer.flush().await?;
                    }
                    outbox.pop_front();
                }
                Some(out) => {
                    let count = writer.write(out).await?;
                    out.advance(count);
                }
            }
            std::io::Result::Ok(())
        };
        let written = tokio::select! {
            biased;
            frame = reader.next() => return frame.map(Some).map_err(|e| self.lost(e)),
            written = writing => written,
        };
        match written {
            Ok(()) => Ok(None),
            Err(source) => Err(self.last_words(source).await),
        }
    }

    fn event(&mut self, frame: Frame) -> Result<Option<Event>> {
        Ok(match self.absorb(frame) {
            Ok(Some(Message::DataRow(body))) => Some(Event::Reply(Reply::Row(self.row(&body)?))),
            Ok(Some(Message::CommandComplete(body))) => {
                let tag = body.tag().unwrap_or_default().to_string();
                Some(Event::Reply(Reply::Done(tag)))
            }
            Ok(Some(Message::ReadyForQuery(body))) => {
                self.posted = self.posted.saturating_sub(1);
                self.end_exchange(body.status());
                Some(Event::Over)
            }
            Ok(_) => None,
            Err(error) if error.is_closed() => return Err(error),
            Err(error) => Some(Event::Failed(error)),
        })
    }

    /// One step of writing while reading: a frame that came in, or `None` after some bytes (or,
    /// with TLS, records) went out. Once all is written, waits for a frame. Cancel-safe.
    pub(super) async fn frame_or_write(
        &mut self,
        out: &mut Bytes,
        flushed: &mut bool,
    ) -> Result<Option<Frame>> {
        let writing = async {
            if out.is_empty() {
                // TLS keeps the last records until flushed; a full socket must not stop reading.
                self.writer.flush().await.map(|()| true)
            } else {
                let count = self.writer.write(out).await?;
                out.advance(count);
                Ok(false)
            }
        };
        tokio::select! {
            biased;
            frame = self.reader.next() => frame.map(Some).map_err(|e| self.lost(e)),
            written = writing, if !*flushed => {
                match written {
                    Ok(done) => *flushed = done,
                    Err(source) => return Err(self.last_words(source).await),
                }
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
#[path = "pipeline_tests.rs"]
mod tests;
