//! The writing thread, and what it shares with both ends.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::disk::Disk;
use super::error::{Error, Result};
use super::feed::is_below;
use super::log::{Log, Segment};
use crate::buffer::memory::Gauge;
use crate::change::Item;
use crate::lsn::Lsn;

/// What was written becomes durable after this, together with all that came meanwhile. Nobody waits
/// for it: the applier reads what is not durable yet, and the slot is told seldom.
const SYNC_EVERY: Duration = Duration::from_millis(20);

/// Or as soon as so many bytes are not durable.
const SYNC_BYTES: u64 = 16 << 20;

/// After so long a silence the log says of itself that it is whole.
const MARK_AFTER: Duration = Duration::from_millis(500);

/// How often a full disk is tried again.
const RETRY_EVERY: Duration = Duration::from_millis(200);

/// Items on their way to the writing thread, in bytes.
const QUEUE_BYTES: usize = 32 << 20;

/// To the writing thread.
pub(super) enum Order {
    /// Append an item that was counted for so many bytes.
    Append(Item, usize),
    /// Look at the shared state.
    Wake,
    /// Write what is there and end.
    Close,
}

/// What the reading thread is to do.
pub(super) enum Next {
    /// Read frames of this segment up to here.
    Frames { end: u64 },
    /// Go to another segment.
    Segment { number: u64, body: u64 },
    /// Nothing will come any more.
    End,
}

/// Known to both ends and both threads.
pub(super) struct Shared {
    limit_bytes: u64,
    state: Mutex<State>,
    /// Told when something was written, or the end has come.
    written: Condvar,
    /// Told when there is room for a waiting push, or no more hope of it.
    pub room: Notify,
    pub durable: watch::Sender<Lsn>,
    orders: Sender<Order>,
}

#[derive(Default)]
struct State {
    segments: VecDeque<Segment>,
    queued_bytes: usize,
    disk_bytes: u64,
    pushed_lsn: Lsn,
    /// What was pushed last leaves a transaction open.
    pushed_open: bool,
    release_lsn: Lsn,
    wants_room: bool,
    sink_gone: bool,
    closing: bool,
    ended: bool,
    failure: Option<Error>,
    trouble: Option<String>,
    reader_at: (u64, u64),
    ahead: Option<Gauge>,
}

impl State {
    fn held(&self) -> u64 {
        self.disk_bytes.saturating_add(self.queued_bytes as u64)
    }

    /// The reading end has taken everything there is.
    fn is_drained(&self) -> bool {
        let end = self.segments.back().map(|last| (last.number, last.bytes));
        let read = end.is_none_or(|end| self.reader_at >= end);
        read && self.queued_bytes == 0 && self.ahead.as_ref().is_some_and(Gauge::is_empty)
    }

    /// A transaction larger than the limit must come in whole, or it could never be applied, and
    /// nothing before it released.
    fn admits(&self, bytes: usize, limit_bytes: u64) -> bool {
        let held = self.held();
        let fits = held == 0 || held.saturating_add(bytes as u64) <= limit_bytes;
        let flows =
            self.queued_bytes == 0 || self.queued_bytes.saturating_add(bytes) <= QUEUE_BYTES;
        flows && (fits || self.pushed_open && self.is_drained())
    }
}

/// The spool's answer to a push.
pub(super) enum Admission {
    /// It is on its way.
    In,
    /// Wait for room.
    Full(Item),
    /// Nothing is taken any more.
    Closed,
}

impl Shared {
    pub fn new(limit_bytes: u64, log: &Log<impl Disk>, orders: Sender<Order>) -> Shared {
        let state = State {
            segments: log.segments().clone(),
            disk_bytes: log.bytes(),
            pushed_lsn: log.end_lsn(),
            ..State::default()
        };
        Shared {
            limit_bytes,
            state: Mutex::new(state),
            written: Condvar::new(),
            room: Notify::new(),
            durable: watch::channel(log.durable_lsn()).0,
            orders,
        }
    }

    /// Nothing panics while it holds the lock, so a poisoned state is a whole one.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, order: Order) {
        // The writing thread is gone only after it has told why.
        let _ = self.orders.send(order);
    }

    /// Takes an item in, if there is room for its `bytes`. One that is there already is dropped.
    pub fn admit(&self, item: Item, bytes: usize) -> Admission {
        let mut state = self.state();
        if state.ended || state.closing || state.failure.is_some() {
            return Admission::Closed;
        }
        if is_below(&item, state.pushed_lsn) {
            return Admission::In;
        }
        if !state.admits(bytes, self.limit_bytes) {
            if !std::mem::replace(&mut state.wants_room, true) {
                self.send(Order::Wake);
            }
            return Admission::Full(item);
        }
        state.wants_room = false;
        state.queued_bytes += bytes;
        match item.end_lsn() {
            Some(end_lsn) => (state.pushed_lsn, state.pushed_open) = (end_lsn, false),
            None => state.pushed_open = true,
        }
        self.send(Order::Append(item, bytes));
        Admission::In
    }

    /// How full it is: 0 to 1, and beyond for a transaction larger than the limit.
    pub fn fill(&self) -> f64 {
        self.state().held() as f64 / self.limit_bytes.max(1) as f64
    }

    /// Bytes held: files, and what is on its way into them.
    pub fn bytes(&self) -> u64 {
        self.state().held()
    }

    /// Exclusive end of what was pushed, whole transactions and idle positions only.
    pub fn pushed_lsn(&self) -> Lsn {
        self.state().pushed_lsn
    }

    pub fn segments(&self) -> VecDeque<Segment> {
        self.state().segments.clone()
    }

    pub fn failure(&self) -> Option<Error> {
        self.state().failure.clone()
    }

    pub fn trouble(&self) -> Option<String> {
        self.state().trouble.clone()
    }

    pub fn release(&self, lsn: Lsn) {
        let mut state = self.state();
        if lsn > state.release_lsn {
            state.release_lsn = lsn;
            self.send(Order::Wake);
        }
    }

    /// True if the segment may be removed already: the target has all of it, and of a transaction
    /// that goes on in others.
    pub fn is_released(&self, number: u64) -> bool {
        let state = self.state();
        let mut below = state.segments.iter().skip_while(|segment| segment.number < number);
        let gone = below.clone().next().is_none_or(|segment| segment.number > number);
        let whole = below.find(|segment| !segment.open || segment.end_lsn > state.release_lsn);
        gone || whole.is_some_and(|segment| segment.end_lsn <= state.release_lsn)
    }

    pub fn sink_gone(&self) {
        self.state().sink_gone = true;
        self.send(Order::Wake);
        self.written.notify_all();
    }

    pub fn sink_is_back(&self) {
        self.state().sink_gone = false;
    }

    pub fn close(&self) {
        self.state().closing = true;
        self.send(Order::Close);
    }

    /// A new reading end begins here.
    pub fn attach(&self, at: (u64, u64), ahead: Gauge) {
        let mut state = self.state();
        (state.reader_at, state.ahead) = (at, Some(ahead));
    }

    /// The reading end has nothing at hand: a push may be waiting for just that.
    pub fn drained(&self) {
        let state = self.state();
        if state.wants_room && state.pushed_open {
            self.room.notify_one();
        }
    }

    pub fn wake_reader(&self) {
        drop(self.state());
        self.written.notify_all();
    }

    pub fn fail(&self, error: Error) {
        tracing::error!(%error, "spool failed");
        self.state().failure.get_or_insert(error);
        self.written.notify_all();
        self.room.notify_one();
        self.send(Order::Close);
    }

    /// Waits until there is something for a reader that stands at `at`, or `stop`.
    pub fn next(&self, at: (u64, u64), stop: &AtomicBool) -> Next {
        let mut state = self.state();
        state.reader_at = at;
        loop {
            if stop.load(Ordering::SeqCst) || state.failure.is_some() {
                return Next::End;
            }
            let of = |segment: &&Segment| segment.number >= at.0;
            let here = state.segments.iter().find(of);
            match here {
                Some(segment) if segment.number > at.0 || at.1 == 0 => {
                    return Next::Segment { number: segment.number, body: segment.body };
                }
                Some(segment) if segment.bytes > at.1 => {
                    return Next::Frames { end: segment.bytes };
                }
                _ => {}
            }
            if let Some(next) = state.segments.iter().find(|segment| segment.number > at.0) {
                return Next::Segment { number: next.number, body: next.body };
            }
            if state.ended || state.sink_gone && state.queued_bytes == 0 {
                return Next::End;
            }
            if state.wants_room && state.pushed_open {
                self.room.notify_one();
            }
            state = self.written.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The writing thread's own.
pub(super) struct Writer<D: Disk> {
    pub log: Log<D>,
    pub shared: Arc<Shared>,
    pub orders: Receiver<Order>,
}

impl<D: Disk> Writer<D> {
    /// Works until told to end. A failure is told to both ends.
    pub fn run(mut self) {
        let outcome = self.work().and_then(|()| {
            let marked = self.log.mark();
            self.publish(0);
            match marked {
                // All there is could be made durable; only the saying so had no room.
                Err(Error::NoSpace { .. }) => Ok(()),
                marked => marked,
            }
        });
        if let Err(error) = outcome {
            self.shared.fail(error);
        }
        self.shared.state().ended = true;
        self.shared.written.notify_all();
        self.shared.room.notify_one();
    }

    fn work(&mut self) -> Result<()> {
        let mut synced_at = Instant::now();
        loop {
            let wait = match self.log.is_dirty() {
                true => SYNC_EVERY.saturating_sub(synced_at.elapsed()),
                false => MARK_AFTER,
            };
            let (mut written, mut closing) = (0, false);
            match self.orders.recv_timeout(wait) {
                Ok(order) => closing = self.obey(order, &mut written)?,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) if !self.log.is_dirty() => self.mark()?,
                Err(RecvTimeoutError::Timeout) => {}
            }
            // What has come meanwhile goes with it.
            while !closing && self.log.dirty_bytes() < SYNC_BYTES {
                let Ok(order) = self.orders.try_recv() else { break };
                closing = self.obey(order, &mut written)?;
            }
            self.release()?;
            self.publish(written);
            let due = synced_at.elapsed() >= SYNC_EVERY || self.log.dirty_bytes() >= SYNC_BYTES;
            if self.log.is_dirty() && due {
                self.log.sync()?;
                synced_at = Instant::now();
                self.publish(0);
            }
            if closing {
                return Ok(());
            }
        }
    }

    fn mark(&mut self) -> Result<()> {
        match self.log.mark() {
            Err(Error::NoSpace { .. }) => Ok(()),
            marked => marked,
        }
    }

    /// True if it is to end.
    fn obey(&mut self, order: Order, written: &mut usize) -> Result<bool> {
        match order {
            Order::Append(item, bytes) => {
                self.append(&item)?;
                *written += bytes;
                Ok(false)
            }
            Order::Wake => Ok(false),
            Order::Close => Ok(true),
        }
    }

    /// Where there is no space it waits for some, be it by what is released meanwhile.
    fn append(&mut self, item: &Item) -> Result<()> {
        let mut waited = false;
        loop {
            match self.log.append(item) {
                Err(error @ Error::NoSpace { .. }) => {
                    let mut state = self.shared.state();
                    state.trouble = Some(error.to_string());
                    state.wants_room = true;
                    if state.failure.is_some() || state.closing {
                        // Nothing after it may be appended either.
                        return Err(error);
                    }
                }
                appended => {
                    if waited {
                        self.shared.state().trouble = None;
                    }
                    return appended;
                }
            }
            // The applier must be able to go on, or nothing will ever be released.
            self.log.sync()?;
            self.publish(0);
            std::thread::sleep(RETRY_EVERY);
            self.release()?;
            waited = true;
        }
    }

    fn release(&mut self) -> Result<()> {
        let (lsn, all) = {
            let state = self.shared.state();
            (state.release_lsn, state.wants_room)
        };
        self.log.release(lsn, all)?;
        Ok(())
    }

    /// Shows both ends what the log is now, after items counted for `written` bytes.
    fn publish(&mut self, written: usize) {
        let durable_lsn = self.log.durable_lsn();
        self.shared.durable.send_if_modified(|last| {
            let modified = *last != durable_lsn;
            *last = durable_lsn;
            modified
        });
        let mut state = self.shared.state();
        state.queued_bytes = state.queued_bytes.saturating_sub(written);
        state.disk_bytes = self.log.bytes();
        let segments = self.log.segments();
        let same = |a: Option<&Segment>, b: Option<&Segment>| {
            a.map(|segment| segment.number) == b.map(|segment| segment.number)
        };
        if state.segments.len() == segments.len()
            && same(state.segments.front(), segments.front())
            && same(state.segments.back(), segments.back())
        {
            if let (Some(shown), Some(last)) = (state.segments.back_mut(), segments.back()) {
                *shown = last.clone();
            }
        } else {
            state.segments = segments.clone();
        }
        if state.wants_room {
            self.shared.room.notify_one();
        }
        drop(state);
        self.shared.written.notify_all();
    }
}
