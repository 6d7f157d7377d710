//! The writing end: the client library's producer, and what is on its way.
//!
//! The producer keeps order and repeats what a broker did not take, for ever; a broker that is away
//! only makes pushes wait. What it acknowledges must have gone to just the next offset: if not,
//! something else writes too, or the topic is another, and from that record on nothing counts.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prost::Message as _;
use rdkafka::ClientContext;
use rdkafka::Message as _;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use tokio::sync::{Notify, watch};

use super::envelope::v1::{self, Envelope, envelope::Content};
use super::envelope::{self, Described};
use super::error::{Error, Result, is_refusal, said};
use super::properties::{Said, property};
use super::{Options, cost};
use crate::change::{Item, Sink, SinkClosed};
use crate::lsn::Lsn;

/// Records on their way to the broker, in bytes: some 100 ms of a fast network.
const QUEUE_BYTES: usize = 32 << 20;

/// What the client library keeps beside each record.
const RECORD_BYTES: usize = 256;

/// The broker must take the first record within this.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was pushed is counted in lots of at most about this many bytes until it is released.
const LOT_BYTES: u64 = 1 << 20;

/// A record that was not acknowledged yet.
struct Sent {
    bytes: usize,
    /// Set in the record that ends a transaction, or says an idle position.
    end_lsn: Option<Lsn>,
    /// Where it went.
    offset: Option<i64>,
}

/// Pushed and not released.
struct Lot {
    end_lsn: Lsn,
    bytes: u64,
}

#[derive(Default)]
struct State {
    in_flight: VecDeque<Sent>,
    in_flight_bytes: usize,
    /// Number of the first of `in_flight` among all.
    first: usize,
    /// Where the next record must go; `None` until the first is acknowledged.
    next_offset: Option<i64>,
    lots: VecDeque<Lot>,
    lots_bytes: u64,
    /// Of the transaction that is open.
    open_bytes: u64,
    pushed_lsn: Lsn,
    pushed_open: bool,
    chunks: u32,
    sink_gone: bool,
    closing: bool,
    failure: Option<Error>,
    described: Described,
}

impl State {
    fn held(&self) -> u64 {
        self.lots_bytes + self.open_bytes
    }

    /// A transaction larger than the limit must come in whole, or it could never be applied.
    fn admits(&self, bytes: usize, limit_bytes: u64) -> bool {
        let held = self.held();
        let fits = held == 0
            || held.saturating_add(bytes as u64) <= limit_bytes
            || self.pushed_open && self.lots_bytes == 0;
        fits && (self.in_flight_bytes == 0 || self.in_flight_bytes + bytes <= QUEUE_BYTES)
    }

    fn count(&mut self, bytes: u64, end_lsn: Option<Lsn>, limit_bytes: u64) {
        self.open_bytes += bytes;
        let Some(end_lsn) = end_lsn else { return };
        let bytes = std::mem::take(&mut self.open_bytes);
        self.lots_bytes += bytes;
        let lot_bytes = LOT_BYTES.min(limit_bytes / 1024);
        match self.lots.back_mut() {
            Some(last) if last.bytes + bytes <= lot_bytes => {
                last.bytes += bytes;
                last.end_lsn = end_lsn;
            }
            _ => self.lots.push_back(Lot { end_lsn, bytes }),
        }
    }
}

/// Known to the writing end, the producer's thread and the reading ends.
pub(super) struct Shared {
    options: Options,
    state: Mutex<State>,
    /// Told when there is room for a waiting push, or no more hope of it.
    room: Notify,
    pub durable: watch::Sender<Lsn>,
    said: Said,
}

impl Shared {
    pub fn new(options: &Options, start_lsn: Lsn) -> Shared {
        Shared {
            options: options.clone(),
            state: Mutex::new(State { pushed_lsn: start_lsn, ..State::default() }),
            room: Notify::new(),
            durable: watch::channel(start_lsn).0,
            said: Said::default(),
        }
    }

    /// Nothing panics while it holds the lock, so a poisoned state is a whole one.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn pushed_lsn(&self) -> Lsn {
        self.state().pushed_lsn
    }

    pub fn held(&self) -> u64 {
        self.state().held()
    }

    pub fn failure(&self) -> Option<Error> {
        self.state().failure.clone()
    }

    /// What the client's threads say of a broker that does not take what is waiting.
    pub fn trouble(&self) -> Option<String> {
        let waiting = !self.state().in_flight.is_empty();
        self.said.last().filter(|_| waiting)
    }

    pub fn fail(&self, error: Error) {
        tracing::debug!(%error, "topic failed");
        self.state().failure.get_or_insert(error);
        self.room.notify_one();
    }

    pub fn release(&self, lsn: Lsn) {
        let mut state = self.state();
        while state.lots.front().is_some_and(|lot| lot.end_lsn <= lsn) {
            if let Some(lot) = state.lots.pop_front() {
                state.lots_bytes -= lot.bytes;
            }
        }
        drop(state);
        self.room.notify_one();
    }

    pub fn sink_is_back(&self) {
        self.state().sink_gone = false;
    }

    fn sink_gone(&self) {
        self.state().sink_gone = true;
    }

    pub fn close(&self) {
        self.state().closing = true;
        self.room.notify_one();
    }

    /// True for a reader that stands at `next`, if nothing will come any more.
    pub fn is_over(&self, next: i64) -> bool {
        let state = self.state();
        let drained = state.in_flight.is_empty() && state.next_offset.is_none_or(|end| next >= end);
        state.failure.is_some() || (state.sink_gone || state.closing) && drained
    }

    /// Records of the item in the order to be sent, noted as sent. `Err` if there is no room.
    fn admit(&self, item: Item, writer_id: u64) -> std::result::Result<Admitted, Item> {
        let bytes = cost(&item);
        let mut guard = self.state();
        let state = &mut *guard;
        if state.closing || state.failure.is_some() {
            return Ok(Admitted::Closed);
        }
        if is_below(&item, state.pushed_lsn) {
            return Ok(Admitted::Records(0, Vec::new()));
        }
        if !state.admits(bytes, self.options.limit_bytes) {
            return Err(item);
        }
        if matches!(&item, Item::Chunk(chunk) if chunk.number == 0) {
            state.chunks = 0;
            state.open_bytes = 0;
        }
        let limit_bytes = self.options.properties.message_bytes();
        let contents = envelope::contents(&item, state.chunks, limit_bytes, &mut state.described);
        state.chunks = state.chunks.saturating_add(envelope::count(&contents));
        let first = state.first + state.in_flight.len();
        let (last, previous_lsn) = (contents.len() - 1, state.pushed_lsn);
        let mut records = Vec::with_capacity(contents.len());
        for (index, content) in contents.into_iter().enumerate() {
            let record = self.options.envelope(writer_id, previous_lsn, content).encode_to_vec();
            let bytes = record.len() + RECORD_BYTES;
            let end_lsn = item.end_lsn().filter(|_| index == last);
            state.in_flight.push_back(Sent { bytes, end_lsn, offset: None });
            state.in_flight_bytes += bytes;
            records.push(record);
        }
        state.count(bytes as u64, item.end_lsn(), self.options.limit_bytes);
        state.pushed_open = item.end_lsn().is_none();
        state.pushed_lsn = item.end_lsn().unwrap_or(state.pushed_lsn);
        Ok(Admitted::Records(first, records))
    }

    /// The broker has record `number`, at `offset`.
    fn acknowledged(&self, number: usize, offset: i64) {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(index) = number.checked_sub(state.first) else { return };
        if let Some(sent) = state.in_flight.get_mut(index) {
            sent.offset = Some(offset);
        }
        let mut durable_lsn = None;
        while state.failure.is_none()
            && let Some(Sent { bytes, end_lsn, offset: Some(found) }) = state.in_flight.front()
        {
            let expected = state.next_offset.unwrap_or(*found);
            if *found != expected {
                let topic = self.options.topic.clone();
                state.failure = Some(Error::OtherWriter { topic, found: *found, expected });
                break;
            }
            durable_lsn = end_lsn.or(durable_lsn);
            state.in_flight_bytes -= bytes;
            state.next_offset = Some(expected + 1);
            state.in_flight.pop_front();
            state.first += 1;
        }
        drop(guard);
        self.room.notify_one();
        if let Some(lsn) = durable_lsn {
            self.durable.send_if_modified(|last| {
                let modified = lsn > *last;
                *last = lsn.max(*last);
                modified
            });
        }
    }
}

enum Admitted {
    /// The first one's number among all, and their bytes.
    Records(usize, Vec<Vec<u8>>),
    Closed,
}

/// True if it is there already (law 3).
fn is_below(item: &Item, lsn: Lsn) -> bool {
    match item {
        Item::Chunk(chunk) => chunk.begin.commit_lsn < lsn,
        Item::Idle { lsn: idle_lsn } => *idle_lsn <= lsn,
    }
}

impl Options {
    fn envelope(&self, writer_id: u64, previous_lsn: Lsn, content: Content) -> Envelope {
        Envelope {
            version: envelope::VERSION,
            stream_id: self.stream_id(),
            writer_id,
            previous_lsn: previous_lsn.0,
            content: Some(content),
        }
    }

    fn opening(&self) -> Content {
        Content::Opening(v1::Opening {
            job: self.identity.job.clone(),
            stream: self.identity.stream.clone(),
            system_identifier: self.identity.system.clone(),
            slot: self.identity.slot.clone(),
        })
    }
}

/// Hears of deliveries, on the producer's thread.
pub(super) struct Delivery(Arc<Shared>);

impl ClientContext for Delivery {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.0.said.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.said.error(error.clone(), reason);
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::Fatal) {
            self.0.fail(Error::Broker {
                doing: format!("write topic {}", self.0.options.topic),
                brokers: self.0.options.brokers.clone(),
                message: reason.to_string(),
            });
        }
    }
}

impl ProducerContext for Delivery {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        match result {
            Ok(message) => self.0.acknowledged(number, message.offset()),
            Err((error, message)) => {
                self.0.fail(self.0.options.undelivered(error, message.payload_len()))
            }
        }
    }
}

impl Options {
    fn undelivered(&self, error: &KafkaError, bytes: usize) -> Error {
        let topic = self.topic.clone();
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::MessageSizeTooLarge) => Error::TooLarge { topic, bytes },
            Some(code) if is_refusal(code) => {
                Error::Refused { doing: "write".to_string(), topic, message: said(error) }
            }
            _ => Error::Broker {
                doing: format!("write topic {topic}"),
                brokers: self.brokers.clone(),
                message: said(error),
            },
        }
    }
}

/// The producer, open.
pub(super) struct Writer {
    producer: ThreadedProducer<Delivery>,
    writer_id: u64,
    shared: Arc<Shared>,
}

impl Writer {
    /// Opens it to go on behind `shared`'s position, and at offset `high`. Blocks until the broker
    /// has taken a first record. Error: [`Error::OtherWriter`] if another was quicker.
    pub fn open(shared: Arc<Shared>, high: i64) -> Result<Writer> {
        let options = shared.options.clone();
        let config = options.properties.producer(&options.brokers);
        let producer = config.create_with_context(Delivery(shared.clone()));
        let producer: ThreadedProducer<Delivery> = producer.map_err(|e| property(&e))?;
        let writer = Writer { producer, writer_id: fastrand::u64(..), shared };
        let envelope =
            options.envelope(writer.writer_id, writer.shared.pushed_lsn(), options.opening());
        let record = envelope.encode_to_vec();
        {
            let mut state = writer.shared.state();
            state.next_offset = Some(high);
            state.in_flight_bytes += record.len();
            let (bytes, end_lsn, offset) = (record.len(), None, None);
            state.in_flight.push_back(Sent { bytes, end_lsn, offset });
        }
        writer.send(0, &record)?;
        let begun = Instant::now();
        while !writer.shared.state().in_flight.is_empty() {
            if let Some(failure) = writer.shared.failure() {
                return Err(failure);
            }
            if begun.elapsed() > PATIENCE {
                return Err(Error::Broker {
                    doing: format!("write topic {}", options.topic),
                    brokers: options.brokers.clone(),
                    message: writer.shared.said.last().unwrap_or("no answer".to_string()),
                });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(writer)
    }

    fn send(&self, number: usize, record: &[u8]) -> Result<()> {
        let options = &self.shared.options;
        let record = BaseRecord::<(), [u8], usize>::with_opaque_to(&options.topic, number)
            .partition(0)
            .payload(record);
        self.producer.send(record).map_err(|(error, record)| {
            options.undelivered(&error, record.payload.map_or(0, <[u8]>::len))
        })
    }

    /// Waits for what is on its way, and ends. Blocks for as long as `patience` at most.
    pub fn close(&self, patience: Duration) {
        let _ = self.producer.flush(patience);
    }
}

/// The writing end of a topic. `push` returns once the item is on its way, in order; whether the
/// brokers have it is told by [`super::Log::durable`].
pub struct KafkaSink {
    writer: Arc<Writer>,
}

impl KafkaSink {
    pub(super) fn new(writer: Arc<Writer>) -> KafkaSink {
        KafkaSink { writer }
    }
}

impl Sink for KafkaSink {
    async fn push(&mut self, item: Item) -> std::result::Result<(), SinkClosed> {
        let shared = &self.writer.shared;
        let mut item = item;
        loop {
            match shared.admit(item, self.writer.writer_id) {
                Ok(Admitted::Closed) => return Err(SinkClosed),
                Ok(Admitted::Records(first, records)) => {
                    for (index, record) in records.iter().enumerate() {
                        if let Err(error) = self.writer.send(first + index, record) {
                            shared.fail(error);
                            return Err(SinkClosed);
                        }
                    }
                    return Ok(());
                }
                Err(refused) => item = refused,
            }
            shared.room.notified().await;
        }
    }
}

impl Drop for KafkaSink {
    fn drop(&mut self) {
        self.writer.shared.sink_gone();
    }
}
