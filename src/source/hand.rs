//! One chunk of a backlog, read by a task of its own, so that the source decodes the next while
//! what this one gave is being applied.
//!
//! A hand is a session with a temporary slot, its mark. Two take turns:
//!
//! ```text
//! one    asks for chunk 1 | its rows are taken        | asks for chunk 3 | ...
//! other                     asks for chunk 2 | ...      its rows are taken
//! ```
//!
//! The mark has moved to the chunk's end before the first row of it is sent. So the other hand
//! makes its mark as a copy of that one then, and begins where this one ends, while it is still in
//! use: <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>.
//!
//! A few pieces wait between a hand and who takes them; all others wait on the source, in its
//! memory or its temporary files. Dropped, a reading cancels its backend, and marks go with their
//! sessions.

use std::future::{Future, ready};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::fetch::PIECE_BYTES;
use super::link::Link;
use super::options::{Spoken, plugin_options};
use super::peek::{Canceled, Peeks, Starts};
use super::{Result, StreamOptions};
use crate::change::AllRead;
use crate::id::quote_literal;
use crate::lsn::Lsn;
use crate::pg::{self, Config, Purpose, ServerError, Session, now};

/// Pieces that wait to be taken.
const PIECES: usize = 4;

/// More than this is not decoded again for each chunk.
const AGAIN_BYTES: u64 = 1 << 30;

/// A session and its mark.
#[derive(Debug)]
pub(super) struct Hand {
    pub session: Session,
    /// Name of the temporary slot.
    pub mark: String,
    /// The session is the one that replication is started in later.
    pub is_first: bool,
    is_made: bool,
    peeks: Peeks,
    starts: Starts,
    link: Link,
    canceled: Canceled,
    all_read: AllRead,
}

/// How much is to be read, and from where.
#[derive(Clone, Debug)]
pub(super) struct Order {
    /// From where this slot stands; from where the hand's own mark stands if `None`.
    pub from: Option<String>,
    /// So many messages, to the end of the transaction that brings them.
    pub messages: u32,
    /// So many bytes of log.
    pub wal_bytes: u64,
    /// No more than this being left, nothing is read.
    pub rest_bytes: u64,
    /// The chunk before: where it begins, and how many messages it was to have at most. `None` if
    /// there is none, or the number of messages is to stay.
    pub last: Option<(Lsn, u32)>,
}

impl Order {
    /// How many messages to ask for: a quarter more where that ends the backlog, as whatever reads
    /// a small rest has to decode all before it once more. By what the chunk before took of the
    /// log, which may have had fewer messages than were asked for; then nothing is added.
    fn messages(&self, stand: &Stand) -> u32 {
        let Some((last_lsn, asked)) = self.last else { return self.messages };
        let more = self.messages.saturating_add(self.messages / 4);
        let last_bytes = u128::from(stand.read_lsn.0.saturating_sub(last_lsn.0));
        let left_bytes = u128::from(stand.flush_lsn.0.saturating_sub(stand.read_lsn.0));
        // left_bytes / last_bytes * asked <= more
        let ends = left_bytes * u128::from(asked) <= u128::from(more) * last_bytes;
        // What is measured so is no exact number: what is a little more comes along.
        if ends && last_bytes > 0 { more.saturating_add(self.messages / 4) } else { self.messages }
    }
}

/// What became of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Everything before has been sent.
    Read {
        /// Where the mark stands: the server stops at the end of a record, and all that committed
        /// before has come.
        read_lsn: Lsn,
    },
    /// So little is left that the stream had better bring it.
    Little,
    /// The source would decode too much again, or refuses what this takes of it.
    Costly,
    /// There is no second mark to be had.
    Alone,
}

/// Rows as they arrived, and what the server warned of before.
#[derive(Debug)]
pub(super) struct Piece {
    pub rows: bytes::Bytes,
    pub warnings: Vec<ServerError>,
}

/// Who can make a hand.
#[derive(Clone, Debug)]
pub(super) struct Maker {
    pub config: Config,
    pub options: StreamOptions,
    pub spoken: Spoken,
}

impl Maker {
    /// A hand for this session. The first of all has its mark already.
    pub fn hand(&self, session: Session, mark: String, is_first: bool) -> Hand {
        let major = session.major_version();
        let wanted = StreamOptions { spill: None, ..self.options.clone() };
        let wanted = plugin_options(self.spoken, major, &wanted);
        let of_mark = StreamOptions { slot: mark.clone(), ..self.options.clone() };
        Hand {
            peeks: Peeks::new(&mark, self.spoken.plugin, major, &wanted),
            starts: Starts::of(&session, self.spoken.plugin),
            link: Link::of(self.config.clone(), &of_mark),
            canceled: Canceled::of(&session),
            all_read: self.options.all_read.clone(),
            is_first,
            is_made: is_first,
            mark,
            session,
        }
    }

    /// Has a second hand made, which has no mark yet.
    pub fn second(&self) -> Coming {
        let (maker, mark) = (self.clone(), mark_name());
        let name = mark.clone();
        Coming { mark, task: tokio::spawn(async move { maker.connect(name).await }) }
    }

    async fn connect(&self, mark: String) -> pg::Result<Hand> {
        let mut session = Session::connect(&self.config, Purpose::Sql).await?;
        session.pass_unknown_bytes().await?;
        session.keep_warnings();
        set(&mut session).await?;
        Ok(self.hand(session, mark, false))
    }
}

/// A hand that is being made. Dropped, it is not.
#[derive(Debug)]
pub(super) struct Coming {
    mark: String,
    task: JoinHandle<pg::Result<Hand>>,
}

impl Coming {
    /// Waits for it; `None` where it cannot be had, which the log tells.
    async fn hand(mut self) -> Option<Hand> {
        match (&mut self.task).await {
            Ok(Ok(hand)) => return Some(hand),
            Ok(Err(error)) => tracing::info!(%error, "the backlog is not read ahead"),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => {}
        }
        None
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A name that no other reader has.
pub(super) fn mark_name() -> String {
    format!("walferry_bulk_{:08x}", fastrand::u32(..))
}

/// What a session needs to read in bulk. Before it has a mark: temporary slots go with any error.
pub(super) async fn set(session: &mut Session) -> pg::Result<()> {
    // A chunk that fits does not go through a temporary file.
    session.execute("set work_mem = '64MB'").await?;
    if session.major_version() >= 14 {
        // Not every platform of a server can do it, and refuses then.
        let _ = session.execute("set client_connection_check_interval = '5s'").await;
    }
    Ok(())
}

/// Makes a temporary slot that stands where another does.
pub(super) async fn copy(session: &mut Session, slot: &str, mark: &str) -> pg::Result<()> {
    let (slot, mark) = (quote_literal(slot), quote_literal(mark));
    let sql = format!("select pg_catalog.pg_copy_logical_replication_slot({slot}, {mark}, true)");
    session.query(&sql).await.map(|_| ())
}

impl Hand {
    /// Follows an order; pieces go out as they are taken.
    async fn read(&mut self, order: &Order, pieces: mpsc::Sender<Piece>) -> Result<Outcome> {
        let Hand { session, link, .. } = self;
        let place = order.from.clone().unwrap_or_else(|| self.mark.clone());
        let Some(stand) = link.bounded(stand(session, &place)).await? else {
            return Ok(Outcome::Costly);
        };
        let is_little = stand.flush_lsn.0.saturating_sub(stand.read_lsn.0) <= order.rest_bytes;
        // With an order for what is behind a chunk, that one is decoded.
        self.all_read.set(is_little);
        if is_little {
            return Ok(Outcome::Little);
        }
        let again_bytes = stand.read_lsn.0.saturating_sub(stand.restart_lsn.0);
        if again_bytes >= AGAIN_BYTES || !self.starts.take() {
            return Ok(Outcome::Costly);
        }
        if let Some(from) = &order.from {
            self.drop_mark().await?;
            match self.link.bounded(copy(&mut self.session, from, &self.mark)).await {
                Ok(()) => self.is_made = true,
                Err(super::Error::Pg(error)) if !error.is_closed() => {
                    tracing::info!(%error, "no second mark, the backlog is not read ahead");
                    return Ok(Outcome::Alone);
                }
                Err(error) => return Err(error),
            }
        }
        let upto_lsn = stand.flush_lsn.min(Lsn(stand.read_lsn.0.saturating_add(order.wal_bytes)));
        let sql = self.peeks.taking(upto_lsn, order.messages(&stand));
        let mut begun = false;
        match self.send(&sql, pieces, &mut begun).await {
            Err(super::Error::Pg(error)) if !begun && is_short(&error) => {
                tracing::info!(%error, "the backlog is streamed");
                return Ok(Outcome::Costly);
            }
            sent => sent?,
        }
        let stand = self.link.bounded(self::stand(&mut self.session, &self.mark)).await?;
        Ok(stand.map_or(Outcome::Costly, |stand| Outcome::Read { read_lsn: stand.read_lsn }))
    }

    async fn send(
        &mut self,
        sql: &str,
        pieces: mpsc::Sender<Piece>,
        begun: &mut bool,
    ) -> Result<()> {
        let Hand { session, link, canceled, .. } = self;
        let pid = session.process_id();
        // A backend that decodes does not notice that we are gone. It may say nothing before its
        // end.
        canceled.arm();
        let mut copy = tokio::select! {
            biased;
            copy = session.copy_out(sql) => copy?,
            silent = link.until_dead(pid) => return Err(silent),
        };
        loop {
            let rows = match now(copy.gathered(PIECE_BYTES)).await {
                Some(rows) => rows?,
                None => tokio::select! {
                    biased;
                    rows = copy.gathered(PIECE_BYTES) => rows?,
                    silent = link.until_dead(pid) => return Err(silent),
                },
            };
            let warnings = copy.take_warnings();
            let Some(rows) = rows else { break };
            *begun = true;
            // Whoever took them is gone, and has left us to be dropped.
            if pieces.send(Piece { rows, warnings }).await.is_err() {
                break;
            }
        }
        canceled.disarm();
        Ok(())
    }

    /// Lets go of the mark, so that another may be made or its slot be free.
    pub async fn drop_mark(&mut self) -> Result<()> {
        if std::mem::take(&mut self.is_made) {
            let mark = quote_literal(&self.mark);
            let drop = format!("select pg_catalog.pg_drop_replication_slot({mark})");
            match self.link.bounded(self.session.query(&drop)).await {
                // Temporary slots go with any error of their session.
                Err(super::Error::Pg(error)) if error.code() == Some("42704") => {}
                dropped => {
                    dropped?;
                }
            }
        }
        Ok(())
    }

    /// Tells the job's slot what is durable. The server decodes for it.
    pub async fn advance(&mut self, sql: &str) -> Result<()> {
        let pid = self.session.process_id();
        tokio::select! {
            biased;
            advanced = self.session.query(sql) => advanced?,
            silent = self.link.until_dead(pid) => return Err(silent),
        };
        Ok(())
    }
}

/// The source lacks something (SQLSTATE class 53): disk, memory, a limit of temporary files.
fn is_short(error: &pg::Error) -> bool {
    error.code().is_some_and(|code| code.starts_with("53"))
}

/// Where a slot stands, and the log.
struct Stand {
    flush_lsn: Lsn,
    read_lsn: Lsn,
    restart_lsn: Lsn,
}

async fn stand(session: &mut Session, slot: &str) -> pg::Result<Option<Stand>> {
    let sql = format!(
        "select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn() \
           else pg_catalog.pg_current_wal_flush_lsn() end, confirmed_flush_lsn, restart_lsn \
         from pg_catalog.pg_replication_slots where slot_name = {}",
        quote_literal(slot)
    );
    let rows = session.query(&sql).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some(Stand { flush_lsn: row.lsn(0)?, read_lsn: row.lsn(1)?, restart_lsn: row.lsn(2)? }))
}

/// A hand that follows an order. Dropped, it is stopped.
pub(super) struct Reading {
    /// Its rows; they end when the order is done.
    pub pieces: mpsc::Receiver<Piece>,
    /// The slot that stands at the end of them once the first has come.
    pub mark: String,
    task: JoinHandle<Result<(Option<Hand>, Outcome)>>,
}

impl Reading {
    /// Sets a hand to work.
    pub fn start(hand: Hand, order: Order) -> Reading {
        Reading::of(hand.mark.clone(), ready(Some(hand)), order)
    }

    /// Sets one to work that is still being made.
    pub fn start_coming(coming: Coming, order: Order) -> Reading {
        Reading::of(coming.mark.clone(), coming.hand(), order)
    }

    fn of(
        mark: String,
        hand: impl Future<Output = Option<Hand>> + Send + 'static,
        order: Order,
    ) -> Reading {
        let (sender, pieces) = mpsc::channel(PIECES);
        let task = tokio::spawn(async move {
            let Some(mut hand) = hand.await else { return Ok((None, Outcome::Alone)) };
            let outcome = hand.read(&order, sender).await?;
            Ok((Some(hand), outcome))
        });
        Reading { pieces, mark, task }
    }

    /// Why there are no more pieces, if that is a failure. To be asked once there are none, and
    /// nothing after it.
    pub async fn failure(&mut self) -> Option<super::Error> {
        match (&mut self.task).await {
            Ok(Err(error)) => Some(error),
            _ => None,
        }
    }

    /// Gives the hand back once all its pieces are taken.
    pub async fn end(mut self) -> Result<(Option<Hand>, Outcome)> {
        match (&mut self.task).await {
            Ok(done) => done,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(pg::Error::Result("a reading was stopped".to_string()).into()),
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_rest_comes_with_the_chunk_before_it() {
        let asked = |read_lsn, flush_lsn, last| {
            let order =
                Order { from: None, messages: 1000, wal_bytes: 1 << 30, rest_bytes: 0, last };
            let stand =
                Stand { flush_lsn: Lsn(flush_lsn), read_lsn: Lsn(read_lsn), restart_lsn: Lsn(0) };
            order.messages(&stand)
        };
        let last = Some((Lsn(5000), 500));
        // 500 messages took 5,000 bytes; 1,250 are left, then 1,251.
        assert_eq!(asked(10_000, 22_500, last), 1500);
        assert_eq!(asked(10_000, 22_510, last), 1000);
        assert_eq!(asked(10_000, 22_500, None), 1000);
        assert_eq!(asked(5000, 5001, last), 1000);
    }
}
