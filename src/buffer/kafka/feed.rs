//! The reading end: a thread that reads the topic, and the queue it fills.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;

use super::Options;
use super::error::{Error, Result};
use super::follower::Follower;
use super::topic::{Reader, Topic};
use super::writer::Shared;
use crate::buffer::memory;
use crate::change::{Feed, Item, Sink};
use crate::lsn::Lsn;

/// Items read ahead of the applier, in bytes; the client library holds as much again.
const AHEAD_BYTES: usize = 16 << 20;

/// How soon the end is noticed.
const TURN: Duration = Duration::from_millis(50);

/// The reading end of a topic. Dropping it leaves the topic as it is.
pub struct KafkaFeed {
    queue: memory::Receiver,
    stop: Arc<AtomicBool>,
}

impl KafkaFeed {
    pub(super) fn start(
        options: &Options,
        from_lsn: Lsn,
        shared: Arc<Shared>,
    ) -> Result<KafkaFeed> {
        let (sender, queue) = memory::queue(AHEAD_BYTES);
        let stop = Arc::new(AtomicBool::new(false));
        let run = Run { options: options.clone(), shared, stop: stop.clone(), from_lsn };
        let handle = Handle::current();
        std::thread::Builder::new()
            .name("kafka reader".to_string())
            .spawn(move || run.run(sender, &handle))
            .map_err(|e| Error::Broker {
                doing: "start a thread to read".to_string(),
                brokers: options.brokers.clone(),
                message: e.to_string(),
            })?;
        Ok(KafkaFeed { queue, stop })
    }
}

impl Feed for KafkaFeed {
    async fn pop(&mut self) -> Option<Item> {
        self.queue.pop().await
    }

    fn try_pop(&mut self) -> Option<Item> {
        self.queue.try_pop()
    }
}

impl Drop for KafkaFeed {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// What the reading thread works with.
struct Run {
    options: Options,
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    from_lsn: Lsn,
}

/// How one reading ended.
enum End {
    /// Nothing more is wanted, or will come.
    Over,
    /// A gap that reading from the topic's beginning on may not have.
    Gap(Lsn),
}

impl Run {
    fn run(self, mut queue: memory::Sender, handle: &Handle) {
        // One whose owner has gone is nobody's concern.
        if let Err(error) = self.read(&mut queue, handle)
            && !self.stop.load(Ordering::SeqCst)
        {
            self.shared.fail(error);
        }
    }

    fn read(&self, queue: &mut memory::Sender, handle: &Handle) -> Result<()> {
        let topic = Topic::new(&self.options)?;
        let Some(extent) = topic.extent()? else {
            return Err(Error::Gone { topic: self.options.topic.clone(), offset: 0 });
        };
        let found = topic.locate(extent, self.from_lsn)?;
        for start in [found, extent.low] {
            match self.read_from(start, extent.high, queue, handle)? {
                End::Over => return Ok(()),
                End::Gap(_) if start > extent.low => {}
                End::Gap(first_lsn) => {
                    let (topic, progress_lsn) = (self.options.topic.clone(), self.from_lsn);
                    return Err(Error::Gap { topic, first_lsn, progress_lsn });
                }
            }
        }
        Ok(())
    }

    /// A gap among the records that were there at the start, below `high`, may be mended by one of
    /// them; a later one is.
    fn read_from(
        &self,
        start: i64,
        high: i64,
        queue: &mut memory::Sender,
        handle: &Handle,
    ) -> Result<End> {
        let reader = Reader::open(&self.options, start)?;
        let mut follower = Follower::new(self.from_lsn);
        loop {
            if self.stop.load(Ordering::SeqCst) || self.shared.is_over(reader.next()) {
                return Ok(End::Over);
            }
            let Some(record) = reader.read(&self.stop, TURN)? else { continue };
            let taken = follower.take(record.envelope);
            if let Some(item) = self.options.readable(taken, record.offset)?
                && handle.block_on(queue.push(item)).is_err()
            {
                return Ok(End::Over);
            }
            if let Some(first_lsn) = follower.gap()
                && reader.next() >= high
            {
                return Ok(End::Gap(first_lsn));
            }
        }
    }
}
