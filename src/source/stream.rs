//! The reader: from a slot to a sink, over the streaming replication protocol.
//!
//! <https://www.postgresql.org/docs/current/protocol-logical-replication.html>

use std::future::Future;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;

use super::pace::Pace;
use super::{Counters, Error, Recorded, Result, check_continuity, marker, slot};
use crate::change::{Item, Sink};
use crate::clock::PgTimestamp;
use crate::decode::{Assembler, Decoder};
use crate::id::quote_ident;
use crate::limit::{FEEDBACK_INTERVAL, SILENCE};
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, ReplicationMessage, Session};

/// How long a slot that a walsender of ours still holds is waited for when opening.
const FREE_WAIT: Duration = Duration::from_secs(10);

/// How long a source that is silent and at work is waited for. Where wal_sender_timeout is off, a
/// walsender never lets go by itself.
const PATIENCE: Duration = Duration::from_secs(1800);

/// What to read, and from where.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// The slot; its plugin is pgoutput.
    pub slot: String,
    /// The publication.
    pub publication: String,
    /// The target's durable progress: the exclusive end of what it has. The stream starts here.
    pub start_lsn: Lsn,
    /// Server and slot as recorded when the slot was made; checked before anything is read.
    pub recorded: Recorded,
    /// Ask the server (14 and on) for messages of `pg_logical_emit_message`.
    pub messages: bool,
    /// Transactions with one of these origins are dropped here and counted as filtered: what came
    /// from the other direction must not go back (law 6).
    pub skip_origins: Vec<String>,
    /// The same for transactions whose first change is to the row of one of these streams in
    /// `walferry.progress`: where the other direction's writer may not use origins, it marks by
    /// that row what it writes.
    pub skip_markers: Vec<String>,
    /// Asked for a sign of life after this, given up after twice this. Wants to be longer than the
    /// largest single row takes to arrive.
    pub silence: Duration,
    /// Where decoded and filtered changes are counted.
    pub counters: Counters,
}

impl StreamOptions {
    /// Everything else at its default: messages on, no origin filter, silence of [`SILENCE`].
    pub fn new(slot: &str, publication: &str, start_lsn: Lsn, recorded: Recorded) -> Self {
        StreamOptions {
            slot: slot.to_string(),
            publication: publication.to_string(),
            start_lsn,
            recorded,
            messages: true,
            skip_origins: Vec::new(),
            skip_markers: Vec::new(),
            silence: SILENCE,
            counters: Counters::new(),
        }
    }
}

/// How far a reader is. All are exclusive ends; `received >= decoded >= buffered`, published
/// together once a batch of messages, and at each turn of a wait for the sink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// Whole transactions and keepalives received.
    pub received_lsn: Lsn,
    /// Decoded; filtered transactions included.
    pub decoded_lsn: Lsn,
    /// Handed to the sink.
    pub buffered_lsn: Lsn,
    /// What the slot was last told.
    pub confirmed_lsn: Lsn,
    /// When the source committed the last decoded transaction.
    pub commit_time: Option<PgTimestamp>,
}

/// Why a reader ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to.
    Stopped,
    /// The sink, or whoever publishes durable positions, is gone.
    Closed,
    /// The server ended the stream, as it does when it shuts down.
    Source,
}

/// An open stream, not being read yet.
#[derive(Debug)]
pub struct Stream {
    config: Config,
    session: Session,
    options: StreamOptions,
    interval: Duration,
}

impl Stream {
    /// Connects, checks that server and slot are the recorded ones and not beyond `start_lsn`,
    /// takes the slot from a walsender that an earlier runner of ours left, and starts the stream.
    ///
    /// Errors of law 4 are `Stop`; a slot in use and a lost connection are `Retry`.
    pub async fn open(config: &Config, options: StreamOptions) -> Result<Stream> {
        let mut session = Session::connect(config, Purpose::Replication).await?;
        let (name, start_lsn) = (options.slot.as_str(), options.start_lsn);
        let status = check_continuity(&mut session, name, &options.recorded, start_lsn).await?;
        if status.active_pid.is_some() {
            slot::free(&mut session, name, FREE_WAIT).await?;
        }
        let interval = feedback_interval(&mut session).await?;
        // Its bytes have no known meaning, and no other client encoding would let them out
        // (pgcopydb#874).
        if session.parameter("server_encoding") == Some("SQL_ASCII") {
            session.execute("set client_encoding = 'SQL_ASCII'").await?;
        }
        let (version, wanted) = protocol(session.major_version(), &options);
        tracing::debug!(slot = name, %start_lsn, proto_version = version, "starting replication");
        let wanted: Vec<(&str, &str)> = wanted.iter().map(|(n, v)| (*n, v.as_str())).collect();
        match session.start_replication(name, start_lsn, &wanted).await {
            Ok(()) => Ok(Stream { config: config.clone(), session, options, interval }),
            Err(error) if error.code() == Some("55006") => Err(Error::SlotInUse {
                slot: name.to_string(),
                pid: status.active_pid.unwrap_or(0),
                user: error.to_string(),
            }),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads until told to stop, pushing items in log order.
    ///
    /// `durable` is the applier's durable position, and the only one the slot is ever told;
    /// `stop` ends the reader when it turns true or its sender is dropped. Feedback goes out at
    /// least every [`FEEDBACK_INTERVAL`], whatever the sink does. Errors: a lost or silent
    /// connection (`Retry`), bytes that cannot be decoded (`Stop`). After either, what was pushed
    /// and is not durable comes again from a new stream; a transaction may be cut in the middle.
    pub async fn run<S: Sink>(
        self,
        sink: &mut S,
        durable: watch::Receiver<Lsn>,
        positions: &watch::Sender<Positions>,
        stop: watch::Receiver<bool>,
    ) -> Result<End> {
        let start_lsn = self.options.start_lsn;
        let mut reader = Reader {
            pace: Pace::new(durable, stop, start_lsn, self.interval, self.options.silence),
            session: self.session,
            options: self.options,
            decoder: Decoder::new(),
            assembler: Assembler::new(start_lsn),
            sink,
            positions,
            buffered_lsn: start_lsn,
            commit_time: None,
            skipping: false,
            config: self.config,
            silent_since: None,
        };
        let end = loop {
            if let Some(end) = reader.step().await? {
                break end;
            }
        };
        if end != End::Source {
            // So that the slot holds on to no more than it must while nobody reads it.
            if let Err(error) = reader.pace.send(&mut reader.session, false).await {
                // Whoever stops us has what it wants; the slot learns it from the next reader.
                tracing::debug!(%error, "last feedback not sent");
            }
        }
        reader.publish();
        Ok(end)
    }
}

/// A third of the server's wal_sender_timeout at most: it hangs up after the whole of it.
async fn feedback_interval(session: &mut Session) -> Result<Duration> {
    let sql = "select setting from pg_catalog.pg_settings where name = 'wal_sender_timeout'";
    let rows = session.query(sql).await?;
    let timeout_ms: u64 = rows.first().and_then(|row| row.parse(0).ok()).unwrap_or(0);
    match timeout_ms {
        0 => Ok(FEEDBACK_INTERVAL),
        some => Ok(FEEDBACK_INTERVAL.min(Duration::from_millis(some / 3))),
    }
}

/// The highest protocol version the server knows, and pgoutput's options.
///
/// <https://www.postgresql.org/docs/current/protocol-logical-replication.html#PROTOCOL-LOGICAL-REPLICATION-PARAMS>
fn protocol(major: u32, options: &StreamOptions) -> (u32, Vec<(&'static str, String)>) {
    let version = match major {
        0..14 => 1,
        14 => 2,
        15 => 3,
        _ => 4,
    };
    let mut wanted = vec![
        ("proto_version", version.to_string()),
        ("publication_names", quote_ident(&options.publication)),
    ];
    if options.messages && major >= 14 {
        wanted.push(("messages", "true".to_string()));
    }
    (version, wanted)
}

/// A stream being read.
struct Reader<'a, S> {
    session: Session,
    options: StreamOptions,
    pace: Pace,
    decoder: Decoder,
    assembler: Assembler,
    sink: &'a mut S,
    positions: &'a watch::Sender<Positions>,
    buffered_lsn: Lsn,
    commit_time: Option<PgTimestamp>,
    /// The transaction under way is one to drop.
    skipping: bool,
    config: Config,
    silent_since: Option<Instant>,
}

impl<S: Sink> Reader<'_, S> {
    /// One wait and what follows from it: a turn of the clock, or all messages that have arrived.
    async fn step(&mut self) -> Result<Option<End>> {
        let message = tokio::select! {
            biased;
            wake = self.pace.wake() => {
                let end = match self.pace.turn(&mut self.session, wake, true).await {
                    Err(silent @ Error::Silent { .. }) => self.bear_with(silent).await?,
                    turned => turned?,
                };
                self.publish();
                return Ok(end);
            }
            message = self.session.replication_message() => message?,
        };
        let Some(mut message) = message else { return Ok(Some(End::Source)) };
        loop {
            if let Some(end) = self.take(message).await? {
                return Ok(Some(end));
            }
            match self.session.buffered_replication_message()? {
                Some(next) => message = next,
                None => break,
            }
        }
        self.publish();
        Ok(None)
    }

    /// A walsender that decodes a large transaction of which nothing is published answers nobody
    /// for as long as that takes (seen: 25 s for 20 million rows). While the server says that it
    /// holds our slot it is at work; one whose network is gone lets go of it after its own timeout.
    async fn bear_with(&mut self, silent: Error) -> Result<Option<End>> {
        let since = *self.silent_since.get_or_insert_with(Instant::now);
        let asking = tokio::time::timeout(self.options.silence, self.holds_slot()).await;
        if since.elapsed() > PATIENCE || !matches!(asking, Ok(Ok(true))) {
            return Err(silent);
        }
        tracing::info!(slot = self.options.slot, "the source is silent, and at work");
        self.pace.resume_listening();
        Ok(None)
    }

    async fn holds_slot(&self) -> Result<bool> {
        let mut session = Session::connect(&self.config, Purpose::Sql).await?;
        let status = slot::status(&mut session, &self.options.slot).await?;
        Ok(status.and_then(|status| status.active_pid) == Some(self.session.process_id()))
    }

    async fn take(&mut self, message: ReplicationMessage) -> Result<Option<End>> {
        self.silent_since = None;
        let item = match message {
            ReplicationMessage::Data { start_lsn, data, .. } => {
                self.pace.heard(false);
                self.decode(data, start_lsn)?
            }
            ReplicationMessage::Keepalive { end_lsn, reply_requested } => {
                self.pace.heard(reply_requested);
                self.assembler.keepalive(end_lsn)
            }
        };
        self.pace.received_lsn = self.pace.received_lsn.max(self.assembler.decoded_lsn());
        match item.and_then(|item| self.filter(item)) {
            Some(item) => self.push(item).await,
            None => Ok(None),
        }
    }

    fn decode(&mut self, data: Bytes, start_lsn: Lsn) -> Result<Option<Item>> {
        let event = self.decoder.decode(data, start_lsn);
        let item = event.and_then(|event| self.assembler.event(event));
        item.map_err(|source| Error::Decode { slot: self.options.slot.clone(), source })
    }

    /// Counts the item; of a transaction to skip only the position is left.
    fn filter(&mut self, item: Item) -> Option<Item> {
        let Item::Chunk(chunk) = &item else { return Some(item) };
        if chunk.number == 0 {
            self.skipping =
                marker::is_from(chunk, &self.options.skip_origins, &self.options.skip_markers);
        }
        let skip = self.skipping;
        self.options.counters.add(chunk, skip);
        if let Some(commit) = chunk.commit {
            self.commit_time = Some(commit.commit_time);
        }
        if !skip {
            return Some(item);
        }
        chunk.commit.map(|commit| Item::Idle { lsn: commit.end_lsn })
    }

    /// Hands the item to the sink; while that waits, the server goes on hearing from us.
    async fn push(&mut self, item: Item) -> Result<Option<End>> {
        let end_lsn = item.end_lsn();
        let pushing = self.sink.push(item);
        tokio::pin!(pushing);
        // The usual case is that there is room, and costs no timer.
        let first = std::future::poll_fn(|cx| Poll::Ready(pushing.as_mut().poll(cx))).await;
        let pushed = match first {
            Poll::Ready(pushed) => pushed,
            Poll::Pending => loop {
                self.positions.send_modify(|positions| {
                    positions.received_lsn = self.pace.received_lsn;
                    positions.decoded_lsn = self.assembler.decoded_lsn();
                    positions.buffered_lsn = self.buffered_lsn;
                    positions.confirmed_lsn = self.pace.confirmed_lsn;
                });
                let wake = tokio::select! {
                    biased;
                    pushed = &mut pushing => {
                        self.pace.resume_listening();
                        break pushed;
                    }
                    wake = self.pace.wake() => wake,
                };
                if let Some(end) = self.pace.turn(&mut self.session, wake, false).await? {
                    return Ok(Some(end));
                }
            },
        };
        if pushed.is_err() {
            return Ok(Some(End::Closed));
        }
        if let Some(end_lsn) = end_lsn {
            self.buffered_lsn = end_lsn;
        }
        Ok(None)
    }

    fn publish(&self) {
        let now = Positions {
            received_lsn: self.pace.received_lsn,
            decoded_lsn: self.assembler.decoded_lsn(),
            buffered_lsn: self.buffered_lsn,
            confirmed_lsn: self.pace.confirmed_lsn,
            commit_time: self.commit_time,
        };
        self.positions.send_if_modified(|positions| {
            let changed = *positions != now;
            *positions = now;
            changed
        });
    }
}
