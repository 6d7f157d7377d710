//! The reader: from a slot to a sink, over the streaming replication protocol.
//!
//! <https://www.postgresql.org/docs/current/protocol-logical-replication.html>

use std::future::Future;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::bulk::Bulk;
use super::continuity::{Recorded, System, check_slot, check_system};
use super::fetch::Watch;
use super::intake::{Intake, Publisher, Taken};
use super::options::{Spoken, plugin_options};
use super::pace::Pace;
use super::{End, Error, Positions, Result, StreamOptions, slot};
use crate::change::{Item, Sink, SinkClosed};
use crate::limit::FEEDBACK_INTERVAL;
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, ReplicationMessage, Session};

/// How long a slot that a walsender of ours still holds is waited for when opening.
const FREE_WAIT: Duration = Duration::from_secs(10);

/// How long a source that is silent and at work is waited for. Where wal_sender_timeout is off, a
/// walsender never lets go by itself.
const PATIENCE: Duration = Duration::from_secs(1800);

/// An open stream, not being read yet.
#[derive(Debug)]
pub struct Stream {
    config: Config,
    session: Session,
    options: StreamOptions,
    spoken: Spoken,
    interval: Duration,
    timeline: u32,
    /// What is read before replication is started.
    bulk: Option<Box<Bulk>>,
}

impl Stream {
    /// Connects, checks that server and slot are the recorded ones and not beyond `start_lsn`,
    /// takes the slot from a walsender that an earlier runner of ours left, and starts the stream,
    /// or the reading of what comes before it (`bulk`).
    ///
    /// Errors of law 4 are `Stop`; a slot in use and a lost connection are `Retry`.
    pub async fn open(config: &Config, options: StreamOptions) -> Result<Stream> {
        let mut session = Session::connect(config, Purpose::Replication).await?;
        let (name, start_lsn) = (options.slot.as_str(), options.start_lsn);
        let system = checked(&mut session, &options.recorded, start_lsn).await?;
        let status = slot::status(&mut session, name).await?;
        let confirmed_lsn = check_slot(name, status.as_ref(), &options.recorded, start_lsn)?;
        // It has been told that much, whatever is known to be durable by now.
        let told_lsn = options.confirmed_lsn.max(confirmed_lsn);
        let options = StreamOptions { confirmed_lsn: told_lsn, ..options };
        if status.is_some_and(|status| status.active_pid.is_some()) {
            slot::free(&mut session, &options.slot, FREE_WAIT).await?;
        }
        let interval = feedback_interval(&mut session).await?;
        session.pass_unknown_bytes().await?;
        session.keep_warnings();
        let mut spoken = options.spoken()?;
        let bulk =
            Bulk::begin(config, &mut session, &options, spoken, confirmed_lsn, system.flush_lsn)
                .await?;
        if bulk.is_none() {
            start(&mut session, &options, &mut spoken, start_lsn).await?;
        }
        let bulk = bulk.map(Box::new);
        let (config, timeline) = (config.clone(), system.timeline);
        Ok(Stream { config, session, options, spoken, interval, timeline, bulk })
    }

    /// Reads until told to stop, pushing items in log order.
    ///
    /// `durable` is the applier's durable position, and the only one the slot is ever told;
    /// `stop` ends the reader when it turns true or its sender is dropped. Feedback goes out at
    /// least every [`FEEDBACK_INTERVAL`], whatever the sink does. Errors: a lost or silent
    /// connection (`Retry`), bytes that cannot be decoded (`Stop`). After either, what was pushed
    /// and is not durable comes again from a new stream; a transaction may be cut in the middle.
    pub async fn run<S: Sink>(
        mut self,
        sink: &mut S,
        durable: watch::Receiver<Lsn>,
        positions: &watch::Sender<Positions>,
        stop: watch::Receiver<bool>,
    ) -> Result<End> {
        let mut confirmed_lsn = self.options.confirmed_lsn;
        let mut intake =
            Intake::new(&self.config, self.spoken, &self.options, false, sink, positions);
        if let Some(mut bulk) = self.bulk.take() {
            let mut watch = Watch { durable: durable.clone(), stop: stop.clone() };
            match bulk.run(self.session, &mut intake, &mut watch).await? {
                Ok(session) => self.session = session,
                Err(end) => return Ok(end),
            }
            confirmed_lsn = confirmed_lsn.max(bulk.confirmed_lsn());
            let durable_lsn = *durable.borrow();
            self.hand_over(intake.decoded_lsn(), durable_lsn).await?;
        }
        let start_lsn = intake.decoded_lsn();
        let mut pace = Pace::new(durable, stop, start_lsn, self.interval, self.options.silence);
        pace.confirmed_lsn = confirmed_lsn;
        let mut reader = Reader {
            pace,
            intake,
            session: self.session,
            options: self.options,
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

    /// The server's timeline, which continues the recorded one.
    pub fn timeline(&self) -> u32 {
        self.timeline
    }

    /// True if there is a backlog that is read in bulk before the stream begins.
    pub fn is_behind(&self) -> bool {
        self.bulk.is_some()
    }

    /// Begins to stream at `read_lsn`. Meanwhile the slot was nobody's: another program may have
    /// moved it.
    async fn hand_over(&mut self, read_lsn: Lsn, durable_lsn: Lsn) -> Result<()> {
        let (name, recorded) = (&self.options.slot, &self.options.recorded);
        let status = slot::status(&mut self.session, name).await?;
        let durable_lsn = durable_lsn.max(self.options.start_lsn);
        check_slot(name, status.as_ref(), recorded, durable_lsn)?;
        tracing::debug!(slot = name, %read_lsn, "streaming what is left");
        start(&mut self.session, &self.options, &mut self.spoken, read_lsn).await
    }
}

/// [`check_system`]; a standby that was started again is not where it was yet, and lost nothing.
async fn checked(session: &mut Session, recorded: &Recorded, start_lsn: Lsn) -> Result<System> {
    let behind = match check_system(session, recorded, start_lsn).await {
        Err(Error::Behind { peer, flush_lsn, progress_lsn }) => (peer, flush_lsn, progress_lsn),
        checked => return checked,
    };
    let (peer, flush_lsn, progress_lsn) = behind;
    match slot::in_recovery(session).await? {
        true => {
            let (replay_lsn, wanted_lsn) = (flush_lsn, progress_lsn);
            Err(Error::StandbyBehind { peer, replay_lsn, wanted_lsn })
        }
        false => Err(Error::Behind { peer, flush_lsn, progress_lsn }),
    }
}

/// START_REPLICATION, by what the plugin turns out to know.
async fn start(
    session: &mut Session,
    options: &StreamOptions,
    spoken: &mut Spoken,
    start_lsn: Lsn,
) -> Result<()> {
    let name = options.slot.as_str();
    let started = loop {
        let wanted = plugin_options(*spoken, session.major_version(), options);
        tracing::debug!(slot = name, %start_lsn, ?wanted, "starting replication");
        let wanted: Vec<(&str, &str)> = wanted.iter().map(|(n, v)| (*n, v.as_str())).collect();
        match session.start_replication(name, start_lsn, &wanted).await {
            Err(error) if spoken.older(&error) => spoken.admit(name)?,
            started => break started,
        }
    };
    match started {
        Ok(()) => Ok(()),
        Err(error) if error.code() == Some("55006") => {
            let status = slot::status(session, name).await?;
            let pid = status.and_then(|status| status.active_pid).unwrap_or(0);
            Err(Error::SlotInUse { slot: name.to_string(), pid, user: error.to_string() })
        }
        Err(error) => Err(error.into()),
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

/// A stream being read.
struct Reader<'a, S> {
    session: Session,
    options: StreamOptions,
    pace: Pace,
    intake: Intake<'a, S>,
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
        // One that belongs to a transaction comes before its COMMIT.
        self.intake.warned(self.session.take_warnings()).await?;
        let item = match message {
            ReplicationMessage::Data { start_lsn, data, .. } => {
                self.pace.heard(false);
                let later = match self.intake.at_once(data, start_lsn)? {
                    Taken::Whole(item) => return self.pass_on(item).await,
                    later => later,
                };
                let publisher = self.intake.publisher();
                let taking = self.intake.later(later, start_lsn);
                match attend(&mut self.pace, &mut self.session, publisher, taking).await? {
                    Ok(taken) => taken?,
                    Err(end) => return Ok(Some(end)),
                }
            }
            ReplicationMessage::Keepalive { end_lsn, reply_requested } => {
                self.pace.heard(reply_requested);
                self.intake.idle(end_lsn)
            }
        };
        if let Some(end) = self.pass_on(item).await? {
            return Ok(Some(end));
        }
        loop {
            let publisher = self.intake.publisher();
            let more = self.intake.more();
            let item = match attend(&mut self.pace, &mut self.session, publisher, more).await? {
                Ok(more) => more?,
                Err(end) => return Ok(Some(end)),
            };
            self.pace.received_lsn = self.pace.received_lsn.max(self.intake.decoded_lsn());
            match item {
                Some(Some(item)) => {
                    if let Some(end) = self.push(item).await? {
                        return Ok(Some(end));
                    }
                }
                Some(None) => {}
                None => return Ok(None),
            }
        }
    }

    /// Everything up to here has been received; hands the item on, if there is one.
    async fn pass_on(&mut self, item: Option<Item>) -> Result<Option<End>> {
        self.pace.received_lsn = self.pace.received_lsn.max(self.intake.decoded_lsn());
        match item {
            Some(item) => self.push(item).await,
            None => Ok(None),
        }
    }

    /// Hands the item to the sink; while that waits, the server goes on hearing from us.
    async fn push(&mut self, item: Item) -> Result<Option<End>> {
        let end_lsn = item.end_lsn();
        let publisher = self.intake.publisher();
        let pushing = self.intake.sink.push(item);
        match attend(&mut self.pace, &mut self.session, publisher, pushing).await? {
            Ok(Ok(())) => {
                self.intake.buffered(end_lsn);
                Ok(None)
            }
            Ok(Err(SinkClosed)) => Ok(Some(End::Closed)),
            Err(end) => Ok(Some(end)),
        }
    }

    fn publish(&self) {
        self.intake.publish(self.pace.received_lsn, self.pace.confirmed_lsn);
    }
}

/// Does work that may wait for somebody other than the server, while the server goes on hearing
/// from us (law 11). `Err` if the reader is to end instead.
async fn attend<T>(
    pace: &mut Pace,
    session: &mut Session,
    publisher: Publisher<'_>,
    work: impl Future<Output = T>,
) -> Result<std::result::Result<T, End>> {
    tokio::pin!(work);
    // The usual case is that it need not wait, and costs no timer.
    let first = std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
    if let Poll::Ready(done) = first {
        return Ok(Ok(done));
    }
    loop {
        publisher.publish(pace.received_lsn, pace.confirmed_lsn);
        let wake = tokio::select! {
            biased;
            done = &mut work => {
                pace.resume_listening();
                return Ok(Ok(done));
            }
            wake = pace.wake() => wake,
        };
        if let Some(end) = pace.turn(session, wake, false).await? {
            return Ok(Err(end));
        }
    }
}
