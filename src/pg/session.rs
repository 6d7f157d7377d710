//! A session: simple and extended queries, notifications, cancel.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::IsNull;
use postgres_protocol::message::backend::{DataRowBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncWriteExt, WriteHalf};

use super::auth::Greeting;
use super::cancel::CancelHandle;
use super::connect::{self, Opened, Place};
use super::frame::{Frame, FrameReader};
use super::socket::Socket;
use super::witness::Heard;
use super::{Config, Error, Host, Result, Row, ServerError};
use crate::limit::CONTROL_WAIT;

/// What a session is for; decides its start-up parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Ordinary SQL.
    Sql,
    /// Logical replication commands (`replication=database`); simple SQL works as well.
    Replication,
    /// A pooler's admin console: it takes neither run-time settings nor the extended protocol.
    PoolerAdmin,
}

/// How much of a statement a time-out shows.
const SHOWN_CHARS: usize = 200;

/// A NOTIFY that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Its channel.
    pub channel: String,
    /// Its payload.
    pub payload: String,
}

/// An open session with one backend.
///
/// Not cancel-safe except where said: dropping a query's future half way leaves the session
/// unusable, and every later call answers with an error. Dropping the session closes the socket;
/// the server then rolls back whatever was open.
#[derive(Debug)]
pub struct Session {
    pub(super) reader: FrameReader,
    pub(super) writer: WriteHalf<Socket>,
    pub(super) peer: String,
    place: Place,
    greeting: Greeting,
    notifications: VecDeque<Notification>,
    /// Transaction status of the last ReadyForQuery: `I`, `T` or `E`.
    status: u8,
    /// Set while an exchange is under way; still set on entry means that one was abandoned.
    busy: bool,
    /// Requests of [`Session::post`] and [`Session::submit`] that are not over.
    pub(super) posted: usize,
    /// What of them is still to be written.
    pub(super) outbox: VecDeque<Bytes>,
    /// A notice that announced the end of the session, as an immediate shutdown gives it.
    farewell: Option<Box<ServerError>>,
    /// WARNINGs that nobody has taken yet, each text once; `None` where nobody wants them.
    warnings: Option<Vec<ServerError>>,
    /// The connection is over, by an error that has been given.
    over: bool,
    /// No statement may take longer.
    patience: Option<Duration>,
}

impl Session {
    /// Opens a session on the first host of `config` that will do, each of its addresses in turn.
    ///
    /// The session has fixed output settings (ISO dates, UTC, hex bytea, 3 extra float digits), an
    /// empty search_path, no timeouts of the role's own, and client_encoding UTF8. Reads
    /// certificates from disk where TLS needs them.
    pub async fn connect(config: &Config, purpose: Purpose) -> Result<Session> {
        connect::open(config, purpose).await
    }

    /// A session for short statements: a server that takes one and then falls silent is an
    /// [`Error::Timeout`] after [`CONTROL_WAIT`], which names the statement.
    pub async fn control(config: &Config) -> Result<Session> {
        Ok(Session::connect(config, Purpose::Sql).await?.with_patience(CONTROL_WAIT))
    }

    /// The same session, with a limit for each statement that is not part of a COPY, a pipeline or
    /// a replication stream, and for requests that are sent together. After it the session is over;
    /// the server may still be at it.
    pub fn with_patience(mut self, limit: Duration) -> Session {
        self.patience = Some(limit);
        self
    }

    /// Changes that limit.
    pub fn set_patience(&mut self, limit: Duration) {
        self.patience = Some(limit);
    }

    pub(super) fn from_opened(opened: Opened) -> Session {
        Session {
            reader: opened.reader,
            writer: opened.writer,
            peer: opened.peer,
            place: opened.place,
            greeting: opened.greeting,
            notifications: VecDeque::new(),
            status: b'I',
            busy: false,
            posted: 0,
            outbox: VecDeque::new(),
            farewell: None,
            warnings: None,
            over: false,
            patience: None,
        }
    }

    /// The host of the config that let us in.
    pub fn host(&self) -> &Host {
        &self.place.host
    }

    /// True if the connection is a Unix-domain socket.
    pub fn is_local(&self) -> bool {
        matches!(self.place.address, connect::Address::Unix(_))
    }

    /// True if the connection is TLS.
    pub fn is_encrypted(&self) -> bool {
        self.place.encrypted
    }

    /// `label host:port/dbname`: how errors name this server.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Process id of the backend.
    pub fn process_id(&self) -> i32 {
        self.greeting.process_id
    }

    /// A setting the server reports, such as `server_version` or `server_encoding`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.greeting.parameters.get(name).map(String::as_str)
    }

    /// Lets a SQL_ASCII database's bytes in and out as they are (pgcopydb#874): their meaning is
    /// not known, and of a session that says it talks UTF-8 the server refuses what is none. Does
    /// nothing where the database has an encoding.
    ///
    /// <https://www.postgresql.org/docs/current/multibyte.html>
    pub async fn pass_unknown_bytes(&mut self) -> Result<()> {
        if self.parameter("server_encoding") == Some("SQL_ASCII") {
            self.execute("set client_encoding = 'SQL_ASCII'").await?;
        }
        Ok(())
    }

    /// From now on the server's WARNINGs are kept for [`Session::take_warnings`].
    pub fn keep_warnings(&mut self) {
        self.warnings.get_or_insert_default();
    }

    /// WARNINGs that came since they were last taken, before the message that was given last; each
    /// text once.
    pub fn take_warnings(&mut self) -> Vec<ServerError> {
        self.warnings.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// `server_version_num`'s major part: 10 to 18 and on.
    pub fn major_version(&self) -> u32 {
        let text = self.parameter("server_version").unwrap_or_default();
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    }

    /// True inside a transaction block, failed or not.
    pub fn in_transaction(&self) -> bool {
        self.status != b'I'
    }

    /// Runs one or more statements by the simple protocol; several without BEGIN are one
    /// transaction. Gives the row count of the last command tag, 0 where it has none.
    pub async fn execute(&mut self, sql: &str) -> Result<u64> {
        Ok(self.simple(sql).await?.count)
    }

    /// Runs statements by the simple protocol and gives the rows of all of them, as text.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>> {
        Ok(self.simple(sql).await?.rows)
    }

    /// Like [`Session::query`], with the column names of the last result before the rows: for
    /// answers whose columns differ by version and cannot be chosen, as a pooler's SHOW.
    pub async fn query_with_columns(&mut self, sql: &str) -> Result<(Vec<String>, Vec<Row>)> {
        let answer = self.simple(sql).await?;
        Ok((answer.columns, answer.rows))
    }

    /// Runs one statement with parameters in text form, types inferred by the server.
    /// Gives its rows as text. Not for replication sessions.
    pub async fn query_params(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Row>> {
        let mut out = BytesMut::new();
        let built = frontend::parse("", sql, [], &mut out).and_then(|()| {
            let bound = frontend::bind(
                "",
                "",
                [],
                params.iter().copied(),
                |param, buf| match param {
                    Some(text) => {
                        buf.extend_from_slice(text.as_bytes());
                        Ok(IsNull::No)
                    }
                    None => Ok(IsNull::Yes),
                },
                [],
                &mut out,
            );
            bound.map_err(|_| std::io::Error::other("parameters cannot be bound"))?;
            frontend::execute("", 0, &mut out)?;
            frontend::sync(&mut out);
            Ok(())
        });
        built.map_err(|e| self.protocol(format!("cannot encode query: {e}")))?;
        Ok(self.answer_to(&out, sql).await?.rows)
    }

    /// The one row of a query; no row or several is an error.
    pub async fn query_one(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Row> {
        let mut rows = self.query_params(sql, params).await?;
        match (rows.pop(), rows.is_empty()) {
            (Some(row), true) => Ok(row),
            (row, _) => {
                let count = rows.len() + usize::from(row.is_some());
                Err(Error::Result(format!("{}: {count} rows where one is due: {sql}", self.peer)))
            }
        }
    }

    /// The row of a query that gives none or one.
    pub async fn query_opt(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Option<Row>> {
        Ok(self.query_params(sql, params).await?.into_iter().next())
    }

    /// The next NOTIFY, waiting up to `wait`. The session must be idle. Cancel-safe.
    pub async fn notification(&mut self, wait: Duration) -> Result<Option<Notification>> {
        if self.busy {
            return Err(self.abandoned());
        }
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            if let Some(notification) = self.notifications.pop_front() {
                return Ok(Some(notification));
            }
            let Ok(frame) = tokio::time::timeout_at(deadline, self.reader.next()).await else {
                return Ok(None);
            };
            let frame = frame.map_err(|e| self.lost(e))?;
            self.absorb(frame)?;
        }
    }

    /// A handle that cancels what this session is doing, from any task.
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle {
            place: self.place.clone(),
            process_id: self.greeting.process_id,
            secret_key: self.greeting.secret_key,
        }
    }

    async fn simple(&mut self, sql: &str) -> Result<Answer> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)
            .map_err(|e| self.protocol(format!("cannot encode query: {e}")))?;
        self.answer_to(&out, sql).await
    }

    /// Sends what asks for `sql`, and reads the answer.
    async fn answer_to(&mut self, out: &[u8], sql: &str) -> Result<Answer> {
        let begun = Instant::now();
        let answer = self.answer_in_time(out, sql).await;
        self.tell_witness(sql, begun, answer.as_ref().err());
        answer
    }

    /// True if somebody wants to hear of statements.
    pub(super) fn has_witness(&self) -> bool {
        self.place.config.witness.is_some()
    }

    /// Tells whoever wants to hear of it.
    pub(super) fn tell_witness(&self, sql: &str, begun: Instant, error: Option<&Error>) {
        if let Some(witness) = &self.place.config.witness {
            let took = begun.elapsed();
            witness.hear(Heard { peer: &self.peer, sql, took, error });
        }
    }

    async fn answer_in_time(&mut self, out: &[u8], sql: &str) -> Result<Answer> {
        self.begin_exchange()?;
        let Some(limit) = self.patience else {
            self.send(out).await?;
            return self.collect().await;
        };
        let asking = async {
            self.send(out).await?;
            self.collect().await
        };
        match tokio::time::timeout(limit, asking).await {
            Ok(answer) => answer,
            Err(_) => Err(self.too_long(sql, limit)),
        }
    }

    /// The session is over: the server has not answered to `sql` in time.
    pub(super) fn too_long(&mut self, sql: &str, limit: Duration) -> Error {
        self.over = true;
        let text: Vec<&str> = sql.split_whitespace().collect();
        let doing: String = text.join(" ").chars().take(SHOWN_CHARS).collect();
        Error::Timeout { peer: self.peer.clone(), doing, seconds: limit.as_secs().max(1) }
    }

    /// How long a statement may take.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.patience
    }

    /// Reads up to ReadyForQuery; the first error is given after it.
    async fn collect(&mut self) -> Result<Answer> {
        let mut answer = Answer::default();
        let mut failure = None;
        loop {
            match self.receive().await {
                Ok(Message::DataRow(body)) => answer.rows.push(self.row(&body)?),
                Ok(Message::RowDescription(body)) => {
                    let names = body.fields().map(|f| Ok(f.name().to_string())).collect();
                    answer.columns = names.unwrap_or_default();
                }
                Ok(Message::CommandComplete(body)) => {
                    let tag = body.tag().unwrap_or_default();
                    answer.count = tag.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
                }
                Ok(Message::ReadyForQuery(body)) => {
                    self.end_exchange(body.status());
                    return failure.map_or(Ok(answer), Err);
                }
                Ok(Message::CopyInResponse(_) | Message::CopyOutResponse(_)) => {
                    return Err(self.protocol("COPY in an ordinary query".to_string()));
                }
                Ok(_) => {}
                Err(error) if error.is_closed() => return Err(error),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
    }

    pub(super) fn row(&self, body: &DataRowBody) -> Result<Row> {
        let buffer = body.buffer_bytes();
        let columns: Vec<Option<Bytes>> = body
            .ranges()
            .map(|range| Ok(range.map(|r| buffer.slice(r))))
            .collect()
            .map_err(|e| self.protocol(format!("data row: {e}")))?;
        Ok(Row::new(columns))
    }

    /// Refuses to start where an earlier exchange was abandoned half way.
    pub(super) fn begin_exchange(&mut self) -> Result<()> {
        if self.busy {
            return Err(self.abandoned());
        }
        self.busy = true;
        Ok(())
    }

    pub(super) fn end_exchange(&mut self, status: u8) {
        self.status = status;
        self.busy = self.posted > 0;
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let sent = async {
            self.writer.write_all(bytes).await?;
            self.writer.flush().await
        };
        let sent = sent.await;
        match sent {
            Ok(()) => Ok(()),
            Err(source) => Err(self.last_words(source).await),
        }
    }

    /// A server that shuts down says why before it closes; prefer that to "broken pipe".
    pub(super) async fn last_words(&mut self, source: std::io::Error) -> Error {
        for _ in 0..16 {
            let waiting = tokio::time::timeout(Duration::from_millis(100), self.reader.next());
            let Ok(Ok(frame)) = waiting.await else { break };
            if let Err(said @ Error::Server { .. }) = self.absorb(frame) {
                return said;
            }
        }
        self.lost(source)
    }

    /// The next message that is not asynchronous; an ErrorResponse is an `Err`.
    pub(super) async fn receive(&mut self) -> Result<Message> {
        loop {
            let frame = self.reader.next().await.map_err(|e| self.lost(e))?;
            if let Some(message) = self.absorb(frame)? {
                return Ok(message);
            }
        }
    }

    /// Keeps notifications, and warnings if they are wanted, drops other notices, turns errors into
    /// `Err`, gives the rest back.
    pub(super) fn absorb(&mut self, frame: Frame) -> Result<Option<Message>> {
        match frame {
            Frame::Message(Message::NotificationResponse(body)) => {
                if let (Ok(channel), Ok(payload)) = (body.channel(), body.message()) {
                    let (channel, payload) = (channel.to_string(), payload.to_string());
                    self.notifications.push_back(Notification { channel, payload });
                }
                Ok(None)
            }
            Frame::Message(Message::NoticeResponse(body)) => {
                let notice = ServerError::from_fields(body.fields());
                if notice.code.starts_with("57P") {
                    self.farewell = Some(Box::new(notice));
                } else if let Some(warnings) = &mut self.warnings
                    && notice.severity == "WARNING"
                    && !warnings.iter().any(|known| known.message == notice.message)
                {
                    warnings.push(notice);
                }
                Ok(None)
            }
            Frame::Message(Message::ParameterStatus(body)) => {
                if let (Ok(name), Ok(value)) = (body.name(), body.value()) {
                    self.greeting.parameters.insert(name.to_string(), value.to_string());
                }
                Ok(None)
            }
            Frame::Message(Message::ErrorResponse(body)) => {
                let error = Box::new(ServerError::from_fields(body.fields()));
                let error = Error::Server { peer: self.peer.clone(), error };
                self.over |= error.is_closed();
                Err(error)
            }
            Frame::Message(message) => Ok(Some(message)),
            Frame::CopyData(_) | Frame::CopyBoth => {
                Err(self.protocol("COPY data outside a COPY".to_string()))
            }
        }
    }

    /// The error for a connection that broke: the server's announcement, if it made one.
    pub(super) fn lost(&mut self, source: std::io::Error) -> Error {
        self.over = true;
        match self.farewell.take() {
            Some(mut error) => {
                error.severity = "FATAL".to_string();
                Error::Server { peer: self.peer.clone(), error }
            }
            None => Error::Io { peer: self.peer.clone(), source },
        }
    }

    /// Why the session is not ready. A lost connection is no mistake of whoever goes on to tidy up.
    pub(super) fn abandoned(&self) -> Error {
        let peer = self.peer.clone();
        if self.over {
            let source = std::io::Error::new(std::io::ErrorKind::NotConnected, "it was closed");
            return Error::Io { peer, source };
        }
        Error::Abandoned { peer }
    }

    pub(super) fn protocol(&self, detail: String) -> Error {
        Error::Protocol { peer: self.peer.clone(), detail }
    }
}

/// All that came before ReadyForQuery.
#[derive(Default)]
struct Answer {
    columns: Vec<String>,
    rows: Vec<Row>,
    count: u64,
}
