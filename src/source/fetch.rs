//! The answer of a function that decodes, from a COPY into the intake: what a puller and the bulk
//! of a backlog share.
//!
//! Nothing is said before the server has decoded the whole chunk, and nothing is read while the
//! sink is full. Neither is silence: who looks on another connection sees that the slot is held.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::intake::{Intake, Taken};
use super::link::Link;
use super::peek::Canceled;
use super::rows::Rows;
use super::{End, Result};
use crate::change::{Item, Sink};
use crate::lsn::Lsn;
use crate::pg::{self, Session, now};

/// Rows are taken over together up to about so many bytes, which then live as long as any of them.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// Whoever may end the reading, besides its own end.
pub(super) struct Ends {
    /// Those who may stop the reader.
    pub watch: Watch,
    /// Who tells a server that is at work from one that is dead.
    pub link: Link,
    /// What a backend does for nobody is canceled.
    pub canceled: Canceled,
}

/// Runs a COPY of `lsn, xid, data` and pushes what the messages come to. Gives their number and
/// bytes; or why the reader is to end.
pub(super) async fn fetch<S: Sink>(
    session: &mut Session,
    sql: &str,
    intake: &mut Intake<'_, S>,
    ends: &mut Ends,
    confirmed_lsn: Lsn,
) -> Result<std::result::Result<(u32, u64), End>> {
    let Ends { watch, link, canceled } = ends;
    let mut taking = Taking::default();
    let pid = session.process_id();
    // A backend that decodes does not notice that we are gone. It may say nothing before its end.
    canceled.arm();
    let mut copy = tokio::select! {
        biased;
        end = watch.end() => return Ok(Err(end)),
        copy = session.copy_out(sql) => copy?,
        silent = link.until_dead(pid) => return Err(silent),
    };
    loop {
        let piece = match now(copy.gathered(PIECE_BYTES)).await {
            Some(piece) => piece?,
            None => {
                intake.publish(intake.decoded_lsn(), confirmed_lsn);
                tokio::select! {
                    biased;
                    end = watch.end() => return Ok(Err(end)),
                    piece = copy.gathered(PIECE_BYTES) => piece?,
                    silent = link.until_dead(pid) => return Err(silent),
                }
            }
        };
        // The server has decoded the whole chunk before it sends the first row of it.
        intake.warned(copy.take_warnings()).await?;
        let Some(piece) = piece else { break };
        if let Some(end) = taking.take(piece, intake, watch, confirmed_lsn).await? {
            return Ok(Err(end));
        }
    }
    canceled.disarm();
    taking.end(intake).map(Ok)
}

/// The answer so far.
#[derive(Debug, Default)]
pub(super) struct Taking {
    rows: Rows,
    count: u32,
    bytes: u64,
}

impl Taking {
    /// Of an answer that has the messages alone.
    pub fn data() -> Taking {
        Taking { rows: Rows::data(), ..Taking::default() }
    }

    /// True while nothing has come.
    pub fn is_untouched(&self) -> bool {
        self.bytes == 0
    }

    /// Messages so far.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Pushes what the messages of a piece come to; or gives why the reader is to end.
    pub async fn take<S: Sink>(
        &mut self,
        piece: Bytes,
        intake: &mut Intake<'_, S>,
        watch: &mut Watch,
        confirmed_lsn: Lsn,
    ) -> Result<Option<End>> {
        self.bytes += piece.len() as u64;
        self.rows.feed(piece);
        while let Some(message) = self.rows.next()? {
            self.count = self.count.saturating_add(1);
            let lsn = message.lsn.unwrap_or_else(|| intake.decoded_lsn());
            let mut item = match intake.at_once(message.data, lsn)? {
                Taken::Whole(None) => continue,
                Taken::Whole(Some(item)) => {
                    if let Some(end) = push(intake, watch, item, confirmed_lsn).await {
                        return Ok(Some(end));
                    }
                    continue;
                }
                later => Some(intake.later(later, lsn).await?),
            };
            while let Some(said) = item {
                if let Some(said) = said
                    && let Some(end) = push(intake, watch, said, confirmed_lsn).await
                {
                    return Ok(Some(end));
                }
                item = intake.more().await?;
            }
        }
        Ok(None)
    }

    /// Number of messages and bytes, if nothing is missing.
    pub fn end<S: Sink>(self, intake: &Intake<'_, S>) -> Result<(u32, u64)> {
        if !self.rows.is_complete() || intake.in_transaction() {
            let message = "the answer of the slot ended too early".to_string();
            return Err(pg::Error::Result(message).into());
        }
        Ok((self.count, self.bytes))
    }
}

/// Hands the item to the sink; meanwhile nothing is read, and the server waits.
pub(super) async fn push<S: Sink>(
    intake: &mut Intake<'_, S>,
    watch: &mut Watch,
    item: Item,
    confirmed_lsn: Lsn,
) -> Option<End> {
    let end_lsn = item.end_lsn();
    let (publisher, received_lsn) = (intake.publisher(), intake.decoded_lsn());
    let pushed = {
        let pushing = intake.sink.push(item);
        tokio::pin!(pushing);
        match now(pushing.as_mut()).await {
            Some(pushed) => pushed,
            None => {
                publisher.publish(received_lsn, confirmed_lsn);
                tokio::select! {
                    biased;
                    pushed = pushing => pushed,
                    end = watch.end() => return Some(end),
                }
            }
        }
    };
    if pushed.is_err() {
        return Some(End::Closed);
    }
    intake.buffered(end_lsn);
    None
}

/// Those who may end the reader, and whom it waits for.
pub(super) struct Watch {
    /// What the target has.
    pub durable: watch::Receiver<Lsn>,
    /// Set to end the reader.
    pub stop: watch::Receiver<bool>,
}

impl Watch {
    /// What the target durably has.
    pub fn durable_lsn(&self) -> Lsn {
        *self.durable.borrow()
    }

    /// Waits until the reader is to end. Cancel-safe.
    pub async fn end(&mut self) -> End {
        let gone = async { while self.durable.changed().await.is_ok() {} };
        tokio::select! {
            biased;
            // An error means that whoever could stop us is gone: stop as well.
            _ = self.stop.wait_for(|stop| *stop) => End::Stopped,
            () = gone => End::Closed,
        }
    }

    /// Waits for a while; gives why the reader is to end, if it is before.
    pub async fn rest(&mut self, pause: Duration) -> Option<End> {
        tokio::time::timeout(pause, self.end()).await.ok()
    }

    /// Waits until the target durably has everything before `lsn`.
    pub async fn until_durable(&mut self, lsn: Lsn) -> Option<End> {
        tokio::select! {
            biased;
            _ = self.stop.wait_for(|stop| *stop) => Some(End::Stopped),
            reached = self.durable.wait_for(|durable| *durable >= lsn) => {
                reached.is_err().then_some(End::Closed)
            }
        }
    }
}
