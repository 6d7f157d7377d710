//! A queue in memory, bounded by bytes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::change::Feed;
use crate::change::{Item, Sink, SinkClosed};
use crate::lsn::Lsn;

/// A queue that holds items of at most `limit_bytes` in sum (or one larger item alone).
pub fn queue(limit_bytes: usize) -> (Sender, Receiver) {
    let shared = Arc::new(Shared {
        limit_bytes,
        state: Mutex::new(State::default()),
        filled: Notify::new(),
        drained: Notify::new(),
    });
    (Sender { shared: shared.clone() }, Receiver { shared })
}

#[derive(Debug)]
struct Shared {
    limit_bytes: usize,
    state: Mutex<State>,
    /// Told when an item arrives or the sender goes.
    filled: Notify,
    /// Told when room was made for a waiting sender, or the receiver goes.
    drained: Notify,
}

#[derive(Debug, Default)]
struct State {
    items: VecDeque<Item>,
    bytes: usize,
    buffered_lsn: Lsn,
    sender_waits: bool,
    receiver_waits: bool,
    sender_gone: bool,
    receiver_gone: bool,
}

impl Shared {
    /// Nothing panics while it holds the lock, so a poisoned state is a whole one.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the item in, or gives it back if there is no room.
    fn put(&self, item: Item) -> Result<Option<Item>, SinkClosed> {
        let mut state = self.state();
        if state.receiver_gone {
            return Err(SinkClosed);
        }
        let bytes = item.bytes();
        if !state.items.is_empty() && state.bytes.saturating_add(bytes) > self.limit_bytes {
            state.sender_waits = true;
            return Ok(Some(item));
        }
        if let Some(end_lsn) = item.end_lsn() {
            state.buffered_lsn = end_lsn;
        }
        state.sender_waits = false;
        state.bytes += bytes;
        state.items.push_back(item);
        if std::mem::take(&mut state.receiver_waits) {
            self.filled.notify_one();
        }
        Ok(None)
    }

    /// Takes an item; `Err` tells whether one may still come.
    fn take(&self, will_wait: bool) -> Result<Item, bool> {
        let mut state = self.state();
        let Some(item) = state.items.pop_front() else {
            state.receiver_waits = will_wait;
            return Err(!state.sender_gone);
        };
        state.bytes = state.bytes.saturating_sub(item.bytes());
        // A sender woken for the room of a single small item would fill it and sleep again, once
        // an item; a quarter of the queue at a time costs nothing.
        if state.sender_waits && state.bytes <= self.limit_bytes / 4 * 3 {
            self.drained.notify_one();
        }
        Ok(item)
    }
}

/// The writing end. Dropping it lets the receiver finish what is there.
#[derive(Debug)]
pub struct Sender {
    shared: Arc<Shared>,
}

impl Sender {
    /// What the queue holds, for status pages; stays valid when this end is gone.
    pub fn gauge(&self) -> Gauge {
        Gauge { shared: self.shared.clone() }
    }
}

impl Sink for Sender {
    async fn push(&mut self, item: Item) -> Result<(), SinkClosed> {
        let mut item = item;
        loop {
            match self.shared.put(item)? {
                None => return Ok(()),
                Some(refused) => item = refused,
            }
            // notify_one keeps a permit, so room made since `put` is not missed.
            self.shared.drained.notified().await;
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.shared.state().sender_gone = true;
        self.shared.filled.notify_one();
    }
}

/// The reading end. Dropping it discards what is there and refuses further pushes.
#[derive(Debug)]
pub struct Receiver {
    shared: Arc<Shared>,
}

impl Receiver {
    /// The next item, waiting for one; `None` once the sender is gone and nothing is left.
    /// Cancel-safe.
    pub async fn pop(&mut self) -> Option<Item> {
        loop {
            match self.shared.take(true) {
                Ok(item) => return Some(item),
                Err(true) => self.shared.filled.notified().await,
                Err(false) => return None,
            }
        }
    }

    /// The next item if there is one now.
    pub fn try_pop(&mut self) -> Option<Item> {
        self.shared.take(false).ok()
    }

    /// What the queue holds, for status pages; stays valid when this end is gone.
    pub fn gauge(&self) -> Gauge {
        Gauge { shared: self.shared.clone() }
    }
}

impl Feed for Receiver {
    async fn pop(&mut self) -> Option<Item> {
        Receiver::pop(self).await
    }

    fn try_pop(&mut self) -> Option<Item> {
        Receiver::try_pop(self)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.receiver_gone = true;
        state.bytes = 0;
        let discarded = std::mem::take(&mut state.items);
        drop(state);
        self.shared.drained.notify_one();
        drop(discarded);
    }
}

/// Looks at a queue without taking from it.
#[derive(Clone, Debug)]
pub struct Gauge {
    shared: Arc<Shared>,
}

impl Gauge {
    /// Items held.
    pub fn len(&self) -> usize {
        self.shared.state().items.len()
    }

    /// True if nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held, by [`Item::bytes`].
    pub fn bytes(&self) -> usize {
        self.shared.state().bytes
    }

    /// Exclusive end of what was put in, whole transactions and idle positions only.
    pub fn buffered_lsn(&self) -> Lsn {
        self.shared.state().buffered_lsn
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::{Ends, Make, contract};

    struct Memory;

    impl Make for Memory {
        type Sink = Sender;
        type Feed = Receiver;

        fn make(&self, limit_bytes: usize) -> Ends<Sender, Receiver> {
            queue(limit_bytes)
        }

        fn bytes(&self, outlet: &Receiver) -> usize {
            outlet.gauge().bytes()
        }
    }

    #[tokio::test]
    async fn the_queue_keeps_the_contract() {
        contract::check(&Memory).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_queue_keeps_the_contract_across_threads() {
        contract::check(&Memory).await.unwrap();
    }

    #[tokio::test]
    async fn the_gauge_tells_items_bytes_and_position() {
        let (mut sender, mut receiver) = queue(1 << 20);
        let gauge = sender.gauge();
        assert!(gauge.is_empty());
        sender.push(Item::Idle { lsn: Lsn(7) }).await.unwrap();
        assert_eq!((gauge.len(), gauge.buffered_lsn()), (1, Lsn(7)));
        assert!(gauge.bytes() > 0);
        assert_eq!(receiver.try_pop(), Some(Item::Idle { lsn: Lsn(7) }));
        assert_eq!((gauge.len(), gauge.bytes(), gauge.buffered_lsn()), (0, 0, Lsn(7)));
    }
}
