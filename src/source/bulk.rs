//! The bulk of a backlog, read by SQL before the stream begins.
//!
//! A walsender goes to its socket once a message, and that is what a backlog costs on the source,
//! not decoding: 200,000 pgbench transactions (1.2 million messages) took 6.1 s by a walsender to a
//! reader that throws them away, and 0.9 s by one function call and a COPY of what it gives.
//!
//! 1. The slot is copied to a temporary one, the mark, which belongs to this session and goes with
//!    it. The job's own slot stays where it is: it is told what is durable, and nothing else (law
//!    1).
//! 2. Chunks are taken with `pg_logical_slot_get_binary_changes`, which moves the mark behind
//!    them. Nothing of one is sent before the source has decoded all of it. So two marks take
//!    turns (`hand`): one is read ahead while what the other gave is applied. The source decodes
//!    from the mark's restart_lsn for each, so each is twice as large as the last; the first is
//!    small, that the target has something to do.
//! 3. A chunk of log in which no transaction ended is followed by one that is long enough for
//!    most, with all that committed behind it; the source keeps what comes of it in a temporary
//!    file. If that has no end either, or there is no room for it, the walsender sends that
//!    transaction piece by piece.
//! 4. This ends when little is left, and earlier where it does not pay: see 3 and 5, and when the
//!    source decodes too much again for each chunk. Before it does, the target gets a moment to
//!    take what it was given: the walsender decodes once more what the slot was not told of, and a
//!    busy machine has better things to do.
//! 5. Nor does it pay where messages are large: a walsender's call for each is nothing then, and it
//!    sends the first while it decodes the next. The first chunk tells.
//! 6. The marks are dropped, and the job's slot streamed from the end of what was read: the server
//!    passes over what committed before. No record is missed between, and none comes twice.
//!
//! Where it cannot be (before 12, without a free slot), the stream begins at once;
//! without a second free slot, nothing is read ahead. Nothing survives a crash, and nothing has to:
//! a mark is no promise to anybody.
//!
//! <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>

use std::time::Duration;

use tokio::time::Instant;

use super::fetch::{Taking, Watch, push};
use super::hand::{Coming, Hand, Maker, Order, Outcome, Reading, copy, mark_name, set};
use super::intake::Intake;
use super::options::{Spoken, plugin_options};
use super::peek::{Chunks, Peeks};
use super::{End, Result, StreamOptions, slot};
use crate::change::Sink;
use crate::decode::Plugin;
use crate::id::quote_literal;
use crate::lsn::Lsn;
use crate::pg::{self, Config, Session, now};

/// Bytes of log of the first chunk, and of any but those for a large transaction.
const CHUNK_WAL: (u64, u64) = (16 << 20, 1 << 30);

/// No limit: the function takes an integer.
const ALL_MESSAGES: u32 = i32::MAX as u32;

/// The job's slot is told what is durable no more often than this, nor in more than a twentieth of
/// the time: the server decodes for it.
const ADVANCE_GAP: Duration = Duration::from_secs(10);

/// So long the target may take for what it was given before the stream begins.
const SETTLE: Duration = Duration::from_secs(1);

/// A backlog to be read so.
#[derive(Debug)]
pub(super) struct Bulk {
    /// Name of the first temporary slot.
    mark: String,
    maker: Maker,
    slot: Peeks,
    /// Exclusive end of what was read.
    read_lsn: Lsn,
    /// End of the last transaction of it.
    came_lsn: Lsn,
    confirmed_lsn: Lsn,
    /// So much is left to the stream.
    rest_bytes: u64,
    chunks: Chunks,
    /// So many messages were asked for last, where that is ours to choose.
    asked: Option<u32>,
    wal_bytes: u64,
    /// The last chunk had no end of a transaction, and the next is to find it.
    stretched: bool,
    /// A second hand reads ahead.
    ahead: bool,
    /// That hand, until it has something to do for the first time.
    second: Option<Coming>,
    advance_at: Instant,
}

/// Hands that have nothing to do.
#[derive(Default)]
struct Idle {
    /// It read the last chunk: its mark stands where reading goes on.
    last: Option<Hand>,
    other: Option<Hand>,
}

/// How a chunk ended.
enum Taken {
    /// It is through; the next one may be under way.
    Whole { count: u32, bytes: u64, next: Option<Reading> },
    /// The reader is to end.
    End(End),
}

impl Bulk {
    /// Makes the mark; `None` where the backlog is short, or where this cannot be done. The session
    /// is a replication session of the slot's database, which has ended at `flush_lsn`.
    pub async fn begin(
        config: &Config,
        session: &mut Session,
        options: &StreamOptions,
        spoken: Spoken,
        confirmed_lsn: Lsn,
        flush_lsn: Lsn,
    ) -> Result<Option<Bulk>> {
        options.all_read.set(false);
        let Some(least_bytes) = options.bulk.least_bytes else { return Ok(None) };
        let backlog_bytes = flush_lsn.0.saturating_sub(options.start_lsn.0);
        let may = spoken.plugin == Plugin::Pgoutput && !options.two_phase;
        if !may || session.major_version() < 12 || backlog_bytes < least_bytes.max(1) {
            return Ok(None);
        }
        // A mark is told of prepared transactions at their end only, and what was prepared in the
        // bulk and ends behind it would have come from neither: not now, and not where the slot
        // tells of PREPARE from an earlier run.
        if slot::is_two_phase(session, &options.slot).await? {
            return Ok(None);
        }
        let mark = mark_name();
        match make(session, options, &mark, confirmed_lsn).await {
            Ok(()) => {}
            Err(error) if error.is_closed() => return Err(error.into()),
            Err(error) => {
                tracing::info!(slot = options.slot, %error, "the backlog is streamed");
                return Ok(None);
            }
        }
        tracing::debug!(slot = options.slot, mark, backlog_bytes, "reading in bulk");
        let major = session.major_version();
        let wanted = plugin_options(spoken, major, options);
        Ok(Some(Bulk {
            slot: Peeks::new(&options.slot, spoken.plugin, major, &wanted),
            maker: Maker { config: config.clone(), options: options.clone(), spoken },
            mark,
            read_lsn: options.start_lsn,
            came_lsn: options.start_lsn,
            confirmed_lsn,
            rest_bytes: least_bytes / 4,
            chunks: Chunks::ahead(options.bulk.messages),
            asked: None,
            wal_bytes: CHUNK_WAL.0,
            stretched: false,
            ahead: options.bulk.ahead,
            second: None,
            advance_at: Instant::now() + ADVANCE_GAP,
        }))
    }

    /// What the job's slot was told last.
    pub fn confirmed_lsn(&self) -> Lsn {
        self.confirmed_lsn
    }

    /// Reads until the stream had better go on, and gives the session back for it; or why the
    /// reader is to end.
    pub async fn run<S: Sink>(
        &mut self,
        session: Session,
        intake: &mut Intake<'_, S>,
        watch: &mut Watch,
    ) -> Result<std::result::Result<Session, End>> {
        let first = self.maker.hand(session, self.mark.clone(), true);
        let mut idle = Idle::default();
        let mut settled = false;
        let mut reading = self.start(Some(first), None);
        // While the source decodes what comes first, and nobody else has anything to do.
        self.second = self.ahead.then(|| self.maker.second());
        loop {
            let begun = Instant::now();
            let (count, bytes, next) =
                match self.take(&mut reading, &mut idle, intake, watch).await? {
                    Taken::Whole { count, bytes, next } => (count, bytes, next),
                    Taken::End(end) => return Ok(Err(end)),
                };
            let (hand, outcome) = reading.end().await?;
            let goes_on = match outcome {
                Outcome::Read { read_lsn } => {
                    // No chunk came before, with or without rows.
                    let is_first = self.read_lsn == self.maker.options.start_lsn;
                    (idle.other, idle.last) = (idle.last.take().or(idle.other.take()), hand);
                    settled = false;
                    self.chunks.learn(false, begun.elapsed(), (count, bytes));
                    if let Some(end) = self.reached(read_lsn, intake, watch).await {
                        return Ok(Err(end));
                    }
                    if is_first && self.is_wide(count, bytes) {
                        break;
                    }
                    self.advance(&mut idle, watch).await?;
                    count > 0 && self.unstretch() || self.stretch()
                }
                Outcome::Alone => {
                    self.ahead = false;
                    true
                }
                Outcome::Little if !settled => {
                    idle.give_back(hand);
                    settled = true;
                    if let Some(end) = self.settle(intake, watch).await {
                        return Ok(Err(end));
                    }
                    true
                }
                Outcome::Little | Outcome::Costly => {
                    idle.give_back(hand);
                    false
                }
            };
            reading = match next {
                Some(next) => next,
                None if goes_on => self.start(idle.last.take(), None),
                None => break,
            };
        }
        self.second = None;
        self.maker.options.all_read.set(false);
        idle.into_session().await.map(Ok)
    }

    /// Asks for the next chunk, from where `from` stands.
    fn start(&mut self, hand: Option<Hand>, from: Option<&str>) -> Reading {
        let wal_bytes = self.wal_bytes;
        self.wal_bytes = (wal_bytes.saturating_mul(3)).min(CHUNK_WAL.1.max(wal_bytes));
        // Behind a large transaction a small one would have all of that decoded once more.
        let messages = if self.stretched { ALL_MESSAGES } else { self.chunks.rise() };
        let order = Order {
            from: from.map(str::to_string),
            messages,
            wal_bytes,
            rest_bytes: self.rest_bytes,
            last: self.asked.map(|asked| (self.read_lsn, asked)),
        };
        let fixed = self.stretched || self.maker.options.bulk.messages.is_some();
        self.asked = (!fixed).then_some(order.messages);
        if let Some(hand) = hand {
            return Reading::start(hand, order);
        }
        let second = self.second.take().unwrap_or_else(|| self.maker.second());
        Reading::start_coming(second, order)
    }

    /// True of a chunk whose messages had better come one by one.
    fn is_wide(&self, count: u32, bytes: u64) -> bool {
        let most = self.maker.options.bulk.message_bytes;
        let is_wide =
            most.is_some_and(|most| count > 0 && bytes > most.saturating_mul(count.into()));
        if is_wide {
            tracing::debug!(slot = self.maker.options.slot, count, bytes, "messages are large");
        }
        is_wide
    }

    /// After a chunk without an end: true if a longer one may have it.
    fn stretch(&mut self) -> bool {
        let transaction_bytes = self.maker.options.bulk.transaction_bytes;
        if std::mem::replace(&mut self.stretched, true) || self.wal_bytes >= transaction_bytes {
            return false;
        }
        self.wal_bytes = transaction_bytes;
        true
    }

    /// After a chunk with an end. True.
    fn unstretch(&mut self) -> bool {
        if std::mem::take(&mut self.stretched) {
            self.wal_bytes = CHUNK_WAL.1;
        }
        true
    }

    /// Takes all pieces of a chunk. With the first of them the next chunk is asked for.
    async fn take<S: Sink>(
        &mut self,
        reading: &mut Reading,
        idle: &mut Idle,
        intake: &mut Intake<'_, S>,
        watch: &mut Watch,
    ) -> Result<Taken> {
        let mut taking = Taking::data();
        let mut next = None;
        loop {
            let piece = match now(reading.pieces.recv()).await {
                Some(piece) => piece,
                None => {
                    intake.publish(intake.decoded_lsn(), self.confirmed_lsn);
                    tokio::select! {
                        biased;
                        end = watch.end() => return Ok(Taken::End(end)),
                        piece = reading.pieces.recv() => piece,
                    }
                }
            };
            let Some(piece) = piece else { break };
            // The source has decoded the whole chunk before it sends the first row of it.
            intake.warned(piece.warnings).await?;
            if let Some(end) = taking.take(piece.rows, intake, watch, self.confirmed_lsn).await? {
                return Ok(Taken::End(end));
            }
            if self.ahead && next.is_none() && taking.count() > 0 {
                self.unstretch();
                next = Some(self.start(idle.any(), Some(&reading.mark)));
            }
        }
        if taking.is_untouched() {
            return Ok(Taken::Whole { count: 0, bytes: 0, next });
        }
        match taking.end(intake) {
            Ok((count, bytes)) => Ok(Taken::Whole { count, bytes, next }),
            // Whoever read it knows why; a connection that is lost is made again.
            Err(early) => Err(reading.failure().await.unwrap_or(early)),
        }
    }

    /// Everything below has been received.
    async fn reached<S: Sink>(
        &mut self,
        read_lsn: Lsn,
        intake: &mut Intake<'_, S>,
        watch: &mut Watch,
    ) -> Option<End> {
        self.read_lsn = self.read_lsn.max(read_lsn);
        // Idle positions behind it become durable a second later only.
        self.came_lsn = self.came_lsn.max(intake.buffered_lsn());
        if let Some(idle) = intake.idle(self.read_lsn)
            && let Some(end) = push(intake, watch, idle, self.confirmed_lsn).await
        {
            return Some(end);
        }
        intake.publish(intake.decoded_lsn(), self.confirmed_lsn);
        None
    }

    /// Waits a moment for the target.
    async fn settle<S: Sink>(
        &mut self,
        intake: &mut Intake<'_, S>,
        watch: &mut Watch,
    ) -> Option<End> {
        intake.publish(intake.decoded_lsn(), self.confirmed_lsn);
        let settling = watch.until_durable(self.came_lsn);
        tokio::time::timeout(SETTLE, settling).await.unwrap_or(None)
    }

    /// Tells the job's slot what is durable, so that the source may let go of its log.
    async fn advance(&mut self, idle: &mut Idle, watch: &Watch) -> Result<()> {
        let durable_lsn = watch.durable_lsn();
        let Some(hand) = idle.last.as_mut() else { return Ok(()) };
        if Instant::now() < self.advance_at || durable_lsn <= self.confirmed_lsn {
            return Ok(());
        }
        let begun = Instant::now();
        hand.advance(&self.slot.advance(durable_lsn)).await?;
        self.confirmed_lsn = durable_lsn;
        self.advance_at = Instant::now() + ADVANCE_GAP.max(begun.elapsed() * 20);
        Ok(())
    }
}

impl Idle {
    /// A hand to read ahead with; `None` if one is to be made.
    fn any(&mut self) -> Option<Hand> {
        self.other.take().or_else(|| self.last.take())
    }

    /// Takes one that has not read.
    fn give_back(&mut self, hand: Option<Hand>) {
        match self.last {
            None => self.last = hand,
            Some(_) => self.other = hand.or(self.other.take()),
        }
    }

    /// Lets go of all marks; gives the session that came first.
    async fn into_session(self) -> Result<Session> {
        let mut session = None;
        for mut hand in [self.last, self.other].into_iter().flatten() {
            hand.drop_mark().await?;
            if hand.is_first {
                hand.session.execute("reset work_mem").await?;
                session = Some(hand.session);
            }
        }
        let lost = || pg::Error::Result("the first of the hands is lost".to_string());
        Ok(session.ok_or_else(lost)?)
    }
}

/// Copies the slot, and brings the copy to where reading begins.
async fn make(
    session: &mut Session,
    options: &StreamOptions,
    mark: &str,
    confirmed_lsn: Lsn,
) -> pg::Result<()> {
    set(session).await?;
    copy(session, &options.slot, mark).await?;
    if options.start_lsn > confirmed_lsn {
        let (start_lsn, mark) = (options.start_lsn, quote_literal(mark));
        let sql = format!("select pg_catalog.pg_replication_slot_advance({mark}, '{start_lsn}')");
        session.query(&sql).await?;
    }
    Ok(())
}
