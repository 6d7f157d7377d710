//! The pull transport: a slot read by SQL functions, over an ordinary connection.
//!
//! It needs no replication connection, and reads a backlog several times faster than a walsender
//! sends it, which goes to its socket once a message. What it costs is latency: the source is asked
//! again and again, and begins each answer by decoding from the slot's restart_lsn on.
//!
//! 1. The log's end is asked for: X, its flush position.
//! 2. The slot is peeked at up to X, or up to so many messages, which come as a binary COPY. The
//!    server collects them first (in work_mem, then in a temporary file), and then sends as fast as
//!    they are taken: a transaction of any size passes through fixed memory here.
//! 3. A peek that gave fewer messages than it may has given every transaction whose commit record
//!    begins below X: the server decodes records until one ends at or after X, and X was on disk
//!    when it began. So X is an idle position, like a keepalive's. A peek that gave all it may has
//!    stopped at the end of a transaction, and says nothing of what is behind it.
//! 4. The slot is advanced to what is durable on the target, and to nothing else (law 1). Before
//!    that, a peek begins with what was received already: it is known by its commit records, which
//!    begin below the received position, and passed over. After a peek that was cut short, nothing
//!    is asked until the target has all of it; the same messages would come again. test_decoding
//!    tells where a transaction committed at its end only: there, each peek waits so.
//!
//! Nothing survives a crash but the slot's confirmed position, on the server.
//!
//! <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::continuity::{System, check_continuity_by_sql};
use super::fetch::{Ends, Watch, fetch, push};
use super::intake::Intake;
use super::link::Link;
use super::options::{Spoken, plugin_options};
use super::peek::{Canceled, Chunks, LogEnd, Peeks, Starts};
use super::slot::SlotStatus;
use super::{End, Error, Positions, Result, StreamOptions, slot};
use crate::change::{Item, Sink};
use crate::decode::Plugin;
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, Session};

/// How long a slot that a backend of ours still holds is waited for when opening.
const FREE_WAIT: Duration = Duration::from_secs(10);

/// Between two looks at the log's end: the first after something came, doubled up to the second
/// while nothing does. A look that finds the end unmoved is one small query.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(200));

/// The slot is advanced no more often than this: the server decodes again to do it.
const ADVANCE_GAP: Duration = Duration::from_secs(1);

/// The last advance of a reader that was told to end takes no longer.
const LAST_ADVANCE: Duration = Duration::from_secs(1);

/// A slot that can be read by SQL, not being read yet.
#[derive(Debug)]
pub struct Pull {
    config: Config,
    session: Session,
    options: StreamOptions,
    timeline: u32,
    spoken: Spoken,
    peeks: Peeks,
    starts: Starts,
    confirmed_lsn: Lsn,
}

/// A session that may read the slot, once server and slot are seen to be the recorded ones.
async fn connect(
    config: &Config,
    options: &StreamOptions,
    progress_lsn: Lsn,
) -> Result<(Session, System, SlotStatus)> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let (name, recorded) = (options.slot.as_str(), &options.recorded);
    let (system, status) =
        check_continuity_by_sql(&mut session, config, name, recorded, progress_lsn).await?;
    // A chunk that fits does not go through a temporary file.
    session.execute("set work_mem = '64MB'").await?;
    session.pass_unknown_bytes().await?;
    session.keep_warnings();
    Ok((session, system, status))
}

impl Pull {
    /// The server's timeline, which continues the recorded one.
    pub fn timeline(&self) -> u32 {
        self.timeline
    }

    /// Connects, checks that server and slot are the recorded ones and not beyond `start_lsn`,
    /// and takes the slot from a backend that an earlier runner of ours left.
    ///
    /// A slot behind `start_lsn` gives again what is between, which is passed over; one of
    /// test_decoding must not be behind it once [`Pull::run`] has told it what is durable: its
    /// transactions are not known again.
    ///
    /// Errors of law 4 are `Stop`, and a slot that gives prepared transactions at their PREPARE; a
    /// slot in use and a lost connection are `Retry`.
    pub async fn open(config: &Config, options: StreamOptions) -> Result<Pull> {
        let (name, start_lsn) = (options.slot.as_str(), options.start_lsn);
        let (mut session, system, status) = connect(config, &options, start_lsn).await?;
        if status.active_pid.is_some() {
            slot::free(&mut session, name, FREE_WAIT).await?;
        }
        if slot::is_two_phase(&mut session, name).await? {
            return Err(Error::TwoPhasePull { slot: name.to_string() });
        }
        let mut spoken = options.spoken()?;
        let peeks = loop {
            let wanted = plugin_options(spoken, session.major_version(), &options);
            tracing::debug!(slot = name, %start_lsn, ?wanted, "pulling");
            let peeks = Peeks::new(name, spoken.plugin, session.major_version(), &wanted);
            match session.query(&peeks.first()).await {
                Ok(_) => break peeks,
                Err(error) if spoken.older(&error) => spoken.admit(name)?,
                Err(error) => return Err(error.into()),
            }
        };
        let mut starts = Starts::of(&session, spoken.plugin);
        starts.take();
        let confirmed_lsn = status.confirmed_flush_lsn.unwrap_or(Lsn::ZERO);
        let (config, timeline) = (config.clone(), system.timeline);
        Ok(Pull { config, session, options, timeline, spoken, peeks, starts, confirmed_lsn })
    }

    /// Reads until told to stop, pushing items in log order.
    ///
    /// `durable` is the applier's durable position, and the only one the slot is ever advanced to;
    /// `stop` ends the reader when it turns true or its sender is dropped. Errors: a lost or silent
    /// connection (`Retry`), bytes that cannot be decoded (`Stop`). After either, what was pushed
    /// and is not durable comes again from a new reader; a transaction may be cut in the middle.
    pub async fn run<S: Sink>(
        self,
        sink: &mut S,
        durable: watch::Receiver<Lsn>,
        positions: &watch::Sender<Positions>,
        stop: watch::Receiver<bool>,
    ) -> Result<End> {
        let repeats = self.spoken.plugin.tells_commit_first();
        let mut puller = Puller {
            intake: Intake::new(&self.config, self.spoken, &self.options, repeats, sink, positions),
            repeats,
            ends: Ends {
                canceled: Canceled::of(&self.session),
                link: Link::of(self.config, &self.options),
                watch: Watch { durable, stop },
            },
            session: self.session,
            plugin: self.spoken.plugin,
            peeks: self.peeks,
            starts: self.starts,
            log_end: LogEnd::default(),
            drained_lsn: Lsn::ZERO,
            came_lsn: Lsn::ZERO,
            confirmed_lsn: self.confirmed_lsn,
            chunks: Chunks::of(self.options.bulk.messages),
            options: self.options,
            advance_at: Instant::now(),
        };
        let end = puller.read().await?;
        puller.leave().await;
        Ok(end)
    }
}

/// A slot being read.
struct Puller<'a, S> {
    session: Session,
    options: StreamOptions,
    plugin: Plugin,
    intake: Intake<'a, S>,
    ends: Ends,
    peeks: Peeks,
    starts: Starts,
    log_end: LogEnd,
    /// Everything below has been received, and the log ended here.
    drained_lsn: Lsn,
    /// End of the last that came of the slot. Idle positions behind it say nothing that could come
    /// again, and become durable a second later only.
    came_lsn: Lsn,
    /// What the slot was last advanced to.
    confirmed_lsn: Lsn,
    chunks: Chunks,
    advance_at: Instant,
    /// What was received before is known when it comes again.
    repeats: bool,
}

/// How a chunk ended.
enum Turn {
    /// The reader is to end.
    End(End),
    /// More is waiting on the source.
    Full,
    /// All there was came; something, or nothing.
    Drained(bool),
}

impl<S: Sink> Puller<'_, S> {
    async fn read(&mut self) -> Result<End> {
        let mut pause = PAUSES.0;
        // What the target has is durable, so the slot may be told before anything is asked.
        self.advance().await?;
        loop {
            let begun = Instant::now();
            let turn = self.chunk().await?;
            self.publish();
            let end = match turn {
                Turn::End(end) => return Ok(end),
                Turn::Full => self.settle().await?,
                Turn::Drained(some) => {
                    pause = if some { PAUSES.0 } else { (pause * 2).min(PAUSES.1) };
                    // At most half of the source's time is ours.
                    let end = self.ends.watch.rest(pause.max(begun.elapsed())).await;
                    if end.is_none() && !self.repeats {
                        self.settle().await?
                    } else {
                        if Instant::now() >= self.advance_at {
                            self.advance().await?;
                        }
                        end
                    }
                }
            };
            self.publish();
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    /// Waits until the target durably has all that came of the slot, and tells it, so that the next
    /// peek begins behind it.
    async fn settle(&mut self) -> Result<Option<End>> {
        loop {
            let settling = self.ends.watch.until_durable(self.came_lsn);
            let settled = tokio::time::timeout(ADVANCE_GAP, settling).await;
            if settled.is_ok() || Instant::now() >= self.advance_at {
                self.advance().await?;
            }
            if let Ok(end) = settled {
                return Ok(end);
            }
        }
    }

    /// Peeks once, and pushes what comes.
    async fn chunk(&mut self) -> Result<Turn> {
        let asking = self.log_end.ask(&mut self.session);
        let Some(upto_lsn) = self.ends.link.bounded(asking).await? else {
            return Ok(Turn::Drained(false));
        };
        if upto_lsn <= self.drained_lsn {
            return Ok(Turn::Drained(false));
        }
        self.renew().await?;
        let (begun, limit) = (Instant::now(), self.chunks.messages());
        let before_lsn = self.intake.decoded_lsn();
        let had_lsn = self.intake.buffered_lsn();
        let sql = self.peeks.sql(upto_lsn, limit);
        let Puller { session, intake, ends, confirmed_lsn, .. } = self;
        let (count, bytes) = match fetch(session, &sql, intake, ends, *confirmed_lsn).await? {
            Ok(received) => received,
            Err(end) => return Ok(Turn::End(end)),
        };
        if self.intake.buffered_lsn() > had_lsn {
            self.came_lsn = self.intake.buffered_lsn();
        }
        let full = count >= limit;
        self.chunks.learn(full, begun.elapsed(), (count, bytes));
        if full {
            return Ok(Turn::Full);
        }
        let some = self.intake.decoded_lsn() > before_lsn;
        self.drained_lsn = upto_lsn;
        if let Some(idle) = self.intake.idle(upto_lsn)
            && let Some(end) = self.push(idle).await
        {
            return Ok(Turn::End(end));
        }
        Ok(Turn::Drained(some))
    }

    async fn push(&mut self, item: Item) -> Option<End> {
        push(&mut self.intake, &mut self.ends.watch, item, self.confirmed_lsn).await
    }

    /// Tells the slot what is durable, if it does not know.
    async fn advance(&mut self) -> Result<()> {
        let durable_lsn = self.ends.watch.durable_lsn();
        if durable_lsn <= self.confirmed_lsn {
            return Ok(());
        }
        let begun = Instant::now();
        if self.peeks.advances_by_reading() {
            self.renew().await?;
        }
        let sql = self.peeks.advance(durable_lsn);
        let pid = self.session.process_id();
        let advancing = self.session.query(&sql);
        tokio::select! {
            biased;
            advanced = advancing => advanced?,
            silent = self.ends.link.until_dead(pid) => return Err(silent),
        };
        self.confirmed_lsn = durable_lsn;
        // The server should have better things to do than to decode for this.
        self.advance_at = Instant::now() + ADVANCE_GAP.max(begun.elapsed() * 10);
        Ok(())
    }

    /// Before the plugin is started: on another session, if this one cannot start it again.
    async fn renew(&mut self) -> Result<()> {
        if self.starts.take() {
            return Ok(());
        }
        // Whatever answers now has to be the same server with the same slot (law 4).
        let progress_lsn = self.ends.watch.durable_lsn().max(self.confirmed_lsn);
        let connecting = connect(self.ends.link.config(), &self.options, progress_lsn);
        let (session, ..) = self.ends.link.bounded(connecting).await?;
        self.ends.canceled = Canceled::of(&session);
        self.starts = Starts::of(&session, self.plugin);
        self.starts.take();
        self.session = session;
        Ok(())
    }

    /// So that the slot holds on to no more than it must while nobody reads it.
    async fn leave(&mut self) {
        if !self.ends.canceled.is_armed() {
            match tokio::time::timeout(LAST_ADVANCE, self.advance()).await {
                Ok(Ok(())) => {}
                // Whoever stops us has what it wants; the slot learns it from the next reader.
                Ok(Err(error)) => tracing::debug!(%error, "slot not advanced"),
                Err(_) => tracing::debug!("slot not advanced in time"),
            }
        }
        self.publish();
    }

    fn publish(&self) {
        self.intake.publish(self.intake.decoded_lsn(), self.confirmed_lsn);
    }
}
