//! A second session that writes, so that a target works on two batches at once.
//!
//! # Why
//! A backend writes one batch after the other, on one core. Once the source is done with a backlog,
//! or on another host than the target, that backend is what everything waits for.
//!
//! # Steps
//! 1. Once the target has been behind for a second without a rest, or at once where the source has
//!    nothing left to do for a backlog (`change::AllRead`), a batch goes to the session that the
//!    one before it is not in. What of its net change nobody before it writes (`claims`) is
//!    sent at once: BEGIN and sets.
//! 2. The rest of it, progress and COMMIT are sent once all batches before it have landed. So
//!    target transactions commit in the order of the stream, one by one, and no reader sees what
//!    the source never had (law 5).
//! 3. Whatever is not written as sets, or not alone in its target transaction, or has to do with
//!    TRUNCATE or parked tables, goes to the main session, behind all before it.
//!
//! # Who waits for whom
//! A later batch may wait for the locks of an earlier one, which commits without it. The other way
//! round neither would ever end, and the server would not see why: the later one waits for us. Rows
//! in common are not written ahead, nor tables where other indexes could meet; but somebody else's
//! request for a whole table, queued between the two, comes to the same. So where the first batch
//! waits for a lock while the other has nothing to do, the other gives way: it is rolled back, sent
//! again behind the first, and for a while nothing is begun ahead.
//!
//! # What it needs
//! A replication origin of its own, as only one session may hold one: [`second_origin`]. The reader
//! of the way back leaves out both. Where the role may use no origins, where foreign keys act
//! (without the replica role), and where applications write to the target as well, one session
//! writes; also where the second cannot be had, which the log tells.
//!
//! # What survives a crash
//! The same as with one: what is begun ahead is not committed, and its server rolls it back.
//!
//! [`second_origin`]: crate::id::second_origin

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::error::{Error, Result};
use super::progress::Progress;
use super::writer::Writer;
use super::{Mode, Options, ProgressKind, Settings};
use crate::change::AllRead;
use crate::id::second_origin;
use crate::pg::{CancelHandle, Config, Purpose, Session};

/// A batch of fewer changes is not worth a session of its own: what is begun there is committed a
/// round trip later than behind the one before.
pub(super) const AHEAD_STEPS_MIN: usize = 2000;

/// A first batch that takes so long is looked at: it may wait for a lock that we hold.
pub(super) const STALL: Duration = Duration::from_secs(1);

/// The target has to be behind for so long, without a moment of rest, before a batch is begun
/// ahead, while the source is at work: where that is what is waited for, on the same processors
/// even, it would be slowed down.
const BEHIND: Duration = Duration::from_secs(1);

/// So many batches go by where of the last one less than half could be sent ahead.
const PASSES: u32 = 16;

/// For so long nothing is begun ahead after one had to give way.
const PENANCE: Duration = Duration::from_secs(60);

/// Which of the sessions that write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Lane {
    /// The one that does everything else as well.
    #[default]
    Main,
    /// The other.
    Second,
}

impl Lane {
    /// The other one.
    pub fn other(self) -> Lane {
        match self {
            Lane::Main => Lane::Second,
            Lane::Second => Lane::Main,
        }
    }
}

/// Something of each session.
#[derive(Debug, Default)]
pub(super) struct PerLane<T> {
    main: T,
    second: T,
}

impl<T> PerLane<T> {
    /// That of one.
    pub fn of_mut(&mut self, lane: Lane) -> &mut T {
        match lane {
            Lane::Main => &mut self.main,
            Lane::Second => &mut self.second,
        }
    }

    /// Both.
    pub fn both(self) -> [(Lane, T); 2] {
        [(Lane::Main, self.main), (Lane::Second, self.second)]
    }
}

/// The second session, if there is one.
#[derive(Default)]
pub(super) struct Second {
    state: State,
    /// So many batches are not begun ahead.
    passes: u32,
    /// Nor any before this.
    penance: Option<Instant>,
    /// Since when there was always a batch under way when the next was made.
    behind_since: Option<Instant>,
    /// Whether the source has anything left to do.
    all_read: AllRead,
    /// When the first batch was looked at last, or came to be the first.
    pub looked_at: Option<Instant>,
}

#[derive(Default)]
enum State {
    /// There is to be none.
    #[default]
    Off,
    /// Not needed yet.
    Closed(Box<Opening>),
    Opening(JoinHandle<Result<Session>>),
    Open(Box<Session>),
}

/// How it is opened.
struct Opening {
    config: Config,
    progress: Progress,
    settings: Settings,
    busy_wait: Duration,
}

impl Second {
    /// Of a stream. Nothing is opened yet.
    pub fn of(config: &Config, options: &Options) -> Second {
        let tuning = &options.tuning;
        let may = tuning.sessions > 1
            && tuning.in_flight_max > 1
            && tuning.mode != Mode::Rows
            && options.progress == ProgressKind::Origin
            && options.replica_role
            && options.two_way.is_none();
        let state = match may {
            false => State::Off,
            true => State::Closed(Box::new(Opening {
                config: config.clone(),
                progress: Progress::of(&second_origin(&options.stream), options.progress),
                settings: Settings::of(options),
                busy_wait: options.busy_wait,
            })),
        };
        Second { state, all_read: options.all_read.clone(), ..Second::default() }
    }

    /// False if there is none, and never will be.
    pub fn is_thought_of(&self) -> bool {
        !matches!(self.state, State::Off)
    }

    /// True if another batch may be under way because of it.
    pub fn is_at_work(&self) -> bool {
        let is_open = matches!(self.state, State::Open(_));
        is_open && self.passes == 0 && self.is_behind() && !self.does_penance()
    }

    /// Nothing is under way.
    pub fn rest(&mut self) {
        (self.behind_since, self.looked_at) = (None, Some(Instant::now()));
    }

    fn is_behind(&self) -> bool {
        let is_long = |since: Instant| since.elapsed() >= BEHIND;
        self.behind_since.is_some_and(|since| self.all_read.get() || is_long(since))
    }

    fn does_penance(&self) -> bool {
        self.penance.is_some_and(|until| Instant::now() < until)
    }

    /// The session, once it is open.
    pub fn session(&mut self) -> Option<&mut Session> {
        match &mut self.state {
            State::Open(session) => Some(session),
            _ => None,
        }
    }

    /// Whether a batch may be begun ahead now, as another is under way. The first who asks has the
    /// session opened, and who has to have it (`always`) waits for it.
    pub async fn is_ready(&mut self, progress: &Progress, always: bool) -> bool {
        self.behind_since.get_or_insert_with(Instant::now);
        if !always && !self.is_behind() {
            return false;
        }
        self.state = match std::mem::take(&mut self.state) {
            State::Closed(opening) => {
                let progress = progress.clone();
                State::Opening(tokio::spawn(async move { opening.open(&progress).await }))
            }
            State::Opening(task) if always || task.is_finished() => match task.await {
                Ok(Ok(session)) => State::Open(Box::new(session)),
                Ok(Err(error)) => {
                    tracing::info!(%error, "batches are written by one session");
                    State::Off
                }
                Err(_) => State::Off,
            },
            state => state,
        };
        if !matches!(self.state, State::Open(_)) || self.does_penance() {
            return false;
        }
        let passes = self.passes;
        self.passes = passes.saturating_sub(1);
        passes == 0
    }

    /// Of a batch so many changes could be sent ahead, and so many not.
    pub fn learn(&mut self, ahead: usize, late: usize) {
        if ahead < late {
            self.passes = PASSES;
        }
    }

    /// One had to give way.
    pub fn repent(&mut self) {
        self.penance = Some(Instant::now() + PENANCE);
    }

    /// Closes it, which rolls back what it has open; there is none from now on.
    pub fn leave(&mut self) {
        if let State::Opening(task) = std::mem::take(&mut self.state) {
            task.abort();
        }
    }

    /// Cancels what it is doing.
    pub fn cancel_handle(&self) -> Option<CancelHandle> {
        match &self.state {
            State::Open(session) => Some(session.cancel_handle()),
            _ => None,
        }
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Opening {
    /// Opens a session that is set up as the main one is. `progress` is the stream's, whose
    /// statements it is given.
    async fn open(&self, progress: &Progress) -> Result<Session> {
        let mut session = Session::connect(&self.config, Purpose::Sql).await?;
        let claimed = self.settings.set_up(&mut session, self.progress.claiming()).await?;
        self.progress.claim(&mut session, claimed, self.busy_wait).await?;
        let mut pipeline = Writer::preparing();
        progress.prepare(&mut pipeline);
        let [prepared] = session.exchange_each([pipeline]).await?;
        prepared?;
        Ok(session)
    }
}

/// That session of both.
pub(super) fn session_of<'a>(
    lane: Lane,
    main: &'a mut Session,
    second: &'a mut Second,
) -> Result<&'a mut Session> {
    let lost = || Error::Broken("a batch is in a session that is closed".to_string());
    match lane {
        Lane::Main => Ok(main),
        Lane::Second => second.session().ok_or_else(lost),
    }
}
