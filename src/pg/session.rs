//! A session: simple and extended queries, notifications, cancel.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::IsNull;
use postgres_protocol::message::backend::{DataRowBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio::net::{TcpStream, UnixStream};

use super::auth::{Greeting, Handshake};
use super::frame::{Frame, FrameReader};
use super::socket::{self, Socket};
use super::{Config, Error, Host, Result, Row, ServerError};

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
    config: Config,
    host: Host,
    greeting: Greeting,
    notifications: Vec<Notification>,
    /// Transaction status of the last ReadyForQuery: `I`, `T` or `E`.
    status: u8,
    /// Set while an exchange is under way; still set on entry means that one was abandoned.
    busy: bool,
}

/// Settings that make values come out and go in the same on every server, whatever is set for the
/// role or the database. The same that PostgreSQL's own subscriber sends, and the ones pg_dump sets.
const SETTINGS: &str = "-c DateStyle=ISO -c IntervalStyle=postgres -c extra_float_digits=3 \
     -c bytea_output=hex -c TimeZone=UTC -c lc_monetary=C -c statement_timeout=0 -c lock_timeout=0 \
     -c idle_in_transaction_session_timeout=0 -c default_transaction_read_only=off \
     -c default_transaction_isolation=read\\ committed -c row_security=off -c search_path=";

impl Session {
    /// Opens a session, trying the hosts of `config` in order.
    ///
    /// The session has fixed output settings (ISO dates, UTC, hex bytea, 3 extra float digits), an
    /// empty search_path, no timeouts of the role's own, and client_encoding UTF8.
    pub async fn connect(config: &Config, purpose: Purpose) -> Result<Session> {
        let mut last = None;
        for host in &config.hosts {
            let peer = config.peer(host);
            let opening = Self::connect_host(config, host, &peer, purpose);
            let outcome = match tokio::time::timeout(config.connect_timeout, opening).await {
                Ok(outcome) => outcome,
                Err(_) => Err(Error::Timeout {
                    peer,
                    doing: "opening a connection".to_string(),
                    seconds: config.connect_timeout.as_secs(),
                }),
            };
            match outcome {
                Ok(session) => return Ok(session),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::Config("no host to connect to".to_string())))
    }

    async fn connect_host(
        config: &Config,
        host: &Host,
        peer: &str,
        purpose: Purpose,
    ) -> Result<Session> {
        let socket = open_socket(host, peer).await?;
        let (read, mut writer) = tokio::io::split(socket);
        let mut reader = FrameReader::new(read);
        let mut handshake =
            Handshake { reader: &mut reader, writer: &mut writer, peer, channel_binding: None };
        let options = match &config.options {
            Some(more) => format!("{SETTINGS} {more}"),
            None => SETTINGS.to_string(),
        };
        let mut parameters = vec![
            ("user", config.user.as_str()),
            ("database", config.dbname.as_str()),
            ("client_encoding", "UTF8"),
            ("application_name", config.application_name.as_deref().unwrap_or("walferry")),
        ];
        if purpose != Purpose::PoolerAdmin {
            parameters.push(("options", options.as_str()));
        }
        if purpose == Purpose::Replication {
            parameters.push(("replication", "database"));
        }
        let greeting = handshake.run(config, &parameters).await?;
        Ok(Session {
            reader,
            writer,
            peer: peer.to_string(),
            config: config.clone(),
            host: host.clone(),
            greeting,
            notifications: Vec::new(),
            status: b'I',
            busy: false,
        })
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
        Ok(self.simple(sql).await?.1)
    }

    /// Runs statements by the simple protocol and gives the rows of all of them, as text.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>> {
        Ok(self.simple(sql).await?.0)
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
        self.begin_exchange()?;
        self.send(&out).await?;
        Ok(self.collect().await?.0)
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
        if !self.notifications.is_empty() {
            return Ok(Some(self.notifications.remove(0)));
        }
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let Ok(frame) = tokio::time::timeout_at(deadline, self.reader.next()).await else {
                return Ok(None);
            };
            self.absorb(frame.map_err(|e| self.lost(e))?)?;
            if !self.notifications.is_empty() {
                return Ok(Some(self.notifications.remove(0)));
            }
        }
    }

    /// A handle that cancels what this session is doing, from any task.
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle {
            config: self.config.clone(),
            host: self.host.clone(),
            process_id: self.greeting.process_id,
            secret_key: self.greeting.secret_key,
        }
    }

    async fn simple(&mut self, sql: &str) -> Result<(Vec<Row>, u64)> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)
            .map_err(|e| self.protocol(format!("cannot encode query: {e}")))?;
        self.begin_exchange()?;
        self.send(&out).await?;
        self.collect().await
    }

    /// Reads up to ReadyForQuery; the first error is given after it.
    async fn collect(&mut self) -> Result<(Vec<Row>, u64)> {
        let mut rows = Vec::new();
        let mut count = 0;
        let mut failure = None;
        loop {
            match self.receive().await {
                Ok(Message::DataRow(body)) => rows.push(self.row(&body)?),
                Ok(Message::CommandComplete(body)) => {
                    let tag = body.tag().unwrap_or_default();
                    count = tag.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
                }
                Ok(Message::ReadyForQuery(body)) => {
                    self.end_exchange(body.status());
                    return failure.map_or(Ok((rows, count)), Err);
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
            return Err(self.protocol("an earlier request was abandoned half way".to_string()));
        }
        self.busy = true;
        Ok(())
    }

    pub(super) fn end_exchange(&mut self, status: u8) {
        self.status = status;
        self.busy = false;
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
    async fn last_words(&mut self, source: std::io::Error) -> Error {
        let mut error = self.lost(source);
        for _ in 0..16 {
            let waiting = tokio::time::timeout(Duration::from_millis(100), self.reader.next());
            let Ok(Ok(frame)) = waiting.await else { break };
            if let Err(said @ Error::Server { .. }) = self.absorb(frame) {
                error = said;
            }
        }
        error
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

    /// Keeps notifications, drops notices, turns errors into `Err`, gives the rest back.
    pub(super) fn absorb(&mut self, frame: Frame) -> Result<Option<Message>> {
        match frame {
            Frame::Message(Message::NotificationResponse(body)) => {
                if let (Ok(channel), Ok(payload)) = (body.channel(), body.message()) {
                    let (channel, payload) = (channel.to_string(), payload.to_string());
                    self.notifications.push(Notification { channel, payload });
                }
                Ok(None)
            }
            Frame::Message(Message::NoticeResponse(_)) => Ok(None),
            Frame::Message(Message::ParameterStatus(body)) => {
                if let (Ok(name), Ok(value)) = (body.name(), body.value()) {
                    self.greeting.parameters.insert(name.to_string(), value.to_string());
                }
                Ok(None)
            }
            Frame::Message(Message::ErrorResponse(body)) => Err(Error::Server {
                peer: self.peer.clone(),
                error: Box::new(ServerError::from_fields(body.fields())),
            }),
            Frame::Message(message) => Ok(Some(message)),
            Frame::CopyData(_) | Frame::CopyBoth => {
                Err(self.protocol("COPY data outside a COPY".to_string()))
            }
        }
    }

    pub(super) fn lost(&self, source: std::io::Error) -> Error {
        Error::Io { peer: self.peer.clone(), source }
    }

    pub(super) fn protocol(&self, detail: String) -> Error {
        Error::Protocol { peer: self.peer.clone(), detail }
    }
}

async fn open_socket(host: &Host, peer: &str) -> Result<Socket> {
    let refused = |error: std::io::Error| Error::Connect {
        peer: peer.to_string(),
        detail: error.to_string(),
        transient: true,
    };
    if host.host.starts_with('/') {
        let path = format!("{}/.s.PGSQL.{}", host.host, host.port);
        return UnixStream::connect(path).await.map(Socket::Unix).map_err(refused);
    }
    let name = host.hostaddr.as_deref().unwrap_or(&host.host);
    let stream = TcpStream::connect((name, host.port)).await.map_err(refused)?;
    socket::tune(&stream).map_err(refused)?;
    Ok(Socket::Tcp(stream))
}

/// Cancels what a session is doing.
///
/// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-CANCELING-REQUESTS>
#[derive(Clone, Debug)]
pub struct CancelHandle {
    config: Config,
    host: Host,
    process_id: i32,
    secret_key: i32,
}

impl CancelHandle {
    /// Sends the request on a connection of its own. The server promises nothing.
    pub async fn cancel(&self) -> Result<()> {
        let peer = self.config.peer(&self.host);
        let mut socket = open_socket(&self.host, &peer).await?;
        let mut out = BytesMut::new();
        frontend::cancel_request(self.process_id, self.secret_key, &mut out);
        let sent = async {
            socket.write_all(&out).await?;
            socket.flush().await
        };
        sent.await.map_err(|source| Error::Io { peer, source })
    }
}
