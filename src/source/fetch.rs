//! The answer of a function that decodes, from a COPY into the intake: what a puller and the bulk
//! of a backlog share.
//!
//! Nothing is said before the server has decoded the whole chunk, and nothing is read while the
//! sink is full. Neither is silence: who looks on another connection sees that the slot is held.

use std::future::Future;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::intake::Intake;
use super::peek::Canceled;
use super::rows::Rows;
use super::{End, Error, Result, slot};
use crate::change::{Item, Sink};
use crate::lsn::Lsn;
use crate::pg::{self, Config, Purpose, Session};

/// How long a source that is silent and at work is waited for: it decodes the whole chunk before it
/// says anything.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Rows are taken over together up to about so many bytes, which then live as long as any of them.
const PIECE_BYTES: usize = 64 << 10;

/// Whoever may end the reading, besides its own end.
pub(super) struct Ends {
    /// Those who may stop the reader.
    pub watch: Watch,
    /// How the server is held against its silence.
    pub link: Link,
    /// What a backend does for nobody is canceled.
    pub canceled: Canceled,
    /// The slot that it holds meanwhile.
    pub slot: String,
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
    let Ends { watch, link, canceled, slot } = ends;
    let mut rows = Rows::default();
    let (mut count, mut bytes) = (0_u32, 0_u64);
    let pid = session.process_id();
    // A backend that decodes does not notice that we are gone. It may say nothing before its end.
    canceled.arm();
    let mut copy = tokio::select! {
        biased;
        end = watch.end() => return Ok(Err(end)),
        silent = link.until_dead(slot, pid) => return Err(silent),
        copy = session.copy_out(sql) => copy?,
    };
    loop {
        let piece = match now(copy.gathered(PIECE_BYTES)).await {
            Some(piece) => piece?,
            None => {
                intake.publish(intake.decoded_lsn(), confirmed_lsn);
                tokio::select! {
                    biased;
                    end = watch.end() => return Ok(Err(end)),
                    silent = link.until_dead(slot, pid) => return Err(silent),
                    piece = copy.gathered(PIECE_BYTES) => piece?,
                }
            }
        };
        // The server has decoded the whole chunk before it sends the first row of it.
        intake.warned(copy.take_warnings()).await?;
        let Some(piece) = piece else { break };
        bytes += piece.len() as u64;
        rows.feed(piece);
        while let Some(message) = rows.next()? {
            count = count.saturating_add(1);
            let mut item = Some(intake.message(message.data, message.lsn).await?);
            while let Some(said) = item {
                if let Some(said) = said
                    && let Some(end) = push(intake, watch, said, confirmed_lsn).await
                {
                    return Ok(Err(end));
                }
                item = intake.more().await?;
            }
        }
    }
    canceled.disarm();
    if !rows.is_complete() || intake.in_transaction() {
        let message = "the answer of the slot ended too early".to_string();
        return Err(pg::Error::Result(message).into());
    }
    Ok(Ok((count, bytes)))
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

/// What the future gives without waiting, if it does.
async fn now<F: Future>(future: F) -> Option<F::Output> {
    tokio::pin!(future);
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
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

/// What is known of the connection's health.
pub(super) struct Link {
    /// The server.
    pub config: Config,
    /// See [`StreamOptions::silence`].
    ///
    /// [`StreamOptions::silence`]: super::StreamOptions::silence
    pub silence: Duration,
}

impl Link {
    /// A question that a server answers at once, if it is there.
    pub async fn bounded<T>(&self, asking: impl Future<Output = pg::Result<T>>) -> Result<T> {
        match tokio::time::timeout(self.silence * 2, asking).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(self.silent(self.silence * 2)),
        }
    }

    /// Ends when the server has been silent for too long and does not hold the slot for us either,
    /// as seen on another connection: then nobody decodes for us any more.
    pub async fn until_dead(&self, slot: &str, pid: i32) -> Error {
        let begun = Instant::now();
        loop {
            tokio::time::sleep(self.silence).await;
            let asking = tokio::time::timeout(self.silence, self.holds_slot(slot, pid)).await;
            if begun.elapsed() > PATIENCE || !matches!(asking, Ok(Ok(true))) {
                return self.silent(begun.elapsed());
            }
            tracing::info!(slot, "the source is silent, and at work");
        }
    }

    async fn holds_slot(&self, slot: &str, pid: i32) -> Result<bool> {
        let mut session = Session::connect(&self.config, Purpose::Sql).await?;
        let status = slot::status(&mut session, slot).await?;
        Ok(status.and_then(|status| status.active_pid) == Some(pid))
    }

    fn silent(&self, silence: Duration) -> Error {
        let peer = self.config.hosts.first().map(|host| self.config.peer(host));
        Error::Silent { peer: peer.unwrap_or_default(), seconds: silence.as_secs_f64() }
    }
}
