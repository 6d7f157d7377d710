//! When to tell the server something, and when to believe it gone.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::{End, Error, Result};
use crate::lsn::Lsn;
use crate::pg::Session;

/// Feedback about a durable position that moves all the time goes out no more often than this: the
/// slot may write its state for each, and nobody waits for it.
const FEEDBACK_GAP: Duration = Duration::from_millis(50);

/// Why the reader should stop what it waits for, for a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// It was told to end.
    Stop,
    /// Feedback is due.
    Due,
    /// The durable position moved.
    Durable,
    /// Nobody will publish a durable position any more.
    Gone,
}

/// The clockwork of feedback and silence (laws 1 and 11).
pub(super) struct Pace {
    durable: watch::Receiver<Lsn>,
    stop: watch::Receiver<bool>,
    /// Exclusive end of what has been received whole.
    pub received_lsn: Lsn,
    /// The last durable position told to the slot.
    pub confirmed_lsn: Lsn,
    interval: Duration,
    silence: Duration,
    due: Instant,
    sent_at: Instant,
    heard_at: Instant,
    asked: bool,
}

impl Pace {
    pub fn new(
        durable: watch::Receiver<Lsn>,
        stop: watch::Receiver<bool>,
        start_lsn: Lsn,
        interval: Duration,
        silence: Duration,
    ) -> Self {
        let now = Instant::now();
        Pace {
            durable,
            stop,
            received_lsn: start_lsn,
            confirmed_lsn: start_lsn,
            interval: interval.min(silence / 4),
            silence,
            due: now,
            sent_at: now,
            heard_at: now,
            asked: false,
        }
    }

    /// Waits for the next reason to act. Cancel-safe.
    pub async fn wake(&mut self) -> Wake {
        tokio::select! {
            biased;
            // An error means that whoever could stop us is gone: stop as well.
            _ = self.stop.wait_for(|stop| *stop) => Wake::Stop,
            () = tokio::time::sleep_until(self.due) => Wake::Due,
            moved = self.durable.changed() => match moved {
                Ok(()) => Wake::Durable,
                Err(_) => Wake::Gone,
            },
        }
    }

    /// Acts on a reason. `listening` is false while the reader waits for its sink: then it is not
    /// the server that is silent. Not cancel-safe.
    pub async fn turn(
        &mut self,
        session: &mut Session,
        wake: Wake,
        listening: bool,
    ) -> Result<Option<End>> {
        match wake {
            Wake::Stop => return Ok(Some(End::Stopped)),
            Wake::Gone => return Ok(Some(End::Closed)),
            Wake::Durable => self.due = self.due.min(self.sent_at + FEEDBACK_GAP),
            Wake::Due => self.feedback(session, listening).await?,
        }
        Ok(None)
    }

    /// A message came.
    pub fn heard(&mut self, reply_requested: bool) {
        self.heard_at = Instant::now();
        self.asked = false;
        if reply_requested {
            self.due = self.heard_at;
        }
    }

    /// The sink has room again: the server's silence counts from here.
    pub fn resume_listening(&mut self) {
        self.heard_at = Instant::now();
        self.asked = false;
    }

    async fn feedback(&mut self, session: &mut Session, listening: bool) -> Result<()> {
        let silent = if listening { self.heard_at.elapsed() } else { Duration::ZERO };
        if silent >= self.silence * 2 {
            let seconds = silent.as_secs_f64();
            return Err(Error::Silent { peer: session.peer().to_string(), seconds });
        }
        let ask = silent >= self.silence && !self.asked;
        self.send(session, ask).await?;
        self.asked |= ask;
        Ok(())
    }

    /// Tells the server where we are; of the slot's position, only what is durable.
    pub async fn send(&mut self, session: &mut Session, ask: bool) -> Result<()> {
        self.confirmed_lsn = self.confirmed_lsn.max(*self.durable.borrow_and_update());
        let (received, durable) = (self.received_lsn.max(self.confirmed_lsn), self.confirmed_lsn);
        let sending = session.send_feedback(received, durable, durable, ask);
        // A full socket at a server that does not read is silence, too.
        if let Ok(sent) = tokio::time::timeout(self.silence * 2, sending).await {
            sent?;
        } else {
            let seconds = (self.silence * 2).as_secs_f64();
            return Err(Error::Silent { peer: session.peer().to_string(), seconds });
        }
        self.sent_at = Instant::now();
        self.due = self.sent_at + self.interval;
        Ok(())
    }
}
